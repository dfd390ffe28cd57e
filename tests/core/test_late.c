/* SPDX-License-Identifier: Apache-2.0
 *
 * test_late.c - ranks that are late, out of step or gone, through the public interface: who is told what, and that the
 * documented way on from there works. Nothing here has to be fast: a deadline that passes too early only means one more
 * call.
 */
#include "conformance.h"
#include "patience.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define TRIES 60 /* of a call that may time out */

static void play(const char *spec, const char *kind, int32_t size, member_body body, void *user)
{
	subject = (struct subject){.spec = spec, .kind = kind};
	assert_int_equal(team_run(kind, size, body, user), 0);
}

static struct setting small_setting(uint32_t layers, uint32_t prefetch, uint32_t timeout_ms)
{
	struct setting setting = {.layers = layers, .prefetch = prefetch, .timeout_ms = timeout_ms};

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	return setting;
}

/* Wait again after each TIMEOUT, as the header says. */
static bool wait_patiently(struct rank *rank, uint32_t position)
{
	lshard_status status = LSHARD_ERR_TIMEOUT;

	for (int i = 0; i < TRIES && status == LSHARD_ERR_TIMEOUT; i++)
		status = lshard_wait(rank->series, rank->setting->first_layer + position, NULL);
	EXPECT(rank->member, status == LSHARD_OK, "%s: %s", lshard_status_name(status),
	       lshard_series_error(rank->series));
	return layer_is_right(rank, position);
failed:
	return false;
}

static bool pass_patiently(struct rank *rank, uint32_t begin)
{
	for (uint32_t position = begin; position < rank->setting->layers; position++) {
		OK_SERIES(rank, lshard_reach(rank->series, rank->setting->first_layer + position, NULL));
		if (!wait_patiently(rank, position))
			return false;
	}
	return true;
failed:
	return false;
}

static lshard_stats stats_of(const struct rank *rank)
{
	lshard_stats stats = LSHARD_STATS_INIT;

	lshard_series_stats(rank->series, &stats);
	return stats;
}

/* ---- Waiting on ------------------------------------------------------------------------------------------------ */

/* A layer takes 1.5 s, the deadline without patience is 0.7 s: one transfer is what all the waits are for. */
static int slow_link_body(const struct member *member)
{
	struct setting setting = {.layers = 4, .timeout_ms = patience(700), .n_tensors = 1};
	struct rank rank;
	uint64_t fetches;
	bool right = false;

	setting.tensors[0] = (lshard_tensor){"weight", 150016, 0, LSHARD_STRIPE_BYTES, 0, 0};
	if (!rank_open(&rank, member, &setting))
		return 1;
	if (member->rank == 0) {
		OK_SERIES(&rank, lshard_reach(rank.series, 3, NULL));
		fetches = stats_of(&rank).fetches;
		if (!wait_patiently(&rank, 3))
			goto failed;
		EXPECT(member, stats_of(&rank).fetches == fetches, "it was fetched again");
		EXPECT(member, stats_of(&rank).misses == 0, "%llu misses", (unsigned long long)stats_of(&rank).misses);
	}
	EXPECT(member, team_barrier(member), "a rank failed");
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void after_a_timeout_wait_goes_on_waiting(void **state)
{
	(void)state;
	play("throttle=1e5,local", "threads", 2, slow_link_body, NULL);
}

/* Rank 0 goes on alone until it must wait for rank 1, which comes when rank 0 has been told so. */
static bool go_ahead(struct rank *rank)
{
	lshard_status status = LSHARD_OK;
	uint32_t position;

	for (position = 1; position < rank->setting->layers; position++) {
		OK_SERIES(rank, lshard_reach(rank->series, position, NULL));
		status = lshard_wait(rank->series, position, NULL);
		if (status != LSHARD_OK)
			break;
	}
	EXPECT(rank->member, status == LSHARD_ERR_TIMEOUT, "%s", lshard_status_name(status));
	SAYS(rank->member, lshard_series_error(rank->series), "rank 1");
	EXPECT(rank->member, team_barrier(rank->member), "a rank failed");
	return wait_patiently(rank, position) && pass_patiently(rank, position + 1);
failed:
	return false;
}

static int late_body(const struct member *member)
{
	const struct setting setting = small_setting(8, 1, 700);
	struct rank rank;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	OK_SERIES(&rank, lshard_reach(rank.series, 0, NULL));
	if (!wait_patiently(&rank, 0))
		goto failed;
	if (member->rank == 0) {
		if (!go_ahead(&rank))
			goto failed;
	} else {
		EXPECT(member, team_barrier(member), "a rank failed");
		if (!pass_patiently(&rank, 1))
			goto failed;
	}
	for (int pass = 0; pass < 3; pass++)
		if (!pass_patiently(&rank, 0))
			goto failed;
	EXPECT(member, stats_of(&rank).misses == 0, "%llu misses", (unsigned long long)stats_of(&rank).misses);
	EXPECT(member, team_barrier(member), "a rank failed");
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void a_late_rank_is_named_and_waited_for(void **state)
{
	(void)state;
	play("local:lockstep", "threads", 2, late_body, NULL);
}

/* ---- Verify in and out of step --------------------------------------------------------------------------------- */

struct verifying {
	uint64_t truth; /* the hash as a rank alone finds it */
	lshard_status status[2];
};

static int truth_body(const struct member *member)
{
	struct verifying *verifying = member->user;
	const struct setting setting = small_setting(8, 1, 0);
	struct rank rank;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	OK_SERIES(&rank, lshard_series_verify(rank.series, &verifying->truth));
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

/* All ranks call verify together until it is OK on all: no trouble of before stays. */
static bool verify_together(struct rank *rank, struct verifying *verifying)
{
	const struct member *member = rank->member;
	lshard_status *status = verifying->status;
	uint64_t hash = 0;

	do {
		EXPECT(member, team_barrier(member), "a rank failed");
		status[member->rank] = lshard_series_verify(rank->series, &hash);
		EXPECT(member, status[member->rank] == LSHARD_OK || status[member->rank] == LSHARD_ERR_TIMEOUT,
		       "%s: %s", lshard_status_name(status[member->rank]), lshard_series_error(rank->series));
		EXPECT(member, team_barrier(member), "a rank failed");
	} while (status[0] != LSHARD_OK || status[1] != LSHARD_OK);
	EXPECT(member, hash == verifying->truth, "another hash than that of a rank alone");
	return true;
failed:
	return false;
}

/* The other rank needs the hashes of the one that cannot look at a layer, and sees nothing wrong. */
static int failing_verify_body(const struct member *member)
{
	struct verifying *verifying = member->user;
	const struct setting setting = small_setting(8, 1, 0);
	struct rank rank;
	lshard_status status;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	status = lshard_series_verify(rank.series, NULL);
	EXPECT(member, status == (member->rank == 1 ? LSHARD_ERR_TRANSPORT : LSHARD_OK), "%s: %s",
	       lshard_status_name(status), lshard_series_error(rank.series));
	right = verify_together(&rank, verifying);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

/* Rank 0 gives up on rank 1, which is slow, and begins anew, while rank 1 is in the middle of the series. */
static int slow_verify_body(const struct member *member)
{
	struct verifying *verifying = member->user;
	const struct setting setting = small_setting(8, 1, 700);
	struct rank rank;
	lshard_status status = LSHARD_ERR_TIMEOUT;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	for (int i = 0; i < 8 && status != LSHARD_OK; i++) {
		status = lshard_series_verify(rank.series, NULL);
		EXPECT(member,
		       status == LSHARD_OK || status == LSHARD_ERR_TIMEOUT || status == LSHARD_ERR_OUT_OF_STEP ||
			       status == LSHARD_ERR_MISMATCH,
		       "%s: %s", lshard_status_name(status), lshard_series_error(rank.series));
	}
	right = verify_together(&rank, verifying);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void verify_on_ranks_that_differ_is_not_taken_for_corruption(void **state)
{
	struct verifying verifying = {0};

	(void)state;
	play("local", "threads", 1, truth_body, &verifying);
	play("faults=r1.wait@2=fail,local", "threads", 2, failing_verify_body, &verifying);
	play("faults=r1.wait@2=delay:1600,local", "threads", 2, slow_verify_body, &verifying);
}

/* ---- Updates --------------------------------------------------------------------------------------------------- */

static lshard_status update_patiently(struct rank *rank)
{
	lshard_status status = LSHARD_ERR_TIMEOUT;

	for (int i = 0; i < TRIES && status == LSHARD_ERR_TIMEOUT; i++)
		status = lshard_series_update_begin(rank->series);
	if (status != LSHARD_OK)
		return status;
	rank->generation++;
	do
		status = lshard_series_update_end(rank->series, fill_layer, rank);
	while (status == LSHARD_ERR_TIMEOUT);
	return status;
}

static int lonely_update_body(const struct member *member)
{
	const struct setting setting = small_setting(6, 1, 700);
	struct rank rank;
	lshard_status status;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	if (!pass_patiently(&rank, 0))
		goto failed;
	EXPECT(member, team_barrier(member), "a rank failed");
	if (member->rank == 0) {
		status = lshard_series_update_begin(rank.series);
		EXPECT(member, status == LSHARD_ERR_TIMEOUT, "%s", lshard_status_name(status));
		SAYS(member, lshard_series_error(rank.series), "rank 1");
	}
	EXPECT(member, team_barrier(member), "a rank failed");
	if (!pass_patiently(&rank, 0) || !pass_patiently(&rank, 0))
		goto failed;
	EXPECT(member, stats_of(&rank).misses == 0, "%llu misses", (unsigned long long)stats_of(&rank).misses);
	EXPECT(member, team_barrier(member), "a rank failed");
	OK_SERIES(&rank, update_patiently(&rank));
	right = pass_patiently(&rank, 0) && team_barrier(member);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void an_update_that_one_rank_begins_alone_changes_nothing(void **state)
{
	(void)state;
	play("local:lockstep", "threads", 2, lonely_update_body, NULL);
	play("local", "threads", 2, lonely_update_body, NULL);
}

enum moment { BEFORE_BEGIN, BEFORE_END };

static void die(const struct member *member)
{
	team_dies(member);
	raise(SIGKILL);
}

/* Two layers, three ranks: rank 2 stores nothing. */
static int bystander_body(const struct member *member)
{
	const enum moment *moment = member->user;
	const struct setting setting = small_setting(2, 1, 0);
	struct rank rank;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	if (member->rank == 2 && *moment == BEFORE_BEGIN)
		die(member);
	OK_SERIES(&rank, lshard_series_update_begin(rank.series));
	if (member->rank == 2)
		die(member);
	rank.generation = 1;
	OK_SERIES(&rank, lshard_series_update_end(rank.series, fill_layer, &rank));
	EXPECT(member, stats_of(&rank).generation == 1, "generation %llu",
	       (unsigned long long)stats_of(&rank).generation);
	right = one_pass(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void an_update_needs_no_rank_that_is_source_of_nothing(void **state)
{
	static const char *const specs[] = {"shm", "shm:copy"};
	enum moment moments[] = {BEFORE_BEGIN, BEFORE_END};

	(void)state;
	for (int i = 0; i < 4; i++)
		play(specs[i / 2], "forks", 3, bystander_body, &moments[i % 2]);
}

/* The layers of rank 1 can never be whole again: all that is left is to leave. */
static int source_body(const struct member *member)
{
	struct setting setting = small_setting(7, 1, 0);
	struct rank rank;
	lshard_status status;
	bool right = false;

	setting.placement = *(const lshard_placement *)member->user;
	if (!rank_open(&rank, member, &setting))
		return 1;
	OK_SERIES(&rank, lshard_series_update_begin(rank.series));
	if (member->rank == 1)
		die(member);
	for (int i = 0; i < 2; i++) {
		status = lshard_series_update_end(rank.series, fill_layer, &rank);
		EXPECT(member, status == LSHARD_ERR_PEER_FAILED, "%s: %s", lshard_status_name(status),
		       lshard_series_error(rank.series));
		SAYS(member, lshard_series_error(rank.series), "rank 1");
		SAYS(member, lshard_series_error(rank.series), " 1 4"); /* its layers */
	}
	EXPECT(member, lshard_reach(rank.series, 0, NULL) == LSHARD_ERR_STATE, "a pass in an update");
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void a_source_that_dies_in_an_update_ends_it_for_all(void **state)
{
	lshard_placement placement = LSHARD_WHOLE;

	(void)state;
	play("shm", "forks", 3, source_body, &placement);
	play("shm:copy", "forks", 3, source_body, &placement);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(after_a_timeout_wait_goes_on_waiting),
		cmocka_unit_test(a_late_rank_is_named_and_waited_for),
		cmocka_unit_test(verify_on_ranks_that_differ_is_not_taken_for_corruption),
		cmocka_unit_test(an_update_that_one_rank_begins_alone_changes_nothing),
		cmocka_unit_test(an_update_needs_no_rank_that_is_source_of_nothing),
		cmocka_unit_test(a_source_that_dies_in_an_update_ends_it_for_all),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
