/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_link.h - what `bench link` measures, as data: how fast a layer is fetched from another rank by the library's
 * own path, beside a bare copy of as many bytes in the same rounds.
 *
 * Each size has a series of 2n layers with one window. Rank r fetches layer s and layer s + n in turn, both of source s
 * (STRIPED: of all ranks): as the window holds only one, every reach + wait is one fetch. A variant is one way of
 * moving bytes between certain ranks; every round runs every variant once, in a new order, while the ranks that have no
 * part in it are idle.
 */
#ifndef BENCH_LINK_H
#define BENCH_LINK_H

#include "bench.h"
#include "bench_ranks.h"

#define LINK_RANKS_MOST       8u
#define LINK_SIZES_MOST       24u
#define LINK_PLACEMENTS_MOST  2u
#define LINK_SERIES_MOST      (LINK_SIZES_MOST * LINK_PLACEMENTS_MOST)
#define LINK_PAIRS_MOST       (LINK_RANKS_MOST * (LINK_RANKS_MOST - 1))
#define LINK_VARIANTS_OF_SIZE (LINK_PLACEMENTS_MOST * 2 * (LINK_PAIRS_MOST + 1) + LINK_RANKS_MOST)
#define LINK_VARIANTS_MOST    (LINK_SIZES_MOST * LINK_VARIANTS_OF_SIZE)

struct link_options {
	bool has_devices; /* GPUs; else host memory */
	uint32_t devices[LINK_RANKS_MOST];
	int32_t ranks;
	uint32_t wanted_ranks; /* --ranks; 0: not given */
	const char *transport;
	lshard_placement placements[LINK_PLACEMENTS_MOST];
	uint32_t placement_count;
	uint64_t least_bytes;
	uint64_t most_bytes;
	uint32_t factor;
	uint32_t iterations; /* of a sample */
	uint32_t warm_up;
	uint32_t rounds;
	uint32_t readers; /* the last so many ranks read from rank 0 at once; 0: not measured */
	bool json;
	const char *save; /* NULL: nowhere */
};

/** Fills *options. CLI_DONE: go on, unless *help was printed; else a cli_exit after a message. */
int link_options_parse(int argc, char **argv, struct link_options *options, bool *help);

enum link_kind { LINK_FETCH, LINK_BARE };

#define LINK_ALL (-1) /* as a source: every other rank gives its part */

struct link_variant {
	enum link_kind kind;
	uint32_t placement; /* index in options */
	uint32_t size;
	int32_t from;     /* LINK_ALL; the rank itself: a copy inside its memory */
	int32_t first_to; /* ranks first_to .. first_to + to_count - 1 read at once */
	int32_t to_count;
	bool is_readers;
};

/* One line of the table. */
struct link_row {
	uint32_t fetch; /* variants; LINK_NO_VARIANT: a copy inside one memory has none */
	uint32_t bare;
};

#define LINK_NO_VARIANT UINT32_MAX

/* Of one rank in one round. */
struct link_sample {
	double each_ns;  /* of one after the other, per fetch or copy */
	double alone_ns; /* of a single one, by the host's clock, from the call until the bytes are there */
	uint64_t moved;  /* bytes of one fetch that came from other ranks, or of one copy */
};

/* What a rank tells of its place. */
struct link_place {
	char device[96]; /* "": host memory */
	char bus[32];
	int driver_version;
	char transport[128];
};

/* In memory that the ranks share. */
struct link_shared {
	struct bench_ranks ranks;
	struct link_place places[LINK_RANKS_MOST];
	struct link_sample samples[]; /* [variants][ranks][rounds] */
};

struct link_bench {
	struct link_options options;
	char job[48];
	uint64_t sizes[LINK_SIZES_MOST];
	uint32_t size_count;
	struct link_variant *variants; /* [LINK_VARIANTS_MOST] */
	uint32_t variant_count;
	struct link_row *rows; /* [LINK_VARIANTS_MOST] */
	uint32_t row_count;
	uint64_t shared_bytes;
	struct link_shared *shared;
	unsigned char *sources[LINK_RANKS_MOST]; /* host memory: what bare copies read of each rank */
	int mail[LINK_RANKS_MOST][2];            /* GPUs: descriptors for rank r are written to [1], read from [0] */
	struct bench_circle circle;              /* of ranks that are threads */
};

struct link_sample *link_sample_at(const struct link_bench *bench, uint32_t variant, int32_t rank, uint32_t round);
uint64_t link_biggest(const struct link_bench *bench);
/** Bytes of the memory that bare copies read: two of the biggest layer, with what the granules of stripes add to it. */
uint64_t link_block_bytes(const struct link_bench *bench);

/** One rank, in its own process or thread (bench_link_rank.c); user is the struct link_bench. */
void link_rank_run(void *user, int32_t rank);

/* ---- What bare copies go between (bench_link_bare.c) ---- */

struct link_gpu;
struct link_bare;

/**
 * This rank's own memory to copy from, the others' as seen from here, and memory to copy to. Every rank calls it; on
 * failure the text is in bench->shared->ranks. @p gpu: NULL for host memory. NULL: failed.
 */
struct link_bare *link_bare_open(struct link_bench *bench, int32_t rank, struct link_gpu *gpu, void *stream);
void link_bare_close(struct link_bare *bare);
/**
 * Enqueue (host memory: do) a bare copy of @p bytes from rank @p from, or LINK_ALL: equal parts of all others; from two
 * places in turn, as fetches read two layers in turn: one place would be read from a cache. False: the text is in
 * gpu->error.text.
 */
bool link_bare_copy(struct link_bare *bare, int32_t from, uint64_t bytes);
/** Copy the whole block of @p from and compare every byte. False: the text is in bench->shared->ranks. */
bool link_bare_check(struct link_bare *bare, int32_t from);

/** Prints and saves the result (bench_link_report.c). Returns a cli_exit. */
int link_report(const struct link_bench *bench, int argc, char **argv);

#endif
