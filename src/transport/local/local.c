/* SPDX-License-Identifier: Apache-2.0
 *
 * local.c - `local`: the ranks are threads of one process, or there is one rank. The reference for right behaviour:
 * every shard is host memory that all ranks see, a transfer is a memcpy by the rank that wants it. Options let the same
 * series run with copies as early as possible, as late as possible, at drawn moments in between, or in lockstep as on a
 * collective transport. Knows: pieces, buffers and shards. Does not know: windows' states, layers' meaning. Ranks
 * exchange in process_group.c.
 */
#include "clock.h"
#include "host_copy.h"
#include "local.h"
#include "transports.h"

#include <string.h>

/* For a transfer's calls_left: it is copied by its wait only. */
#define NEVER_EARLY UINT32_MAX

/* ---- The transport --------------------------------------------------------------------------------------------- */

static void local_free(const lshard_context *context, struct local *local)
{
	if (!local)
		return;
	context->release(context, local->announcements);
	context->release(context, local->alive);
	context->release(context, local);
}

static struct local *local_new(const lshard_context *context)
{
	struct local *local = context->allocate(context, sizeof *local);
	size_t size = (size_t)context->size;

	if (!local)
		return NULL;
	local->base.context = context;
	local->base.ops = &local->ops;
	local->ops = lshard__local;
	local->announcements = context->allocate(context, size * sizeof local->announcements[0]);
	local->alive = context->allocate(context, size);
	if (local->announcements && local->alive)
		return local;
	local_free(context, local);
	return NULL;
}

static lshard_status local_open(const lshard_context *context, lshard_transport *inner, lshard_transport **transport,
				lshard_error *error)
{
	struct local *local = local_new(context);
	struct local spare = {.moment = AT_REACH}; /* without memory this rank still joins, to tell the others */
	lshard_status status = local_read_options(local ? local : &spare, context->options, error);

	(void)inner;
	if (status < 0)
		goto free_local;
	if (context->memory != LSHARD_MEMORY_HOST) {
		status = lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED, "local: layers live in host memory only");
		goto free_local;
	}
	status = lshard__process_group_join(context, context->options, local != NULL,
					    local ? &local->group : &spare.group, error);
	if (status < 0)
		goto free_local;
	if (local->moment == IN_LOCKSTEP)
		local->ops.capabilities |= LSHARD_CAP_COLLECTIVE;
	*transport = &local->base;
	return LSHARD_OK;

free_local:
	local_free(context, local);
	return status;
}

static void local_close(lshard_transport *transport)
{
	struct local *local = local_of(transport);

	if (transport->context->forked(transport->context))
		lshard__process_group_drop(local->group);
	else
		lshard__process_group_leave(local->group, transport->context->rank);
	local_free(transport->context, local);
}

static lshard_status local_exchange(lshard_transport *transport, const void *send, void *receive, size_t bytes,
				    uint8_t *alive)
{
	struct lshard__process_group_offer offer = {EXCHANGE_OF_GROUP, send, receive, bytes, alive};

	return lshard__process_group_exchange(local_of(transport)->group, transport->context->rank, &offer,
					      &transport->error);
}

static void local_abort(lshard_transport *transport)
{
	lshard__process_group_abort(local_of(transport)->group, transport->context->rank);
}

/* ---- Transfers ------------------------------------------------------------------------------------------------- */

/* xorshift64: small, and the same everywhere. */
static uint64_t draw(struct local_store *store)
{
	store->random ^= store->random << 13;
	store->random ^= store->random >> 7;
	store->random ^= store->random << 17;
	return store->random;
}

static void copy(struct local_store *store, uint32_t buffer, uint64_t started_ns)
{
	struct transfer *transfer = &store->transfers[buffer];

	lshard__host_copy_layer(store->base.plan, transfer->position, store->bases,
				local_buffer(&store->base, buffer, transfer->position));
	transfer->pending = false;
	transfer->arrival.started_ns = started_ns;
	transfer->arrival.finished_ns = lshard__now_ns();
	transfer->arrival.busy_ns = transfer->arrival.finished_ns - started_ns;
}

static void queue_remove(struct local_store *store, uint32_t index)
{
	store->queued--;
	memmove(&store->queue[index], &store->queue[index + 1], (store->queued - index) * sizeof store->queue[0]);
}

static uint32_t queue_find(const struct local_store *store, uint32_t buffer)
{
	uint32_t index = 0;

	while (index < store->queued && store->queue[index] != buffer)
		index++;
	return index;
}

/* Copy the first @p count of the queue, in order. */
static void queue_run(struct local_store *store, uint32_t count)
{
	for (uint32_t index = 0; index < count; index++)
		copy(store, store->queue[index], lshard__now_ns());
	store->queued -= count;
	memmove(store->queue, store->queue + count, store->queued * sizeof store->queue[0]);
}

/* One more call on this store: transfers whose moment has come are copied, with those fetched before them. */
static void pass_a_call(struct local_store *store)
{
	uint32_t due = 0;

	for (uint32_t index = 0; index < store->queued; index++) {
		struct transfer *transfer = &store->transfers[store->queue[index]];

		if (transfer->calls_left == NEVER_EARLY)
			continue;
		if (transfer->calls_left == 0 || --transfer->calls_left == 0)
			due = index + 1;
	}
	queue_run(store, due);
}

/* In how many calls from now a new transfer copies. */
static uint32_t moment_of(struct local_store *store, enum moment moment)
{
	if (moment == AT_REACH)
		return 1; /* the fetch itself is the first call */
	if (moment != AT_DRAWN)
		return NEVER_EARLY;
	switch (draw(store) >> 32 & 3) {
	case 0:
		return 1;
	case 1:
		return NEVER_EARLY;
	default:
		return 2 + (uint32_t)(draw(store) >> 32 & 7);
	}
}

static lshard_status local_fetch(lshard_store *base, uint32_t position, uint32_t buffer, void *stream,
				 uint64_t sequence)
{
	struct local_store *store = store_of(base);
	struct local *local = local_of(base->transport);
	struct lshard__process_group_post post = {sequence, store->number, position, 0};
	struct transfer *transfer;

	(void)stream;
	if (local->moment == IN_LOCKSTEP)
		lshard__process_group_post(local->group, base->transport->context->rank, &post);
	if (buffer == LSHARD_NO_BUFFER)
		return LSHARD_OK; /* only gives the layer: nothing to copy here */
	transfer = &store->transfers[buffer];
	if (transfer->pending) /* has not begun: dropped */
		queue_remove(store, queue_find(store, buffer));
	transfer->pending = transfer->unwaited = true;
	transfer->position = position;
	transfer->sequence = sequence;
	transfer->status = LSHARD_OK;
	transfer->calls_left = moment_of(store, local->moment);
	store->queue[store->queued++] = buffer;
	pass_a_call(store);
	return LSHARD_OK;
}

static lshard_status tell(struct local_store *store, const struct transfer *transfer, lshard_status status)
{
	if (status == LSHARD_OK)
		return status;
	return lshard_fail(&store->base.error, status, "series '%s': %s", store->base.plan->name, transfer->error.text);
}

/* All ranks asked for the same: only then are there bytes to copy. */
static lshard_status lockstep_finish(struct local_store *store, uint32_t buffer, uint64_t deadline_ns)
{
	lshard_transport *transport = store->base.transport;
	struct transfer *transfer = &store->transfers[buffer];
	struct lshard__process_group_post post = {transfer->sequence, store->number, transfer->position, 0};
	uint64_t started_ns;
	lshard_status status = lshard__process_group_await(local_of(transport)->group, transport->context->rank, &post,
							   deadline_ns, &started_ns, &transfer->error);

	if (status == LSHARD_OK)
		copy(store, buffer, started_ns);
	if (status == LSHARD_ERR_TIMEOUT)
		return tell(store, transfer, status); /* can be waited for again */
	transfer->pending = false;
	transfer->status = status; /* join may be who asks: every wait for it tells it too */
	queue_remove(store, queue_find(store, buffer));
	return tell(store, transfer, status);
}

static lshard_status finish(struct local_store *store, uint32_t buffer, uint64_t deadline_ns)
{
	struct transfer *transfer = &store->transfers[buffer];

	if (!transfer->pending)
		return tell(store, transfer, transfer->status);
	if (local_of(store->base.transport)->moment == IN_LOCKSTEP)
		return lockstep_finish(store, buffer, deadline_ns);
	queue_run(store, queue_find(store, buffer) + 1);
	return LSHARD_OK;
}

static lshard_status local_wait(lshard_store *base, uint32_t buffer, void *stream, lshard_arrival *arrival)
{
	struct local_store *store = store_of(base);
	struct transfer *transfer = &store->transfers[buffer];
	uint64_t began_ns, blocked_ns = 0;
	lshard_status status = LSHARD_OK;

	(void)stream;
	*arrival = (lshard_arrival){0, 0, 0, 0};
	if (!transfer->unwaited)
		return tell(store, transfer, transfer->status);
	pass_a_call(store);
	if (transfer->pending) {
		began_ns = lshard__now_ns();
		status = finish(store, buffer, lshard__process_group_deadline(local_of(base->transport)->group));
		blocked_ns = lshard__now_ns() - began_ns;
	} else {
		status = tell(store, transfer, transfer->status);
	}
	transfer->unwaited = status == LSHARD_ERR_TIMEOUT; /* as it was: the next wait goes on */
	if (status == LSHARD_OK)
		*arrival = transfer->arrival;
	arrival->blocked_ns = blocked_ns;
	return status;
}

static lshard_status local_record_use(lshard_store *base, uint32_t buffer, void *stream)
{
	(void)base;
	(void)buffer;
	(void)stream;
	return LSHARD_OK; /* host memory: what read the buffer has returned */
}

static lshard_status local_join(lshard_store *base, void *stream)
{
	struct local_store *store = store_of(base);
	const uint64_t deadline_ns = lshard__process_group_deadline(local_of(base->transport)->group);
	lshard_status status = LSHARD_OK;

	(void)stream;
	while (status == LSHARD_OK && store->queued > 0)
		status = finish(store, store->queue[0], deadline_ns);
	return status;
}

/* Nothing runs behind this rank's back, so what is pending can all be dropped. */
static lshard_status local_drain(lshard_store *base)
{
	struct local_store *store = store_of(base);

	for (uint32_t buffer = 0; buffer < base->plan->buffers; buffer++) {
		store->transfers[buffer].pending = store->transfers[buffer].unwaited = false;
		store->transfers[buffer].status = LSHARD_OK;
	}
	store->queued = 0;
	return LSHARD_OK;
}

/* ---- Reads ----------------------------------------------------------------------------------------------------- */

/* A record like those of store_open, in whose place they are gathered. */
struct reading {
	struct lshard__outcome outcome;
	uint32_t store;
	uint32_t position;
};

_Static_assert(sizeof(struct reading) == sizeof(struct announcement), "readings are gathered among announcements");

static lshard_status evaluate_readings(struct local_store *store, const struct reading *mine)
{
	const struct local *local = local_of(store->base.transport);
	const lshard_context *context = local->base.context;
	const struct reading *all = (const struct reading *)local->announcements;
	const struct lshard__record_set set = {.first = all,
					       .bytes = sizeof *all,
					       .call_bytes = sizeof *all - sizeof all->outcome,
					       .size = context->size,
					       .rank = context->rank,
					       .alive = local->alive};
	struct lshard__verdict verdict = lshard__evaluate(&set);
	const struct reading *other = &all[verdict.rank >= 0 ? verdict.rank : 0];

	if (verdict.finding == LSHARD__ELSEWHERE)
		return lshard_fail(&store->base.error, LSHARD_ERR_OUT_OF_STEP,
				   "series '%s': rank %d reads position %u, rank %d position %u%s",
				   store->base.plan->name, (int)context->rank, mine->position, (int)verdict.rank,
				   other->position, other->store == mine->store ? "" : " of another series");
	if (verdict.finding == LSHARD__MISSING)
		return lshard_fail(&store->base.error, LSHARD_ERR_PEER_FAILED, "series '%s': %s %s gone",
				   store->base.plan->name, lshard__ranks_text(&verdict.ranks),
				   lshard__ranks_are(&verdict.ranks));
	return LSHARD_OK;
}

/* In lockstep a read is collective: all ranks come, for the same layer, or nobody gets it. */
static lshard_status lockstep_read(struct local_store *store, uint32_t position)
{
	struct local *local = local_of(store->base.transport);
	struct reading mine = {lshard__outcome_of(LSHARD_OK), store->number, position};
	struct lshard__process_group_offer offer = {EXCHANGE_READ, &mine, local->announcements, sizeof mine,
						    local->alive};
	lshard_status status =
		lshard__process_group_exchange(local->group, local->base.context->rank, &offer, &store->base.error);

	return status == LSHARD_OK ? evaluate_readings(store, &mine) : status;
}

static lshard_status local_read(lshard_store *base, uint32_t position, void *destination)
{
	struct local_store *store = store_of(base);
	lshard_status status;

	if (local_of(base->transport)->moment == IN_LOCKSTEP && (status = lockstep_read(store, position)) < 0)
		return status;
	if (destination) /* else this rank only gives the layer */
		lshard__host_copy_layer(base->plan, position, store->bases, destination);
	return LSHARD_OK;
}

const lshard_transport_ops lshard__local = {
	.struct_size = sizeof(lshard_transport_ops),
	.abi = LSHARD_TRANSPORT_ABI,
	.name = "local",
	.summary = "threads of one process; options at=reach, at=wait, seed=N (when transfers copy), lockstep "
		   "(collective)",
	.capabilities = LSHARD_CAP_CALLER_MEMORY | LSHARD_CAP_OUTLIVES,
	.granule_bytes = 256,
	.open = local_open,
	.close = local_close,
	.exchange = local_exchange,
	.abort = local_abort,
	.store_open = local_store_open,
	.store_close = local_store_close,
	.shard = local_shard,
	.buffer = local_buffer,
	.fetch = local_fetch,
	.wait = local_wait,
	.record_use = local_record_use,
	.join = local_join,
	.drain = local_drain,
	.read = local_read,
};
