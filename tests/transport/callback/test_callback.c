/* SPDX-License-Identifier: Apache-2.0
 *
 * test_callback.c - the callback transport over a circle of threads, which ends the program when collectives do not
 * match. What every transport must do is in the conformance suite; here is what is its own: ranks that go different
 * ways together, a caller's collective that fails at any call or never ends, ranks that give up while others wait.
 */
#include "callback.h"
#include "conformance.h"
#include "patience.h"
#include "shm_ranks.h"
#include "test_clock.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void play(int32_t size, member_body body, void *user)
{
	subject = (struct subject){.spec = "callback",
				   .kind = "threads",
				   .collective = true,
				   .callbacks = true,
				   .memory = LSHARD_MEMORY_HOST};
	assert_int_equal(team_of_threads(size, body, user), 0);
}

static lshard_status go_to(struct rank *rank, uint32_t position)
{
	const uint32_t layer = rank->setting->first_layer + position;
	const lshard_status status = lshard_reach(rank->series, layer, NULL);

	return status == LSHARD_OK ? lshard_wait(rank->series, layer, NULL) : status;
}

/* ---- Walks ----------------------------------------------------------------------------------------------------- */

/* A pass, one that is aborted, one whose layers come twice, one that jumps; all ranks together. */
static bool wander(struct rank *rank)
{
	const uint32_t layers = rank->setting->layers;
	bool right = one_pass(rank);

	for (uint32_t position = 0; right && position < layers / 2; position++)
		right = visit(rank, position);
	for (uint32_t position = 0; right && position < layers; position++)
		right = visit(rank, position) && visit(rank, position);
	for (uint32_t step = 0; right && step < layers; step++)
		right = visit(rank, step * 5 % layers);
	return right && one_pass(rank);
}

static int wander_body(const struct member *member)
{
	const struct setting *setting = member->user;
	struct rank rank;
	bool right;

	if (!rank_open(&rank, member, setting))
		return 1;
	right = wander(&rank);
	OK_SERIES(&rank, lshard_series_update_begin(rank.series));
	rank.generation++;
	OK_SERIES(&rank, lshard_series_update_end(rank.series, fill_layer, &rank));
	right = right && wander(&rank);
	OK_SERIES(&rank, lshard_series_verify(rank.series, NULL));
	right = right && one_pass(&rank);
	return rank_close(&rank) && right ? 0 : 1;
failed:
	rank_close(&rank);
	return 1;
}

static void layers_come_right_on_any_way(void **state)
{
	static const int32_t sizes[] = {1, 2, 3, 5};
	static const lshard_stripe stripes[] = {LSHARD_STRIPE_BYTES, LSHARD_STRIPE_ROWS, LSHARD_STRIPE_COLUMNS};

	(void)state;
	for (int size = 0; size < 4; size++)
		for (uint32_t prefetch = 0; prefetch <= 8; prefetch += 1 + prefetch / 3)
			for (int kind = 0; kind < 4; kind++) {
				struct setting setting = {.layers = 7, .first_layer = 40, .prefetch = prefetch};

				setting_tensors(&setting, 1 + prefetch % 3, stripes[kind % 3]);
				setting.placement = kind == 3 ? LSHARD_WHOLE : LSHARD_STRIPED;
				setting.resident_bytes = prefetch == 2 ? 9000 : 0;
				play(sizes[size], wander_body, &setting);
			}
}

/* Parts that are equal and lie in the order of the ranks come straight into place, in one collective and its round. */
static int gathered_body(const struct member *member)
{
	struct setting setting = {.layers = 6, .first_layer = 1, .prefetch = 1, .placement = LSHARD_STRIPED};
	const bool equal = *(const bool *)member->user;
	struct rank rank;
	long before;
	bool right = false;

	setting_tensors(&setting, equal ? 1 : 3, LSHARD_STRIPE_COLUMNS);
	if (equal)
		setting.tensors[0] = (lshard_tensor){"weight", 256 * 4 * (uint32_t)member->size, 0, 0, 0, 0};
	if (!rank_open(&rank, member, &setting))
		return 1;
	EXPECT(member, one_pass(&rank) && team_barrier(member), "a pass");
	OK_SERIES(&rank, lshard_series_join(rank.series, NULL));
	before = seat_collectives(rank.seat);
	EXPECT(member, one_pass(&rank), "another");
	OK_SERIES(&rank, lshard_series_join(rank.series, NULL));
	EXPECT(member, seat_collectives(rank.seat) - before <= 2 * (long)setting.layers + 4, "%ld collectives",
	       seat_collectives(rank.seat) - before);
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void a_striped_layer_is_one_collective(void **state)
{
	bool equal[] = {true, false};

	(void)state;
	for (int i = 0; i < 2; i++)
		play(3, gathered_body, &equal[i]);
}

/* ---- Out of step ----------------------------------------------------------------------------------------------- */

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

/* ---- Late ranks ------------------------------------------------------------------------------------------------ */

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

/* ---- Ends ------------------------------------------------------------------------------------------------------ */

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
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;
	lshard_callbacks callbacks;

	*rank = (struct rank){.member = member, .setting = setting, .fail_at = -1, .seat = circle_join(member)};
	options.rank = member->rank;
	options.size = member->size;
	options.transport = "callback";
	options.timeout_ms = setting->timeout_ms;
	options.bootstrap = member->bootstrap;
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

/* ---- Failing collectives --------------------------------------------------------------------------------------- */

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
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;

	options.rank = member->rank;
	options.size = member->size;
	options.transport = "callback";
	options.timeout_ms = setting->timeout_ms;
	options.bootstrap = member->bootstrap;
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

/* ---- The transport by itself ------------------------------------------------------------------------------------- */

/* A rank without a group, and a series of two layers that come into one buffer: layer 0 from rank 0, 1 from rank 1. */
struct bare {
	struct seat *seat;
	struct shm_rank rank;
	struct shm_series series;
};

static bool bare_open_for(struct bare *bare, const struct member *member, uint32_t timeout_ms)
{
	lshard_error error = {""};
	lshard_transport *transport;

	*bare = (struct bare){.seat = circle_join(member)};
	bare->rank.context = context_for_member(member, "", timeout_ms);
	bare->rank.context.callbacks = seat_callbacks(bare->seat);
	EXPECT(member, lshard__callback.open(&bare->rank.context, NULL, &bare->rank.transport, &error) == LSHARD_OK,
	       "%s", error.text);
	transport = bare->rank.transport;
	shm_series_plan(&bare->series, member, OWNED, 2, 0, 1);
	EXPECT(member, transport->ops->store_open(transport, &bare->series.plan, &bare->series.store) == LSHARD_OK,
	       "%s", transport->error.text);
	shm_series_fill(&bare->series, 1);
	return team_barrier(member);
failed:
	return false;
}

static bool bare_open(struct bare *bare, const struct member *member)
{
	return bare_open_for(bare, member, LONG_MS);
}

static void bare_close_store(struct bare *bare)
{
	if (bare->series.store)
		bare->rank.transport->ops->store_close(bare->series.store);
	bare->series.store = NULL;
}

static void bare_close(struct bare *bare)
{
	bare_close_store(bare);
	shm_rank_close(&bare->rank);
	circle_leave(bare->seat);
}

static lshard_status bare_fetch(struct bare *bare, uint32_t position, uint64_t sequence)
{
	return bare->rank.transport->ops->fetch(bare->series.store, position, 0, NULL, sequence);
}

static bool bare_comes(struct bare *bare, uint32_t position)
{
	const lshard_transport_ops *ops = bare->rank.transport->ops;
	lshard_arrival arrival;

	return ops->wait(bare->series.store, 0, NULL, &arrival) == LSHARD_OK &&
	       shm_series_right(&bare->series, position, 1, ops->buffer(bare->series.store, 0, position));
}

/* The circle ends the program where an all-gather of two sizes begins. */
static int sizes_body(const struct member *member)
{
	struct bare bare;
	char mine[16] = {(char)member->rank}, all[32];
	const lshard_transport_ops *ops;
	uint8_t alive[2];
	bool right = false;

	EXPECT(member, bare_open(&bare, member), "open");
	ops = bare.rank.transport->ops;
	EXPECT(member,
	       ops->exchange(bare.rank.transport, mine, all, member->rank ? 16 : 8, alive) == LSHARD_ERR_OUT_OF_STEP,
	       "%s", bare.rank.transport->error.text);
	EXPECT(member, ops->exchange(bare.rank.transport, mine, all, 16, alive) == LSHARD_OK, "%s",
	       bare.rank.transport->error.text);
	EXPECT(member, all[0] == 0 && all[16] == 1, "what was exchanged");
	right = true;
failed:
	bare_close(&bare);
	return right ? 0 : 1;
}

static void exchanges_of_different_sizes_are_not_begun(void **state)
{
	(void)state;
	play(2, sizes_body, NULL);
}

/* What the two ranks of a test look at together. */
struct watch {
	struct bare *_Atomic first; /* rank 0's */
	atomic_bool closed;         /* its store is */
	atomic_bool waits;          /* rank 0, for its last fetch */
	bool exchanges;             /* a further fetch is not what meets the full queue, an exchange is */
};

static uint32_t queued(struct bare *bare, uint32_t *capacity)
{
	struct callback *callback = callback_of(bare->rank.transport);
	uint32_t count;

	pthread_mutex_lock(&callback->lock);
	count = callback->queued;
	*capacity = callback->capacity;
	pthread_mutex_unlock(&callback->lock);
	return count;
}

/* A store is closed under nobody: rank 1 has not asked for the layer yet that rank 0 has asked for. */
static int closing_body(const struct member *member)
{
	struct watch *watch = member->user;
	struct bare bare;
	bool right = false;

	EXPECT(member, bare_open(&bare, member), "open");
	if (member->rank == 0) {
		EXPECT(member, bare_fetch(&bare, 0, 0) == LSHARD_OK && team_barrier(member), "fetch");
		bare_close_store(&bare);
		atomic_store(&watch->closed, true);
	} else {
		EXPECT(member, team_barrier(member), "a rank failed");
		for (int ms = 0; ms < 200 && !atomic_load(&watch->closed); ms++)
			pause_ms(1);
		EXPECT(member, !atomic_load(&watch->closed), "closed with a transfer in the queue");
		EXPECT(member, bare_fetch(&bare, 0, 0) == LSHARD_OK && bare_comes(&bare, 0), "the layer");
	}
	right = true;
failed:
	bare_close(&bare);
	return right ? 0 : 1;
}

static void a_store_is_closed_after_its_transfers(void **state)
{
	struct watch watch = {.exchanges = false};

	(void)state;
	play(2, closing_body, &watch);
}

/* Rank 1's last fetches come when rank 0 waits for the last one: what landed before may not end that wait. */
static void hold_back(struct watch *watch, uint32_t to_come)
{
	while (to_come == 2 && !atomic_load(&watch->waits))
		pause_ms(1);
	if (to_come == 1)
		pause_ms(20);
}

/* Rank 0 is ahead by more than its queue has room for, and rank 1 begins when that is full. */
static int full_body(const struct member *member)
{
	struct watch *watch = member->user;
	struct bare bare;
	uint32_t capacity, fetches;
	uint8_t alive[2];
	int32_t all[2] = {-1, -1};
	bool right = false;

	EXPECT(member, bare_open(&bare, member), "open");
	if (member->rank == 0)
		atomic_store(&watch->first, &bare);
	EXPECT(member, team_barrier(member), "a rank failed");
	while (member->rank == 1 && queued(atomic_load(&watch->first), &capacity) < capacity)
		pause_ms(1);
	queued(&bare, &capacity);
	fetches = watch->exchanges ? capacity : 2 * capacity;
	for (uint32_t count = 0; count < fetches; count++) {
		const uint32_t position = count + 1 == fetches; /* the last one's bytes are nobody else's */

		if (member->rank == 1 && !watch->exchanges)
			hold_back(watch, fetches - count);
		EXPECT(member, bare_fetch(&bare, position, count) == LSHARD_OK, "fetch %u: %s", count,
		       bare.series.store->error.text);
	}
	if (watch->exchanges)
		EXPECT(member,
		       bare.rank.transport->ops->exchange(bare.rank.transport, &member->rank, all, sizeof all[0],
							  alive) == LSHARD_OK &&
			       all[1] == 1,
		       "%s", bare.rank.transport->error.text);
	if (member->rank == 0)
		atomic_store(&watch->waits, true);
	EXPECT(member, bare_comes(&bare, 1), "the last one");
	right = team_barrier(member);
failed:
	bare_close(&bare);
	return right ? 0 : 1;
}

static void a_full_queue_is_waited_for(void **state)
{
	struct watch watch = {.exchanges = false};

	(void)state;
	play(2, full_body, &watch);
	watch.exchanges = true;
	play(2, full_body, &watch);
}

/* Nobody comes to what fills the queue: the first fetch that finds it full waits, those after it do not, and each says
 * who is late. When that rank has come, all goes on. */
static int in_vain_body(const struct member *member)
{
	struct bare bare;
	uint32_t capacity, count = 0;
	const uint32_t timeout_ms = patience(600);
	uint64_t began;
	bool right = false;

	EXPECT(member, bare_open_for(&bare, member, timeout_ms), "open");
	queued(&bare, &capacity);
	if (member->rank == 1)
		EXPECT(member, team_barrier(member), "a rank failed");
	for (; count < capacity; count++)
		EXPECT(member, bare_fetch(&bare, count % 2, count) == LSHARD_OK, "fetch %u: %s", count,
		       bare.series.store->error.text);
	began = now_ms();
	for (uint32_t more = 0; member->rank == 0 && more < 20; more++) {
		EXPECT(member, bare_fetch(&bare, 0, count + more) == LSHARD_ERR_TIMEOUT, "there was room");
		SAYS(member, bare.series.store->error.text, "for rank 1; rank 1 is in no call that needs the others");
	}
	EXPECT(member, now_ms() - began < 10 * timeout_ms, "they waited %u ms", (unsigned)(now_ms() - began));
	if (member->rank == 0)
		EXPECT(member, team_barrier(member), "a rank failed");
	EXPECT(member, bare_comes(&bare, (count - 1) % 2), "the last one");
	right = team_barrier(member);
failed:
	bare_close(&bare);
	return right ? 0 : 1;
}

static void a_full_queue_says_for_whom_it_waits(void **state)
{
	(void)state;
	play(2, in_vain_body, NULL);
}

/* With the lock of rank 1's worker, so that one announcement has them all. */
static void append_four(struct bare *bare)
{
	struct callback *callback = callback_of(bare->rank.transport);
	struct operation operation = {.kind = TRANSFER, .store = callback_store_of(bare->series.store)};

	pthread_mutex_lock(&callback->lock);
	for (; operation.sequence < 4; operation.sequence++) {
		operation.position = (uint32_t)operation.sequence % 2;
		callback_append(callback, operation);
	}
	pthread_mutex_unlock(&callback->lock);
}

/* All of the last announcement is done when the deadline comes: who has no more is shown by the roll call after it. */
static int stopping_body(const struct member *member)
{
	const uint32_t timeout_ms = patience(600);
	struct bare bare;
	lshard_arrival arrival;
	lshard_status status;
	bool right = false;

	EXPECT(member, bare_open_for(&bare, member, timeout_ms), "open");
	if (member->rank == 1) {
		pause_ms(timeout_ms * 95 / 100);
		append_four(&bare);
	}
	for (uint32_t count = 0; member->rank == 0 && count < 5; count++)
		EXPECT(member, bare_fetch(&bare, count % 2, count) == LSHARD_OK, "%s", bare.series.store->error.text);
	if (member->rank == 0) {
		status = bare.rank.transport->ops->wait(bare.series.store, 0, NULL, &arrival);
		EXPECT(member, status == LSHARD_ERR_TIMEOUT, "%s", lshard_status_name(status));
		SAYS(member, bare.series.store->error.text, "for rank 1; rank 1 is in no call that needs the others");
	}
	EXPECT(member, team_barrier(member), "a rank failed");
	if (member->rank == 1)
		EXPECT(member, bare_fetch(&bare, 0, 4) == LSHARD_OK, "%s", bare.series.store->error.text);
	right = bare_comes(&bare, 0) && team_barrier(member);
failed:
	bare_close(&bare);
	return right ? 0 : 1;
}

static void a_rank_that_asks_no_more_is_named(void **state)
{
	(void)state;
	play(2, stopping_body, NULL);
}

/* Rank 0 gives up a read while its announcement is on the table, and rank 1 comes to it then. */
static int left_read_body(const struct member *member)
{
	struct bare bare;
	lshard_status status;
	bool right = false;

	EXPECT(member, bare_open_for(&bare, member, patience(1600)), "open");
	if (member->rank == 1)
		EXPECT(member, team_barrier(member), "a rank failed");
	status = bare.rank.transport->ops->read(bare.series.store, 0,
						bare.rank.transport->ops->buffer(bare.series.store, 0, 0));
	EXPECT(member, status == LSHARD_ERR_TIMEOUT, "%s", lshard_status_name(status));
	SAYS(member, bare.series.store->error.text, member->rank == 0 ? "for rank 1" : "rank 0 ");
	if (member->rank == 0)
		EXPECT(member, team_barrier(member), "a rank failed");
	right = team_barrier(member);
failed:
	bare_close(&bare);
	return right ? 0 : 1;
}

static void who_gave_up_a_read_is_named(void **state)
{
	(void)state;
	play(2, left_read_body, NULL);
}

/*
 * The program's handlers run on threads that it knows. A new thread blocks all signals until it has begun, so the
 * worker is looked at after it has brought something.
 */
static int signals_body(const struct member *member)
{
	struct bare bare;
	int open = 0;
	bool right = false;

	EXPECT(member, bare_open(&bare, member), "open");
	EXPECT(member, bare_fetch(&bare, 0, 0) == LSHARD_OK && bare_comes(&bare, 0) && team_barrier(member),
	       "the layer");
	EXPECT(member, threads_named("layershard-call", &open) > 0, "there is no worker");
	EXPECT(member, open == 0, "a handler of the program's could run on %d workers", open);
	right = team_barrier(member);
failed:
	bare_close(&bare);
	return right ? 0 : 1;
}

static void the_worker_takes_no_signals(void **state)
{
	(void)state;
	play(2, signals_body, NULL);
}

/* ---- Options --------------------------------------------------------------------------------------------------- */

static int without_body(const struct member *member)
{
	const int lacking = *(const int *)member->user;
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;
	struct seat *seat = circle_join(member);
	lshard_group *group = NULL;
	lshard_callbacks callbacks;
	char error[512] = "";
	bool right = false;
	lshard_status status;

	options.rank = member->rank;
	options.size = member->size;
	options.transport = "callback";
	options.timeout_ms = LONG_MS;
	options.bootstrap = member->bootstrap;
	callbacks = *seat_callbacks(seat);
	options.callbacks = member->rank == 1 && lacking == 0 ? NULL : &callbacks;
	if (member->rank == 1 && lacking == 1)
		callbacks.broadcast = NULL;
	if (lacking == 2)
		options.transport = "callback:fast";
	options.error = error;
	options.error_bytes = sizeof error;
	status = lshard_group_create(&options, &group);
	EXPECT(member, status == (lacking == 0 ? LSHARD_ERR_NOT_SUPPORTED : LSHARD_ERR_INVALID), "%s: %s",
	       lshard_status_name(status), error);
	EXPECT(member, !group, "a group was made");
	SAYS(member, error, lacking == 2 ? "fast" : "rank 1");
	right = true;
failed:
	lshard_group_destroy(group);
	circle_leave(seat);
	return right ? 0 : 1;
}

static void missing_callbacks_are_named(void **state)
{
	(void)state;
	for (int lacking = 0; lacking < 3; lacking++)
		play(2, without_body, &lacking);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(layers_come_right_on_any_way),
		cmocka_unit_test(a_striped_layer_is_one_collective),
		cmocka_unit_test(ranks_that_go_different_ways_are_all_told),
		cmocka_unit_test(series_in_another_order_are_found),
		cmocka_unit_test(a_late_rank_can_be_waited_for_again),
		cmocka_unit_test(a_slow_rank_is_not_called_gone),
		cmocka_unit_test(roll_calls_that_fail_take_nothing_away),
		cmocka_unit_test(without_roll_calls_an_idle_group_makes_no_collective),
		cmocka_unit_test(an_exchange_that_was_given_up_did_not_happen),
		cmocka_unit_test(a_failure_at_any_call_ends_in_statuses),
		cmocka_unit_test(a_collective_that_never_ends_holds_nobody),
		cmocka_unit_test(exchanges_of_different_sizes_are_not_begun),
		cmocka_unit_test(a_store_is_closed_after_its_transfers),
		cmocka_unit_test(a_full_queue_is_waited_for),
		cmocka_unit_test(a_full_queue_says_for_whom_it_waits),
		cmocka_unit_test(a_rank_that_asks_no_more_is_named),
		cmocka_unit_test(who_gave_up_a_read_is_named),
		cmocka_unit_test(the_worker_takes_no_signals),
		cmocka_unit_test(missing_callbacks_are_named),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
