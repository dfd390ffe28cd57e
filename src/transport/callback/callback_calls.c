/* SPDX-License-Identifier: Apache-2.0
 *
 * callback_calls.c - one of the caller's collectives from its start to its end, and what all files look at under the
 * lock: how long to wait, and whether anything can still be done. Knows the caller's functions; knows no layer.
 */
#include "callback.h"
#include "clock.h"
#include "verdict.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

/* How soon an abort is seen while a collective is in progress. */
#define SLICE_MS 100u

/* Between two roll calls. */
#define LEAST_PAUSE_MS 10u
#define MOST_PAUSE_MS  1000u

/* ---- With the lock --------------------------------------------------------------------------------------------- */

uint64_t callback_deadline(const struct callback *callback)
{
	return lshard__now_ns() + (uint64_t)callback->base.context->timeout_ms * 1000000u;
}

uint64_t callback_grace(const struct callback *callback)
{
	return (uint64_t)callback->base.context->timeout_ms * 1000000u / 4;
}

/* Often enough to be heard of before a deadline, seldom enough to cost nothing. */
uint64_t callback_roll_call_pause(const struct callback *callback)
{
	const uint64_t eighth_ms = callback->base.context->timeout_ms / 8;

	return (eighth_ms < LEAST_PAUSE_MS  ? LEAST_PAUSE_MS
		: eighth_ms > MOST_PAUSE_MS ? MOST_PAUSE_MS
					    : eighth_ms) *
	       UINT64_C(1000000);
}

bool callback_pause(struct callback *callback, uint64_t deadline_ns)
{
	const struct timespec deadline = {.tv_sec = (time_t)(deadline_ns / 1000000000u),
					  .tv_nsec = (long)(deadline_ns % 1000000000u)};

	if (deadline_ns == UINT64_MAX)
		return pthread_cond_wait(&callback->changed, &callback->lock) == 0;
	return pthread_cond_timedwait(&callback->changed, &callback->lock, &deadline) == 0;
}

uint64_t callback_append(struct callback *callback, struct operation operation)
{
	operation.ticket = ++callback->tickets;
	callback->queue[(callback->first + callback->queued++) % callback->capacity] = operation;
	if (operation.store)
		operation.store->outstanding++;
	pthread_cond_broadcast(&callback->changed);
	return operation.ticket;
}

lshard_status callback_state(const struct callback *callback, lshard_error *error)
{
	if (callback->aborted)
		return lshard_fail(error, LSHARD_ERR_ABORTED, "rank %d: the group was aborted",
				   (int)callback->base.context->rank);
	if (callback->broken < 0)
		return lshard_fail(error, callback->broken, "%s", callback->why_broken.text);
	return LSHARD_OK;
}

bool callback_at_end(const struct callback *callback)
{
	return callback->stopping && (callback->broken < 0 || lshard__now_ns() >= callback->farewell_ns);
}

/* It calls finish for as long as the deadline, and is not over before a last call has returned. */
void callback_await_end(struct callback *callback)
{
	const uint64_t deadline = callback_deadline(callback) + 5u * SLICE_MS * 1000000u;

	while (!callback->over && !callback->lost && callback_pause(callback, deadline))
		;
	if (!callback->over)
		callback->abandoned = callback->lost = true;
}

const char *callback_others(const struct callback *callback, char *text, size_t bytes)
{
	const lshard_context *context = &callback->context;
	struct lshard__ranks others = {0};

	for (int32_t rank = 0; rank < context->size; rank++)
		if (rank != context->rank)
			lshard__ranks_add(&others, rank);
	snprintf(text, bytes, "%s%s", context->size > 2 ? "one of " : "", lshard__ranks_text(&others));
	return text;
}

/* ---- One collective -------------------------------------------------------------------------------------------- */

static bool is_at_end(struct callback *callback)
{
	bool at_end;

	pthread_mutex_lock(&callback->lock);
	at_end = callback_at_end(callback);
	pthread_mutex_unlock(&callback->lock);
	return at_end;
}

/* The first reason counts. */
lshard_status callback_break(struct callback *callback, lshard_status status, const char *text)
{
	pthread_mutex_lock(&callback->lock);
	if (callback->broken == LSHARD_OK)
		callback->broken = lshard_fail(&callback->why_broken, status, "callback: rank %d: %s",
					       (int)callback->base.context->rank, text);
	callback->stopping = true;
	pthread_cond_broadcast(&callback->changed);
	pthread_mutex_unlock(&callback->lock);
	return status;
}

static void abandon(struct callback *callback)
{
	pthread_mutex_lock(&callback->lock);
	callback->abandoned = true;
	pthread_mutex_unlock(&callback->lock);
}

/* The status is the caller's and may be none of ours; so is its text. */
static lshard_status break_down(struct callback *callback, lshard_status status, const char *what, const char *text)
{
	const lshard_context *context = callback->base.context;
	char other[32] = "";
	lshard_error error;

	if (status > 0 || strcmp(lshard_status_name(status), "LSHARD_UNKNOWN") == 0)
		status = LSHARD_ERR_CALLBACK;
	if (context->size == 2) /* of more, only the caller's text can say which */
		snprintf(other, sizeof other, " with rank %d", 1 - (int)context->rank);
	lshard_fail(&error, status, "the caller's %s%s failed: %s", what, other,
		    text[0] ? text : lshard_status_name(status));
	return callback_break(callback, status, error.text);
}

/* The group has gone: nothing of the caller's is there any more. */
static bool is_lost(struct callback *callback)
{
	bool lost;

	pthread_mutex_lock(&callback->lock);
	lost = callback->lost;
	pthread_mutex_unlock(&callback->lock);
	return lost;
}

/* Once. */
void callback_stop_caller(struct callback *callback)
{
	const lshard_callbacks *calls = callback->base.context->callbacks;

	if (calls->stop && !callback->told && !is_lost(callback))
		calls->stop(calls->user);
	callback->told = true;
}

/* It must come to an end, or its memory can never be freed. */
static lshard_status see_the_end(struct callback *callback, void *work)
{
	const lshard_callbacks *calls = callback->base.context->callbacks;
	const uint64_t deadline = callback_deadline(callback);
	lshard_status status = LSHARD_IN_PROGRESS;
	char text[384] = "";

	callback_stop_caller(callback);
	while (status == LSHARD_IN_PROGRESS && lshard__now_ns() < deadline && !is_lost(callback))
		status = calls->finish(calls->user, work, SLICE_MS, text, sizeof text);
	if (status == LSHARD_IN_PROGRESS || status == LSHARD_ERR_ABORTED)
		abandon(callback);
	return LSHARD_ERR_ABORTED;
}

static lshard_status see_through(struct callback *callback, lshard_status status, void *work, const char *what,
				 char *text, size_t text_bytes)
{
	const lshard_callbacks *calls = callback->base.context->callbacks;

	if (status != LSHARD_OK)
		return break_down(callback, status, what, text);
	do {
		if (is_at_end(callback))
			return see_the_end(callback, work);
		status = calls->finish(calls->user, work, SLICE_MS, text, text_bytes);
	} while (status == LSHARD_IN_PROGRESS);
	if (status == LSHARD_ERR_ABORTED)
		abandon(callback);
	if (status == LSHARD_OK && is_at_end(callback))
		return LSHARD_ERR_ABORTED; /* it may have come back to a group that has gone */
	return status == LSHARD_OK ? LSHARD_OK : break_down(callback, status, what, text);
}

lshard_status callback_allgather(struct callback *callback, const void *send, void *receive, size_t bytes)
{
	const lshard_callbacks *calls = callback->base.context->callbacks;
	char text[384] = "";
	void *work = NULL;
	const lshard_status status = calls->allgather(calls->user, send, receive, bytes, &work, text, sizeof text);

	return see_through(callback, status, work, "all-gather", text, sizeof text);
}

lshard_status callback_broadcast(struct callback *callback, void *bytes, size_t count, int32_t root)
{
	const lshard_callbacks *calls = callback->base.context->callbacks;
	char text[384] = "";
	void *work = NULL;
	const lshard_status status = calls->broadcast(calls->user, bytes, count, root, &work, text, sizeof text);

	return see_through(callback, status, work, "broadcast", text, sizeof text);
}
