/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_step.c - `layershard-bench step`: turns options into links, series, variants and cases, has them measured, and
 * reports. Knows: the planner. Does not know: how ranks run, how a result is printed.
 */
#include "bench_step.h"
#include "cli.h"

#include <stdlib.h>
#include <string.h>

#define COMMAND       "step"
#define LOCKSTEP_SPEC "local:lockstep"

/* ---- The planner --------------------------------------------------------------------------------------------- */

void step_series_options(const struct step_bench *bench, uint32_t series, lshard_tensor *tensor,
			 lshard_series_options *out)
{
	const struct step_options *options = &bench->options;

	*tensor = (lshard_tensor){"weights", options->layer_bytes, 0, LSHARD_STRIPE_BYTES, 0, 0};
	*out = (lshard_series_options)LSHARD_SERIES_OPTIONS_INIT;
	out->name = "stack";
	out->layer_count = options->layers;
	out->tensors = tensor;
	out->tensor_count = 1;
	out->prefetch = bench->series[series].prefetch;
	out->placement = options->placement;
	out->resident_bytes = bench->series[series].resident_bytes;
}

static bool plan_rank(const struct step_bench *bench, uint32_t series, uint64_t compute_ns, int32_t rank,
		      lshard_plan_result *plan)
{
	const struct step_link *link = &bench->links[bench->series[series].link];
	lshard_series_options options;
	lshard_tensor tensor;
	lshard_plan_input input = LSHARD_PLAN_INPUT_INIT;

	step_series_options(bench, series, &tensor, &options);
	input.rank = rank;
	input.size = bench->options.ranks;
	input.collective = link->collective;
	input.direct = bench->stats[series].generation > 0 && bench->stats[series].windows == 0;
	input.compute_ns = compute_ns;
	input.link_bytes_per_s = link->bytes_per_s ? link->bytes_per_s : 1; /* of a link that carries nothing */
	return lshard_plan(&options, &input, plan) == LSHARD_OK;
}

bool step_predict(const struct step_bench *bench, uint32_t series, uint64_t compute_ns, lshard_plan_result *plan)
{
	const int32_t computing = bench->options.all_compute ? bench->options.ranks : 1;

	for (int32_t rank = 0; rank < computing; rank++) {
		lshard_plan_result one = LSHARD_PLAN_RESULT_INIT;

		if (!plan_rank(bench, series, compute_ns, rank, &one))
			return false;
		if (rank == 0 || one.pass_ns > plan->pass_ns)
			*plan = one;
	}
	return true;
}

/*
 * What a pass without residents fetches over the link. Over one of 1 byte/ns its transfers take as many ns as its
 * layers have bytes. Where all of a rank's layers stay in its window from pass to pass: what the rank that stores least
 * fetches to begin with. 0: there is nobody to fetch anything from.
 */
static bool find_pass_bytes(struct step_bench *bench, double *bytes)
{
	lshard_plan_result bare = LSHARD_PLAN_RESULT_INIT;
	lshard_plan_result last_rank = LSHARD_PLAN_RESULT_INIT;

	bench->series[0] = (struct step_series){0, 0, 0};
	bench->links[0].bytes_per_s = 1000000000;
	if (!step_predict(bench, 0, bench->options.compute_ns, &bare) ||
	    !plan_rank(bench, 0, bench->options.compute_ns, bench->options.ranks - 1, &last_rank))
		return false;
	*bytes = (double)(bare.transfer_ns ? bare.transfer_ns : last_rank.replicated_bytes - last_rank.shard_bytes);
	return true;
}

/* ---- Links --------------------------------------------------------------------------------------------------- */

static uint64_t at_least_one(double value)
{
	return value < 1 ? 1 : (uint64_t)(value + 0.5);
}

static void add_link(struct step_bench *bench, const char *transport, uint64_t bytes_per_s, double ratio)
{
	struct step_link *link = &bench->links[bench->link_count++];

	if (bytes_per_s)
		snprintf(link->spec, sizeof link->spec, "throttle=%llu,%s", (unsigned long long)bytes_per_s, transport);
	else
		snprintf(link->spec, sizeof link->spec, "%s", transport);
	link->bytes_per_s = bytes_per_s;
	link->ratio = ratio;
	link->collective = cli_transport_is_collective(transport);
}

static bool add_links(struct step_bench *bench)
{
	struct step_options *options = &bench->options;
	const double compute_s = (double)options->compute_ns * 1e-9 * options->layers;
	double bytes;

	if (!find_pass_bytes(bench, &bytes))
		return false;
	if (options->link_bytes_per_s) {
		options->ratios[0] = bytes > 0 ? compute_s * (double)options->link_bytes_per_s / bytes : 0;
		options->ratio_count = 1;
		add_link(bench, options->transport, options->link_bytes_per_s, options->ratios[0]);
		return true;
	}
	for (uint32_t i = 0; i < options->ratio_count; i++)
		add_link(bench, options->transport,
			 bytes > 0 ? at_least_one(bytes * options->ratios[i] / compute_s) : 0, options->ratios[i]);
	return true;
}

/* ---- Series, variants, cases ------------------------------------------------------------------------------------- */

static uint32_t add_series(struct step_bench *bench, uint32_t link, uint32_t prefetch, uint64_t resident_bytes)
{
	for (uint32_t i = 0; i < bench->series_count; i++)
		if (bench->series[i].link == link && bench->series[i].prefetch == prefetch &&
		    bench->series[i].resident_bytes == resident_bytes)
			return i;
	bench->series[bench->series_count] = (struct step_series){link, prefetch, resident_bytes};
	return bench->series_count++;
}

static uint32_t add_variant(struct step_bench *bench, enum step_kind kind, uint32_t series)
{
	bench->variants[bench->variant_count] = (struct step_variant){kind, series, bench->options.all_compute, 0};
	return bench->variant_count++;
}

/* A percentage is of the bytes that the rank with the fewest of its own does not store: the same on every rank. */
static uint64_t resident_bytes(const struct bench_resident *resident, const lshard_plan_result *last_rank)
{
	if (!resident->is_percent)
		return resident->bytes;
	if (resident->percent >= 100)
		return UINT64_MAX;
	return (uint64_t)((double)(last_rank->replicated_bytes - last_rank->shard_bytes) * resident->percent / 100);
}

/* All prefetch distances of one link and amount; one after the other is the same for all of them. */
static void add_cases(struct step_bench *bench, uint32_t link, uint32_t resident, uint64_t bytes)
{
	const uint32_t serial = add_variant(bench, STEP_SERIAL, add_series(bench, link, 0, bytes));

	for (uint32_t i = 0; i < bench->options.prefetch_count; i++) {
		struct step_case *one = &bench->cases[bench->case_count++];

		one->link = link;
		one->resident = resident;
		one->series = add_series(bench, link, bench->options.prefetches[i], bytes);
		one->transfers = add_variant(bench, STEP_TRANSFERS, one->series);
		one->overlapped = add_variant(bench, STEP_OVERLAPPED, one->series);
		one->serial = serial;
	}
}

/* The first case again with all ranks computing, and the same in lockstep. */
static void add_slow(struct step_bench *bench)
{
	const struct step_series first = bench->series[bench->cases[0].series];
	const double pass_ns = (double)bench->options.compute_ns * bench->options.layers;
	const uint64_t delay_ns = (uint64_t)(pass_ns * bench->options.slow_percent / 100);

	add_link(bench, LOCKSTEP_SPEC, bench->links[first.link].bytes_per_s, bench->links[first.link].ratio);
	for (unsigned variant = 0; variant < STEP_SLOW_VARIANTS; variant++) {
		const uint32_t link = variant == STEP_SLOW_ONE_SIDED ? first.link : bench->link_count - 1;
		const uint32_t series = add_series(bench, link, first.prefetch, first.resident_bytes);

		bench->slow[variant].even = add_variant(bench, STEP_OVERLAPPED, series);
		bench->slow[variant].delayed = add_variant(bench, STEP_OVERLAPPED, series);
		bench->variants[bench->slow[variant].even].all = true;
		bench->variants[bench->slow[variant].delayed].all = true;
		bench->variants[bench->slow[variant].delayed].delay_ns = delay_ns;
	}
}

static bool build(struct step_bench *bench)
{
	const struct step_options *options = &bench->options;
	lshard_plan_result last_rank = LSHARD_PLAN_RESULT_INIT;

	if (!add_links(bench) || !plan_rank(bench, 0, options->compute_ns, options->ranks - 1, &last_rank))
		return false;
	add_variant(bench, STEP_REPLICATED, STEP_NO_SERIES);
	add_variant(bench, STEP_REPLICATED, STEP_NO_SERIES);
	add_variant(bench, STEP_CONTROL, add_series(bench, 0, options->prefetches[0], UINT64_MAX));
	for (uint32_t link = 0; link < options->ratio_count; link++)
		for (uint32_t resident = 0; resident < options->resident_count; resident++)
			add_cases(bench, link, resident, resident_bytes(&options->residents[resident], &last_rank));
	if (options->slow_percent > 0)
		add_slow(bench);
	return true;
}

/* ---- The run ------------------------------------------------------------------------------------------------- */

struct step_sample *step_sample_at(const struct step_bench *bench, uint32_t variant, int32_t rank, uint32_t round)
{
	const size_t row = (size_t)variant * (size_t)bench->options.ranks + (size_t)rank;

	return &bench->samples[row * bench->options.rounds + round];
}

/* Of any of the transports in a stack's text. */
static bool writes_a_trace(const char *spec)
{
	return strncmp(spec, "trace=", strlen("trace=")) == 0 || strstr(spec, ",trace=") != NULL;
}

static int check_combination(const struct step_options *options)
{
	const uint32_t links = options->ratio_count ? options->ratio_count : 1;

	if (links * options->resident_count * options->prefetch_count > STEP_CASES_MOST)
		return cli_usage(COMMAND, "%u ratios, %u amounts and %u prefetch distances make more than %u cases",
				 links, options->resident_count, options->prefetch_count, STEP_CASES_MOST);
	if (cli_transport_is_collective(options->transport) && !options->all_compute)
		return cli_usage(COMMAND, "on '%s' all ranks must step together; give --all-compute",
				 options->transport);
	if (links > 1 && writes_a_trace(options->transport))
		return cli_usage(COMMAND, "each of %u links would write the same trace; give one --ratio", links);
	return CLI_DONE;
}

static int measure(struct step_bench *bench)
{
	const struct step_options *options = &bench->options;
	int result = CLI_FAILED;

	bench->samples =
		calloc((size_t)bench->variant_count * (size_t)options->ranks * options->rounds, sizeof *bench->samples);
	if (!bench->samples || !bench_circle_open(&bench->circle, options->ranks)) {
		cli_message(COMMAND ": no memory for the samples");
		goto free_samples;
	}
	if (step_ranks_run(bench))
		result = step_report(bench);
	else
		cli_message(COMMAND ": %s", bench->circle.failure);
	bench_circle_close(&bench->circle);
free_samples:
	free(bench->samples);
	return result;
}

int bench_step(int argc, char **argv)
{
	struct step_bench *bench;
	bool help;
	int result;

	bench = calloc(1, sizeof *bench);
	if (!bench) {
		cli_message(COMMAND ": no memory");
		return CLI_FAILED;
	}
	result = step_options_parse(argc, argv, &bench->options, &help);
	if (result == CLI_DONE && !help)
		result = check_combination(&bench->options);
	if (result != CLI_DONE || help)
		goto free_bench;
	if (build(bench))
		result = measure(bench);
	else
		result = cli_usage(COMMAND,
				   "the planner refuses this stack; look at the layers, their bytes and the ranks");
free_bench:
	free(bench);
	return result;
}
