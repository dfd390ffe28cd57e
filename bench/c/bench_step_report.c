/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_step_report.c - the result of `bench step` as tables, and the verdict.
 * Knows: the result. Does not know: how it came about.
 */
#include "bench_save.h"
#include "bench_step_result.h"
#include "cli.h"

#include <math.h>
#include <stdlib.h>

#define COMMAND "step"

static double ms(double ns)
{
	return ns * 1e-6;
}

static void print_head(const struct step_result *result)
{
	const struct step_options *options = &result->bench->options;

	cli_paragraph(stdout, 0,
		      "A synthetic stack of %u layers of %llu bytes on %d ranks (threads), placement %s; %s. A layer's "
		      "compute is a model: %g us pass by the clock. Bytes come by '%s' over a throttled link. "
		      "Milliseconds per pass, medians of %u samples of %u passes in shuffled order; all bytes checked.",
		      options->layers, (unsigned long long)options->layer_bytes, (int)options->ranks,
		      cli_placement_name(options->placement),
		      options->all_compute ? "all ranks compute" : "rank 0 computes",
		      (double)options->compute_ns * 1e-3, options->transport, options->rounds, options->passes);
	printf("\n");
	cli_paragraph(
		stdout, 5,
		"  A  everything resident, no library: %.2f (%.2f to %.2f); again at the end of each round: %.2f, "
		"so the machine drifted by %.2f %%; the sharded program with everything resident: %.2f",
		ms(result->first.median), ms(result->first.least), ms(result->first.most), ms(result->last.median),
		result->drift_percent, ms(result->control.median));
	printf("  B  transfers alone\n"
	       "  C  overlapped (median, least..most)\n"
	       "  D  one after the other\n"
	       "  ratio: compute to transfers of a pass without residents; fetched: layers\n"
	       "  brought in a steady pass; exposed: C - A, of it stalled in wait; predicted: by\n"
	       "  the planner from A and the link; off: their difference in %% of A; hidden:\n"
	       "  1 - exposed / B, - where nothing moves\n\n");
}

static void add_row(struct cli_table *table, const struct step_result *result, const struct case_result *judged)
{
	const struct step_bench *bench = result->bench;

	if (bench->links[judged->one->link].ratio > 0)
		cli_table_cell(table, "%.2g", bench->links[judged->one->link].ratio);
	else
		cli_table_cell(table, "-");
	cli_table_cell(table, "%u", bench->series[judged->one->series].prefetch);
	cli_table_cell(table, "%u", judged->plan.residents);
	cli_table_cell(table, "%u", judged->plan.fetched_layers);
	cli_table_cell(table, "%u", judged->plan.windows);
	cli_table_cell(table, "%.2f", ms(judged->transfers.elapsed.median));
	cli_table_cell(table, "%.2f", ms(judged->overlapped.elapsed.median));
	cli_table_cell(table, "%.2f..%.2f", ms(judged->overlapped.elapsed.least), ms(judged->overlapped.elapsed.most));
	cli_table_cell(table, "%.2f", ms(judged->serial.elapsed.median));
	cli_table_cell(table, "%.2f", ms(judged->exposed));
	cli_table_cell(table, "%.2f", ms(judged->stall));
	cli_table_cell(table, "%.2f", ms((double)judged->plan.exposed_ns));
	cli_table_cell(table, "%+.1f%%", judged->off_percent);
	if (judged->has_transfers)
		cli_table_cell(table, "%.0f%%", judged->hidden * 100);
	else
		cli_table_cell(table, "-");
	cli_table_cell(table, "%.0f%%", judged->link_share * 100);
}

static bool print_cases(const struct step_result *result)
{
	struct cli_table *table = cli_table_create("ratio|k|resident|fetched|windows|B|C|least..most|D|exposed|stalled|"
						   "predicted|off|hidden|link busy");
	bool good;

	if (!table)
		return false;
	cli_table_keys(table, 3);
	for (uint32_t index = 0; index < result->bench->case_count; index++)
		add_row(table, result, &result->cases[index]);
	good = cli_table_print(table, stdout);
	cli_table_destroy(table);
	return good;
}

static bool print_slow(const struct step_result *result)
{
	const struct step_options *options = &result->bench->options;
	struct cli_table *table = cli_table_create("<way|rank 0 even|delayed|slow rank even|delayed|rank 0 pays");
	bool good;

	if (!table)
		return false;
	for (unsigned way = 0; way < STEP_SLOW_WAYS; way++) {
		const struct slow_result *slow = &result->slow[way];

		cli_table_cell(table, "%s", slow->way);
		cli_table_cell(table, "%.2f", ms(slow->first_even.median));
		cli_table_cell(table, "%.2f", ms(slow->first_delayed.median));
		cli_table_cell(table, "%.2f", ms(slow->last_even.median));
		cli_table_cell(table, "%.2f", ms(slow->last_delayed.median));
		cli_table_cell(table, "%+.1f%%",
			       (slow->first_delayed.median - slow->first_even.median) / result->first.median * 100);
	}
	printf("\n");
	cli_paragraph(stdout, 0,
		      "The first line again with all %d ranks computing, and rank %d losing %g %% of a step per pass.",
		      (int)options->ranks, (int)options->ranks - 1, options->slow_percent);
	printf("\n");
	good = cli_table_print(table, stdout);
	cli_table_destroy(table);
	return good;
}

static bool print_text(const struct step_result *result)
{
	print_head(result);
	if (print_cases(result) && (result->bench->options.slow_percent <= 0 || print_slow(result)))
		return cli_flush_output();
	cli_message(COMMAND ": no memory to print the result");
	return false;
}

static bool save(const struct step_result *result, bool conclusive)
{
	const struct step_options *options = &result->bench->options;
	json_t *root = options->save ? step_json(result, conclusive) : NULL;
	const bool good = !options->save || bench_save(options->save, options->argc, options->argv, NULL, root);

	json_decref(root);
	return good;
}

/* ---- The verdict --------------------------------------------------------------------------------------------- */

static int verdict(const struct step_result *result)
{
	const struct step_options *options = &result->bench->options;

	if (result->drift_percent > options->margin_percent) {
		cli_message(
			COMMAND
			": inconclusive: with everything resident, the last samples differ from the first by %.2f %%, "
			"more than %g %%. Something else uses this machine or its clock changes: end it, or give more "
			"--rounds or a longer --compute-us, or accept a larger --margin",
			result->drift_percent, options->margin_percent);
		return CLI_INCONCLUSIVE;
	}
	if (options->most_off_percent > 0 && fabs(result->worst_off_percent) > options->most_off_percent) {
		cli_message(COMMAND
			    ": the exposed time is off the predicted one by %+.1f %% of a step, more than %g %%",
			    result->worst_off_percent, options->most_off_percent);
		return CLI_FAILED;
	}
	return CLI_DONE;
}

int step_report(const struct step_bench *bench)
{
	struct step_result *result = calloc(1, sizeof *result);
	double *scratch = calloc(bench->options.rounds, sizeof *scratch);
	int code = CLI_FAILED;
	bool conclusive, good;

	if (!result || !scratch) {
		cli_message(COMMAND ": no memory for the result");
		goto free_scratch;
	}
	result->bench = bench;
	if (!step_judge(result, scratch)) {
		cli_message(COMMAND ": the planner refuses this stack");
		goto free_scratch;
	}
	conclusive = result->drift_percent <= bench->options.margin_percent;
	good = save(result, conclusive);
	good = (bench->options.json ? cli_json_print(step_json(result, conclusive)) == CLI_DONE : print_text(result)) &&
	       good;
	if (good)
		code = verdict(result);
free_scratch:
	free(scratch);
	free(result);
	return code;
}
