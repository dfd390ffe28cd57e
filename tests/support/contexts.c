/* SPDX-License-Identifier: Apache-2.0
 *
 * contexts.c - see contexts.h.
 */
#include "contexts.h"

#include <stdatomic.h>
#include <stdlib.h>

static atomic_int outstanding;

static void *allocate(const lshard_context *context, size_t bytes)
{
	void *pointer = calloc(1, bytes);

	(void)context;
	if (pointer)
		atomic_fetch_add(&outstanding, 1);
	return pointer;
}

static void release(const lshard_context *context, void *pointer)
{
	(void)context;
	if (pointer)
		atomic_fetch_sub(&outstanding, 1);
	free(pointer);
}

static void stay_silent(const lshard_context *context, lshard_log_level level, const char *format, ...)
{
	(void)context;
	(void)level;
	(void)format;
}

static int never_forked(const lshard_context *context)
{
	(void)context;
	return 0;
}

lshard_context context_for_member(const struct member *member, const char *options, uint32_t timeout_ms)
{
	return (lshard_context){.struct_size = sizeof(lshard_context),
				.rank = member->rank,
				.size = member->size,
				.timeout_ms = timeout_ms,
				.memory = LSHARD_MEMORY_HOST,
				.options = options,
				.bootstrap = member->bootstrap,
				.allocate = allocate,
				.release = release,
				.log = stay_silent,
				.forked = never_forked};
}

int contexts_outstanding(void)
{
	return atomic_load(&outstanding);
}
