/* SPDX-License-Identifier: Apache-2.0
 *
 * shm_renew.c - memory that a rank which came back can write: it maps its own shard as another's, which is sealed, and
 * which nobody can map writable. So an update puts the bytes into new memory first, at the same addresses everywhere.
 */
#include "shm.h"
#include "sockets.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct renewal {
	struct shm *shm;
	struct shm_store *store;
	struct sharing sharing;
	struct shared_memory made; /* this rank's new shard, until it is where the old one was */
	int *fds;                  /* [size] of new shards; -1: none */
};

static lshard_status make_new(struct renewal *renewal)
{
	const int32_t rank = renewal->shm->base.context->rank;
	const struct shared_memory *old = &renewal->store->shards[rank];
	const uint64_t bytes = renewal->store->base.plan->shard_bytes;
	lshard_status status;

	if (!renewal->store->borrowed || !old->address)
		return LSHARD_OK;
	/* In pages as the old one has them, or in smaller ones: it has to fit where that is. */
	if (renewal->sharing.reserved)
		renewal->sharing.reserved = old->bytes % renewal->sharing.context->large_page_bytes == 0;
	status = shared_make_sealed(&renewal->sharing, "shard", bytes, &renewal->made, &renewal->fds[rank]);
	if (status == LSHARD_OK)
		memcpy(renewal->made.address, old->address, bytes);
	return status;
}

/* Over the old one: no address changes. A failure leaves the old one where it is. */
static lshard_status move(struct renewal *renewal, const struct shared_memory *from, const struct shared_memory *to)
{
	if (from->bytes > to->bytes)
		return lshard_fail(renewal->sharing.error, LSHARD_ERR_NOT_SUPPORTED,
				   "series '%s': a shard came in small pages, and would be renewed in large ones",
				   renewal->sharing.series);
	if (mremap(from->address, from->bytes, from->bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to->address) == MAP_FAILED)
		return shared_refused(&renewal->sharing, "moving a shard", from->bytes);
	return LSHARD_OK;
}

static lshard_status take_own(struct renewal *renewal, int32_t rank)
{
	const lshard_status status = move(renewal, &renewal->made, &renewal->store->shards[rank]);

	if (status == LSHARD_OK)
		renewal->made = (struct shared_memory){NULL, 0};
	return status;
}

static lshard_status take_others(struct renewal *renewal, int32_t rank)
{
	struct shared_memory mapped = {NULL, 0};
	lshard_status status = shared_map_sealed(&renewal->sharing, rank, renewal->fds[rank],
						 renewal->store->base.plan->shard_bytes_of[rank], &mapped);

	if (status != LSHARD_OK)
		return status;
	status = move(renewal, &mapped, &renewal->store->shards[rank]);
	if (status != LSHARD_OK)
		shared_unmap(&mapped);
	return status;
}

/* The descriptor that was kept is closed at the end in place of the new one. */
static void keep_new(struct renewal *renewal, int32_t rank)
{
	const int old = renewal->store->fds[rank];

	pthread_mutex_lock(&renewal->shm->rejoin.lock);
	renewal->store->fds[rank] = renewal->fds[rank];
	pthread_mutex_unlock(&renewal->shm->rejoin.lock);
	renewal->fds[rank] = old;
}

static lshard_status take_new(struct renewal *renewal)
{
	const lshard_context *context = renewal->shm->base.context;
	lshard_status status = LSHARD_OK;

	for (int32_t rank = 0; rank < context->size && status == LSHARD_OK; rank++) {
		if (renewal->fds[rank] < 0)
			continue;
		status = rank == context->rank ? take_own(renewal, rank) : take_others(renewal, rank);
		if (status == LSHARD_OK)
			keep_new(renewal, rank);
	}
	return status == LSHARD_OK ? shm_compose_again(renewal->store) : status;
}

static bool is_borrowed(const struct renewal *renewal)
{
	const struct agreement *agreement = &renewal->shm->agreement;
	bool any = false;

	for (int32_t rank = 0; rank < agreement->context->size; rank++)
		any |= agreement->alive[rank] && agreement->reports[rank].body[0];
	return any;
}

/* What the rank has made, the others hear together; nobody reads meanwhile, so a rank may be ahead of another. */
static lshard_status renew(struct renewal *renewal, uint64_t deadline_ns)
{
	struct agreement *agreement = &renewal->shm->agreement;
	const char *name = renewal->store->base.plan->name;
	const int32_t rank = renewal->shm->base.context->rank;
	struct agreement_report report = {.step = 1, .body = {renewal->store->borrowed}};
	uint64_t round = 0;
	int own;
	lshard_status status = agreement_exchange(agreement, name, &report, make_new(renewal), &round, deadline_ns);

	if (status != LSHARD_OK || !is_borrowed(renewal))
		return status;
	own = renewal->fds[rank];
	status = mesh_swap_among(&renewal->shm->mesh, agreement->alive, round, own, renewal->fds, deadline_ns);
	renewal->fds[rank] = own;
	if (status == LSHARD_OK)
		status = take_new(renewal);
	report.step = 2;
	return agreement_exchange(agreement, name, &report, status, NULL, deadline_ns);
}

static void renewal_close(struct renewal *renewal)
{
	const lshard_context *context = renewal->shm->base.context;

	shared_unmap(&renewal->made);
	for (int32_t rank = 0; renewal->fds && rank < context->size; rank++)
		if (renewal->fds[rank] >= 0)
			close(renewal->fds[rank]);
	if (renewal->fds)
		context->release(context, renewal->fds);
}

lshard_status shm_renew(lshard_transport *transport, const lshard_store_plan *plan)
{
	struct shm *shm = (struct shm *)transport;
	const lshard_context *context = transport->context;
	struct renewal renewal = {.shm = shm,
				  .store = shm_rejoin_find(shm, plan),
				  .sharing = {.context = context,
					      .series = plan->name,
					      .error = &transport->error,
					      .reserved = shm_can_be_reserved(plan, context->large_page_bytes) &&
							  context->large_page_bytes,
					      .wish = &shm->wish}};
	lshard_status status;

	renewal.fds = context->allocate(context, (size_t)context->size * sizeof *renewal.fds);
	for (int32_t rank = 0; renewal.fds && rank < context->size; rank++)
		renewal.fds[rank] = -1;
	if (!renewal.fds)
		return lshard_fail(&transport->error, LSHARD_ERR_NO_MEMORY, "series '%s': no memory to renew shards",
				   plan->name);
	shm->agreement.may_miss = true;
	status = renew(&renewal, shared_deadline(context, plan, 0));
	shm->agreement.may_miss = false;
	if (status == LSHARD_OK)
		renewal.store->borrowed = false;
	renewal_close(&renewal);
	return status;
}
