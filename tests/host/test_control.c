/* SPDX-License-Identifier: Apache-2.0
 *
 * test_control.c - an exchange among the ranks of a host happens for all of them or for none, also where deadlines pass
 * meanwhile and calls are aborted. Ranks that die are test_control_deaths.c's.
 */
#include "clock.h"
#include "exchanged_words.h"

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

/* ---- Many rounds ------------------------------------------------------------------------------------------------- */

static int exchanges_fast(const struct member *member)
{
	struct shm_rank rank;
	struct word all[MOST_RANKS];
	uint8_t alive[MOST_RANKS];

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	for (uint32_t round = 0; round < 2000; round++) {
		struct word mine = word_of(member, round, 0);

		EXPECT(member, exchange(&rank, &mine, all, sizeof mine, alive) == LSHARD_OK, "%s",
		       rank.transport->error.text);
		for (uint32_t other = 0; other < (uint32_t)member->size; other++)
			EXPECT(member, alive[other] && is_word(&all[other], other, round), "round %u: %u", round,
			       other);
	}
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void many_rounds_stay_apart(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(1, exchanges_fast, NULL), 0);
	assert_int_equal(team_of_processes(2, exchanges_fast, NULL), 0);
	assert_int_equal(team_of_processes(5, exchanges_fast, NULL), 0);
	assert_int_equal(team_of_threads(3, exchanges_fast, NULL), 0);
	assert_int_equal(contexts_outstanding(), 0);
}

/* The largest exchange there is, and one that is larger. */
static int exchanges_most(const struct member *member)
{
	struct shm_rank rank;
	unsigned char mine[LSHARD_EXCHANGE_BYTES + 1];
	unsigned char all[2 * LSHARD_EXCHANGE_BYTES];
	uint8_t alive[2];

	memset(mine, member->rank + 5, sizeof mine);
	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	EXPECT(member, exchange(&rank, mine, all, sizeof mine, alive) == LSHARD_ERR_INVALID, "%s",
	       rank.transport->error.text);
	EXPECT(member, exchange(&rank, mine, all, LSHARD_EXCHANGE_BYTES, alive) == LSHARD_OK, "%s",
	       rank.transport->error.text);
	for (size_t i = 0; i < sizeof all; i++)
		EXPECT(member, all[i] == i / LSHARD_EXCHANGE_BYTES + 5, "byte %zu", i);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void sizes_up_to_the_largest(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, exchanges_most, NULL), 0);
}

/* ---- Late -------------------------------------------------------------------------------------------------------- */

/* Rank 1 is late three times: nothing happens for the others, and the next exchange is whole and has the new bytes. */
static int exchanges_with_a_late_one(const struct member *member)
{
	struct shm_rank rank;
	struct word all[3];
	uint8_t alive[3];

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	EXPECT(member, team_barrier(member), "another rank failed"); /* both that come do so together */
	for (uint32_t attempt = 0; attempt < 3 && member->rank != 1; attempt++) {
		struct word mine = word_of(member, attempt, 0);

		rank.context.timeout_ms = 300;
		memset(all, 0xee, sizeof all);
		EXPECT(member, exchange(&rank, &mine, all, sizeof mine, alive) == LSHARD_ERR_TIMEOUT, "%s",
		       rank.transport->error.text);
		EXPECT(member, strstr(rank.transport->error.text, "300 ms for rank 1"), "%s",
		       rank.transport->error.text);
		EXPECT(member, !strchr(rank.transport->error.text, ','), "%s", rank.transport->error.text);
		EXPECT(member, !alive[1] && alive[member->rank], "who is here");
		EXPECT(member, all[0].rank == 0xeeeeeeee && all[2].rank == 0xeeeeeeee, "a failed exchange wrote");
	}
	EXPECT(member, team_barrier(member), "another rank failed");
	rank.context.timeout_ms = LONG_MS;
	for (uint32_t round = 10; round < 20; round++) {
		struct word mine = word_of(member, round, 0);

		EXPECT(member, exchange(&rank, &mine, all, sizeof mine, alive) == LSHARD_OK, "%s",
		       rank.transport->error.text);
		for (uint32_t other = 0; other < 3; other++)
			EXPECT(member, alive[other] && is_word(&all[other], other, round), "round %u", round);
	}
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void a_late_rank_makes_nothing_happen(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, exchanges_with_a_late_one, NULL), 0);
	assert_int_equal(team_of_threads(3, exchanges_with_a_late_one, NULL), 0);
}

/* Deadlines that are always about to pass: whoever is told that a round happened, all are. */
static int exchanges_on_the_edge(const struct member *member)
{
	struct shm_rank rank;
	uint32_t all[2] = {0, 0};
	uint8_t alive[2];
	uint32_t happened = 0;

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	rank.context.timeout_ms = 1;
	for (uint32_t turn = 0; turn < 400; turn++) {
		lshard_status status = exchange(&rank, &happened, all, sizeof happened, alive);

		EXPECT(member, status == LSHARD_OK || status == LSHARD_ERR_TIMEOUT, "%s", rank.transport->error.text);
		EXPECT(member, status != LSHARD_OK || (all[0] == happened && all[1] == happened), "%u: %u and %u",
		       happened, all[0], all[1]);
		happened += status == LSHARD_OK;
		if (turn % 7 == (uint32_t)member->rank * 3)
			usleep(900);
	}
	rank.context.timeout_ms = LONG_MS;
	EXPECT(member, team_barrier(member), "another rank failed");
	EXPECT(member, exchange(&rank, &happened, all, sizeof happened, alive) == LSHARD_OK, "%s",
	       rank.transport->error.text);
	EXPECT(member, all[0] == all[1], "one counted %u exchanges, the other %u", all[0], all[1]);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void an_exchange_happens_for_all_or_for_none(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, exchanges_on_the_edge, NULL), 0);
}

/*
 * Rank 0 is about to take its arrival back, its time being up, when rank 1 comes. The test stands between the two by
 * the linker: every try at the lock passes here.
 */
struct last_moment {
	sem_t come; /* rank 1 may */
	sem_t came;
	uint64_t deadline_ns; /* before rank 0's own */
	int tries;            /* of rank 0 at the lock, since it began to exchange: to arrive, to look, ... */
};

static _Thread_local struct last_moment *last_moment;

int __real_pthread_mutex_trylock(pthread_mutex_t *lock);
int __wrap_pthread_mutex_trylock(pthread_mutex_t *lock);

static int wait_for(sem_t *semaphore)
{
	struct timespec until;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += LONG_MS / 1000;
	return sem_timedwait(semaphore, &until) == 0;
}

int __wrap_pthread_mutex_trylock(pthread_mutex_t *lock)
{
	struct last_moment *moment = last_moment;

	if (moment && ++moment->tries > 2 && lshard__now_ns() >= moment->deadline_ns) {
		last_moment = NULL;
		sem_post(&moment->come);
		if (!wait_for(&moment->came))
			return ETIMEDOUT;
	}
	return __real_pthread_mutex_trylock(lock);
}

static int comes_at_the_last_moment(const struct member *member)
{
	struct last_moment *moment = member->user;
	struct shm_rank rank;
	int32_t all[2] = {-1, -1};
	uint8_t alive[2];
	lshard_status status;

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	EXPECT(member, team_barrier(member), "another rank failed");
	if (member->rank == 0) {
		rank.context.timeout_ms = 50;
		moment->deadline_ns = lshard__now_ns() + 50000000u;
		last_moment = moment;
		status = exchange(&rank, &member->rank, all, sizeof all[0], alive);
		last_moment = NULL;
	} else {
		EXPECT(member, wait_for(&moment->come), "rank 0 does not give up");
		status = exchange(&rank, &member->rank, all, sizeof all[0], alive);
		sem_post(&moment->came);
	}
	EXPECT(member, status == LSHARD_OK, "it happened for the other rank alone: %s", rank.transport->error.text);
	EXPECT(member, alive[0] && alive[1] && all[0] == 0 && all[1] == 1, "what was exchanged");
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void a_round_decided_at_the_last_moment_happened(void **state)
{
	struct last_moment moment = {.tries = 0};

	(void)state;
	assert_true(!sem_init(&moment.come, 0, 0) && !sem_init(&moment.came, 0, 0));
	assert_int_equal(team_of_threads(2, comes_at_the_last_moment, &moment), 0);
	sem_destroy(&moment.come);
	sem_destroy(&moment.came);
}

/* ---- Abort ------------------------------------------------------------------------------------------------------- */

static void *abort_soon(void *user)
{
	lshard_transport *transport = user;

	usleep(50000);
	transport->ops->abort(transport);
	return NULL;
}

static int aborts(const struct member *member)
{
	atomic_int *aborted = member->user;
	struct shm_rank rank;
	int32_t all[3];
	uint8_t alive[3];
	pthread_t thread;

	EXPECT(member, shm_rank_open(&rank, member, "copy", LONG_MS), "open");
	if (member->rank == 1) {
		EXPECT(member, !pthread_create(&thread, NULL, abort_soon, rank.transport), "thread");
		for (int i = 0; i < 2; i++)
			EXPECT(member, exchange(&rank, &member->rank, all, sizeof all[0], alive) == LSHARD_ERR_ABORTED,
			       "%s", rank.transport->error.text);
		atomic_store(aborted, 1);
		pthread_join(thread, NULL);
		EXPECT(member, exchange(&rank, &member->rank, all, sizeof all[0], alive) == LSHARD_ERR_ABORTED, "%s",
		       rank.transport->error.text);
	} else if (member->rank == 0) {
		EXPECT(member, exchange(&rank, &member->rank, all, sizeof all[0], alive) == LSHARD_OK, "%s",
		       rank.transport->error.text);
		EXPECT(member, alive[0] && !alive[1] && alive[2], "the aborted rank is gone");
	} else {
		while (!atomic_load(aborted))
			usleep(1000); /* nothing can be decided before the abort */
		EXPECT(member, exchange(&rank, &member->rank, all, sizeof all[0], alive) == LSHARD_OK, "%s",
		       rank.transport->error.text);
	}
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void an_abort_wakes_and_shows(void **state)
{
	atomic_int *aborted = mmap(NULL, sizeof *aborted, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	(void)state;
	assert_true(aborted != MAP_FAILED);
	assert_int_equal(team_of_processes(3, aborts, aborted), 0);
	atomic_store(aborted, 0);
	assert_int_equal(team_of_threads(3, aborts, aborted), 0);
	munmap(aborted, sizeof *aborted);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(many_rounds_stay_apart),
		cmocka_unit_test(sizes_up_to_the_largest),
		cmocka_unit_test(a_late_rank_makes_nothing_happen),
		cmocka_unit_test(an_exchange_happens_for_all_or_for_none),
		cmocka_unit_test(a_round_decided_at_the_last_moment_happened),
		cmocka_unit_test(an_abort_wakes_and_shows),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
