/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_step_result.h - the results that the samples of `bench step` give.
 *
 *   exposed      C - A: what of the transfers was not hidden behind compute, per pass
 *   stall        the part of it spent in lshard_wait
 *   hidden       1 - exposed / B; nothing where a steady pass fetches no layer: then there is nothing to hide
 *   off          measured less predicted exposed time, in per cent of a step (A)
 */
#ifndef BENCH_STEP_RESULT_H
#define BENCH_STEP_RESULT_H

#include "bench_step.h"

/* Of one variant: the slowest rank's time per pass, and what that rank waited and its link worked. Nanoseconds. */
struct variant_result {
	struct bench_spread elapsed;
	double blocked; /* medians */
	double link_busy;
};

struct case_result {
	const struct step_case *one;
	lshard_plan_result plan;
	struct variant_result transfers, overlapped, serial;
	double exposed;
	double stall;
	bool has_transfers;
	double hidden; /* 0 without transfers */
	double link_share;
	double off_percent;
};

/* One way of fetching layers with a slow rank: rank 0 and the slow one, without and with the delay. */
struct slow_result {
	const char *variant;
	struct bench_spread first_even, last_even, first_delayed, last_delayed;
};

struct step_result {
	const struct step_bench *bench;
	struct bench_spread first, last, control;
	double drift_percent;
	struct case_result cases[STEP_CASES_MOST];
	struct slow_result slow[STEP_SLOW_VARIANTS];
	double worst_off_percent;
};

/** From the samples of all ranks; @p scratch has room for one number per round. False: the planner refused. */
bool step_evaluate(struct step_result *result, double *scratch);
/** @p result as one object (bench_step_json.c). NULL: no memory. */
json_t *step_json(const struct step_result *result, bool conclusive);

#endif
