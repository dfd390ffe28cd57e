/* SPDX-License-Identifier: Apache-2.0
 *
 * test_callback_calls.c - a caller's collective that fails at any call, never ends, or does not even return.
 */
#include "callback_circle.h"
#include "callback_ranks.h"
#include "patience.h"
#include "test_clock.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

struct plan_of_failure {
	long at; /* call of rank 1's circle that fails; -1: none */
	long calls;
	lshard_placement placement;
	bool reached; /* rank 1 came to that call */
};

/* The memory of a group. */
struct purse {
	pthread_mutex_t lock;
	void *blocks[4096];
	int count;
};

static void *purse_allocate(void *user, size_t bytes)
{
	struct purse *purse = user;
	void *block = malloc(bytes);

	pthread_mutex_lock(&purse->lock);
	if (!block || purse->count == 4096)
		abort();
	purse->blocks[purse->count++] = block;
	pthread_mutex_unlock(&purse->lock);
	return block;
}

static void purse_release(void *user, void *pointer)
{
	struct purse *purse = user;

	pthread_mutex_lock(&purse->lock);
	for (int i = 0; i < purse->count; i++)
		if (purse->blocks[i] == pointer) {
			purse->blocks[i] = purse->blocks[--purse->count];
			break;
		}
	pthread_mutex_unlock(&purse->lock);
	free(pointer);
}

static lshard_status open_quietly(struct rank *rank, const struct member *member, const struct setting *setting,
				  struct purse *purse, char *error, size_t error_bytes)
{
	const lshard_allocator allocator = {sizeof allocator, purse_allocate, purse_release, purse};
	lshard_group_options options = member_options(member, "callback", setting->timeout_ms);

	options.callbacks = seat_callbacks(rank->seat);
	if (purse)
		options.allocator = &allocator;
	options.error = error;
	options.error_bytes = error_bytes;
	return lshard_group_create(&options, &rank->group);
}

/* A short life; the first failure and its text. */
static lshard_status live(struct rank *rank, char *error, size_t error_bytes, bool *wrong)
{
	lshard_series_options options = rank_series_options(rank->setting);
	lshard_status status = lshard_series_create(rank->group, &options, &rank->series);

	if (status < 0) {
		snprintf(error, error_bytes, "%s", lshard_group_error(rank->group));
		return status;
	}
	if (!rank_note_addresses(rank))
		*wrong = true;
	status = lshard_series_commit(rank->series, fill_layer, rank);
	for (int pass = 0; pass < 2 && status == LSHARD_OK; pass++) {
		for (uint32_t position = 0; position < rank->setting->layers && status == LSHARD_OK; position++) {
			status = go_to(rank, position);
			*wrong = *wrong || (status == LSHARD_OK && !layer_is_right(rank, position));
		}
		if (status == LSHARD_OK)
			status = lshard_series_update_begin(rank->series);
		rank->generation += status == LSHARD_OK;
		if (status == LSHARD_OK)
			status = lshard_series_update_end(rank->series, fill_layer, rank);
	}
	snprintf(error, error_bytes, "%s", lshard_series_error(rank->series));
	return status;
}

static bool is_expected(lshard_status status)
{
	return status == LSHARD_OK || status == LSHARD_ERR_TRANSPORT || status == LSHARD_ERR_PEER_FAILED ||
	       status == LSHARD_ERR_TIMEOUT;
}

static int failing_body(const struct member *member)
{
	struct plan_of_failure *plan = member->user;
	struct setting setting = {.layers = 4, .first_layer = 3, .prefetch = 1, .timeout_ms = patience(5000)};
	struct rank rank = {.member = member, .setting = &setting, .fail_at = -1};
	const uint64_t began = now_ms();
	lshard_status status;
	char error[512] = "";
	bool wrong = false, right = false;

	setting.placement = plan->placement;
	setting_tensors(&setting, 2, LSHARD_STRIPE_COLUMNS);
	rank.seat = circle_join(member);
	if (member->rank == 1)
		seat_fail_at(rank.seat, plan->at);
	status = open_quietly(&rank, member, &setting, NULL, error, sizeof error);
	if (status == LSHARD_OK)
		status = live(&rank, error, sizeof error, &wrong);
	EXPECT(member, !wrong, "wrong bytes");
	EXPECT(member, is_expected(status), "%s: %s", lshard_status_name(status), error);
	EXPECT(member, now_ms() - began < LONG_MS, "it took %u ms", (unsigned)(now_ms() - began));
	if (plan->at < 0)
		EXPECT(member, status == LSHARD_OK, "%s: %s", lshard_status_name(status), error);
	if (member->rank == 1) {
		plan->reached = status < 0;
		plan->calls = seat_calls(rank.seat);
		if (status < 0)
			SAYS(member, error, "told to fail");
	}
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void a_failure_at_any_call_ends_in_statuses(void **state)
{
	(void)state;
	for (int placement = 0; placement < 2; placement++) {
		struct plan_of_failure plan = {.at = -1, .placement = (lshard_placement)placement};
		long calls;

		play(3, failing_body, &plan);
		calls = plan.calls;
		for (plan.at = 0; plan.at < calls - 2; plan.at += plan.at < 40 ? 1 : 7) {
			play(3, failing_body, &plan);
			assert_true(plan.reached || plan.at > calls - 20);
		}
	}
}

/*
 * A collective that never ends, or a function that does not even return: calls come back at their deadlines, and the
 * memory is left alone, also when the function returns after all, to a group that has gone.
 */
static int stuck_body(const struct member *member)
{
	static struct purse purses[3]; /* what the library leaves alone stays in reach */
	const bool asleep = *(const bool *)member->user;
	struct setting setting = {.layers = 6, .first_layer = 1, .prefetch = 1, .timeout_ms = patience(1000)};
	struct rank rank = {.member = member, .setting = &setting, .fail_at = -1};
	struct purse *purse = &purses[member->rank];
	const uint64_t began = now_ms();
	lshard_status status = LSHARD_OK;
	char error[512] = "";
	bool wrong = false, right = false;

	pthread_mutex_init(&purse->lock, NULL);
	setting_tensors(&setting, 1, LSHARD_STRIPE_BYTES);
	setting.placement = LSHARD_STRIPED;
	rank.seat = circle_join(member);
	EXPECT(member, open_quietly(&rank, member, &setting, purse, error, sizeof error) == LSHARD_OK, "%s", error);
	EXPECT(member, live(&rank, error, sizeof error, &wrong) == LSHARD_OK && !wrong, "%s", error);
	EXPECT(member, team_barrier(member), "a rank failed");
	if (member->rank == 0 && asleep)
		seat_fall_asleep(rank.seat);
	else if (member->rank == 0)
		seat_get_stuck(rank.seat);
	EXPECT(member, team_barrier(member), "a rank failed");
	for (uint32_t step = 0; status == LSHARD_OK && step < 12; step++)
		status = go_to(&rank, step % 6);
	EXPECT(member, status == LSHARD_ERR_TIMEOUT, "%s", lshard_status_name(status));
	status = lshard_series_rewind(rank.series);
	EXPECT(member, status < 0, "rewound");
	lshard_group_abort(rank.group);
	EXPECT(member, lshard_wait(rank.series, 2, NULL) == LSHARD_ERR_ABORTED, "wait after abort");
	EXPECT(member, now_ms() - began < LONG_MS, "it took %u ms", (unsigned)(now_ms() - began));
	right = true;
failed:
	right = lshard_series_destroy(rank.series) == LSHARD_OK && right;
	right = lshard_group_destroy(rank.group) == LSHARD_OK && right;
	right = team_barrier(member) && right;
	if (purse->count == 0 && member->rank == 0)
		right = false; /* freed under the collective */
	seat_wake(rank.seat);  /* the thread comes back */
	circle_leave(rank.seat);
	return right ? 0 : 1;
}

static void a_collective_that_never_ends_holds_nobody(void **state)
{
	bool asleep[] = {false, true};

	(void)state;
	for (int i = 0; i < 2; i++)
		play(3, stuck_body, &asleep[i]);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_failure_at_any_call_ends_in_statuses),
		cmocka_unit_test(a_collective_that_never_ends_holds_nobody),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
