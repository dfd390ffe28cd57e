/* SPDX-License-Identifier: Apache-2.0
 *
 * ring_check.c - see ring_check.h.
 */
#include "ring_check.h"
#include <string.h>

#define HOLDS(check, condition, what)                                                                                  \
	do {                                                                                                           \
		if (!(condition))                                                                                      \
			(check)->broken(check, what);                                                                  \
	} while (0)

void ring_check_open(struct ring_check *check, uint32_t n_layers, uint64_t remote, uint32_t prefetch, uint32_t horizon,
		     void (*broken)(const struct ring_check *check, const char *what))
{
	uint32_t m = 0;

	memset(check, 0, sizeof *check);
	check->broken = broken;
	for (uint32_t p = 0; p < n_layers; p++)
		if (remote >> p & 1)
			check->remote[m++] = p;
	slotmap_build(&check->map, n_layers, check->remote, m, prefetch, check->slot_of, check->at_or_after);
	ring_init(&check->ring, &check->map, check->windows, horizon);
}

uint32_t ring_check_next(const struct ring_check *check, uint32_t window, uint32_t position)
{
	for (uint32_t step = 0; step < check->map.n_positions; step++)
		if (check->slot_of[(position + step) % check->map.n_positions] == window)
			return (position + step) % check->map.n_positions;
	return POSITION_NONE;
}

/* The layer the program needs next. */
static uint32_t origin(const struct ring_check *check)
{
	return (check->ring.position + (check->ring.passed ? 1 : 0)) % check->map.n_positions;
}

static uint32_t ahead(const struct ring_check *check, uint32_t position)
{
	return (position + check->map.n_positions - origin(check)) % check->map.n_positions;
}

static uint32_t last_layer(const struct ring_check *check, uint32_t window)
{
	uint32_t last = check->map.n_positions;

	while (check->slot_of[--last] != window)
		;
	return last;
}

bool ring_check_is_tail(const struct ring_check *check, uint32_t window)
{
	const uint32_t n = check->map.n_positions, first = ring_check_next(check, window, 0);
	const uint32_t last = last_layer(check, window);
	uint32_t before = 0; /* layers of a pass after the reach that starts the refill for the next one */

	for (uint32_t p = last + 1; p < n; p++)
		before += n + first - p <= check->ring.horizon;
	return first != last && first > before;
}

bool ring_check_is_left(const struct ring_check *check, uint32_t window)
{
	const uint32_t next = check->ring.position + (check->ring.passed ? 1 : 0);

	return (check->ended || check->outside.map) && ring_check_is_tail(check, window) &&
	       next > last_layer(check, window);
}

static void check_holdings(const struct ring_check *check)
{
	for (uint32_t window = 0; window < check->map.n_slots; window++) {
		uint32_t holds = check->windows[window].holds;

		HOLDS(check, holds == POSITION_NONE || holds < check->map.n_positions,
		      "I4: a window holds no layer of the series");
		HOLDS(check, holds == POSITION_NONE || check->slot_of[holds] == window,
		      "I4: a window holds another window's layer");
		HOLDS(check, holds != POSITION_NONE || !check->windows[window].viewed, "I9: a view of nothing");
	}
}

static void check_settled(const struct ring_check *check)
{
	for (uint32_t window = 0; window < check->map.n_slots; window++) {
		uint32_t wanted = ring_check_next(check, window, origin(check));

		HOLDS(check,
		      check->windows[window].viewed || check->windows[window].holds == wanted ||
			      ahead(check, wanted) > check->ring.horizon || ring_check_is_left(check, window),
		      "I2: a window does not hold what it wants");
	}
}

static uint32_t start_fetches(struct ring_check *check)
{
	struct ring_window before[RING_CHECK_LAYERS];
	uint32_t count = 0, last = 0;
	struct ring_fetch fetch;

	memcpy(before, check->windows, sizeof before);
	while (ring_next_fetch(&check->ring, &fetch)) {
		HOLDS(check, ++count <= check->map.n_slots, "I3: fetches without end");
		HOLDS(check, fetch.window < check->map.n_slots && check->slot_of[fetch.position] == fetch.window,
		      "I4: a fetch into another layer's window");
		HOLDS(check, !before[fetch.window].viewed, "I1: a fetch into a window with a live view");
		HOLDS(check, before[fetch.window].holds != fetch.position, "I7: a fetch of what is there");
		HOLDS(check, ahead(check, fetch.position) <= check->ring.horizon, "I7: a fetch beyond the horizon");
		HOLDS(check, !ring_check_is_left(check, fetch.window), "I18: a fetch that is left to the next pass");
		HOLDS(check, ahead(check, fetch.position) >= last, "I6: a later need before an earlier one");
		HOLDS(check, check->windows[fetch.window].holds == fetch.position,
		      "I2: a fetch that is not kept in mind");
		last = ahead(check, fetch.position);
		before[fetch.window].holds = fetch.position;
	}
	check_holdings(check);
	check_settled(check);
	return count;
}

static bool same_windows(const struct ring_check *check, const struct ring_window *before)
{
	for (uint32_t window = 0; window < check->map.n_slots; window++)
		if (check->windows[window].holds != before[window].holds ||
		    check->windows[window].viewed != before[window].viewed ||
		    check->windows[window].streams != before[window].streams)
			return false;
	return true;
}

static void check_views(const struct ring_check *check, const struct ring_window *before, uint32_t ended, uint32_t kept)
{
	for (uint32_t window = 0; window < check->map.n_slots; window++) {
		bool ends = ended == POSITION_NONE ? before[window].holds != kept : before[window].holds == ended;

		HOLDS(check, check->windows[window].viewed == (before[window].viewed && !ends),
		      "I9: a view ended or lived on that should not");
	}
}

static void check_idempotent(struct ring_check *check, uint32_t position)
{
	struct ring_window before[RING_CHECK_LAYERS];
	struct ring_fetch fetch;

	memcpy(before, check->windows, sizeof before);
	ring_reach(&check->ring, position);
	HOLDS(check, !ring_next_fetch(&check->ring, &fetch), "I5: a second reach starts a fetch");
	HOLDS(check, same_windows(check, before), "I5: a second reach changes something");
}

uint32_t ring_check_reach(struct ring_check *check, uint32_t position)
{
	struct ring_window before[RING_CHECK_LAYERS];
	uint32_t count;

	memcpy(before, check->windows, sizeof before);
	ring_reach(&check->ring, position);
	check->ended = false;
	check_views(check, before, POSITION_NONE, position);
	count = start_fetches(check);
	check_idempotent(check, position);
	return count;
}

uint32_t ring_check_release(struct ring_check *check, uint32_t position)
{
	struct ring_window before[RING_CHECK_LAYERS];

	memcpy(before, check->windows, sizeof before);
	ring_release(&check->ring, position);
	check_views(check, before, position, POSITION_NONE);
	return start_fetches(check);
}

static void check_no_views(const struct ring_check *check)
{
	for (uint32_t window = 0; window < check->map.n_slots; window++)
		HOLDS(check, !check->windows[window].viewed, "I9: a view outlives join, prepare or reset");
}

uint32_t ring_check_join(struct ring_check *check)
{
	ring_join(&check->ring);
	check_no_views(check);
	return start_fetches(check);
}

static void check_tail_is_empty(const struct ring_check *check)
{
	for (uint32_t window = 0; window < check->map.n_slots; window++)
		HOLDS(check, check->windows[window].holds == POSITION_NONE || !ring_check_is_tail(check, window),
		      "I18: a window of the tail holds something");
}

uint32_t ring_check_prepare(struct ring_check *check)
{
	uint32_t count;

	ring_prepare(&check->ring);
	check->ended = true;
	check_no_views(check);
	HOLDS(check, origin(check) == 0, "prepare does not go to the first layer");
	check_tail_is_empty(check);
	count = start_fetches(check);
	check_tail_is_empty(check);
	return count;
}

void ring_check_capture(struct ring_check *check)
{
	if (check->outside.map) {
		check->ring = check->outside;
		memcpy(check->windows, check->windows_outside, sizeof check->windows);
		check->outside.map = NULL;
		check->ended = check->ended_outside;
		return;
	}
	check->outside = check->ring;
	memcpy(check->windows_outside, check->windows, sizeof check->windows);
	check->ended_outside = check->ended;
	ring_enter_capture(&check->ring);
	check_tail_is_empty(check);
}

uint32_t ring_check_restart(struct ring_check *check)
{
	ring_restart(&check->ring);
	check->ended = false;
	check_no_views(check);
	HOLDS(check, origin(check) == 0, "restart does not go to the first layer");
	return start_fetches(check);
}

static enum ring_access expected_access(const struct ring_check *check, uint32_t position)
{
	uint32_t window = check->slot_of[position];

	if (window == SLOT_NONE)
		return RING_STORED;
	if (check->windows[window].holds == position)
		return RING_HELD;
	return check->windows[window].viewed ? RING_BUSY : RING_MISS;
}

enum ring_access ring_check_wait(struct ring_check *check, uint32_t position, unsigned stream)
{
	enum ring_access expected = expected_access(check, position), access;
	struct ring_window before[RING_CHECK_LAYERS];
	uint32_t window = SLOT_NONE, other = POSITION_NONE, own = check->slot_of[position];

	memcpy(before, check->windows, sizeof before);
	access = ring_wait(&check->ring, position, stream, &window, &other);
	HOLDS(check, access == expected, "I8: wait finds something else than there is");
	if (access == RING_BUSY)
		HOLDS(check, other == before[own].holds, "I8: BUSY names another layer");
	if (access == RING_HELD || access == RING_MISS) {
		HOLDS(check, window == own && check->windows[own].viewed && check->windows[own].holds == position,
		      "I8: wait starts no view");
		HOLDS(check, check->windows[own].streams >> stream & 1, "I8: wait does not note its stream");
		before[own] = check->windows[own];
	}
	HOLDS(check, same_windows(check, before), "I8: wait changes another window");
	check_holdings(check);
	return access;
}

void ring_check_fail(struct ring_check *check, uint32_t window)
{
	ring_fail(&check->ring, window);
	HOLDS(check, check->windows[window].holds == POSITION_NONE && !check->windows[window].viewed,
	      "I9: a failed window holds something");
	check_holdings(check);
}

uint32_t ring_check_reset(struct ring_check *check)
{
	ring_reset(&check->ring);
	check->ended = false;
	check_no_views(check);
	for (uint32_t window = 0; window < check->map.n_slots; window++)
		HOLDS(check, check->windows[window].holds == POSITION_NONE, "reset leaves something in a window");
	return start_fetches(check);
}
