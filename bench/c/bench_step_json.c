/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_step_json.c - the result of `bench step` as one JSON object.
 * Knows: the result, jansson. Does not know: how it was measured.
 */
#include "bench_step_result.h"
#include "cli.h"

#include <string.h>

static json_t *case_json(const struct step_bench *bench, const struct case_result *found)
{
	const struct step_link *link = &bench->links[found->one->link];
	const lshard_plan_result *plan = &found->plan;
	json_t *object = json_pack("{s:o, s:o, s:I, s:s, s:i, s:i, s:i, s:i}", "ratio",
				   link->ratio > 0 ? json_real(link->ratio) : json_null(), "link_bytes_per_s",
				   link->bytes_per_s ? json_integer((json_int_t)link->bytes_per_s) : json_null(),
				   "prefetch", (json_int_t)bench->series[found->one->series].prefetch, "resident",
				   bench->options.residents[found->one->resident].text, "residents",
				   (int)plan->residents, "fetched_layers", (int)plan->fetched_layers, "windows",
				   (int)plan->windows, "below_k_count", (int)plan->below_k_count);
	json_t *times = json_pack(
		"{s:o, s:o, s:o, s:f, s:f, s:o, s:f, s:I, s:I, s:f}", "transfers_ns",
		bench_spread_json(&found->transfers.elapsed), "overlapped_ns",
		bench_spread_json(&found->overlapped.elapsed), "serial_ns", bench_spread_json(&found->serial.elapsed),
		"exposed_ns", found->exposed, "stall_ns", found->stall, "hidden_share",
		found->has_transfers ? json_real(found->hidden) : json_null(), "link_busy_share", found->link_share,
		"predicted_pass_ns", (json_int_t)plan->pass_ns, "predicted_exposed_ns", (json_int_t)plan->exposed_ns,
		"difference_percent", found->off_percent);

	if (!object || !times || json_object_update(object, times) != 0) {
		json_decref(object);
		object = NULL;
	}
	json_decref(times);
	return object;
}

static json_t *cases_json(const struct step_result *result)
{
	json_t *cases = json_array();

	for (uint32_t index = 0; index < result->bench->case_count; index++)
		if (json_array_append_new(cases, case_json(result->bench, &result->cases[index])) != 0) {
			json_decref(cases);
			return NULL;
		}
	return cases;
}

static json_t *slow_json(const struct step_result *result)
{
	json_t *variants = json_array();

	for (unsigned variant = 0; result->bench->options.slow_percent > 0 && variant < STEP_SLOW_VARIANTS; variant++) {
		const struct slow_result *slow = &result->slow[variant];

		json_array_append_new(variants,
				      json_pack("{s:s, s:o, s:o, s:o, s:o}", "variant", slow->variant, "rank_0_ns",
						bench_spread_json(&slow->first_even), "rank_0_delayed_ns",
						bench_spread_json(&slow->first_delayed), "slow_rank_ns",
						bench_spread_json(&slow->last_even), "slow_rank_delayed_ns",
						bench_spread_json(&slow->last_delayed)));
	}
	return variants;
}

static json_t *config_json(const struct step_options *options)
{
	return json_pack("{s:i, s:I, s:I, s:i, s:s, s:o, s:i, s:i, s:f, s:b, s:f}", "layers", (int)options->layers,
			 "layer_bytes", (json_int_t)options->layer_bytes, "compute_ns", (json_int_t)options->compute_ns,
			 "ranks", (int)options->ranks, "placement", cli_placement_name(options->placement), "transport",
			 cli_json_text(options->transport, strlen(options->transport)), "passes", (int)options->passes,
			 "rounds", (int)options->rounds, "slow_rank_percent", options->slow_percent, "all_compute",
			 options->all_compute, "margin_percent", options->margin_percent);
}

json_t *step_json(const struct step_result *result, bool conclusive)
{
	return json_pack("{s:s, s:s, s:s, s:o, s:b, s:f, s:b, s:o, s:o, s:o, s:o, s:o}", "schema",
			 "layershard-bench-step/3", "bench", "step", "compute_model",
			 "a fixed time passes by the clock", "config", config_json(&result->bench->options),
			 "bits_checked", 1, "drift_percent", result->drift_percent, "conclusive", conclusive,
			 "replicated_first_ns", bench_spread_json(&result->first), "replicated_last_ns",
			 bench_spread_json(&result->last), "control_ns", bench_spread_json(&result->control), "cases",
			 cases_json(result), "slow_rank", slow_json(result));
}
