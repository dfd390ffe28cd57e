/* SPDX-License-Identifier: Apache-2.0
 *
 * numa.h - on which NUMA nodes fresh memory comes. Knows addresses and the system's calls; does not know who reads.
 *
 * All are wishes: where a node is full the system takes another's memory, and where it forbids the calls (a container's
 * seccomp rules) pages come where they are first touched. Both are told in the log.
 */
#ifndef LAYERSHARD_NUMA_H
#define LAYERSHARD_NUMA_H

#include "numa_nodes.h"

#include <layershard/transport.h>

/* Where memory is to be. Zeroed: wherever it is first touched. */
struct numa_wish {
	enum { NUMA_ANYWHERE = 0, NUMA_ON_NODE, NUMA_INTERLEAVED } where;
	uint32_t node;           /* NUMA_ON_NODE */
	struct numa_nodes nodes; /* NUMA_INTERLEAVED */
	bool refused;            /* the system forbids it, which has been told */
};

/* Memory of a series, for texts. No wish: NULL. */
struct numa_use {
	const lshard_context *context;
	const char *series;
	const char *what; /* "shard" */
	struct numa_wish *wish;
};

/* What the group's options wish for the shard of a rank that runs on @p node. Nothing where there is but one node. */
struct numa_wish numa_wish_for(lshard_numa numa, uint32_t node);
/* "interleave" */
const char *numa_word(lshard_numa numa);
/* Write to the log what the options choose, where there is a choice, or they ask for one. */
void numa_tell(const lshard_context *context);

/*
 * Mapped memory of which no page is there yet: whole pages. Shared memory's wish is that of all who map it. Where the
 * system forbids it, the log is told once for the wish.
 */
void numa_bind(const struct numa_use *use, void *memory, uint64_t bytes);
/*
 * How many nodes take turns, page by page as the system counts them in the mapping; 1: none do. Large pages that are
 * made of one touched small page each must have that one touched at numa_turn, or all come on one node.
 */
uint32_t numa_turns(const struct numa_wish *wish);
/* Of which small page to touch first in large page @p number, of @p ratio small ones each, that nodes take turns. */
uint64_t numa_turn(uint64_t number, uint64_t ratio, uint32_t turns);

/* What this thread itself wishes, for pages that the system makes without looking at a mapping (fallocate). */
struct numa_policy {
	int kept; /* 0: nothing was changed */
	int mode;
	struct numa_nodes nodes;
};

void numa_policy_begin(const struct numa_wish *wish, struct numa_policy *before);
void numa_policy_end(const struct numa_policy *before);

/* Have this thread be the first to touch all pages, without changing what is there. */
void numa_touch(void *memory, uint64_t bytes);
/* The same where there is a wish; then see where they came, and tell the log where that is not as wished. */
void numa_settle(const struct numa_use *use, void *memory, uint64_t bytes);

#endif
