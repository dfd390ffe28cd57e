/* SPDX-License-Identifier: Apache-2.0
 *
 * large_pages.c - see large_pages.h. How: https://docs.kernel.org/admin-guide/mm/transhuge.html and madvise(2).
 */
#include "large_pages.h"
#include "numa.h"
#include "outside.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define SETTINGS "/sys/kernel/mm/transparent_hugepage/"
#define MIB      (UINT64_C(1) << 20)
#define LARGEST  (64 * MIB) /* where small pages have 64 KiB large ones have 512 MiB, which few series fill */

/* ---- What the system has --------------------------------------------------------------------------------------- */

/* The first line of one of its files; "" where there is none. */
static void read_setting(const char *path, char *text, size_t room)
{
	FILE *file = fopen(path, "re");

	text[0] = 0;
	if (!file)
		return;
	if (!fgets(text, (int)room, file))
		text[0] = 0;
	(void)fclose(file);
}

/* Of pages that may be reserved; a kernel need not have others, and /sys may be hidden. */
static unsigned long long reserved_page_bytes(void)
{
	FILE *file = fopen("/proc/meminfo", "re");
	unsigned long long kib = 0;
	char line[128];

	while (file && kib == 0 && fgets(line, sizeof line, file))
		if (sscanf(line, "Hugepagesize: %llu kB", &kib) != 1)
			kib = 0;
	if (file)
		(void)fclose(file);
	return kib * 1024;
}

uint64_t lshard__large_page_bytes(void)
{
	char text[32];
	unsigned long long bytes;

	read_setting(SETTINGS "hpage_pmd_size", text, sizeof text);
	if (sscanf(text, "%llu", &bytes) != 1)
		bytes = reserved_page_bytes();
	return (bytes & (bytes - 1)) == 0 && bytes <= LARGEST ? bytes : 0;
}

/* Bytes of the mapping at @p memory that lie in large pages, as /proc/self/smaps has it. */
static uint64_t count_large(const void *memory)
{
	FILE *file = fopen("/proc/self/smaps", "re");
	unsigned long long begin = 0, end = 0, kib, bytes = 0;
	int within = 0;
	char line[512];

	while (file && fgets(line, sizeof line, file)) {
		if (sscanf(line, "%llx-%llx ", &begin, &end) == 2)
			within = begin <= (uintptr_t)memory && (uintptr_t)memory < end;
		else if (within &&
			 (sscanf(line, "AnonHugePages: %llu kB", &kib) == 1 ||
			  sscanf(line, "ShmemPmdMapped: %llu kB", &kib) == 1 ||
			  sscanf(line, "Shared_Hugetlb: %llu kB", &kib) == 1 || /* of the caller's allocator */
			  sscanf(line, "Private_Hugetlb: %llu kB", &kib) == 1))
			bytes += kib * 1024;
	}
	if (file)
		(void)fclose(file);
	return bytes;
}

/* ---- Asking for them ------------------------------------------------------------------------------------------- */

/* Where nothing is, nothing is made large; where a fault may bring a large page, it does. */
static void touch(unsigned char *memory, uint64_t bytes, uint64_t page, uint32_t turns)
{
	const uint64_t small = (uint64_t)sysconf(_SC_PAGESIZE);

	for (uint64_t number = 0; number < bytes / page; number++) {
		const uint64_t turn = turns > 1 ? numa_turn(number, page / small, turns) : 0;

		((volatile unsigned char *)memory)[number * page + turn * small] = 0;
	}
}

/* 0, or the system's number for why not all became large. */
static int collapse(void *memory, uint64_t bytes)
{
	int tries = 3; /* EAGAIN: something held a page just then */
	int failed;

	do
		failed = madvise(memory, bytes, MADV_COLLAPSE) ? errno : 0;
	while (failed == EAGAIN && --tries > 0);
	if (failed == EINVAL && count_large(memory) >= bytes)
		return 0; /* a kernel that has no such call, and large pages all the same */
	return failed;
}

/* ---- In words -------------------------------------------------------------------------------------------------- */

static const char *reason_of(int failed)
{
	char text[64];

	if (prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1)
		return "the process has switched large pages off (PR_SET_THP_DISABLE)";
	if (failed == EINVAL && access(SETTINGS, F_OK))
		return "this kernel makes none but reserved ones (there is no " SETTINGS ")";
	read_setting(SETTINGS "shmem_enabled", text, sizeof text);
	if (strstr(text, "[deny]"))
		return SETTINGS "shmem_enabled is 'deny': set it to 'advise'";
	if (failed == EINVAL)
		return "Linux before 6.1 gives large pages where " SETTINGS "shmem_enabled is 'advise' (private "
		       "memory: enabled 'madvise')";
	return "no memory is left in large pages, or none that the process may have (its cgroup)";
}

static lshard_status tell_small(const struct large_pages_use *use, int failed, uint64_t bytes)
{
	const lshard_context *context = use->context;
	const uint64_t page = context->large_page_bytes;
	const unsigned long long mib = bytes / MIB;
	const char *why = reason_of(failed);
	char remedy[96] = "";

	if (use->reserved)
		snprintf(remedy, sizeof remedy, "; reserving %llu for this rank (sysctl vm.nr_hugepages) would do",
			 (unsigned long long)((bytes + page - 1) / page));
	if (context->large_pages == LSHARD_LARGE_PAGES_REQUIRE)
		return lshard_fail(use->error, LSHARD_ERR_NO_MEMORY,
				   "series '%s': %s of %llu MiB must be in large pages and cannot be: %s%s",
				   use->series, use->what, mib, why, remedy);
	context->log(context, LSHARD_LOG_INFO,
		     "series '%s': %s of %llu MiB in small pages, which a processor may read at 0.6 of the speed of "
		     "large ones: %s%s",
		     use->series, use->what, mib, why, remedy);
	return LSHARD_OK;
}

/* ---- Together -------------------------------------------------------------------------------------------------- */

uint64_t lshard__large_alignment(const lshard_context *context, uint64_t bytes, uint64_t least)
{
	const uint64_t page = context->large_page_bytes;

	return page > least && bytes >= page ? page : least;
}

struct large_pages_use lshard__large_buffers(const lshard_context *context, const lshard_store_plan *plan,
					     uint64_t pitch, lshard_error *error)
{
	return (struct large_pages_use){.context = context,
					.series = plan->name,
					.what = "windows",
					.error = error,
					.in_process = true,
					.idle_begin = (plan->windows - plan->spares) * pitch,
					.idle_bytes = plan->spares * pitch};
}

/* Those of @p page within @p bytes at @p memory; *whole is 0 where there are none. */
static unsigned char *whole_pages(void *memory, uint64_t bytes, uint64_t page, uint64_t *whole)
{
	const uint64_t before = -(uintptr_t)memory & (page - 1);

	*whole = bytes > before ? (bytes - before) & ~(page - 1) : 0;
	return (unsigned char *)memory + before;
}

static void advise(void *memory, uint64_t bytes, uint64_t page, int advice)
{
	uint64_t whole;
	unsigned char *first = whole_pages(memory, bytes, page, &whole);

	if (whole > 0)
		(void)madvise(first, whole, advice);
}

/* 0, or the system's number for what kept the whole large pages of a range from becoming such. */
static int enlarge(void *memory, uint64_t bytes, uint64_t page, uint32_t turns)
{
	uint64_t whole;
	unsigned char *first = whole_pages(memory, bytes, page, &whole);

	if (whole == 0)
		return 0;
	(void)madvise(first, whole, MADV_HUGEPAGE);
	touch(first, whole, page, turns);
	return collapse(first, whole);
}

/* Private memory comes in large pages as it is touched: it need not be before, and the wish is no more than one. */
static bool comes_by_itself(const struct large_pages_use *use)
{
	char text[64];

	if (!use->in_process || use->context->large_pages == LSHARD_LARGE_PAGES_REQUIRE)
		return false;
	read_setting(SETTINGS "enabled", text, sizeof text);
	return text[0] && !strstr(text, "[never]") && prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) != 1;
}

lshard_status lshard__make_large(const struct large_pages_use *use, void *memory, uint64_t bytes)
{
	const uint64_t page = use->context->large_page_bytes;
	const uint64_t idle_end = use->idle_begin + use->idle_bytes;
	int failed;

	if (use->context->large_pages == LSHARD_LARGE_PAGES_NEVER && bytes >= 2 * MIB) /* `enabled=always` gives some */
		advise(memory, bytes, (uint64_t)sysconf(_SC_PAGESIZE), MADV_NOHUGEPAGE);
	if (page == 0)
		return LSHARD_OK;
	if (comes_by_itself(use)) {
		advise(memory, bytes, page, MADV_HUGEPAGE);
		return LSHARD_OK;
	}
	failed = enlarge(memory, use->idle_bytes ? use->idle_begin : bytes, page, use->turns);
	if (use->idle_bytes && !failed)
		failed = enlarge((unsigned char *)memory + idle_end, bytes - idle_end, page, use->turns);
	return failed ? tell_small(use, failed, bytes) : LSHARD_OK;
}

/* A caller's allocator may have just the bytes. */
void *lshard__allocate_large(const struct large_pages_use *use, uint64_t bytes, uint64_t least, void **block)
{
	const lshard_context *context = use->context;
	uint64_t alignment = lshard__large_alignment(context, bytes, least);
	unsigned char *memory;

	*block = context->allocate(context, bytes + alignment - 1);
	if (!*block && alignment > least) {
		alignment = least;
		*block = context->allocate(context, bytes + alignment - 1);
	}
	if (!*block)
		return NULL;
	memory = (unsigned char *)*block + (-(uintptr_t)*block & (alignment - 1));
	return lshard__make_large(use, memory, bytes) == LSHARD_OK ? memory : NULL;
}
