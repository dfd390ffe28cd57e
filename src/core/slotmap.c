/* SPDX-License-Identifier: Apache-2.0
 *
 * slotmap.c - equal blocks of the remote positions and the best rotation of them. See slotmap.h.
 *
 * A block holds the rotated remote indices [floor(b*m/B), floor((b+1)*m/B)) for B = ceil(m/W): block sizes differ by at
 * most one, so the positions that share a window lie as far apart as the count allows, whatever m and W are.
 */
#include "slotmap.h"

#include <stddef.h>

/*
 * Evaluations of one distance that looking for a rotation may cost. Only series of thousands of layers with a count
 * that does not divide exceed it; then the first rotations are tried.
 */
#define SEARCH_BUDGET (UINT64_C(1) << 24)

static uint32_t block_begin(const struct slotmap *map, uint32_t block)
{
	return (uint32_t)((uint64_t)block * map->n_remote / map->n_blocks);
}

static uint32_t block_size(const struct slotmap *map, uint32_t block)
{
	return block_begin(map, block + 1) - block_begin(map, block);
}

/* Largest b with floor(b*m/B) <= index. */
static uint32_t block_of(const struct slotmap *map, uint32_t index)
{
	return (uint32_t)((((uint64_t)index + 1) * map->n_blocks - 1) / map->n_remote);
}

static uint32_t rotate(const struct slotmap *map, uint32_t remote_index)
{
	return (uint32_t)(((uint64_t)remote_index + map->n_remote - map->rotation) % map->n_remote);
}

static uint32_t position_at(const struct slotmap *map, uint32_t rotated)
{
	return map->remote[((uint64_t)rotated + map->rotation) % map->n_remote];
}

/*
 * First block at or after `block`, circularly, that has this slot. The slots below floor(m/B) are in every block; the
 * last one only in the long blocks, where floor(b*e/B) grows by one (e = m mod B).
 */
static uint32_t block_with(const struct slotmap *map, uint32_t block, uint32_t slot)
{
	const uint64_t every = map->n_remote / map->n_blocks;
	const uint64_t extra = map->n_remote % map->n_blocks;
	uint64_t found;

	if (slot < every)
		return block % map->n_blocks;
	found = (block % map->n_blocks) * extra / map->n_blocks + 1;
	found = (found * map->n_blocks + extra - 1) / extra - 1; /* the last block is a long one: no wrapping */
	return (uint32_t)found;
}

uint32_t slotmap_next(const struct slotmap *map, uint32_t slot, uint32_t position)
{
	const uint32_t index = rotate(map, map->remote_at_or_after[position]);
	uint32_t block = block_of(map, index);

	if (slot < index - block_begin(map, block) || slot >= block_size(map, block))
		block = block_with(map, block + 1, slot);
	return position_at(map, block_begin(map, block) + slot);
}

/*
 * The slots left in the present block, then those of the next block up to where this one began. The last slot is in
 * long blocks only: seen from a short one it comes at the end of a later block, after all others.
 */
uint32_t slotmap_slot_in_need(const struct slotmap *map, uint32_t position, uint32_t index)
{
	const uint32_t rotated = rotate(map, map->remote_at_or_after[position]);
	const uint32_t block = block_of(map, rotated);
	const uint32_t size = block_size(map, block);

	if (index >= size)
		return index;
	return (rotated - block_begin(map, block) + index) % size;
}

/* The remote index that the window of rotated index `index` held before it; itself if it is alone there. */
static uint32_t previous_in_slot(const struct slotmap *map, uint32_t index)
{
	uint32_t block = block_of(map, index);
	const uint32_t slot = index - block_begin(map, block);

	do
		block = (block + map->n_blocks - 1) % map->n_blocks;
	while (block_size(map, block) <= slot);
	return block_begin(map, block) + slot;
}

/* The prefetch distance: layers from the reach that frees the window to the use of the layer; N if it never leaves. */
static uint32_t distance_of(const struct slotmap *map, uint32_t index)
{
	const uint32_t before = previous_in_slot(map, index);
	const uint32_t position = position_at(map, index);

	if (before == index)
		return map->n_positions;
	return (position + map->n_positions - position_at(map, before)) % map->n_positions - 1;
}

uint32_t slotmap_distance(const struct slotmap *map, uint32_t position, uint32_t horizon)
{
	const uint32_t distance = distance_of(map, rotate(map, map->remote_at_or_after[position]));

	if (distance == map->n_positions)
		return distance;
	return distance < horizon ? distance : horizon;
}

int slotmap_is_tail(const struct slotmap *map, uint32_t slot, uint32_t horizon)
{
	const uint32_t first = slotmap_next(map, slot, 0);
	const uint32_t distance = slotmap_distance(map, first, horizon);

	return distance < map->n_positions && 2 * (uint64_t)first > distance;
}

/* How bad a rotation is; compared field by field. */
struct badness {
	uint32_t exposed; /* distance 0 */
	uint32_t worst;   /* k - distance */
	uint32_t below_k; /* distance below k */
};

static struct badness evaluate(const struct slotmap *map, uint32_t prefetch)
{
	struct badness bad = {0, 0, 0};

	for (uint32_t index = 0; index < map->n_remote; index++) {
		const uint32_t distance = distance_of(map, index);

		if (distance >= prefetch)
			continue;
		bad.exposed += distance == 0;
		bad.below_k++;
		if (prefetch - distance > bad.worst)
			bad.worst = prefetch - distance;
	}
	return bad;
}

static int better(struct badness one, struct badness other)
{
	if (one.exposed != other.exposed)
		return one.exposed < other.exposed;
	if (one.worst != other.worst)
		return one.worst < other.worst;
	return one.below_k < other.below_k;
}

static uint32_t common_divisor(uint32_t a, uint32_t b)
{
	while (b) {
		const uint32_t rest = a % b;

		a = b;
		b = rest;
	}
	return a;
}

/* The pattern of block sizes repeats after m / gcd(m, B) positions: further rotations are the same maps. */
static uint32_t best_rotation(struct slotmap *map, uint32_t prefetch)
{
	uint32_t rotations = map->n_remote / common_divisor(map->n_remote, map->n_blocks);
	struct badness least = {UINT32_MAX, 0, 0};
	uint32_t best = 0;

	if (rotations > SEARCH_BUDGET / map->n_remote)
		rotations = (uint32_t)(SEARCH_BUDGET / map->n_remote);
	for (map->rotation = 0; map->rotation < rotations; map->rotation++) {
		const struct badness bad = evaluate(map, prefetch);

		if (better(bad, least)) {
			least = bad;
			best = map->rotation;
		}
	}
	return best;
}

static void index_positions(struct slotmap *map)
{
	uint32_t next = 0;

	for (uint32_t position = 0; position < map->n_positions; position++) {
		map->slot_of[position] = SLOT_NONE;
		if (next < map->n_remote && map->remote[next] < position)
			next++;
		map->remote_at_or_after[position] = !map->n_remote ? POSITION_NONE : next % map->n_remote;
	}
}

void slotmap_build(struct slotmap *map, uint32_t n_positions, const uint32_t *remote, uint32_t n_remote,
		   uint32_t prefetch, uint32_t *slot_of, uint32_t *remote_at_or_after)
{
	const uint32_t windows = prefetch < n_remote ? prefetch + 1 : n_remote;

	*map = (struct slotmap){.n_positions = n_positions,
				.n_remote = n_remote,
				.remote = remote,
				.slot_of = slot_of,
				.remote_at_or_after = remote_at_or_after};
	index_positions(map);
	if (n_remote == 0)
		return;

	map->n_blocks = (n_remote + windows - 1) / windows;
	map->n_slots = (n_remote + map->n_blocks - 1) / map->n_blocks;
	map->rotation = best_rotation(map, prefetch);
	for (uint32_t index = 0; index < n_remote; index++)
		slot_of[position_at(map, index)] = index - block_begin(map, block_of(map, index));
}
