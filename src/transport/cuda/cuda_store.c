/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_store.c - a series in device memory: this rank's shard and windows, and the others' shards opened on this rank's
 * own device. Knows shards and allocations; knows nothing of streams or of windows' turns.
 *
 * A rank's shard is one block of physical memory, unless layers are put together from stripes (cuda_layers.c): then a
 * block per stripe, since a block can only be mapped whole. Descriptors are closed once mapped, and the memory lives as
 * long as anybody maps it, also when its owner has died. Between hosts fabric handles go round instead, as bytes.
 */
#include "cuda_transport.h"
#include "sockets.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* The driver puts allocations that are not whole blocks of this size anywhere among others of the process. */
#define LEGACY_BLOCK ((uint64_t)2 << 20)

/* As many of a rank's blocks as one exchange carries. */
struct handles {
	uint32_t count;
	struct cuda_fabric_handle handle[15];
};

_Static_assert(sizeof(struct handles) <= LSHARD_EXCHANGE_BYTES, "handles go round in one exchange");

#define HANDLES (uint32_t)(sizeof((struct handles *)NULL)->handle / sizeof(struct cuda_fabric_handle))

/* While a store is opened. */
struct opening {
	struct agreement_opening together;
	struct cuda *cuda;
	struct cuda_store *store;
	const lshard_store_plan *plan;
	lshard_error *error;
	int *fds;                /* [size] of one round; or, over an inner transport, */
	struct handles *handles; /* [size] */
};

static lshard_status refused(struct opening *opening, cuda_result result, const char *what, uint64_t bytes)
{
	return cuda_refused(opening->store, result, what, bytes);
}

/* ---- blocks ---- */

/* Number @p turn of the blocks of @p rank, or NULL. */
static struct cuda_block *block_of(struct cuda_store *store, int32_t rank, uint32_t turn)
{
	for (uint32_t i = 0; i < store->n_blocks; i++)
		if (store->blocks[i].rank == rank && turn-- == 0)
			return &store->blocks[i];
	return NULL;
}

static uint32_t most_turns(struct cuda_store *store, int32_t size)
{
	uint32_t most = 0;

	for (int32_t rank = 0; rank < size; rank++)
		while (block_of(store, rank, most))
			most++;
	return most;
}

/* ---- own memory ---- */

static lshard_status make_shard(struct opening *opening)
{
	struct cuda *cuda = opening->cuda;
	const int32_t rank = cuda->base.context->rank;
	struct cuda_range *shard = &opening->store->shards[rank];
	lshard_status status = LSHARD_OK;

	if (opening->plan->shard_bytes == 0)
		return LSHARD_OK; /* more ranks than layers: a reader only */
	status = refused(opening, cuda_range_reserve(cuda, opening->plan->shard_bytes, shard), "addresses for a shard",
			 opening->plan->shard_bytes);
	for (uint32_t i = 0; i < opening->store->n_blocks && status == LSHARD_OK; i++) {
		struct cuda_block *block = &opening->store->blocks[i];

		if (block->rank != rank)
			continue;
		status = refused(opening, cuda_memory_make(cuda, block->bytes, &block->handle), "shard", block->bytes);
		if (status == LSHARD_OK)
			status = refused(opening,
					 cuda_range_map(cuda, shard, block->offset, block->bytes, block->handle, 1),
					 "mapping a shard", block->bytes);
	}
	return status;
}

static lshard_status make_windows(struct opening *opening)
{
	struct cuda_store *store = opening->store;
	const uint64_t bytes = opening->plan->buffers * opening->plan->layer_bytes;
	lshard_status status;

	if (opening->plan->composed)
		return cuda_layers_make(store);
	if (bytes == 0)
		return LSHARD_OK;
	status = refused(opening, cuda_range_reserve(opening->cuda, bytes, &store->windows), "addresses for windows",
			 bytes);
	if (status == LSHARD_OK)
		status = refused(opening, cuda_memory_make(opening->cuda, bytes, &store->window_memory), "windows",
				 bytes);
	if (status == LSHARD_OK)
		status = refused(opening,
				 cuda_range_map(opening->cuda, &store->windows, 0, bytes, store->window_memory, 1),
				 "mapping windows", bytes);
	return status;
}

static lshard_status check_alignment(struct opening *opening, const char *what, const struct cuda_range *range)
{
	const lshard_store_plan *plan = opening->plan;

	if (plan->alignment == 0 || range->address % plan->alignment == 0) /* 0: no tensors are in it */
		return LSHARD_OK;
	return lshard_fail(
		opening->error, LSHARD_ERR_NOT_SUPPORTED,
		"series '%s': the driver puts its %s at 0x%llx, which is not aligned to %llu: choose a smaller "
		"alignment of the tensors",
		plan->name, what, (unsigned long long)range->address, (unsigned long long)plan->alignment);
}

/* Whole blocks, which are aligned by themselves, and whose handle shows other ranks nothing else of this process. */
static lshard_status allocate(struct opening *opening, const char *what, uint64_t bytes, struct cuda_range *range)
{
	const uint64_t whole = (bytes + LEGACY_BLOCK - 1) & ~(LEGACY_BLOCK - 1);
	cuda_address address = 0;
	cuda_result result;

	if (bytes == 0)
		return LSHARD_OK;
	result = opening->cuda->driver.allocate(&address, (size_t)whole);
	if (result != CUDA_OK)
		return refused(opening, result, what, whole);
	*range = (struct cuda_range){CUDA_ALLOCATED, address, bytes, 0};
	return check_alignment(opening, what, range);
}

/* Without descriptors: memory that the driver's legacy handles can name. */
static lshard_status make_legacy(struct opening *opening)
{
	const lshard_store_plan *plan = opening->plan;
	struct cuda_range *shard = &opening->store->shards[opening->cuda->base.context->rank];
	struct cuda_place place = {.offset = 0};
	lshard_status status = allocate(opening, "shard", plan->shard_bytes, shard);

	if (status == LSHARD_OK && plan->shard_bytes)
		status = refused(opening, opening->cuda->driver.ipc_export(&place.handle, shard->address),
				 "legacy handle for a shard", plan->shard_bytes);
	memcpy(opening->together.report.body, &place, sizeof place);
	if (status == LSHARD_OK)
		status = allocate(opening, "windows", plan->buffers * plan->layer_bytes, &opening->store->windows);
	return status;
}

static lshard_status make_from_caller(struct opening *opening)
{
	struct cuda_place place = {.offset = 0};
	const lshard_status status = cuda_caller_make(opening->store, &place);

	memcpy(opening->together.report.body, &place, sizeof place);
	return status;
}

static lshard_status make_own(struct agreement_opening *together)
{
	struct opening *opening = (struct opening *)together;
	lshard_status status;

	if (!opening->store || (!opening->fds && !opening->handles))
		return lshard_fail(opening->error, LSHARD_ERR_NO_MEMORY, "series '%s': no memory for its tables",
				   opening->plan->name);
	if (opening->plan->memory_source) {
		status = make_from_caller(opening);
	} else if (opening->cuda->virtual_memory) {
		status = make_shard(opening);
		if (status == LSHARD_OK)
			status = make_windows(opening);
	} else {
		status = make_legacy(opening);
	}
	if (status == LSHARD_OK)
		status = cuda_streams_open(opening->store, opening->error);
	return status;
}

/* ---- the others' shards ---- */

/* A device that this process is not shown may still be read through its descriptors, or may not: say what to try. */
static lshard_status not_opened(struct opening *opening, cuda_result result, int32_t rank, const char *call)
{
	const struct cuda_record *record = &opening->cuda->records[rank];

	if (result == CUDA_OK)
		return LSHARD_OK;
	if (opening->cuda->inner) {
		opening->together.report.outcome.echo = 1; /* the handle is gone with the peer, if that is */
		(void)cuda_failed(&opening->cuda->driver, opening->error, result,
				  "series '%s': opening the shard of rank %d, on %s (%s), by its fabric handle: does "
				  "one nvidia-imex "
				  "serve both hosts, and have both ranks the same channel of it? %s",
				  opening->plan->name, (int)rank, record->name, record->bus, call);
		return LSHARD_ERR_NOT_SUPPORTED;
	}
	return cuda_failed(
		&opening->cuda->driver, opening->error, result,
		"series '%s': opening the shard of rank %d, on %s (%s): if CUDA_VISIBLE_DEVICES hides that device from "
		"this rank, show all of them to every rank and choose by device number: %s",
		opening->plan->name, (int)rank, record->name, record->bus, call);
}

static lshard_status reserve_shard(struct opening *opening, int32_t rank)
{
	const uint64_t bytes = opening->plan->shard_bytes_of[rank];
	struct cuda_range *shard = &opening->store->shards[rank];

	if (shard->kind != CUDA_NOTHING)
		return LSHARD_OK;
	return refused(opening, cuda_range_reserve(opening->cuda, bytes, shard), "addresses for a peer's shard", bytes);
}

/* @p shared: the handle as the driver takes it, unless the rank has failed and gave none. */
static lshard_status open_block(struct opening *opening, struct cuda_block *block, int is_given, void *shared)
{
	struct cuda *cuda = opening->cuda;
	lshard_status status;

	opening->together.report.outcome.echo = !is_given;
	if (!is_given)
		return lshard_fail(opening->error, LSHARD_ERR_MISMATCH,
				   "series '%s': rank %d shares nothing instead of %llu bytes", opening->plan->name,
				   (int)block->rank, (unsigned long long)block->bytes);
	status = reserve_shard(opening, block->rank);
	if (status == LSHARD_OK)
		status = not_opened(opening, cuda->driver.memory_import(&block->handle, shared, cuda->handle_type),
				    block->rank, "cuMemImportFromShareableHandle");
	if (status == LSHARD_OK)
		status = not_opened(opening,
				    cuda_range_map(cuda, &opening->store->shards[block->rank], block->offset,
						   block->bytes, block->handle, 0),
				    block->rank, "mapping it");
	return status;
}

/* @p shown: a descriptor or a struct cuda_fabric_handle. */
static lshard_status export_block(struct opening *opening, const struct cuda_block *block, void *shown)
{
	struct cuda *cuda = opening->cuda;

	if (!block)
		return LSHARD_OK;
	return refused(opening, cuda->driver.memory_export(shown, block->handle, cuda->handle_type, 0),
		       cuda->inner ? "fabric handle for a shard" : "descriptor for a shard", block->bytes);
}

/* Block number @p turn of every rank. All ranks make all turns: one that fails gives nothing and says so afterwards. */
static lshard_status swap_blocks(struct opening *opening, uint64_t tag, uint32_t turn, lshard_status status)
{
	const lshard_context *context = opening->cuda->base.context;
	const struct cuda_block *mine = block_of(opening->store, context->rank, turn);
	lshard_status swapped;
	int fd = -1;

	if (status == LSHARD_OK)
		status = export_block(opening, mine, &fd);
	swapped = mesh_swap(&opening->cuda->mesh, tag, fd, opening->fds, opening->together.deadline);
	if (fd >= 0)
		close(fd);
	if (swapped != LSHARD_OK)
		return swapped;
	for (int32_t rank = 0; rank < context->size; rank++) {
		struct cuda_block *block = rank == context->rank ? NULL : block_of(opening->store, rank, turn);

		if (block && status == LSHARD_OK)
			status = open_block(opening, block, opening->fds[rank] >= 0,
					    (void *)(intptr_t)opening->fds[rank]);
		if (opening->fds[rank] >= 0)
			close(opening->fds[rank]);
	}
	return status;
}

static lshard_status swap_descriptors(struct opening *opening, uint64_t tag, uint32_t turns)
{
	lshard_status status = LSHARD_OK;

	for (uint32_t turn = 0; turn < turns; turn++) {
		status = swap_blocks(opening, tag | turn, turn, status);
		if (status == LSHARD_ERR_ABORTED || status == LSHARD_ERR_TIMEOUT || status == LSHARD_ERR_PEER_FAILED)
			return status; /* of the mesh: there are no further turns */
	}
	return status;
}

static lshard_status export_some(struct opening *opening, uint32_t turn, struct handles *mine)
{
	const int32_t rank = opening->cuda->base.context->rank;
	lshard_status status = LSHARD_OK;

	while (mine->count < HANDLES && status == LSHARD_OK) {
		const struct cuda_block *block = block_of(opening->store, rank, turn + mine->count);

		if (!block)
			break;
		status = export_block(opening, block, &mine->handle[mine->count]);
		mine->count += status == LSHARD_OK;
	}
	return status;
}

static lshard_status open_some(struct opening *opening, int32_t rank, uint32_t turn, struct handles *theirs)
{
	lshard_status status = LSHARD_OK;

	for (uint32_t i = 0; i < HANDLES && status == LSHARD_OK; i++) {
		struct cuda_block *block = block_of(opening->store, rank, turn + i);

		if (!block)
			break;
		status = open_block(opening, block, i < theirs->count, &theirs->handle[i]);
	}
	return status;
}

/* The same by fabric handles, of some blocks at once: one that fails gives none and says so afterwards. */
static lshard_status exchange_blocks(struct opening *opening, uint32_t turn, lshard_status *status)
{
	struct cuda *cuda = opening->cuda;
	const lshard_context *context = cuda->base.context;
	struct handles mine = {.count = 0};
	lshard_status exchanged;

	if (*status == LSHARD_OK)
		*status = export_some(opening, turn, &mine);
	exchanged = agreement_gather(&cuda->agreement, &mine, opening->handles, sizeof mine, cuda->agreement.alive,
				     NULL, opening->together.deadline);
	for (int32_t rank = 0; rank < context->size && *status == LSHARD_OK && exchanged == LSHARD_OK; rank++)
		if (rank != context->rank)
			*status = open_some(opening, rank, turn, &opening->handles[rank]);
	return exchanged;
}

static lshard_status swap_handles(struct opening *opening, uint32_t turns)
{
	lshard_status status = LSHARD_OK;

	for (uint32_t turn = 0; turn < turns; turn += HANDLES) {
		const lshard_status exchanged = exchange_blocks(opening, turn, &status);

		if (exchanged != LSHARD_OK)
			return exchanged; /* there are no further turns */
	}
	return status;
}

/* A process cannot open what it has exported itself. */
static lshard_status refuse_thread(struct opening *opening, int32_t rank)
{
	if (opening->cuda->mesh.peers[rank].pid != getpid())
		return LSHARD_OK;
	return lshard_fail(
		opening->error, LSHARD_ERR_NOT_SUPPORTED,
		"series '%s': ranks %d and %d are threads of one process, which the driver's legacy handles "
		"do not work between: leave out the option ipc and a memory source, or give every rank a process of "
		"its own",
		opening->plan->name, (int)opening->cuda->base.context->rank, (int)rank);
}

static int is_read_in_place(const struct cuda *cuda, int32_t rank)
{
	return cuda->ops.capabilities & LSHARD_CAP_DIRECT && cuda_same_device(cuda, cuda->base.context->rank, rank);
}

static lshard_status open_legacy(struct opening *opening)
{
	const lshard_context *context = opening->cuda->base.context;
	lshard_status status = LSHARD_OK;

	for (int32_t rank = 0; rank < context->size && status == LSHARD_OK; rank++) {
		cuda_address address = 0;
		struct cuda_place place;

		if (rank == context->rank || opening->plan->shard_bytes_of[rank] == 0)
			continue;
		memcpy(&place, opening->cuda->agreement.reports[rank].body, sizeof place);
		status = refuse_thread(opening, rank);
		if (status == LSHARD_OK)
			status = not_opened(
				opening, opening->cuda->driver.ipc_open(&address, place.handle, CUDA_IPC_ENABLE_PEER),
				rank, "cuIpcOpenMemHandle");
		if (status != LSHARD_OK)
			break;
		opening->store->shards[rank] = (struct cuda_range){CUDA_OPENED, address + place.offset,
								   opening->plan->shard_bytes_of[rank], place.offset};
		if (is_read_in_place(opening->cuda, rank))
			status = check_alignment(opening, "peer's shard", &opening->store->shards[rank]);
	}
	return status;
}

/* ---- opening ---- */

static lshard_status open_others(struct opening *opening, uint64_t round)
{
	const uint32_t turns = most_turns(opening->store, opening->cuda->base.context->size);
	lshard_status status = LSHARD_OK;

	if (opening->plan->memory_source) {
		status = cuda_caller_shard(opening->store, round << 32, opening->together.deadline);
		return status == LSHARD_OK ? open_legacy(opening) : status;
	}
	if (!opening->cuda->virtual_memory)
		return open_legacy(opening);
	status = opening->cuda->inner ? swap_handles(opening, turns) : swap_descriptors(opening, round << 32, turns);
	return status == LSHARD_OK ? cuda_layers_map(opening->store) : status;
}

static lshard_status take_others(struct agreement_opening *together, uint64_t round)
{
	struct opening *opening = (struct opening *)together;
	const lshard_status status = open_others(opening, round);

	return status == LSHARD_OK ? cuda_fetches_open(opening->store, opening->error) : status;
}

static struct cuda_store *allocate_store(struct cuda *cuda, const lshard_store_plan *plan)
{
	const lshard_context *context = cuda->base.context;
	const size_t size = (size_t)context->size;
	struct cuda_store *store = context->allocate(context, sizeof *store);

	if (!store)
		return NULL;
	store->base.transport = &cuda->base;
	store->base.plan = plan;
	store->shards = context->allocate(context, size * sizeof *store->shards);
	if (store->shards && cuda_layers_list(store) == LSHARD_OK)
		return store;
	cuda_store_close(&store->base);
	return NULL;
}

/* Mappings keep physical memory alive; handles are for mapping alone. */
static void release_handles(struct cuda *cuda, struct cuda_store *store)
{
	for (uint32_t i = 0; i < store->n_blocks; i++)
		if (store->blocks[i].handle)
			cuda->driver.memory_release(store->blocks[i].handle);
	if (store->window_memory)
		cuda->driver.memory_release(store->window_memory);
	for (uint32_t i = 0; i < store->n_blocks; i++)
		store->blocks[i].handle = 0;
	store->window_memory = 0;
	cuda_layers_release(store);
}

lshard_status cuda_store_open(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **store)
{
	struct cuda *cuda = (struct cuda *)transport;
	const lshard_context *context = transport->context;
	const struct cuda_scope scope = cuda_enter(cuda);
	struct opening opening = {.together = {.what = plan->name,
					       .deadline = lshard__deadline_ns(context->timeout_ms),
					       .make = make_own,
					       .take = take_others},
				  .cuda = cuda,
				  .plan = plan,
				  .error = &transport->error};
	lshard_status status;

	opening.store = allocate_store(cuda, plan);
	if (cuda->inner)
		opening.handles = context->allocate(context, (size_t)context->size * sizeof *opening.handles);
	else
		opening.fds = context->allocate(context, (size_t)context->size * sizeof *opening.fds);
	status = agreement_open(&cuda->agreement, &opening.together);
	if (opening.fds)
		context->release(context, opening.fds);
	if (opening.handles)
		context->release(context, opening.handles);
	if (opening.store)
		release_handles(cuda, opening.store);
	if (status == LSHARD_OK)
		*store = &opening.store->base;
	else if (opening.store)
		cuda_store_close(&opening.store->base);
	cuda_leave(cuda, scope);
	return status;
}

/* ---- closing ---- */

static void free_memory(struct cuda *cuda, struct cuda_store *store)
{
	const lshard_store_plan *plan = store->base.plan;

	cuda_layers_unmap(store);
	for (uint32_t i = 0; store->shards && i < store->n_blocks; i++) {
		const struct cuda_block *block = &store->blocks[i];

		cuda_range_unmap(cuda, &store->shards[block->rank], block->offset, block->bytes);
	}
	cuda_range_unmap(cuda, &store->windows, 0, plan->buffers * plan->layer_bytes);
	cuda_range_free(cuda, &store->windows);
	for (int32_t rank = 0; store->shards && rank < cuda->base.context->size; rank++)
		cuda_range_free(cuda, &store->shards[rank]);
}

static void free_tables(struct cuda_store *store, int settled)
{
	const lshard_context *context = store->base.transport->context;

	cuda_streams_close(store);
	cuda_caller_close(store, settled);
	cuda_layers_free(store);
	if (store->shards)
		context->release(context, store->shards);
	context->release(context, store);
}

void cuda_store_close(lshard_store *base)
{
	struct cuda_store *store = (struct cuda_store *)base;
	struct cuda *cuda = (struct cuda *)base->transport;
	const lshard_context *context = base->transport->context;
	struct cuda_scope scope;
	int settled;

	if (context->forked(context)) { /* the driver takes no calls in a child, which has none of its memory */
		free_tables(store, 1);
		return;
	}
	scope = cuda_enter(cuda);
	settled = cuda_settle(store, 0) == LSHARD_OK;
	if (settled)
		free_memory(cuda, store);
	else
		context->log(context, LSHARD_LOG_WARN,
			     "rank %d, series '%s': its device memory is left to the end of the process, something may "
			     "still use it: %s",
			     (int)context->rank, base->plan->name, base->error.text);
	free_tables(store, settled);
	cuda_leave(cuda, scope);
}

/* ---- addresses ---- */

void *cuda_shard(lshard_store *base)
{
	return (void *)(uintptr_t)((struct cuda_store *)base)->shards[base->transport->context->rank].address;
}

void *cuda_buffer(lshard_store *base, uint32_t buffer, uint32_t position)
{
	return (void *)(uintptr_t)cuda_buffer_address((struct cuda_store *)base, buffer, position);
}

void *cuda_peer(lshard_store *base, uint32_t position)
{
	const struct cuda_store *store = (struct cuda_store *)base;
	const lshard_piece *piece = &base->plan->pieces[base->plan->first_piece[position]];

	if (store->base.plan->composed)
		return (void *)(uintptr_t)(store->layers.address + position * base->plan->layer_bytes);
	return (void *)(uintptr_t)(store->shards[piece->rank].address + piece->shard_offset);
}
