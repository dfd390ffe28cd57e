/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_layers.c - layers that are put together by mapping: direct stripes where they are stored, and physical memory
 * of this rank's windows and residents between them. Knows pieces and blocks; knows nothing of how blocks come here.
 *
 * Each position has a range of addresses of its own, in which nothing changes for the life of the store. A block of a
 * shard is mapped into the one layer it is part of. The memory of a buffer is mapped into every layer that comes there:
 * one allocation for each gap between direct stripes, since an allocation is mapped whole or not at all.
 */
#include "cuda_transport.h"

/* ---- blocks ---- */

static int is_of(const lshard_piece *piece, int32_t rank)
{
	return piece->granular && piece->rank == rank;
}

/* A rank's granular stripes lie in a row from the beginning of its shard; what follows is mapped into no layer. */
static void list_blocks_of(struct cuda_store *store, int32_t rank)
{
	const lshard_store_plan *plan = store->base.plan;
	uint64_t end = 0;

	for (uint32_t index = 0; plan->composed && index < plan->first_piece[plan->layers]; index++) {
		const lshard_piece *piece = &plan->pieces[index];

		if (!is_of(piece, rank))
			continue;
		store->blocks[store->n_blocks++] =
			(struct cuda_block){.rank = rank, .piece = index, .offset = end, .bytes = piece->width};
		end += piece->width;
	}
	if (end < plan->shard_bytes_of[rank])
		store->blocks[store->n_blocks++] = (struct cuda_block){
			.rank = rank, .piece = CUDA_NO_PIECE, .offset = end, .bytes = plan->shard_bytes_of[rank] - end};
}

static size_t most_blocks(const lshard_store_plan *plan, int32_t size)
{
	return (size_t)size + (plan->composed ? plan->first_piece[plan->layers] : 0);
}

/* ---- gaps ---- */

static int is_direct(const struct cuda_store *store, const lshard_piece *piece)
{
	const struct cuda *cuda = (struct cuda *)store->base.transport;
	const int32_t rank = cuda->base.context->rank;

	if (!store->base.plan->composed || !piece->granular)
		return 0;
	return piece->rank == rank ||
	       (cuda->ops.capabilities & LSHARD_CAP_DIRECT && cuda_same_device(cuda, rank, piece->rank));
}

/* The direct piece that begins first at or after @p offset of a layer, or NULL. All layers are alike. */
static const lshard_piece *next_direct(const struct cuda_store *store, uint64_t offset)
{
	const lshard_store_plan *plan = store->base.plan;
	const lshard_piece *next = NULL;

	for (uint32_t index = plan->first_piece[0]; index < plan->first_piece[1]; index++) {
		const lshard_piece *piece = &plan->pieces[index];

		if (is_direct(store, piece) && piece->layer_offset >= offset &&
		    (!next || piece->layer_offset < next->layer_offset))
			next = piece;
	}
	return next;
}

static void list_gaps(struct cuda_store *store)
{
	uint64_t offset = 0;

	while (offset < store->base.plan->layer_bytes) {
		const lshard_piece *next = next_direct(store, offset);
		const uint64_t end = next ? next->layer_offset : store->base.plan->layer_bytes;

		if (end > offset)
			store->gaps[store->n_gaps++] = (struct cuda_gap){offset, end - offset};
		offset = next ? end + next->width : end;
	}
}

lshard_status cuda_layers_list(struct cuda_store *store)
{
	const lshard_store_plan *plan = store->base.plan;
	const lshard_context *context = store->base.transport->context;
	size_t memories;

	store->blocks = context->allocate(context, most_blocks(plan, context->size) * sizeof *store->blocks);
	if (!store->blocks)
		return LSHARD_ERR_NO_MEMORY;
	for (int32_t rank = 0; rank < context->size; rank++)
		list_blocks_of(store, rank);
	if (!plan->composed)
		return LSHARD_OK;
	store->gaps = context->allocate(context, (plan->first_piece[1] + 1) * sizeof *store->gaps);
	if (!store->gaps)
		return LSHARD_ERR_NO_MEMORY;
	list_gaps(store);
	memories = (size_t)plan->buffers * store->n_gaps;
	store->gap_memory = context->allocate(context, (memories + 1) * sizeof *store->gap_memory);
	return store->gap_memory ? LSHARD_OK : LSHARD_ERR_NO_MEMORY;
}

/* ---- memory ---- */

lshard_status cuda_layers_make(struct cuda_store *store)
{
	struct cuda *cuda = (struct cuda *)store->base.transport;
	const size_t memories = (size_t)store->base.plan->buffers * store->n_gaps;
	lshard_status status = LSHARD_OK;

	for (size_t i = 0; i < memories && status == LSHARD_OK; i++) {
		const struct cuda_gap *gap = &store->gaps[i % store->n_gaps];

		status = cuda_refused(store, cuda_memory_make(cuda, gap->bytes, &store->gap_memory[i]), "windows",
				      gap->bytes);
	}
	return status;
}

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

/* Is the block part of a layer here? Then where, in the range of all layers. */
static int is_mapped(const struct cuda_store *store, const struct cuda_block *block, uint64_t *offset)
{
	const lshard_store_plan *plan = store->base.plan;

	if (block->piece == CUDA_NO_PIECE || !is_direct(store, &plan->pieces[block->piece]))
		return 0;
	*offset = layer_of(plan, block->piece) * plan->layer_bytes + plan->pieces[block->piece].layer_offset;
	return 1;
}

static lshard_status map_blocks(struct cuda_store *store)
{
	struct cuda *cuda = (struct cuda *)store->base.transport;
	lshard_status status = LSHARD_OK;

	for (uint32_t i = 0; i < store->n_blocks && status == LSHARD_OK; i++) {
		const struct cuda_block *block = &store->blocks[i];
		uint64_t offset;

		if (is_mapped(store, block, &offset))
			status = cuda_refused(
				store, cuda_range_map(cuda, &store->layers, offset, block->bytes, block->handle, 0),
				"mapping a stripe into a layer", block->bytes);
	}
	return status;
}

/* Into every layer the memory of its buffer. */
static lshard_status map_buffers(struct cuda_store *store)
{
	const lshard_store_plan *plan = store->base.plan;
	struct cuda *cuda = (struct cuda *)store->base.transport;
	const size_t places = (size_t)plan->layers * store->n_gaps;
	lshard_status status = LSHARD_OK;

	for (size_t i = 0; i < places && status == LSHARD_OK; i++) {
		const size_t position = i / store->n_gaps;
		const size_t number = i % store->n_gaps;
		const struct cuda_gap *gap = &store->gaps[number];

		if (plan->buffer_of[position] == LSHARD_NO_BUFFER)
			continue;
		status = cuda_refused(
			store,
			cuda_range_map(cuda, &store->layers, position * plan->layer_bytes + gap->offset, gap->bytes,
				       store->gap_memory[(size_t)plan->buffer_of[position] * store->n_gaps + number],
				       1),
			"mapping a window into a layer", gap->bytes);
	}
	return status;
}

lshard_status cuda_layers_map(struct cuda_store *store)
{
	const lshard_store_plan *plan = store->base.plan;
	const uint64_t bytes = plan->layers * plan->layer_bytes;
	lshard_status status;

	if (!plan->composed)
		return LSHARD_OK;
	status = cuda_refused(store, cuda_range_reserve((struct cuda *)store->base.transport, bytes, &store->layers),
			      "addresses for layers", bytes);
	if (status == LSHARD_OK)
		status = map_blocks(store);
	if (status == LSHARD_OK)
		status = map_buffers(store);
	return status;
}

/* ---- letting go ---- */

void cuda_layers_release(struct cuda_store *store)
{
	struct cuda *cuda = (struct cuda *)store->base.transport;
	const size_t memories = store->gap_memory ? (size_t)store->base.plan->buffers * store->n_gaps : 0;

	for (size_t i = 0; i < memories; i++) {
		if (store->gap_memory[i])
			cuda->driver.memory_release(store->gap_memory[i]);
		store->gap_memory[i] = 0;
	}
}

void cuda_layers_unmap(struct cuda_store *store)
{
	const lshard_store_plan *plan = store->base.plan;
	struct cuda *cuda = (struct cuda *)store->base.transport;
	uint64_t offset;

	for (uint32_t i = 0; i < store->n_blocks; i++)
		if (is_mapped(store, &store->blocks[i], &offset))
			cuda_range_unmap(cuda, &store->layers, offset, store->blocks[i].bytes);
	for (size_t i = 0; i < (size_t)plan->layers * store->n_gaps; i++) {
		const struct cuda_gap *gap = &store->gaps[i % store->n_gaps];

		cuda_range_unmap(cuda, &store->layers, i / store->n_gaps * plan->layer_bytes + gap->offset, gap->bytes);
	}
	cuda_range_free(cuda, &store->layers);
}

void cuda_layers_free(struct cuda_store *store)
{
	const lshard_context *context = store->base.transport->context;

	if (store->gap_memory)
		context->release(context, store->gap_memory);
	if (store->gaps)
		context->release(context, store->gaps);
	if (store->blocks)
		context->release(context, store->blocks);
}

/* ---- addresses ---- */

cuda_address cuda_buffer_address(const struct cuda_store *store, uint32_t buffer, uint32_t position)
{
	if (store->base.plan->composed)
		return store->layers.address + position * store->base.plan->layer_bytes;
	return store->windows.address + buffer * store->base.plan->layer_bytes;
}

int cuda_in_place(const struct cuda_store *store, const lshard_piece *piece, cuda_address to)
{
	return to - store->layers.address < store->layers.bytes && is_direct(store, piece);
}
