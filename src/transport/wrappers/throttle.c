/* SPDX-License-Identifier: Apache-2.0
 *
 * throttle.c - `throttle=BYTES_PER_S`: gives this rank's incoming link a bandwidth, so that a machine without a network
 * can show what one costs. Transfers are served one after the other in the order of their fetches; each takes bytes /
 * bandwidth, from the fetch (on collective transports: from when all ranks had asked for it) or from when the link is
 * free. The bytes themselves are the inner transport's; wait() only does not return before the link would have carried
 * them. Reads, which happen outside passes, are not slowed down. Host memory only.
 */
#include "clock.h"
#include "transports.h"
#include "wrapper.h"

#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

/* The last fetch into one buffer, on its way through the link. */
enum stage {
	NONE,   /* nothing, waited for already, or failed */
	QUEUED, /* may still be dropped, then it costs the link nothing */
	BEGUN   /* began_ns and finishes_ns are final */
};

struct transfer {
	enum stage stage;
	bool inner_done;                 /* the inner transport has the bytes there */
	struct transfer *before, *after; /* in the queue of the link */
	lshard_store *store;
	uint32_t buffer;
	uint64_t ready_ns; /* when it could begin */
	uint64_t takes_ns;
	uint64_t began_ns;
	uint64_t finishes_ns;
	lshard_status
		failure; /* of the inner transport, told to join or a wait for another buffer; until the wait for it */
	lshard_error why;
};

struct throttle {
	struct lshard__wrapper wrapper;
	double bytes_per_ns;
	bool collective;
	pthread_mutex_t lock; /* the link is shared by all series, which may be used from different threads */
	pthread_cond_t changed;
	bool aborted;
	struct transfer *first, *last; /* QUEUED ones */
	uint64_t free_ns;              /* when the link has done all that has begun */
};

struct throttle_store {
	struct lshard__wrapper_store wrapper;
	struct transfer *transfers; /* [buffers] */
};

static struct throttle *throttle_of(lshard_transport *transport)
{
	return (struct throttle *)transport;
}

static struct throttle_store *store_of(lshard_store *store)
{
	return (struct throttle_store *)store;
}

/* ---- The link; called with the lock held ----------------------------------------------------------------------- */

static void enqueue(struct throttle *link, struct transfer *transfer)
{
	transfer->before = link->last;
	transfer->after = NULL;
	*(link->last ? &link->last->after : &link->first) = transfer;
	link->last = transfer;
}

static void dequeue(struct throttle *link, struct transfer *transfer)
{
	*(transfer->before ? &transfer->before->after : &link->first) = transfer->after;
	*(transfer->after ? &transfer->after->before : &link->last) = transfer->before;
}

static uint64_t later(uint64_t one, uint64_t other)
{
	return one > other ? one : other;
}

/* The first of the queue takes the link. */
static void begin_first(struct throttle *link)
{
	struct transfer *transfer = link->first;

	dequeue(link, transfer);
	transfer->stage = BEGUN;
	transfer->began_ns = later(transfer->ready_ns, link->free_ns);
	transfer->finishes_ns = link->free_ns = transfer->began_ns + transfer->takes_ns;
}

/* What has begun until now cannot be dropped any more. When collective transfers begin is known at their wait only. */
static void settle(struct throttle *link, uint64_t now_ns)
{
	while (!link->collective && link->first && later(link->first->ready_ns, link->free_ns) <= now_ns)
		begin_first(link);
}

/* When @p transfer will be through, if nothing before it is dropped. */
static uint64_t finish_of(const struct throttle *link, const struct transfer *transfer)
{
	uint64_t free_ns = link->free_ns;

	if (transfer->stage != QUEUED)
		return transfer->finishes_ns;
	for (const struct transfer *each = link->first;; each = each->after) {
		free_ns = later(each->ready_ns, free_ns) + each->takes_ns;
		if (each == transfer)
			return free_ns;
	}
}

static struct timespec time_at(uint64_t at_ns)
{
	return (struct timespec){.tv_sec = (time_t)(at_ns / 1000000000u), .tv_nsec = (long)(at_ns % 1000000000u)};
}

/* A sleeper wakes some 50 us late: the last stretch is spent looking at the clock, or every transfer seems slower. */
#define AWAKE_NS 100000u

static void rest_until(struct throttle *link, uint64_t now_ns, uint64_t at_ns)
{
	const struct timespec until = time_at(at_ns - AWAKE_NS);

	if (at_ns - now_ns > AWAKE_NS) {
		pthread_cond_timedwait(&link->changed, &link->lock, &until);
		return;
	}
	pthread_mutex_unlock(&link->lock);
	pthread_mutex_lock(&link->lock);
}

/* Sleep until the link has carried @p transfer; a transfer dropped by another series may make that sooner. */
static lshard_status sleep_through(struct throttle *link, const struct transfer *transfer, uint64_t deadline_ns)
{
	for (;;) {
		uint64_t now_ns = lshard__now_ns();
		uint64_t finish_ns;

		settle(link, now_ns);
		finish_ns = finish_of(link, transfer);
		if (link->aborted)
			return LSHARD_ERR_ABORTED;
		if (finish_ns <= now_ns)
			return LSHARD_OK;
		if (now_ns >= deadline_ns)
			return LSHARD_ERR_TIMEOUT;
		rest_until(link, now_ns, finish_ns < deadline_ns ? finish_ns : deadline_ns);
	}
}

/* ---- Opening --------------------------------------------------------------------------------------------------- */

static lshard_status read_bandwidth(const char *text, double *bytes_per_s, lshard_error *error)
{
	char *end;
	double value = strtod(text, &end);

	if (end == text || *end != '\0' || !isfinite(value) || value < 1)
		return lshard_fail(error, LSHARD_ERR_INVALID,
				   "throttle: '%s' is no number of bytes per second; write throttle=1e9", text);
	*bytes_per_s = value;
	return LSHARD_OK;
}

static lshard_status check_inner(const lshard_transport_ops *inner, lshard_error *error)
{
	if (inner->capabilities & LSHARD_CAP_STREAMS)
		return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED,
				   "throttle: '%s' orders transfers on streams; only host memory can be throttled",
				   inner->name);
	if (inner->capabilities & LSHARD_CAP_DIRECT)
		return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED,
				   "throttle: '%s' reads layers in place, there is no transfer to slow down; "
				   "choose a mode that copies",
				   inner->name);
	return LSHARD_OK;
}

static bool link_open(struct throttle *link)
{
	if (pthread_mutex_init(&link->lock, NULL) != 0)
		return false;
	if (lshard__condition_open(&link->changed) == 0)
		return true;
	pthread_mutex_destroy(&link->lock);
	return false;
}

static lshard_status throttle_open(const lshard_context *context, lshard_transport *inner, lshard_transport **transport,
				   lshard_error *error)
{
	struct throttle *throttle;
	double bytes_per_s = 0;
	lshard_status status = read_bandwidth(context->options, &bytes_per_s, error);

	if (status == LSHARD_OK)
		status = check_inner(inner->ops, error);
	if (status < 0)
		return status;
	throttle = lshard__wrapper_new(context, inner, &lshard__throttle, sizeof *throttle, error);
	if (!throttle)
		return LSHARD_ERR_NO_MEMORY;
	throttle->bytes_per_ns = bytes_per_s / 1e9;
	throttle->collective = (inner->ops->capabilities & LSHARD_CAP_COLLECTIVE) != 0;
	if (!link_open(throttle)) {
		lshard__wrapper_free(throttle);
		return lshard_fail(error, LSHARD_ERR_SYSTEM, "throttle: the system has no resources for a lock");
	}
	*transport = &throttle->wrapper.base;
	return LSHARD_OK;
}

static void throttle_close(lshard_transport *transport)
{
	struct throttle *throttle = throttle_of(transport);

	if (!transport->context->forked(transport->context)) { /* in a child a thread that is not there may hold them */
		pthread_cond_destroy(&throttle->changed);
		pthread_mutex_destroy(&throttle->lock);
	}
	lshard__wrapper_close(transport);
}

static void throttle_abort(lshard_transport *transport)
{
	struct throttle *throttle = throttle_of(transport);

	pthread_mutex_lock(&throttle->lock);
	throttle->aborted = true;
	pthread_cond_broadcast(&throttle->changed);
	pthread_mutex_unlock(&throttle->lock);
	lshard__wrapper_abort(transport);
}

static lshard_status throttle_store_open(lshard_transport *transport, const lshard_store_plan *plan,
					 lshard_store **opened)
{
	const lshard_context *context = transport->context;
	struct throttle_store *store;
	lshard_status status = lshard__wrapper_store_new(transport, plan, sizeof *store, &store);

	if (status < 0)
		return status;
	store->transfers = context->allocate(context, (plan->buffers + (size_t)1) * sizeof store->transfers[0]);
	if (!store->transfers) {
		lshard__wrapper_store_close(&store->wrapper.base);
		return lshard_fail(&transport->error, LSHARD_ERR_NO_MEMORY, "throttle: no memory for series '%s'",
				   plan->name);
	}
	for (uint32_t buffer = 0; buffer < plan->buffers; buffer++) {
		store->transfers[buffer].store = &store->wrapper.base;
		store->transfers[buffer].buffer = buffer;
	}
	*opened = &store->wrapper.base;
	return LSHARD_OK;
}

/* What has not begun never will: the link is free for the other series. */
static void drop_all(lshard_store *base)
{
	struct throttle *link = throttle_of(base->transport);
	struct throttle_store *store = store_of(base);

	pthread_mutex_lock(&link->lock);
	settle(link, lshard__now_ns());
	for (uint32_t buffer = 0; buffer < base->plan->buffers; buffer++) {
		if (store->transfers[buffer].stage == QUEUED)
			dequeue(link, &store->transfers[buffer]);
		store->transfers[buffer].stage = NONE;
		store->transfers[buffer].failure = LSHARD_OK;
	}
	pthread_cond_broadcast(&link->changed);
	pthread_mutex_unlock(&link->lock);
}

static void throttle_store_close(lshard_store *base)
{
	const lshard_context *context = base->transport->context;

	if (!context->forked(context))
		drop_all(base);
	context->release(context, store_of(base)->transfers);
	lshard__wrapper_store_close(base);
}

/* A drain that fails has dropped nothing. */
static lshard_status throttle_drain(lshard_store *base)
{
	const lshard_status status = lshard__wrapper_drain(base);

	if (status == LSHARD_OK)
		drop_all(base);
	return status;
}

/* ---- Transfers ------------------------------------------------------------------------------------------------- */

static uint64_t takes_ns(const struct throttle *link, uint64_t bytes)
{
	return (uint64_t)((double)bytes / link->bytes_per_ns + 0.5);
}

static lshard_status throttle_fetch(lshard_store *base, uint32_t position, uint32_t buffer, void *stream,
				    uint64_t sequence)
{
	struct throttle *link = throttle_of(base->transport);
	struct transfer *transfer;
	uint64_t now_ns = lshard__now_ns();
	lshard_status status = lshard__wrapper_fetch(base, position, buffer, stream, sequence);

	if (status < 0 || buffer == LSHARD_NO_BUFFER)
		return status;
	transfer = &store_of(base)->transfers[buffer];
	pthread_mutex_lock(&link->lock);
	settle(link, now_ns);
	if (transfer->stage == QUEUED) {
		dequeue(link, transfer);
		pthread_cond_broadcast(&link->changed);
	}
	transfer->stage = QUEUED;
	transfer->failure = LSHARD_OK;
	transfer->inner_done = false;
	transfer->ready_ns = now_ns;
	transfer->takes_ns = takes_ns(link, lshard__wrapper_bytes_in(base, position));
	enqueue(link, transfer);
	settle(link, now_ns);
	pthread_mutex_unlock(&link->lock);
	return LSHARD_OK;
}

/* What never comes costs the link nothing. */
static void note_failure(struct throttle *link, struct transfer *transfer, lshard_status status)
{
	pthread_mutex_lock(&link->lock);
	if (transfer->stage == QUEUED) {
		dequeue(link, transfer);
		pthread_cond_broadcast(&link->changed);
	}
	transfer->stage = NONE;
	pthread_mutex_unlock(&link->lock);
	transfer->failure = status;
	transfer->why = transfer->store->error;
}

static lshard_status tell_failure(const struct transfer *transfer)
{
	return lshard_fail(&transfer->store->error, transfer->failure, "%s", transfer->why.text);
}

/*
 * The bytes are there as far as the inner transport is concerned. Its join tells no failure that a wait has told, so
 * that is kept for ours; a wait that timed out may be made again.
 */
static lshard_status inner_finish(struct throttle *link, struct transfer *transfer, void *stream)
{
	lshard_arrival arrival = {0, 0, 0, 0};
	lshard_status status;

	if (transfer->inner_done)
		return LSHARD_OK;
	status = lshard__wrapper_wait(transfer->store, transfer->buffer, stream, &arrival);
	if (status < 0 && status != LSHARD_ERR_TIMEOUT)
		note_failure(link, transfer, status);
	if (status < 0)
		return status;
	transfer->inner_done = true;
	if (link->collective && arrival.started_ns > 0)
		transfer->ready_ns = arrival.started_ns;
	return LSHARD_OK;
}

/*
 * Collective: when a transfer could begin is known once all ranks asked for it, and the link serves in the order of
 * fetch; so everything before @p transfer is finished too. It comes first itself, with the whole deadline: where it is
 * done, so is what was fetched before it, and no wait for that blocks. Such a group is used from one thread, so the
 * queue is this one's.
 */
static lshard_status begin_collective(struct throttle *link, struct transfer *transfer, void *stream)
{
	lshard_status status = inner_finish(link, transfer, stream);

	while (status == LSHARD_OK && transfer->stage == QUEUED) {
		struct transfer *first = link->first;
		const lshard_status of_first = inner_finish(link, first, stream);

		if (of_first == LSHARD_OK)
			begin_first(link);
		else if (of_first == LSHARD_ERR_TIMEOUT)
			status = lshard_fail(&transfer->store->error, of_first, "%s", first->store->error.text);
	}
	return status;
}

static lshard_status tell(const struct throttle *link, const struct transfer *transfer, lshard_status status)
{
	const lshard_context *context = link->wrapper.base.context;

	if (status == LSHARD_ERR_ABORTED)
		return lshard_fail(&transfer->store->error, status, "rank %d: the group was aborted",
				   (int)context->rank);
	if (status == LSHARD_ERR_TIMEOUT)
		return lshard_fail(&transfer->store->error, status,
				   "rank %d waited %u ms for its throttled link, which has more to carry than that",
				   (int)context->rank, (unsigned)context->timeout_ms);
	return status;
}

/* Block until both the inner transport and the link are through with @p transfer. */
static lshard_status arrive(struct throttle *link, struct transfer *transfer, void *stream, uint64_t deadline_ns)
{
	lshard_status status =
		link->collective ? begin_collective(link, transfer, stream) : inner_finish(link, transfer, stream);

	if (status < 0)
		return status;
	pthread_mutex_lock(&link->lock);
	status = sleep_through(link, transfer, deadline_ns);
	pthread_mutex_unlock(&link->lock);
	return tell(link, transfer, status);
}

static uint64_t deadline_from(const lshard_context *context, uint64_t now_ns)
{
	return now_ns + (uint64_t)context->timeout_ms * 1000000u;
}

static lshard_status throttle_wait(lshard_store *base, uint32_t buffer, void *stream, lshard_arrival *arrival)
{
	struct throttle *link = throttle_of(base->transport);
	struct transfer *transfer = &store_of(base)->transfers[buffer];
	uint64_t began_ns = lshard__now_ns();
	lshard_status status = LSHARD_OK;

	if (transfer->stage == NONE && transfer->failure == LSHARD_OK)
		return lshard__wrapper_wait(base, buffer, stream, arrival);
	*arrival = (lshard_arrival){0, 0, 0, 0};
	if (transfer->failure < 0) {
		status = tell_failure(transfer);
	} else if (transfer->stage != BEGUN || !transfer->inner_done || transfer->finishes_ns > began_ns) {
		status = arrive(link, transfer, stream, deadline_from(base->transport->context, began_ns));
		arrival->blocked_ns = lshard__now_ns() - began_ns;
	}
	if (status < 0) {
		transfer->failure = LSHARD_OK; /* it is told; from now on the inner transport tells it */
		return status;
	}
	transfer->stage = NONE;
	arrival->started_ns = transfer->began_ns;
	arrival->finished_ns = transfer->finishes_ns;
	arrival->busy_ns = transfer->takes_ns;
	return LSHARD_OK;
}

/* One wait for the inner transport, then for the link. What is there now stays to be waited for: its arrival is told
 * then. */
static lshard_status throttle_join(lshard_store *base, void *stream)
{
	struct throttle *link = throttle_of(base->transport);
	struct throttle_store *store = store_of(base);
	uint64_t deadline_ns = deadline_from(base->transport->context, lshard__now_ns());
	lshard_status status = lshard__wrapper_join(base, stream);

	for (uint32_t buffer = 0; status == LSHARD_OK && buffer < base->plan->buffers; buffer++)
		if (store->transfers[buffer].failure < 0)
			status = tell_failure(&store->transfers[buffer]);
		else if (store->transfers[buffer].stage != NONE)
			status = arrive(link, &store->transfers[buffer], stream, deadline_ns);
	return status;
}

const lshard_transport_ops lshard__throttle = {
	.struct_size = sizeof(lshard_transport_ops),
	.abi = LSHARD_TRANSPORT_ABI,
	.name = "throttle",
	.summary = "throttle=BYTES_PER_S: give the link into each rank a bandwidth",
	.open = throttle_open,
	.close = throttle_close,
	.abort = throttle_abort,
	.store_open = throttle_store_open,
	.store_close = throttle_store_close,
	.fetch = throttle_fetch,
	.wait = throttle_wait,
	.join = throttle_join,
	.drain = throttle_drain,
};
