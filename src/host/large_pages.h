/* SPDX-License-Identifier: Apache-2.0
 *
 * large_pages.h - pages of 2 MiB for memory that is read layer by layer: a core reads small pages at 0.6 of the speed.
 * Knows addresses and the system's settings; does not know who reads.
 *
 * Linux 6.1 and later give them to a process that asks (MADV_COLLAPSE), unless the settings deny them; earlier ones
 * where the settings allow them, and kernels may be built without. Pages that an administrator has reserved are
 * shared_memory.h's to take.
 */
#ifndef LAYERSHARD_LARGE_PAGES_H
#define LAYERSHARD_LARGE_PAGES_H

#include <layershard/transport.h>

#include <stdbool.h>

/* Memory of a series, for texts: which pages it is to have, and where a failure is told. */
struct large_pages_use {
	const lshard_context *context;
	const char *series;
	const char *what; /* "shard" */
	lshard_error *error;
	bool in_process;     /* private memory: where the system gives it large pages by itself, asking is all */
	bool reserved;       /* reserved ones would do */
	uint32_t turns;      /* so many NUMA nodes take turns (numa.h); 0, 1: none do */
	uint64_t idle_begin; /* within it, */
	uint64_t idle_bytes; /* so much that may never be used, and takes no memory before it is */
};

/*
 * What memory of @p bytes should begin at a multiple of: a large page where it has room for one and the group wants
 * them, else @p least.
 */
uint64_t lshard__large_alignment(const lshard_context *context, uint64_t bytes, uint64_t least);

/* That of the buffers of @p plan in private memory, @p pitch apart: spares are idle. */
struct large_pages_use lshard__large_buffers(const lshard_context *context, const lshard_store_plan *plan,
					     uint64_t pitch, lshard_error *error);

/*
 * Have the whole large pages within @p bytes at @p memory be large, or none of them, as the group's options say. The
 * memory is fresh, and writable; a byte of each page becomes 0.
 * @return OK, also where there are none to be had, which the log then tells; NO_MEMORY where the group requires them.
 */
lshard_status lshard__make_large(const struct large_pages_use *use, void *memory, uint64_t bytes);

/*
 * @p bytes from the context's allocator, zeroed, at a multiple of @p least, which divides a large page, and made large
 * as above. NULL where that fails; *block, unless it is NULL, must be given back also then.
 */
void *lshard__allocate_large(const struct large_pages_use *use, uint64_t bytes, uint64_t least, void **block);

#endif
