/* SPDX-License-Identifier: Apache-2.0
 *
 * test_defects.c - the eight defects of the original from which layershard grew. Each test first runs the original's
 * rule, written down as a small model, and sees it go wrong; then it does the same through the public API and sees that
 * all is well.
 *
 * Knows: the public header, the simulated machine.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include "simulated_ranks.h"
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- The original's rule ---- */

#define NOTHING         (-1)
#define ORIGINAL_LAYERS 64

struct original {
	int first, count, k;
	int window_of[ORIGINAL_LAYERS]; /* by layer - first */
	int holds[ORIGINAL_LAYERS];     /* by window */
	int offset;
};

/* Its limit on k, else false. */
static bool original_open(struct original *original, int first, int count, int k)
{
	*original = (struct original){.first = first, .count = count, .k = k, .offset = k};
	for (int i = 0; i < count; i++)
		original->window_of[i] = i < k ? i : NOTHING;
	for (int w = 0; w <= k; w++)
		original->holds[w] = w < k ? first + w : NOTHING;
	return k >= 0 && k <= (count > 2 ? count - 2 : 0);
}

/* False where it asserted. */
static bool original_reach(struct original *original, int layer)
{
	int next = (layer + original->k) % original->count + original->first;
	int window = original->offset;

	original->window_of[next - original->first] = window;
	original->offset = (original->offset + 1) % (original->k + 1);
	if (original->holds[window] == next)
		return false;
	original->holds[window] = next;
	return true;
}

static bool original_wait(const struct original *original, int layer)
{
	int window = original->window_of[layer - original->first];

	return window != NOTHING && original->holds[window] == layer;
}

/* Layers that went wrong in a number of passes. */
static int original_passes(struct original *original, int passes)
{
	int wrong = 0;

	for (int pass = 0; pass < passes; pass++)
		for (int i = 0; i < original->count; i++)
			wrong += !original_reach(original, original->first + i) ||
				 !original_wait(original, original->first + i);
	return wrong;
}

/* All ranks, whole passes: every byte right, nothing fetched on demand. */
static void passes_are_right(const lshard_transport_ops *ops, int32_t n, uint32_t first, uint32_t count, uint32_t k)
{
	struct run *run = run_open(ops, n, first, count, k);

	for (int pass = 0; pass < 3; pass++)
		for (int32_t r = 0; r < n; r++)
			run_pass(run, r);
	assert_int_equal(run_misses(run), 0);
	run_close(run);
}

/* ---- 1. The formula ---- */

static void d1_series_that_do_not_begin_at_a_multiple_of_their_count(void **state)
{
	struct original original;

	(void)state;
	assert_true(original_open(&original, 0, 20, 1));
	assert_int_equal(original_passes(&original, 3), 0); /* the model is fair: this worked */
	assert_true(original_open(&original, 40, 20, 3));
	assert_int_equal(original_passes(&original, 3), 0);
	assert_true(original_open(&original, 40, 19, 1));
	assert_true(original_passes(&original, 1) > 0);
	assert_true(original_open(&original, 3, 58, 1));
	assert_true(original_passes(&original, 1) > 0);

	for (uint32_t k = 0; k <= 3; k++) {
		passes_are_right(&sim_one_sided, 4, 40, 19, k);
		passes_are_right(&sim_one_sided, 3, 3, 58, k);
		passes_are_right(&sim_lockstep, 3, 40, 19, k);
	}
}

static void d1_short_series_and_any_k(void **state)
{
	struct original original;

	(void)state;
	assert_false(original_open(&original, 0, 1, 1)); /* k is refused */
	assert_false(original_open(&original, 0, 6, 5));
	assert_true(original_open(&original, 0, 1, 0));
	assert_true(original_passes(&original, 2) > 0); /* the second pass asserts */

	for (uint32_t k = 0; k <= 8; k += 4)
		for (uint32_t count = 1; count <= 7; count++) {
			passes_are_right(&sim_one_sided, 3, 5, count, k);
			passes_are_right(&sim_lockstep, 3, 5, count, k);
		}
}

/* ---- 2. Addresses ---- */

static bool original_windows_stay(int count, int k)
{
	struct original original;
	int before[ORIGINAL_LAYERS];
	bool same = true;

	original_open(&original, 0, count, k);
	original_passes(&original, 1);
	memcpy(before, original.window_of, sizeof before);
	for (int i = 0; i < count; i++) { /* while the layer is used */
		original_reach(&original, i);
		same &= original.window_of[i] == before[i] || i < k;
	}
	return same;
}

static void remember_addresses(const struct run *run, int32_t rank, void **addresses)
{
	for (uint32_t i = 0; i < run->options.layer_count; i++)
		assert_int_equal(lshard_series_address(run->members[rank].series, run->options.first_layer + i, 0,
						       &addresses[i]),
				 LSHARD_OK);
}

/* A pass captured once must be right whenever it is replayed. */
static void capture_and_replay(struct run *run, int32_t rank)
{
	struct run_member *member = &run->members[rank];
	struct sim_graph *graph;

	assert_int_equal(lshard_series_prepare(member->series, member->stream), LSHARD_OK);
	sim_capture_begin(member->stream);
	run_pass(run, rank);
	run_call_ok(member, "join", 0, lshard_series_join(member->series, member->stream));
	graph = sim_capture_end(member->stream);
	if (!graph)
		fail_msg("capture: %s", sim_capture_error(run->world));
	for (int i = 0; i < 3; i++) {
		assert_int_equal(lshard_series_prepare(member->series, member->stream), LSHARD_OK);
		sim_graph_launch(member->stream, graph);
	}
}

static void d2_a_layers_address_never_changes(void **state)
{
	static const uint32_t cases[][2] = {{5, 1}, {7, 2}, {19, 1}, {10, 3}};

	(void)state;
	assert_true(original_windows_stay(6, 1));
	for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
		struct run *run;
		void *before[64], *after[64];

		assert_false(original_windows_stay((int)cases[c][0], (int)cases[c][1]));
		run = run_open(&sim_one_sided, 2, 1, cases[c][0], cases[c][1]);
		remember_addresses(run, 0, before);
		run_pass(run, 0);
		capture_and_replay(run, 0);
		run_pass(run, 0);
		run_pass(run, 1);
		remember_addresses(run, 0, after);
		assert_memory_equal(before, after, cases[c][0] * sizeof before[0]);
		assert_true(sim_finish(run->world));
		assert_int_equal(sim_report(run->world)->replays, 3);
		run_close(run);
	}
}

/* ---- 3. Misuse ---- */

static void error_says(const struct run_member *member, const char *layer)
{
	const char *text = lshard_series_error(member->series);

	if (!strstr(text, "'blocks'") || !strstr(text, "rank 1") || !strstr(text, layer))
		fail_msg("'%s' does not name rank 1, series 'blocks' and '%s'", text, layer);
}

static void d3_misuse_is_a_status_that_says_what_and_where(void **state)
{
	struct run *run = run_create(&sim_one_sided, 2, 10, 6, 0); /* rank 1 stores the odd ones */
	struct run_member *member = &run->members[1];
	struct sim_stream *stream = member->stream;
	void *address = NULL;

	(void)state;
	assert_int_equal(lshard_reach(member->series, 10, stream), LSHARD_ERR_STATE);
	error_says(member, "not committed");
	assert_int_equal(lshard_series_storage(member->series, 10, 0, &address), LSHARD_ERR_NOT_SUPPORTED);
	error_says(member, "layer 10");
	run_together(run, run_commit_rank);
	assert_int_equal(lshard_series_commit(member->series, run_write_layer, run), LSHARD_ERR_STATE);
	error_says(member, "committed");
	assert_int_equal(lshard_reach(member->series, 9, stream), LSHARD_ERR_RANGE);
	error_says(member, "layer 9");
	assert_int_equal(lshard_wait(member->series, 16, stream), LSHARD_ERR_RANGE);
	error_says(member, "layer 16");
	assert_int_equal(lshard_series_address(member->series, 12, TENSORS, &address), LSHARD_ERR_RANGE);
	error_says(member, "layer 12");
	run_layer(run, 1, 10);
	assert_int_equal(lshard_wait(member->series, 12, stream), LSHARD_ERR_BUSY); /* one window */
	error_says(member, "layer 12");
	error_says(member, "layer 10");
	run_layer(run, 1, 12); /* a failed call has changed nothing */
	run_close(run);
}

/* ---- 4. Order of calls ---- */

/* The original: the transfers of all ranks must match, one after the other, or none of the later ones ever ends. */
static bool original_never_ends(const int *one, const int *other, int count)
{
	for (int i = 0; i < count; i++)
		if (one[i] != other[i])
			return true;
	return false;
}

static void d4_one_sided_ranks_need_no_lockstep(void **state)
{
	static const int one[] = {1, 2, 3, 0}, other[] = {2, 1, 3, 0};
	struct run *run = run_open(&sim_one_sided, 3, 0, 8, 1);

	(void)state;
	assert_true(original_never_ends(one, other, 4));
	for (int pass = 0; pass < 5; pass++)
		run_pass(run, 0); /* rank 2 is idle */
	for (uint32_t i = 0; i < 8; i++)
		run_layer(run, 1, 7 - i); /* backwards */
	run_pass(run, 0);
	run_close(run);
}

static void d4_collective_ranks_learn_that_they_are_out_of_step(void **state)
{
	struct run *run = run_open(&sim_lockstep, 3, 0, 9, 1);
	bool told = false;

	(void)state;
	for (int32_t r = 0; r < 3; r++)
		run_pass(run, r);
	assert_true(sim_finish(run->world));
	for (int32_t r = 0; r < 3; r++) {
		uint32_t layer = r == 1 ? 5 : 3;
		struct run_member *member = &run->members[r];
		lshard_status status = lshard_reach(member->series, layer, member->stream);

		if (status == LSHARD_OK)
			status = lshard_wait(member->series, layer, member->stream);
		if (status == LSHARD_ERR_OUT_OF_STEP) {
			assert_non_null(strstr(lshard_series_error(member->series), "rank 0 asked first"));
			told = true;
		}
	}
	assert_true(told);
	run_together(run, run_rewind_rank);
	for (int32_t r = 0; r < 3; r++)
		run_pass(run, r);
	run_close(run);
}

static void d4_a_rank_that_waits_in_vain_learns_for_whom(void **state)
{
	struct run *run = run_open(&sim_host_lockstep, 2, 0, 6, 1);
	lshard_status status = LSHARD_OK;

	(void)state;
	for (uint32_t i = 0; i < 6 && status == LSHARD_OK; i++) { /* rank 1 never comes */
		assert_int_equal(lshard_reach(run->members[0].series, i, NULL), LSHARD_OK);
		status = lshard_wait(run->members[0].series, i, NULL);
	}
	assert_int_equal(status, LSHARD_ERR_TIMEOUT);
	assert_non_null(strstr(lshard_series_error(run->members[0].series), "not asked for by rank 1"));
	run_together(run, run_rewind_rank);
	run_close(run);
}

/* ---- 5. Several tensors: all other tests use three per layer ---- */

static void d5_a_layer_has_any_number_of_tensors(void **state)
{
	struct run *run = run_open(&sim_host_one_sided, 4, 2, 5, 1);

	(void)state;
	for (int32_t r = 0; r < 4; r++)
		for (uint32_t layer = 2; layer < 7; layer++) {
			assert_int_equal(lshard_reach(run->members[r].series, layer, NULL), LSHARD_OK);
			assert_int_equal(lshard_wait(run->members[r].series, layer, NULL), LSHARD_OK);
			for (uint32_t t = 0; t < TENSORS; t++) {
				void *address = NULL;

				lshard_series_address(run->members[r].series, layer, t, &address);
				assert_memory_equal(address, run_truth(run, layer, t), run_tensors[t].bytes);
				assert_int_equal((uintptr_t)address % 16, 0);
			}
		}
	run_close(run);
}

/* ---- 6. Passes that are not whole ---- */

/* What programs do: break off and start again, skip a layer, use one twice, repeat a stretch. */
static const uint32_t odd_pass[] = {0, 1, 2, 0, 1, 2, 3, 5, 6, 6, 7, 8, 8, 2, 3, 4, 4, 0, 1, 2, 3, 4, 5, 6, 7, 8};

#define ODD_STEPS (sizeof odd_pass / sizeof odd_pass[0])

static void d6_odd_passes_cost_only_transfers(void **state)
{
	struct original original;
	struct run *run = run_open(&sim_one_sided, 3, 20, 9, 2);
	struct run *lockstep = run_open(&sim_lockstep, 3, 20, 9, 2);
	int wrong = 0;

	(void)state;
	original_open(&original, 0, 9, 2);
	for (size_t i = 0; i < ODD_STEPS; i++)
		wrong += !original_reach(&original, (int)odd_pass[i]) || !original_wait(&original, (int)odd_pass[i]);
	assert_true(wrong > 0);

	for (int32_t r = 0; r < 3; r++)
		for (size_t i = 0; i < ODD_STEPS; i++) {
			run_layer(run, r, 20 + odd_pass[i]);
			run_layer(lockstep, r, 20 + odd_pass[i]);
		}
	assert_int_equal(run_misses(run) + run_misses(lockstep), 0);
	run_close(lockstep);
	run_close(run);
}

static void d6_the_pass_after_an_odd_one_is_steady_again(void **state)
{
	struct run *run = run_open(&sim_one_sided, 2, 0, 9, 1);
	uint64_t before;

	(void)state;
	for (size_t i = 0; i < ODD_STEPS; i++)
		run_layer(run, 0, odd_pass[i]);
	run_pass(run, 0);
	before = run_stats(run, 0).fetches;
	run_pass(run, 0);
	assert_int_equal(run_stats(run, 0).fetches - before, run_stats(run, 0).fetched_layers);
	run_close(run);
}

/* ---- 7. New weights, teardown, several at once ---- */

static void update(struct run *run)
{
	run_together(run, run_update_begin_rank);
	run_make_truth(run, run->generation + 1);
	run_together(run, run_update_end_rank);
}

static void d7_weights_can_be_replaced(void **state)
{
	static const lshard_transport_ops *const flavours[] = {&sim_one_sided, &sim_lockstep};

	(void)state;
	for (size_t f = 0; f < 2; f++) {
		struct run *run = run_open(flavours[f], 3, 3, 8, 1);

		for (int generation = 1; generation <= 3; generation++) {
			for (int32_t r = 0; r < 3; r++)
				run_pass(run, r); /* kernels are still queued when the update begins */
			update(run);
			assert_int_equal(run_stats(run, 0).generation, generation);
		}
		for (int32_t r = 0; r < 3; r++)
			run_pass(run, r);
		run_close(run);
	}
}

static void d7_groups_and_series_live_side_by_side(void **state)
{
	struct run *one = run_open(&sim_one_sided, 2, 0, 5, 1), *other = run_open(&sim_one_sided, 4, 7, 9, 2);

	(void)state;
	for (int pass = 0; pass < 2; pass++) {
		run_pass(one, 0);
		run_pass(other, 3);
	}
	run_close(one);
	run_pass(other, 2);
	one = run_open(&sim_lockstep, 3, 1, 4, 0); /* and again after teardown */
	for (int32_t r = 0; r < 3; r++)
		run_pass(one, r);
	run_close(one);
	run_close(other);
}

/* Two series of a group: the run's own, and a striped one of the same layers. */
struct pair {
	struct run *run;
	struct run_member second[RANKS];
};

static void create_second(void *user, int32_t rank)
{
	struct pair *pair = user;
	struct run_member *member = &pair->second[rank];
	lshard_series_options options = pair->run->options;

	*member = pair->run->members[rank];
	options.name = "second";
	options.placement = LSHARD_STRIPED;
	member->status = lshard_series_create(member->group, &options, &member->series);
	if (member->status == LSHARD_OK)
		member->status = lshard_series_commit(member->series, run_write_layer, pair->run);
}

static struct pair pair_open(const lshard_transport_ops *ops, uint32_t count)
{
	struct pair pair = {.run = run_open(ops, 3, 0, count, 1)};

	sim_collective(pair.run->world, create_second, &pair);
	for (int32_t r = 0; r < 3; r++)
		assert_int_equal(pair.second[r].status, LSHARD_OK);
	return pair;
}

static void pair_close(struct pair *pair)
{
	for (int32_t r = 0; r < 3; r++)
		assert_int_equal(lshard_group_destroy(pair->run->members[r].group), LSHARD_ERR_BUSY);
	assert_true(sim_finish(pair->run->world));
	for (int32_t r = 0; r < 3; r++)
		assert_int_equal(lshard_series_destroy(pair->second[r].series), LSHARD_OK);
	run_close(pair->run);
}

static void use_both(struct pair *pair, int32_t rank, uint32_t layer)
{
	struct run_member *second = &pair->second[rank];
	void *address = NULL;

	run_layer(pair->run, rank, layer);
	run_call_ok(second, "reach", layer, lshard_reach(second->series, layer, second->stream));
	run_call_ok(second, "wait", layer, lshard_wait(second->series, layer, second->stream));
	run_call_ok(second, "address", layer, lshard_series_address(second->series, layer, 0, &address));
	sim_kernel(second->stream, address, run_truth(pair->run, layer, 0), run_tensors[0].bytes, layer);
}

static void d7_a_group_has_several_series(void **state)
{
	static const lshard_transport_ops *const flavours[] = {&sim_one_sided, &sim_lockstep};

	(void)state;
	for (size_t f = 0; f < 2; f++) {
		struct pair pair = pair_open(flavours[f], 7);

		for (uint32_t step = 0; step < 14; step++)
			for (int32_t r = 0; r < 3; r++)
				use_both(&pair, r, step % 7);
		pair_close(&pair);
	}
}

static void prepare_both(struct pair *pair, int32_t rank)
{
	struct run_member *first = &pair->run->members[rank], *second = &pair->second[rank];

	run_call_ok(first, "prepare", 0, lshard_series_prepare(first->series, first->stream));
	run_call_ok(second, "prepare", 0, lshard_series_prepare(second->series, second->stream));
}

static struct sim_graph *capture_both(struct pair *pair, int32_t rank)
{
	struct run_member *first = &pair->run->members[rank], *second = &pair->second[rank];
	struct sim_graph *graph;

	prepare_both(pair, rank);
	sim_capture_begin(first->stream);
	for (uint32_t layer = 0; layer < pair->run->options.layer_count; layer++)
		use_both(pair, rank, layer);
	run_call_ok(first, "join", 0, lshard_series_join(first->series, first->stream));
	run_call_ok(second, "join", 0, lshard_series_join(second->series, second->stream));
	graph = sim_capture_end(first->stream);
	if (!graph)
		fail_msg("capture: %s", sim_capture_error(pair->run->world));
	return graph;
}

static void d7_one_graph_holds_several_series(void **state)
{
	static const lshard_transport_ops *const flavours[] = {&sim_one_sided, &sim_lockstep};

	(void)state;
	for (size_t f = 0; f < 2; f++) {
		struct pair pair = pair_open(flavours[f], 5);
		struct sim_graph *graphs[3];

		for (int32_t r = 0; r < 3; r++)
			graphs[r] = capture_both(&pair, r);
		for (int replay = 0; replay < 3; replay++)
			for (int32_t r = 0; r < 3; r++) {
				prepare_both(&pair, r);
				sim_graph_launch(pair.run->members[r].stream, graphs[r]);
			}
		assert_true(sim_finish(pair.run->world));
		assert_int_equal(sim_report(pair.run->world)->replays, 9);
		pair_close(&pair);
	}
}

/* ---- 8. Seeing it ---- */

static void d8_counters_tell_whether_it_helped(void **state)
{
	struct run *run =
		run_open(&sim_one_sided, 2, 1, 7, 1); /* rank 0 stores 2, 4, 6; brings 1, 3, 5, 7 in two windows */
	lshard_stats before, after;

	(void)state;
	run_pass(run, 0);
	before = run_stats(run, 0);
	run_pass(run, 0);
	after = run_stats(run, 0);
	assert_int_equal(after.windows, 2);
	assert_int_equal(after.fetched_layers, 4);
	assert_int_equal(after.below_k_count, 0);
	assert_int_equal(after.shard_bytes, 3 * after.layer_bytes);
	assert_int_equal(after.window_bytes, 2 * after.layer_bytes);
	assert_int_equal(after.reaches - before.reaches, 7);
	assert_int_equal(after.waits - before.waits, 7);
	assert_int_equal(after.fetches - before.fetches, 4);
	assert_int_equal(after.fetched_bytes - before.fetched_bytes, 4 * after.layer_bytes);
	assert_int_equal(after.misses, 0);
	assert_int_equal(lshard_release(run->members[0].series, 7, run->members[0].stream), LSHARD_OK);
	assert_int_equal(lshard_wait(run->members[0].series, 5, run->members[0].stream), LSHARD_OK);
	assert_int_equal(run_stats(run, 0).misses, 1); /* asked for without being reached */
	run_close(run);
}

static void d8_layers_below_k_are_named(void **state)
{
	struct run *run = run_open(&sim_lockstep, 2, 40, 5, 1); /* an odd circle in two windows: one layer is below k */
	lshard_stats stats = run_stats(run, 0), other = run_stats(run, 1);

	(void)state;
	assert_int_equal(stats.below_k_count + other.below_k_count, 1);
	assert_in_range(stats.below_k_count ? stats.below_k[0] : other.below_k[0], 40, 44);
	run_close(run);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(d1_series_that_do_not_begin_at_a_multiple_of_their_count),
		cmocka_unit_test(d1_short_series_and_any_k),
		cmocka_unit_test(d2_a_layers_address_never_changes),
		cmocka_unit_test(d3_misuse_is_a_status_that_says_what_and_where),
		cmocka_unit_test(d4_one_sided_ranks_need_no_lockstep),
		cmocka_unit_test(d4_collective_ranks_learn_that_they_are_out_of_step),
		cmocka_unit_test(d4_a_rank_that_waits_in_vain_learns_for_whom),
		cmocka_unit_test(d5_a_layer_has_any_number_of_tensors),
		cmocka_unit_test(d6_odd_passes_cost_only_transfers),
		cmocka_unit_test(d6_the_pass_after_an_odd_one_is_steady_again),
		cmocka_unit_test(d7_weights_can_be_replaced),
		cmocka_unit_test(d7_groups_and_series_live_side_by_side),
		cmocka_unit_test(d7_a_group_has_several_series),
		cmocka_unit_test(d7_one_graph_holds_several_series),
		cmocka_unit_test(d8_counters_tell_whether_it_helped),
		cmocka_unit_test(d8_layers_below_k_are_named),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
