/* SPDX-License-Identifier: Apache-2.0
 *
 * host_copy.c - two-dimensional copies between shards and packed layers. Knows pieces; knows no transport, no thread.
 */
#include "host_copy.h"

#include <string.h>

void lshard__host_copy_piece(const lshard_piece *piece, const void *shard, void *layer)
{
	const char *from = (const char *)shard + piece->shard_offset;
	char *to = (char *)layer + piece->layer_offset;

	for (uint64_t row = 0; row < piece->rows; row++) {
		memcpy(to, from, piece->width);
		from += piece->shard_pitch;
		to += piece->layer_pitch;
	}
}

void lshard__host_copy_layer(const lshard_store_plan *plan, uint32_t position, const void *const *shards, void *layer)
{
	for (uint32_t i = plan->first_piece[position]; i < plan->first_piece[position + 1]; i++)
		lshard__host_copy_piece(&plan->pieces[i], shards[plan->pieces[i].rank], layer);
}

void lshard_copy_layer(const lshard_store_plan *plan, uint32_t position, const void *const *shards, void *layer)
{
	lshard__host_copy_layer(plan, position, shards, layer);
}
