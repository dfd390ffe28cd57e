/* SPDX-License-Identifier: Apache-2.0
 *
 * numa_ranks.h - ranks on a feigned machine of two nodes: what the system says of nodes, on which a rank runs, and the
 * calls that place memory; and what the kernel says of the memory that ranks read. The wrapped calls are linked by
 * CMakeLists.txt.
 */
#ifndef NUMA_RANKS_H
#define NUMA_RANKS_H

#include "threads.h"

#include <layershard/layershard.h>

#include <stdbool.h>
#include <stdint.h>

#define RANKS       4 /* 0 and 1 on the first node, 2 and 3 on the second */
#define LAYERS      6u
#define LAYER_BYTES UINT64_C(65536)
#define TIMEOUT_MS  30000

/* A call that places memory, and how many pages were there before it. */
struct placed {
	uint64_t bytes;
	int mode;
	unsigned long nodes;
	uint64_t pages_there;
};

/* What is feigned, and what the library has asked of it. */
struct machine {
	uint32_t nodes;   /* 0: as it is */
	uint32_t here;    /* on which this process runs */
	bool forbidden;   /* the calls that place memory */
	uint32_t full_of; /* 1: the second node has no memory left */
	struct placed placed[32];
	unsigned n_placed;
	unsigned policies; /* calls about the thread's own */
	int policy;        /* which was set last */
	bool reserves;     /* large pages are reserved: as far as can be seen here, small ones are */
	int filled_by;     /* the thread's policy while reserved pages were made; -1: none were */
	bool dies_copying;
	bool copying;
	uint64_t waits_ns; /* at most, for who copies */
};
extern struct machine machine;

long __real_syscall(long number, ...);

/* Of that memory: how many pages are there. */
uint64_t count_pages(void *memory, uint64_t bytes);
/* From now on this process is on that node of the feigned machine, where nothing has been asked for. */
void run_on(uint32_t node);

/* What ranks tell each other, in memory of all. */
struct noted {
	uint64_t inode[RANKS][LAYERS]; /* of the memory that a rank reads a layer in */
	uint64_t copied[RANKS];
	uint64_t kib[RANKS]; /* each rank's part of the pages of the series */
};

struct wish {
	const char *transport;
	lshard_numa numa;
	lshard_placement placement;
	lshard_poison poison;
	uint64_t resident_bytes;
	lshard_large_pages large_pages;
	uint64_t layer_bytes;
	uint32_t layers;
	bool alone;        /* rank 0 on its node; else two ranks are on each */
	int32_t dies;      /* this rank, after commit; -1: none */
	int32_t dies_late; /* this one, while it copies in an update */
	struct noted *noted;
};

/* Four ranks, two a node, one copy a node. */
extern const struct wish plain;

struct rank {
	const struct member *member;
	const struct wish *wish;
	uint64_t generation;
	lshard_group *group;
	lshard_series *series;
	char log[4096];
	char error[512];
};

lshard_status join(struct rank *rank, lshard_numa numa);
lshard_status create_series(struct rank *rank);
/* Created and filled. Why not: the group's error. */
lshard_status open_series(struct rank *rank);
/* join and open_series, as the wish says. Why not: rank->error. */
bool enter(struct rank *rank);
/* The layer's bytes, awaited; NULL: it does not come. */
void *look_at(struct rank *rank, uint32_t layer);
bool pass_is_right(struct rank *rank);
lshard_status update(struct rank *rank);
/* Also of what is not there. */
void leave(struct rank *rank);

/* Where the memory at @p address is mapped from, and how ("r--s"). */
uint64_t inode_at(const void *address, char *rights);
bool is_writable(const void *address);
/* This process's part of what is mapped by that name, and how many mappings there are. */
uint64_t part_of(const char *name, unsigned *mappings);

#endif
