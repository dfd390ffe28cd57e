/* SPDX-License-Identifier: Apache-2.0
 *
 * callback_circle.c - see callback_circle.h. Rank 0 makes the circle and the others find it through the team's own
 * all-gather. One collective per rank is in progress at a time, as the transport promises.
 */
#include "callback_circle.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct seat {
	struct circle *circle;
	lshard_callbacks callbacks;
	int32_t rank;
	bool gone;
	bool stuck;
	bool asleep;
	int inside; /* calls that wait in circle_finish */
	atomic_long calls;
	atomic_long fail_at; /* also set while the worker calls */
	long begun;          /* collectives */

	/* the one in progress */
	const void *send;
	void *receive;
	size_t count;
	int32_t root; /* -1: all-gather */
};

struct circle {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	int32_t size;
	int32_t users;
	long happened; /* collectives */
	const struct seat *first_gone;
	struct seat seats[];
};

static struct circle *circle_new(int32_t size)
{
	struct circle *circle = calloc(1, sizeof *circle + (size_t)size * sizeof circle->seats[0]);
	pthread_condattr_t attributes;

	if (!circle)
		abort();
	pthread_mutex_init(&circle->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&circle->changed, &attributes);
	pthread_condattr_destroy(&attributes);
	circle->size = circle->users = size;
	for (int32_t rank = 0; rank < size; rank++)
		circle->seats[rank] = (struct seat){.circle = circle, .rank = rank, .fail_at = -1};
	return circle;
}

static void circle_free(struct circle *circle)
{
	pthread_cond_destroy(&circle->changed);
	pthread_mutex_destroy(&circle->lock);
	free(circle);
}

static void go(struct seat *seat)
{
	pthread_mutex_lock(&seat->circle->lock);
	seat->gone = true;
	if (!seat->circle->first_gone)
		seat->circle->first_gone = seat;
	pthread_cond_broadcast(&seat->circle->changed);
	pthread_mutex_unlock(&seat->circle->lock);
}

void circle_leave(struct seat *seat)
{
	struct circle *circle;
	bool last;

	if (!seat)
		return;
	circle = seat->circle;
	go(seat);
	pthread_mutex_lock(&circle->lock);
	last = --circle->users == 0;
	pthread_mutex_unlock(&circle->lock);
	if (last)
		circle_free(circle);
}

/* ---- Collectives ----------------------------------------------------------------------------------------------- */

static void compare(const struct seat *first, const struct seat *other)
{
	if (first->count == other->count && first->root == other->root)
		return;
	fprintf(stderr, "collective %ld does not match: rank %d has %zu bytes from %d, rank %d %zu bytes from %d\n",
		first->begun, (int)first->rank, first->count, (int)first->root, (int)other->rank, other->count,
		(int)other->root);
	abort();
}

/* With the lock, all are here. */
static void happen(struct circle *circle)
{
	const struct seat *first = &circle->seats[0];

	for (int32_t rank = 0; rank < circle->size; rank++) {
		struct seat *seat = &circle->seats[rank];

		compare(first, seat);
		for (int32_t from = 0; from < circle->size && seat->root < 0; from++)
			memcpy((char *)seat->receive + (size_t)from * seat->count, circle->seats[from].send,
			       seat->count);
		if (seat->root >= 0 && seat->root != rank)
			memcpy(seat->receive, circle->seats[seat->root].receive, seat->count);
	}
	circle->happened++;
	pthread_cond_broadcast(&circle->changed);
}

static lshard_status told_to_fail(struct seat *seat, char *error, size_t error_bytes)
{
	const long call = atomic_fetch_add(&seat->calls, 1);

	if (seat->fail_at < 0 || call < seat->fail_at)
		return LSHARD_OK;
	snprintf(error, error_bytes, "told to fail at call %ld", call);
	return LSHARD_ERR_TRANSPORT;
}

static lshard_status begin(struct seat *seat, const void *send, void *receive, size_t count, int32_t root, void **work,
			   char *error, size_t error_bytes)
{
	struct circle *circle = seat->circle;
	bool all = true;
	lshard_status status = told_to_fail(seat, error, error_bytes);

	if (status < 0)
		return status;
	pthread_mutex_lock(&circle->lock);
	seat->send = send;
	seat->receive = receive;
	seat->count = count;
	seat->root = root;
	seat->begun++;
	for (int32_t rank = 0; rank < circle->size; rank++)
		all = all && !circle->seats[rank].gone && circle->seats[rank].begun == seat->begun;
	if (all)
		happen(circle);
	pthread_mutex_unlock(&circle->lock);
	*work = seat;
	return LSHARD_OK;
}

static lshard_status circle_broadcast(void *user, void *bytes, size_t count, int32_t root, void **work, char *error,
				      size_t error_bytes)
{
	return begin(user, NULL, bytes, count, root, work, error, error_bytes);
}

static lshard_status circle_allgather(void *user, const void *send, void *receive, size_t count, void **work,
				      char *error, size_t error_bytes)
{
	return begin(user, send, receive, count, -1, work, error, error_bytes);
}

static lshard_status circle_finish(void *user, void *work, uint32_t timeout_ms, char *error, size_t error_bytes)
{
	struct seat *seat = work;
	struct circle *circle = seat->circle;
	const struct seat *gone = NULL;
	struct timespec deadline;
	bool done;
	int waited = 0;
	lshard_status status = told_to_fail(seat, error, error_bytes);

	if (status < 0 || user != work)
		return status < 0 ? status : LSHARD_ERR_INVALID;
	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_nsec += (long)timeout_ms % 1000 * 1000000;
	deadline.tv_sec += timeout_ms / 1000 + deadline.tv_nsec / 1000000000;
	deadline.tv_nsec %= 1000000000;
	pthread_mutex_lock(&circle->lock);
	seat->inside++;
	while (seat->asleep)
		pthread_cond_wait(&circle->changed, &circle->lock);
	while ((seat->stuck || (circle->happened < seat->begun && !(gone = circle->first_gone))) && waited == 0)
		waited = pthread_cond_timedwait(&circle->changed, &circle->lock, &deadline);
	done = circle->happened >= seat->begun && !seat->stuck;
	seat->inside--;
	pthread_cond_broadcast(&circle->changed);
	pthread_mutex_unlock(&circle->lock);
	if (done || !gone)
		return done ? LSHARD_OK : LSHARD_IN_PROGRESS;
	snprintf(error, error_bytes, "rank %d has left", (int)gone->rank);
	return LSHARD_ERR_PEER_FAILED;
}

static void circle_stop(void *user)
{
	struct seat *seat = user;

	if (!seat->stuck)
		go(seat);
}

struct seat *circle_join(const struct member *member)
{
	struct circle *mine = member->rank == 0 ? circle_new(member->size) : NULL;
	struct circle **all = calloc((size_t)member->size, sizeof(struct circle *));
	struct circle *circle;
	struct seat *seat;

	if (!all)
		abort();
	if (member->bootstrap->allgather(member->bootstrap->user, &mine, all, sizeof(struct circle *)) != 0) {
		free(all);
		return NULL; /* a test that fails anyway */
	}
	circle = all[0];
	free(all);
	seat = &circle->seats[member->rank];
	seat->callbacks = (lshard_callbacks){
		sizeof seat->callbacks, circle_broadcast, circle_allgather, circle_finish, circle_stop, seat, NULL, 1};
	return seat;
}

const lshard_callbacks *seat_callbacks(const struct seat *seat)
{
	return &seat->callbacks;
}

void seat_fail_at(struct seat *seat, long calls)
{
	seat->fail_at = calls;
}

static void set(struct seat *seat, bool *what, bool value)
{
	pthread_mutex_lock(&seat->circle->lock);
	*what = value;
	pthread_cond_broadcast(&seat->circle->changed);
	pthread_mutex_unlock(&seat->circle->lock);
}

void seat_get_stuck(struct seat *seat)
{
	set(seat, &seat->stuck, true);
}

void seat_fall_asleep(struct seat *seat)
{
	set(seat, &seat->asleep, true);
}

void seat_wake(struct seat *seat)
{
	set(seat, &seat->asleep, false);
	pthread_mutex_lock(&seat->circle->lock);
	while (seat->inside > 0)
		pthread_cond_wait(&seat->circle->changed, &seat->circle->lock);
	pthread_mutex_unlock(&seat->circle->lock);
}

long seat_calls(const struct seat *seat)
{
	return atomic_load(&seat->calls);
}

long seat_collectives(const struct seat *seat)
{
	long begun;

	pthread_mutex_lock(&seat->circle->lock);
	begun = seat->begun;
	pthread_mutex_unlock(&seat->circle->lock);
	return begun;
}
