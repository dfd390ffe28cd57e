/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_step_report.c - the result of `bench step` as tables, and the exit status.
 * Knows: the result. Does not know: how it was measured.
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
		      "compute is a model: %g us pass by the clock. Layers are fetched by '%s' over a throttled link. "
		      "Milliseconds per pass, medians of %u samples (passes in each: %u) in shuffled order; all bytes "
		      "checked.",
		      options->layers, (unsigned long long)options->layer_bytes, (int)options->ranks,
		      cli_placement_name(options->placement),
		      options->all_compute ? "all ranks compute" : "rank 0 computes",
		      (double)options->compute_ns * 1e-3, options->transport, options->rounds, options->passes);
	printf("\n");
	cli_paragraph(stdout, 5,
		      "  A  replicated, no library: %.2f (%.2f to %.2f); again at the end of each round: %.2f, "
		      "so the machine drifted by %.2f %%; the sharded program with everything resident: %.2f",
		      ms(result->first.median), ms(result->first.least), ms(result->first.most),
		      ms(result->last.median), result->drift_percent, ms(result->control.median));
	printf("  B  transfers alone\n"
	       "  C  overlapped (median, least..most)\n"
	       "  D  one after the other\n"
	       "  ratio: compute to transfers of a pass without residents; resident: layers\n"
	       "  held beside the shard; fetched: layers that a steady pass fetches; exposed:\n"
	       "  C - A; stalled: the part of it spent in lshard_wait; predicted: exposed, by\n"
	       "  the planner from A and the link; off: exposed less predicted, in %% of A;\n"
	       "  hidden: 1 - exposed / B, - where nothing moves\n\n");
}

static void add_row(struct cli_table *table, const struct step_result *result, const struct case_result *found)
{
	const struct step_bench *bench = result->bench;

	if (bench->links[found->one->link].ratio > 0)
		cli_table_cell(table, "%.2g", bench->links[found->one->link].ratio);
	else
		cli_table_cell(table, "-");
	cli_table_cell(table, "%u", bench->series[found->one->series].prefetch);
	cli_table_cell(table, "%u", found->plan.residents);
	cli_table_cell(table, "%u", found->plan.fetched_layers);
	cli_table_cell(table, "%u", found->plan.windows);
	cli_table_cell(table, "%.2f", ms(found->transfers.elapsed.median));
	cli_table_cell(table, "%.2f", ms(found->overlapped.elapsed.median));
	cli_table_cell(table, "%.2f..%.2f", ms(found->overlapped.elapsed.least), ms(found->overlapped.elapsed.most));
	cli_table_cell(table, "%.2f", ms(found->serial.elapsed.median));
	cli_table_cell(table, "%.2f", ms(found->exposed));
	cli_table_cell(table, "%.2f", ms(found->stall));
	cli_table_cell(table, "%.2f", ms((double)found->plan.exposed_ns));
	cli_table_cell(table, "%+.1f%%", found->off_percent);
	if (found->has_transfers)
		cli_table_cell(table, "%.0f%%", found->hidden * 100);
	else
		cli_table_cell(table, "-");
	cli_table_cell(table, "%.0f%%", found->link_share * 100);
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
	struct cli_table *table = cli_table_create("<transport|rank 0 even|delayed|slow rank even|delayed|rank 0 pays");
	bool good;

	if (!table)
		return false;
	for (unsigned variant = 0; variant < STEP_SLOW_VARIANTS; variant++) {
		const struct slow_result *slow = &result->slow[variant];

		cli_table_cell(table, "%s", slow->variant);
		cli_table_cell(table, "%.2f", ms(slow->first_even.median));
		cli_table_cell(table, "%.2f", ms(slow->first_delayed.median));
		cli_table_cell(table, "%.2f", ms(slow->last_even.median));
		cli_table_cell(table, "%.2f", ms(slow->last_delayed.median));
		cli_table_cell(table, "%+.1f%%",
			       (slow->first_delayed.median - slow->first_even.median) / result->first.median * 100);
	}
	printf("\n");
	cli_paragraph(stdout, 0,
		      "The first line again: all %d ranks compute, and rank %d loses %g %% of a step in every pass.",
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

/* ---- The exit status --------------------------------------------------------------------------------------------- */

static int exit_code(const struct step_result *result)
{
	const struct step_options *options = &result->bench->options;

	if (result->drift_percent > options->margin_percent) {
		cli_message(
			COMMAND
			": inconclusive: replicated and without the library, the last samples differ from the first by "
			"%.2f %%, "
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
	if (!step_evaluate(result, scratch)) {
		cli_message(COMMAND ": the planner refuses this stack");
		goto free_scratch;
	}
	conclusive = result->drift_percent <= bench->options.margin_percent;
	good = save(result, conclusive);
	good = (bench->options.json ? cli_json_print(step_json(result, conclusive)) == CLI_DONE : print_text(result)) &&
	       good;
	if (good)
		code = exit_code(result);
free_scratch:
	free(scratch);
	free(result);
	return code;
}
