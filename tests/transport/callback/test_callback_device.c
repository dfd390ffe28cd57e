/* SPDX-License-Identifier: Apache-2.0
 *
 * test_callback_device.c - the callback transport on device memory, over a device made of threads whose streams run
 * late, and a circle of ranks that ends the program when the collectives of the devices do not match: what kernels see.
 */
#include "patience.h"
#include "seer.h"
#include "test_clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

/* ---- Walks ------------------------------------------------------------------------------------------------------- */

static int walk_body(const struct member *member)
{
	struct seer seer;
	struct rank *rank = &seer.rank;
	bool right = false;

	if (!seer_open(&seer, member, member->user))
		return 1;
	for (int round = 0; round < 4; round++)
		if (!seer_pass(&seer, 1 + round % 2))
			goto failed;
	for (uint32_t step = 0; step < rank->setting->layers; step++)
		OK_SERIES(rank, seer_go_to(&seer, step * 3 % rank->setting->layers, fake_stream(seer.fake, 1)));
	OK_SERIES(rank, lshard_series_update_begin(rank->series)); /* waits for the kernels */
	EXPECT(member, atomic_load(&seer.seen) == 5 * (int)rank->setting->layers, "only %d kernels have run",
	       atomic_load(&seer.seen));
	rank->generation++;
	OK_SERIES(rank, lshard_series_update_end(rank->series, fill_layer, rank));
	if (!seer_pass(&seer, 2) || !seer_pass(&seer, 1) || !seer_saw_right(&seer))
		goto failed;
	OK_SERIES(rank, lshard_series_verify(rank->series, NULL));
	OK_SERIES(rank, lshard_series_prepare(rank->series, fake_stream(seer.fake, 2)));
	if (!seer_pass(&seer, 2) || !seer_saw_right(&seer))
		goto failed;
	right = atomic_load(&seer.seen) > 0;
failed:
	return seer_close(&seer) && right ? 0 : 1;
}

static void kernels_see_the_right_bytes(void **state)
{
	static const lshard_stripe stripes[] = {LSHARD_STRIPE_BYTES, LSHARD_STRIPE_ROWS, LSHARD_STRIPE_COLUMNS};

	(void)state;
	for (int32_t size = 1; size <= 3; size++)
		for (uint32_t prefetch = 0; prefetch < 4; prefetch++) {
			struct setting setting = {.layers = 7, .first_layer = 40, .prefetch = prefetch};

			setting_tensors(&setting, 1 + prefetch % 3, stripes[prefetch % 3]);
			setting.placement = (prefetch + (uint32_t)size) % 2 ? LSHARD_WHOLE : LSHARD_STRIPED;
			setting.resident_bytes = prefetch == 2 ? 3000 : 0;
			assert_int_equal(team_of_threads(size, walk_body, &setting), 0);
		}
}

/* ---- Poison ------------------------------------------------------------------------------------------------------ */

/* A kernel: looks for poison where the layer would be. */
static void see_poison(void *user, uint64_t position)
{
	struct seer *seer = user;
	const struct setting *setting = seer->rank.setting;
	const uint32_t layer = setting->first_layer + (uint32_t)position;

	for (uint32_t tensor = 0; tensor < setting->n_tensors; tensor++) {
		void *address = NULL;

		lshard_series_address(seer->rank.series, layer, tensor, &address);
		if (!is_foretold(address, setting->tensors[tensor].bytes, POISON, layer, tensor))
			atomic_fetch_add(&seer->wrong, 1);
	}
	atomic_fetch_add(&seer->seen, 1);
}

/* A kernel: takes so many milliseconds. */
static void dawdle(void *user, uint64_t value)
{
	(void)user;
	pause_ms((long)value);
}

/* Every layer is read before the wait, after it and, on a second stream and late, after another wait. */
static bool pass_of_views(struct seer *seer)
{
	struct rank *rank = &seer->rank;
	void *stream = fake_stream(seer->fake, 1), *other = fake_stream(seer->fake, 2);

	for (uint32_t position = 0; position < rank->setting->layers; position++) {
		const uint32_t layer = rank->setting->first_layer + position;

		OK_SERIES(rank, lshard_reach(rank->series, layer, stream));
		if (!lshard_series_is_source(rank->series, layer))
			fake_launch(seer->fake, stream, see_poison, seer, position);
		OK_SERIES(rank, seer_go_to(seer, position, stream));
		OK_SERIES(rank, lshard_wait(rank->series, layer, other));
		fake_launch(seer->fake, other, dawdle, NULL, 5);
		fake_launch(seer->fake, other, seer_see, seer, rank->generation << 16 | position);
	}
	return true;
failed:
	return false;
}

static int poison_body(const struct member *member)
{
	struct setting setting = {.layers = 7, .first_layer = 40, .prefetch = 1, .poison = LSHARD_POISON_ON};
	struct seer seer;
	struct rank *rank = &seer.rank;
	bool right = false;

	setting_tensors(&setting, 3, LSHARD_STRIPE_BYTES);
	if (!seer_open(&seer, member, &setting))
		return 1;
	if (!pass_of_views(&seer) || !pass_of_views(&seer) || !seer_saw_right(&seer))
		goto failed;
	OK_SERIES(rank, lshard_series_verify(rank->series, NULL));
	OK_SERIES(rank, lshard_series_poison(rank->series, 0, fake_stream(seer.fake, 1)));
	if (!seer_pass(&seer, 1) || !seer_pass(&seer, 2))
		goto failed;
	OK_SERIES(rank, lshard_series_poison(rank->series, 1, fake_stream(seer.fake, 1)));
	if (!pass_of_views(&seer))
		goto failed;
	OK_SERIES(rank, lshard_series_update_begin(rank->series));
	rank->generation++;
	OK_SERIES(rank, lshard_series_update_end(rank->series, fill_layer, rank));
	right = pass_of_views(&seer) && seer_saw_right(&seer);
failed:
	return seer_close(&seer) && right ? 0 : 1;
}

static void kernels_outside_of_views_see_poison(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(3, poison_body, NULL), 0);
}

/* ---- Order ------------------------------------------------------------------------------------------------------- */

/* With a window for every layer, what follows a join may read them all, on a stream that has waited for none. */
static int join_body(const struct member *member)
{
	struct setting setting = {.layers = 7, .first_layer = 3, .prefetch = 9};
	struct seer seer;
	struct rank *rank = &seer.rank;
	void *stream;
	bool right = false;

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	if (!seer_open(&seer, member, &setting))
		return 1;
	stream = fake_stream(seer.fake, 2);
	OK_SERIES(rank, lshard_series_update_begin(rank->series));
	rank->generation++;
	fake_slow_down(seer.fake, 15);
	OK_SERIES(rank, lshard_series_update_end(rank->series, fill_layer, rank));
	OK_SERIES(rank, lshard_series_join(rank->series, stream));
	for (uint32_t position = 0; position < setting.layers; position++)
		fake_launch(seer.fake, stream, seer_see, &seer, rank->generation << 16 | position);
	right = seer_saw_right(&seer);
failed:
	return seer_close(&seer) && right ? 0 : 1;
}

static void what_follows_a_join_sees_all_that_was_coming(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(3, join_body, NULL), 0);
}

/* A kernel: so many others must have run. */
static void see_others(void *user, uint64_t value)
{
	struct seer *seer = user;

	if (atomic_load(&seer->seen) != (int)value)
		atomic_fetch_add(&seer->wrong, 1);
}

static int readers_body(const struct member *member)
{
	struct setting setting = {.layers = 7, .first_layer = 3, .prefetch = 9};
	struct seer seer;
	struct rank *rank = &seer.rank;
	bool right = false;

	setting_tensors(&setting, 1, LSHARD_STRIPE_BYTES);
	if (!seer_open(&seer, member, &setting))
		return 1;
	EXPECT(member, seer_pass(&seer, 1), "a pass");
	OK_SERIES(rank, lshard_series_prepare(rank->series, fake_stream(seer.fake, 2)));
	fake_launch(seer.fake, fake_stream(seer.fake, 2), see_others, &seer, setting.layers);
	right = seer_saw_right(&seer);
failed:
	return seer_close(&seer) && right ? 0 : 1;
}

static void what_follows_a_prepare_comes_after_the_readers_on_other_streams(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(2, readers_body, NULL), 0);
}

/* The device does nothing, and the program goes through whole passes: only hosts wait for each other. */
static int ahead_body(const struct member *member)
{
	struct setting setting = {.layers = 6, .first_layer = 0, .prefetch = 1, .timeout_ms = LONG_MS};
	struct seer seer;
	bool right = false;

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	if (!seer_open(&seer, member, &setting))
		return 1;
	fake_hold(seer.fake, 1);
	right = seer_pass(&seer, 1) && seer_pass(&seer, 2) && seer_pass(&seer, 1);
	right = right && atomic_load(&seer.seen) == 0;
	fake_hold(seer.fake, FAKE_STREAMS);
	right = seer_saw_right(&seer) && right && atomic_load(&seer.seen) == 18;
	return seer_close(&seer) && right ? 0 : 1;
}

static void the_host_never_waits_for_the_device_in_a_pass(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(3, ahead_body, NULL), 0);
}

/* ---- Ranks that do not keep in step ------------------------------------------------------------------------------ */

static int out_of_step_body(const struct member *member)
{
	struct setting setting = {.layers = 9, .first_layer = 2, .prefetch = 1, .timeout_ms = LONG_MS};
	lshard_status status = LSHARD_OK;
	struct seer seer;
	struct rank *rank = &seer.rank;
	bool right = false;

	setting.placement = *(const lshard_placement *)member->user;
	setting_tensors(&setting, 2, LSHARD_STRIPE_ROWS);
	if (!seer_open(&seer, member, &setting))
		return 1;
	for (uint32_t step = 0; status == LSHARD_OK && step < 30; step++)
		status = seer_go_to(&seer, (member->rank == 1 ? 2 * step : step) % 9, fake_stream(seer.fake, 1));
	EXPECT(member, status == LSHARD_ERR_OUT_OF_STEP, "%s", lshard_status_name(status));
	SAYS(member, lshard_series_error(rank->series), "rank 0 is at position");
	SAYS(member, lshard_series_error(rank->series), "series 's'");
	OK_SERIES(rank, lshard_series_rewind(rank->series));
	right = seer_pass(&seer, 1) && seer_saw_right(&seer);
failed:
	return seer_close(&seer) && right ? 0 : 1;
}

static void ranks_that_go_different_ways_are_all_told(void **state)
{
	lshard_placement placements[] = {LSHARD_WHOLE, LSHARD_STRIPED};

	(void)state;
	for (int i = 0; i < 2; i++)
		assert_int_equal(team_of_threads(3, out_of_step_body, &placements[i]), 0);
}

/* Nothing of a layer that a rank has not asked for is on any device. */
static int absent_body(const struct member *member)
{
	struct setting setting = {.layers = 6, .first_layer = 7, .prefetch = 1, .timeout_ms = patience(1000)};
	lshard_status status = LSHARD_OK;
	struct seer seer;
	struct rank *rank = &seer.rank;
	bool right = false;
	long before;

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	if (!seer_open(&seer, member, &setting))
		return 1;
	OK_SERIES(rank, lshard_series_join(rank->series, fake_stream(seer.fake, 1)));
	fake_synchronize(seer.fake);
	EXPECT(member, team_barrier(member), "a rank failed");
	before = fake_collectives(seer.fake);
	if (member->rank != 1) {
		for (uint32_t step = 0; status == LSHARD_OK && step < 12; step++)
			status = seer_go_to(&seer, step % 6, fake_stream(seer.fake, 1));
		EXPECT(member, status == LSHARD_ERR_TIMEOUT, "%s", lshard_status_name(status));
		SAYS(member, lshard_series_error(rank->series), "000 ms");
		SAYS(member, lshard_series_error(rank->series), "layer");
		EXPECT(member, fake_collectives(seer.fake) == before, "a collective began without rank 1");
		fake_synchronize(seer.fake); /* and so the device is not stuck */
	}
	EXPECT(member, team_barrier(member), "a rank failed");
	lshard_group_abort(rank->group);
	right = true;
failed:
	return seer_close(&seer) && right ? 0 : 1;
}

static void a_rank_that_does_not_come_holds_no_device(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(3, absent_body, NULL), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(kernels_see_the_right_bytes),
		cmocka_unit_test(kernels_outside_of_views_see_poison),
		cmocka_unit_test(what_follows_a_join_sees_all_that_was_coming),
		cmocka_unit_test(what_follows_a_prepare_comes_after_the_readers_on_other_streams),
		cmocka_unit_test(the_host_never_waits_for_the_device_in_a_pass),
		cmocka_unit_test(ranks_that_go_different_ways_are_all_told),
		cmocka_unit_test(a_rank_that_does_not_come_holds_no_device),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
