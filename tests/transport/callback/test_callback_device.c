/* SPDX-License-Identifier: Apache-2.0
 *
 * test_callback_device.c - the callback transport on device memory, over a device made of threads whose streams run
 * late, so that a window that is read too early or overwritten too soon shows; and a circle of ranks that ends the
 * program when the collectives of the devices do not match.
 */
#include "fake_device.h"
#include "conformance.h"
#include "patience.h"
#include "test_clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* A rank whose layers live on its fake device. */
struct seer {
	struct rank rank;
	struct fake *fake;
	atomic_int wrong; /* layers that a kernel saw */
	atomic_int seen;
};

/* ---- A rank ---------------------------------------------------------------------------------------------------- */

static lshard_status open_group(struct seer *seer, const struct member *member, const lshard_callbacks *callbacks,
				uint32_t timeout_ms, char *error, size_t error_bytes)
{
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;

	options.rank = member->rank;
	options.size = member->size;
	options.transport = "callback";
	options.memory = LSHARD_MEMORY_CUDA;
	options.timeout_ms = timeout_ms ? timeout_ms : LONG_MS;
	options.bootstrap = member->bootstrap;
	options.callbacks = callbacks;
	options.error = error;
	options.error_bytes = error_bytes;
	return lshard_group_create(&options, &seer->rank.group);
}

static bool seer_open(struct seer *seer, const struct member *member, const struct setting *setting)
{
	const lshard_series_options options = rank_series_options(setting);
	struct rank *rank = &seer->rank;
	char error[512] = "";

	*seer = (struct seer){.rank = {.member = member, .setting = setting, .fail_at = -1}};
	seer->fake = fake_open(member);
	if (!seer->fake)
		return false;
	EXPECT(member,
	       open_group(seer, member, fake_callbacks(seer->fake), setting->timeout_ms, error, sizeof error) ==
		       LSHARD_OK,
	       "%s", error);
	EXPECT(member, lshard_series_create(rank->group, &options, &rank->series) == LSHARD_OK, "%s",
	       lshard_group_error(rank->group));
	OK_SERIES(rank, lshard_series_commit(rank->series, fill_layer, rank));
	return true;
failed:
	return false;
}

static bool seer_close(struct seer *seer)
{
	const struct member *member = seer->rank.member;
	bool right = false;

	EXPECT(member, lshard_series_destroy(seer->rank.series) == LSHARD_OK, "%s",
	       lshard_series_error(seer->rank.series));
	EXPECT(member, lshard_group_destroy(seer->rank.group) == LSHARD_OK, "%s", lshard_group_error(seer->rank.group));
	right = true;
failed:
	if (!fake_close(seer->fake)) {
		fprintf(stderr, "rank %d: memory or events are left on the device\n", (int)member->rank);
		right = false;
	}
	return right;
}

/* A kernel: looks at a layer twice, some time apart, while its window must not change. */
static void see(void *user, uint64_t value)
{
	struct seer *seer = user;
	const struct setting *setting = seer->rank.setting;
	const uint32_t layer = setting->first_layer + (uint32_t)(value & 0xffff);
	bool right = true;

	for (int look = 0; look < 2; look++) {
		for (uint32_t tensor = 0; tensor < setting->n_tensors; tensor++) {
			void *address = NULL;

			lshard_series_address(seer->rank.series, layer, tensor, &address);
			right = right &&
				is_foretold(address, setting->tensors[tensor].bytes, value >> 16, layer, tensor);
		}
		pause_ms(look == 0);
	}
	if (!right)
		atomic_fetch_add(&seer->wrong, 1);
	atomic_fetch_add(&seer->seen, 1);
}

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

static lshard_status go_to(struct seer *seer, uint32_t position, void *stream)
{
	const uint32_t layer = seer->rank.setting->first_layer + position;
	lshard_status status = lshard_reach(seer->rank.series, layer, stream);

	if (status == LSHARD_OK)
		status = lshard_wait(seer->rank.series, layer, stream);
	if (status == LSHARD_OK)
		fake_launch(seer->fake, stream, see, seer, seer->rank.generation << 16 | position);
	return status;
}

/* Nothing is compared before fake_synchronize. */
static bool pass(struct seer *seer, int stream)
{
	struct rank *rank = &seer->rank;

	for (uint32_t position = 0; position < rank->setting->layers; position++)
		OK_SERIES(rank, go_to(seer, position, fake_stream(seer->fake, stream)));
	return true;
failed:
	return false;
}

static bool saw_right(struct seer *seer)
{
	fake_synchronize(seer->fake);
	EXPECT(seer->rank.member, atomic_load(&seer->wrong) == 0, "%d of %d layers were wrong when a kernel saw them",
	       atomic_load(&seer->wrong), atomic_load(&seer->seen));
	return true;
failed:
	return false;
}

/* ---- Walks ----------------------------------------------------------------------------------------------------- */

static int walk_body(const struct member *member)
{
	struct seer seer;
	struct rank *rank = &seer.rank;
	bool right = false;

	if (!seer_open(&seer, member, member->user))
		return 1;
	for (int round = 0; round < 4; round++)
		if (!pass(&seer, 1 + round % 2))
			goto failed;
	for (uint32_t step = 0; step < rank->setting->layers; step++)
		OK_SERIES(rank, go_to(&seer, step * 3 % rank->setting->layers, fake_stream(seer.fake, 1)));
	OK_SERIES(rank, lshard_series_update_begin(rank->series)); /* waits for the kernels */
	EXPECT(member, atomic_load(&seer.seen) == 5 * (int)rank->setting->layers, "only %d kernels have run",
	       atomic_load(&seer.seen));
	rank->generation++;
	OK_SERIES(rank, lshard_series_update_end(rank->series, fill_layer, rank));
	if (!pass(&seer, 2) || !pass(&seer, 1) || !saw_right(&seer))
		goto failed;
	OK_SERIES(rank, lshard_series_verify(rank->series, NULL));
	OK_SERIES(rank, lshard_series_prepare(rank->series, fake_stream(seer.fake, 2)));
	if (!pass(&seer, 2) || !saw_right(&seer))
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

/* ---- Poison ---------------------------------------------------------------------------------------------------- */

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
		OK_SERIES(rank, go_to(seer, position, stream));
		OK_SERIES(rank, lshard_wait(rank->series, layer, other));
		fake_launch(seer->fake, other, dawdle, NULL, 5);
		fake_launch(seer->fake, other, see, seer, rank->generation << 16 | position);
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
	if (!pass_of_views(&seer) || !pass_of_views(&seer) || !saw_right(&seer))
		goto failed;
	OK_SERIES(rank, lshard_series_verify(rank->series, NULL));
	OK_SERIES(rank, lshard_series_poison(rank->series, 0, fake_stream(seer.fake, 1)));
	if (!pass(&seer, 1) || !pass(&seer, 2))
		goto failed;
	OK_SERIES(rank, lshard_series_poison(rank->series, 1, fake_stream(seer.fake, 1)));
	if (!pass_of_views(&seer))
		goto failed;
	OK_SERIES(rank, lshard_series_update_begin(rank->series));
	rank->generation++;
	OK_SERIES(rank, lshard_series_update_end(rank->series, fill_layer, rank));
	right = pass_of_views(&seer) && saw_right(&seer);
failed:
	return seer_close(&seer) && right ? 0 : 1;
}

static void kernels_outside_of_views_see_poison(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(3, poison_body, NULL), 0);
}

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
		fake_launch(seer.fake, stream, see, &seer, rank->generation << 16 | position);
	right = saw_right(&seer);
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
	EXPECT(member, pass(&seer, 1), "a pass");
	OK_SERIES(rank, lshard_series_prepare(rank->series, fake_stream(seer.fake, 2)));
	fake_launch(seer.fake, fake_stream(seer.fake, 2), see_others, &seer, setting.layers);
	right = saw_right(&seer);
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
	right = pass(&seer, 1) && pass(&seer, 2) && pass(&seer, 1);
	right = right && atomic_load(&seer.seen) == 0;
	fake_hold(seer.fake, FAKE_STREAMS);
	right = saw_right(&seer) && right && atomic_load(&seer.seen) == 18;
	return seer_close(&seer) && right ? 0 : 1;
}

static void the_host_never_waits_for_the_device_in_a_pass(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(3, ahead_body, NULL), 0);
}

/* ---- Ranks that do not keep in step ---------------------------------------------------------------------------- */

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
		status = go_to(&seer, (member->rank == 1 ? 2 * step : step) % 9, fake_stream(seer.fake, 1));
	EXPECT(member, status == LSHARD_ERR_OUT_OF_STEP, "%s", lshard_status_name(status));
	SAYS(member, lshard_series_error(rank->series), "rank 0 is at position");
	SAYS(member, lshard_series_error(rank->series), "series 's'");
	OK_SERIES(rank, lshard_series_rewind(rank->series));
	right = pass(&seer, 1) && saw_right(&seer);
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
			status = go_to(&seer, step % 6, fake_stream(seer.fake, 1));
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

/* ---- Refusals and failures ------------------------------------------------------------------------------------- */

static int captured_body(const struct member *member)
{
	struct setting setting = {.layers = 5, .first_layer = 0, .prefetch = 1};
	struct seer seer;
	struct rank *rank = &seer.rank;
	void *stream;
	bool right = false;

	setting_tensors(&setting, 1, LSHARD_STRIPE_BYTES);
	if (!seer_open(&seer, member, &setting))
		return 1;
	stream = fake_stream(seer.fake, 1);
	fake_capture(seer.fake, true);
	EXPECT(member, lshard_reach(rank->series, 1, stream) == LSHARD_ERR_NOT_SUPPORTED, "reach");
	SAYS(member, lshard_series_error(rank->series), "cannot be captured");
	EXPECT(member, lshard_wait(rank->series, 1, stream) == LSHARD_ERR_NOT_SUPPORTED, "wait");
	EXPECT(member, lshard_series_join(rank->series, stream) == LSHARD_ERR_NOT_SUPPORTED, "join");
	fake_capture(seer.fake, false);
	right = pass(&seer, 1) && saw_right(&seer);
failed:
	return seer_close(&seer) && right ? 0 : 1;
}

static void a_capture_is_refused_and_changes_nothing(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(2, captured_body, NULL), 0);
}

/* A kernel, or a collective, that does not end: destroy says so, frees nothing, and can be called again. */
static int busy_body(const struct member *member)
{
	const int held = *(const int *)member->user; /* streams from this one on */
	struct setting setting = {.layers = 5, .first_layer = 0, .prefetch = 1, .timeout_ms = patience(1000)};
	struct seer seer;
	struct rank *rank = &seer.rank;
	bool right = false;

	setting.placement = held == 0 ? LSHARD_STRIPED : LSHARD_WHOLE;
	setting_tensors(&setting, 1, LSHARD_STRIPE_BYTES);
	if (!seer_open(&seer, member, &setting))
		return 1;
	EXPECT(member, pass(&seer, 1) && saw_right(&seer), "a pass");
	fake_hold(seer.fake, held);
	EXPECT(member, pass(&seer, 1) && team_barrier(member), "a pass");
	EXPECT(member, lshard_series_destroy(rank->series) == LSHARD_ERR_TIMEOUT, "destroyed under a kernel");
	SAYS(member, lshard_series_error(rank->series), "does not end");
	EXPECT(member, team_barrier(member), "a rank failed");
	fake_hold(seer.fake, FAKE_STREAMS);
	right = saw_right(&seer);
failed:
	return seer_close(&seer) && right ? 0 : 1;
}

static void memory_stays_while_the_device_uses_it(void **state)
{
	(void)state;
	for (int held = 0; held < 2; held++)
		assert_int_equal(team_of_threads(2, busy_body, &held), 0);
}

/* Collectives that do not end on the device: commit, which needs their bytes, fails on time, and says why. */
static int stuck_body(const struct member *member)
{
	struct setting setting = {
		.layers = 5, .first_layer = 0, .resident_bytes = UINT64_MAX, .timeout_ms = patience(1000)};
	struct seer seer = {.rank = {.member = member, .setting = &setting, .fail_at = -1}};
	const uint64_t began = now_ms();
	lshard_series_options options;
	lshard_status status;
	char error[512] = "";
	bool right = false;

	setting_tensors(&setting, 1, LSHARD_STRIPE_BYTES);
	options = rank_series_options(&setting);
	seer.fake = fake_open(member);
	EXPECT(member, seer.fake, "a rank failed");
	status = open_group(&seer, member, fake_callbacks(seer.fake), setting.timeout_ms, error, sizeof error);
	EXPECT(member, status == LSHARD_OK, "%s", error);
	EXPECT(member, lshard_series_create(seer.rank.group, &options, &seer.rank.series) == LSHARD_OK, "%s",
	       lshard_group_error(seer.rank.group));
	fake_hold(seer.fake, 0);
	status = lshard_series_commit(seer.rank.series, fill_layer, &seer.rank);
	EXPECT(member, status < 0, "it committed");
	EXPECT(member, now_ms() - began < LONG_MS, "it took %u ms", (unsigned)(now_ms() - began));
	right = true;
failed:
	if (seer.fake)
		fake_hold(seer.fake, FAKE_STREAMS);
	return seer_close(&seer) && right ? 0 : 1;
}

static void a_collective_that_stays_on_the_device_is_a_status(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(2, stuck_body, NULL), 0);
}

/* A device function that fails at any call: statuses with its text, on time; rank 1's device is the one. */
static int failing_body(const struct member *member)
{
	const long at = *(const long *)member->user;
	struct setting setting = {.layers = 5, .first_layer = 0, .prefetch = 1, .timeout_ms = patience(2000)};
	const uint64_t began = now_ms();
	lshard_status status = LSHARD_OK;
	struct seer seer;
	bool right = false;

	setting_tensors(&setting, 2, LSHARD_STRIPE_COLUMNS);
	setting.placement = at % 2 ? LSHARD_WHOLE : LSHARD_STRIPED;
	if (!seer_open(&seer, member, &setting))
		return 1;
	EXPECT(member, team_barrier(member), "a rank failed");
	if (member->rank == 1)
		fake_fail_at(seer.fake, at);
	for (uint32_t step = 0; status == LSHARD_OK && step < 40; step++)
		status = go_to(&seer, step % 5, fake_stream(seer.fake, 1));
	EXPECT(member, status < 0, "nothing failed");
	if (member->rank == 1)
		SAYS(member, lshard_series_error(seer.rank.series), "on fire");
	EXPECT(member, now_ms() - began < LONG_MS, "it took %u ms", (unsigned)(now_ms() - began));
	fake_fail_at(seer.fake, -1);
	lshard_group_abort(seer.rank.group);
	fake_synchronize(seer.fake);
	right = true;
failed:
	return seer_close(&seer) && right ? 0 : 1;
}

static void a_failing_device_ends_in_statuses(void **state)
{
	(void)state;
	for (long at = 0; at < 16; at++)
		assert_int_equal(team_of_threads(2, failing_body, &at), 0);
}

/*
 * What cannot be waited for is not written over: no rank begins the update, and once they are in step again all go on
 * with the old bytes.
 */
static int unsure_body(const struct member *member)
{
	struct setting setting = {.layers = 5, .first_layer = 0, .prefetch = 1, .timeout_ms = LONG_MS};
	struct seer seer;
	struct rank *rank = &seer.rank;
	bool right = false;

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	if (!seer_open(&seer, member, &setting))
		return 1;
	EXPECT(member, pass(&seer, 1) && pass(&seer, 2) && saw_right(&seer), "a pass");
	EXPECT(member, team_barrier(member), "a rank failed");
	fake_fail_queries(seer.fake, member->rank == 1);
	EXPECT(member, lshard_series_update_begin(rank->series) == LSHARD_ERR_TRANSPORT, "it began");
	SAYS(member, lshard_series_error(rank->series), "rank 1");
	if (member->rank == 1)
		SAYS(member, lshard_series_error(rank->series), "does not know");
	fake_fail_queries(seer.fake, false);
	EXPECT(member, lshard_wait(rank->series, 0, fake_stream(seer.fake, 1)) == LSHARD_ERR_OUT_OF_STEP, "a layer");
	SAYS(member, lshard_series_error(rank->series), "lshard_series_update_begin");
	OK_SERIES(rank, lshard_series_rewind(rank->series));
	EXPECT(member, pass(&seer, 1) && saw_right(&seer), "a pass");
	OK_SERIES(rank, lshard_series_update_begin(rank->series));
	rank->generation++;
	OK_SERIES(rank, lshard_series_update_end(rank->series, fill_layer, rank));
	right = pass(&seer, 2) && saw_right(&seer);
failed:
	return seer_close(&seer) && right ? 0 : 1;
}

static void an_update_does_not_begin_where_a_device_cannot_say_that_all_is_read(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(2, unsure_body, NULL), 0);
}

/* Room for so many blocks on rank 1's device: no rank has the series, nothing of it is left, and the next works. */
static int poor_body(const struct member *member)
{
	const long rest = *(const long *)member->user;
	struct setting setting = {.layers = 5, .first_layer = 0, .prefetch = 1, .timeout_ms = LONG_MS};
	struct seer seer;
	struct rank *rank = &seer.rank;
	lshard_series_options options;
	lshard_series *second = NULL;
	bool right = false;

	setting.placement = LSHARD_STRIPED;
	setting_tensors(&setting, 2, LSHARD_STRIPE_COLUMNS);
	if (!seer_open(&seer, member, &setting))
		return 1;
	options = rank_series_options(&setting);
	options.name = "second";
	if (member->rank == 1)
		fake_allow_blocks(seer.fake, rest);
	EXPECT(member, lshard_series_create(rank->group, &options, &second) == LSHARD_ERR_NO_MEMORY, "block %ld", rest);
	SAYS(member, lshard_group_error(rank->group), "rank 1");
	SAYS(member, lshard_group_error(rank->group), "memory");
	EXPECT(member, !second, "a series that failed");
	fake_allow_blocks(seer.fake, -1);
	EXPECT(member, pass(&seer, 1) && saw_right(&seer), "a pass");
	EXPECT(member, lshard_series_create(rank->group, &options, &second) == LSHARD_OK, "%s",
	       lshard_group_error(rank->group));
	EXPECT(member, pass(&seer, 1) && saw_right(&seer), "a pass");
	right = true;
failed:
	right = lshard_series_destroy(second) == LSHARD_OK && right;
	return seer_close(&seer) && right ? 0 : 1;
}

static void a_device_without_memory_is_an_error_on_all_ranks(void **state)
{
	(void)state;
	for (long rest = 0; rest < 3; rest++) /* staging, shard, windows */
		assert_int_equal(team_of_threads(2, poor_body, &rest), 0);
}

/* Verify copies what collectives bring: where they do not end, it does. */
static int unseen_body(const struct member *member)
{
	struct setting setting = {.layers = 5, .first_layer = 0, .prefetch = 1, .timeout_ms = patience(1000)};
	struct seer seer;
	bool right = false;

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	if (!seer_open(&seer, member, &setting))
		return 1;
	EXPECT(member, pass(&seer, 1) && saw_right(&seer) && team_barrier(member), "a pass");
	fake_slow_down(seer.fake, 3 * setting.timeout_ms);
	EXPECT(member, lshard_series_verify(seer.rank.series, NULL) == LSHARD_ERR_TIMEOUT, "%s",
	       lshard_series_error(seer.rank.series));
	if (strstr(lshard_series_error(seer.rank.series), "does not end, or a collective that rank "))
		atomic_fetch_add((atomic_int *)member->user, 1);
	EXPECT(member, team_barrier(member), "a rank failed");
	right = true;
failed:
	fake_slow_down(seer.fake, 0);
	fake_synchronize(seer.fake);
	return seer_close(&seer) && right ? 0 : 1;
}

static void verify_does_not_wait_for_ever(void **state)
{
	atomic_int said = 0; /* the other rank waits for the one that cannot go on */

	(void)state;
	assert_int_equal(team_of_threads(2, unseen_body, &said), 0);
	assert_true(atomic_load(&said) > 0);
}

/* An abort with collectives on the device: their memory goes when they have ended. */
static int aborted_body(const struct member *member)
{
	struct setting setting = {.layers = 5, .first_layer = 0, .prefetch = 1, .timeout_ms = LONG_MS};
	struct seer seer;
	bool right = false;

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	if (!seer_open(&seer, member, &setting))
		return 1;
	EXPECT(member, pass(&seer, 1) && saw_right(&seer) && team_barrier(member), "a pass");
	fake_slow_down(seer.fake, 30);
	EXPECT(member, pass(&seer, 1) && team_barrier(member), "a pass");
	lshard_group_abort(seer.rank.group);
	right = true;
failed:
	return seer_close(&seer) && right ? 0 : 1;
}

static void an_abort_leaves_memory_to_what_is_on_the_device(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(2, aborted_body, NULL), 0);
}

static int lacking_body(const struct member *member)
{
	const bool all = *(const bool *)member->user;
	struct seer seer = {.rank = {.member = member}};
	lshard_device_callbacks device;
	lshard_callbacks callbacks;
	lshard_status status;
	char error[512] = "";
	bool right = false;

	seer.fake = fake_open(member);
	EXPECT(member, seer.fake, "a rank failed");
	callbacks = *fake_callbacks(seer.fake);
	device = *callbacks.device;
	device.wait = NULL;
	if (member->rank == 1)
		callbacks.device = all ? NULL : &device;
	status = open_group(&seer, member, &callbacks, LONG_MS, error, sizeof error);
	EXPECT(member, status == (all ? LSHARD_ERR_NOT_SUPPORTED : LSHARD_ERR_INVALID), "%s",
	       lshard_status_name(status));
	SAYS(member, error, "rank 1");
	SAYS(member, error, all ? "for a device" : "callback");
	right = true;
failed:
	return seer_close(&seer) && right ? 0 : 1;
}

static void missing_functions_are_named(void **state)
{
	bool all[] = {true, false};

	(void)state;
	for (int i = 0; i < 2; i++)
		assert_int_equal(team_of_threads(2, lacking_body, &all[i]), 0);
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
		cmocka_unit_test(a_capture_is_refused_and_changes_nothing),
		cmocka_unit_test(memory_stays_while_the_device_uses_it),
		cmocka_unit_test(a_collective_that_stays_on_the_device_is_a_status),
		cmocka_unit_test(a_failing_device_ends_in_statuses),
		cmocka_unit_test(an_update_does_not_begin_where_a_device_cannot_say_that_all_is_read),
		cmocka_unit_test(a_device_without_memory_is_an_error_on_all_ranks),
		cmocka_unit_test(verify_does_not_wait_for_ever),
		cmocka_unit_test(an_abort_leaves_memory_to_what_is_on_the_device),
		cmocka_unit_test(missing_functions_are_named),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
