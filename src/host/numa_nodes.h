/* SPDX-License-Identifier: Apache-2.0
 *
 * numa_nodes.h - the NUMA nodes of this machine, and which of them this process may use.
 * Knows what the system says of nodes; places nothing.
 */
#ifndef LAYERSHARD_NUMA_NODES_H
#define LAYERSHARD_NUMA_NODES_H

#include <stdbool.h>
#include <stdint.h>

#define NUMA_MOST 1024 /* as many as Linux can be built for */

/* A set of them, as the system's calls take it. */
struct numa_nodes {
	unsigned long words[NUMA_MOST / (8 * sizeof(unsigned long))];
};

bool numa_has(const struct numa_nodes *nodes, uint32_t node);
void numa_add(struct numa_nodes *nodes, uint32_t node);
uint32_t numa_count(const struct numa_nodes *nodes);

/*
 * Those with processors and memory on which this process may have pages: not a GPU's memory, which some machines show
 * as nodes. Node 0 alone where the system does not say.
 */
void numa_usable(struct numa_nodes *nodes);

/* Where the processor is that runs this thread; 0 where the system does not say. */
uint32_t numa_here(void);
/* The same, or where that is not usable the nearest node that is: memory for this thread comes there. */
uint32_t numa_home(void);

#endif
