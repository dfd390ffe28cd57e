/* SPDX-License-Identifier: Apache-2.0
 *
 * test_callback_device_failures.c - the callback transport on a device that refuses, fails, has no memory or does not
 * end: statuses on all ranks, and no memory goes that the device still uses.
 */
#include "patience.h"
#include "seer.h"
#include "test_clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

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
	right = seer_pass(&seer, 1) && seer_saw_right(&seer);
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
	EXPECT(member, seer_pass(&seer, 1) && seer_saw_right(&seer), "a pass");
	fake_hold(seer.fake, held);
	EXPECT(member, seer_pass(&seer, 1) && team_barrier(member), "a pass");
	EXPECT(member, lshard_series_destroy(rank->series) == LSHARD_ERR_TIMEOUT, "destroyed under a kernel");
	SAYS(member, lshard_series_error(rank->series), "does not end");
	EXPECT(member, team_barrier(member), "a rank failed");
	fake_hold(seer.fake, FAKE_STREAMS);
	right = seer_saw_right(&seer);
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
	status = seer_open_group(&seer, member, fake_callbacks(seer.fake), setting.timeout_ms, error, sizeof error);
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
		status = seer_go_to(&seer, step % 5, fake_stream(seer.fake, 1));
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
	EXPECT(member, seer_pass(&seer, 1) && seer_pass(&seer, 2) && seer_saw_right(&seer), "a pass");
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
	EXPECT(member, seer_pass(&seer, 1) && seer_saw_right(&seer), "a pass");
	OK_SERIES(rank, lshard_series_update_begin(rank->series));
	rank->generation++;
	OK_SERIES(rank, lshard_series_update_end(rank->series, fill_layer, rank));
	right = seer_pass(&seer, 2) && seer_saw_right(&seer);
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
	EXPECT(member, seer_pass(&seer, 1) && seer_saw_right(&seer), "a pass");
	EXPECT(member, lshard_series_create(rank->group, &options, &second) == LSHARD_OK, "%s",
	       lshard_group_error(rank->group));
	EXPECT(member, seer_pass(&seer, 1) && seer_saw_right(&seer), "a pass");
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
	EXPECT(member, seer_pass(&seer, 1) && seer_saw_right(&seer) && team_barrier(member), "a pass");
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
	EXPECT(member, seer_pass(&seer, 1) && seer_saw_right(&seer) && team_barrier(member), "a pass");
	fake_slow_down(seer.fake, 30);
	EXPECT(member, seer_pass(&seer, 1) && team_barrier(member), "a pass");
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
	status = seer_open_group(&seer, member, &callbacks, LONG_MS, error, sizeof error);
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
