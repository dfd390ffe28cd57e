/* SPDX-License-Identifier: Apache-2.0
 *
 * box.c - a transport from outside: what a stranger writes who has docs/writing-a-transport.md and the installed
 * headers. Between processes of a host, which copy from each other's shards.
 */
#include <layershard/transport.h>

#include <stdlib.h>

#define ALIGNMENT 4096u /* the most that a program can ask for */

struct box {
	lshard_transport base;
	lshard_channel *channel;
};

struct box_store {
	lshard_store base;
	unsigned char *buffers;
	void *shards[]; /* [size] */
};

extern const lshard_transport_ops box_ops;

/* ---- A group ---- */

static lshard_status box_open(const lshard_context *context, lshard_transport *inner, lshard_transport **transport,
			      lshard_error *error)
{
	struct box *box = context->allocate(context, sizeof *box);
	lshard_status status;

	(void)inner;
	if (!box)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "box: rank %d has no memory to join", context->rank);
	box->base.ops = &box_ops;
	box->base.context = context;
	if (context->memory != LSHARD_MEMORY_HOST)
		status = lshard_fail(&box->base.error, LSHARD_ERR_NOT_SUPPORTED, "box: layers live in host memory");
	else
		status = lshard_channel_open(context, &box->base.error, &box->channel);
	if (status == LSHARD_OK) {
		*transport = &box->base;
		return LSHARD_OK;
	}
	if (error)
		*error = box->base.error;
	context->release(context, box);
	return status;
}

static void box_close(lshard_transport *transport)
{
	lshard_channel_close(((struct box *)transport)->channel);
	transport->context->release(transport->context, transport);
}

static lshard_status box_exchange(lshard_transport *transport, const void *send, void *receive, size_t bytes,
				  uint8_t *alive)
{
	return lshard_channel_exchange(((struct box *)transport)->channel, send, receive, bytes, alive);
}

static void box_abort(lshard_transport *transport)
{
	lshard_channel_abort(((struct box *)transport)->channel);
}

/* ---- A series ---- */

static void box_store_close(lshard_store *base)
{
	struct box_store *store = (struct box_store *)base;

	lshard_channel_unshare(((struct box *)base->transport)->channel, base->plan, store->shards);
	free(store->buffers);
	base->transport->context->release(base->transport->context, store);
}

/* What this rank needs for itself; nothing of the others is waited for. */
static lshard_status make_own(lshard_transport *transport, const lshard_store_plan *plan, struct box_store **made)
{
	const lshard_context *context = transport->context;
	const size_t bytes = ((size_t)(plan->buffers * plan->layer_bytes) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
	struct box_store *store =
		context->allocate(context, sizeof *store + (size_t)context->size * sizeof store->shards[0]);

	*made = store;
	if (store) {
		store->base = (lshard_store){.transport = transport, .plan = plan};
		store->buffers = bytes ? aligned_alloc(ALIGNMENT, bytes) : NULL;
	}
	if (store && (store->buffers || !bytes))
		return LSHARD_OK;
	return lshard_fail(&transport->error, LSHARD_ERR_NO_MEMORY, "box: rank %d: no %zu bytes for series '%s'",
			   context->rank, bytes, plan->name);
}

/* Whatever happened, the ranks hear of it: nobody waits for one that has failed. */
static lshard_status box_store_open(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **made)
{
	struct box_store *store = NULL;
	lshard_status status = make_own(transport, plan, &store);

	status = lshard_channel_share(((struct box *)transport)->channel, plan, status, store ? store->shards : NULL);
	if (status == LSHARD_OK)
		*made = &store->base;
	else if (store)
		box_store_close(&store->base);
	return status;
}

static void *box_shard(lshard_store *store)
{
	return ((struct box_store *)store)->shards[store->transport->context->rank];
}

static void *box_buffer(lshard_store *base, uint32_t buffer, uint32_t position)
{
	struct box_store *store = (struct box_store *)base;

	(void)position;
	return store->buffers + buffer * base->plan->layer_bytes;
}

/* ---- Transfers: each is over when fetch returns ---- */

static lshard_status box_read(lshard_store *base, uint32_t position, void *destination)
{
	struct box_store *store = (struct box_store *)base;

	lshard_copy_layer(base->plan, position, (const void *const *)store->shards, destination);
	return LSHARD_OK;
}

static lshard_status box_fetch(lshard_store *store, uint32_t position, uint32_t buffer, void *stream, uint64_t sequence)
{
	(void)stream;
	(void)sequence;
	return box_read(store, position, box_buffer(store, buffer, position));
}

static lshard_status box_wait(lshard_store *store, uint32_t buffer, void *stream, lshard_arrival *arrival)
{
	(void)store;
	(void)buffer;
	(void)stream;
	*arrival = (lshard_arrival){0, 0, 0, 0};
	return LSHARD_OK;
}

static lshard_status box_join(lshard_store *store, void *stream)
{
	(void)store;
	(void)stream;
	return LSHARD_OK;
}

static lshard_status box_drain(lshard_store *store)
{
	(void)store;
	return LSHARD_OK;
}

const lshard_transport_ops box_ops = {
	.struct_size = sizeof(lshard_transport_ops),
	.abi = LSHARD_TRANSPORT_ABI,
	.name = "box",
	.summary = "processes of a host copy from each other's memory",
	.capabilities = LSHARD_CAP_OUTLIVES,
	.granule_bytes = 256,
	.open = box_open,
	.close = box_close,
	.exchange = box_exchange,
	.abort = box_abort,
	.store_open = box_store_open,
	.store_close = box_store_close,
	.shard = box_shard,
	.buffer = box_buffer,
	.fetch = box_fetch,
	.wait = box_wait,
	.join = box_join,
	.drain = box_drain,
	.read = box_read,
};
