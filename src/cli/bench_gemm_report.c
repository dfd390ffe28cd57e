/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_report.c - the result of `bench step --devices` as tables, and the verdict.
 * Knows: the result. Does not know: how it came about.
 */
#include "bench_gemm_result.h"
#include "bench_save.h"
#include "cli.h"
#include "gpu_meter.h"

#include <string.h>

#define COMMAND "bench step"
#define MIB     1048576.0

static void print_devices(const struct gemm_bench *bench)
{
	for (uint32_t rank = 0; rank < bench->options.ranks; rank++) {
		const struct gemm_rank_result *result = &bench->shared->results[rank];

		cli_paragraph(stdout, 4, "  rank %u on GPU %u: %s (%s), CUDA %d.%d%s", rank,
			      bench->options.devices[rank], result->device, result->bus, result->driver_version / 1000,
			      result->driver_version % 1000 / 10,
			      gemm_computes(bench, (int32_t)rank) ? "" : "; it holds its layers and does not compute");
	}
}

static void print_head(const struct gemm_bench *bench)
{
	const struct gemm_options *options = &bench->options;
	const struct gemm_rank_result *first = &bench->shared->results[0];

	cli_paragraph(
		stdout, 0,
		"%u layers %u -> %u -> %u in bfloat16; of each the second weight, %.0f MiB, is sharded over %u ranks, "
		"placement %s, by %s.",
		options->layers, options->hidden, options->inner, options->hidden,
		(double)gemm_layer_bytes(options) / MIB, options->ranks, cli_placement_name(options->placement),
		first->transport);
	print_devices(bench);
	cli_paragraph(
		stdout, 0,
		"cuBLAS %d.%d.%d. Medians of %u samples of %u passes in shuffled rounds, each after %g ms of the same "
		"way, of the slowest rank; the bits of all ways and layers are the same. Ratios are of each round, to "
		"resident run the same way (eager or graph), with 95 %% intervals of their medians. bound: the longer "
		"of resident and copies alone; stalled, slowed: ms that a pass stands before layers, and that its "
		"compute takes longer than resident; sustained: ms per pass of a run of a second, of which are the "
		"clock and the power.",
		first->blas_version / 10000, first->blas_version / 100 % 100, first->blas_version % 100,
		options->rounds, options->passes, options->warm_ms);
	if (!first->has_meter)
		cli_paragraph(stdout, 0,
			      "Clocks and power are not known: NVML cannot be loaded or does not know this GPU.");
}

/* ---- One number of tokens ------------------------------------------------------------------------------------ */

static void add_ratio(struct cli_table *table, const struct gemm_ratio *ratio)
{
	if (ratio->median < 0)
		cli_table_cell(table, "-");
	else
		cli_table_cell(table, "%.3f", ratio->median);
}

static void add_split(struct cli_table *table, const struct gemm_row *row, double ns)
{
	if (row->is_split)
		cli_table_cell(table, "%.3f", ns * 1e-6);
	else
		cli_table_cell(table, "-");
}

static void add_metered(struct cli_table *table, double value)
{
	if (value < 0)
		cli_table_cell(table, "-");
	else
		cli_table_cell(table, "%.0f", value);
}

static void add_series_cells(struct cli_table *table, const struct gemm_bench *bench, const struct gemm_arm *arm)
{
	const struct gemm_series *series = arm->series == GEMM_NO_SERIES ? NULL : &bench->series[arm->series];

	if (!series) {
		cli_table_cell(table, "%s", arm->kind == GEMM_RIVAL ? "1" : "-");
		cli_table_cell(table, "-");
		cli_table_cell(table, "%s", arm->kind == GEMM_RIVAL ? "2" : "-");
		return;
	}
	cli_table_cell(table, "%u", series->prefetch);
	cli_table_cell(table, "%s",
		       series->resident == GEMM_ALL_RESIDENT ? "all" : bench->options.residents[series->resident].text);
	cli_table_cell(table, "%u", bench->shared->results[0].series[arm->series].stats.windows);
}

static void add_row(struct cli_table *table, const struct gemm_bench *bench, const struct gemm_row *row)
{
	const struct gpu_reading metered = {.samples = row->sm_mhz > 0, .throttled = row->throttled};
	char text[128];

	cli_table_cell(table, "%s", gemm_arm_text(bench, row->arm, text, sizeof text));
	add_series_cells(table, bench, row->arm);
	cli_table_cell(table, "%.3f", row->pass_ns.median * 1e-6);
	cli_table_cell(table, "%.3f..%.3f", row->pass_ns.least * 1e-6, row->pass_ns.most * 1e-6);
	add_ratio(table, &row->to_baseline);
	cli_table_cell(table, "%.3f..%.3f", row->to_baseline.low, row->to_baseline.high);
	add_ratio(table, &row->to_bound);
	add_ratio(table, &row->to_eager);
	add_split(table, row, row->stalled_ns);
	add_split(table, row, row->slowed_ns);
	if (row->sustained_ns > 0)
		cli_table_cell(table, "%.3f", row->sustained_ns * 1e-6);
	else
		cli_table_cell(table, "-");
	add_metered(table, row->sm_mhz);
	add_metered(table, row->watts);
	cli_table_cell(table, "%s", gpu_throttle_text(&metered, text, sizeof text));
}

static bool print_table(const struct gemm_bench *bench, const struct gemm_table *judged)
{
	struct cli_table *table = cli_table_create("<way|k|resident|windows|ms per pass|least..most|to resident|95 %|"
						   "to bound|to eager|stalled|slowed|sustained|SM MHz|watts|throttled");
	bool good;

	if (!table)
		return false;
	cli_table_keys(table, 3);
	printf("\n%u tokens; resident again is off resident by %.2f %%%s\n\n", judged->tokens, judged->drift_percent,
	       judged->conclusive ? "" : ": VOID");
	for (uint32_t row = 0; row < judged->row_count; row++)
		add_row(table, bench, &judged->rows[row]);
	good = cli_table_print(table, stdout);
	cli_table_destroy(table);
	return good;
}

static void print_notes(const struct gemm_bench *bench)
{
	for (unsigned rival = 0; rival < GEMM_RIVALS; rival++)
		if (bench->options.rivals[rival] && *gemm_refused(bench, (enum gemm_rival)rival))
			cli_paragraph(stdout, 2, "%s: not run: %s", gemm_rival_name((enum gemm_rival)rival),
				      gemm_refused(bench, (enum gemm_rival)rival));
	if (bench->options.slow_percent > 0)
		cli_paragraph(stdout, 0,
			      "last rank delayed: it computes %g %% more in each pass; times are rank 0's, ratios to "
			      "the same "
			      "way without delay",
			      bench->options.slow_percent);
	if (bench->shared->nccl_version > 0)
		cli_paragraph(
			stdout, 0,
			"NCCL %d.%d.%d; whether allgather-ce really uses copy engines is only told by NCCL_DEBUG=INFO",
			bench->shared->nccl_version / 10000, bench->shared->nccl_version / 100 % 100,
			bench->shared->nccl_version % 100);
}

/* ---- Memory and calls ---------------------------------------------------------------------------------------- */

static void add_time(struct cli_table *table, double ns)
{
	if (ns < 0)
		cli_table_cell(table, "-");
	else
		cli_table_cell(table, "%.1f", ns * 1e-3);
}

static void add_series(struct cli_table *table, const struct gemm_bench *bench, uint32_t index)
{
	const struct gemm_series *series = &bench->series[index];
	const struct gemm_series_result *result = &bench->shared->results[0].series[index];

	cli_table_cell(table, "%u", series->prefetch);
	cli_table_cell(table, "%s",
		       series->resident == GEMM_ALL_RESIDENT ? "all" : bench->options.residents[series->resident].text);
	cli_table_cell(table, "%u", result->stats.fetched_layers);
	cli_table_cell(table, "%.1f", (double)result->stats.share_bytes / MIB);
	cli_table_cell(table, "%.1f", (double)result->stats.window_bytes / MIB);
	cli_table_cell(table, "%.1f", (double)result->stats.resident_bytes / MIB);
	cli_table_cell(table, "%.1f", (double)gemm_counted_bytes(bench, index) / MIB);
	cli_table_cell(table, "%.1f", (double)result->device_bytes / MIB);
	add_time(table, result->calls.with_transfer);
	add_time(table, result->calls.worst_with_transfer);
	add_time(table, result->calls.without);
}

static bool print_series(const struct gemm_bench *bench)
{
	const uint32_t neighbours = gemm_ranks_on_first_device(bench);
	struct cli_table *table = cli_table_create("k|resident|fetched|share|windows|residents|all|by the driver|"
						   "us with transfer|worst|us without");
	bool good;

	if (!table)
		return false;
	cli_table_keys(table, 2);
	printf("\n");
	cli_paragraph(
		stdout, 0,
		"Memory in MiB of rank 0's series, of all %u ranks on its GPU, and what the driver has less since; "
		"replicated they would have %.1f. Host time of reach and wait, medians.",
		neighbours, (double)gemm_layer_bytes(&bench->options) * bench->options.layers * neighbours / MIB);
	printf("\n");
	for (uint32_t index = 0; index < bench->series_count; index++)
		add_series(table, bench, index);
	good = cli_table_print(table, stdout);
	cli_table_destroy(table);
	return good;
}

static bool print_text(const struct gemm_result *result)
{
	bool good = true;

	print_head(result->bench);
	for (uint32_t i = 0; good && i < result->bench->options.token_count; i++)
		good = print_table(result->bench, &result->tables[i]);
	printf("\n");
	print_notes(result->bench);
	if (good && print_series(result->bench))
		return cli_flush_output();
	cli_message(COMMAND ": no memory to print the result");
	return false;
}

/* ---- The verdict --------------------------------------------------------------------------------------------- */

static int verdict(const struct gemm_result *result)
{
	for (uint32_t i = 0; i < result->bench->options.token_count; i++) {
		const struct gemm_table *table = &result->tables[i];

		if (!table->conclusive)
			cli_message(COMMAND
				    ": inconclusive: with %u tokens resident again is off resident by %.2f %%, more "
				    "than %g %%. Something else uses this GPU, or its clock changes: end it, or give "
				    "a longer --warm-ms or more --passes or --rounds",
				    table->tokens, table->drift_percent, result->bench->options.margin_percent);
	}
	return result->conclusive ? CLI_DONE : CLI_INCONCLUSIVE;
}

/* As JSON where that is wanted, to the file and to the terminal. */
static bool put_out(const struct gemm_result *result, int argc, char **argv)
{
	const struct gemm_options *options = &result->bench->options;
	json_t *root = options->json || options->save ? gemm_result_json(result) : NULL;
	bool good = true;

	if ((options->json || options->save) && !root) {
		cli_message(COMMAND ": no memory for the result");
		return false;
	}
	if (options->save)
		good = bench_save(options->save, argc, argv, gemm_gpus_json(result->bench), root);
	if (options->json)
		return cli_json_print(root) == CLI_DONE && good;
	json_decref(root);
	return print_text(result) && good;
}

int gemm_report(const struct gemm_bench *bench, int argc, char **argv)
{
	struct gemm_result result;
	int code = CLI_FAILED;

	if (!gemm_judge(&result, bench))
		cli_message(COMMAND ": no memory for the result");
	else if (put_out(&result, argc, argv))
		code = verdict(&result);
	gemm_result_free(&result);
	return code;
}
