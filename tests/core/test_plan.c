/* SPDX-License-Identifier: Apache-2.0
 *
 * test_plan.c - lshard_plan: what it predicts is compared with what follows on paper, and sizes that no machine has are
 * refused or capped, not wrapped round.
 *
 * Knows: the public header.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <layershard/plan.h>

#include <cmocka.h>

#define LAYERS      16u
#define LAYER_BYTES 665600u           /* a multiple of the alignment: packed as it is */
#define LINK        256000000u        /* bytes per second: a layer takes TRANSFER ns exactly */
#define COMPUTE     UINT64_C(1000000) /* ns */
#define TRANSFER    UINT64_C(2600000)

static lshard_series_options series_of(const lshard_tensor *tensor, uint32_t prefetch)
{
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;

	options.name = "blocks";
	options.layer_count = LAYERS;
	options.tensors = tensor;
	options.tensor_count = 1;
	options.prefetch = prefetch;
	return options;
}

static lshard_plan_input input_of(int32_t rank, int32_t size, int32_t collective)
{
	lshard_plan_input input = LSHARD_PLAN_INPUT_INIT;

	input.rank = rank;
	input.size = size;
	input.collective = collective;
	input.compute_ns = COMPUTE;
	input.link_bytes_per_s = LINK;
	return input;
}

static lshard_plan_result plan(const lshard_series_options *options, const lshard_plan_input *input)
{
	lshard_plan_result result = LSHARD_PLAN_RESULT_INIT;

	assert_int_equal(lshard_plan(options, input, &result), LSHARD_OK);
	return result;
}

static const lshard_tensor whole_layer = {.name = "w", .bytes = LAYER_BYTES};

/*
 * One-sided, k = 0: the one window is free from the layer before, one of this rank's own, on; so each of the layers of
 * the other rank hides one layer's computing.
 */
static void one_rank_alone_hides_what_its_own_layers_give(void **state)
{
	const lshard_series_options options = series_of(&whole_layer, 0);
	const lshard_plan_input input = input_of(0, 2, 0);
	const lshard_plan_result result = plan(&options, &input);

	(void)state;
	assert_int_equal(result.transfer_ns, LAYERS / 2 * TRANSFER);
	assert_int_equal(result.exposed_ns, LAYERS / 2 * (TRANSFER - COMPUTE));
	assert_int_equal(result.pass_ns, LAYERS * COMPUTE + result.exposed_ns);
}

/*
 * Two ranks: of the refills across the end of a pass one comes before it, and one after it with as many layers ahead as
 * in an eager pass. So a replay takes as long as a pass, whether transfers are hidden or not.
 */
static void a_replay_takes_as_long_as_a_pass(void **state)
{
	(void)state;
	for (uint32_t prefetch = 0; prefetch < 2; prefetch++)
		for (int32_t rank = 0; rank < 2; rank++)
			for (uint64_t compute = COMPUTE / 4; compute <= 4 * COMPUTE; compute *= 2) {
				const lshard_series_options options = series_of(&whole_layer, prefetch);
				lshard_plan_input input = input_of(rank, 2, 0);
				lshard_plan_result result;

				input.compute_ns = compute;
				result = plan(&options, &input);
				assert_int_equal(result.captured_pass_ns, result.pass_ns);
			}
}

/*
 * Four ranks: on rank 0 the refill of the window of layers 1, 3, ... has one layer before the end of a pass and one
 * after it. A replay waits for it at its end, and so has one layer's compute less to hide it.
 */
static void a_replay_waits_at_its_end(void **state)
{
	const lshard_series_options options = series_of(&whole_layer, 1);
	lshard_plan_input input = input_of(0, 4, 0);
	lshard_plan_result result;

	(void)state;
	input.compute_ns = 2 * TRANSFER;
	result = plan(&options, &input);
	assert_int_equal(result.captured_pass_ns, LAYERS * input.compute_ns); /* all hidden */
	input.compute_ns = TRANSFER - TRANSFER / 8;
	result = plan(&options, &input);
	assert_true(result.captured_pass_ns > result.pass_ns);
	assert_true(result.captured_pass_ns <= result.pass_ns + input.compute_ns);
	input.compute_ns = 0;
	assert_int_equal(plan(&options, &input).captured_pass_ns, 0); /* nothing is predicted */
}

/* In step, too, a replay is later than a pass by a layer's compute at most, and no earlier. */
static void replays_in_step_end_alike(void **state)
{
	const lshard_series_options options = series_of(&whole_layer, 1);

	(void)state;
	for (int32_t rank = 0; rank < 2; rank++) {
		const lshard_plan_input input = input_of(rank, 2, 1);
		const lshard_plan_result result = plan(&options, &input);

		assert_true(result.captured_pass_ns >= result.pass_ns - 1);
		assert_true(result.captured_pass_ns <= result.pass_ns + COMPUTE);
	}
}

/*
 * In step, k = 0: a transfer begins when the last rank arrives at the layer, which is the one that received the layer
 * before. So every layer is exposed in full, although a rank receives only some of them.
 */
static void ranks_in_step_wait_for_each_other(void **state)
{
	const lshard_series_options options = series_of(&whole_layer, 0);

	(void)state;
	for (int32_t size = 2; size <= 4; size += 2)
		for (int32_t rank = 0; rank < size; rank++) {
			const lshard_plan_input input = input_of(rank, size, 1);
			const lshard_plan_result result = plan(&options, &input);
			const uint64_t received = LAYERS - LAYERS / (uint32_t)size;

			assert_int_equal(result.transfer_ns, received * TRANSFER);
			assert_int_equal(result.exposed_ns, LAYERS * TRANSFER);
			assert_int_equal(result.pass_ns, LAYERS * (TRANSFER + COMPUTE));
		}
}

/* Of the 8 layers of the other rank 4 are kept. Every second one: the others then have 3 layers to come in. */
static void residents_lie_evenly_on_the_circle(void **state)
{
	lshard_series_options options = series_of(&whole_layer, 0);
	lshard_plan_input input = input_of(0, 2, 0);
	lshard_plan_result result;

	(void)state;
	options.resident_bytes = 4 * (uint64_t)LAYER_BYTES;
	result = plan(&options, &input);
	assert_int_equal(result.residents, 4);
	assert_int_equal(result.resident_bytes, 4 * (uint64_t)LAYER_BYTES);
	assert_int_equal(result.fetched_layers, 4);
	assert_int_equal(result.shortest_distance, 3);
	assert_int_equal(result.exposed_ns, 0); /* TRANSFER < 3 COMPUTE */
}

/* 6 rows over 3 ranks: two of them are here already, whichever rank this is. */
static void stripes_of_this_rank_do_not_travel(void **state)
{
	const lshard_tensor rows = {.name = "w", .bytes = LAYER_BYTES / 4 * 6, .stripe = LSHARD_STRIPE_ROWS, .rows = 6};
	lshard_series_options options = series_of(&rows, 1);

	(void)state;
	options.placement = LSHARD_STRIPED;
	for (int32_t rank = 0; rank < 3; rank++) {
		const lshard_plan_input input = input_of(rank, 3, 0);
		const lshard_plan_result result = plan(&options, &input);

		assert_int_equal(result.shard_bytes, LAYERS * (uint64_t)LAYER_BYTES / 2);
		assert_int_equal(result.transfer_ns, LAYERS * TRANSFER);
	}
}

/* Windows and residents are as large as what others store of a layer, where the own stripe is mapped into them. */
static void own_stripes_take_no_room_in_windows(void **state)
{
	const lshard_tensor tensor = {.name = "w", .bytes = 12 * 4096};
	const lshard_tensor columns = {
		.name = "w", .bytes = 12 * 4096, .stripe = LSHARD_STRIPE_COLUMNS, .rows = 12, .column_bytes = 2};
	lshard_series_options options = series_of(&tensor, 1);
	lshard_plan_input input = input_of(1, 3, 0);
	lshard_plan_result result;

	(void)state;
	options.placement = LSHARD_STRIPED;
	options.resident_bytes = 2 * 8 * 4096;
	input.direct = 2;
	input.granule_bytes = 4096;
	result = plan(&options, &input);
	assert_int_equal(result.window_bytes, result.windows * UINT64_C(8) * 4096);
	assert_int_equal(result.residents, 2);
	assert_int_equal(result.resident_bytes, 2 * 8 * 4096);
	input.granule_bytes = 32768; /* less than one for each rank: some would store nothing */
	assert_int_equal(plan(&options, &input).window_bytes, plan(&options, &input).windows * UINT64_C(12) * 4096);
	input.granule_bytes = 4096;
	options.tensors = &columns; /* lie in every page */
	assert_int_equal(plan(&options, &input).window_bytes, plan(&options, &input).windows * UINT64_C(12) * 4096);
}

/* From 16 large pages a rank on, a layer is cut at them and rounded up to one, if all its stripes can end at one. */
static void large_stripes_are_whole_large_pages(void **state)
{
	const uint64_t large = UINT64_C(2) << 20;
	const uint64_t bytes = 3 * 16 * large;
	const lshard_tensor small = {.name = "w", .bytes = bytes - 4096};
	const lshard_tensor enough = {.name = "w", .bytes = bytes + 4096};
	const lshard_tensor rows = {.name = "w", .bytes = bytes + 3 * 4096, .stripe = LSHARD_STRIPE_ROWS, .rows = 3};
	lshard_series_options options = series_of(&small, 4);
	lshard_plan_input input = input_of(1, 3, 0);

	(void)state;
	options.placement = LSHARD_STRIPED;
	input.direct = 1;
	input.granule_bytes = 4096;
	input.large_page_bytes = large;
	assert_int_equal(plan(&options, &input).layer_bytes, bytes - 4096);
	options.tensors = &enough;
	assert_int_equal(plan(&options, &input).layer_bytes, bytes + large);
	assert_int_equal(plan(&options, &input).shard_bytes % large, 0);
	assert_int_equal(plan(&options, &input).window_bytes, 0);
	input.large_page_bytes = 0;
	assert_int_equal(plan(&options, &input).layer_bytes, bytes + 4096);
	input.large_page_bytes = large;
	options.tensors = &rows; /* cut at rows, which end at small pages: still nothing moves */
	assert_int_equal(plan(&options, &input).layer_bytes, bytes + 3 * 4096);
	assert_int_equal(plan(&options, &input).window_bytes, 0);
}

/* ---- Sizes that no machine has ---- */

static void refused(const lshard_series_options *options, const lshard_plan_input *input)
{
	lshard_plan_result result = LSHARD_PLAN_RESULT_INIT;

	assert_int_equal(lshard_plan(options, input, &result), LSHARD_ERR_INVALID);
	assert_int_equal(result.layer_bytes, 0); /* written on success only */
}

static void a_granule_is_a_power_of_two(void **state)
{
	static const uint64_t wrong[] = {3, 4095, 3 << 20, UINT64_MAX};
	const lshard_series_options options = series_of(&whole_layer, 1);

	(void)state;
	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
		lshard_plan_input input = input_of(0, 2, 0);

		input.direct = 1; /* granules are those of pages that are mapped */
		input.granule_bytes = wrong[i];
		refused(&options, &input);
	}
}

static void a_series_of_2_to_the_64_bytes_is_refused(void **state)
{
	const lshard_tensor huge = {.name = "w", .bytes = UINT64_C(1) << 44};
	lshard_series_options options = series_of(&huge, 1);

	(void)state;
	options.layer_count = UINT32_C(1) << 20;
	for (int striped = 0; striped < 2; striped++)
		for (int32_t size = 1; size <= 2; size++) {
			const lshard_plan_input input = input_of(0, size, 0);

			options.placement = striped ? LSHARD_STRIPED : LSHARD_WHOLE;
			refused(&options, &input);
		}
}

static void a_group_can_create_no_such_series(void **state)
{
	const lshard_tensor huge = {.name = "w", .bytes = UINT64_C(1) << 44};
	lshard_group_options group_options = LSHARD_GROUP_OPTIONS_INIT;
	lshard_series_options options = series_of(&huge, 1);
	lshard_group *group = NULL;
	lshard_series *series = NULL;

	(void)state;
	group_options.rank = 0;
	group_options.size = 1;
	group_options.transport = "local";
	options.layer_count = UINT32_C(1) << 20;
	assert_int_equal(lshard_group_create(&group_options, &group), LSHARD_OK);
	assert_int_equal(lshard_series_create(group, &options, &series), LSHARD_ERR_INVALID);
	assert_string_not_equal(lshard_group_error(group), "");
	assert_null(series);
	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
}

static void times_that_do_not_fit_are_the_greatest(void **state)
{
	const lshard_tensor big = {.name = "w", .bytes = UINT64_C(1) << 40};
	const lshard_series_options options = series_of(&big, 1);
	lshard_plan_input input = input_of(0, 2, 0);
	lshard_plan_result result;

	(void)state;
	input.link_bytes_per_s = 1; /* 2^40 s are 10^21 ns */
	result = plan(&options, &input);
	assert_true(result.transfer_ns == UINT64_MAX);
	assert_true(result.exposed_ns == UINT64_MAX);
	assert_true(result.pass_ns == UINT64_MAX);

	input = input_of(0, 2, 0);
	input.compute_ns = UINT64_MAX;
	result = plan(&options, &input);
	assert_true(result.pass_ns == UINT64_MAX);
	assert_true(result.transfer_ns < UINT64_MAX);
}

/* In step, a layer leaves the ring when all ranks keep it: each needs room for what the others store, no more. */
static void room_for_what_others_store_empties_the_ring(void **state)
{
	for (int32_t size = 2; size <= 4; size++) {
		lshard_series_options options = series_of(&whole_layer, 1);
		const lshard_plan_input input = input_of(1, size, 1);
		const uint32_t lacking = LAYERS - LAYERS / (uint32_t)size;
		lshard_plan_result result;

		options.resident_bytes = (uint64_t)lacking * LAYER_BYTES;
		result = plan(&options, &input);
		assert_int_equal(result.windows, 0);
		assert_int_equal(result.fetched_layers, 0);
		assert_true(result.residents <= lacking);
		options.resident_bytes--;
		assert_true(plan(&options, &input).windows > 0);
	}
	(void)state;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(one_rank_alone_hides_what_its_own_layers_give),
		cmocka_unit_test(a_replay_takes_as_long_as_a_pass),
		cmocka_unit_test(a_replay_waits_at_its_end),
		cmocka_unit_test(replays_in_step_end_alike),
		cmocka_unit_test(ranks_in_step_wait_for_each_other),
		cmocka_unit_test(residents_lie_evenly_on_the_circle),
		cmocka_unit_test(room_for_what_others_store_empties_the_ring),
		cmocka_unit_test(stripes_of_this_rank_do_not_travel),
		cmocka_unit_test(own_stripes_take_no_room_in_windows),
		cmocka_unit_test(large_stripes_are_whole_large_pages),
		cmocka_unit_test(a_granule_is_a_power_of_two),
		cmocka_unit_test(a_series_of_2_to_the_64_bytes_is_refused),
		cmocka_unit_test(a_group_can_create_no_such_series),
		cmocka_unit_test(times_that_do_not_fit_are_the_greatest),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
