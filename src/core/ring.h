/* SPDX-License-Identifier: Apache-2.0
 *
 * ring.h - the state machine of the windows of one series on one rank: what each window holds, what it wants, who looks
 * at it. Pure and total: no I/O, no threads, no clock, no allocation. It decides which fetch to start and says so; the
 * caller starts it. Every call is O(windows).
 *
 * Words
 *   position  0..N-1, a layer's place in the series
 *   window    0..n_slots-1, the slot of its layers in the slot map
 *   horizon   how many layers ahead a fetch may start
 */
#ifndef LAYERSHARD_RING_H
#define LAYERSHARD_RING_H

#include "slotmap.h"
#include <stdbool.h>

#define RING_STREAMS 8

/* One window. */
struct ring_window {
	uint32_t holds;  /* position whose bytes are there or on their way; POSITION_NONE: nothing, or it failed */
	bool viewed;     /* between wait and the next reach of another layer, or release */
	uint8_t streams; /* bit s: stream s of the series may have read it since it was last overwritten */
	bool tail;       /* replays begin with nothing in it: see slotmap_is_tail */
};

struct ring {
	const struct slotmap *map;
	struct ring_window *windows; /* [map->n_slots], the caller's */
	uint32_t position;           /* where the program is */
	uint32_t asked;              /* windows that ring_next_fetch has looked at in this round */
	bool passed;                 /* the layer at `position` was released: windows want what comes after it */
	bool captured;               /* passes end as captured ones do: the tail waits for the next one's first reach */
	bool ended;                  /* so does it since prepare, until a reach */
	uint32_t horizon;
};

/* A transfer to start: fetch `position` into `window`. */
struct ring_fetch {
	uint32_t position;
	uint32_t window;
};

/* Nothing held, at position 0. */
void ring_init(struct ring *ring, const struct slotmap *map, struct ring_window *windows, uint32_t horizon);

/* The program arrived at @p position: views of other positions end. */
void ring_reach(struct ring *ring, uint32_t position);

/* The view of @p position ends, if there is one; if the program is there, it counts as passed. */
void ring_release(struct ring *ring, uint32_t position);

/* Every view ends and the present position counts as passed (join), or the program goes to position 0 (restart). */
void ring_join(struct ring *ring);
void ring_restart(struct ring *ring);

/*
 * A captured pass has just ended, or is said to have: every view ends, the program has passed the last position, and
 * windows of the tail hold nothing before the next reach. The state in which each replay begins, and which it leaves.
 */
void ring_prepare(struct ring *ring);

/* What follows is captured: windows of the tail hold nothing, as when it is replayed. Left by restoring the ring. */
void ring_enter_capture(struct ring *ring);

/*
 * Next transfer to start by the rule, earliest need first: a window without a view that does not hold what it wants,
 * within the horizon. Not in a captured pass, a window of the tail that is past its last layer. The window then counts
 * as holding it. Returns false when there is none. Call until false: O(windows) in all.
 */
bool ring_next_fetch(struct ring *ring, struct ring_fetch *fetch);

/* What wait(position) finds. */
enum ring_access {
	RING_STORED, /* not in a window on this rank: nothing to wait for */
	RING_HELD,   /* in its window, or on its way */
	RING_MISS,   /* not there; the window is free for a fetch on demand (counts as holding it now) */
	RING_BUSY    /* not there, and the window has a live view of another position (*other) */
};

/* Look up @p position for a wait; on HELD and MISS the view starts and @p stream (bit number) is noted. */
enum ring_access ring_wait(struct ring *ring, uint32_t position, unsigned stream, uint32_t *window, uint32_t *other);

/* The fetch into @p window failed: it holds nothing, the view (if any) ends. */
void ring_fail(struct ring *ring, uint32_t window);

/* Forget what every window holds (update, rewind); views end; position 0. */
void ring_reset(struct ring *ring);

/* Note @p stream as a reader of every window (a graph replayed on it may read any of them). */
void ring_note_stream(struct ring *ring, unsigned stream);

#endif
