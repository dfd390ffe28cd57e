/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_caller.c - shards and windows in memory of the caller's. Knows whose memory it is and who still reads it; knows
 * nothing of what is in it.
 *
 * Windows may be any memory of this rank's device. A shard must be memory that the driver's legacy handles can name,
 * which is what cudaMalloc gives; it may lie inside a larger allocation, as with allocators that cache.
 *
 * The others may read a shard longer than its series lives here, and this rank must not wait for them. So all of them
 * have the other end of a pair of sockets, and each says there when it reads no more. Who has said so, or has died,
 * reads no more; nor does anybody once the last end is closed, which children that ranks fork may put off. When nobody
 * does, the next call that opens or closes something gives the memory back.
 */
#include "cuda_transport.h"
#include "limit_reason.h"
#include "sockets.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* A shard of the caller's. */
struct cuda_borrowed {
	struct cuda_borrowed *next;
	lshard_memory_source source;
	void *pointer;
	int readers;    /* the end that hears from them */
	int offered;    /* their end, until every reader has it */
	int over;       /* this rank's series is destroyed */
	uint8_t done[]; /* [size] which ranks have said that they read no more */
};

/* ---- giving back ---- */

static void hear_readers(const struct cuda *cuda, struct cuda_borrowed *borrowed)
{
	int32_t rank;

	while (recv(borrowed->readers, &rank, sizeof rank, MSG_DONTWAIT) == (ssize_t)sizeof rank)
		if (rank >= 0 && rank < cuda->base.context->size)
			borrowed->done[rank] = 1;
}

static int is_read(const struct cuda *cuda, struct cuda_borrowed *borrowed)
{
	struct pollfd polled = {.fd = borrowed->readers, .events = POLLIN};

	hear_readers(cuda, borrowed);
	if (poll(&polled, 1, 0) == 1 && polled.revents & POLLHUP)
		return 0;
	for (int32_t rank = 0; rank < cuda->base.context->size; rank++)
		if (rank != cuda->base.context->rank && !borrowed->done[rank] && !mesh_process_ended(&cuda->mesh, rank))
			return 1;
	return 0;
}

/* The last word may be that this rank reads no more; nobody may be there to hear it. */
static void stop_reading(const struct cuda *cuda, int hold)
{
	(void)send(hold, &cuda->base.context->rank, sizeof cuda->base.context->rank, MSG_DONTWAIT | MSG_NOSIGNAL);
	close(hold);
}

static void stop_offering(struct cuda_borrowed *borrowed)
{
	if (borrowed->offered >= 0)
		close(borrowed->offered);
	borrowed->offered = -1;
}

static void end_borrowing(struct cuda *cuda, struct cuda_borrowed *borrowed, int is_returned)
{
	if (is_returned)
		borrowed->source.release(borrowed->source.user, LSHARD_FOR_SHARD, borrowed->pointer);
	stop_offering(borrowed);
	if (borrowed->readers >= 0)
		close(borrowed->readers);
	cuda->base.context->release(cuda->base.context, borrowed);
}

/* Give back what nobody reads any more. */
static void settle_borrowed(struct cuda *cuda)
{
	pthread_mutex_lock(&cuda->borrowed_lock);
	for (struct cuda_borrowed **at = &cuda->borrowed; *at;) {
		struct cuda_borrowed *borrowed = *at;

		if (!borrowed->over || is_read(cuda, borrowed)) {
			at = &borrowed->next;
			continue;
		}
		*at = borrowed->next;
		end_borrowing(cuda, borrowed, 1);
	}
	pthread_mutex_unlock(&cuda->borrowed_lock);
}

void cuda_borrowed_close(struct cuda *cuda)
{
	const int forked = cuda->base.context->forked(cuda->base.context);

	if (!forked)
		settle_borrowed(cuda);
	while (cuda->borrowed) {
		struct cuda_borrowed *borrowed = cuda->borrowed;

		cuda->borrowed = borrowed->next;
		if (!forked)
			cuda->base.context->log(
				cuda->base.context, LSHARD_LOG_WARN,
				"rank %d: the caller's memory at %p is not given back: another rank may still "
				"read it",
				(int)cuda->base.context->rank, borrowed->pointer);
		end_borrowing(cuda, borrowed, 0);
	}
}

void cuda_caller_close(struct cuda_store *store, int settled)
{
	struct cuda *cuda = (struct cuda *)store->base.transport;
	const lshard_memory_source *source = store->base.plan->memory_source;
	const int forked = cuda->base.context->forked(cuda->base.context);

	for (int32_t rank = 0; store->holds && rank < cuda->base.context->size; rank++)
		if (store->holds[rank] >= 0 && forked)
			close(store->holds[rank]);
		else if (store->holds[rank] >= 0 && settled)
			stop_reading(cuda, store->holds[rank]);
	if (store->holds)
		cuda->base.context->release(cuda->base.context, store->holds);
	if (forked)
		return;
	if (store->borrowed_windows && settled)
		source->release(source->user, LSHARD_FOR_WINDOWS, store->borrowed_windows);
	pthread_mutex_lock(&cuda->borrowed_lock);
	if (store->borrowed) {
		stop_offering(store->borrowed); /* opening may have ended before everyone had it */
		store->borrowed->over = settled;
	}
	pthread_mutex_unlock(&cuda->borrowed_lock);
	settle_borrowed(cuda);
}

/* ---- taking ---- */

/* Memory of this rank's device? */
static lshard_status check_memory(struct cuda_store *store, const char *what, void *pointer, uint64_t bytes)
{
	struct cuda *cuda = (struct cuda *)store->base.transport;
	const lshard_store_plan *plan = store->base.plan;
	const cuda_address address = (uintptr_t)pointer;
	uint32_t kind = 0;
	int device = -1;

	if (cuda->driver.pointer_attribute(&kind, CUDA_MEMORY_KIND, address) != CUDA_OK ||
	    cuda->driver.pointer_attribute(&device, CUDA_MEMORY_DEVICE, address) != CUDA_OK ||
	    kind != CUDA_KIND_DEVICE || device != cuda->device)
		return lshard_fail(&cuda->base.error, LSHARD_ERR_INVALID,
				   "series '%s': the caller's memory for %s at %p is not memory of device %d",
				   plan->name, what, pointer, (int)cuda->device);
	if (address % plan->alignment)
		return lshard_fail(&cuda->base.error, LSHARD_ERR_INVALID,
				   "series '%s': the caller's memory for %s of %llu bytes at %p is not aligned to %llu",
				   plan->name, what, (unsigned long long)bytes, pointer,
				   (unsigned long long)plan->alignment);
	return LSHARD_OK;
}

static lshard_status take(struct cuda_store *store, lshard_purpose purpose, uint64_t bytes, void **pointer)
{
	const lshard_store_plan *plan = store->base.plan;
	const lshard_memory_source *source = plan->memory_source;
	const char *what = purpose == LSHARD_FOR_SHARD ? "a shard" : "windows";
	lshard_status status;

	*pointer = source->allocate(source->user, purpose, (size_t)bytes, (size_t)plan->alignment);
	if (!*pointer)
		return lshard_fail(&store->base.transport->error, LSHARD_ERR_NO_MEMORY,
				   "series '%s': the caller has no memory for %s of %llu bytes", plan->name, what,
				   (unsigned long long)bytes);
	status = check_memory(store, what, *pointer, bytes);
	if (status == LSHARD_OK)
		return status;
	source->release(source->user, purpose, *pointer);
	*pointer = NULL;
	return status;
}

static lshard_status new_borrowed(struct cuda_store *store, struct cuda_borrowed **made)
{
	struct cuda *cuda = (struct cuda *)store->base.transport;
	const lshard_store_plan *plan = store->base.plan;
	const lshard_context *context = cuda->base.context;
	struct cuda_borrowed *borrowed = context->allocate(context, sizeof *borrowed + (size_t)context->size);
	int ends[2];

	if (!borrowed)
		return lshard_fail(&cuda->base.error, LSHARD_ERR_NO_MEMORY,
				   "series '%s': no memory to keep track of the caller's memory", plan->name);
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) {
		const int cause = errno;

		context->release(context, borrowed);
		return lshard_fail(&cuda->base.error, LSHARD_ERR_TRANSPORT,
				   "series '%s': no sockets to see who reads the caller's memory: %s", plan->name,
				   lshard__reason(cause, 0).text);
	}
	borrowed->source = *plan->memory_source;
	borrowed->readers = ends[0];
	borrowed->offered = ends[1];
	*made = borrowed;
	return LSHARD_OK;
}

static lshard_status name_shard(struct cuda_store *store, struct cuda_place *place)
{
	struct cuda *cuda = (struct cuda *)store->base.transport;
	const struct cuda_range *shard = &store->shards[cuda->base.context->rank];
	cuda_address base = 0;
	size_t bytes = 0;
	cuda_result result = cuda->driver.address_range(&base, &bytes, shard->address);

	place->offset = shard->address - base;
	if (result == CUDA_OK) /* first: of an expandable segment the range is one chunk of it */
		result = cuda->driver.ipc_export(&place->handle, base);
	if (result == CUDA_OK && place->offset + shard->bytes > bytes)
		return lshard_fail(&cuda->base.error, LSHARD_ERR_INVALID,
				   "series '%s': the caller's memory for a shard of %llu bytes ends after %llu",
				   store->base.plan->name, (unsigned long long)shard->bytes,
				   (unsigned long long)(bytes - place->offset));
	if (result == CUDA_OK)
		return LSHARD_OK;
	(void)cuda_failed(&cuda->driver, &cuda->base.error, result,
			  "series '%s': other ranks cannot open the caller's memory for a shard; it must come from "
			  "cudaMalloc (PyTorch: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False, and no "
			  "cudaMallocAsync)",
			  store->base.plan->name);
	return LSHARD_ERR_NOT_SUPPORTED;
}

static lshard_status take_shard(struct cuda_store *store, struct cuda_place *place)
{
	struct cuda *cuda = (struct cuda *)store->base.transport;
	const lshard_store_plan *plan = store->base.plan;
	struct cuda_borrowed *borrowed = NULL;
	lshard_status status;

	if (plan->shard_bytes == 0)
		return LSHARD_OK;
	status = new_borrowed(store, &borrowed);
	if (status != LSHARD_OK)
		return status;
	status = take(store, LSHARD_FOR_SHARD, plan->shard_bytes, &borrowed->pointer);
	if (status != LSHARD_OK) {
		end_borrowing(cuda, borrowed, 0);
		return status;
	}
	pthread_mutex_lock(&cuda->borrowed_lock);
	borrowed->next = cuda->borrowed;
	cuda->borrowed = store->borrowed = borrowed;
	pthread_mutex_unlock(&cuda->borrowed_lock);
	store->shards[cuda->base.context->rank] =
		(struct cuda_range){CUDA_BORROWED, (uintptr_t)borrowed->pointer, plan->shard_bytes, 0};
	return name_shard(store, place);
}

lshard_status cuda_caller_make(struct cuda_store *store, struct cuda_place *place)
{
	const lshard_context *context = store->base.transport->context;
	const lshard_store_plan *plan = store->base.plan;
	const uint64_t bytes = plan->buffers * plan->layer_bytes;
	lshard_status status;

	settle_borrowed((struct cuda *)store->base.transport);
	store->holds = context->allocate(context, (size_t)context->size * sizeof *store->holds);
	if (!store->holds)
		return lshard_fail(&store->base.transport->error, LSHARD_ERR_NO_MEMORY,
				   "series '%s': no memory for its tables", plan->name);
	for (int32_t rank = 0; rank < context->size; rank++)
		store->holds[rank] = -1;
	status = take_shard(store, place);
	if (status != LSHARD_OK || bytes == 0)
		return status;
	status = take(store, LSHARD_FOR_WINDOWS, bytes, &store->borrowed_windows);
	if (status == LSHARD_OK)
		store->windows = (struct cuda_range){CUDA_BORROWED, (uintptr_t)store->borrowed_windows, bytes, 0};
	return status;
}

lshard_status cuda_caller_shard(struct cuda_store *store, uint64_t tag, uint64_t deadline)
{
	struct cuda *cuda = (struct cuda *)store->base.transport;
	struct cuda_borrowed *borrowed = store->borrowed;
	const lshard_status status =
		mesh_swap(&cuda->mesh, tag, borrowed ? borrowed->offered : -1, store->holds, deadline);

	if (borrowed)
		stop_offering(borrowed);
	return status;
}
