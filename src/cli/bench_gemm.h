/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm.h - `bench step --devices`: passes over a stack of real layers on GPUs, as data.
 *
 * A layer is two linears in bfloat16, up and down; what is sharded is the weight of the second. Ranks are processes,
 * one per entry of --devices. An arm is one way of running passes; every round runs each arm once in a new order, but
 * for the resident one, which comes first and last and shows the drift.
 */
#ifndef BENCH_GEMM_H
#define BENCH_GEMM_H

#include "bench.h"
#include "bench_options.h"
#include "bench_ranks.h"

#define GEMM_RANKS_MOST   16u
#define GEMM_LIST_MOST    8u
#define GEMM_CASES_MOST   (GEMM_LIST_MOST * GEMM_LIST_MOST)
#define GEMM_SERIES_MOST  (GEMM_CASES_MOST + GEMM_LIST_MOST + 1)
#define GEMM_ARMS_MOST    (3 * GEMM_CASES_MOST + GEMM_LIST_MOST + 16)
#define GEMM_SPLIT_ROUNDS 9u /* of passes that are taken apart */
#define GEMM_TEXT_BYTES   512u

enum gemm_rival { GEMM_BROADCAST, GEMM_GATHER, GEMM_GATHER_CE, GEMM_PEER_COPY, GEMM_RIVALS };

enum gemm_kind { GEMM_RESIDENT, GEMM_CONTROL, GEMM_COPIES, GEMM_OVERLAPPED, GEMM_SERIAL, GEMM_RIVAL };
#define GEMM_EVERY_KIND ((1u << GEMM_RIVAL) - 1)

struct gemm_options {
	uint32_t devices[GEMM_RANKS_MOST];
	uint32_t ranks;
	uint32_t layers;
	uint32_t hidden; /* a layer is hidden -> inner -> hidden */
	uint32_t inner;
	uint32_t tokens[GEMM_LIST_MOST];
	uint32_t token_count;
	uint32_t prefetches[GEMM_LIST_MOST];
	uint32_t prefetch_count;
	struct bench_resident residents[GEMM_LIST_MOST];
	uint32_t resident_count;
	lshard_placement placement;
	const char *transport;
	uint32_t passes;
	uint32_t rounds;
	double warm_ms;
	bool graph;
	bool rivals[GEMM_RIVALS];
	uint32_t left_out; /* 1 << gemm_kind */
	double slow_percent;
	bool all_compute;
	double margin_percent;
	bool json;
	const char *save; /* NULL: nowhere */
};

/** Fills *options. CLI_DONE: go on, unless *help was printed; else a cli_exit after a message. */
int gemm_options_parse(int argc, char **argv, struct gemm_options *options, bool *help);
/** "broadcast", as --rivals takes it. */
const char *gemm_rival_name(enum gemm_rival rival);
/** "overlapped", as --only takes it and JSON names it; not of rivals. */
const char *gemm_kind_name(enum gemm_kind kind);
/** Does any device hold two ranks? */
bool gemm_shares_device(const struct gemm_options *options);
uint64_t gemm_layer_bytes(const struct gemm_options *options);

#define GEMM_NO_SERIES UINT32_MAX

struct gemm_arm {
	enum gemm_kind kind;
	uint32_t series;
	enum gemm_rival rival;
	bool graph;
	bool delayed;      /* the last rank has more to compute */
	uint32_t baseline; /* arm that its ratio is to; GEMM_ARM_FIRST stands for first and last */
	uint32_t copies;   /* arm B of its series; GEMM_NO_ARM */
	uint32_t eager;    /* of a graph: the arm that does the same without; GEMM_NO_ARM */
	uint32_t ours;     /* of a rival: the first overlapped arm; GEMM_NO_ARM */
};

#define GEMM_NO_ARM UINT32_MAX

enum { GEMM_ARM_FIRST, GEMM_ARM_LAST, GEMM_ARM_SHUFFLED };

struct gemm_series {
	uint32_t prefetch;
	uint32_t resident; /* index in options; GEMM_ALL_RESIDENT */
	uint64_t resident_bytes;
};

#define GEMM_ALL_RESIDENT UINT32_MAX

/* Of one rank and arm in one round; what was not measured is 0. */
struct gemm_sample {
	double pass_ns;
	double stalled_ns;  /* of a pass with marks: between layers */
	double computed_ns; /* and in them */
	/* of a long run without a break, in round 0; clock and power below 0 where they are not told */
	double sustained_ns;
	double sm_mhz;
	double watts;
	unsigned long long throttled; /* reasons, as NVML numbers them */
};

/* Host time of one reach and wait, nanoseconds; below 0: there was none. */
struct gemm_calls {
	double with_transfer;
	double worst_with_transfer;
	double without;
};

struct gemm_series_result {
	lshard_stats stats;
	int64_t device_bytes; /* what the driver has less of since before it was created, on this rank's device */
	struct gemm_calls calls;
};

struct gemm_rank_result {
	char device[96];
	char bus[32];
	int driver_version;
	int blas_version;
	bool has_meter;
	char transport[128];
	char refused[GEMM_RIVALS][GEMM_TEXT_BYTES]; /* why this rank cannot run a rival; "": it can */
	struct gemm_series_result series[GEMM_SERIES_MOST];
};

/* In memory that the ranks share. */
struct gemm_shared {
	struct bench_ranks ranks;
	double pass_ns[GEMM_ARMS_MOST]; /* roughly, with the present token count; told by rank 0 */
	char nccl_ids[2][128];          /* of the communicators without and with copy engines */
	int nccl_version;
	char ipc_handles[GEMM_RANKS_MOST][64]; /* of the ranks' stacks, for peer-copy */
	struct gemm_rank_result results[GEMM_RANKS_MOST];
	struct gemm_sample samples[]; /* [token counts][arms][ranks][rounds] */
};

struct gemm_bench {
	struct gemm_options options;
	struct gemm_series series[GEMM_SERIES_MOST];
	uint32_t series_count;
	struct gemm_arm arms[GEMM_ARMS_MOST];
	uint32_t arm_count;
	uint32_t control; /* arms */
	char job[64];
	uint64_t shared_bytes;
	struct gemm_shared *shared;
};

struct gemm_sample *gemm_sample_at(const struct gemm_bench *bench, uint32_t tokens, uint32_t arm, uint32_t rank,
				   uint32_t round);
/** How many passes of @p arm take @p ns, roughly: the same on all ranks, as some ways need them all. */
uint32_t gemm_passes_in(const struct gemm_bench *bench, uint32_t arm, double ns);
/** Does @p rank run passes? */
bool gemm_computes(const struct gemm_bench *bench, int32_t rank);
/** "C k=1", "broadcast, last rank delayed": for messages and tables. Returns @p text. */
const char *gemm_arm_text(const struct gemm_bench *bench, const struct gemm_arm *arm, char *text, size_t bytes);
/** Why @p rival is not run: the first rank's reason; "" if it is. */
const char *gemm_refused(const struct gemm_bench *bench, enum gemm_rival rival);
/** Is @p arm run? All but refused rivals are. */
bool gemm_is_run(const struct gemm_bench *bench, const struct gemm_arm *arm);
/** The series of the public API that @p series stands for. *tensor is filled and referred to. */
void gemm_series_options(const struct gemm_bench *bench, const struct gemm_series *series, lshard_tensor *tensor,
			 lshard_series_options *out);

/** One rank, in its own process (bench_gemm_rank.c); user is the struct gemm_bench. */
void gemm_rank_run(void *user, int32_t rank);
/** Prints and saves the result (bench_gemm_report.c). Returns a cli_exit. */
int gemm_report(const struct gemm_bench *bench, int argc, char **argv);

/** `bench step --devices ...`; argv[0] is "step". Returns a cli_exit. */
int bench_gemm(int argc, char **argv);

#endif
