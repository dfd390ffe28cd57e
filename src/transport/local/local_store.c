/* SPDX-License-Identifier: Apache-2.0
 *
 * local_store.c - a series of the local transport: this rank's shard, which all ranks see, and its buffers. Knows
 * memory; does not know when what is copied.
 */
#include "local.h"
#include "large_pages.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define ALIGNMENT 4096u

/* Bytes of one rank and who still maps them. From libc: they may outlive the group that made them. */
struct shard {
	atomic_uint users;
	void *memory;
	lshard_memory_source source; /* .release is NULL for libc's memory */
};

static uint64_t round_up(uint64_t bytes, uint64_t unit)
{
	return (bytes + unit - 1) / unit * unit;
}

static void shard_drop(struct shard *shard, unsigned users, bool forked)
{
	if (!shard || users == 0 || atomic_fetch_sub(&shard->users, users) != users)
		return;
	if (shard->source.release && !forked)
		shard->source.release(shard->source.user, LSHARD_FOR_SHARD, shard->memory);
	else if (!shard->source.release)
		free(shard->memory);
	free(shard);
}

/* From libc, in large pages as the group's options say. */
static void *own_memory(const struct large_pages_use *use, uint64_t bytes)
{
	void *memory = NULL;

	if (posix_memalign(&memory, lshard__large_alignment(use->context, bytes, ALIGNMENT), bytes) != 0)
		return NULL;
	if (lshard__make_large(use, memory, bytes) == LSHARD_OK)
		return memory;
	free(memory);
	return NULL;
}

/* Zeroed memory from the caller's source if there is one, else from libc. */
static void *shared_memory(const struct large_pages_use *use, const lshard_memory_source *source, uint64_t bytes)
{
	void *memory =
		source ? source->allocate(source->user, LSHARD_FOR_SHARD, bytes, ALIGNMENT) : own_memory(use, bytes);

	if (memory)
		memset(memory, 0, bytes);
	return memory;
}

static struct shard *shard_new(const lshard_context *context, const lshard_store_plan *plan, lshard_error *error)
{
	const struct large_pages_use use = {
		.context = context, .series = plan->name, .what = "shard", .error = error, .in_process = true};
	struct shard *shard = calloc(1, sizeof *shard);

	if (!shard)
		return NULL;
	atomic_init(&shard->users, (unsigned)context->size);
	if (plan->shard_bytes == 0)
		return shard;
	shard->memory = shared_memory(&use, plan->memory_source, plan->shard_bytes);
	if (!shard->memory) {
		free(shard);
		return NULL;
	}
	if (plan->memory_source)
		shard->source = *plan->memory_source;
	return shard;
}

/* One block for all buffers, each at a multiple of ALIGNMENT. */
static bool buffers_open(struct local_store *store, const lshard_context *context, lshard_error *error)
{
	const lshard_store_plan *plan = store->base.plan;
	const lshard_memory_source *source = plan->memory_source;
	struct large_pages_use use;
	uint64_t bytes;

	store->buffer_pitch = round_up(plan->layer_bytes, ALIGNMENT);
	bytes = store->buffer_pitch * plan->buffers;
	use = lshard__large_buffers(context, plan, store->buffer_pitch, error);
	if (bytes == 0)
		return true;
	if (source) {
		store->buffers_block = source->allocate(source->user, LSHARD_FOR_WINDOWS, bytes, ALIGNMENT);
		store->buffers = store->buffers_block;
		if (store->buffers)
			memset(store->buffers, 0, bytes);
	} else {
		store->buffers = lshard__allocate_large(&use, bytes, ALIGNMENT, &store->buffers_block);
	}
	return store->buffers != NULL;
}

static void buffers_close(struct local_store *store, const lshard_context *context)
{
	const lshard_memory_source *source = store->base.plan->memory_source;

	if (!source)
		context->release(context, store->buffers_block);
	else if (store->buffers_block && !context->forked(context))
		source->release(source->user, LSHARD_FOR_WINDOWS, store->buffers_block);
}

static void store_free(struct local_store *store, const lshard_context *context)
{
	if (!store)
		return;
	if (store->reserved && !context->forked(context))
		lshard__process_group_unreserve(local_of(store->base.transport)->group, context->rank,
						store->base.plan->buffers);
	buffers_close(store, context);
	context->release(context, store->queue);
	context->release(context, store->transfers);
	context->release(context, store->bases);
	context->release(context, store->shards);
	context->release(context, store);
}

static struct local_store *store_new(struct local *local, const lshard_store_plan *plan, lshard_error *error)
{
	const lshard_context *context = local->base.context;
	struct local_store *store = context->allocate(context, sizeof *store);
	size_t size = (size_t)context->size;
	size_t buffers = plan->buffers > 0 ? plan->buffers : 1;

	if (!store)
		return NULL;
	store->base.transport = &local->base;
	store->base.plan = plan;
	store->random = local->seed * 2 + 1; /* any odd number but its own for each seed */
	store->shards = context->allocate(context, size * sizeof store->shards[0]);
	store->bases = context->allocate(context, size * sizeof store->bases[0]);
	store->transfers = context->allocate(context, buffers * sizeof store->transfers[0]);
	store->queue = context->allocate(context, buffers * sizeof store->queue[0]);
	if (local->moment == IN_LOCKSTEP)
		store->reserved = lshard__process_group_reserve(local->group, context->rank, plan->buffers);
	if (buffers_open(store, context, error) && store->shards && store->bases && store->transfers && store->queue &&
	    store->reserved == (local->moment == IN_LOCKSTEP))
		return store;
	store_free(store, context);
	return NULL;
}

/* After the exchange every rank that took part has one use of every shard. Take them, or give them back if a rank
 * failed. */
static lshard_status shards_attach(struct local *local, struct local_store *store)
{
	const lshard_context *context = local->base.context;
	const struct lshard__record_set set = {.first = local->announcements,
					       .bytes = sizeof *local->announcements,
					       .size = context->size,
					       .rank = context->rank,
					       .alive = local->alive};
	struct lshard__verdict verdict = lshard__evaluate(&set);

	if (verdict.finding == LSHARD__FAILED)
		return lshard_fail(&local->base.error, (lshard_status)verdict.status,
				   "local: no memory for the series on %s", lshard__ranks_text(&verdict.ranks));
	if (verdict.finding == LSHARD__MISSING)
		return lshard_fail(&local->base.error, LSHARD_ERR_PEER_FAILED, "local: %s %s gone",
				   lshard__ranks_text(&verdict.ranks), lshard__ranks_are(&verdict.ranks));
	for (int32_t rank = 0; rank < context->size; rank++) {
		store->shards[rank] = local->announcements[rank].shard;
		store->bases[rank] = local->announcements[rank].shard->memory;
	}
	return LSHARD_OK;
}

static void shards_give_back(struct local *local)
{
	for (int32_t rank = 0; rank < local->base.context->size; rank++)
		if (local->alive[rank])
			shard_drop(local->announcements[rank].shard, 1, false);
}

lshard_status local_store_open(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **opened)
{
	struct local *local = local_of(transport);
	const lshard_context *context = transport->context;
	lshard_error why = {""};
	struct local_store *store = store_new(local, plan, &why);
	struct shard *shard = store ? shard_new(context, plan, &why) : NULL;
	struct announcement mine = {{shard ? LSHARD_OK : LSHARD_ERR_NO_MEMORY, 0}, shard};
	struct lshard__process_group_offer offer = {EXCHANGE_OPEN, &mine, local->announcements, sizeof mine,
						    local->alive};
	lshard_status status = lshard__process_group_exchange(local->group, context->rank, &offer, &transport->error);
	unsigned gone = 0;

	if (status < 0) { /* nobody saw this rank's shard */
		shard_drop(shard, (unsigned)context->size, false);
		goto free_store;
	}
	for (int32_t rank = 0; rank < context->size; rank++)
		gone += !local->alive[rank];
	shard_drop(shard, gone, false);
	status = shard ? shards_attach(local, store)
		       : lshard_fail(&transport->error, LSHARD_ERR_NO_MEMORY,
				     "local: rank %d has no memory for series '%s' (shard %llu bytes, %u buffers of "
				     "%llu)%s%s",
				     (int)context->rank, plan->name, (unsigned long long)plan->shard_bytes,
				     plan->buffers, (unsigned long long)plan->layer_bytes, why.text[0] ? ": " : "",
				     why.text);
	if (status < 0) {
		shards_give_back(local);
		goto free_store;
	}
	store->number = local->stores_opened++;
	*opened = &store->base;
	return LSHARD_OK;

free_store:
	store_free(store, context);
	return status;
}

void local_store_close(lshard_store *base)
{
	struct local_store *store = store_of(base);
	const lshard_context *context = base->transport->context;

	for (int32_t rank = 0; rank < context->size; rank++)
		shard_drop(store->shards[rank], 1, context->forked(context));
	store_free(store, context);
}

void *local_shard(lshard_store *base)
{
	return store_of(base)->shards[base->transport->context->rank]->memory;
}

void *local_buffer(lshard_store *base, uint32_t buffer, uint32_t position)
{
	(void)position;
	return store_of(base)->buffers + buffer * store_of(base)->buffer_pitch;
}
