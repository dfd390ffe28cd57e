/* SPDX-License-Identifier: Apache-2.0
 *
 * wrapper.c - the part of a wrapper that goes straight through to the transport behind it.
 */
#include "wrapper.h"

static lshard_transport *inner_of(lshard_transport *transport)
{
	return ((struct lshard__wrapper *)transport)->inner;
}

static lshard_store *inner_store(lshard_store *store)
{
	return ((struct lshard__wrapper_store *)store)->inner;
}

static lshard_status pass_up(lshard_error *error, const lshard_error *inner, lshard_status status)
{
	return status < 0 ? lshard_fail(error, status, "%s", inner->text) : status;
}

/* ---- The transport --------------------------------------------------------------------------------------------- */

void lshard__wrapper_close(lshard_transport *transport)
{
	lshard_transport *inner = inner_of(transport);

	inner->ops->close(inner);
	lshard__wrapper_free(transport);
}

lshard_status lshard__wrapper_exchange(lshard_transport *transport, const void *send, void *receive, size_t bytes,
				       uint8_t *alive)
{
	lshard_transport *inner = inner_of(transport);

	return pass_up(&transport->error, &inner->error, inner->ops->exchange(inner, send, receive, bytes, alive));
}

lshard_status lshard__wrapper_flush(lshard_transport *transport)
{
	lshard_transport *inner = inner_of(transport);

	return inner->ops->flush ? pass_up(&transport->error, &inner->error, inner->ops->flush(inner)) : LSHARD_OK;
}

void lshard__wrapper_abort(lshard_transport *transport)
{
	inner_of(transport)->ops->abort(inner_of(transport));
}

/* ---- Stores ---------------------------------------------------------------------------------------------------- */

/* The inner store is opened first: it is collective, and the other ranks must not wait for one that has no memory. */
lshard_status lshard__wrapper_store_new(lshard_transport *transport, const lshard_store_plan *plan, size_t bytes,
					void *made)
{
	lshard_transport *inner = inner_of(transport);
	struct lshard__wrapper_store *store;
	lshard_store *opened;
	lshard_status status = inner->ops->store_open(inner, plan, &opened);

	if (status < 0)
		return pass_up(&transport->error, &inner->error, status);
	store = transport->context->allocate(transport->context, bytes);
	if (!store) {
		inner->ops->store_close(opened);
		return lshard_fail(&transport->error, LSHARD_ERR_NO_MEMORY, "%s: no memory for series '%s'",
				   transport->ops->name, plan->name);
	}
	store->base.transport = transport;
	store->base.plan = plan;
	store->inner = opened;
	*(void **)made = store;
	return LSHARD_OK;
}

static lshard_status store_open(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **store)
{
	return lshard__wrapper_store_new(transport, plan, sizeof(struct lshard__wrapper_store), store);
}

void lshard__wrapper_store_close(lshard_store *store)
{
	const lshard_context *context = store->transport->context;
	lshard_store *inner = inner_store(store);

	inner->transport->ops->store_close(inner);
	context->release(context, store);
}

static void *shard(lshard_store *store)
{
	return inner_store(store)->transport->ops->shard(inner_store(store));
}

void *lshard__wrapper_buffer(lshard_store *store, uint32_t buffer, uint32_t position)
{
	return inner_store(store)->transport->ops->buffer(inner_store(store), buffer, position);
}

static void *peer(lshard_store *store, uint32_t position)
{
	return inner_store(store)->transport->ops->peer(inner_store(store), position);
}

static int direct(lshard_transport *transport, int32_t rank)
{
	return inner_of(transport)->ops->direct(inner_of(transport), rank);
}

/* ---- Transfers ------------------------------------------------------------------------------------------------- */

lshard_status lshard__wrapper_fetch(lshard_store *store, uint32_t position, uint32_t buffer, void *stream,
				    uint64_t sequence)
{
	lshard_store *inner = inner_store(store);

	return pass_up(&store->error, &inner->error,
		       inner->transport->ops->fetch(inner, position, buffer, stream, sequence));
}

lshard_status lshard__wrapper_wait(lshard_store *store, uint32_t buffer, void *stream, lshard_arrival *arrival)
{
	lshard_store *inner = inner_store(store);

	return pass_up(&store->error, &inner->error, inner->transport->ops->wait(inner, buffer, stream, arrival));
}

static lshard_status record_use(lshard_store *store, uint32_t buffer, void *stream)
{
	lshard_store *inner = inner_store(store);

	return pass_up(&store->error, &inner->error, inner->transport->ops->record_use(inner, buffer, stream));
}

lshard_status lshard__wrapper_join(lshard_store *store, void *stream)
{
	lshard_store *inner = inner_store(store);

	return pass_up(&store->error, &inner->error, inner->transport->ops->join(inner, stream));
}

static lshard_status capture(lshard_store *store, void *stream, uint64_t *number)
{
	lshard_store *inner = inner_store(store);

	return pass_up(&store->error, &inner->error, inner->transport->ops->capture(inner, stream, number));
}

lshard_status lshard__wrapper_drain(lshard_store *store)
{
	lshard_store *inner = inner_store(store);

	return pass_up(&store->error, &inner->error, inner->transport->ops->drain(inner));
}

lshard_status lshard__wrapper_read(lshard_store *store, uint32_t position, void *destination)
{
	lshard_store *inner = inner_store(store);

	return pass_up(&store->error, &inner->error, inner->transport->ops->read(inner, position, destination));
}

static lshard_status copy(lshard_store *store, void *to, uint64_t to_pitch, const void *from, uint64_t from_pitch,
			  uint64_t width, uint64_t rows)
{
	lshard_store *inner = inner_store(store);

	return pass_up(&store->error, &inner->error,
		       inner->transport->ops->copy(inner, to, to_pitch, from, from_pitch, width, rows));
}

static lshard_status copy_buffer(lshard_store *store, uint32_t to, uint32_t from, void *stream)
{
	lshard_store *inner = inner_store(store);

	return pass_up(&store->error, &inner->error, inner->transport->ops->copy_buffer(inner, to, from, stream));
}

static lshard_status refresh(lshard_store *store, uint64_t *bytes)
{
	lshard_store *inner = inner_store(store);

	return pass_up(&store->error, &inner->error, inner->transport->ops->refresh(inner, bytes));
}

uint64_t lshard__wrapper_bytes_in(const lshard_store *store, uint32_t position)
{
	const lshard_store_plan *plan = store->plan;
	uint64_t bytes = 0;

	for (uint32_t i = plan->first_piece[position]; i < plan->first_piece[position + 1]; i++)
		if (plan->pieces[i].rank != store->transport->context->rank)
			bytes += plan->pieces[i].width * plan->pieces[i].rows;
	return bytes;
}

/* ---- Making one ------------------------------------------------------------------------------------------------ */

/* What the wrapper's table leaves out goes straight through; what the inner one has not, the wrapper has not either. */
static void fill_table(lshard_transport_ops *ops, const lshard_transport_ops *inner)
{
	ops->capabilities = inner->capabilities;
	ops->granule_bytes = inner->granule_bytes;
	ops->close = ops->close ? ops->close : lshard__wrapper_close;
	ops->exchange = ops->exchange ? ops->exchange : lshard__wrapper_exchange;
	ops->abort = ops->abort ? ops->abort : lshard__wrapper_abort;
	ops->store_open = ops->store_open ? ops->store_open : store_open;
	ops->store_close = ops->store_close ? ops->store_close : lshard__wrapper_store_close;
	ops->shard = ops->shard ? ops->shard : shard;
	ops->buffer = ops->buffer ? ops->buffer : lshard__wrapper_buffer;
	ops->peer = inner->peer ? peer : NULL;
	ops->direct = inner->direct ? direct : NULL;
	ops->fetch = ops->fetch ? ops->fetch : lshard__wrapper_fetch;
	ops->wait = ops->wait ? ops->wait : lshard__wrapper_wait;
	ops->record_use = ops->record_use ? ops->record_use : record_use;
	ops->join = ops->join ? ops->join : lshard__wrapper_join;
	ops->capture = inner->capture ? capture : NULL;
	ops->drain = ops->drain ? ops->drain : lshard__wrapper_drain;
	ops->read = ops->read ? ops->read : lshard__wrapper_read;
	ops->copy = inner->copy ? copy : NULL;
	ops->copy_buffer = inner->copy_buffer ? copy_buffer : NULL;
	ops->refresh = inner->refresh ? refresh : NULL;
	ops->flush = ops->flush ? ops->flush : lshard__wrapper_flush;
}

void *lshard__wrapper_new(const lshard_context *context, lshard_transport *inner, const lshard_transport_ops *table,
			  size_t bytes, lshard_error *error)
{
	struct lshard__wrapper *wrapper = context->allocate(context, bytes);

	if (!wrapper) {
		lshard_fail(error, LSHARD_ERR_NO_MEMORY, "%s: rank %d has no memory for it", table->name,
			    (int)context->rank);
		return NULL;
	}
	wrapper->base.context = context;
	wrapper->base.ops = &wrapper->ops;
	wrapper->inner = inner;
	wrapper->ops = *table;
	fill_table(&wrapper->ops, inner->ops);
	return wrapper;
}

void lshard__wrapper_free(void *freed)
{
	struct lshard__wrapper *wrapper = freed;

	wrapper->base.context->release(wrapper->base.context, wrapper);
}
