/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_step_options.c - the options of `bench step` and their help.
 */
#include "bench_save.h"
#include "bench_step.h"
#include "cli.h"

#include <string.h>

#define COMMAND      "step"
#define ROUNDS_LEAST 9u
#define LAYERS_MOST  4096u

enum {
	OPTION_LAYERS = 256,
	OPTION_LAYER_BYTES,
	OPTION_COMPUTE_US,
	OPTION_RANKS,
	OPTION_PREFETCH,
	OPTION_PLACEMENT,
	OPTION_RESIDENT,
	OPTION_TRANSPORT,
	OPTION_LINK,
	OPTION_RATIO,
	OPTION_PASSES,
	OPTION_ROUNDS,
	OPTION_SLOW,
	OPTION_ALL_COMPUTE,
	OPTION_MARGIN,
	OPTION_MAX_OFF,
	OPTION_JSON,
	OPTION_SAVE,
	OPTION_OF_E2E /* was here once */
};

static const struct option long_options[] = {{"layers", required_argument, NULL, OPTION_LAYERS},
					     {"layer-bytes", required_argument, NULL, OPTION_LAYER_BYTES},
					     {"compute-us", required_argument, NULL, OPTION_COMPUTE_US},
					     {"ranks", required_argument, NULL, OPTION_RANKS},
					     {"prefetch", required_argument, NULL, OPTION_PREFETCH},
					     {"placement", required_argument, NULL, OPTION_PLACEMENT},
					     {"resident", required_argument, NULL, OPTION_RESIDENT},
					     {"transport", required_argument, NULL, OPTION_TRANSPORT},
					     {"link-bytes-per-s", required_argument, NULL, OPTION_LINK},
					     {"ratio", required_argument, NULL, OPTION_RATIO},
					     {"passes", required_argument, NULL, OPTION_PASSES},
					     {"rounds", required_argument, NULL, OPTION_ROUNDS},
					     {"slow-rank-percent", required_argument, NULL, OPTION_SLOW},
					     {"all-compute", no_argument, NULL, OPTION_ALL_COMPUTE},
					     {"margin", required_argument, NULL, OPTION_MARGIN},
					     {"max-off", required_argument, NULL, OPTION_MAX_OFF},
					     {"json", no_argument, NULL, OPTION_JSON},
					     {"save", required_argument, NULL, OPTION_SAVE},
					     {"devices", optional_argument, NULL, OPTION_OF_E2E},
					     {"rivals", optional_argument, NULL, OPTION_OF_E2E},
					     {"help", no_argument, NULL, 'h'},
					     {NULL, 0, NULL, 0}};

/* clang-format off: one line of text per line */
static const char help_text[] = "Usage: layershard-bench step [OPTION]...\n"
				"\n"
				"Passes over a synthetic stack of layers that are fetched over a link of limited\n"
				"speed, beside what the planner predicts. Ranks are threads of this process; rank\n"
				"0 computes, the others hold their shards. A layer's compute is modelled by\n"
				"letting a fixed time pass: what is measured is how transfers hide behind it, not\n"
				"a kernel.\n"
				"\n"
				"The stack\n"
				"  --layers N             layers (default 16)\n"
				"  --layer-bytes B        bytes of a layer, a multiple of 64 (default 64K; suffix\n"
				"                         K, M or G)\n"
				"  --compute-us C         compute of a layer in microseconds (default 2000)\n"
				"  --ranks N              ranks over which the layers are sharded (default 2)\n"
				"  --placement P          whole (default) or striped\n"
				"  --prefetch K[,K]...    prefetch distances (default 0,1,2)\n"
				"  --resident A[,A]...    memory for layers that a rank keeps beside its shard:\n"
				"                         bytes, or a percentage of the layers that it does not\n"
				"                         store (default 0)\n"
				"The link\n"
				"  --transport SPEC       as in lshard_group_options (default local); the\n"
				"                         throttle is put in front\n"
				"  --ratio X[,X]...       speed of the link, as compute : transfer of a pass:\n"
				"                         layers * C, divided by the time that the layers a rank\n"
				"                         does not store take on the link without residents\n"
				"                         (default 2.6,1.2,0.6)\n"
				"  --link-bytes-per-s X   speed of the link into a rank, instead of --ratio\n"
				"The measurement\n"
				"  --passes P             passes of a sample, after three that are not timed\n"
				"                         (default 4)\n"
				"  --rounds R             samples of each variant, at least 9 (default 9)\n"
				"  --all-compute          every rank runs passes; times are those of the slowest\n"
				"                         rank. Collective transports need it\n"
				"  --slow-rank-percent S  also: all ranks compute, and the last one loses S % of\n"
				"                         a step in every pass; the transport given, and\n"
				"                         local:lockstep beside it, with the first ratio,\n"
				"                         prefetch distance and amount of the lists\n"
				"  --margin P             inconclusive when A first and A last differ by more\n"
				"                         than P % (default 1)\n"
				"  --max-off P            exit status 1 when an exposed time is off the predicted\n"
				"                         one by more than P % of a step\n"
				"  --json                 one JSON object instead of the table\n"
				"  --save FILE            also write it to FILE, with machine, date, command and\n"
				"                         version\n"
				"  -h, --help             this text\n"
				"\n" CLI_EXIT_HELP CLI_EXIT_HELP_INCONCLUSIVE;
/* clang-format on */

static int take_positive(const char *name, const char *text, double most, double *value)
{
	return bench_take_positive(COMMAND, name, text, most, value);
}

/* ---- Lists: items separated by commas ------------------------------------------------------------------------ */

static int take_ratio(void *user, uint32_t index, const char *item)
{
	struct step_options *options = user;

	options->ratio_count = index + 1;
	return take_positive("ratio", item, 1000, &options->ratios[index]);
}

static int take_prefetch(void *user, uint32_t index, const char *item)
{
	struct step_options *options = user;

	options->prefetch_count = index + 1;
	return cli_take_number(COMMAND, "prefetch", item, 0, UINT32_MAX, &options->prefetches[index]);
}

static int take_resident(void *user, uint32_t index, const char *item)
{
	struct step_options *options = user;

	options->resident_count = index + 1;
	return bench_take_resident(COMMAND, item, &options->residents[index]);
}

static int take_list(struct step_options *options, const char *name, const char *text,
		     int (*take)(void *options, uint32_t index, const char *item))
{
	return bench_take_list(COMMAND, name, text, STEP_LIST_MOST, take, options);
}

/* ---- One option ---------------------------------------------------------------------------------------------- */

static int take_transport(struct step_options *options, const char *text)
{
	char why[256];

	if (!cli_transport_is_usable(text, why, sizeof why))
		return cli_usage(COMMAND, "--transport is '%s'; %s", text, why);
	if (strlen(text) >= STEP_SPEC_BYTES - 64)
		return cli_usage(COMMAND, "--transport is too long (at most %u characters)", STEP_SPEC_BYTES - 65);
	options->transport = text;
	return CLI_DONE;
}

static int take_layer_bytes(struct step_options *options, const char *text)
{
	if (!cli_parse_bytes(text, &options->layer_bytes) || options->layer_bytes == 0 ||
	    options->layer_bytes % BENCH_LINE_BYTES != 0)
		return cli_usage(COMMAND, "--layer-bytes is '%s'; it must be a multiple of %u bytes", text,
				 BENCH_LINE_BYTES);
	return CLI_DONE;
}

static int take_compute(struct step_options *options, const char *text)
{
	double microseconds = 0;
	const int result = take_positive("compute-us", text, 1e9, &microseconds);

	if (result == CLI_DONE)
		options->compute_ns = (uint64_t)(microseconds * 1000 + 0.5);
	if (result == CLI_DONE && options->compute_ns == 0)
		return cli_usage(COMMAND, "--compute-us is '%s'; that is less than a nanosecond", text);
	return result;
}

static int take_link(struct step_options *options, const char *text)
{
	if (!cli_parse_bytes(text, &options->link_bytes_per_s) || options->link_bytes_per_s == 0)
		return cli_usage(COMMAND, "--link-bytes-per-s is '%s'; it must be a number of bytes above 0", text);
	return CLI_DONE;
}

static int take_stack_option(struct step_options *options, int option, const char *text)
{
	uint32_t ranks = 0;
	int result;

	switch (option) {
	case OPTION_LAYERS:
		return cli_take_number(COMMAND, "layers", text, 1, LAYERS_MOST, &options->layers);
	case OPTION_LAYER_BYTES:
		return take_layer_bytes(options, text);
	case OPTION_COMPUTE_US:
		return take_compute(options, text);
	case OPTION_RANKS:
		result = cli_take_number(COMMAND, "ranks", text, 1, 1024, &ranks);
		options->ranks = (int32_t)ranks;
		return result;
	case OPTION_PREFETCH:
		return take_list(options, "prefetch", text, take_prefetch);
	case OPTION_RESIDENT:
		return take_list(options, "resident", text, take_resident);
	case OPTION_PLACEMENT:
		return bench_take_placement(COMMAND, text, &options->placement);
	default:
		return cli_usage(COMMAND, "wrong option");
	}
}

static int take_option(void *user, int option, const char *text)
{
	struct step_options *options = user;

	switch (option) {
	case OPTION_TRANSPORT:
		return take_transport(options, text);
	case OPTION_LINK:
		return take_link(options, text);
	case OPTION_RATIO:
		return take_list(options, "ratio", text, take_ratio);
	case OPTION_PASSES:
		return cli_take_number(COMMAND, "passes", text, 1, 1000000, &options->passes);
	case OPTION_ROUNDS:
		return cli_take_number(COMMAND, "rounds", text, ROUNDS_LEAST, 10000, &options->rounds);
	case OPTION_SLOW:
		return take_positive("slow-rank-percent", text, 10000, &options->slow_percent);
	case OPTION_MARGIN:
		return take_positive("margin", text, 100, &options->margin_percent);
	case OPTION_MAX_OFF:
		return take_positive("max-off", text, 1000, &options->most_off_percent);
	case OPTION_ALL_COMPUTE:
		options->all_compute = true;
		return CLI_DONE;
	case OPTION_JSON:
		options->json = true;
		return CLI_DONE;
	case OPTION_SAVE:
		options->save = text;
		return CLI_DONE;
	case OPTION_OF_E2E:
		return cli_usage(COMMAND, "--devices and --rivals are no options any more: bench/torch/e2e.py "
					  "measures passes on GPUs, with its own --devices");
	default:
		return take_stack_option(options, option, text);
	}
}

/* What was not given; and what does not go together. */
static int complete(struct step_options *options)
{
	static const double ratios[] = {2.6, 1.2, 0.6};
	static const uint32_t prefetches[] = {0, 1, 2};

	if (options->link_bytes_per_s && options->ratio_count)
		return cli_usage(COMMAND,
				 "--ratio and --link-bytes-per-s both say how fast the link is; give one of them");
	if (options->slow_percent > 0 && options->ranks < 2)
		return cli_usage(COMMAND, "--slow-rank-percent needs at least 2 ranks");
	if (options->save && !bench_save_possible(COMMAND, options->save))
		return CLI_USAGE;
	if (!options->ratio_count && !options->link_bytes_per_s) {
		memcpy(options->ratios, ratios, sizeof ratios);
		options->ratio_count = sizeof ratios / sizeof *ratios;
	}
	if (!options->prefetch_count) {
		memcpy(options->prefetches, prefetches, sizeof prefetches);
		options->prefetch_count = sizeof prefetches / sizeof *prefetches;
	}
	return options->resident_count ? CLI_DONE : take_resident(options, 0, "0");
}

int step_options_parse(int argc, char **argv, struct step_options *options, bool *help)
{
	static const struct bench_syntax syntax = {COMMAND, long_options, help_text, take_option};
	int result;

	*options = (struct step_options){.layers = 16,
					 .layer_bytes = 64 * 1024,
					 .compute_ns = 2000000,
					 .ranks = 2,
					 .transport = "local",
					 .passes = 4,
					 .rounds = ROUNDS_LEAST,
					 .margin_percent = 1,
					 .argc = argc,
					 .argv = argv};
	result = bench_options_read(&syntax, argc, argv, options, help);
	return result == CLI_DONE && !*help ? complete(options) : result;
}
