/* SPDX-License-Identifier: Apache-2.0
 *
 * shared_memory.h - memory of one rank that the others map to read.
 * Knows pages, seals and whose memory it is; knows nothing of what lies there.
 *
 * A shard is a sealed memfd: its size is fixed, and the owner's mapping, made before the seal, is the only writable one
 * there can ever be. The pages live as long as anybody maps them, also when their owner has died and descriptors are
 * closed.
 */
#ifndef LAYERSHARD_SHARED_MEMORY_H
#define LAYERSHARD_SHARED_MEMORY_H

#include "numa.h"

#include <layershard/transport.h>

#include <stdbool.h>

/* For the names of mappings and for texts; where failures are told; which pages memory is made of. */
struct sharing {
	const lshard_context *context;
	const char *series;
	lshard_error *error;
	bool reserved; /* large pages that are reserved (hugetlb) will do: what is mapped begins and ends at them */
	uint64_t idle_begin; /* as in large_pages.h */
	uint64_t idle_bytes;
	struct numa_wish *wish; /* none of it is idle where there is one; NULL: none */
};

/* Whole pages; of large ones it begins at one. */
struct shared_memory {
	void *address; /* NULL: none */
	size_t bytes;
};

size_t shared_whole_pages(uint64_t bytes);
/* A range of addresses for mappings, at a multiple of a large page where it has room for one; nothing is there yet. */
lshard_status shared_reserve(const struct sharing *sharing, const char *what, uint64_t bytes,
			     struct shared_memory *memory);

/*
 * @p bytes of memory for @p what, zeroed, writable, and its descriptor, -1 or one to be closed also on failure. In
 * large pages as the group's options say: reserved ones first, if rounding up to them adds no more than 1/16.
 */
lshard_status shared_make(const struct sharing *sharing, const char *what, uint64_t bytes, struct shared_memory *memory,
			  int *fd);
/* The same for what only this rank may ever write, as its shard, which is sealed; none where it has no bytes. */
lshard_status shared_make_sealed(const struct sharing *sharing, const char *what, uint64_t bytes,
				 struct shared_memory *memory, int *fd);
/* Map to be read what @p rank made so of @p bytes; nothing where that is 0. MISMATCH where it is none. */
lshard_status shared_map_sealed(const struct sharing *sharing, int32_t rank, int fd, uint64_t bytes,
				struct shared_memory *memory);
void shared_unmap(const struct shared_memory *memory);

/*
 * Until when the ranks of a store wait for each other: the group's time, and a second for each 256 MiB that the one
 * with most has to make, as large pages, and those that are placed on nodes, are cleared when they are made and not
 * when they are first used. @p more: what else a rank makes.
 */
uint64_t shared_deadline(const lshard_context *context, const lshard_store_plan *plan, uint64_t more);

/* The failure that errno tells of @p bytes bytes for @p what. */
lshard_status shared_refused(const struct sharing *sharing, const char *what, uint64_t bytes);

#endif
