/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_step.h - what `bench step` measures, as data: options, links, series, variants, cases, samples.
 *
 * A variant is one way of running passes over the stack. Every round runs every variant once, in a new order, but for A
 * (replicated, no library), which runs first and last in each round: the difference of the two is the drift of
 * the machine.
 *
 *   A  replicated, no library       B  transfers alone          control  the sharded program, everything resident
 *   C  overlapped                   D  one after the other
 */
#ifndef BENCH_STEP_H
#define BENCH_STEP_H

#include "bench.h"
#include "bench_options.h"

#include <layershard/plan.h>

#define STEP_LIST_MOST     8u
#define STEP_LINKS_MOST    (STEP_LIST_MOST + 1)
#define STEP_SERIES_MOST   256u
#define STEP_CASES_MOST    128u
#define STEP_VARIANTS_MOST 384u
#define STEP_SPEC_BYTES    256u

struct step_options {
	uint32_t layers;
	uint64_t layer_bytes;
	uint64_t compute_ns;
	int32_t ranks;
	lshard_placement placement;
	const char *transport;
	uint32_t prefetches[STEP_LIST_MOST];
	uint32_t prefetch_count;
	struct bench_resident residents[STEP_LIST_MOST];
	uint32_t resident_count;
	double ratios[STEP_LIST_MOST];
	uint32_t ratio_count;
	uint64_t link_bytes_per_s; /* 0: by the ratios */
	uint32_t passes;           /* of a sample */
	uint32_t rounds;
	double slow_percent; /* 0: no slow rank */
	bool all_compute;
	double margin_percent;
	double most_off_percent; /* 0: not found */
	bool json;
	const char *save; /* NULL: nowhere */
	int argc;         /* of the bench, for what is saved */
	char **argv;
};

/** Fills *options. CLI_DONE: go on, unless *help was printed; else a cli_exit after a message. */
int step_options_parse(int argc, char **argv, struct step_options *options, bool *help);

/* A group of all ranks behind one throttle. */
struct step_link {
	char spec[STEP_SPEC_BYTES];
	double ratio;         /* compute of a pass : transfers of a pass without residents; 0: there are none */
	uint64_t bytes_per_s; /* 0: no throttle, as there is one rank and nothing to fetch */
	bool collective;
};

struct step_series {
	uint32_t link;
	uint32_t prefetch;
	uint64_t resident_bytes;
};

enum step_kind { STEP_REPLICATED, STEP_CONTROL, STEP_TRANSFERS, STEP_OVERLAPPED, STEP_SERIAL };

#define STEP_NO_SERIES UINT32_MAX

struct step_variant {
	enum step_kind kind;
	uint32_t series;   /* STEP_NO_SERIES: the rank's own copy of the stack */
	bool all;          /* every rank runs passes, not rank 0 alone */
	uint64_t delay_ns; /* the last rank loses that much in every pass */
};

enum { STEP_VARIANT_FIRST, STEP_VARIANT_LAST, STEP_VARIANT_CONTROL, STEP_VARIANT_SHUFFLED = STEP_VARIANT_CONTROL };

/* One line of the table. */
struct step_case {
	uint32_t link;
	uint32_t resident; /* index in options */
	uint32_t series;
	uint32_t transfers; /* variants */
	uint32_t overlapped;
	uint32_t serial;
};

enum { STEP_SLOW_ONE_SIDED, STEP_SLOW_LOCKSTEP, STEP_SLOW_VARIANTS };

/* Variants of one way of fetching layers with a slow rank: without and with its delay. */
struct step_slow {
	uint32_t even;
	uint32_t delayed;
};

/* Per pass, nanoseconds. */
struct step_sample {
	double elapsed;
	double blocked; /* in lshard_wait */
	double link_busy;
};

struct step_bench {
	struct step_options options;
	struct step_link links[STEP_LINKS_MOST];
	uint32_t link_count;
	struct step_series series[STEP_SERIES_MOST];
	uint32_t series_count;
	struct step_variant variants[STEP_VARIANTS_MOST];
	uint32_t variant_count;
	struct step_case cases[STEP_CASES_MOST];
	uint32_t case_count;
	struct step_slow slow[STEP_SLOW_VARIANTS];
	struct bench_circle circle;
	struct step_sample *samples;          /* [variants][ranks][rounds] */
	lshard_stats stats[STEP_SERIES_MOST]; /* of rank 0, at the end */
};

/** The series of the public API that @p series stands for. *tensor is filled and referred to. */
void step_series_options(const struct step_bench *bench, uint32_t series, lshard_tensor *tensor,
			 lshard_series_options *out);
/**
 * What the planner says of @p series on its link when a layer computes for @p compute_ns, for the slowest of the ranks
 * that compute. False: it refused.
 */
bool step_predict(const struct step_bench *bench, uint32_t series, uint64_t compute_ns, lshard_plan_result *plan);
struct step_sample *step_sample_at(const struct step_bench *bench, uint32_t variant, int32_t rank, uint32_t round);

/** Run all rounds on all ranks (bench_step_rank.c). False: the text is in bench->circle.failure. */
bool step_ranks_run(struct step_bench *bench);

/** Prints the result (bench_step_report.c). Returns a cli_exit. */
int step_report(const struct step_bench *bench);

#endif
