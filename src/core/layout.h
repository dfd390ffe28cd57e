/* SPDX-License-Identifier: Apache-2.0
 *
 * layout.h - who keeps which byte range of which layer. Pure arithmetic, the same on every rank.
 * Knows: tensors, ranks, placements, granules. Does not know: windows, time, addresses, transports.
 */
#ifndef LAYERSHARD_LAYOUT_H
#define LAYERSHARD_LAYOUT_H

#include "options.h"

#include <stdbool.h>

#define LAYOUT_ALIGNMENT 256u

/* Where a tensor lies in the packed layer. */
struct layout_tensor {
	char name[64];
	uint64_t offset;
	uint64_t bytes;
	lshard_stripe stripe;
	uint64_t rows;
	uint64_t column_bytes;
	bool granular; /* begins at a granule and is cut at granules; such tensors come first */
};

struct layout {
	uint32_t first_layer;
	uint32_t layers; /* N */
	int32_t size;    /* n */
	lshard_placement placement;
	uint64_t granule;
	uint32_t n_tensors;
	struct layout_tensor *tensors;
	uint64_t layer_bytes; /* packed, a multiple of the granule */
	uint64_t alignment;   /* the largest of a tensor's */
	bool composable;      /* every piece begins and ends at a granule: a layer can be mapped together from shards */
	uint64_t *shard_bytes_of; /* [n] */
	uint32_t *first_piece;    /* [N + 1] */
	lshard_piece *pieces;
};

/* Allocation by the caller's hooks. */
struct layout_memory {
	void *(*allocate)(void *user, size_t bytes); /* zeroed */
	void (*release)(void *user, void *pointer);
	void *user;
};

/*
 * Check the options and lay the series out for @p size ranks. On failure the text is in @p error and nothing is
 * allocated.
 */
lshard_status layout_open(struct layout *layout, const lshard_series_options *options, int32_t size, uint64_t granule,
			  const struct layout_memory *memory, lshard_error *error);
void layout_close(struct layout *layout, const struct layout_memory *memory);

/* Rank that loads and processes the layer at @p position: (first_layer + position) % n, whatever the placement. */
int32_t layout_source(const struct layout *layout, uint32_t position);

/*
 * How a stripe of @p rank of tensor @p tensor lies in the shard of that rank: the piece, for the layer at @p position.
 * NULL if empty.
 */
const lshard_piece *layout_stripe(const struct layout *layout, uint32_t position, uint32_t tensor, int32_t rank);

#endif
