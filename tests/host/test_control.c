/* SPDX-License-Identifier: Apache-2.0
 *
 * test_control.c - how the ranks of a host meet: an exchange happens for all of them or for none, ranks
 * that die are seen at once and by all alike, and nobody hangs.
 */
#include "clock.h"
#include "control_page.h"
#include "memfd.h"
#include "outside.h"
#include "shm_ranks.h"
#include "shm.h"
#include "sockets.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

/* What ranks exchange here. */
struct word {
	uint32_t rank;
	uint32_t round;
	uint32_t alive; /* mask: as this rank saw the round before */
	uint32_t tail[40];
};

static lshard_status exchange(struct shm_rank *rank, const void *mine, void *all, size_t bytes, uint8_t *alive)
{
	return rank->transport->ops->exchange(rank->transport, mine, all, bytes, alive);
}

static struct word word_of(const struct member *member, uint32_t round, uint32_t alive)
{
	struct word word = {(uint32_t)member->rank, round, alive, {0}};

	for (uint32_t i = 0; i < 40; i++)
		word.tail[i] = round * 41 + (uint32_t)member->rank * 3 + i;
	return word;
}

static int is_word(const struct word *word, uint32_t rank, uint32_t round)
{
	for (uint32_t i = 0; i < 40; i++)
		if (word->tail[i] != round * 41 + rank * 3 + i)
			return 0;
	return word->rank == rank && word->round == round;
}

/* ---- Many rounds ----------------------------------------------------------------------------------------------- */

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

/* ---- Late ------------------------------------------------------------------------------------------------------ */

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

/* ---- Death ----------------------------------------------------------------------------------------------------- */

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
		status = rank.transport->ops->store_open(rank.transport, &series.plan, &series.store);
		EXPECT(member,
		       status == LSHARD_OK ||
			       (status == LSHARD_ERR_PEER_FAILED && strstr(rank.transport->error.text, "rank 2")),
		       "%s", rank.transport->error.text);
		if (status == LSHARD_OK)
			rank.transport->ops->store_close(series.store);
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

/* ---- A page that is none ---------------------------------------------------------------------------------------- */

enum forgery {
	SMALL,
	EMPTY,
	HEAD_ALONE,
	SHRINKABLE,
	OF_ANOTHER_BUILD,
	OF_MORE_RANKS,
	OF_LARGER_RECORDS,
	NO_MEMORY_AT_ALL,
	FORGERIES
};

static const char *const forgery_says[FORGERIES] = {
	[SMALL] = "has 8 bytes instead of",
	[EMPTY] = "has 0 bytes instead of",
	[HEAD_ALONE] = "bytes for 2 ranks instead of",
	[SHRINKABLE] = "is not sealed",
	[OF_ANOTHER_BUILD] = "runs version 0.99.0 (messages of",
	[OF_MORE_RANKS] = "for 3 ranks instead of",
	[OF_LARGER_RECORDS] = "give all ranks one build",
	[NO_MEMORY_AT_ALL] = "is not sealed",
};

/* As rank 0 makes it for two ranks, but for what is forged. */
static int forge_page(enum forgery kind)
{
	const size_t bytes = kind == EMPTY        ? 0
			     : kind == SMALL      ? 8
			     : kind == HEAD_ALONE ? sizeof(struct control_block)
						  : control_page_bytes(2);
	const int seals = F_SEAL_GROW | F_SEAL_SEAL | (kind == SHRINKABLE ? 0 : F_SEAL_SHRINK);
	struct control_block head = {.size = kind == OF_MORE_RANKS ? 3 : 2};
	int fd;

	if (kind == NO_MEMORY_AT_ALL)
		return open("/dev/null", O_RDWR | O_CLOEXEC);
	head.greeting = lshard__greeting_make(CONTROL_MAGIC, sizeof head, sizeof(struct control_rank));
	head.greeting.version = kind == OF_ANOTHER_BUILD ? 99u << 8 : head.greeting.version;
	head.greeting.bytes[1] += kind == OF_LARGER_RECORDS ? 1024 : 0;
	fd = lshard__memfd_create("layershard:forged");
	if (fd >= 0 && pwrite(fd, &head, bytes < sizeof head ? bytes : sizeof head, 0) >= 0 &&
	    ftruncate(fd, (off_t)bytes) == 0 && fcntl(fd, F_ADD_SEALS, seals) == 0)
		return fd;
	if (fd >= 0)
		close(fd);
	return -1;
}

/* Rank 0 shares what is no control page: rank 1 says so and lives, and has nothing open. */
static int takes_a_forgery(const struct member *member)
{
	const enum forgery *kind = member->user;
	lshard_bootstrap bootstrap;
	lshard_context context = context_for_member(member, "", LONG_MS);
	const uint64_t deadline = lshard__deadline_ns(LONG_MS);
	lshard__rendezvous *rendezvous = NULL;
	lshard_error error = {""};
	struct control control = {.block = NULL};
	struct mesh mesh = {.peers = NULL};
	int fds[2] = {-1, -1};
	int forged = -1;

	context.bootstrap = &bootstrap;
	EXPECT(member,
	       lshard__rendezvous_open(&context, member->job, &rendezvous, &bootstrap, &error) == LSHARD_OK &&
		       mesh_open(&mesh, &context, &error, deadline) == LSHARD_OK,
	       "%s", error.text);
	if (member->rank == 0) {
		forged = forge_page(*kind);
		EXPECT(member, forged >= 0, "forging");
		EXPECT(member, mesh_swap(&mesh, 0, forged, fds, deadline) == LSHARD_OK, "%s", error.text);
	} else {
		EXPECT(member, control_open(&control, &mesh, &error, deadline) == LSHARD_ERR_MISMATCH, "%s",
		       error.text);
		EXPECT(member, strstr(error.text, forgery_says[*kind]), "'%s' lacks '%s'", error.text,
		       forgery_says[*kind]);
	}
	EXPECT(member, team_barrier(member), "another rank failed");
	if (forged >= 0)
		close(forged);
	mesh_close(&mesh);
	lshard__rendezvous_close(rendezvous);
	return 0;
failed:
	lshard__rendezvous_close(rendezvous);
	return 1;
}

static void a_control_page_is_looked_at_before_it_is_used(void **state)
{
	(void)state;
	for (enum forgery kind = SMALL; kind < FORGERIES; kind++)
		assert_int_equal(team_of_processes(2, takes_a_forgery, &kind), 0);
}

/* A rank that writes where the page says how many ranks there are misleads nobody. */
static int spoils_the_page(const struct member *member)
{
	struct shm_rank rank;
	int32_t all[2] = {-1, -1};
	uint8_t alive[2];

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	if (member->rank == 1)
		((struct shm *)rank.transport)->control.block->size = 100000;
	EXPECT(member, team_barrier(member), "another rank failed");
	EXPECT(member, exchange(&rank, &member->rank, all, sizeof all[0], alive) == LSHARD_OK, "%s",
	       rank.transport->error.text);
	EXPECT(member, alive[0] && alive[1] && all[0] == 0 && all[1] == 1, "%d and %d", (int)all[0], (int)all[1]);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void the_page_does_not_say_how_many_ranks_there_are(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, spoils_the_page, NULL), 0);
}

/* ---- Abort ----------------------------------------------------------------------------------------------------- */

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
		cmocka_unit_test(a_death_ends_the_waiting_for_it),
		cmocka_unit_test(deaths_in_the_middle_are_agreed_upon),
		cmocka_unit_test(a_death_while_a_series_opens_fails_it_for_all),
		cmocka_unit_test(a_death_with_the_lock_held_stops_nobody),
		cmocka_unit_test(a_rank_stopped_with_the_lock_is_no_hang),
		cmocka_unit_test(a_rank_that_left_is_gone),
		cmocka_unit_test(a_control_page_is_looked_at_before_it_is_used),
		cmocka_unit_test(the_page_does_not_say_how_many_ranks_there_are),
		cmocka_unit_test(an_abort_wakes_and_shows),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
