/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_read.h - what `bench read` measures, as data: options, variants, works, samples.
 *
 * A variant is one kind of memory that holds the weights, the same in all of them. A work reads all weights of a
 * variant once. In each round every work is done with every variant, in a new order: what is compared lies a moment
 * apart. Rank 0 is the source of the shared weights and idle; rank 1 has the private ones, and reads.
 */
#ifndef BENCH_READ_H
#define BENCH_READ_H

#include "bench.h"
#include "bench_ranks.h"

#define READ_COLUMNS     4096u /* floats of a row, and rows of a matrix: as a layer of a language model has */
#define READ_ROW_BYTES   (READ_COLUMNS * (uint32_t)sizeof(float))
#define READ_LARGE_BYTES (UINT64_C(2) << 20)

enum { READ_SOURCE, READ_READER, READ_RANKS };

enum { READ_PRIVATE_SMALL, READ_PRIVATE_LARGE, READ_SHARED_SMALL, READ_SHARED_LARGE, READ_VARIANTS };

enum { READ_SUM_ONE, READ_SUM_ALL, READ_PRODUCT_ONE, READ_PRODUCT_ALL, READ_WORKS };

struct read_options {
	uint64_t bytes; /* of each variant; a multiple of READ_LARGE_BYTES */
	const char *transport;
	bool scatter; /* small pages are touched in no order before they are filled */
	uint32_t rounds;
	double least_to_large; /* shared to private, both in large pages; 0: any */
	double least_to_small; /* shared in large pages to private in small ones; 0: any */
	bool json;
	const char *save; /* NULL: nowhere */
	int argc;         /* of the bench, for what is saved */
	char **argv;
};

/* What a variant got. */
struct read_pages {
	char missing[640]; /* why it is not as it should be, and is not reported; "": it is */
	uint64_t large_bytes;
	uint64_t reserved_bytes; /* of these, in pages reserved by an administrator */
};

struct read_sample {
	double ns;
	uint64_t bits; /* that all variants must give: of the sum, or of the product's rows together */
};

struct read_opened {
	lshard_status status;
	char error[512];
};

/* Lies in memory that both ranks share. */
struct read_shared {
	struct bench_ranks ranks;
	struct read_opened opened[READ_VARIANTS][READ_RANKS];
	struct read_pages pages[READ_VARIANTS];
	char transport[128];
	uint32_t cores;
	bool in_place; /* else the reader has a window of its own */
	struct read_sample samples[];
};

struct read_bench {
	struct read_options options;
	char job[48];
	struct read_shared *shared;
	uint64_t shared_bytes;
};

static inline bool read_is_shared(uint32_t variant)
{
	return variant >= READ_SHARED_SMALL;
}

static inline bool read_is_large(uint32_t variant)
{
	return variant % 2 == 1;
}

static inline bool read_is_product(uint32_t work)
{
	return work >= READ_PRODUCT_ONE;
}

static inline bool read_is_by_all(uint32_t work)
{
	return work % 2 == 1;
}

/** "private" ("shared", "window"). */
const char *read_memory_name(const struct read_bench *bench, uint32_t variant);
uint64_t read_page_bytes(uint32_t variant);
struct read_sample *read_sample_at(const struct read_bench *bench, uint32_t work, uint32_t variant, uint32_t round);

/** Fills *options. CLI_DONE: go on, unless *help was printed; else a cli_exit after a message. */
int read_options_parse(int argc, char **argv, struct read_options *options, bool *help);

/* ---- The weights (bench_read_memory.c) ------------------------------------------------------------------------- */

/** Private memory in small or large pages, zeroed; NULL: none. Where large pages are refused, *pages says why. */
void *read_private_open(const struct read_options *options, bool large, struct read_pages *pages);
void read_private_close(void *memory, uint64_t bytes);
/** Look which pages it is in now; *pages says so if these are not the ones that the variant is of. */
void read_pages_look(const void *memory, uint64_t bytes, bool large, struct read_pages *pages);

/** What the machine is set to, the word in brackets where several may be; "?" where it has no such setting. */
void read_setting(const char *path, char *text, size_t bytes);
#define READ_SETTING_PRIVATE  "/sys/kernel/mm/transparent_hugepage/enabled"
#define READ_SETTING_SHARED   "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
#define READ_SETTING_RESERVED "/proc/sys/vm/nr_hugepages"

/* A series of one layer, whose source is READ_SOURCE. */
struct read_series {
	lshard_group *group;
	lshard_series *series;
};

/** Collective. *opened says how it went. */
void read_series_open(const struct read_bench *bench, int32_t rank, uint32_t variant, struct read_series *series,
		      struct read_opened *opened);
/** False: with the text in @p error. */
bool read_series_close(struct read_series *series, char *error, size_t bytes);

/* ---- Works (bench_read_work.c) --------------------------------------------------------------------------------- */

struct read_worker;
/** For weights of @p bytes; by all cores that this process may use. NULL: no memory. */
struct read_worker *read_worker_open(uint64_t bytes);
void read_worker_close(struct read_worker *worker);
uint32_t read_worker_cores(const struct read_worker *worker);
/** Do @p work once with the weights at @p memory. False: no thread could be made. */
bool read_worker_run(struct read_worker *worker, const void *memory, uint32_t work, struct read_sample *sample);

/* ---- A rank (bench_read_rank.c), and the result (bench_read_report.c) ------------------------------------------ */

/** Runs one rank; user is the struct read_bench. How it fails is told by shared->ranks. */
void read_rank_run(void *user, int32_t rank);
/** Prints and saves. Returns a cli_exit. */
int read_report(const struct read_bench *bench);

#endif
