/* SPDX-License-Identifier: Apache-2.0
 *
 * process_memory.h - the memory of this process as the kernel counts it.
 */
#ifndef PROCESS_MEMORY_H
#define PROCESS_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

struct process_memory {
	uint64_t private_bytes; /* pages nobody else maps */
	uint64_t pss_bytes;     /* proportional: those, and of each shared page its part */
};

/** Reads /proc/self/smaps_rollup. False when it is not there or not understood; *memory is written on success only. */
bool process_memory_read(struct process_memory *memory);

struct process_pages {
	uint64_t large_bytes;    /* in large pages of any kind, as far as this process has touched them */
	uint64_t reserved_bytes; /* of these in pages that were reserved: hugetlb */
};

/** Reads /proc/self/smaps, of the mappings that hold @p bytes at @p memory. False and *pages as above. */
bool process_pages_read(const void *memory, uint64_t bytes, struct process_pages *pages);

#endif
