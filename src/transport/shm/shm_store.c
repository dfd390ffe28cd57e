/* SPDX-License-Identifier: Apache-2.0
 *
 * shm_store.c - a series in shared memory: this rank's shard, its buffers, and the others' shards mapped read-only.
 * Knows pieces and pages; knows nothing of windows' turns or of who waits.
 */
#include "shm.h"
#include "host_copy.h"
#include "sockets.h"

#include <sys/mman.h>
#include <unistd.h>

/* While a store is opened. */
struct opening {
	struct agreement_opening together;
	struct shm *shm;
	struct shm_store *store;
	const lshard_store_plan *plan;
	struct sharing sharing;
	int *fds;             /* [size] shards to be mapped, this rank's own among them */
	int *copy_fds;        /* [size] the same of copies; NULL where there are none */
	uint64_t *copy_bytes; /* [size] what each rank of this node copies */
};

/* Can it be mapped, in pages of that size? */
static bool on_pages(const lshard_piece *piece, uint64_t page)
{
	uint64_t low = piece->layer_offset | piece->shard_offset | piece->width;

	return piece->rows == 1 && !(low & (page - 1));
}

/* Reserved large pages cannot be mapped in part: stripes that layers are put together of must be made of them. */
bool shm_can_be_reserved(const lshard_store_plan *plan, uint64_t page)
{
	if (!plan->direct || plan->first_piece[plan->layers] == plan->layers)
		return true;
	for (uint32_t i = 0; i < plan->first_piece[plan->layers]; i++)
		if (page == 0 || !on_pages(&plan->pieces[i], page))
			return false;
	return true;
}

/* ---- own memory ---- */

/* The thread that fills them may run on another node. */
static void touch_buffers(const struct opening *opening)
{
	const lshard_store_plan *plan = opening->plan;
	char *buffers = opening->store->buffers.address;

	numa_touch(buffers, (plan->windows - plan->spares) * plan->layer_bytes);
	numa_touch(buffers + plan->windows * plan->layer_bytes, (plan->buffers - plan->windows) * plan->layer_bytes);
}

/* Only this rank maps its buffers, so any pages will do. */
static lshard_status make_buffers(struct opening *opening)
{
	const lshard_store_plan *plan = opening->plan;
	uint64_t bytes = plan->buffers * plan->layer_bytes;
	struct sharing own = opening->sharing;
	lshard_status status;
	int fd = -1;

	if (bytes == 0)
		return LSHARD_OK;
	own.idle_begin = (plan->windows - plan->spares) * plan->layer_bytes;
	own.idle_bytes = plan->spares * plan->layer_bytes;
	own.reserved = own.idle_bytes == 0;
	own.wish = NULL;
	status = shared_make(&own, "windows", bytes, &opening->store->buffers, &fd);
	if (fd >= 0)
		close(fd);
	if (status == LSHARD_OK && opening->sharing.wish && opening->sharing.wish->where != NUMA_ANYWHERE)
		touch_buffers(opening);
	return status;
}

static lshard_status make_requests(struct opening *opening)
{
	const lshard_context *context = opening->shm->base.context;
	struct shm_store *store = opening->store;
	uint32_t buffers = opening->plan->buffers;

	if (opening->plan->direct || buffers == 0)
		return LSHARD_OK;
	store->requests = context->allocate(context, buffers * sizeof *store->requests);
	if (!store->requests)
		return lshard_fail(opening->sharing.error, LSHARD_ERR_NO_MEMORY,
				   "series '%s': no memory for %u buffers", opening->plan->name, (unsigned)buffers);
	for (uint32_t buffer = 0; buffer < buffers; buffer++) {
		store->requests[buffer].store = store;
		store->requests[buffer].buffer = buffer;
	}
	return shm_copier_start(&opening->shm->copier, opening->sharing.error);
}

static lshard_status make_own(struct agreement_opening *together)
{
	struct opening *opening = (struct opening *)together;
	const int32_t rank = opening->shm->base.context->rank;
	lshard_status status = opening->store && opening->fds
				       ? shared_make_sealed(&opening->sharing, "shard", opening->plan->shard_bytes,
							    &opening->store->shards[rank], &opening->fds[rank])
				       : lshard_fail(opening->sharing.error, LSHARD_ERR_NO_MEMORY,
						     "series '%s': no memory for its tables", opening->plan->name);

	if (status == LSHARD_OK && opening->copy_fds)
		status = shared_make_sealed(&opening->sharing, "copies", opening->copy_bytes[rank],
					    &opening->store->copies[rank], &opening->copy_fds[rank]);
	if (status == LSHARD_OK && opening->copy_fds)
		status = shm_near_protect(opening->store, PROT_READ, opening->sharing.error);
	if (status == LSHARD_OK)
		status = make_buffers(opening);
	if (status == LSHARD_OK)
		status = make_requests(opening);
	return status;
}

/* ---- what the others share ---- */

static lshard_status map_shards(struct opening *opening)
{
	const lshard_context *context = opening->shm->base.context;
	struct shm_store *store = opening->store;
	lshard_status status = LSHARD_OK;

	for (int32_t rank = 0; rank < context->size && status == LSHARD_OK; rank++)
		if (rank != context->rank)
			status = shared_map_sealed(&opening->sharing, rank, opening->fds[rank],
						   opening->plan->shard_bytes_of[rank], &store->shards[rank]);
	for (int32_t rank = 0; rank < context->size && status == LSHARD_OK && opening->copy_fds; rank++)
		if (rank != context->rank)
			status = shared_map_sealed(&opening->sharing, rank, opening->copy_fds[rank],
						   opening->copy_bytes[rank], &store->copies[rank]);
	return status;
}

/* The descriptor under which this rank reads the shard of @p rank, and where in it. */
static int find_near(const struct opening *opening, int32_t rank, uint64_t *offset)
{
	const struct shm_near *near = opening->store->near;
	const bool copied = near && near[rank].maker >= 0;

	*offset = copied ? near[rank].offset : 0;
	return copied ? opening->copy_fds[near[rank].maker] : opening->fds[rank];
}

static void find_bases(const struct opening *opening)
{
	struct shm_store *store = opening->store;

	for (int32_t rank = 0; rank < opening->shm->base.context->size; rank++) {
		const struct shm_near *near = store->near ? &store->near[rank] : NULL;

		store->bases[rank] = store->shards[rank].address;
		if (near && near->maker >= 0)
			store->bases[rank] = (char *)store->copies[near->maker].address + near->offset;
	}
}

/* ---- layers in place ---- */

/* Where the layer lies as one range in one shard, or NULL: it is spread. */
static void *in_one_shard(const struct opening *opening, uint32_t position)
{
	const lshard_store_plan *plan = opening->plan;
	const lshard_piece *first = &plan->pieces[plan->first_piece[position]];
	uint64_t start = first->shard_offset - first->layer_offset;

	for (uint32_t i = plan->first_piece[position]; i < plan->first_piece[position + 1]; i++) {
		const lshard_piece *piece = &plan->pieces[i];

		if (piece->rank != first->rank || piece->shard_offset - piece->layer_offset != start ||
		    (piece->rows > 1 && piece->shard_pitch != piece->layer_pitch))
			return NULL;
	}
	return (char *)opening->store->bases[first->rank] + start;
}

/* Put a layer together at @p to, over pages that read as zero. */
static lshard_status compose(struct opening *opening, uint32_t position, char *to)
{
	const lshard_store_plan *plan = opening->plan;

	for (uint32_t i = plan->first_piece[position]; i < plan->first_piece[position + 1]; i++) {
		const lshard_piece *piece = &plan->pieces[i];
		uint64_t offset;
		const int fd = find_near(opening, piece->rank, &offset);

		if (!on_pages(piece, shared_whole_pages(1)))
			return lshard_fail(opening->sharing.error, LSHARD_ERR_NOT_SUPPORTED,
					   "series '%s': the part of rank %d of position %u is not made of whole pages",
					   plan->name, (int)piece->rank, (unsigned)position);
		if (mmap(to + piece->layer_offset, (size_t)piece->width, PROT_READ, MAP_SHARED | MAP_FIXED, fd,
			 (off_t)(offset + piece->shard_offset)) == MAP_FAILED)
			return shared_refused(&opening->sharing, "composing a layer", plan->layer_bytes);
	}
	return LSHARD_OK;
}

static lshard_status reserve(struct opening *opening, uint64_t layers, uint64_t stride)
{
	struct shared_memory *composed = &opening->store->composed;
	lshard_status status;

	if (layers == 0)
		return LSHARD_OK;
	status = shared_reserve(&opening->sharing, "address range", layers * stride, composed);
	if (status == LSHARD_OK && mprotect(composed->address, composed->bytes, PROT_READ))
		status = shared_refused(&opening->sharing, "address range", composed->bytes);
	return status;
}

static lshard_status place_layers(struct opening *opening)
{
	const lshard_context *context = opening->shm->base.context;
	const lshard_store_plan *plan = opening->plan;
	struct shm_store *store = opening->store;
	uint64_t stride = shared_whole_pages(plan->layer_bytes);
	uint64_t spread = 0;
	lshard_status status;
	char *next;

	store->layers = context->allocate(context, plan->layers * sizeof *store->layers);
	if (!store->layers)
		return lshard_fail(opening->sharing.error, LSHARD_ERR_NO_MEMORY,
				   "series '%s': no memory for %u addresses", plan->name, (unsigned)plan->layers);
	for (uint32_t position = 0; position < plan->layers; position++) {
		store->layers[position] = in_one_shard(opening, position);
		spread += !store->layers[position];
	}
	status = reserve(opening, spread, stride);
	next = store->composed.address;
	for (uint32_t position = 0; position < plan->layers && status == LSHARD_OK; position++) {
		if (store->layers[position])
			continue;
		status = compose(opening, position, next);
		store->layers[position] = next;
		next += stride;
	}
	return status;
}

/* ---- opening ---- */

/* Give what this rank has made, get the others'. */
static lshard_status swap(struct opening *opening, uint64_t tag, int *fds)
{
	const int32_t rank = opening->shm->base.context->rank;
	const int own = fds[rank];
	const lshard_status status = mesh_swap(&opening->shm->mesh, tag, own, fds, opening->together.deadline);

	fds[rank] = own; /* the swap has none of this rank */
	return status;
}

/* Where no room is left for what others give, they still wait for what this rank has for them. */
static lshard_status swap_all(struct opening *opening, uint64_t tag)
{
	lshard_error *error = opening->sharing.error;
	const lshard_status status = swap(opening, tag, opening->fds);
	const lshard_error first = *error;
	lshard_status next;

	if (!opening->copy_fds)
		return status;
	next = swap(opening, tag + 1, opening->copy_fds);
	if (status == LSHARD_OK)
		return next;
	*error = first;
	return status;
}

static lshard_status get_shards(struct agreement_opening *together, uint64_t round)
{
	struct opening *opening = (struct opening *)together;
	lshard_status status = swap_all(opening, round);

	if (status == LSHARD_OK)
		status = map_shards(opening);
	if (status != LSHARD_OK)
		return status;
	find_bases(opening);
	return opening->plan->direct ? place_layers(opening) : LSHARD_OK;
}

static struct shm_store *allocate_store(struct shm *shm, const lshard_store_plan *plan)
{
	const lshard_context *context = shm->base.context;
	const bool copies = shm->nodes && plan->refreshed;
	size_t size = (size_t)context->size;
	struct shm_store *store = context->allocate(context, sizeof *store);

	if (!store)
		return NULL;
	store->base.transport = &shm->base;
	store->base.plan = plan;
	store->shards = context->allocate(context, size * sizeof *store->shards);
	store->bases = context->allocate(context, size * sizeof *store->bases);
	store->near = copies ? context->allocate(context, size * sizeof *store->near) : NULL;
	store->copies = copies ? context->allocate(context, size * sizeof *store->copies) : NULL;
	if (store->shards && store->bases && (!copies || (store->near && store->copies)))
		return store;
	shm_store_close(&store->base);
	return NULL;
}

static int *allocate_fds(const lshard_context *context)
{
	int *fds = context->allocate(context, (size_t)context->size * sizeof *fds);

	for (int32_t rank = 0; fds && rank < context->size; rank++)
		fds[rank] = -1;
	return fds;
}

static void close_fds(const lshard_context *context, int *fds)
{
	for (int32_t rank = 0; fds && rank < context->size; rank++)
		if (fds[rank] >= 0)
			close(fds[rank]);
	if (fds)
		context->release(context, fds);
}

/* Tables; a store without any tells that there is no memory for them. */
static void allocate_tables(struct opening *opening)
{
	struct shm *shm = opening->shm;
	const lshard_context *context = shm->base.context;
	struct shm_store *store = allocate_store(shm, opening->plan);

	opening->store = store;
	opening->fds = allocate_fds(context);
	if (!store || !store->near)
		return;
	opening->copy_fds = allocate_fds(context);
	opening->copy_bytes = context->allocate(context, (size_t)context->size * sizeof *opening->copy_bytes);
	if (opening->copy_fds && opening->copy_bytes) {
		shm_near_lay_out(shm, opening->plan, shm->nodes[context->rank], store->near, opening->copy_bytes);
		return;
	}
	shm_store_close(&store->base);
	opening->store = NULL;
}

/* This rank came back: it maps what the others have, its own shard as well. Local. */
static lshard_status open_recalled(struct opening *opening)
{
	struct shm_recalled *recalled = &opening->shm->rejoin.recalled;
	const int32_t rank = opening->shm->base.context->rank;
	struct shm_store *store = opening->store;
	lshard_status status;

	if (!store || !opening->fds)
		return lshard_fail(opening->sharing.error, LSHARD_ERR_NO_MEMORY,
				   "series '%s': no memory for its tables", opening->plan->name);
	close_fds(opening->shm->base.context, opening->fds);
	opening->fds = recalled->fds;
	recalled->fds = NULL;
	store->borrowed = true;
	status = shared_map_sealed(&opening->sharing, rank, opening->fds[rank], opening->plan->shard_bytes,
				   &store->shards[rank]);
	if (status == LSHARD_OK)
		status = make_buffers(opening);
	if (status == LSHARD_OK)
		status = make_requests(opening);
	if (status == LSHARD_OK)
		status = map_shards(opening);
	if (status != LSHARD_OK)
		return status;
	find_bases(opening);
	return opening->plan->direct ? place_layers(opening) : LSHARD_OK;
}

lshard_status shm_compose_again(struct shm_store *store)
{
	struct shm *shm = (struct shm *)store->base.transport;
	struct opening opening = {
		.shm = shm,
		.store = store,
		.plan = store->base.plan,
		.sharing = {.context = shm->base.context, .series = store->base.plan->name, .error = &shm->base.error},
		.fds = store->fds};
	lshard_status status = LSHARD_OK;

	for (uint32_t position = 0; store->layers && position < store->base.plan->layers && status == LSHARD_OK;
	     position++)
		if (!in_one_shard(&opening, position))
			status = compose(&opening, position, store->layers[position]);
	return status;
}

lshard_status shm_store_open(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **store)
{
	struct shm *shm = (struct shm *)transport;
	const lshard_context *context = transport->context;
	struct opening opening = {.together = {.what = plan->name,
					       .deadline = shared_deadline(context, plan, shm_near_most(shm, plan)),
					       .make = make_own,
					       .take = get_shards},
				  .shm = shm,
				  .plan = plan,
				  .sharing = {.context = context,
					      .series = plan->name,
					      .error = &transport->error,
					      .reserved = shm_can_be_reserved(plan, context->large_page_bytes),
					      .wish = plan->refreshed ? &shm->wish : NULL}};
	lshard_status status;

	allocate_tables(&opening);
	status = plan->recalled ? open_recalled(&opening) : agreement_open(&shm->agreement, &opening.together);
	if (status == LSHARD_OK && shm_rejoin_offer(opening.store, opening.fds))
		opening.fds = NULL;
	close_fds(context, opening.fds);
	close_fds(context, opening.copy_fds);
	if (opening.copy_bytes)
		context->release(context, opening.copy_bytes);
	if (status == LSHARD_OK)
		*store = &opening.store->base;
	else if (opening.store)
		shm_store_close(&opening.store->base);
	return status;
}

void shm_store_close(lshard_store *base)
{
	struct shm_store *store = (struct shm_store *)base;
	const lshard_context *context = base->transport->context;

	shm_rejoin_withdraw(store);
	if (!context->forked(context))
		shm_copier_forget(&((struct shm *)base->transport)->copier, store);
	if (store->requests)
		context->release(context, store->requests);
	if (store->layers)
		context->release(context, store->layers);
	shared_unmap(&store->composed);
	shared_unmap(&store->buffers);
	for (int32_t rank = 0; store->shards && rank < context->size; rank++)
		shared_unmap(&store->shards[rank]);
	for (int32_t rank = 0; store->copies && rank < context->size; rank++)
		shared_unmap(&store->copies[rank]);
	if (store->copies)
		context->release(context, store->copies);
	if (store->near)
		context->release(context, store->near);
	if (store->bases)
		context->release(context, store->bases);
	if (store->shards)
		context->release(context, store->shards);
	context->release(context, store);
}

/* ---- the table's functions ---- */

void *shm_shard(lshard_store *base)
{
	return ((struct shm_store *)base)->shards[base->transport->context->rank].address;
}

void *shm_buffer(lshard_store *base, uint32_t buffer, uint32_t position)
{
	(void)position;
	return shm_window((struct shm_store *)base, buffer);
}

void *shm_peer(lshard_store *base, uint32_t position)
{
	return ((struct shm_store *)base)->layers[position];
}

lshard_status shm_read(lshard_store *base, uint32_t position, void *destination)
{
	lshard__host_copy_layer(base->plan, position, ((struct shm_store *)base)->bases, destination);
	return LSHARD_OK;
}
