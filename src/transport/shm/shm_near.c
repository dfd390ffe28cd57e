/* SPDX-License-Identifier: Apache-2.0
 *
 * shm_near.c - one copy a node: the ranks of a NUMA node read the shards of other nodes' ranks as copies on their own.
 * Knows whose bytes are copied where, and copies them; maps nothing.
 *
 * The copies of a node are divided among its ranks, so that each shard is copied once a node. What a rank makes lies in
 * one memfd, sealed like a shard: nobody else can write there, and it outlives its maker. The program of its maker
 * cannot either, but for a refresh: to that they are layers of other ranks.
 */
#include "shm.h"
#include "large_pages.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define COPIED_AT_ONCE (UINT64_C(64) << 20) /* an abort is seen between */

/* Where rank @p number, counted among those of its node, is among all. */
static int32_t find_on_node(const struct shm *shm, uint32_t node, uint32_t number)
{
	int32_t rank = 0;

	while (shm->nodes[rank] != node || number-- > 0)
		rank++;
	return rank;
}

static uint32_t count_on_node(const struct shm *shm, uint32_t node)
{
	uint32_t count = 0;

	for (int32_t rank = 0; rank < shm->base.context->size; rank++)
		count += shm->nodes[rank] == node;
	return count;
}

/* Behind @p bytes, where a copy that has room for large pages begins at one. */
static uint64_t place_behind(const struct shm *shm, uint64_t bytes, uint64_t shard_bytes)
{
	const uint64_t page = lshard__large_alignment(shm->base.context, shard_bytes, shared_whole_pages(1));

	return (bytes + page - 1) & ~(page - 1);
}

void shm_near_lay_out(const struct shm *shm, const lshard_store_plan *plan, uint32_t node, struct shm_near *near,
		      uint64_t *bytes_of)
{
	const int32_t size = shm->base.context->size;
	const uint32_t makers = count_on_node(shm, node);
	uint32_t copies = 0;

	memset(bytes_of, 0, (size_t)size * sizeof *bytes_of);
	for (int32_t rank = 0; rank < size; rank++) {
		near[rank] = (struct shm_near){.maker = -1};
		if (shm->nodes[rank] == node || plan->shard_bytes_of[rank] == 0)
			continue;
		near[rank].maker = find_on_node(shm, node, copies++ % makers);
		near[rank].offset = place_behind(shm, bytes_of[near[rank].maker], plan->shard_bytes_of[rank]);
		bytes_of[near[rank].maker] = near[rank].offset + plan->shard_bytes_of[rank];
	}
}

static lshard_status copy_shard(struct shm_store *store, int32_t rank)
{
	const struct shm *shm = (const struct shm *)store->base.transport;
	const int32_t own = shm->base.context->rank;
	const uint64_t bytes = store->base.plan->shard_bytes_of[rank];
	const char *from = store->shards[rank].address;
	char *to = (char *)store->copies[own].address + store->near[rank].offset;

	for (uint64_t offset = 0; offset < bytes; offset += COPIED_AT_ONCE) {
		if (atomic_load(&shm->mesh.aborted))
			return lshard_fail(&store->base.error, LSHARD_ERR_ABORTED, "series '%s': rank %d was aborted",
					   store->base.plan->name, (int)own);
		memcpy(to + offset, from + offset,
		       (size_t)(bytes - offset < COPIED_AT_ONCE ? bytes - offset : COPIED_AT_ONCE));
	}
	return LSHARD_OK;
}

uint64_t shm_near_most(const struct shm *shm, const lshard_store_plan *plan)
{
	uint64_t bytes = 0;

	for (int32_t rank = 0; shm->nodes && plan->refreshed && rank < shm->base.context->size; rank++)
		bytes += plan->shard_bytes_of[rank];
	return bytes;
}

lshard_status shm_near_protect(const struct shm_store *store, int protection, lshard_error *error)
{
	const struct shared_memory *made = &store->copies[store->base.transport->context->rank];

	if (!made->address || mprotect(made->address, made->bytes, protection) == 0)
		return LSHARD_OK;
	return lshard_fail(error, LSHARD_ERR_SYSTEM, "series '%s': mprotect of its copies: %s", store->base.plan->name,
			   strerror(errno));
}

static lshard_status copy_shards(struct shm_store *store, uint64_t *bytes)
{
	const lshard_context *context = store->base.transport->context;
	lshard_status status = LSHARD_OK;

	for (int32_t rank = 0; rank < context->size && status == LSHARD_OK; rank++) {
		if (store->near[rank].maker != context->rank)
			continue;
		status = copy_shard(store, rank);
		*bytes += store->base.plan->shard_bytes_of[rank];
	}
	return status;
}

/*
 * Copying many GiB may take longer than ranks wait for each other elsewhere. Who failed or is gone, the caller finds
 * out; so who failed comes here, too.
 */
static lshard_status wait_for_others(struct shm_store *store)
{
	struct shm *shm = (struct shm *)store->base.transport;
	const lshard_store_plan *plan = store->base.plan;
	const uint64_t deadline = shared_deadline(shm->base.context, plan, shm_near_most(shm, plan));
	const unsigned char done = 1;

	return control_exchange(&shm->control, &done, shm->agreement.reports, sizeof done, shm->agreement.alive, NULL,
				deadline);
}

static lshard_status copy_writable(struct shm_store *store, uint64_t *bytes)
{
	lshard_status status = shm_near_protect(store, PROT_READ | PROT_WRITE, &store->base.error);
	lshard_status after;

	if (status != LSHARD_OK)
		return status;
	status = copy_shards(store, bytes);
	after = shm_near_protect(store, PROT_READ, status == LSHARD_OK ? &store->base.error : NULL);
	return status == LSHARD_OK ? after : status;
}

lshard_status shm_refresh(lshard_store *base, uint64_t *bytes)
{
	struct shm_store *store = (struct shm_store *)base;
	lshard_status status, together;

	*bytes = 0;
	if (!store->near)
		return LSHARD_OK;
	status = copy_writable(store, bytes);
	together = wait_for_others(store);
	if (status != LSHARD_OK || together == LSHARD_OK)
		return status;
	return lshard_fail(&base->error, together, "%s", base->transport->error.text);
}
