/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_read_memory.c - the weights that `bench read` reads: in private memory, and in a series of the library.
 * Knows: the public header, mappings, the pages that the kernel says they have. Does not know: how they are read.
 */
#include "bench_read.h"
#include "cli.h"
#include "process_memory.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif

#define TIMEOUT_MS 60000

/* ---- Scattered pages ------------------------------------------------------------------------------------------- */

/*
 * A fresh mapping that is filled from its beginning to its end often gets pages that lie one behind the other, which
 * processors read faster than others. Touched in no order they lie scattered, as where memory has long been in use.
 * False: no memory for the order.
 */
static bool scatter(unsigned char *memory, uint64_t bytes)
{
	const uint64_t page = read_page_bytes(READ_PRIVATE_SMALL);
	const uint32_t count = (uint32_t)(bytes / page);
	uint32_t *order = calloc(count, sizeof *order);
	uint64_t random = 1;

	if (!order)
		return false;
	for (uint32_t i = 0; i < count; i++)
		order[i] = i;
	bench_shuffle(order, count, &random);
	for (uint32_t i = 0; i < count; i++)
		((volatile unsigned char *)memory)[order[i] * page] = 0;
	free(order);
	return true;
}

/* ---- Private memory -------------------------------------------------------------------------------------------- */

/* It begins at a large page: what is mapped too much is given back. */
static unsigned char *map_aligned(uint64_t bytes)
{
	const size_t more = (size_t)(bytes + READ_LARGE_BYTES);
	unsigned char *mapped = mmap(NULL, more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const size_t before = (size_t)(-(uintptr_t)mapped % READ_LARGE_BYTES);

	if (mapped == MAP_FAILED)
		return NULL;
	if (before > 0)
		munmap(mapped, before);
	munmap(mapped + before + bytes, (size_t)READ_LARGE_BYTES - before);
	return mapped + before;
}

/* A fault brings a large page where the settings allow it; else the kernel is asked for each that was touched. */
static void ask_for_large(unsigned char *memory, uint64_t bytes, struct read_pages *pages)
{
	int tries = 3;
	int refused;

	(void)madvise(memory, (size_t)bytes, MADV_HUGEPAGE);
	for (uint64_t offset = 0; offset < bytes; offset += READ_LARGE_BYTES)
		((volatile unsigned char *)memory)[offset] = 0;
	while ((refused = madvise(memory, (size_t)bytes, MADV_COLLAPSE) != 0 ? errno : 0) == EAGAIN && tries-- > 0) {
	} /* something held a page just then */
	/* An older kernel has no such call, and perhaps gave large pages all the same. */
	if (refused != 0 && refused != EINVAL)
		snprintf(pages->missing, sizeof pages->missing, "the kernel refuses to make large pages: %s",
			 strerror(refused));
}

void *read_private_open(const struct read_options *options, bool large, struct read_pages *pages)
{
	unsigned char *memory = map_aligned(options->bytes);

	if (!memory)
		return NULL;
	if (large) {
		ask_for_large(memory, options->bytes, pages);
		return memory;
	}
	(void)madvise(memory, (size_t)options->bytes, MADV_NOHUGEPAGE);
	if (!options->scatter || scatter(memory, options->bytes))
		return memory;
	read_private_close(memory, options->bytes);
	return NULL;
}

void read_private_close(void *memory, uint64_t bytes)
{
	if (memory)
		munmap(memory, (size_t)bytes);
}

void read_pages_look(const void *memory, uint64_t bytes, bool large, struct read_pages *pages)
{
	struct process_pages found;

	if (*pages->missing)
		return;
	if (!process_pages_read(memory, bytes, &found)) {
		snprintf(pages->missing, sizeof pages->missing, "/proc/self/smaps does not tell which pages it has");
		return;
	}
	pages->large_bytes = found.large_bytes;
	pages->reserved_bytes = found.reserved_bytes;
	if (large ? found.large_bytes < bytes : found.large_bytes > 0)
		snprintf(pages->missing, sizeof pages->missing, "%llu of %llu MiB are in large pages",
			 (unsigned long long)(found.large_bytes >> 20), (unsigned long long)(bytes >> 20));
}

void read_setting(const char *path, char *text, size_t bytes)
{
	FILE *file = fopen(path, "re");
	char line[128];
	char chosen[64];

	snprintf(text, bytes, "?");
	if (!file)
		return;
	if (fgets(line, sizeof line, file) &&
	    (sscanf(line, "%*[^[][%63[^]]", chosen) == 1 || sscanf(line, "[%63[^]]", chosen) == 1 ||
	     sscanf(line, "%63s", chosen) == 1))
		snprintf(text, bytes, "%s", chosen);
	(void)fclose(file);
}

/* ---- A series -------------------------------------------------------------------------------------------------- */

static void join_group(const struct read_bench *bench, int32_t rank, uint32_t variant, struct read_series *series,
		       struct read_opened *opened)
{
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;
	char job[64];

	snprintf(job, sizeof job, "%s-%u", bench->job, variant);
	options.rank = rank;
	options.size = READ_RANKS;
	options.transport = bench->options.transport;
	options.job = job;
	options.timeout_ms = TIMEOUT_MS;
	options.large_pages = read_is_large(variant) ? LSHARD_LARGE_PAGES_REQUIRE : LSHARD_LARGE_PAGES_NEVER;
	options.error = opened->error;
	options.error_bytes = sizeof opened->error;
	opened->status = lshard_group_create(&options, &series->group);
}

static void take_error(struct read_opened *opened, lshard_status status, const char *error)
{
	opened->status = status;
	if (status != LSHARD_OK)
		snprintf(opened->error, sizeof opened->error, "%s", error);
}

/* One layer, which is rank 0's. */
static void create_series(const struct read_bench *bench, struct read_series *series, struct read_opened *opened)
{
	const lshard_tensor tensor = {"weight", bench->options.bytes, 0, LSHARD_STRIPE_BYTES, 0, 0};
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;

	options.name = "read";
	options.layer_count = 1;
	options.tensors = &tensor;
	options.tensor_count = 1;
	options.prefetch = 0;
	take_error(opened, lshard_series_create(series->group, &options, &series->series),
		   lshard_group_error(series->group));
}

struct load {
	uint64_t bytes;
	bool scatter;
};

static int post_process(void *user, uint32_t layer, void *const *tensors)
{
	struct load *load = user;

	if (load->scatter && !scatter(tensors[0], load->bytes))
		return -1;
	return bench_post_process(&load->bytes, layer, tensors);
}

void read_series_open(const struct read_bench *bench, int32_t rank, uint32_t variant, struct read_series *series,
		      struct read_opened *opened)
{
	struct load load = {bench->options.bytes, bench->options.scatter && !read_is_large(variant)};

	join_group(bench, rank, variant, series, opened);
	if (opened->status == LSHARD_OK)
		create_series(bench, series, opened);
	if (opened->status == LSHARD_OK)
		take_error(opened, lshard_series_commit(series->series, post_process, &load),
			   lshard_series_error(series->series));
}

bool read_series_close(struct read_series *series, char *error, size_t bytes)
{
	bool good;

	lshard_series_destroy(series->series);
	good = cli_group_leave(series->group, error, bytes) >= 0;
	*series = (struct read_series){NULL, NULL};
	return good;
}
