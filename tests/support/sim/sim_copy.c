/* SPDX-License-Identifier: Apache-2.0
 *
 * sim_copy.c - how a transfer of the simulated machine moves bytes: in two halves, and everything in the buffer is
 * garbage from the moment it begins, so that a reader who should have waited cannot be right by luck.
 *
 * Knows: pieces, shards, buffers. Does not know: when it is called.
 */
#include "sim_world.h"
#include <string.h>

#define GARBAGE 0xdb

/* One run of bytes at @p at of the layer's transfer, as far as it lies in [from_byte, to_byte). */
static void move_run(unsigned char *to, const unsigned char *from, uint64_t at, uint64_t bytes, uint64_t from_byte,
		     uint64_t to_byte)
{
	uint64_t begin = at < from_byte ? from_byte - at : 0;
	uint64_t end = at + bytes > to_byte ? (to_byte > at ? to_byte - at : 0) : bytes;

	if (begin < end)
		memcpy(to + begin, from + begin, end - begin);
}

/* Bytes [from_byte, to_byte) of all the layer's pieces, counted in the order of the pieces. */
void sim_gather(const struct sim_store *store, uint32_t position, unsigned char *to, uint64_t from_byte,
		uint64_t to_byte)
{
	const lshard_store_plan *plan = store->base.plan;
	uint64_t at = 0;

	for (uint32_t i = plan->first_piece[position]; i < plan->first_piece[position + 1]; i++) {
		const lshard_piece *piece = &plan->pieces[i];
		const unsigned char *from = store->shards[piece->rank] + piece->shard_offset;

		for (uint64_t row = 0; row < piece->rows; row++, at += piece->width)
			move_run(to + piece->layer_offset + row * piece->layer_pitch, from + row * piece->shard_pitch,
				 at, piece->width, from_byte, to_byte);
	}
}

static uint64_t bytes_of(const lshard_store_plan *plan, uint32_t position)
{
	uint64_t bytes = 0;

	for (uint32_t i = plan->first_piece[position]; i < plan->first_piece[position + 1]; i++)
		bytes += plan->pieces[i].width * plan->pieces[i].rows;
	return bytes;
}

/* Where the bytes go. The buffer is garbage until they are all there. */
static unsigned char *begin_half(const struct sim_op *op, unsigned half)
{
	struct sim_store *store = op->store;
	unsigned char *to = store->buffers + op->buffer * store->base.plan->layer_bytes;

	if (store->buffer[op->buffer].filling != (half == 1))
		sim_fault(store->rank->world, "rank %d: two transfers at once into buffer %u", store->rank->rank,
			  op->buffer);
	store->buffer[op->buffer].filling = half == 0;
	if (half == 0)
		memset(to, GARBAGE, store->base.plan->layer_bytes);
	return to;
}

/* From a buffer of this rank to another. */
void sim_move_half(const struct sim_op *op, unsigned half)
{
	const struct sim_store *store = op->store;
	const uint64_t bytes = store->base.plan->layer_bytes, middle = bytes / 2;
	unsigned char *to = begin_half(op, half);
	const unsigned char *from = store->buffers + op->number * bytes;

	memcpy(to + (half ? middle : 0), from + (half ? middle : 0), half ? bytes - middle : middle);
}

void sim_copy_half(const struct sim_op *op, unsigned half)
{
	struct sim_store *store = op->store;
	const lshard_store_plan *plan = store->base.plan;
	uint64_t bytes = bytes_of(plan, op->number);
	unsigned char *to;

	if (op->buffer == LSHARD_NO_BUFFER)
		return; /* this rank only gives the layer */
	if (op->buffer >= plan->buffers) {
		sim_fault(store->rank->world, "rank %d: position %u comes here and has no buffer", store->rank->rank,
			  op->number);
		return;
	}
	to = begin_half(op, half);
	sim_gather(store, op->number, to, half ? bytes / 2 : 0, half ? bytes : bytes / 2);
}
