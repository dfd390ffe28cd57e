/* SPDX-License-Identifier: Apache-2.0
 *
 * box.c - a transport from outside: what a stranger writes who has docs/writing-a-transport.md and the installed
 * headers. Between processes of a host; every rank's shard is a file in memory that the others map and copy from.
 */
#define _GNU_SOURCE
#include <layershard/transport.h>

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u

struct box {
	lshard_transport base;
	lshard_channel *channel;
};

struct box_store {
	lshard_store base;
	unsigned char *buffers;
	size_t pitch;   /* from one buffer to the next */
	void *shards[]; /* [size] where each is mapped; NULL where there is none */
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

static size_t in_pages(uint64_t bytes)
{
	return (size_t)(bytes + PAGE - 1) / PAGE * PAGE;
}

/* Memory of a file, or of none; NULL also where nothing is asked for. */
static lshard_status map(struct box *box, uint64_t bytes, int fd, int protection, void **at)
{
	const int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
	void *mapped = bytes ? mmap(NULL, in_pages(bytes), protection, flags, fd, 0) : NULL;

	if (mapped == MAP_FAILED)
		return lshard_fail(&box->base.error, LSHARD_ERR_NO_MEMORY, "box: rank %d: mapping %llu bytes: %s",
				   box->base.context->rank, (unsigned long long)bytes, strerror(errno));
	*at = mapped;
	return LSHARD_OK;
}

/* This rank's buffers, and its shard, which the others get as *fd. */
static lshard_status make_own(struct box *box, struct box_store *store, int *fd)
{
	const lshard_store_plan *plan = store->base.plan;
	void *buffers = NULL;
	lshard_status status;

	store->pitch = in_pages(plan->layer_bytes);
	status = map(box, store->pitch * plan->buffers, -1, PROT_READ | PROT_WRITE, &buffers);
	store->buffers = buffers;
	if (status < 0)
		return status;
	*fd = memfd_create("box", MFD_CLOEXEC);
	if (*fd < 0 || ftruncate(*fd, (off_t)in_pages(plan->shard_bytes)) != 0)
		return lshard_fail(&box->base.error, LSHARD_ERR_SYSTEM, "box: rank %d: a shard of %llu bytes: %s",
				   box->base.context->rank, (unsigned long long)plan->shard_bytes, strerror(errno));
	return map(box, plan->shard_bytes, *fd, PROT_READ | PROT_WRITE, &store->shards[box->base.context->rank]);
}

/* Whatever happens, the ranks hear of it: nobody waits for one that has failed. */
static lshard_status shard(struct box *box, struct box_store *store, const lshard_store_plan *plan, lshard_status made,
			   int own, int *fds)
{
	lshard_status status = lshard_channel_swap(box->channel, plan->name, made, own, fds);

	if (status < 0)
		return status;
	for (int32_t rank = 0; rank < box->base.context->size; rank++) {
		if (fds[rank] >= 0 && status == LSHARD_OK)
			status = map(box, plan->shard_bytes_of[rank], fds[rank], PROT_READ, &store->shards[rank]);
		if (fds[rank] >= 0)
			close(fds[rank]);
	}
	return lshard_channel_agree(box->channel, plan->name, status);
}

static void box_store_close(lshard_store *base)
{
	struct box_store *store = (struct box_store *)base;
	const lshard_context *context = base->transport->context;

	for (int32_t rank = 0; rank < context->size; rank++)
		if (store->shards[rank])
			munmap(store->shards[rank], in_pages(base->plan->shard_bytes_of[rank]));
	if (store->buffers)
		munmap(store->buffers, store->pitch * base->plan->buffers);
	context->release(context, store);
}

static lshard_status box_store_open(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **made)
{
	struct box *box = (struct box *)transport;
	const lshard_context *context = transport->context;
	const size_t size = (size_t)context->size;
	struct box_store *store = context->allocate(context, sizeof *store + size * sizeof store->shards[0]);
	int *fds = context->allocate(context, size * sizeof *fds);
	lshard_status status = LSHARD_OK;
	int own = -1;

	if (!store || !fds)
		status = lshard_fail(&transport->error, LSHARD_ERR_NO_MEMORY, "box: rank %d: no memory for series '%s'",
				     context->rank, plan->name);
	if (store)
		store->base = (lshard_store){.transport = transport, .plan = plan};
	if (status == LSHARD_OK)
		status = make_own(box, store, &own);
	status = shard(box, store, plan, status, own, fds);
	if (own >= 0)
		close(own);
	if (fds)
		context->release(context, fds);
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
	return store->buffers + buffer * store->pitch;
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
