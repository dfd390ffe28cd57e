/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_store.c - a series in device memory: this rank's share and windows, and the others' shares opened on this rank's
 * own device. Knows pieces and allocations; knows nothing of streams or of windows' turns.
 *
 * Whole layers: a rank's share is one block of physical memory. Layers put together from several ranks' stripes: a
 * block per stripe, since a block can only be mapped whole. Descriptors are closed once mapped, and the memory lives as
 * long as anybody maps it, also when its owner has died.
 */
#include "cuda_transport.h"
#include "sockets.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* While a store is opened. */
struct opening {
	struct cuda *cuda;
	struct cuda_store *store;
	const lshard_store_plan *plan;
	lshard_error *error;
	struct cuda_report report;
	int *fds; /* [size] of one round */
	uint64_t deadline;
};

static lshard_status refused(struct opening *opening, cuda_result result, const char *what, uint64_t bytes)
{
	if (result == CUDA_OK)
		return LSHARD_OK;
	return cuda_failed(&opening->cuda->driver, opening->error, result, "series '%s': %s of %llu bytes on %s (%s)",
			   opening->plan->name, what, (unsigned long long)bytes,
			   opening->cuda->cards[opening->cuda->base.context->rank].name,
			   opening->cuda->cards[opening->cuda->base.context->rank].bus);
}

/* ---- blocks ---- */

/* Must layers be mapped together from several shares? The same on all ranks. */
static int is_composed(const lshard_store_plan *plan)
{
	for (uint32_t position = 0; plan->direct && position < plan->layers; position++)
		if (plan->first_piece[position + 1] - plan->first_piece[position] > 1)
			return 1;
	return 0;
}

static void list_blocks(struct cuda_store *store, int32_t size)
{
	const lshard_store_plan *plan = store->base.plan;
	const uint32_t pieces = plan->first_piece[plan->layers];

	for (uint32_t piece = 0; store->composed && piece < pieces; piece++)
		store->blocks[store->n_blocks++] = (struct cuda_block){.rank = plan->pieces[piece].rank,
								       .piece = piece,
								       .offset = plan->pieces[piece].share_offset,
								       .bytes = plan->pieces[piece].width};
	for (int32_t rank = 0; !store->composed && rank < size; rank++)
		if (plan->share_bytes_of[rank])
			store->blocks[store->n_blocks++] =
				(struct cuda_block){.rank = rank, .bytes = plan->share_bytes_of[rank]};
}

/* Number @p turn of the blocks of @p rank, or NULL. */
static struct cuda_block *block_of(struct cuda_store *store, int32_t rank, uint32_t turn)
{
	for (uint32_t i = 0; i < store->n_blocks; i++)
		if (store->blocks[i].rank == rank && turn-- == 0)
			return &store->blocks[i];
	return NULL;
}

static uint32_t most_blocks(struct cuda_store *store, int32_t size)
{
	uint32_t most = 0;

	for (int32_t rank = 0; rank < size; rank++)
		while (block_of(store, rank, most))
			most++;
	return most;
}

/* ---- own memory ---- */

static lshard_status make_share(struct opening *opening)
{
	struct cuda *cuda = opening->cuda;
	const int32_t rank = cuda->base.context->rank;
	struct cuda_range *share = &opening->store->shares[rank];
	lshard_status status = LSHARD_OK;

	if (opening->plan->share_bytes == 0)
		return LSHARD_OK; /* more ranks than layers: a reader only */
	status = refused(opening, cuda_range_reserve(cuda, opening->plan->share_bytes, share), "addresses for a share",
			 opening->plan->share_bytes);
	for (uint32_t i = 0; i < opening->store->n_blocks && status == LSHARD_OK; i++) {
		struct cuda_block *block = &opening->store->blocks[i];

		if (block->rank != rank)
			continue;
		status = refused(opening, cuda_memory_make(cuda, block->bytes, &block->handle), "share", block->bytes);
		if (status == LSHARD_OK)
			status = refused(opening,
					 cuda_range_map(cuda, share, block->offset, block->bytes, block->handle, 1),
					 "mapping a share", block->bytes);
	}
	return status;
}

static lshard_status make_windows(struct opening *opening)
{
	struct cuda_store *store = opening->store;
	const uint64_t bytes = opening->plan->cells * opening->plan->layer_bytes;
	lshard_status status;

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

static lshard_status allocate(struct opening *opening, const char *what, uint64_t bytes, struct cuda_range *range)
{
	cuda_address address = 0;
	const cuda_result result = bytes ? opening->cuda->driver.allocate(&address, (size_t)bytes) : CUDA_OK;

	if (result == CUDA_OK && bytes)
		*range = (struct cuda_range){CUDA_ALLOCATED, address, bytes};
	return refused(opening, result, what, bytes);
}

/* Without descriptors: memory that the driver's legacy handles can name. */
static lshard_status make_legacy(struct opening *opening)
{
	const lshard_store_plan *plan = opening->plan;
	struct cuda_range *share = &opening->store->shares[opening->cuda->base.context->rank];
	lshard_status status = allocate(opening, "share", plan->share_bytes, share);

	if (status == LSHARD_OK && plan->share_bytes)
		status = refused(opening, opening->cuda->driver.ipc_export(&opening->report.body.share, share->address),
				 "legacy handle for a share", plan->share_bytes);
	if (status == LSHARD_OK)
		status = allocate(opening, "windows", plan->cells * plan->layer_bytes, &opening->store->windows);
	return status;
}

static lshard_status make_own(struct opening *opening)
{
	lshard_status status;

	if (opening->cuda->virtual_memory) {
		status = make_share(opening);
		if (status == LSHARD_OK)
			status = make_windows(opening);
	} else {
		status = make_legacy(opening);
	}
	if (status == LSHARD_OK)
		status = cuda_streams_open(opening->store, opening->error);
	return status;
}

/* ---- the others' shares ---- */

/* A device that this process is not shown may still be read through its descriptors, or may not: say what to try. */
static lshard_status not_opened(struct opening *opening, cuda_result result, int32_t rank, const char *call)
{
	const struct cuda_card *card = &opening->cuda->cards[rank];

	if (result == CUDA_OK)
		return LSHARD_OK;
	return cuda_failed(
		&opening->cuda->driver, opening->error, result,
		"series '%s': opening the share of rank %d, on %s (%s): if CUDA_VISIBLE_DEVICES hides that device from "
		"this rank, show all of them to every rank and choose by device number: %s",
		opening->plan->name, (int)rank, card->name, card->bus, call);
}

static lshard_status reserve_share(struct opening *opening, int32_t rank)
{
	const uint64_t bytes = opening->plan->share_bytes_of[rank];
	struct cuda_range *share = &opening->store->shares[rank];

	if (share->kind != CUDA_NOTHING)
		return LSHARD_OK;
	return refused(opening, cuda_range_reserve(opening->cuda, bytes, share), "addresses for a peer's share", bytes);
}

static lshard_status open_block(struct opening *opening, struct cuda_block *block, int fd)
{
	struct cuda *cuda = opening->cuda;
	lshard_status status;

	opening->report.echo = fd < 0;
	if (fd < 0)
		return lshard_fail(opening->error, LSHARD_ERR_MISMATCH,
				   "series '%s': rank %d shares nothing instead of %llu bytes", opening->plan->name,
				   (int)block->rank, (unsigned long long)block->bytes);
	status = reserve_share(opening, block->rank);
	if (status == LSHARD_OK)
		status = not_opened(opening,
				    cuda->driver.memory_import(&block->handle, (void *)(intptr_t)fd, CUDA_HANDLE_FD),
				    block->rank, "cuMemImportFromShareableHandle");
	if (status == LSHARD_OK)
		status = not_opened(opening,
				    cuda_range_map(cuda, &opening->store->shares[block->rank], block->offset,
						   block->bytes, block->handle, 0),
				    block->rank, "mapping it");
	return status;
}

static lshard_status export_block(struct opening *opening, const struct cuda_block *block, int *fd)
{
	if (!block)
		return LSHARD_OK;
	return refused(opening, opening->cuda->driver.memory_export(fd, block->handle, CUDA_HANDLE_FD, 0),
		       "descriptor for a share", block->bytes);
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
	swapped = mesh_swap(&opening->cuda->mesh, tag, fd, opening->fds, opening->deadline);
	if (fd >= 0)
		close(fd);
	if (swapped != LSHARD_OK)
		return swapped;
	for (int32_t rank = 0; rank < context->size; rank++) {
		struct cuda_block *block = rank == context->rank ? NULL : block_of(opening->store, rank, turn);

		if (block && status == LSHARD_OK)
			status = open_block(opening, block, opening->fds[rank]);
		if (opening->fds[rank] >= 0)
			close(opening->fds[rank]);
	}
	return status;
}

static lshard_status open_legacy(struct opening *opening)
{
	const lshard_context *context = opening->cuda->base.context;
	lshard_status status = LSHARD_OK;

	for (int32_t rank = 0; rank < context->size && status == LSHARD_OK; rank++) {
		cuda_address address = 0;

		if (rank == context->rank || opening->plan->share_bytes_of[rank] == 0)
			continue;
		status = not_opened(opening,
				    opening->cuda->driver.ipc_open(&address, opening->cuda->reports[rank].body.share,
								   CUDA_IPC_ENABLE_PEER),
				    rank, "cuIpcOpenMemHandle");
		if (status == LSHARD_OK)
			opening->store->shares[rank] =
				(struct cuda_range){CUDA_OPENED, address, opening->plan->share_bytes_of[rank]};
	}
	return status;
}

/* ---- layers from several shares ---- */

/* Position of the layer that a piece belongs to. Pieces lie in the order of the layers. */
static uint32_t layer_of(const lshard_store_plan *plan, uint32_t piece)
{
	uint32_t low = 0;
	uint32_t high = plan->layers - 1;

	while (low < high) {
		const uint32_t middle = low + (high - low + 1) / 2;

		if (plan->first_piece[middle] <= piece)
			low = middle;
		else
			high = middle - 1;
	}
	return low;
}

static uint64_t composed_offset(const struct cuda_store *store, const struct cuda_block *block)
{
	const lshard_store_plan *plan = store->base.plan;

	return layer_of(plan, block->piece) * plan->layer_bytes + plan->pieces[block->piece].layer_offset;
}

static lshard_status compose_layers(struct opening *opening)
{
	struct cuda_store *store = opening->store;
	const uint64_t bytes = opening->plan->layers * opening->plan->layer_bytes;
	lshard_status status;

	if (!store->composed)
		return LSHARD_OK;
	status = refused(opening, cuda_range_reserve(opening->cuda, bytes, &store->layers), "addresses for layers",
			 bytes);
	for (uint32_t i = 0; i < store->n_blocks && status == LSHARD_OK; i++)
		status =
			refused(opening,
				cuda_range_map(opening->cuda, &store->layers, composed_offset(store, &store->blocks[i]),
					       store->blocks[i].bytes, store->blocks[i].handle, 0),
				"composing a layer", opening->plan->layer_bytes);
	return status;
}

/* ---- opening ---- */

static lshard_status open_others(struct opening *opening, uint64_t round)
{
	const uint32_t turns = most_blocks(opening->store, opening->cuda->base.context->size);
	lshard_status status = LSHARD_OK;

	if (!opening->cuda->virtual_memory)
		return open_legacy(opening);
	for (uint32_t turn = 0; turn < turns; turn++) {
		status = swap_blocks(opening, round << 32 | turn, turn, status);
		if (status == LSHARD_ERR_ABORTED || status == LSHARD_ERR_TIMEOUT || status == LSHARD_ERR_PEER_FAILED)
			return status; /* of the mesh: there are no further turns */
	}
	return status == LSHARD_OK ? compose_layers(opening) : status;
}

static lshard_status open_together(struct opening *opening)
{
	uint64_t round = 0;
	lshard_status status = opening->store && opening->fds
				       ? make_own(opening)
				       : lshard_fail(opening->error, LSHARD_ERR_NO_MEMORY,
						     "series '%s': no memory for its tables", opening->plan->name);

	opening->report.step = 1;
	status = cuda_agree(opening->cuda, opening->plan->name, &opening->report, status, &round, opening->deadline);
	if (status != LSHARD_OK)
		return status;
	status = open_others(opening, round);
	/* The time is up for one rank only: give it some to say so, or the others would wait for it. */
	if (status == LSHARD_ERR_TIMEOUT)
		opening->deadline += 1000000000u;
	opening->report.step = 2;
	return cuda_agree(opening->cuda, opening->plan->name, &opening->report, status, NULL, opening->deadline);
}

static struct cuda_store *allocate_store(struct cuda *cuda, const lshard_store_plan *plan)
{
	const lshard_context *context = cuda->base.context;
	const size_t size = (size_t)context->size;
	struct cuda_store *store = context->allocate(context, sizeof *store);
	size_t blocks;

	if (!store)
		return NULL;
	store->base.transport = &cuda->base;
	store->base.plan = plan;
	store->composed = is_composed(plan);
	blocks = store->composed ? plan->first_piece[plan->layers] : size;
	store->shares = context->allocate(context, size * sizeof *store->shares);
	store->blocks = context->allocate(context, blocks * sizeof *store->blocks);
	if (store->shares && store->blocks) {
		list_blocks(store, context->size);
		return store;
	}
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
}

lshard_status cuda_store_open(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **store)
{
	struct cuda *cuda = (struct cuda *)transport;
	const lshard_context *context = transport->context;
	const struct cuda_scope scope = cuda_enter(cuda);
	struct opening opening = {.cuda = cuda,
				  .plan = plan,
				  .error = &transport->error,
				  .deadline = lshard__deadline_ns(context->timeout_ms)};
	lshard_status status;

	opening.store = allocate_store(cuda, plan);
	opening.fds = context->allocate(context, (size_t)context->size * sizeof *opening.fds);
	status = open_together(&opening);
	if (opening.fds)
		context->release(context, opening.fds);
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

	for (uint32_t i = 0; store->shares && store->blocks && i < store->n_blocks; i++) {
		const struct cuda_block *block = &store->blocks[i];

		cuda_range_unmap(cuda, &store->shares[block->rank], block->offset, block->bytes);
		if (store->composed)
			cuda_range_unmap(cuda, &store->layers, composed_offset(store, block), block->bytes);
	}
	cuda_range_unmap(cuda, &store->windows, 0, plan->cells * plan->layer_bytes);
	cuda_range_free(cuda, &store->layers);
	cuda_range_free(cuda, &store->windows);
	for (int32_t rank = 0; store->shares && rank < cuda->base.context->size; rank++)
		cuda_range_free(cuda, &store->shares[rank]);
}

void cuda_store_close(lshard_store *base)
{
	struct cuda_store *store = (struct cuda_store *)base;
	struct cuda *cuda = (struct cuda *)base->transport;
	const lshard_context *context = base->transport->context;
	const struct cuda_scope scope = cuda_enter(cuda);

	if (cuda_settle(store, 0) == LSHARD_OK)
		free_memory(cuda, store);
	else
		context->log(context, LSHARD_LOG_WARN,
			     "rank %d, series '%s': its device memory is left to the end of the process, something may "
			     "still use it: %s",
			     (int)context->rank, base->plan->name, base->error.text);
	cuda_streams_close(store);
	if (store->blocks)
		context->release(context, store->blocks);
	if (store->shares)
		context->release(context, store->shares);
	context->release(context, store);
	cuda_leave(cuda, scope);
}

/* ---- addresses ---- */

void *cuda_share(lshard_store *base)
{
	return (void *)(uintptr_t)((struct cuda_store *)base)->shares[base->transport->context->rank].address;
}

void *cuda_cell(lshard_store *base, uint32_t cell, uint32_t position)
{
	(void)position; /* a layer is at the address of its cell */
	return (void *)(uintptr_t)(((struct cuda_store *)base)->windows.address + cell * base->plan->layer_bytes);
}

void *cuda_peer(lshard_store *base, uint32_t position)
{
	const struct cuda_store *store = (struct cuda_store *)base;
	const lshard_piece *piece = &base->plan->pieces[base->plan->first_piece[position]];

	if (store->composed)
		return (void *)(uintptr_t)(store->layers.address + position * base->plan->layer_bytes);
	return (void *)(uintptr_t)(store->shares[piece->rank].address + piece->share_offset);
}
