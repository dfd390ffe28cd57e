/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_judge.c - from samples to ratios: every round's own, then their median, since a device drifts by more than
 * what is looked for. Knows: samples. Does not know: how they were taken, how they are printed.
 */
#include "bench_gemm_result.h"

#include <math.h>
#include <stdlib.h>

struct judge {
	const struct gemm_bench *bench;
	uint32_t tokens; /* index */
	double *scratch; /* [rounds] */
};

/* ---- One round ----------------------------------------------------------------------------------------------- */

/* @p ranks: of how many the slowest counts. */
static double slowest(const struct judge *judge, uint32_t arm, uint32_t round, uint32_t ranks)
{
	double most = 0;

	for (uint32_t rank = 0; rank < ranks; rank++)
		most = fmax(most, gemm_sample_at(judge->bench, judge->tokens, arm, rank, round)->pass_ns);
	return most;
}

/* Resident passes enclose the others of a round: half way between them is what it had with everything resident. */
static double pass_at(const struct judge *judge, uint32_t arm, uint32_t round, uint32_t ranks)
{
	if (arm != GEMM_ARM_FIRST)
		return slowest(judge, arm, round, ranks);
	return (slowest(judge, GEMM_ARM_FIRST, round, ranks) + slowest(judge, GEMM_ARM_LAST, round, ranks)) / 2;
}

/* Ranks that do not compute have no samples: zeros. A delayed arm is about the rank that is not delayed. */
static uint32_t ranks_of(const struct judge *judge, uint32_t arm)
{
	return judge->bench->arms[arm].delayed ? 1 : judge->bench->options.ranks;
}

/* ---- All rounds ---------------------------------------------------------------------------------------------- */

static int compare_doubles(const void *left, const void *right)
{
	const double a = *(const double *)left;
	const double b = *(const double *)right;

	return (a > b) - (a < b);
}

/* The interval by the binomial distribution of how many lie below the median, which needs no shape of the rest. */
static struct gemm_ratio ratio_of(double *ratios, uint32_t count)
{
	const double reach = 1.96 * sqrt((double)count) / 2;
	const double middle = ((double)count - 1) / 2;
	const double below = floor(middle - reach);
	const double above = ceil(middle + reach);
	struct gemm_ratio ratio;

	qsort(ratios, count, sizeof *ratios, compare_doubles);
	ratio.median = (ratios[(count - 1) / 2] + ratios[count / 2]) / 2;
	ratio.low = ratios[below < 0 ? 0 : (size_t)below];
	ratio.high = ratios[above > (double)count - 1 ? count - 1 : (size_t)above];
	return ratio;
}

static struct gemm_ratio compare(const struct judge *judge, uint32_t arm, uint32_t other, uint32_t copies)
{
	const uint32_t rounds = judge->bench->options.rounds;
	const uint32_t ranks = ranks_of(judge, arm);

	for (uint32_t round = 0; round < rounds; round++) {
		double base = pass_at(judge, other, round, ranks);

		if (copies != GEMM_NO_ARM)
			base = fmax(base, pass_at(judge, copies, round, ranks));
		judge->scratch[round] = base > 0 ? slowest(judge, arm, round, ranks) / base : 0;
	}
	return ratio_of(judge->scratch, rounds);
}

static struct bench_spread spread_of_arm(const struct judge *judge, uint32_t arm)
{
	for (uint32_t round = 0; round < judge->bench->options.rounds; round++)
		judge->scratch[round] = slowest(judge, arm, round, ranks_of(judge, arm));
	return bench_spread_of(judge->scratch, judge->bench->options.rounds);
}

/* The mean of all ranks of what was metered; below 0 where nothing was. */
static double metered(const struct judge *judge, uint32_t arm, double (*get)(const struct gemm_sample *sample))
{
	double sum = 0;
	uint32_t metered_ranks = 0;

	for (uint32_t rank = 0; rank < judge->bench->options.ranks; rank++) {
		size_t count = 0;

		for (uint32_t round = 0; round < judge->bench->options.rounds; round++) {
			const double value = get(gemm_sample_at(judge->bench, judge->tokens, arm, rank, round));

			if (value > 0)
				judge->scratch[count++] = value;
		}
		if (count > 0) {
			sum += bench_spread_of(judge->scratch, count).median;
			metered_ranks++;
		}
	}
	return metered_ranks ? sum / metered_ranks : -1;
}

static double sustained_ns(const struct gemm_sample *sample)
{
	return sample->sustained_ns;
}

static double sm_mhz(const struct gemm_sample *sample)
{
	return sample->sm_mhz;
}

static double watts(const struct gemm_sample *sample)
{
	return sample->watts;
}

/* Of the rank that lost most: what it stood, and by how much its compute took longer than with everything resident. */
static void take_apart(const struct judge *judge, uint32_t arm, struct gemm_row *row)
{
	row->stalled_ns = row->slowed_ns = -1;
	for (uint32_t rank = 0; rank < judge->bench->options.ranks; rank++) {
		double stalled[GEMM_SPLIT_ROUNDS], slowed[GEMM_SPLIT_ROUNDS];
		size_t count = 0;

		for (uint32_t round = 0; round < judge->bench->options.rounds && count < GEMM_SPLIT_ROUNDS; round++) {
			const struct gemm_sample *sample =
				gemm_sample_at(judge->bench, judge->tokens, arm, rank, round);
			const struct gemm_sample *resident =
				gemm_sample_at(judge->bench, judge->tokens, GEMM_ARM_FIRST, rank, round);

			if (sample->computed_ns <= 0)
				continue;
			stalled[count] = sample->stalled_ns - resident->stalled_ns;
			slowed[count++] = sample->computed_ns - resident->computed_ns;
		}
		if (count > 0) {
			const double stood = bench_spread_of(stalled, count).median;
			const double lost = bench_spread_of(slowed, count).median;

			if (rank == 0 || stood + lost > row->stalled_ns + row->slowed_ns) {
				row->stalled_ns = stood;
				row->slowed_ns = lost;
			}
		}
	}
}

static unsigned long long throttled(const struct judge *judge, uint32_t arm)
{
	unsigned long long reasons = 0;

	for (uint32_t rank = 0; rank < judge->bench->options.ranks; rank++)
		for (uint32_t round = 0; round < judge->bench->options.rounds; round++)
			reasons |= gemm_sample_at(judge->bench, judge->tokens, arm, rank, round)->throttled;
	return reasons;
}

static struct gemm_row judge_arm(const struct judge *judge, uint32_t index)
{
	const struct gemm_arm *arm = &judge->bench->arms[index];
	const struct gemm_ratio none = {-1, -1, -1};
	struct gemm_row row = {.arm = arm, .to_bound = none, .to_eager = none, .to_ours = none};

	row.pass_ns = spread_of_arm(judge, index);
	row.to_baseline = compare(judge, index, arm->baseline, GEMM_NO_ARM);
	if (arm->copies != GEMM_NO_ARM)
		row.to_bound = compare(judge, index, arm->baseline, arm->copies);
	if (arm->eager != GEMM_NO_ARM)
		row.to_eager = compare(judge, index, arm->eager, GEMM_NO_ARM);
	if (arm->ours != GEMM_NO_ARM)
		row.to_ours = compare(judge, index, arm->ours, GEMM_NO_ARM);
	row.is_split = arm->kind == GEMM_OVERLAPPED && !arm->graph && !arm->delayed;
	if (row.is_split)
		take_apart(judge, index, &row);
	row.throttled = throttled(judge, index);
	row.sustained_ns = metered(judge, index, sustained_ns);
	row.sm_mhz = metered(judge, index, sm_mhz);
	row.watts = metered(judge, index, watts);
	return row;
}

/* ---- All tables ---------------------------------------------------------------------------------------------- */

static bool judge_tokens(struct judge *judge, struct gemm_table *table)
{
	const struct gemm_bench *bench = judge->bench;
	double first, last;

	table->tokens = bench->options.tokens[judge->tokens];
	table->rows = calloc(bench->arm_count, sizeof *table->rows);
	if (!table->rows)
		return false;
	for (uint32_t arm = 0; arm < bench->arm_count; arm++)
		if (gemm_is_run(bench, &bench->arms[arm]))
			table->rows[table->row_count++] = judge_arm(judge, arm);
	first = table->rows[GEMM_ARM_FIRST].pass_ns.median;
	last = table->rows[GEMM_ARM_LAST].pass_ns.median;
	table->drift_percent = first > 0 ? fabs(last / first - 1) * 100 : 100;
	table->conclusive = table->drift_percent <= bench->options.margin_percent;
	return true;
}

bool gemm_judge(struct gemm_result *result, const struct gemm_bench *bench)
{
	struct judge judge = {.bench = bench, .scratch = calloc(bench->options.rounds, sizeof(double))};
	bool good = judge.scratch != NULL;

	*result = (struct gemm_result){.bench = bench, .conclusive = true};
	for (; good && judge.tokens < bench->options.token_count; judge.tokens++) {
		good = judge_tokens(&judge, &result->tables[judge.tokens]);
		result->conclusive &= result->tables[judge.tokens].conclusive;
	}
	free(judge.scratch);
	return good;
}

void gemm_result_free(struct gemm_result *result)
{
	for (uint32_t i = 0; i < GEMM_LIST_MOST; i++)
		free(result->tables[i].rows);
	*result = (struct gemm_result){.bench = NULL};
}

/* ---- Memory -------------------------------------------------------------------------------------------------- */

uint32_t gemm_ranks_on_first_device(const struct gemm_bench *bench)
{
	uint32_t count = 0;

	for (uint32_t rank = 0; rank < bench->options.ranks; rank++)
		count += bench->options.devices[rank] == bench->options.devices[0];
	return count;
}

uint64_t gemm_counted_bytes(const struct gemm_bench *bench, uint32_t series)
{
	uint64_t bytes = 0;

	for (uint32_t rank = 0; rank < bench->options.ranks; rank++) {
		const lshard_stats *stats = &bench->shared->results[rank].series[series].stats;

		if (bench->options.devices[rank] == bench->options.devices[0])
			bytes += stats->share_bytes + stats->window_bytes + stats->resident_bytes;
	}
	return bytes;
}
