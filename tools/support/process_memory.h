/* SPDX-License-Identifier: Apache-2.0
 *
 * process_memory.h - the memory of this process as the kernel counts it.
 */
#ifndef PROCESS_MEMORY_H
#define PROCESS_MEMORY_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

struct process_memory {
	uint64_t private_bytes; /* pages nobody else maps, reserved ones (hugetlb) among them */
	uint64_t pss_bytes;     /* proportional: those, and of each other page, if it was not reserved, its part */
	/* Reserved pages mapped more than once, whole: in neither of the above, for the kernel tells nobody's part. */
	uint64_t shared_hugetlb_bytes;
	uint64_t large_bytes; /* mapped in large pages of any kind; shared ones count whole */
};

/** Reads /proc/self/smaps_rollup. False when it is not there or not understood; *memory is written on success only. */
bool process_memory_read(struct process_memory *memory);
/** The same of text like it: each amount stands there once, or it is not understood. */
bool process_memory_parse(FILE *rollup, struct process_memory *memory);

struct process_pages {
	uint64_t large_bytes;    /* in large pages of any kind, as far as this process has touched them */
	uint64_t reserved_bytes; /* of these in pages that were reserved: hugetlb */
};

/** Reads /proc/self/smaps, of the mappings that hold @p bytes at @p memory. False and *pages as above. */
bool process_pages_read(const void *memory, uint64_t bytes, struct process_pages *pages);

#endif
