/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm.c - `layershard bench step --devices`: options become series and arms, ranks run them, a report follows.
 * Knows: the planner, for shares of memory. Does not know: GPUs, how ranks run, how a result is printed.
 */
#include "bench_gemm.h"
#include "bench_save.h"
#include "cli.h"

#include <layershard/plan.h>

#include <string.h>
#include <unistd.h>

#define COMMAND     "bench step"
#define PASSES_MOST 1000u /* the more there are the longer all ranks must keep together */

struct gemm_sample *gemm_sample_at(const struct gemm_bench *bench, uint32_t tokens, uint32_t arm, uint32_t rank,
				   uint32_t round)
{
	const struct gemm_options *options = &bench->options;
	const size_t row = ((size_t)tokens * bench->arm_count + arm) * options->ranks + rank;

	return &bench->shared->samples[row * options->rounds + round];
}

uint32_t gemm_passes_in(const struct gemm_bench *bench, uint32_t arm, double ns)
{
	const double each = bench->shared->pass_ns[arm];
	const double passes = each > 0 ? ns / each + 1 : 1;

	return passes < PASSES_MOST ? (uint32_t)passes : PASSES_MOST;
}

bool gemm_computes(const struct gemm_bench *bench, int32_t rank)
{
	return rank == 0 || bench->options.all_compute;
}

const char *gemm_refused(const struct gemm_bench *bench, enum gemm_rival rival)
{
	for (uint32_t rank = 0; rank < bench->options.ranks; rank++)
		if (bench->shared->results[rank].refused[rival][0])
			return bench->shared->results[rank].refused[rival];
	return "";
}

bool gemm_is_run(const struct gemm_bench *bench, const struct gemm_arm *arm)
{
	return arm->kind != GEMM_RIVAL || !*gemm_refused(bench, arm->rival);
}

static const char *kind_text(const struct gemm_arm *arm)
{
	switch (arm->kind) {
	case GEMM_RESIDENT:
		return "A resident";
	case GEMM_CONTROL:
		return "control";
	case GEMM_COPIES:
		return "B copies alone";
	case GEMM_OVERLAPPED:
		return "C overlapped";
	case GEMM_SERIAL:
		return "D one after the other";
	default:
		return gemm_rival_name(arm->rival);
	}
}

const char *gemm_arm_text(const struct gemm_bench *bench, const struct gemm_arm *arm, char *text, size_t bytes)
{
	snprintf(text, bytes, "%s%s%s%s", kind_text(arm), arm == &bench->arms[GEMM_ARM_LAST] ? ", again" : "",
		 arm->graph ? ", graph" : "", arm->delayed ? ", last rank delayed" : "");
	return text;
}

/* ---- Series -------------------------------------------------------------------------------------------------- */

void gemm_series_options(const struct gemm_bench *bench, const struct gemm_series *series, lshard_tensor *tensor,
			 lshard_series_options *out)
{
	const struct gemm_options *options = &bench->options;

	*tensor = (lshard_tensor){"down", gemm_layer_bytes(options), 0, LSHARD_STRIPE_BYTES, 0, 0};
	*out = (lshard_series_options)LSHARD_SERIES_OPTIONS_INIT;
	out->name = "stack";
	out->layer_count = options->layers;
	out->tensors = tensor;
	out->tensor_count = 1;
	out->prefetch = series->prefetch;
	out->placement = options->placement;
	out->resident_bytes = series->resident_bytes;
}

/* A percentage is of the bytes that the rank with the fewest of its own does not store: the same on every rank. */
static uint64_t resident_bytes(const struct gemm_bench *bench, const struct bench_resident *resident)
{
	const struct gemm_series none = {0, 0, 0};
	lshard_plan_input input = LSHARD_PLAN_INPUT_INIT;
	lshard_plan_result plan = LSHARD_PLAN_RESULT_INIT;
	lshard_series_options options;
	lshard_tensor tensor;

	if (!resident->is_percent)
		return resident->bytes;
	if (resident->percent >= 100)
		return UINT64_MAX;
	gemm_series_options(bench, &none, &tensor, &options);
	input.size = (int32_t)bench->options.ranks;
	input.rank = input.size - 1;
	if (lshard_plan(&options, &input, &plan) != LSHARD_OK)
		return 0; /* creation will say what is wrong */
	return (uint64_t)((double)(plan.replicated_bytes - plan.share_bytes) * resident->percent / 100);
}

static uint32_t add_series(struct gemm_bench *bench, uint32_t prefetch, uint32_t resident)
{
	const uint64_t bytes =
		resident == GEMM_ALL_RESIDENT ? UINT64_MAX : resident_bytes(bench, &bench->options.residents[resident]);

	for (uint32_t i = 0; i < bench->series_count; i++)
		if (bench->series[i].prefetch == prefetch && bench->series[i].resident == resident)
			return i;
	bench->series[bench->series_count] = (struct gemm_series){prefetch, resident, bytes};
	return bench->series_count++;
}

/* ---- Arms ---------------------------------------------------------------------------------------------------- */

static uint32_t add_arm(struct gemm_bench *bench, enum gemm_kind kind, uint32_t series, uint32_t baseline)
{
	bench->arms[bench->arm_count] = (struct gemm_arm){.kind = kind,
							  .series = series,
							  .baseline = baseline,
							  .copies = GEMM_NO_ARM,
							  .eager = GEMM_NO_ARM,
							  .ours = GEMM_NO_ARM};
	return bench->arm_count++;
}

static void add_rival(struct gemm_bench *bench, enum gemm_rival rival, uint32_t overlapped)
{
	const uint32_t arm = add_arm(bench, GEMM_RIVAL, GEMM_NO_SERIES, GEMM_ARM_FIRST);

	bench->arms[arm].rival = rival;
	bench->arms[arm].ours = overlapped;
}

static bool is_wanted(const struct gemm_bench *bench, enum gemm_kind kind)
{
	return !(bench->options.left_out & 1u << kind);
}

/* Returns the overlapped arm, or GEMM_NO_ARM. */
static uint32_t add_case(struct gemm_bench *bench, uint32_t prefetch, uint32_t resident, uint32_t graph_baseline)
{
	uint32_t copies = GEMM_NO_ARM, overlapped;

	if (is_wanted(bench, GEMM_COPIES))
		copies = add_arm(bench, GEMM_COPIES, add_series(bench, prefetch, resident), GEMM_ARM_FIRST);
	if (!is_wanted(bench, GEMM_OVERLAPPED))
		return GEMM_NO_ARM;
	overlapped = add_arm(bench, GEMM_OVERLAPPED, add_series(bench, prefetch, resident), GEMM_ARM_FIRST);
	bench->arms[overlapped].copies = copies;
	if (bench->options.graph) {
		const uint32_t captured =
			add_arm(bench, GEMM_OVERLAPPED, bench->arms[overlapped].series, graph_baseline);

		bench->arms[captured].graph = true;
		bench->arms[captured].copies = copies;
		bench->arms[captured].eager = overlapped;
	}
	return overlapped;
}

static void add_delayed(struct gemm_bench *bench, uint32_t even)
{
	bench->arms[bench->arm_count] = bench->arms[even];
	bench->arms[bench->arm_count].delayed = true;
	bench->arms[bench->arm_count].copies = GEMM_NO_ARM;
	bench->arms[bench->arm_count].ours = GEMM_NO_ARM;
	bench->arms[bench->arm_count++].baseline = even;
}

static void add_rivals(struct gemm_bench *bench, uint32_t overlapped)
{
	struct gemm_options *options = &bench->options;

	options->rivals[GEMM_BROADCAST] |= options->slow_percent > 0;
	for (unsigned rival = 0; rival < GEMM_RIVALS; rival++)
		if (options->rivals[rival])
			add_rival(bench, (enum gemm_rival)rival, overlapped);
	if (options->slow_percent <= 0)
		return;
	add_delayed(bench, overlapped);
	for (uint32_t arm = GEMM_ARM_SHUFFLED; arm < bench->arm_count; arm++)
		if (bench->arms[arm].kind == GEMM_RIVAL && bench->arms[arm].rival == GEMM_BROADCAST) {
			add_delayed(bench, arm);
			return;
		}
}

static void add_arms(struct gemm_bench *bench)
{
	const struct gemm_options *options = &bench->options;
	uint32_t graph_baseline = 0;
	uint32_t first_case = 0;

	(void)add_arm(bench, GEMM_RESIDENT, GEMM_NO_SERIES, GEMM_ARM_FIRST);
	(void)add_arm(bench, GEMM_RESIDENT, GEMM_NO_SERIES, GEMM_ARM_FIRST);
	if (is_wanted(bench, GEMM_CONTROL))
		(void)add_arm(bench, GEMM_CONTROL, add_series(bench, 0, GEMM_ALL_RESIDENT), GEMM_ARM_FIRST);
	if (options->graph) {
		graph_baseline = add_arm(bench, GEMM_RESIDENT, GEMM_NO_SERIES, GEMM_ARM_FIRST);
		bench->arms[graph_baseline].graph = true;
		bench->arms[graph_baseline].eager = GEMM_ARM_FIRST;
	}
	for (uint32_t resident = 0; resident < options->resident_count; resident++) {
		for (uint32_t prefetch = 0; prefetch < options->prefetch_count; prefetch++) {
			const uint32_t overlapped =
				add_case(bench, options->prefetches[prefetch], resident, graph_baseline);

			first_case = first_case ? first_case : overlapped;
		}
		if (is_wanted(bench, GEMM_SERIAL))
			(void)add_arm(bench, GEMM_SERIAL, add_series(bench, 0, resident), GEMM_ARM_FIRST);
	}
	add_rivals(bench, first_case);
}

/* ---- The command --------------------------------------------------------------------------------------------- */

static bool make_room(struct gemm_bench *bench)
{
	const struct gemm_options *options = &bench->options;
	const uint64_t samples = (uint64_t)options->token_count * bench->arm_count * options->ranks * options->rounds;

	bench->shared_bytes = sizeof *bench->shared + samples * sizeof *bench->shared->samples;
	bench->shared = bench_shared_allocate(bench->shared_bytes);
	return bench->shared != NULL;
}

static int measure(struct gemm_bench *bench, int argc, char **argv)
{
	bool done;

	if (!make_room(bench)) {
		cli_message(COMMAND ": no memory for the samples");
		return CLI_FAILED;
	}
	snprintf(bench->job, sizeof bench->job, "bench-step-%ld-%llx", (long)getpid(),
		 (unsigned long long)bench_now_ns());
	done = bench_ranks_run(&bench->shared->ranks, (int32_t)bench->options.ranks, gemm_rank_run, bench);
	if (done)
		return gemm_report(bench, argc, argv);
	cli_message(COMMAND ": %s", bench->shared->ranks.failure);
	return CLI_FAILED;
}

int bench_gemm(int argc, char **argv)
{
	struct gemm_bench bench = {.arm_count = 0};
	bool help;
	int result = gemm_options_parse(argc, argv, &bench.options, &help);

	if (result != CLI_DONE || help)
		return result;
	if (bench.options.save && !bench_save_possible(COMMAND, bench.options.save))
		return CLI_USAGE;
	add_arms(&bench);
	result = measure(&bench, argc, argv);
	bench_shared_free(bench.shared, bench.shared_bytes);
	return result;
}
