/* SPDX-License-Identifier: Apache-2.0
 *
 * callback_store.c - a series of the callback transport: this rank's shard, its buffers, and which collective carries
 * which layer. Knows memory and pieces; makes no collective itself.
 *
 * A whole layer of one rank is broadcast. Stripes are all-gathered: straight into place where every rank's part is one
 * range of the same size and they lie in the order of the ranks, else each rank's part, as long as the longest, into a
 * staging layer from which the pieces are copied. So a striped layer is one collective, whatever the number of pieces.
 */
#include "callback.h"
#include "clock.h"
#include "large_pages.h"

#include <stdlib.h>
#include <string.h>

#define ALIGNMENT 4096u

static uint64_t round_up(uint64_t bytes, uint64_t unit)
{
	return (bytes + unit - 1) / unit * unit;
}

/* ---- Ways ------------------------------------------------------------------------------------------------------ */

enum way callback_way(const lshard_store_plan *plan, uint32_t position, int32_t size)
{
	const uint32_t first = plan->first_piece[position];
	const uint32_t count = plan->first_piece[position + 1] - first;

	if (count == 1 && plan->pieces[first].rows == 1)
		return BROADCAST;
	if (count != (uint32_t)size)
		return GATHER_STAGED;
	for (uint32_t index = 0; index < count; index++) {
		const lshard_piece *piece = &plan->pieces[first + index];

		if (piece->rank != (int32_t)index || piece->rows != 1 || piece->width != plan->pieces[first].width ||
		    piece->layer_offset != index * piece->width)
			return GATHER_STAGED;
	}
	return GATHER;
}

uint64_t callback_block(const lshard_store_plan *plan, uint32_t position, int32_t rank, uint64_t *bytes)
{
	uint64_t begin = UINT64_MAX, end = 0;

	for (uint32_t index = plan->first_piece[position]; index < plan->first_piece[position + 1]; index++) {
		const lshard_piece *piece = &plan->pieces[index];
		const uint64_t last = piece->shard_offset + (piece->rows - 1) * piece->shard_pitch + piece->width;

		if (piece->rank != rank)
			continue;
		begin = piece->shard_offset < begin ? piece->shard_offset : begin;
		end = last > end ? last : end;
	}
	*bytes = end > 0 ? end - begin : 0;
	return end > 0 ? begin : 0;
}

/* The longest part that any rank gives to a layer that comes by way of staging. */
static uint64_t longest_part(const lshard_store_plan *plan, int32_t size)
{
	uint64_t longest = 0;

	for (uint32_t position = 0; position < plan->layers; position++) {
		if (callback_way(plan, position, size) != GATHER_STAGED)
			continue;
		for (int32_t rank = 0; rank < size; rank++) {
			uint64_t bytes;

			callback_block(plan, position, rank, &bytes);
			longest = bytes > longest ? bytes : longest;
		}
	}
	return round_up(longest, 64);
}

/* ---- Memory ---------------------------------------------------------------------------------------------------- */

static struct large_pages_use use_of(const struct callback_store *store, const char *what)
{
	lshard_transport *transport = store->base.transport;

	return (struct large_pages_use){.context = transport->context,
					.series = store->base.plan->name,
					.what = what,
					.error = &transport->error,
					.in_process = true};
}

/* Zeroed, at a multiple of ALIGNMENT; *block is what must be given back, also where it fails. */
static bool take_own(const struct callback_store *store, const struct large_pages_use *use, uint64_t bytes,
		     void **block, unsigned char **memory)
{
	struct callback *callback = callback_of(store->base.transport);

	if (callback->on_device)
		*memory = *block = callback->device.allocate(callback->context.callbacks->user, bytes, ALIGNMENT);
	else
		*memory = lshard__allocate_large(use, bytes, ALIGNMENT, block);
	return *memory != NULL;
}

static void give_own(const struct callback *callback, void *block)
{
	if (callback->on_device && block && !callback->context.forked(&callback->context))
		callback->device.release(callback->context.callbacks->user, block);
	else if (block && !callback->on_device)
		callback->context.release(&callback->context, block);
}

/* The caller's device memory comes as it is. Also where nothing is asked for. */
static bool take_memory(struct callback_store *store, lshard_purpose purpose, uint64_t bytes, void **block,
			unsigned char **memory)
{
	struct callback *callback = callback_of(store->base.transport);
	const lshard_memory_source *source = store->base.plan->memory_source;
	const struct large_pages_use shard = use_of(store, "shard");
	const struct large_pages_use windows = lshard__large_buffers(callback->base.context, store->base.plan,
								     store->buffer_pitch, &callback->base.error);

	if (bytes == 0)
		return true;
	if (!source)
		return take_own(store, purpose == LSHARD_FOR_SHARD ? &shard : &windows, bytes, block, memory);
	*block = source->allocate(source->user, purpose, bytes, ALIGNMENT);
	*memory = *block;
	if (*memory && !callback->on_device)
		memset(*memory, 0, bytes);
	return *block != NULL;
}

static void give_memory(struct callback_store *store, lshard_purpose purpose, void *block)
{
	const lshard_memory_source *source = store->base.plan->memory_source;

	const lshard_context *context = store->base.transport->context;

	if (!source)
		give_own(callback_of(store->base.transport), block);
	else if (block && !context->forked(context))
		source->release(source->user, purpose, block);
}

static void store_free(struct callback_store *store)
{
	const lshard_context *context = store->base.transport->context;

	if (callback_of(store->base.transport)->on_device)
		callback_device_store_close(store);
	context->release(context, store->landings);
	give_own(callback_of(store->base.transport), store->staging_block);
	give_memory(store, LSHARD_FOR_WINDOWS, store->buffers_block);
	give_memory(store, LSHARD_FOR_SHARD, store->shard_block);
	context->release(context, store);
}

/* What is given to a gathering is as long as the longest part, so the shard has that much room behind it. */
static bool store_fill(struct callback_store *store)
{
	const struct callback *callback = callback_of(store->base.transport);
	const lshard_context *context = store->base.transport->context;
	const lshard_store_plan *plan = store->base.plan;
	const struct large_pages_use staging = use_of(store, "staging");
	const size_t buffers = plan->buffers > 0 ? plan->buffers : 1;

	store->buffer_pitch = round_up(plan->layer_bytes, ALIGNMENT);
	store->part_bytes = longest_part(plan, context->size);
	store->landings = context->allocate(context, buffers * sizeof *store->landings);
	if (!store->landings || (callback->on_device && !callback_device_store_open(store)))
		return false;
	if (store->part_bytes > 0 && !take_own(store, &staging, (uint64_t)context->size * store->part_bytes,
					       &store->staging_block, &store->staging))
		return false;
	return take_memory(store, LSHARD_FOR_SHARD, plan->shard_bytes + store->part_bytes, &store->shard_block,
			   &store->shard) &&
	       take_memory(store, LSHARD_FOR_WINDOWS, plan->buffers * store->buffer_pitch, &store->buffers_block,
			   &store->buffers);
}

/* Room in the queue for twice what the buffers of all stores can want, and for those that only give. */
static bool widen_queue(struct callback *callback, uint64_t buffers)
{
	const lshard_context *context = callback->base.context;
	const uint32_t capacity = (uint32_t)(2 * (callback->reserved + buffers) + 64);
	struct operation *queue, *old = callback->queue;

	if (capacity <= callback->capacity) {
		callback->reserved += buffers;
		return true;
	}
	queue = context->allocate(context, capacity * sizeof *queue);
	if (!queue)
		return false;
	pthread_mutex_lock(&callback->lock);
	for (uint32_t index = 0; index < callback->queued; index++)
		queue[index] = old[(callback->first + index) % callback->capacity];
	callback->queue = queue;
	callback->first = 0;
	callback->capacity = capacity;
	pthread_mutex_unlock(&callback->lock);
	context->release(context, old);
	callback->reserved += buffers;
	return true;
}

/* The number counts attempts, so that it stays the same on all ranks where one of them had no memory. */
lshard_status callback_store_open(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **opened)
{
	struct callback *callback = callback_of(transport);
	const lshard_context *context = transport->context;
	struct callback_store *store = context->allocate(context, sizeof *store);
	const uint32_t number = callback->stores_opened++;

	transport->error.text[0] = 0; /* what is found out below is part of the failure's text */
	if (!store)
		goto no_memory;
	store->base.transport = transport;
	store->base.plan = plan;
	store->number = number;
	if (!store_fill(store) || !widen_queue(callback, plan->buffers)) {
		store_free(store);
		goto no_memory;
	}
	pthread_mutex_lock(&callback->lock);
	store->next = callback->stores;
	callback->stores = store;
	pthread_mutex_unlock(&callback->lock);
	*opened = &store->base;
	return LSHARD_OK;

no_memory:
	return lshard_fail(&transport->error, LSHARD_ERR_NO_MEMORY,
			   "callback: rank %d has no memory for series '%s' (shard %llu bytes, %u buffers of %llu)%s%s",
			   (int)context->rank, plan->name, (unsigned long long)plan->shard_bytes, plan->buffers,
			   (unsigned long long)plan->layer_bytes, transport->error.text[0] ? ": " : "",
			   transport->error.text);
}

/* With the lock. */
static void forget(struct callback *callback, const struct callback_store *store)
{
	struct callback_store **link = &callback->stores;

	while (*link != store)
		link = &(*link)->next;
	*link = store->next;
}

/* Nothing may come into memory that is freed: if transfers do not end, the worker must. */
void callback_store_close(lshard_store *base)
{
	struct callback_store *store = callback_store_of(base);
	struct callback *callback = callback_of(base->transport);
	const lshard_context *context = base->transport->context;
	const uint64_t deadline = callback_deadline(callback);
	bool abandoned;

	if (context->forked(context)) {
		store_free(store);
		return;
	}
	pthread_mutex_lock(&callback->lock);
	while (store->outstanding > 0 && !callback->over && callback_pause(callback, deadline))
		;
	if (store->outstanding > 0) {
		callback->stopping = true;
		pthread_cond_broadcast(&callback->changed);
		callback_await_end(callback);
	}
	forget(callback, store);
	abandoned = callback->abandoned;
	pthread_mutex_unlock(&callback->lock);
	abandoned = abandoned || (callback->on_device && !callback_device_store_settle(store));
	callback->reserved -= base->plan->buffers;
	if (!abandoned) {
		store_free(store);
		return;
	}
	context->log(context, LSHARD_LOG_WARN,
		     "callback: rank %d: the memory of series '%s' (%llu bytes) stays: a collective of the caller did "
		     "not end",
		     (int)context->rank, base->plan->name,
		     (unsigned long long)(base->plan->shard_bytes + base->plan->buffers * store->buffer_pitch));
}

void *callback_shard(lshard_store *store)
{
	return store->plan->shard_bytes > 0 ? callback_store_of(store)->shard : NULL;
}

void *callback_buffer(lshard_store *store, uint32_t buffer, uint32_t position)
{
	(void)position;
	return callback_window(callback_store_of(store), buffer);
}
