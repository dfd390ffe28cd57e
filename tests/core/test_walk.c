/* SPDX-License-Identifier: Apache-2.0
 *
 * test_walk.c - random walks over the public API on the simulated machine: reach, wait, release, jumps, repeats,
 * prepare, captures kept and thrown away, replays, failed fetches, updates, calls of all ranks that fail, over
 * thousands of configurations.
 *
 * Knows: the public header and the simulated machine. What should happen is written down here from the header alone:
 *   - a layer's address never changes; layers with the same address share a window;
 *   - wait is BUSY exactly when another layer with the same address has a live view, and OK otherwise;
 *   - every kernel sees, when it runs, the bytes of its layer;
 *   - sequential passes, captured ones too, miss nothing, and bring each layer that is brought once per pass;
 *   - with LAYERSHARD_POISON=1, every kernel that reads a window outside of views sees poison.
 *
 * LAYERSHARD_WALK_STEPS: calls in all (1500000). LAYERSHARD_WALK_SEED: run this one configuration only.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include "patience.h"
#include "walk.h"
#include <cmocka.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* ---- Together ---- */

static void create_rank(void *user, int32_t rank)
{
	struct walk *walk = user;
	struct walker *walker = &walk->walkers[rank];
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;

	options.rank = rank;
	options.size = walk->n;
	options.custom_transport = walk->ops;
	options.bootstrap = sim_bootstrap(walk->world, rank);
	options.timeout_ms = patience(20000);
	options.memory = walk->host ? LSHARD_MEMORY_HOST : LSHARD_MEMORY_CUDA;
	walker->status = lshard_group_create(&options, &walker->group);
	if (walker->status == LSHARD_OK)
		walker->status = lshard_series_create(walker->group, &walk->options, &walker->series);
	if (walker->status == LSHARD_OK)
		walker->status = lshard_series_commit(walker->series, walk_write_layer, walk);
}

static void destroy_rank(void *user, int32_t rank)
{
	struct walk *walk = user;
	struct walker *walker = &walk->walkers[rank];

	walker->status = lshard_series_destroy(walker->series);
	if (walker->status == LSHARD_OK)
		walker->status = lshard_group_destroy(walker->group);
}

static void look_up_addresses(struct walk *walk, struct walker *walker, bool again)
{
	for (uint32_t p = 0; p < walk->options.layer_count; p++)
		for (uint32_t t = 0; t < walk->options.tensor_count; t++) {
			void *address = NULL;

			walk_must_be_ok(
				walk, walker, "address",
				lshard_series_address(walker->series, walk->options.first_layer + p, t, &address));
			if (again && walker->address[p][t] != address)
				walk_give_up(walk, "rank %d: the address of layer %u changed",
					     walk_rank_of(walk, walker), p);
			walker->address[p][t] = address;
		}
}

/* Layers that share an address share a window; no more windows than promised. */
static void count_windows(struct walk *walk, struct walker *walker)
{
	uint32_t windows = 0;
	lshard_stats stats;

	walk_get_stats(walk, walker, &stats);
	for (uint32_t p = 0; p < walk->options.layer_count; p++) {
		bool first = true, shared = false;

		for (uint32_t q = 0; q < walk->options.layer_count; q++) {
			shared |= q != p && walker->address[p][0] == walker->address[q][0];
			first &= q >= p || walker->address[p][0] != walker->address[q][0];
		}
		windows += shared && first;
	}
	if (windows > stats.windows || stats.windows > walk->options.prefetch + 1)
		walk_give_up(walk, "rank %d: %u windows in use, %u counted, k %u", walk_rank_of(walk, walker), windows,
			     stats.windows, walk->options.prefetch);
}

/* ---- One configuration ---- */

static void choose_tensors(struct walk *walk)
{
	static const char *const names[MOST_TENSORS] = {"weight", "scale", "bias"};

	walk->options.tensors = walk->tensors;
	walk->options.tensor_count = 1 + (uint32_t)walk_draw(&walk->random, MOST_TENSORS);
	for (uint32_t t = 0; t < walk->options.tensor_count; t++) {
		lshard_tensor *tensor = &walk->tensors[t];

		*tensor = (lshard_tensor){.name = names[t], .bytes = 1 + walk_draw(&walk->random, 90)};
		if (walk->options.placement == LSHARD_STRIPED && walk_draw(&walk->random, 2)) {
			tensor->rows = 1 + walk_draw(&walk->random, 7);
			tensor->column_bytes = 1 + (uint32_t)walk_draw(&walk->random, 4);
			tensor->bytes = tensor->rows * tensor->column_bytes * (1 + walk_draw(&walk->random, 6));
			tensor->stripe = walk_draw(&walk->random, 2) ? LSHARD_STRIPE_ROWS : LSHARD_STRIPE_COLUMNS;
		}
		walk->tensor_at[t] = walk->truth_bytes;
		walk->truth_bytes += tensor->bytes;
	}
}

static void choose_series(struct walk *walk)
{
	static const uint32_t firsts[] = {0, 0, 1, 3, 40, 61};

	walk->options = (lshard_series_options)LSHARD_SERIES_OPTIONS_INIT;
	walk->options.name = "walk";
	walk->options.first_layer = firsts[walk_draw(&walk->random, 6)];
	walk->options.layer_count =
		1 + (uint32_t)walk_draw(&walk->random, walk_draw(&walk->random, 8) ? 12 : MOST_LAYERS);
	walk->options.prefetch = (uint32_t)walk_draw(&walk->random, walk_draw(&walk->random, 8) ? 5 : 30);
	walk->options.placement = walk_draw(&walk->random, 3) ? LSHARD_WHOLE : LSHARD_STRIPED;
	walk->options.resident_bytes = walk_draw(&walk->random, 2)   ? 0
				       : walk_draw(&walk->random, 8) ? walk_draw(&walk->random, 5000)
								     : UINT64_MAX;
}

/* What a tensor's poison should look like: 0xff over and over for the first, longer patterns for the others. */
static void choose_poison(struct walk *walk)
{
	static const unsigned char bytes[] = {0x01, 0x80, 0xc0, 0x7f, 0x55};
	const char *text = getenv("LAYERSHARD_POISON");

	walk->poison = text && strcmp(text, "1") == 0;
	walk->options.poison_patterns = walk->patterns;
	for (uint32_t t = 0; t < walk->options.tensor_count; t++) {
		walk->patterns[t] = (lshard_poison_pattern){t ? bytes : NULL, t ? 2 * t + 1 : 0};
		for (size_t i = 0; i < MOST_BYTES; i++)
			walk->poison_of[t][i] = t ? bytes[i % (2 * t + 1)] : 0xff;
	}
}

static void choose(struct walk *walk, uint64_t seed)
{
	static const lshard_transport_ops *const flavours[] = {&sim_one_sided,    &sim_one_sided, &sim_one_sided,
							       &sim_lockstep,     &sim_lockstep,  &sim_host_one_sided,
							       &sim_host_lockstep};

	walk->seed = walk->random = seed;
	walk->ops = flavours[walk_draw(&walk->random, 7)];
	walk->host = !(walk->ops->capabilities & LSHARD_CAP_STREAMS);
	walk->collective = walk->ops->capabilities & LSHARD_CAP_COLLECTIVE;
	walk->n = 1 + (int32_t)walk_draw(&walk->random, MOST_RANKS);
	walk->n_streams = 1 + (unsigned)walk_draw(&walk->random, MOST_STREAMS);
	choose_series(walk);
	choose_tensors(walk);
	choose_poison(walk);
	walk->truth = malloc(walk->options.layer_count * walk->truth_bytes);
	walk->world = sim_world_create(walk->n, seed, (enum sim_policy)walk_draw(&walk->random, SIM_POLICIES));
	assert_non_null(walk->truth);
	assert_non_null(walk->world);
	walk_make_truth(walk);
}

static void open_walk(struct walk *walk, uint64_t seed)
{
	choose(walk, seed);
	walk_together(walk, "create and commit", create_rank);
	for (int32_t r = 0; r < walk->n; r++) {
		struct walker *walker = &walk->walkers[r];

		walker->poisoned = walk->poison;
		walker->random = walk->collective ? seed : seed + (uint64_t)r * 977;
		for (unsigned s = 0; s < walk->n_streams; s++)
			walker->streams[s] = sim_stream_create(walk->world, r);
		look_up_addresses(walk, walker, false);
		count_windows(walk, walker);
	}
}

/* Ranks in lockstep make the same calls, though not at the same time; hosts of one thread take turns at each call. */
static bool may_step(const struct walk *walk, const struct walker *walker, uint64_t turns, const uint64_t *taken)
{
	uint64_t mine = taken[walk_rank_of(walk, walker)], least = UINT64_MAX;

	for (int32_t r = 0; r < walk->n; r++)
		if (taken[r] < least)
			least = taken[r];
	return mine < turns && (!walk->collective || mine <= least + (walk->host ? 0 : 3));
}

static void walk_epoch(struct walk *walk)
{
	uint64_t taken[MOST_RANKS] = {0}, left = (uint64_t)walk->n * STEPS_OF_EPOCH;

	while (left) {
		struct walker *walker = &walk->walkers[walk_draw(&walk->random, (uint64_t)walk->n)];

		if (may_step(walk, walker, STEPS_OF_EPOCH, taken)) {
			walk_step(walk, walker);
			taken[walk_rank_of(walk, walker)]++;
			left--;
		}
		sim_run(walk->world, walk_draw(&walk->random, 3) ? walk_draw(&walk->random, 12) : 0);
		walk_look_for_violations(walk);
	}
	for (int32_t r = 0; r < walk->n; r++)
		walk_mend(walk, &walk->walkers[r]);
}

/* What is half done at the end of an epoch: captures are left, some of them without telling the library. */
static void leave_modes(struct walk *walk)
{
	for (int32_t r = 0; r < walk->n; r++) {
		if (walk->walkers[r].program.mode == CAPTURE)
			walk_drop_capture(walk, &walk->walkers[r], "end of the epoch");
		walk->walkers[r].program.mode = FREE;
	}
}

static void close_walk(struct walk *walk)
{
	bool finish_first = walk_draw(&walk->random, 2);

	leave_modes(walk);
	for (int32_t r = 0; r < walk->n; r++)
		look_up_addresses(walk, &walk->walkers[r], true);
	if (finish_first && !sim_finish(walk->world))
		walk_give_up(walk, "streams that never end");
	walk_together(walk, "destroy", destroy_rank);
	if (!sim_finish(walk->world))
		walk_give_up(walk, "streams that never end after destroy");
	walk_look_for_violations(walk);
}

struct totals {
	uint64_t configurations, steps, kernels, replays;
};

static void walk_once(uint64_t seed, struct totals *totals)
{
	struct walk *walk = calloc(1, sizeof *walk);

	assert_non_null(walk);
	open_walk(walk, seed);
	for (unsigned epoch = 0; epoch < EPOCHS; epoch++) {
		walk_epoch(walk);
		if (epoch + 1 < EPOCHS) {
			leave_modes(walk);
			walk_between_epochs(walk);
		}
	}
	close_walk(walk);
	totals->configurations++;
	for (int32_t r = 0; r < walk->n; r++)
		totals->steps += walk->walkers[r].steps;
	totals->kernels += sim_report(walk->world)->kernels + walk->host_kernels;
	totals->replays += sim_report(walk->world)->replays;
	sim_world_destroy(walk->world);
	free(walk->truth);
	free(walk);
}

static uint64_t number_from(const char *name, uint64_t otherwise)
{
	const char *text = getenv(name);

	return text && *text ? strtoull(text, NULL, 10) : otherwise;
}

static void random_walks(void **state)
{
	uint64_t steps = number_from("LAYERSHARD_WALK_STEPS", 1500000), seed = number_from("LAYERSHARD_WALK_SEED", 0);
	struct totals totals = {0, 0, 0, 0};

	(void)state;
	if (seed)
		walk_once(seed, &totals);
	while (!seed && totals.steps < steps)
		walk_once(totals.configurations + 1, &totals);
	print_message("%" PRIu64 " configurations, %" PRIu64 " steps, %" PRIu64 " kernels checked, %" PRIu64
		      " replays\n",
		      totals.configurations, totals.steps, totals.kernels, totals.replays);
	assert_true(totals.kernels > 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(random_walks),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
