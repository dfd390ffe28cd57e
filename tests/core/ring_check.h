/* SPDX-License-Identifier: Apache-2.0
 *
 * ring_check.h - the invariants of the ring, checked from outside after every call; for test_ring and the fuzzer.
 *
 * Knows: ring.h. Finds a window's next layer by looking at all of them.
 *
 *   I1  a window with a live view is never fetched into
 *
 *   I2  when no fetch is left to start, every window without a view holds its first layer at or after the program,
 *       unless that is beyond the horizon
 *
 *   I3  ring_next_fetch ends after at most as many fetches as there are windows
 *
 *   I4  no layer is held by two windows, and a window holds only layers that are its own
 *
 *   I5  reach is idempotent: the second one changes nothing and starts nothing
 *
 *   I6  fetches start earliest need first
 *
 *   I7  nothing is fetched that is further ahead than the horizon, stored here, or held already
 *
 *   I8  wait says BUSY exactly if the layer is not there and its window has a live view, and changes nothing then
 *
 *   I9  views end by reach of another layer, release, join, prepare, failure and reset, and by nothing else
 *
 *   I18 the tail rule: where a capture begins and after prepare the windows of the tail hold nothing; in a captured
 *       pass, and from prepare to the next reach, those past their last layer are not fetched into, in spite of I2. The
 *       tail are the windows of several layers that come in a pass before a refill with the first of them would have
 *       had as many layers of compute in the pass before
 */
#ifndef LAYERSHARD_TEST_RING_CHECK_H
#define LAYERSHARD_TEST_RING_CHECK_H

#include "ring.h"

#define RING_CHECK_LAYERS 64

struct ring_check {
	struct ring ring;
	struct slotmap map;
	struct ring_window windows[RING_CHECK_LAYERS];
	uint32_t remote[RING_CHECK_LAYERS];
	uint32_t slot_of[RING_CHECK_LAYERS];
	uint32_t at_or_after[RING_CHECK_LAYERS];
	bool ended;          /* prepared, and nothing reached since */
	struct ring outside; /* what a capture began with; map: NULL: not captured */
	struct ring_window windows_outside[RING_CHECK_LAYERS];
	bool ended_outside;
	void (*broken)(const struct ring_check *check, const char *what); /* does not return */
};

/* Bit p of @p remote: layer p is not stored here. @p n_layers in 1..RING_CHECK_LAYERS. */
void ring_check_open(struct ring_check *check, uint32_t n_layers, uint64_t remote, uint32_t prefetch, uint32_t horizon,
		     void (*broken)(const struct ring_check *check, const char *what));

/* First layer of @p window at or after @p position, the slow way. */
uint32_t ring_check_next(const struct ring_check *check, uint32_t window, uint32_t position);

/* Each calls the ring, starts every fetch the rule asks for where a program would, and checks. Returns the number of
 * fetches. */
uint32_t ring_check_reach(struct ring_check *check, uint32_t position);
uint32_t ring_check_release(struct ring_check *check, uint32_t position);
uint32_t ring_check_join(struct ring_check *check);
uint32_t ring_check_prepare(struct ring_check *check);
uint32_t ring_check_restart(struct ring_check *check);
enum ring_access ring_check_wait(struct ring_check *check, uint32_t position, unsigned stream);
void ring_check_fail(struct ring_check *check, uint32_t window);
uint32_t ring_check_reset(struct ring_check *check);

/* Begins a capture, or ends it if there is one. */
void ring_check_capture(struct ring_check *check);

/* The window is one of the tail, found the slow way; and nothing is fetched into it where the program is. */
bool ring_check_is_tail(const struct ring_check *check, uint32_t window);
bool ring_check_is_left(const struct ring_check *check, uint32_t window);

#endif
