/* SPDX-License-Identifier: Apache-2.0
 *
 * simulated_ranks.c - see simulated_ranks.h.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include "simulated_ranks.h"
#include "patience.h"
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const lshard_tensor run_tensors[TENSORS] = {{.name = "weight", .bytes = 700},
					    {.name = "scale", .bytes = 33, .alignment = 512},
					    {.name = "bias", .bytes = 1}};

static const uint64_t tensor_at[TENSORS] = {0, 700, 733};

unsigned char *run_truth(const struct run *run, uint32_t layer, uint32_t tensor)
{
	return run->truth + (layer - run->options.first_layer) * (uint64_t)TRUTH_BYTES + tensor_at[tensor];
}

void run_make_truth(struct run *run, unsigned generation)
{
	uint64_t bytes = (uint64_t)run->options.layer_count * TRUTH_BYTES;

	run->generation = generation;
	for (uint64_t i = 0; i < bytes; i++)
		run->truth[i] = (unsigned char)((i * 2654435761u + generation * 40503u) >> 9);
}

int run_write_layer(void *user, uint32_t layer, void *const *to)
{
	const struct run *run = user;

	for (uint32_t t = 0; t < TENSORS; t++)
		memcpy(to[t], run_truth(run, layer, t), run_tensors[t].bytes);
	return 0;
}

static lshard_group_options group_options(const struct run *run, int32_t rank)
{
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;

	options.rank = rank;
	options.size = run->n;
	options.custom_transport = run->ops;
	options.bootstrap = sim_bootstrap(run->world, rank);
	options.timeout_ms = run->timeout_ms;
	options.memory = run->ops->capabilities & LSHARD_CAP_STREAMS ? LSHARD_MEMORY_CUDA : LSHARD_MEMORY_HOST;
	return options;
}

static void create_rank(void *user, int32_t rank)
{
	struct run *run = user;
	struct run_member *member = &run->members[rank];
	lshard_group_options options = group_options(run, rank);

	member->status = lshard_group_create(&options, &member->group);
	if (member->status == LSHARD_OK)
		member->status = lshard_series_create(member->group, &run->options, &member->series);
}

void run_commit_rank(void *user, int32_t rank)
{
	struct run *run = user;

	run->members[rank].status = lshard_series_commit(run->members[rank].series, run_write_layer, run);
}

void run_update_begin_rank(void *user, int32_t rank)
{
	struct run *run = user;

	run->members[rank].status = lshard_series_update_begin(run->members[rank].series);
}

void run_update_end_rank(void *user, int32_t rank)
{
	struct run *run = user;

	run->members[rank].status = lshard_series_update_end(run->members[rank].series, run_write_layer, run);
}

void run_rewind_rank(void *user, int32_t rank)
{
	struct run *run = user;

	run->members[rank].status = lshard_series_rewind(run->members[rank].series);
}

static void destroy_rank(void *user, int32_t rank)
{
	struct run *run = user;

	run->members[rank].status = lshard_series_destroy(run->members[rank].series);
	if (run->members[rank].status == LSHARD_OK)
		run->members[rank].status = lshard_group_destroy(run->members[rank].group);
}

void run_together(struct run *run, void (*call)(void *user, int32_t rank))
{
	sim_collective(run->world, call, run);
	for (int32_t r = 0; r < run->n; r++)
		if (run->members[r].status != LSHARD_OK)
			fail_msg("rank %d: %s: %s", r, lshard_status_name(run->members[r].status),
				 run->members[r].series ? lshard_series_error(run->members[r].series) : "");
}

struct run *run_create_within(const lshard_transport_ops *ops, int32_t n, uint32_t first, uint32_t count, uint32_t k,
			      uint32_t timeout_ms)
{
	struct run *run = calloc(1, sizeof *run);

	assert_non_null(run);
	run->ops = ops;
	run->n = n;
	run->timeout_ms = timeout_ms;
	run->world = sim_world_create(n, first * 1000 + count * 10 + k, (enum sim_policy)(count % SIM_POLICIES));
	run->options = (lshard_series_options)LSHARD_SERIES_OPTIONS_INIT;
	run->options.name = "blocks";
	run->options.first_layer = first;
	run->options.layer_count = count;
	run->options.tensors = run_tensors;
	run->options.tensor_count = TENSORS;
	run->options.prefetch = k;
	run->truth = malloc((size_t)count * TRUTH_BYTES);
	assert_non_null(run->truth);
	run_make_truth(run, 0);
	for (int32_t r = 0; r < n; r++)
		run->members[r].stream = sim_stream_create(run->world, r);
	run_together(run, create_rank);
	return run;
}

struct run *run_create(const lshard_transport_ops *ops, int32_t n, uint32_t first, uint32_t count, uint32_t k)
{
	return run_create_within(ops, n, first, count, k, patience(2000)); /* a few let it pass */
}

struct run *run_open(const lshard_transport_ops *ops, int32_t n, uint32_t first, uint32_t count, uint32_t k)
{
	struct run *run = run_create(ops, n, first, count, k);

	run_together(run, run_commit_rank);
	return run;
}

void run_close(struct run *run)
{
	assert_true(sim_finish(run->world));
	run_together(run, destroy_rank);
	assert_string_equal(sim_report(run->world)->first, "");
	sim_world_destroy(run->world);
	free(run->truth);
	free(run);
}

void run_call_ok(const struct run_member *member, const char *call, uint32_t layer, lshard_status status)
{
	if (status != LSHARD_OK)
		fail_msg("%s(%u): %s: %s", call, layer, lshard_status_name(status),
			 lshard_series_error(member->series));
}

void run_layer(struct run *run, int32_t rank, uint32_t layer)
{
	struct run_member *member = &run->members[rank];

	run_call_ok(member, "reach", layer, lshard_reach(member->series, layer, member->stream));
	run_call_ok(member, "wait", layer, lshard_wait(member->series, layer, member->stream));
	for (uint32_t t = 0; t < TENSORS; t++) {
		void *address = NULL;

		run_call_ok(member, "address", layer, lshard_series_address(member->series, layer, t, &address));
		sim_kernel(member->stream, address, run_truth(run, layer, t), run_tensors[t].bytes, layer);
	}
	sim_run(run->world, ++member->steps % 17);
}

void run_pass(struct run *run, int32_t rank)
{
	for (uint32_t i = 0; i < run->options.layer_count; i++)
		run_layer(run, rank, run->options.first_layer + i);
}

lshard_stats run_stats(const struct run *run, int32_t rank)
{
	lshard_stats stats = LSHARD_STATS_INIT;

	assert_int_equal(lshard_series_stats(run->members[rank].series, &stats), LSHARD_OK);
	return stats;
}

uint64_t run_misses(const struct run *run)
{
	uint64_t misses = 0;

	for (int32_t r = 0; r < run->n; r++)
		misses += run_stats(run, r).misses;
	return misses;
}
