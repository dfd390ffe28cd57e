/* SPDX-License-Identifier: Apache-2.0
 *
 * slotmap.h - which window a layer that is not stored here comes into, fixed for life, and how far ahead it starts.
 * Pure arithmetic over positions 0..n_positions-1 of a circle. Knows nothing of ranks, bytes or time.
 */
#ifndef LAYERSHARD_SLOTMAP_H
#define LAYERSHARD_SLOTMAP_H

#include <stdint.h>

#define SLOT_NONE     UINT32_MAX
#define POSITION_NONE UINT32_MAX

/*
 * The remote positions in circular order (R of the design), cut into equal blocks; a position's slot is its index
 * inside its block, and the number of its window everywhere else. The caller owns the arrays.
 */
struct slotmap {
	uint32_t n_positions; /* N */
	uint32_t n_remote;    /* m */
	uint32_t n_slots;     /* windows in use: ceil(m / ceil(m / W)) for W = min(k + 1, m) */
	uint32_t n_blocks;
	uint32_t rotation;      /* remote index at which block 0 begins */
	const uint32_t *remote; /* [m] positions, ascending */
	uint32_t *slot_of;      /* [N] SLOT_NONE for positions stored here */
	uint32_t
		*remote_at_or_after; /* [N] index of the first remote position at or after p; POSITION_NONE if m is 0 */
};

/*
 * Fill the map for W = min(prefetch + 1, m) windows at most; tries every rotation. slot_of and remote_at_or_after have
 * N entries.
 */
void slotmap_build(struct slotmap *map, uint32_t n_positions, const uint32_t *remote, uint32_t n_remote,
		   uint32_t prefetch, uint32_t *slot_of, uint32_t *remote_at_or_after);

/*
 * The slots in the order in which their first positions at or after @p position come: number @p index of them. O(1).
 */
uint32_t slotmap_slot_in_need(const struct slotmap *map, uint32_t position, uint32_t index);

/* First position of @p slot at or after @p position, circularly. O(1). */
uint32_t slotmap_next(const struct slotmap *map, uint32_t slot, uint32_t position);

/*
 * The prefetch distance: layers of compute between the start of a fetch and the use of the layer at @p position, in
 * steady passes: the window is free when the program reaches the position after the one it held before. N when the
 * layer never leaves its window.
 * @p horizon: fetches start at most that many layers ahead (k on collective transports, N else).
 */
uint32_t slotmap_distance(const struct slotmap *map, uint32_t position, uint32_t horizon);

/*
 * The tail rule. A captured pass ends with nothing on its way, so the refill of each slot with its first layer, which
 * goes on across the end of eager passes, has to be made on one side of the end: on the one that has more of its
 * prefetch distance, before the end where they are equal. True: in the next pass, from its first reach on. Those layers
 * of the distance that come before the slot's first one are after the end, the others before it. Never true for a slot
 * that has one layer, which it keeps.
 */
int slotmap_is_tail(const struct slotmap *map, uint32_t slot, uint32_t horizon);

#endif
