/* SPDX-License-Identifier: Apache-2.0
 *
 * run_json.c - what a run has given and cost, for programs.
 */
#include <string.h>

#include "run_report.h"

/* Every object is packed in one call or not at all: json_pack gives NULL when any part of it is NULL. */

/* Null where it is not known. */
static json_t *json_of_memory(const struct rank_report *report, uint64_t bytes)
{
	return report->has_memory ? json_integer((json_int_t)bytes) : json_null();
}

static json_t *json_of_rank(const struct own_rank *own)
{
	const struct rank_report *report = &own->report;
	const double tokens = (double)report->generated_tokens;

	if (own->phase != RANK_REPORTED)
		return json_pack("{s:i,s:I,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n}", "rank", (int)own->task.rank,
				 "pid", (json_int_t)own->worker->pid, "share_bytes", "window_bytes", "numa_copy_bytes",
				 "private_bytes", "pss_bytes", "shared_hugetlb_bytes", "large_bytes", "read_bytes",
				 "wait_ns", "total_ns", "tokens_per_s");
	return json_pack("{s:i,s:I,s:I,s:I,s:I,s:o,s:o,s:o,s:o,s:I,s:I,s:I,s:f}", "rank", (int)own->task.rank, "pid",
			 (json_int_t)own->worker->pid, "share_bytes", (json_int_t)report->shard_bytes, "window_bytes",
			 (json_int_t)report->window_bytes, "numa_copy_bytes", (json_int_t)report->numa_copy_bytes,
			 "private_bytes", json_of_memory(report, report->private_bytes), "pss_bytes",
			 json_of_memory(report, report->pss_bytes), "shared_hugetlb_bytes",
			 json_of_memory(report, report->shared_hugetlb_bytes), "large_bytes",
			 json_of_memory(report, report->large_bytes), "read_bytes", (json_int_t)report->read_bytes,
			 "wait_ns", (json_int_t)report->wait_ns, "total_ns", (json_int_t)report->total_ns,
			 "tokens_per_s", report->total_ns > 0 ? 1e9 * tokens / (double)report->total_ns : 0.0);
}

static json_t *json_of_ranks(const struct launcher *launcher)
{
	json_t *array = json_array();

	for (uint32_t i = 0; array && i < launcher->rank_count; i++) {
		if (json_array_append_new(array, json_of_rank(&launcher->ranks[i])) != 0) {
			json_decref(array);
			array = NULL;
		}
	}
	return array;
}

static json_t *json_of_tokens(const int32_t *tokens, size_t count)
{
	json_t *array = json_array();

	for (size_t i = 0; array && i < count; i++) {
		if (json_array_append_new(array, json_integer(tokens[i])) != 0) {
			json_decref(array);
			array = NULL;
		}
	}
	return array;
}

static json_t *json_of_prompt(const struct prompt *prompt, size_t index, size_t rank)
{
	return json_pack("{s:I,s:I,s:o,s:o,s:o,s:o}", "index", (json_int_t)index, "rank", (json_int_t)rank,
			 "prompt_tokens", json_of_tokens(prompt->prompt_tokens, prompt->prompt_token_count), "tokens",
			 json_of_tokens(prompt->tokens, prompt->token_count), "text",
			 cli_json_text(prompt->output, prompt->output_bytes), "error",
			 *prompt->error ? cli_json_text(prompt->error, strlen(prompt->error)) : json_null());
}

static json_t *json_of_prompts(const struct launcher *launcher)
{
	const struct rank_options *options = launcher->options;
	json_t *array = json_array();

	for (size_t i = 0; array && i < launcher->prompts->count; i++) {
		const size_t rank = i % options->ranks;

		if (options->one_of_job && rank != (size_t)options->first_rank)
			continue;
		if (json_array_append_new(array, json_of_prompt(&launcher->prompts->items[i], i, rank)) != 0) {
			json_decref(array);
			array = NULL;
		}
	}
	return array;
}

json_t *run_report_model(const struct launcher *launcher)
{
	const engine_model *shape = &launcher->options->shape;

	return json_pack("{s:I,s:I}", "layers", (json_int_t)shape->layers, "layer_bytes",
			 (json_int_t)shape->layer_bytes);
}

/* UINT64_MAX, "all", is no JSON integer; no more than the whole series can be kept. */
static json_int_t resident_bytes(const struct launcher *launcher)
{
	const uint64_t whole = launcher->options->shape.layers * launcher->options->shape.layer_bytes;
	const uint64_t given = launcher->options->resident_bytes;

	return (json_int_t)(given < whole ? given : whole);
}

json_t *run_report_config(const struct launcher *launcher)
{
	const struct rank_options *options = launcher->options;

	return json_pack("{s:s,s:I,s:o,s:I,s:s,s:I,s:o,s:o,s:b,s:o,s:b,s:I}", "version", lshard_version(), "ranks",
			 (json_int_t)options->ranks, "model", cli_json_text(options->model, strlen(options->model)),
			 "prefetch", (json_int_t)options->prefetch, "placement", cli_placement_name(options->placement),
			 "resident_bytes", resident_bytes(launcher), "transport",
			 cli_json_text(options->spec, strlen(options->spec)), "transport_in_use",
			 cli_json_text(launcher->transport, strlen(launcher->transport)), "shm_copy", options->shm_copy,
			 "link_gbits", options->link_gbits > 0 ? json_real(options->link_gbits) : json_null(),
			 "replicated", options->replicated, "max_tokens", (json_int_t)launcher->max_tokens);
}

int run_report_json(const struct launcher *launcher)
{
	return cli_json_print(json_pack("{s:s,s:o,s:o,s:o,s:o}", "schema", "layershard-llama/1", "ranks",
					json_of_ranks(launcher), "prompts", json_of_prompts(launcher), "model",
					run_report_model(launcher), "config", run_report_config(launcher)));
}
