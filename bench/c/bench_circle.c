/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_circle.c - ranks as threads of this process: their barrier, their all-gather for the library, and the
 * text of the first failure.
 * Knows: POSIX threads. Does not know: groups, series, what the ranks do between two barriers.
 */
#include "bench.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool bench_circle_open(struct bench_circle *circle, int32_t size)
{
	memset(circle, 0, sizeof *circle);
	circle->size = size;
	circle->sent = calloc((size_t)size, sizeof *circle->sent);
	if (!circle->sent)
		return false;
	if (pthread_mutex_init(&circle->mutex, NULL) != 0)
		goto free_sent;
	if (pthread_cond_init(&circle->changed, NULL) != 0)
		goto destroy_mutex;
	return true;

destroy_mutex:
	pthread_mutex_destroy(&circle->mutex);
free_sent:
	free(circle->sent);
	return false;
}

void bench_circle_close(struct bench_circle *circle)
{
	pthread_cond_destroy(&circle->changed);
	pthread_mutex_destroy(&circle->mutex);
	free(circle->sent);
}

/* No deadline of its own: every thread of the circle arrives here or breaks it, and what it does before has one. */
bool bench_circle_barrier(struct bench_circle *circle)
{
	bool whole;

	pthread_mutex_lock(&circle->mutex);
	const uint64_t barrier = circle->barriers;

	if (++circle->arrived == circle->size) {
		circle->arrived = 0;
		circle->barriers++;
		pthread_cond_broadcast(&circle->changed);
	}
	while (circle->barriers == barrier && !circle->broken)
		pthread_cond_wait(&circle->changed, &circle->mutex);
	whole = !circle->broken;
	pthread_mutex_unlock(&circle->mutex);
	return whole;
}

bool bench_circle_fail(struct bench_circle *circle, const char *format, ...)
{
	va_list arguments;

	pthread_mutex_lock(&circle->mutex);
	if (!circle->broken) {
		va_start(arguments, format);
		vsnprintf(circle->failure, sizeof circle->failure, format, arguments);
		va_end(arguments);
	}
	circle->broken = true;
	pthread_cond_broadcast(&circle->changed);
	pthread_mutex_unlock(&circle->mutex);
	return false;
}

int bench_circle_allgather(void *user, const void *send, void *receive, size_t bytes)
{
	const struct bench_member *member = user;
	struct bench_circle *circle = member->circle;

	circle->sent[member->rank] = send;
	if (!bench_circle_barrier(circle))
		return -1;
	for (int32_t rank = 0; rank < circle->size; rank++)
		memcpy((unsigned char *)receive + (size_t)rank * bytes, circle->sent[rank], bytes);
	return bench_circle_barrier(circle) ? 0
					    : -1; /* nobody returns, and frees what it sent, before all have copied */
}

struct rank_thread {
	pthread_t thread;
	void (*body)(void *user, int32_t rank);
	void *user;
	int32_t rank;
};

static void *run_rank(void *argument)
{
	const struct rank_thread *self = argument;

	self->body(self->user, self->rank);
	return NULL;
}

bool bench_threads_run(int32_t size, void (*body)(void *user, int32_t rank), void *user, struct bench_circle *circle)
{
	struct rank_thread *threads = calloc((size_t)size, sizeof *threads);
	int32_t made = 1;

	if (!threads)
		return bench_circle_fail(circle, "no memory for %d ranks", size);
	for (; made < size; made++) {
		threads[made] = (struct rank_thread){.body = body, .user = user, .rank = made};
		if (pthread_create(&threads[made].thread, NULL, run_rank, &threads[made]) != 0)
			break;
	}
	if (made < size)
		bench_circle_fail(circle, "rank %d: no thread could be started for it", made);
	else
		body(user, 0);
	for (int32_t rank = 1; rank < made; rank++)
		pthread_join(threads[rank].thread, NULL);
	free(threads);
	return made == size;
}
