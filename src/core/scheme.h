/* SPDX-License-Identifier: Apache-2.0
 *
 * scheme.h - what a series is on one rank: where each layer is found, which are resident, the windows and their slot
 * map. Pure arithmetic over layout and slotmap; the planner and the running series use the same.
 */
#ifndef LAYERSHARD_SCHEME_H
#define LAYERSHARD_SCHEME_H

#include "layout.h"
#include "slotmap.h"

/* Where this rank's program finds a layer. */
enum place {
	PLACE_SHARD,    /* in the rank's own shard, whole */
	PLACE_PEER,     /* in place in the shards, by mapping; nothing moves */
	PLACE_RESIDENT, /* in a buffer of its own, for good */
	PLACE_WINDOW    /* in the buffer of its window, when it is its turn */
};

/* How the ranks are connected, as far as the arithmetic cares. */
struct scheme_link {
	int32_t rank;
	int32_t size;
	bool collective;
	bool composes; /* it puts buffers together from direct stripes and windows */
	bool direct;   /* the transport can map peers' shards */
	bool (*is_direct)(const void *user,
			  int32_t rank); /* those of @p rank, to compute from them as they lie; NULL: all */
	const void *user;
	uint64_t granule;
	uint64_t large_page; /* 0: none. Stripes of many of them are cut at them and not at granules */
};

struct scheme {
	struct layout layout;
	struct scheme_link link;
	bool direct;      /* layers of direct ranks are PLACE_PEER */
	bool composed;    /* buffers hold only what is not found in place */
	uint32_t *remote; /* positions in the ring, ascending */
	uint32_t n_remote;
	struct slotmap map;
	uint32_t *slot_of; /* the map's arrays */
	uint32_t *remote_at_or_after;
	uint8_t *place;             /* [N] enum place */
	uint32_t *buffer_of;        /* [N] its own or its window's; LSHARD_NO_BUFFER: stored here, or in place */
	uint32_t *buffer_of_window; /* [n_slots] LSHARD_NO_BUFFER: nothing comes to this rank in it (it only sends) */
	uint32_t windows;           /* buffers 0..windows-1 */
	bool poison;                /* windows can be poisoned */
	uint32_t spares;    /* for that: the next buffers, one beside each window and one for the poison; else 0 */
	uint32_t residents; /* the buffers after them */
	uint32_t horizon;   /* how many layers ahead a fetch may start */
	uint32_t prefetch;
	uint64_t incoming_bytes; /* what other ranks send for one layer: all of it, or all but the stripes in place */
	uint64_t buffer_bytes;   /* of a window or resident */
};

/* Buffers 0..that are what layers are fetched and copied into in passes: windows and spares. */
static inline uint32_t scheme_moving_buffers(const struct scheme *scheme)
{
	return scheme->windows + scheme->spares;
}

/* How far ahead layers are fetched, for plan and stats. */
struct scheme_distances {
	uint32_t fetched;                     /* layers fetched by this rank per steady pass */
	uint32_t shortest;                    /* distance; N when nothing is fetched */
	uint32_t below_k;                     /* layers whose distance is below k */
	uint32_t named[LSHARD_BELOW_K_NAMED]; /* the first of them, as layers (not positions) */
};

lshard_status scheme_open(struct scheme *scheme, const lshard_series_options *options, const struct scheme_link *link,
			  const struct layout_memory *memory, lshard_error *error);
void scheme_close(struct scheme *scheme, const struct layout_memory *memory);

void scheme_distances(const struct scheme *scheme, struct scheme_distances *distances);

#endif
