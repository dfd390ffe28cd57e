/* SPDX-License-Identifier: Apache-2.0
 *
 * test_callback_rounds.c - rounds that do not come about: ranks that go different ways together, that are late or give
 * up while others wait, and roll calls of a rank whose program is idle.
 */
#include "callback_circle.h"
#include "callback_ranks.h"
#include "patience.h"
#include "test_clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

/* ---- Out of step ------------------------------------------------------------------------------------------------- */

/* The ranks that go right are told too, in the same words, before any deadline. */
static int out_of_step_body(const struct member *member)
{
	struct setting setting = {.layers = 9, .first_layer = 2, .prefetch = 1, .timeout_ms = LONG_MS};
	lshard_status status = LSHARD_OK;
	struct rank rank;
	bool right = false;

	setting.placement = *(const lshard_placement *)member->user;
	setting_tensors(&setting, 2, LSHARD_STRIPE_ROWS);
	if (!rank_open(&rank, member, &setting))
		return 1;
	for (int again = 0; again < 3; again++) {
		EXPECT(member, one_pass(&rank), "a pass");
		status = LSHARD_OK;
		for (uint32_t step = 0; status == LSHARD_OK && step < 30; step++) {
			const uint32_t position = (member->rank == 1 ? 2 * step : step) % 9;

			status = go_to(&rank, position);
			EXPECT(member, status != LSHARD_OK || layer_is_right(&rank, position), "wrong bytes");
		}
		EXPECT(member, status == LSHARD_ERR_OUT_OF_STEP, "%s: %s", lshard_status_name(status),
		       lshard_series_error(rank.series));
		SAYS(member, lshard_series_error(rank.series), "rank 0 is at position");
		SAYS(member, lshard_series_error(rank.series), "series 's'");
		OK_SERIES(&rank, lshard_series_rewind(rank.series));
	}
	right = one_pass(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void ranks_that_go_different_ways_are_all_told(void **state)
{
	lshard_placement placements[] = {LSHARD_WHOLE, LSHARD_STRIPED};

	(void)state;
	for (int i = 0; i < 2; i++)
		play(3, out_of_step_body, &placements[i]);
}

/* Two series whose ranks call them in another order: never the bytes of the other one. */
static int swapped_body(const struct member *member)
{
	struct setting setting = {.layers = 5, .first_layer = 0, .prefetch = 0, .timeout_ms = LONG_MS};
	lshard_series_options options;
	lshard_series *other = NULL, *order[2];
	lshard_status status = LSHARD_OK;
	struct rank rank;
	bool right = false;

	setting_tensors(&setting, 1, LSHARD_STRIPE_BYTES);
	options = rank_series_options(&setting);
	options.name = "other";
	if (!rank_open(&rank, member, &setting))
		return 1;
	EXPECT(member, lshard_series_create(rank.group, &options, &other) == LSHARD_OK, "%s",
	       lshard_group_error(rank.group));
	EXPECT(member, lshard_series_commit(other, fill_layer, &rank) == LSHARD_OK, "%s", lshard_series_error(other));
	order[0] = member->rank == 0 ? other : rank.series;
	order[1] = member->rank == 0 ? rank.series : other;
	for (uint32_t step = 0; status == LSHARD_OK && step < 10; step++)
		for (int i = 0; i < 2 && status == LSHARD_OK; i++) {
			status = lshard_reach(order[i], step % 5, NULL);
			if (status == LSHARD_OK)
				status = lshard_wait(order[i], step % 5, NULL);
		}
	EXPECT(member, status == LSHARD_ERR_OUT_OF_STEP, "%s", lshard_status_name(status));
	OK_SERIES(&rank, lshard_series_rewind(rank.series));
	EXPECT(member, lshard_series_rewind(other) == LSHARD_OK, "%s", lshard_series_error(other));
	right = one_pass(&rank);
failed:
	right = lshard_series_destroy(other) == LSHARD_OK && right;
	return rank_close(&rank) && right ? 0 : 1;
}

static void series_in_another_order_are_found(void **state)
{
	(void)state;
	play(2, swapped_body, NULL);
}

/* ---- Late ranks -------------------------------------------------------------------------------------------------- */

/* Who waits in vain can wait again, and gets the layer once the late rank has come. */
static int late_body(const struct member *member)
{
	struct setting setting = {.layers = 6, .first_layer = 7, .prefetch = 1, .timeout_ms = patience(700)};
	lshard_status status = LSHARD_OK;
	struct rank rank;
	bool right = false;

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	setting.placement = LSHARD_STRIPED;
	if (!rank_open(&rank, member, &setting))
		return 1;
	if (member->rank == 1)
		pause_ms(2 * setting.timeout_ms);
	for (uint32_t position = 0; position < setting.layers; position++) {
		status = go_to(&rank, position);
		for (int again = 0; status == LSHARD_ERR_TIMEOUT && again < 30; again++)
			status = lshard_wait(rank.series, setting.first_layer + position, NULL);
		EXPECT(member, status == LSHARD_OK, "%s: %s", lshard_status_name(status),
		       lshard_series_error(rank.series));
		EXPECT(member, layer_is_right(&rank, position), "wrong bytes");
	}
	right = team_barrier(member);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void a_late_rank_can_be_waited_for_again(void **state)
{
	(void)state;
	play(3, late_body, NULL);
}

/* A rank that gave up an exchange was not there, though its announcement is on the table. */
static int gave_up_body(const struct member *member)
{
	struct setting setting = {.layers = 6, .first_layer = 7, .prefetch = 1, .timeout_ms = patience(1000)};
	lshard_status status;
	struct rank rank;
	bool right = false;

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	if (!rank_open(&rank, member, &setting))
		return 1;
	for (int again = 0; again < 2; again++) {
		if (member->rank == 0) {
			status = lshard_series_update_begin(rank.series);
			EXPECT(member, status == LSHARD_ERR_TIMEOUT, "%s", lshard_status_name(status));
		}
		EXPECT(member, team_barrier(member), "a rank failed");
		if (member->rank != 0 && again == 0) {
			status = lshard_series_update_begin(rank.series);
			EXPECT(member, status == LSHARD_ERR_TIMEOUT, "%s: it happened without rank 0",
			       lshard_status_name(status));
		}
		EXPECT(member, team_barrier(member), "a rank failed");
	}
	OK_SERIES(&rank, lshard_series_update_begin(rank.series));
	rank.generation++;
	OK_SERIES(&rank, lshard_series_update_end(rank.series, fill_layer, &rank));
	right = one_pass(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void an_exchange_that_was_given_up_did_not_happen(void **state)
{
	(void)state;
	play(3, gave_up_body, NULL);
}

/* Rank 1 comes a step further shortly before the others' deadline: it is late, not gone, and has a name. */
static int slow_body(const struct member *member)
{
	struct setting setting = {.layers = 24, .first_layer = 1, .prefetch = 3, .timeout_ms = patience(600)};
	lshard_status status = LSHARD_OK;
	struct rank rank;
	bool right = false;

	setting_tensors(&setting, 1, LSHARD_STRIPE_BYTES);
	if (!rank_open(&rank, member, &setting))
		return 1;
	EXPECT(member, team_barrier(member), "a rank failed");
	for (uint32_t position = 0; position < 9; position++) {
		if (member->rank == 1)
			pause_ms(setting.timeout_ms * 32 / 100);
		OK_SERIES(&rank, lshard_reach(rank.series, setting.first_layer + position, NULL));
	}
	if (member->rank != 1) {
		status = lshard_series_join(rank.series, NULL);
		EXPECT(member, status == LSHARD_ERR_TIMEOUT, "%s", lshard_status_name(status));
		SAYS(member, lshard_series_error(rank.series), " ms for rank 1; rank 1 ");
	}
	right = team_barrier(member);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void a_slow_rank_is_not_called_gone(void **state)
{
	(void)state;
	play(3, slow_body, NULL);
}

/* ---- Roll calls -------------------------------------------------------------------------------------------------- */

static void count_line(void *user, lshard_log_level level, const char *text)
{
	if (level < LSHARD_LOG_INFO) {
		fprintf(stderr, "unexpected line: %s\n", text);
		atomic_fetch_add((atomic_int *)user, 1);
	}
}

static bool open_with_log(struct rank *rank, const struct member *member, const struct setting *setting,
			  atomic_int *lines, int32_t roll_calls)
{
	lshard_group_options options = member_options(member, "callback", setting->timeout_ms);
	lshard_callbacks callbacks;

	*rank = (struct rank){.member = member, .setting = setting, .fail_at = -1, .seat = circle_join(member)};
	callbacks = *seat_callbacks(rank->seat);
	callbacks.roll_calls = roll_calls;
	options.callbacks = &callbacks;
	options.log = count_line;
	options.log_user = lines;
	return lshard_group_create(&options, &rank->group) == LSHARD_OK && rank_series(rank);
}

/* The roll calls of a rank whose program is idle fail, because the others have ended or it has ended its own
 * communicator: what has come stays, and it destroys what it has. */
static int idle_body(const struct member *member)
{
	const bool by_itself = *(const bool *)member->user;
	struct setting setting = {.layers = 6, .first_layer = 3, .prefetch = 2, .timeout_ms = patience(400)};
	atomic_int lines = 0;
	long calls;
	struct rank rank;
	bool right = false;

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	EXPECT(member, open_with_log(&rank, member, &setting, &lines, 1), "open");
	EXPECT(member, one_pass(&rank), "a pass");
	OK_SERIES(&rank, lshard_series_join(rank.series, NULL));
	EXPECT(member, team_barrier(member), "a rank failed");
	if (by_itself)
		seat_fail_at(rank.seat, 0);
	if (by_itself || member->rank == 1) {
		pause_ms(setting.timeout_ms / 2); /* four roll calls */
		calls = seat_calls(rank.seat);
		EXPECT(member, layer_is_right(&rank, 5), "what was viewed");
		for (uint32_t position = 0; position < 2; position++) {
			OK_SERIES(&rank, lshard_wait(rank.series, setting.first_layer + position, NULL));
			EXPECT(member, layer_is_right(&rank, position), "what had come");
		}
		EXPECT(member, lshard_series_update_begin(rank.series) < 0, "an update without the others");
		SAYS(member, lshard_series_error(rank.series), by_itself ? "told to fail" : "rank 0 has left");
		EXPECT(member, seat_calls(rank.seat) == calls, "no roll call had failed before");
	}
	right = true;
failed:
	return rank_close(&rank) && right && lines == 0 ? 0 : 1;
}

static void roll_calls_that_fail_take_nothing_away(void **state)
{
	bool by_itself[] = {false, true};

	(void)state;
	for (int i = 0; i < 2; i++)
		play(2, idle_body, &by_itself[i]);
}

/* Where the program may end its collectives while the group still is, none is under way unless a call waits for it. */
static int quiet_body(const struct member *member)
{
	struct setting setting = {.layers = 6, .first_layer = 3, .prefetch = 2, .timeout_ms = patience(400)};
	atomic_int lines = 0;
	long calls;
	struct rank rank;
	bool right = false;

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	EXPECT(member, open_with_log(&rank, member, &setting, &lines, 0), "open");
	EXPECT(member, one_pass(&rank), "a pass");
	OK_SERIES(&rank, lshard_series_join(rank.series, NULL));
	pause_ms(setting.timeout_ms / 4); /* until what this rank only gives has gone */
	EXPECT(member, team_barrier(member), "a rank failed");
	calls = seat_calls(rank.seat);
	pause_ms(setting.timeout_ms / 2); /* of four roll calls */
	EXPECT(member, seat_calls(rank.seat) == calls, "a collective that no call needs");
	EXPECT(member, team_barrier(member), "a rank failed");
	EXPECT(member, one_pass(&rank), "a further pass");
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void without_roll_calls_an_idle_group_makes_no_collective(void **state)
{
	(void)state;
	play(2, quiet_body, NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(ranks_that_go_different_ways_are_all_told),
		cmocka_unit_test(series_in_another_order_are_found),
		cmocka_unit_test(a_late_rank_can_be_waited_for_again),
		cmocka_unit_test(a_slow_rank_is_not_called_gone),
		cmocka_unit_test(roll_calls_that_fail_take_nothing_away),
		cmocka_unit_test(without_roll_calls_an_idle_group_makes_no_collective),
		cmocka_unit_test(an_exchange_that_was_given_up_did_not_happen),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
