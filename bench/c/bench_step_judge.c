/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_step_judge.c - from the samples of `bench step` to times per pass, beside what the planner says of the same
 * case. Knows: samples and the planner's answers. Does not know: how they were taken, how they are printed.
 */
#include "bench_step_result.h"

#include <math.h>

static const struct step_sample *slowest_at(const struct step_bench *bench, uint32_t arm, uint32_t round)
{
	const struct step_sample *slowest = step_sample_at(bench, arm, 0, round);

	for (int32_t rank = 1; rank < bench->options.ranks; rank++)
		if (step_sample_at(bench, arm, rank, round)->elapsed > slowest->elapsed)
			slowest = step_sample_at(bench, arm, rank, round);
	return slowest;
}

static struct arm_result result_of(const struct step_bench *bench, uint32_t arm, double *scratch)
{
	const uint32_t rounds = bench->options.rounds;
	struct arm_result result;

	for (uint32_t round = 0; round < rounds; round++)
		scratch[round] = slowest_at(bench, arm, round)->blocked;
	result.blocked = bench_spread_of(scratch, rounds).median;
	for (uint32_t round = 0; round < rounds; round++)
		scratch[round] = slowest_at(bench, arm, round)->link_busy;
	result.link_busy = bench_spread_of(scratch, rounds).median;
	for (uint32_t round = 0; round < rounds; round++)
		scratch[round] = slowest_at(bench, arm, round)->elapsed;
	result.elapsed = bench_spread_of(scratch, rounds);
	return result;
}

static struct bench_spread elapsed_of(const struct step_bench *bench, uint32_t arm, int32_t rank, double *scratch)
{
	for (uint32_t round = 0; round < bench->options.rounds; round++)
		scratch[round] = step_sample_at(bench, arm, rank, round)->elapsed;
	return bench_spread_of(scratch, bench->options.rounds);
}

static bool judge_case(struct step_result *result, uint32_t index, double *scratch)
{
	const struct step_bench *bench = result->bench;
	const struct step_case *one = &bench->cases[index];
	struct case_result *judged = &result->cases[index];
	const double step = result->first.median;

	judged->one = one;
	/* By the compute as this machine gave it, not as it was asked for: on a busy one they differ. */
	if (!step_predict(bench, one->series, (uint64_t)(step / bench->options.layers + 0.5), &judged->plan))
		return false;
	judged->transfers = result_of(bench, one->transfers, scratch);
	judged->overlapped = result_of(bench, one->overlapped, scratch);
	judged->serial = result_of(bench, one->serial, scratch);
	judged->exposed = judged->overlapped.elapsed.median - step;
	judged->stall = judged->overlapped.blocked;
	judged->link_share = judged->overlapped.link_busy / judged->overlapped.elapsed.median;
	judged->has_transfers = judged->plan.fetched_layers > 0;
	judged->hidden = judged->has_transfers ? 1 - judged->exposed / judged->transfers.elapsed.median : 0;
	judged->off_percent = (judged->exposed - (double)judged->plan.exposed_ns) / step * 100;
	if (fabs(judged->off_percent) > fabs(result->worst_off_percent))
		result->worst_off_percent = judged->off_percent;
	return true;
}

static void judge_slow(struct step_result *result, double *scratch)
{
	const struct step_bench *bench = result->bench;
	const int32_t last = bench->options.ranks - 1;

	for (unsigned way = 0; way < STEP_SLOW_WAYS; way++) {
		const struct step_slow *arms = &bench->slow[way];

		result->slow[way].way = way == STEP_SLOW_PULLS ? "one-sided" : "lockstep";
		result->slow[way].first_even = elapsed_of(bench, arms->even, 0, scratch);
		result->slow[way].last_even = elapsed_of(bench, arms->even, last, scratch);
		result->slow[way].first_delayed = elapsed_of(bench, arms->delayed, 0, scratch);
		result->slow[way].last_delayed = elapsed_of(bench, arms->delayed, last, scratch);
	}
}

bool step_judge(struct step_result *result, double *scratch)
{
	const struct step_bench *bench = result->bench;

	result->first = result_of(bench, STEP_ARM_FIRST, scratch).elapsed;
	result->last = result_of(bench, STEP_ARM_LAST, scratch).elapsed;
	result->control = result_of(bench, STEP_ARM_CONTROL, scratch).elapsed;
	result->drift_percent = fabs(result->last.median / result->first.median - 1) * 100;
	for (uint32_t index = 0; index < bench->case_count; index++)
		if (!judge_case(result, index, scratch))
			return false;
	if (bench->options.slow_percent > 0)
		judge_slow(result, scratch);
	return true;
}
