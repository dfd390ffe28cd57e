/* SPDX-License-Identifier: Apache-2.0
 *
 * ring.c - the state machine of the windows. See ring.h.
 *
 * The rule is a function of where the program is, not of its history: a window wants its first layer at or after the
 * present one, circularly. Passes flow into one another, a jump is a reach of another position, and nothing needs to be
 * undone.
 */
#include "ring.h"

#include <stddef.h>

void ring_init(struct ring *ring, const struct slotmap *map, struct ring_window *windows, uint32_t horizon)
{
	*ring = (struct ring){.map = map, .windows = windows, .horizon = horizon};
	for (uint32_t window = 0; window < map->n_slots; window++)
		windows[window] =
			(struct ring_window){.holds = POSITION_NONE, .tail = slotmap_is_tail(map, window, horizon)};
}

static void end_views(struct ring *ring, uint32_t except)
{
	for (uint32_t window = 0; window < ring->map->n_slots; window++)
		if (ring->windows[window].holds != except)
			ring->windows[window].viewed = false;
}

void ring_reach(struct ring *ring, uint32_t position)
{
	end_views(ring, position);
	ring->position = position;
	ring->passed = false;
	ring->ended = false;
}

void ring_release(struct ring *ring, uint32_t position)
{
	const uint32_t window = ring->map->slot_of[position];

	if (window != SLOT_NONE && ring->windows[window].holds == position)
		ring->windows[window].viewed = false;
	if (position == ring->position)
		ring->passed = true;
}

void ring_join(struct ring *ring)
{
	end_views(ring, POSITION_NONE);
	ring->passed = true;
}

void ring_restart(struct ring *ring)
{
	end_views(ring, POSITION_NONE);
	ring->position = 0;
	ring->passed = false;
	ring->ended = false;
}

static void empty_tail(struct ring *ring)
{
	for (uint32_t window = 0; window < ring->map->n_slots; window++)
		if (ring->windows[window].tail)
			ring_fail(ring, window);
}

void ring_prepare(struct ring *ring)
{
	ring->position = ring->map->n_positions - 1;
	ring->ended = true;
	ring_join(ring);
	empty_tail(ring);
}

void ring_enter_capture(struct ring *ring)
{
	ring->captured = true;
	empty_tail(ring);
}

/* The position from which wants are counted. */
static uint32_t origin(const struct ring *ring)
{
	return ring->passed ? (ring->position + 1) % ring->map->n_positions : ring->position;
}

/* A window of the tail, in a captured pass or at its end, that wants its first layer of the next one. */
static bool is_left(const struct ring *ring, uint32_t window, uint32_t wanted)
{
	return ring->windows[window].tail && (ring->captured || ring->ended) && wanted < ring->position + ring->passed;
}

bool ring_next_fetch(struct ring *ring, struct ring_fetch *fetch)
{
	const struct slotmap *map = ring->map;
	const uint32_t from = origin(ring);

	while (ring->asked < map->n_slots) {
		const uint32_t window = slotmap_slot_in_need(map, from, ring->asked++);
		const uint32_t wanted = slotmap_next(map, window, from);

		if (ring->windows[window].viewed || ring->windows[window].holds == wanted ||
		    is_left(ring, window, wanted))
			continue;
		if ((wanted + map->n_positions - from) % map->n_positions > ring->horizon)
			break; /* and so are all that come later */
		ring->windows[window].holds = wanted;
		*fetch = (struct ring_fetch){wanted, window};
		return true;
	}
	ring->asked = 0;
	return false;
}

enum ring_access ring_wait(struct ring *ring, uint32_t position, unsigned stream, uint32_t *window, uint32_t *other)
{
	struct ring_window *found;
	bool held;

	*window = ring->map->slot_of[position];
	if (*window == SLOT_NONE)
		return RING_STORED;
	found = &ring->windows[*window];
	held = found->holds == position;
	if (!held && found->viewed) {
		*other = found->holds;
		return RING_BUSY;
	}
	found->holds = position;
	found->viewed = true;
	found->streams |= (uint8_t)(1u << stream);
	return held ? RING_HELD : RING_MISS;
}

void ring_fail(struct ring *ring, uint32_t window)
{
	ring->windows[window].holds = POSITION_NONE;
	ring->windows[window].viewed = false;
}

void ring_reset(struct ring *ring)
{
	for (uint32_t window = 0; window < ring->map->n_slots; window++)
		ring_fail(ring, window);
	ring_restart(ring);
}

void ring_note_stream(struct ring *ring, unsigned stream)
{
	for (uint32_t window = 0; window < ring->map->n_slots; window++)
		ring->windows[window].streams |= (uint8_t)(1u << stream);
}
