/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_step_evaluate.c - from the samples of `bench step` to times per pass, beside what the planner says of the same
 * case. Knows: samples and the planner's answers. Does not know: how they were taken, how they are printed.
 */
#include "bench_step_result.h"

#include <math.h>

static const struct step_sample *slowest_at(const struct step_bench *bench, uint32_t variant, uint32_t round)
{
	const struct step_sample *slowest = step_sample_at(bench, variant, 0, round);

	for (int32_t rank = 1; rank < bench->options.ranks; rank++)
		if (step_sample_at(bench, variant, rank, round)->elapsed > slowest->elapsed)
			slowest = step_sample_at(bench, variant, rank, round);
	return slowest;
}

static struct variant_result result_of(const struct step_bench *bench, uint32_t variant, double *scratch)
{
	const uint32_t rounds = bench->options.rounds;
	struct variant_result result;

	for (uint32_t round = 0; round < rounds; round++)
		scratch[round] = slowest_at(bench, variant, round)->blocked;
	result.blocked = bench_spread_of(scratch, rounds).median;
	for (uint32_t round = 0; round < rounds; round++)
		scratch[round] = slowest_at(bench, variant, round)->link_busy;
	result.link_busy = bench_spread_of(scratch, rounds).median;
	for (uint32_t round = 0; round < rounds; round++)
		scratch[round] = slowest_at(bench, variant, round)->elapsed;
	result.elapsed = bench_spread_of(scratch, rounds);
	return result;
}

static struct bench_spread elapsed_of(const struct step_bench *bench, uint32_t variant, int32_t rank, double *scratch)
{
	for (uint32_t round = 0; round < bench->options.rounds; round++)
		scratch[round] = step_sample_at(bench, variant, rank, round)->elapsed;
	return bench_spread_of(scratch, bench->options.rounds);
}

static bool evaluate_case(struct step_result *result, uint32_t index, double *scratch)
{
	const struct step_bench *bench = result->bench;
	const struct step_case *one = &bench->cases[index];
	struct case_result *found = &result->cases[index];
	const double step = result->first.median;

	found->one = one;
	/* By the compute as this machine gave it, not as it was asked for: on a busy one they differ. */
	if (!step_predict(bench, one->series, (uint64_t)(step / bench->options.layers + 0.5), &found->plan))
		return false;
	found->transfers = result_of(bench, one->transfers, scratch);
	found->overlapped = result_of(bench, one->overlapped, scratch);
	found->serial = result_of(bench, one->serial, scratch);
	found->exposed = found->overlapped.elapsed.median - step;
	found->stall = found->overlapped.blocked;
	found->link_share = found->overlapped.link_busy / found->overlapped.elapsed.median;
	found->has_transfers = found->plan.fetched_layers > 0;
	found->hidden = found->has_transfers ? 1 - found->exposed / found->transfers.elapsed.median : 0;
	found->off_percent = (found->exposed - (double)found->plan.exposed_ns) / step * 100;
	if (fabs(found->off_percent) > fabs(result->worst_off_percent))
		result->worst_off_percent = found->off_percent;
	return true;
}

static void evaluate_slow(struct step_result *result, double *scratch)
{
	const struct step_bench *bench = result->bench;
	const int32_t last = bench->options.ranks - 1;

	for (unsigned variant = 0; variant < STEP_SLOW_VARIANTS; variant++) {
		const struct step_slow *variants = &bench->slow[variant];

		result->slow[variant].variant = variant == STEP_SLOW_ONE_SIDED ? "one-sided" : "lockstep";
		result->slow[variant].first_even = elapsed_of(bench, variants->even, 0, scratch);
		result->slow[variant].last_even = elapsed_of(bench, variants->even, last, scratch);
		result->slow[variant].first_delayed = elapsed_of(bench, variants->delayed, 0, scratch);
		result->slow[variant].last_delayed = elapsed_of(bench, variants->delayed, last, scratch);
	}
}

bool step_evaluate(struct step_result *result, double *scratch)
{
	const struct step_bench *bench = result->bench;

	result->first = result_of(bench, STEP_VARIANT_FIRST, scratch).elapsed;
	result->last = result_of(bench, STEP_VARIANT_LAST, scratch).elapsed;
	result->control = result_of(bench, STEP_VARIANT_CONTROL, scratch).elapsed;
	result->drift_percent = fabs(result->last.median / result->first.median - 1) * 100;
	for (uint32_t index = 0; index < bench->case_count; index++)
		if (!evaluate_case(result, index, scratch))
			return false;
	if (bench->options.slow_percent > 0)
		evaluate_slow(result, scratch);
	return true;
}
