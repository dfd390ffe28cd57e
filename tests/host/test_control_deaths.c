/* SPDX-License-Identifier: Apache-2.0
 *
 * test_control_deaths.c - ranks that die or leave while others wait for them in an exchange: seen at once, by all
 * alike, and nobody hangs, whatever lock they held.
 */
#include "control_page.h"
#include "exchanged_words.h"
#include "shm.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static int exchanges_while_one_dies(const struct member *member)
{
	struct shm_rank rank;
	struct word mine = word_of(member, 0, 0);
	struct word all[4];
	uint8_t alive[4];

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	if (member->rank == 2) {
		usleep(100000); /* the others are waiting by then, mostly */
		team_dies(member);
		raise(SIGKILL);
	}
	for (int i = 0; i < 3; i++) {
		memset(all, 0xee, sizeof all);
		EXPECT(member, exchange(&rank, &mine, all, sizeof mine, alive) == LSHARD_OK, "%s",
		       rank.transport->error.text);
		EXPECT(member, alive[0] && alive[1] && !alive[2] && alive[3], "who is alive");
		EXPECT(member, is_word(&all[3], 3, 0) && all[2].rank == 0 && all[2].tail[39] == 0, "zero for the dead");
	}
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void a_death_ends_the_waiting_for_it(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(4, exchanges_while_one_dies, NULL), 0);
}

static void *kill_soon(void *user)
{
	const useconds_t *delay = user;

	usleep(*delay);
	raise(SIGKILL);
	return NULL;
}

/*
 * Rank 3 dies anywhere inside an exchange, now and then with the lock held. The others go on, and in every round all
 * of them have seen the same ranks in the round before.
 */
static int exchanges_under_fire(const struct member *member)
{
	const useconds_t *delay = member->user;
	struct shm_rank rank;
	struct word all[4];
	uint8_t alive[4];
	uint32_t before = 0xf;
	uint32_t after_death = 0;
	pthread_t killer;

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	if (member->rank == 3) {
		team_dies(member);
		EXPECT(member, !pthread_create(&killer, NULL, kill_soon, member->user), "thread");
		pthread_detach(killer);
	}
	for (uint32_t round = 0; after_death < 100; round++) {
		struct word mine = word_of(member, round, before);
		uint32_t seen = 0;

		EXPECT(member, exchange(&rank, &mine, all, sizeof mine, alive) == LSHARD_OK, "%s",
		       rank.transport->error.text);
		for (uint32_t other = 0; other < 4; other++) {
			EXPECT(member, !alive[other] || is_word(&all[other], other, round), "round %u after %u us",
			       round, (unsigned)*delay);
			EXPECT(member, !alive[other] || all[other].alive == before, "ranks saw different ranks alive");
			seen |= (uint32_t)alive[other] << other;
		}
		EXPECT(member, (seen & 7) == 7 && (seen & ~before) == 0, "round %u: %x after %x", round, seen, before);
		before = seen;
		after_death += !alive[3];
	}
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void deaths_in_the_middle_are_agreed_upon(void **state)
{
	(void)state;
	for (useconds_t i = 0; i < 25; i++) {
		useconds_t delay = 500 + i * 371;

		assert_int_equal(team_of_processes(4, exchanges_under_fire, &delay), 0);
	}
}

/* The others are told alike, whenever it dies: all have the series or none. */
static int opens_under_fire(const struct member *member)
{
	struct shm_rank rank;
	uint8_t alive[3];
	int32_t all[3];
	pthread_t killer;

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	if (member->rank == 2) {
		team_dies(member);
		EXPECT(member, !pthread_create(&killer, NULL, kill_soon, member->user), "thread");
		pthread_detach(killer);
	}
	for (;;) {
		struct shm_series series;
		int32_t status;

		shm_series_plan(&series, member, PAGES, 4, 1, 0);
		status = shm_series_open(&rank, &series);
		EXPECT(member,
		       status == LSHARD_OK ||
			       (status == LSHARD_ERR_PEER_FAILED && strstr(rank.transport->error.text, "rank 2")),
		       "%s", rank.transport->error.text);
		if (status == LSHARD_OK)
			shm_series_close(&series);
		EXPECT(member, exchange(&rank, &status, all, sizeof status, alive) == LSHARD_OK, "%s",
		       rank.transport->error.text);
		EXPECT(member, all[0] == all[1], "%d and %d", (int)all[0], (int)all[1]);
		if (status != LSHARD_OK)
			break;
	}
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void a_death_while_a_series_opens_fails_it_for_all(void **state)
{
	(void)state;
	for (useconds_t i = 0; i < 15; i++) {
		useconds_t delay = 300 + i * 431;

		assert_int_equal(team_of_processes(3, opens_under_fire, &delay), 0);
	}
}

/* ---- With the lock ----------------------------------------------------------------------------------------------- */

/* Only a test takes the lock by hand. */
static pthread_mutex_t *lock_of(struct shm_rank *rank)
{
	return &((struct shm *)rank->transport)->control.block->lock;
}

static int dies_with_the_lock(const struct member *member)
{
	struct shm_rank rank;
	int32_t all[3];
	uint8_t alive[3];

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	EXPECT(member, exchange(&rank, &member->rank, all, sizeof all[0], alive) == LSHARD_OK, "%s",
	       rank.transport->error.text);
	if (member->rank == 1) {
		EXPECT(member, !pthread_mutex_lock(lock_of(&rank)), "lock");
		team_dies(member);
		usleep(20000);
		raise(SIGKILL);
	}
	for (int i = 0; i < 20; i++)
		EXPECT(member,
		       exchange(&rank, &member->rank, all, sizeof all[0], alive) == LSHARD_OK && !alive[1] &&
			       all[2] == 2,
		       "%s", rank.transport->error.text);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void a_death_with_the_lock_held_stops_nobody(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, dies_with_the_lock, NULL), 0);
}

/* As if it were stopped by a debugger in the worst place. */
static int keeps_the_lock(const struct member *member)
{
	struct shm_rank rank;
	int32_t all[2];
	uint8_t alive[2];
	lshard_status status;

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	if (member->rank == 1)
		EXPECT(member, !pthread_mutex_lock(lock_of(&rank)), "lock");
	EXPECT(member, team_barrier(member), "another rank failed");
	rank.context.timeout_ms = 100;
	if (member->rank == 0) {
		status = exchange(&rank, &member->rank, all, sizeof all[0], alive);
		EXPECT(member, status == LSHARD_ERR_TIMEOUT && strstr(rank.transport->error.text, "is stopped"), "%s",
		       rank.transport->error.text);
	}
	EXPECT(member, team_barrier(member), "another rank failed");
	if (member->rank == 1)
		pthread_mutex_unlock(lock_of(&rank));
	rank.context.timeout_ms = LONG_MS;
	EXPECT(member, exchange(&rank, &member->rank, all, sizeof all[0], alive) == LSHARD_OK, "%s",
	       rank.transport->error.text);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void a_rank_stopped_with_the_lock_is_no_hang(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, keeps_the_lock, NULL), 0);
}

/* A rank that closes its transport is gone as well. */
static int one_closes(const struct member *member)
{
	struct shm_rank rank;
	int32_t all[2];
	uint8_t alive[2];

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	if (member->rank == 0)
		EXPECT(member,
		       exchange(&rank, &member->rank, all, sizeof all[0], alive) == LSHARD_OK && alive[0] && !alive[1],
		       "%s", rank.transport->error.text);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void a_rank_that_left_is_gone(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, one_closes, NULL), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_death_ends_the_waiting_for_it),
		cmocka_unit_test(deaths_in_the_middle_are_agreed_upon),
		cmocka_unit_test(a_death_while_a_series_opens_fails_it_for_all),
		cmocka_unit_test(a_death_with_the_lock_held_stops_nobody),
		cmocka_unit_test(a_rank_stopped_with_the_lock_is_no_hang),
		cmocka_unit_test(a_rank_that_left_is_gone),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
