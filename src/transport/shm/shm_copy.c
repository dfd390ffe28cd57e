/* SPDX-License-Identifier: Apache-2.0
 *
 * shm_copy.c - the copying mode: a thread fetches layers from the others' pages into this rank's buffers.
 * Knows requests and pieces; maps nothing and talks to nobody.
 *
 * A request belongs to a buffer and is queued again by every fetch into it. The thread notes the generation it copies;
 * when the buffer was fetched again meanwhile, the newer copy follows in the queue and only that one is reported done.
 */
#include "shm.h"
#include "host_copy.h"
#include "limit_reason.h"
#include "sockets.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <time.h>

/* ---- the queue, with the lock ---- */

static void unlink_request(struct shm_copier *copier, struct shm_request *request)
{
	*(request->previous ? &request->previous->next : &copier->first) = request->next;
	*(request->next ? &request->next->previous : &copier->last) = request->previous;
	request->next = request->previous = NULL;
	request->queued = 0;
	request->store->n_queued--;
}

static void append_request(struct shm_copier *copier, struct shm_request *request)
{
	request->previous = copier->last;
	*(copier->last ? &copier->last->next : &copier->first) = request;
	copier->last = request;
	request->queued = 1;
	request->store->n_queued++;
}

/* ---- the thread ---- */

static void copy_one(struct shm_copier *copier, struct shm_request *request)
{
	struct shm_store *store = request->store;
	uint64_t generation = request->generation;
	uint32_t position = request->position;
	uint64_t started;
	uint64_t finished;

	unlink_request(copier, request);
	copier->running = store;
	pthread_mutex_unlock(&copier->lock);
	started = lshard__now_ns();
	lshard__host_copy_layer(store->base.plan, position, store->bases, shm_window(store, request->buffer));
	finished = lshard__now_ns();
	pthread_mutex_lock(&copier->lock);
	copier->running = NULL;
	if (request->generation == generation) {
		request->started_ns = started;
		request->finished_ns = finished;
		atomic_store_explicit(&request->pending, 0, memory_order_release);
	}
	pthread_cond_broadcast(&copier->done);
}

static void *copy_until_stopped(void *user)
{
	struct shm_copier *copier = user;

	pthread_mutex_lock(&copier->lock);
	while (!copier->stop) {
		if (copier->first && !copier->aborted)
			copy_one(copier, copier->first);
		else
			pthread_cond_wait(&copier->work, &copier->lock);
	}
	pthread_mutex_unlock(&copier->lock);
	return NULL;
}

/* ---- its life ---- */

lshard_status shm_copier_make(struct shm_copier *copier, lshard_error *error)
{
	int failed = pthread_mutex_init(&copier->lock, NULL);

	if (failed)
		goto refused;
	failed = pthread_cond_init(&copier->work, NULL);
	if (failed)
		goto destroy_lock;
	failed = lshard__condition_open(&copier->done);
	if (failed)
		goto destroy_work;
	copier->made = 1;
	return LSHARD_OK;

destroy_work:
	pthread_cond_destroy(&copier->work);
destroy_lock:
	pthread_mutex_destroy(&copier->lock);
refused:
	return lshard_fail(error, LSHARD_ERR_SYSTEM, "copying thread: %s", strerror(failed));
}

/* The program's signal handlers must not run on a thread it does not know. */
lshard_status shm_copier_start(struct shm_copier *copier, lshard_error *error)
{
	sigset_t all;
	sigset_t before;
	int failed;

	if (copier->started)
		return LSHARD_OK;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	failed = pthread_create(&copier->thread, NULL, copy_until_stopped, copier);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (failed)
		return lshard_fail(error, LSHARD_ERR_SYSTEM, "copying thread: %s", lshard__reason_thread(failed).text);
	(void)pthread_setname_np(copier->thread, "layershard-copy");
	copier->started = 1;
	return LSHARD_OK;
}

void shm_copier_abort(struct shm_copier *copier)
{
	pthread_mutex_lock(&copier->lock);
	copier->aborted = 1;
	pthread_cond_broadcast(&copier->done);
	pthread_mutex_unlock(&copier->lock);
}

void shm_copier_close(struct shm_copier *copier)
{
	if (!copier->made)
		return;
	if (copier->started) {
		pthread_mutex_lock(&copier->lock);
		copier->stop = 1;
		pthread_cond_signal(&copier->work);
		pthread_mutex_unlock(&copier->lock);
		pthread_join(copier->thread, NULL);
	}
	pthread_cond_destroy(&copier->done);
	pthread_cond_destroy(&copier->work);
	pthread_mutex_destroy(&copier->lock);
}

static void forget_queued(struct shm_copier *copier, struct shm_store *store)
{
	for (uint32_t buffer = 0; buffer < store->base.plan->buffers; buffer++) {
		struct shm_request *request = &store->requests[buffer];

		if (request->queued)
			unlink_request(copier, request);
	}
}

void shm_copier_forget(struct shm_copier *copier, struct shm_store *store)
{
	if (!store->requests)
		return;
	pthread_mutex_lock(&copier->lock);
	forget_queued(copier, store);
	while (copier->running == store)
		pthread_cond_wait(&copier->done, &copier->lock);
	pthread_mutex_unlock(&copier->lock);
}

/* ---- the table's functions ---- */

static struct shm_copier *copier_of(lshard_store *store)
{
	return &((struct shm *)store->transport)->copier;
}

static lshard_status aborted(lshard_store *store)
{
	return lshard_fail(&store->error, LSHARD_ERR_ABORTED, "series '%s': rank %d was aborted", store->plan->name,
			   (int)store->transport->context->rank);
}

lshard_status shm_fetch(lshard_store *base, uint32_t position, uint32_t buffer, void *stream, uint64_t sequence)
{
	struct shm_store *store = (struct shm_store *)base;
	struct shm_copier *copier = copier_of(base);
	struct shm_request *request;

	(void)stream;
	(void)sequence;
	if (!store->requests || buffer >= base->plan->buffers || position >= base->plan->layers)
		return lshard_fail(&base->error, LSHARD_ERR_RANGE,
				   "series '%s': there is no layer at position %u, or no buffer %u to fetch it into",
				   base->plan->name, (unsigned)position, (unsigned)buffer);
	request = &store->requests[buffer];
	pthread_mutex_lock(&copier->lock);
	if (copier->aborted) {
		pthread_mutex_unlock(&copier->lock);
		return aborted(base);
	}
	if (request->queued)
		unlink_request(copier, request);
	request->position = position;
	request->generation++;
	request->untold = 1;
	atomic_store_explicit(&request->pending, 1, memory_order_relaxed);
	append_request(copier, request);
	pthread_cond_signal(&copier->work);
	pthread_mutex_unlock(&copier->lock);
	return LSHARD_OK;
}

static void wait_until(struct shm_copier *copier, uint64_t deadline, int *late)
{
	struct timespec until = {(time_t)(deadline / 1000000000u), (long)(deadline % 1000000000u)};

	*late = pthread_cond_timedwait(&copier->done, &copier->lock, &until) == ETIMEDOUT;
}

static lshard_status block(struct shm_store *store, struct shm_request *request)
{
	lshard_store *base = &store->base;
	struct shm_copier *copier = copier_of(base);
	uint32_t timeout_ms = base->transport->context->timeout_ms;
	uint64_t deadline = lshard__deadline_ns(timeout_ms);
	lshard_status status = LSHARD_OK;
	int late = 0;

	pthread_mutex_lock(&copier->lock);
	while (atomic_load_explicit(&request->pending, memory_order_relaxed) && !copier->aborted && !late)
		wait_until(copier, deadline, &late);
	if (atomic_load_explicit(&request->pending, memory_order_relaxed))
		status = copier->aborted ? LSHARD_ERR_ABORTED : LSHARD_ERR_TIMEOUT;
	pthread_mutex_unlock(&copier->lock);
	if (status == LSHARD_ERR_ABORTED)
		return aborted(base);
	if (status == LSHARD_ERR_TIMEOUT)
		return lshard_fail(&base->error, status, "series '%s': position %u was not copied within %u ms",
				   base->plan->name, (unsigned)request->position, (unsigned)timeout_ms);
	return LSHARD_OK;
}

lshard_status shm_wait(lshard_store *base, uint32_t buffer, void *stream, lshard_arrival *arrival)
{
	struct shm_store *store = (struct shm_store *)base;
	struct shm_request *request;
	lshard_arrival told = {0, 0, 0, 0};
	lshard_status status = LSHARD_OK;

	(void)stream;
	if (store->requests && buffer < base->plan->buffers && store->requests[buffer].untold) {
		request = &store->requests[buffer];
		if (atomic_load_explicit(&request->pending, memory_order_acquire)) {
			uint64_t began = lshard__now_ns();

			status = block(store, request);
			told.blocked_ns = lshard__now_ns() - began;
		}
		if (status == LSHARD_OK) {
			told.started_ns = request->started_ns;
			told.finished_ns = request->finished_ns;
			told.busy_ns = request->finished_ns - request->started_ns;
			request->untold = 0;
		}
	}
	if (arrival)
		*arrival = told;
	return status;
}

/* Everything that was fetched gets there; after an abort nothing moves any more and what waits is dropped. */
static lshard_status finish_all(lshard_store *base)
{
	struct shm_store *store = (struct shm_store *)base;
	struct shm_copier *copier = copier_of(base);
	uint64_t deadline = lshard__deadline_ns(base->transport->context->timeout_ms);
	int late = 0;

	if (!store->requests)
		return LSHARD_OK;
	pthread_mutex_lock(&copier->lock);
	while ((store->n_queued || copier->running == store) && !late) {
		if (copier->aborted)
			forget_queued(copier, store);
		if (store->n_queued || copier->running == store)
			wait_until(copier, deadline, &late);
	}
	late = store->n_queued || copier->running == store;
	pthread_mutex_unlock(&copier->lock);
	if (late)
		return lshard_fail(&base->error, LSHARD_ERR_TIMEOUT, "series '%s': copies did not end within %u ms",
				   base->plan->name, (unsigned)base->transport->context->timeout_ms);
	return LSHARD_OK;
}

lshard_status shm_join(lshard_store *store, void *stream)
{
	(void)stream;
	return finish_all(store);
}

lshard_status shm_drain(lshard_store *store)
{
	return finish_all(store);
}
