/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_json.c - the result of `bench step --devices` as one JSON object.
 * Knows: the result, jansson. Does not know: how it came about.
 */
#include "bench_gemm_result.h"
#include "cli.h"
#include "gpu_meter.h"

#include <string.h>

static json_t *ratio_json(const struct gemm_ratio *ratio)
{
	if (ratio->median < 0)
		return json_null();
	return json_pack("{s:f, s:f, s:f}", "median", ratio->median, "low", ratio->low, "high", ratio->high);
}

static json_t *known(double value)
{
	return value < 0 ? json_null() : json_real(value);
}

static json_t *split(const struct gemm_row *row, double ns)
{
	return row->is_split ? json_real(ns) : json_null();
}

static const char *resident_text(const struct gemm_bench *bench, const struct gemm_series *series)
{
	return series->resident == GEMM_ALL_RESIDENT ? "all" : bench->options.residents[series->resident].text;
}

/* Which windows and residents a row had. */
static bool add_series_to(json_t *object, const struct gemm_bench *bench, const struct gemm_arm *arm)
{
	const struct gemm_series *series = &bench->series[arm->series];
	const lshard_stats *stats = &bench->shared->results[0].series[arm->series].stats;
	json_t *added = json_pack("{s:I, s:s, s:i, s:i, s:i}", "prefetch", (json_int_t)series->prefetch, "resident",
				  resident_text(bench, series), "windows", (int)stats->windows, "residents",
				  (int)stats->residents, "fetched_layers", (int)stats->fetched_layers);
	const bool good = added && json_object_update(object, added) == 0;

	json_decref(added);
	return good;
}

/* What all rivals have. */
static bool add_rival_to(json_t *object, const struct gemm_arm *arm)
{
	if (arm->kind != GEMM_RIVAL)
		return true;
	return json_object_set_new(object, "prefetch", json_integer(1)) == 0 &&
	       json_object_set_new(object, "windows", json_integer(2)) == 0;
}

static const char *arm_name(const struct gemm_arm *arm)
{
	return arm->kind == GEMM_RIVAL ? gemm_rival_name(arm->rival) : gemm_kind_name(arm->kind);
}

static json_t *row_json(const struct gemm_bench *bench, const struct gemm_row *row)
{
	const struct gemm_arm *arm = row->arm;
	const struct gpu_reading metered = {.samples = row->sm_mhz > 0, .throttled = row->throttled};
	char text[128];
	json_t *object = json_pack(
		"{s:s, s:b, s:b, s:b, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:s}", "arm", arm_name(arm),
		"again", arm == &bench->arms[GEMM_ARM_LAST], "graph", arm->graph, "last_rank_delayed", arm->delayed,
		"pass_ns", bench_spread_json(&row->pass_ns), "ratio", ratio_json(&row->to_baseline), "ratio_to_bound",
		ratio_json(&row->to_bound), "ratio_to_eager", ratio_json(&row->to_eager), "ratio_to_overlapped",
		ratio_json(&row->to_ours), "sustained_pass_ns", known(row->sustained_ns), "sm_mhz", known(row->sm_mhz),
		"watts", known(row->watts), "stalled_ns", split(row, row->stalled_ns), "slowed_ns",
		split(row, row->slowed_ns), "throttled", gpu_throttle_text(&metered, text, sizeof text));

	if (object &&
	    !(arm->series == GEMM_NO_SERIES ? add_rival_to(object, arm) : add_series_to(object, bench, arm))) {
		json_decref(object);
		return NULL;
	}
	return object;
}

static json_t *table_json(const struct gemm_bench *bench, const struct gemm_table *table)
{
	json_t *rows = json_array();

	for (uint32_t row = 0; row < table->row_count; row++)
		json_array_append_new(rows, row_json(bench, &table->rows[row]));
	return json_pack("{s:i, s:f, s:b, s:o}", "tokens", (int)table->tokens, "drift_percent", table->drift_percent,
			 "conclusive", table->conclusive, "rows", rows);
}

static json_t *tables_json(const struct gemm_result *result)
{
	json_t *tables = json_array();

	for (uint32_t i = 0; i < result->bench->options.token_count; i++)
		json_array_append_new(tables, table_json(result->bench, &result->tables[i]));
	return tables;
}

static json_t *series_json(const struct gemm_bench *bench, uint32_t index)
{
	const struct gemm_series_result *result = &bench->shared->results[0].series[index];
	const lshard_stats *stats = &result->stats;

	return json_pack("{s:I, s:s, s:i, s:i, s:I, s:I, s:I, s:I, s:I, s:o, s:o, s:o}", "prefetch",
			 (json_int_t)bench->series[index].prefetch, "resident",
			 resident_text(bench, &bench->series[index]), "windows", (int)stats->windows, "fetched_layers",
			 (int)stats->fetched_layers, "share_bytes", (json_int_t)stats->share_bytes, "window_bytes",
			 (json_int_t)stats->window_bytes, "resident_bytes", (json_int_t)stats->resident_bytes,
			 "counted_bytes_on_device", (json_int_t)gemm_counted_bytes(bench, index),
			 "driver_bytes_on_device", (json_int_t)result->device_bytes, "call_with_transfer_ns",
			 known(result->calls.with_transfer), "worst_call_with_transfer_ns",
			 known(result->calls.worst_with_transfer), "call_without_ns", known(result->calls.without));
}

static json_t *all_series_json(const struct gemm_bench *bench)
{
	json_t *all = json_array();

	for (uint32_t index = 0; index < bench->series_count; index++)
		json_array_append_new(all, series_json(bench, index));
	return all;
}

static json_t *not_run_json(const struct gemm_bench *bench)
{
	json_t *list = json_array();

	for (unsigned rival = 0; rival < GEMM_RIVALS; rival++) {
		const char *why = gemm_refused(bench, (enum gemm_rival)rival);

		if (bench->options.rivals[rival] && *why)
			json_array_append_new(list,
					      json_pack("{s:s, s:o}", "rival", gemm_rival_name((enum gemm_rival)rival),
							"reason", cli_json_text(why, strlen(why))));
	}
	return list;
}

static json_t *devices_json(const struct gemm_options *options)
{
	json_t *devices = json_array();

	for (uint32_t rank = 0; rank < options->ranks; rank++)
		json_array_append_new(devices, json_integer((json_int_t)options->devices[rank]));
	return devices;
}

static json_t *config_json(const struct gemm_bench *bench)
{
	const struct gemm_options *options = &bench->options;

	return json_pack("{s:o, s:i, s:i, s:i, s:I, s:s, s:o, s:i, s:i, s:f, s:f, s:b, s:f, s:I}", "devices",
			 devices_json(options), "layers", (int)options->layers, "hidden", (int)options->hidden, "inner",
			 (int)options->inner, "layer_bytes", (json_int_t)gemm_layer_bytes(options), "placement",
			 cli_placement_name(options->placement), "transport",
			 cli_json_text(options->transport, strlen(options->transport)), "passes", (int)options->passes,
			 "rounds", (int)options->rounds, "warm_ms", options->warm_ms, "slow_rank_percent",
			 options->slow_percent, "all_compute", options->all_compute, "margin_percent",
			 options->margin_percent, "replicated_bytes_on_device",
			 (json_int_t)(gemm_layer_bytes(options) * options->layers * gemm_ranks_on_first_device(bench)));
}

json_t *gemm_gpus_json(const struct gemm_bench *bench)
{
	json_t *gpus = json_array();

	for (uint32_t rank = 0; rank < bench->options.ranks; rank++) {
		const struct gemm_rank_result *result = &bench->shared->results[rank];

		json_array_append_new(gpus, json_pack("{s:i, s:i, s:s, s:s, s:i}", "rank", (int)rank, "ordinal",
						      (int)bench->options.devices[rank], "name", result->device, "bus",
						      result->bus, "driver_version", result->driver_version));
	}
	return gpus;
}

json_t *gemm_result_json(const struct gemm_result *result)
{
	const struct gemm_bench *bench = result->bench;
	const struct gemm_rank_result *first = &bench->shared->results[0];

	return json_pack("{s:s, s:s, s:o, s:o, s:s, s:i, s:i, s:b, s:b, s:o, s:o, s:o}", "bench", "step",
			 "compute_model", "two bfloat16 linears per layer by cuBLAS", "config", config_json(bench),
			 "gpus", gemm_gpus_json(bench), "transport", first->transport, "cublas_version",
			 first->blas_version, "nccl_version", bench->shared->nccl_version, "bits_checked", 1,
			 "conclusive", result->conclusive, "tables", tables_json(result), "series",
			 all_series_json(bench), "rivals_not_run", not_run_json(bench));
}
