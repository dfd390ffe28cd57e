/* SPDX-License-Identifier: Apache-2.0
 *
 * callback.c - `callback`: the caller's own broadcast and all-gather carry the layers, in step on all ranks, so that
 * anything that has these two connects them. Here: the table, and what the ring and the group ask for, which is put
 * into the worker's queue and waited for, never longer than the deadline. See callback.h.
 */
#include "callback.h"
#include "clock.h"
#include "transports.h"

#include <string.h>

/* How long an abort waits for the worker, and how much of that the worker may take to tell the others. */
#define ABORT_MS    UINT64_C(300)
#define FAREWELL_MS UINT64_C(200)

/* ---- The transport --------------------------------------------------------------------------------------------- */

static void callback_free(struct callback *callback)
{
	const lshard_context given = callback->context, *context = &given;

	if (!context->forked(context)) {
		if (callback->abandoned)
			return; /* a collective may still come into these, and the worker back */
		callback_drop_event(callback, callback->done);
		pthread_cond_destroy(&callback->changed);
		pthread_mutex_destroy(&callback->lock);
	}
	context->release(context, callback->queue);
	context->release(context, callback->seen);
	context->release(context, callback->came);
	context->release(context, callback->votes);
	context->release(context, callback->announcements);
	context->release(context, callback);
}

static struct callback *callback_new(const lshard_context *context)
{
	const size_t size = (size_t)context->size;
	struct callback *callback = context->allocate(context, sizeof *callback);

	if (!callback)
		return NULL;
	callback->calls = *context->callbacks;
	callback->context = *context;
	callback->context.callbacks = &callback->calls;
	callback->base.context = &callback->context;
	callback->ops = lshard__callback;
	callback->base.ops = &callback->ops;
	if (pthread_mutex_init(&callback->lock, NULL) != 0)
		goto release;
	if (lshard__condition_open(&callback->changed) != 0)
		goto destroy_lock;
	callback->capacity = 64;
	callback->queue = context->allocate(context, callback->capacity * sizeof *callback->queue);
	callback->announcements = context->allocate(context, size * sizeof *callback->announcements);
	callback->votes = context->allocate(context, size * sizeof(struct vote));
	callback->came = context->allocate(context, size);
	callback->seen = context->allocate(context, size * sizeof *callback->seen);
	callback->roll_call_ns = UINT64_MAX;
	if (callback->queue && callback->announcements && callback->votes && callback->came && callback->seen)
		return callback;
	callback_free(callback);
	return NULL;

destroy_lock:
	pthread_mutex_destroy(&callback->lock);
release:
	context->release(context, callback);
	return NULL;
}

static lshard_status make_worker(const lshard_context *context, struct callback **made, lshard_error *error)
{
	const lshard_callbacks *calls = context->callbacks;
	lshard_status status = LSHARD_OK;

	if (context->options[0])
		return lshard_fail(error, LSHARD_ERR_INVALID, "callback: there is no option '%s'", context->options);
	if (!calls || !calls->broadcast || !calls->allgather || !calls->finish)
		return lshard_fail(error, LSHARD_ERR_INVALID,
				   "callback: rank %d gives callbacks without broadcast, allgather or finish",
				   (int)context->rank);
	*made = callback_new(context);
	if (!*made)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "callback: rank %d has no memory to join",
				   (int)context->rank);
	if (context->memory == LSHARD_MEMORY_HOST)
		(*made)->ops.copy = NULL; /* the processor itself reaches all of it */
	else
		status = callback_device_take(*made, context, error);
	if (status == LSHARD_OK)
		status = callback_start(*made, error);
	if (status < 0)
		callback_free(*made);
	return status;
}

static void make_end(struct callback *callback)
{
	callback_end(callback);
	callback_free(callback);
}

/* All ranks have come so far: the caller's collectives must not wait for one that never did. */
static lshard_status agree_to_join(const lshard_context *context, lshard_error *error)
{
	const char here = 1;
	char *all = context->allocate(context, (size_t)context->size);
	int failed;

	if (!all)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "callback: rank %d has no memory to join",
				   (int)context->rank);
	failed = context->bootstrap->allgather(context->bootstrap->user, &here, all, sizeof here);
	context->release(context, all);
	if (!failed)
		return LSHARD_OK;
	return lshard_fail(error, LSHARD_ERR_TRANSPORT, "callback: rank %d: the bootstrap's all-gather failed",
			   (int)context->rank);
}

/* A rank that fails before it has joined the others is heard by them in their all-gather (gathering.h). */
static lshard_status callback_open(const lshard_context *context, lshard_transport *inner, lshard_transport **transport,
				   lshard_error *error)
{
	struct callback *callback = NULL;
	lshard_status status = make_worker(context, &callback, error);

	(void)inner;
	if (status < 0)
		return status;
	status = agree_to_join(context, error);
	if (status < 0) {
		make_end(callback);
		return status;
	}
	callback_start_roll_calls(callback);
	*transport = &callback->base;
	return LSHARD_OK;
}

/* A child by fork has no worker to end, and maybe a lock that the worker held. */
static void callback_close(lshard_transport *transport)
{
	if (transport->context->forked(transport->context))
		callback_free(callback_of(transport));
	else
		make_end(callback_of(transport));
}

/* Gives the worker a moment to leave the caller's functions: a program that aborts may be about to end. */
static void callback_abort(lshard_transport *transport)
{
	struct callback *callback = callback_of(transport);
	const uint64_t deadline = lshard__now_ns() + ABORT_MS * 1000000u;

	pthread_mutex_lock(&callback->lock);
	if (!callback->aborted)
		callback->farewell_ns = lshard__now_ns() + FAREWELL_MS * 1000000u;
	callback->aborted = callback->stopping = true;
	pthread_cond_broadcast(&callback->changed);
	while (!pthread_equal(pthread_self(), callback->worker) && !callback->over &&
	       callback_pause(callback, deadline))
		;
	pthread_mutex_unlock(&callback->lock);
}

/* ---- Exchanges and reads --------------------------------------------------------------------------------------- */

/* With the lock: the operation, if the worker has told nobody of it yet. */
static void withdraw(struct callback *callback, uint64_t ticket)
{
	const uint32_t last = (callback->first + callback->queued - 1) % callback->capacity;

	if (callback->queued == 0 || callback->queue[last].ticket != ticket ||
	    (callback->queued == 1 && callback->busy))
		return;
	if (callback->queue[last].store)
		callback->queue[last].store->outstanding--;
	callback->queued--;
}

/* With the lock: the others count on this rank, which waits no longer. Nothing can be taken back: it is the end. */
static lshard_status give_up(struct callback *callback, lshard_error *error)
{
	if (callback->broken == LSHARD_OK) {
		lshard_error late = {""};

		callback_fail_late(callback, NULL, &late);
		callback->broken = lshard_fail(&callback->why_broken, LSHARD_ERR_TIMEOUT, "callback: %.*s",
					       (int)sizeof late.text - 16, late.text);
	}
	callback->stopping = true;
	pthread_cond_broadcast(&callback->changed);
	return callback_state(callback, error);
}

/*
 * With the lock: until it is served. A caller that the others count on cannot leave, but the others are at the same: it
 * waits for a quarter of the deadline more, and if they do not come to an end then, the worker makes one.
 */
static lshard_status stay(struct callback *callback, uint64_t deadline, lshard_error *error)
{
	struct visitor *visitor = &callback->visitor;
	bool is_late = false;

	while (visitor->stage != SERVED) {
		if (callback->aborted && visitor->stage == WAITING)
			return callback_state(callback, error);
		if ((is_late ? callback_pause(callback, deadline + callback_grace(callback))
			     : callback_linger(callback, deadline)) ||
		    visitor->stage == SERVED)
			continue;
		if (visitor->stage == WAITING)
			return callback_fail_late(callback, visitor->alive, error);
		if (is_late)
			return give_up(callback, error);
		is_late = true;
	}
	if (visitor->status < 0)
		*error = visitor->error;
	return visitor->status;
}

/* With room in the queue, wait for an operation. */
static lshard_status visit(struct callback *callback, struct operation operation, struct visitor visitor,
			   lshard_error *error)
{
	const uint64_t deadline = callback_deadline(callback);
	lshard_status status;

	pthread_mutex_lock(&callback->lock);
	while (callback->queued == callback->capacity && callback_linger(callback, deadline))
		;
	status = callback_state(callback, error);
	if (status == LSHARD_OK && callback->queued == callback->capacity)
		status = callback_fail_late(callback, visitor.alive, error);
	if (status == LSHARD_OK) {
		callback->visitor = visitor;
		callback->visitor.ticket = callback_append(callback, operation);
		status = stay(callback, deadline, error);
		withdraw(callback, callback->visitor.ticket);
		callback->visitor.ticket = 0;
	}
	pthread_mutex_unlock(&callback->lock);
	return status;
}

/* Who is late the rounds have shown; who is gone only the caller's collectives know, which fail as a whole. */
static lshard_status callback_exchange(lshard_transport *transport, const void *send, void *receive, size_t bytes,
				       uint8_t *alive)
{
	const lshard_context *context = transport->context;
	const struct operation operation = {.kind = EXCHANGE, .bytes = bytes};
	const struct visitor visitor = {.send = send, .receive = receive, .alive = alive};
	lshard_status status;

	memset(alive, 0, (size_t)context->size);
	status = visit(callback_of(transport), operation, visitor, &transport->error);
	if (status == LSHARD_OK)
		memset(alive, 1, (size_t)context->size);
	alive[context->rank] = 1;
	return status;
}

static lshard_status callback_read(lshard_store *base, uint32_t position, void *destination)
{
	lshard_error error = {""};
	const lshard_status status =
		visit(callback_of(base->transport),
		      (struct operation){.kind = READ, .store = callback_store_of(base), .position = position},
		      (struct visitor){.destination = destination}, &error);

	if (status < 0)
		return lshard_fail(&base->error, status, "series '%s': %s", base->plan->name, error.text);
	return status;
}

/* ---- Transfers ------------------------------------------------------------------------------------------------- */

/*
 * With the lock: blocks only where a program reaches on and on without ever waiting and a rank or the link is that far
 * behind; once, until something moves. None can be left out: all ranks count on each.
 */
static lshard_status await_room(struct callback *callback, lshard_store *store)
{
	const uint64_t deadline = callback_deadline(callback);
	lshard_error error = {""};

	while (callback->queued == callback->capacity && !callback->stopping &&
	       callback->queue[callback->first].ticket != callback->full && callback_linger(callback, deadline))
		;
	if (callback_state(callback, &store->error) < 0 || callback->queued < callback->capacity)
		return callback_state(callback, &store->error);
	callback->full = callback->queue[callback->first].ticket;
	callback_fail_late(callback, NULL, &error);
	return lshard_fail(&store->error, LSHARD_ERR_TIMEOUT,
			   "series '%s': %u transfers before this one have not ended: %s", store->plan->name,
			   callback->queued, error.text);
}

static lshard_status callback_fetch(lshard_store *base, uint32_t position, uint32_t buffer, void *stream,
				    uint64_t sequence)
{
	struct callback *callback = callback_of(base->transport);
	struct callback_store *store = callback_store_of(base);
	const struct operation operation = {
		.kind = TRANSFER, .store = store, .position = position, .buffer = buffer, .sequence = sequence};
	uint64_t ticket;
	lshard_status status;

	(void)stream;
	pthread_mutex_lock(&callback->lock);
	status = await_room(callback, base);
	if (status < 0)
		goto unlock;
	ticket = callback_append(callback, operation);
	if (buffer != LSHARD_NO_BUFFER) {
		struct landing *landing = &store->landings[buffer];

		landing->ticket = ticket;
		landing->pending = landing->unwaited = true;
		landing->status = LSHARD_OK;
		landing->arrival = (lshard_arrival){0, 0, 0, 0};
	}
unlock:
	pthread_mutex_unlock(&callback->lock);
	return status;
}

/* With the lock: until the last fetch into the buffer is over. */
static lshard_status await(struct callback *callback, lshard_store *base, const struct landing *landing,
			   uint64_t deadline)
{
	while (landing->pending) {
		if (callback->aborted)
			return callback_state(callback, &base->error);
		if (!callback_linger(callback, deadline) && landing->pending)
			return callback_fail_late(callback, NULL, &base->error);
	}
	if (landing->status < 0)
		return lshard_fail(&base->error, landing->status, "series '%s': %s", base->plan->name,
				   landing->error.text);
	return LSHARD_OK;
}

static lshard_status callback_wait(lshard_store *base, uint32_t buffer, void *stream, lshard_arrival *arrival)
{
	struct callback *callback = callback_of(base->transport);
	struct landing *landing = &callback_store_of(base)->landings[buffer];
	const uint64_t deadline = callback_deadline(callback);
	uint64_t began_ns, blocked_ns = 0;
	lshard_status status = LSHARD_OK;

	*arrival = (lshard_arrival){0, 0, 0, 0};
	pthread_mutex_lock(&callback->lock);
	if (!landing->unwaited) {
		status = await(callback, base, landing, deadline); /* told already: a failure is told again */
		goto unlock;
	}
	if (landing->pending) {
		began_ns = lshard__now_ns();
		status = await(callback, base, landing, deadline);
		blocked_ns = lshard__now_ns() - began_ns;
	} else {
		status = await(callback, base, landing, deadline);
	}
	landing->unwaited = landing->pending; /* as it was, after TIMEOUT: the next wait goes on */
	if (status == LSHARD_OK)
		*arrival = landing->arrival;
	arrival->blocked_ns = blocked_ns;
unlock:
	pthread_mutex_unlock(&callback->lock);
	if (callback->on_device && status == LSHARD_OK)
		status = callback_device_follow(callback_store_of(base), buffer, stream);
	return status;
}

/* All ranks count on every transfer that was asked for, so none is dropped; those that only give count too. */
static lshard_status empty(struct callback_store *store, uint64_t deadline)
{
	lshard_store *base = &store->base;
	struct callback *callback = callback_of(base->transport);
	lshard_status status = LSHARD_OK;

	pthread_mutex_lock(&callback->lock);
	while (store->outstanding > 0 && !callback->stopping && callback_linger(callback, deadline))
		;
	if (store->outstanding > 0 && callback->stopping) {
		callback_await_end(callback);
		status = callback_state(callback, &base->error);
	}
	if (store->outstanding > 0 && status == LSHARD_OK)
		status = callback_fail_late(callback, NULL, &base->error);
	pthread_mutex_unlock(&callback->lock);
	return status;
}

/*
 * What failed stays to be told by the wait for it. Layers that this rank only gives are in flight, too: a program may
 * end after its last join, and the others have them then.
 */
static lshard_status callback_join(lshard_store *base, void *stream)
{
	struct callback *callback = callback_of(base->transport);
	const uint64_t deadline = callback_deadline(callback);
	lshard_status status = LSHARD_OK;

	pthread_mutex_lock(&callback->lock);
	for (uint32_t buffer = 0; buffer < base->plan->buffers && status == LSHARD_OK; buffer++)
		if (callback_store_of(base)->landings[buffer].unwaited)
			status = await(callback, base, &callback_store_of(base)->landings[buffer], deadline);
	pthread_mutex_unlock(&callback->lock);
	if (status == LSHARD_OK)
		status = empty(callback_store_of(base), deadline);
	if (callback->on_device && status == LSHARD_OK)
		status = callback_device_join(callback_store_of(base), stream);
	return status;
}

/* What was fetched before comes first. */
static lshard_status callback_copy(lshard_store *base, void *to, uint64_t to_pitch, const void *from,
				   uint64_t from_pitch, uint64_t width, uint64_t rows)
{
	const lshard_status status = empty(callback_store_of(base), callback_deadline(callback_of(base->transport)));

	return status == LSHARD_OK ? callback_device_copy(base, to, to_pitch, from, from_pitch, width, rows) : status;
}

static lshard_status callback_drain(lshard_store *base)
{
	struct callback_store *store = callback_store_of(base);
	const uint64_t deadline = callback_deadline(callback_of(base->transport));
	lshard_status status = empty(store, deadline);

	if (status == LSHARD_OK && callback_of(base->transport)->on_device)
		status = callback_device_drain(store, deadline);
	for (uint32_t buffer = 0; buffer < base->plan->buffers && status == LSHARD_OK; buffer++) {
		store->landings[buffer].unwaited = false; /* the worker has nothing of this store any more */
		store->landings[buffer].status = LSHARD_OK;
	}
	return status;
}

const lshard_transport_ops lshard__callback = {
	.struct_size = sizeof(lshard_transport_ops),
	.abi = LSHARD_TRANSPORT_ABI,
	.name = "callback",
	.summary = "the caller's own broadcast and all-gather, between any ranks, in host memory or on "
		   "the caller's device (collective)",
	.capabilities = LSHARD_CAP_COLLECTIVE | LSHARD_CAP_CALLER_MEMORY,
	.granule_bytes = 256,
	.open = callback_open,
	.close = callback_close,
	.exchange = callback_exchange,
	.abort = callback_abort,
	.store_open = callback_store_open,
	.store_close = callback_store_close,
	.shard = callback_shard,
	.buffer = callback_buffer,
	.copy = callback_copy,
	.fetch = callback_fetch,
	.wait = callback_wait,
	.join = callback_join,
	.drain = callback_drain,
	.read = callback_read,
};
