/* SPDX-License-Identifier: Apache-2.0
 *
 * test_callback_worker.c - the worker and its queue, seen without a group: what waits in the queue, what a closing
 * store waits for, and who is named where nobody comes.
 */
#include "callback.h"
#include "callback_circle.h"
#include "callback_ranks.h"
#include "patience.h"
#include "shm_ranks.h"
#include "test_clock.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

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
	shm_series_plan(&bare->series, member, WHOLE, 2, 0, 1);
	EXPECT(member, shm_series_open(&bare->rank, &bare->series) == LSHARD_OK, "%s", transport->error.text);
	shm_series_fill(&bare->series, 1);
	return team_barrier(member);
failed:
	return false;
}

static bool bare_open(struct bare *bare, const struct member *member)
{
	return bare_open_for(bare, member, LONG_MS);
}

static void bare_close(struct bare *bare)
{
	shm_series_close(&bare->series);
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
		shm_series_close(&bare.series);
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

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(exchanges_of_different_sizes_are_not_begun),
		cmocka_unit_test(a_store_is_closed_after_its_transfers),
		cmocka_unit_test(a_full_queue_is_waited_for),
		cmocka_unit_test(a_full_queue_says_for_whom_it_waits),
		cmocka_unit_test(a_rank_that_asks_no_more_is_named),
		cmocka_unit_test(who_gave_up_a_read_is_named),
		cmocka_unit_test(the_worker_takes_no_signals),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
