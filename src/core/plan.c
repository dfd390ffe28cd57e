/* SPDX-License-Identifier: Apache-2.0
 *
 * plan.c - lshard_plan: what a series would cost and gain, by the very scheme and ring that run it, in virtual time.
 */
#include "ring.h"
#include "scheme.h"

#include <layershard/plan.h>

#include <stdlib.h>
#include <string.h>

/* The ring settles after a few passes; more than this only for the average over a period that is no whole pass. */
#define WARM_PASSES  3u
#define TIMED_PASSES 4u

static void *plan_allocate(void *user, size_t bytes)
{
	(void)user;
	return calloc(1, bytes ? bytes : 1);
}

static void plan_release(void *user, void *pointer)
{
	(void)user;
	free(pointer);
}

static const struct layout_memory plan_memory = {plan_allocate, plan_release, NULL};

/*
 * Programs in virtual time, each with a link into its rank that serves transfers in order. One-sided: this rank's
 * alone.
 * Collective: every rank's, since a transfer begins when the last of them has asked for it. Times in ns.
 */
struct virtual_run {
	const struct scheme *scheme;
	struct ring ring;
	struct ring_window *windows;
	int32_t first_rank;
	int32_t n_ranks;
	double *now;       /* [n_ranks] */
	double *link_free; /* [n_ranks] */
	double *arrives;   /* [n_ranks][n_slots] when the window's bytes are there */
	double compute_ns;
	double transfer_ns;
};

static double *arrival(const struct virtual_run *run, int32_t index, uint32_t window)
{
	return &run->arrives[(size_t)index * run->scheme->map.n_slots + window];
}

static bool comes_to(const struct virtual_run *run, int32_t index, uint32_t position)
{
	const struct layout *layout = &run->scheme->layout;

	return layout->placement == LSHARD_STRIPED || layout_source(layout, position) != run->first_rank + index;
}

static void start_fetches(struct virtual_run *run)
{
	struct ring_fetch fetch;
	double asked = run->now[0];

	for (int32_t index = 1; index < run->n_ranks; index++)
		if (asked < run->now[index])
			asked = run->now[index];
	while (ring_next_fetch(&run->ring, &fetch))
		for (int32_t index = 0; index < run->n_ranks; index++) {
			if (!comes_to(run, index, fetch.position))
				continue;
			if (run->link_free[index] < asked)
				run->link_free[index] = asked;
			run->link_free[index] += run->transfer_ns;
			*arrival(run, index, fetch.window) = run->link_free[index];
		}
}

static void run_layer(struct virtual_run *run, uint32_t position)
{
	uint32_t window, other;
	bool in_ring;

	ring_reach(&run->ring, position);
	start_fetches(run);
	in_ring = ring_wait(&run->ring, position, 0, &window, &other) != RING_STORED;
	for (int32_t index = 0; index < run->n_ranks; index++) {
		if (in_ring && comes_to(run, index, position) && run->now[index] < *arrival(run, index, window))
			run->now[index] = *arrival(run, index, window);
		run->now[index] += run->compute_ns;
	}
}

/* A replay ends when all that it has asked for is there. */
static void end_captured_pass(struct virtual_run *run)
{
	ring_join(&run->ring);
	run->ring.horizon = UINT32_MAX;
	start_fetches(run);
	run->ring.horizon = run->scheme->horizon;
	for (int32_t index = 0; index < run->n_ranks; index++)
		if (run->now[index] < run->link_free[index])
			run->now[index] = run->link_free[index];
}

static void run_passes(struct virtual_run *run, unsigned passes)
{
	for (unsigned pass = 0; pass < passes; pass++) {
		for (uint32_t position = 0; position < run->scheme->layout.layers; position++)
			run_layer(run, position);
		if (run->ring.captured)
			end_captured_pass(run);
	}
}

static lshard_status allocate_run(struct virtual_run *run)
{
	const size_t ranks = (size_t)run->n_ranks;

	run->windows = plan_allocate(NULL, run->scheme->map.n_slots * sizeof *run->windows);
	run->now = plan_allocate(NULL, ranks * sizeof *run->now);
	run->link_free = plan_allocate(NULL, ranks * sizeof *run->link_free);
	run->arrives = plan_allocate(NULL, ranks * run->scheme->map.n_slots * sizeof *run->arrives);
	return run->windows && run->now && run->link_free && run->arrives ? LSHARD_OK : LSHARD_ERR_NO_MEMORY;
}

static void release_run(struct virtual_run *run)
{
	plan_release(NULL, run->arrives);
	plan_release(NULL, run->link_free);
	plan_release(NULL, run->now);
	plan_release(NULL, run->windows);
}

/* Rounded; what does not fit is said to be for ever. */
static uint64_t nanoseconds(double time)
{
	if (time >= (double)UINT64_MAX)
		return UINT64_MAX;
	return time > 0 ? (uint64_t)(time + 0.5) : 0;
}

static double transfer_ns(const struct scheme *scheme, const lshard_plan_input *input)
{
	return (double)scheme->incoming_bytes * 1e9 / (double)input->link_bytes_per_s;
}

/* @p pass_ns: of a steady pass, eager or captured. */
static lshard_status run_steadily(const struct scheme *scheme, const lshard_plan_input *input, bool captured,
				  double *pass_ns)
{
	const bool together = scheme->link.collective;
	struct virtual_run run = {.scheme = scheme,
				  .first_rank = together ? 0 : scheme->link.rank,
				  .n_ranks = together ? scheme->link.size : 1,
				  .compute_ns = (double)input->compute_ns};
	const double *now;
	double begin;
	lshard_status status = allocate_run(&run);

	if (status < 0)
		goto out;
	run.transfer_ns = transfer_ns(scheme, input);
	now = &run.now[together ? scheme->link.rank : 0];
	ring_init(&run.ring, &scheme->map, run.windows, scheme->horizon);
	if (captured)
		ring_enter_capture(&run.ring);
	start_fetches(&run);
	run_passes(&run, WARM_PASSES);
	begin = *now;
	run_passes(&run, TIMED_PASSES);
	*pass_ns = (*now - begin) / TIMED_PASSES;
out:
	release_run(&run);
	return status;
}

static lshard_status predict(const struct scheme *scheme, const lshard_plan_input *input, lshard_plan_result *result)
{
	const double ideal = (double)input->compute_ns * scheme->layout.layers;
	double eager = 0, captured = 0;
	lshard_status status = run_steadily(scheme, input, false, &eager);

	if (status >= 0)
		status = run_steadily(scheme, input, true, &captured);
	if (status < 0)
		return status;
	result->pass_ns = nanoseconds(eager);
	result->exposed_ns = nanoseconds(eager - ideal);
	result->transfer_ns = nanoseconds(transfer_ns(scheme, input) * result->fetched_layers);
	result->captured_pass_ns = nanoseconds(captured);
	return LSHARD_OK;
}

static void describe(const struct scheme *scheme, lshard_plan_result *result)
{
	const struct layout *layout = &scheme->layout;
	struct scheme_distances distances;

	scheme_distances(scheme, &distances);
	result->layer_bytes = layout->layer_bytes;
	result->replicated_bytes = layout->layer_bytes * layout->layers;
	result->shard_bytes = layout->shard_bytes_of[scheme->link.rank];
	result->windows = scheme->windows;
	result->window_bytes = scheme->buffer_bytes * scheme_moving_buffers(scheme);
	result->residents = scheme->residents;
	result->resident_bytes = scheme->buffer_bytes * scheme->residents;
	result->fetched_layers = distances.fetched;
	result->shortest_distance = distances.shortest;
	result->below_k_count = distances.below_k;
	memcpy(result->below_k, distances.named, sizeof result->below_k);
}

lshard_status lshard_plan(const lshard_series_options *options, const lshard_plan_input *input,
			  lshard_plan_result *result)
{
	lshard_plan_input given = LSHARD_PLAN_INPUT_INIT;
	lshard_plan_result made = LSHARD_PLAN_RESULT_INIT;
	struct series_options taken;
	struct scheme scheme;
	lshard_status status;

	if (!options || !input || !result || options_take_series(&taken, options, NULL) < 0 ||
	    lshard__sized_take(&given, sizeof given, input, "lshard_plan_input", NULL) < 0 || given.size < 1 ||
	    (given.large_page_bytes & (given.large_page_bytes - 1)) || given.rank < 0 || given.rank >= given.size)
		return LSHARD_ERR_INVALID;

	status = scheme_open(&scheme, &taken.given,
			     &(struct scheme_link){.rank = given.rank,
						   .size = given.size,
						   .collective = given.collective != 0,
						   .direct = given.direct & 1,
						   .composes = given.direct & 2,
						   .granule = given.granule_bytes,
						   .large_page = given.large_page_bytes},
			     &plan_memory, NULL);
	if (status < 0)
		return status;
	describe(&scheme, &made);
	if (given.compute_ns && given.link_bytes_per_s)
		status = predict(&scheme, &given, &made);
	scheme_close(&scheme, &plan_memory);
	return status < 0 ? status : lshard__sized_give(result, &made, sizeof made, "lshard_plan_result", NULL);
}
