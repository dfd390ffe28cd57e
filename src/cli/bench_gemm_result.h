/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_result.h - what the samples of `bench step --devices` come to.
 */
#ifndef BENCH_GEMM_RESULT_H
#define BENCH_GEMM_RESULT_H

#include "bench_gemm.h"

#include <jansson.h>

/* Of the ratios of all rounds: the median and where it lies with 95 % probability, by their ranks. Below 0: none. */
struct gemm_ratio {
	double median;
	double low;
	double high;
};

/* One arm with one number of tokens. Times are those of the slowest rank, but of a delayed arm those of rank 0. */
struct gemm_row {
	const struct gemm_arm *arm;
	struct bench_spread pass_ns;
	struct gemm_ratio to_baseline;
	struct gemm_ratio to_bound; /* the longer of resident and copies alone */
	struct gemm_ratio to_eager;
	struct gemm_ratio to_ours; /* a rival's */
	bool is_split;             /* the two below are known; they may be a little below 0 */
	double stalled_ns;
	double slowed_ns;
	double sustained_ns; /* below 0, as the next two: not metered */
	double sm_mhz;
	double watts;
	unsigned long long throttled;
};

struct gemm_table {
	uint32_t tokens;
	double drift_percent; /* resident last against first */
	bool conclusive;
	uint32_t row_count;
	struct gemm_row *rows; /* [row_count] of the arms that were run */
};

struct gemm_result {
	const struct gemm_bench *bench;
	struct gemm_table tables[GEMM_LIST_MOST];
	bool conclusive;
};

/** False: no memory. Freed by gemm_result_free, also then. */
bool gemm_judge(struct gemm_result *result, const struct gemm_bench *bench);
void gemm_result_free(struct gemm_result *result);
/** Series as they lie in memory: of all ranks on the device of rank 0. */
uint64_t gemm_counted_bytes(const struct gemm_bench *bench, uint32_t series);
uint32_t gemm_ranks_on_first_device(const struct gemm_bench *bench);
/** (bench_gemm_json.c) The result, and the GPUs, as new references; NULL: no memory. */
json_t *gemm_result_json(const struct gemm_result *result);
json_t *gemm_gpus_json(const struct gemm_bench *bench);

#endif
