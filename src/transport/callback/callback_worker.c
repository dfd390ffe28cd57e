/* SPDX-License-Identifier: Apache-2.0
 *
 * callback_worker.c - the thread that makes the caller's collectives: how it starts, what it does next, how it ends.
 * Knows the queue; what the ranks say to each other is callback_rounds.c.
 */
#include "callback.h"
#include "clock.h"
#include "limit_reason.h"

#include <signal.h>

/* With the lock: what is left fails, and nobody waits in vain. */
static void fail_the_rest(struct callback *callback)
{
	lshard_error error = {""};
	lshard_status status = callback_state(callback, &error);

	if (status == LSHARD_OK)
		status = lshard_fail(&error, LSHARD_ERR_ABORTED, "callback: rank %d is closing",
				     (int)callback->base.context->rank);
	while (callback->queued > 0)
		callback_conclude(callback, status, &error);
	callback->over = true;
	pthread_cond_broadcast(&callback->changed);
}

static uint64_t next_roll_call(const struct callback *callback)
{
	return lshard__now_ns() + callback_roll_call_pause(callback);
}

void callback_start_roll_calls(struct callback *callback)
{
	if (!callback->base.context->callbacks->roll_calls)
		return;
	pthread_mutex_lock(&callback->lock);
	callback->roll_call_ns = next_roll_call(callback);
	pthread_cond_broadcast(&callback->changed);
	pthread_mutex_unlock(&callback->lock);
}

static void *work_until_stopped(void *argument)
{
	struct callback *callback = argument;

	pthread_mutex_lock(&callback->lock);
	while (!callback->stopping) {
		if (callback->queued > 0)
			callback_serve(callback);
		else if (callback_pause(callback, callback->roll_call_ns) || callback->queued > 0 || callback->stopping)
			continue;
		else
			callback_call_roll(callback, ROLL_CALL);
		if (callback->roll_call_ns != UINT64_MAX)
			callback->roll_call_ns = next_roll_call(callback);
	}
	if (callback->aborted && !callback_at_end(callback))
		callback_call_roll(callback, LEAVING);
	pthread_mutex_unlock(&callback->lock);
	callback_stop_caller(callback);
	pthread_mutex_lock(&callback->lock);
	fail_the_rest(callback);
	pthread_mutex_unlock(&callback->lock);
	return NULL;
}

/* The program's signal handlers must not run on a thread it does not know. */
lshard_status callback_start(struct callback *callback, lshard_error *error)
{
	sigset_t all, before;
	int failed;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	failed = pthread_create(&callback->worker, NULL, work_until_stopped, callback);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (failed)
		return lshard_fail(error, LSHARD_ERR_SYSTEM, "callback: rank %d: no thread for the collectives: %s",
				   (int)callback->base.context->rank, lshard__reason_thread(failed).text);
	(void)pthread_setname_np(callback->worker, "layershard-call");
	callback->started = true;
	return LSHARD_OK;
}

void callback_end(struct callback *callback)
{
	bool lost;

	if (!callback->started)
		return;
	pthread_mutex_lock(&callback->lock);
	callback->stopping = true;
	pthread_cond_broadcast(&callback->changed);
	callback_await_end(callback);
	lost = callback->lost;
	pthread_mutex_unlock(&callback->lock);
	if (lost)
		pthread_detach(callback->worker);
	else
		pthread_join(callback->worker, NULL);
}
