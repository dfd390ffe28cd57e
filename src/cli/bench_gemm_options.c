/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_options.c - the options of `bench step --devices` and their help.
 */
#include "bench_gemm.h"
#include "cli.h"

#include <layershard/plan.h>

#include <string.h>

#define COMMAND      "bench step --devices 0" /* of which --help tells of these options */
#define ROUNDS_LEAST 3u

enum {
	OPTION_DEVICES = 256,
	OPTION_LAYERS,
	OPTION_DIMS,
	OPTION_TOKENS,
	OPTION_PREFETCH,
	OPTION_PLACEMENT,
	OPTION_RESIDENT,
	OPTION_TRANSPORT,
	OPTION_RIVALS,
	OPTION_ONLY,
	OPTION_GRAPH,
	OPTION_PASSES,
	OPTION_ROUNDS,
	OPTION_WARM,
	OPTION_SLOW,
	OPTION_ALL_COMPUTE,
	OPTION_MARGIN,
	OPTION_JSON,
	OPTION_SAVE
};

static const struct option long_options[] = {{"devices", required_argument, NULL, OPTION_DEVICES},
					     {"layers", required_argument, NULL, OPTION_LAYERS},
					     {"dims", required_argument, NULL, OPTION_DIMS},
					     {"tokens", required_argument, NULL, OPTION_TOKENS},
					     {"prefetch", required_argument, NULL, OPTION_PREFETCH},
					     {"placement", required_argument, NULL, OPTION_PLACEMENT},
					     {"resident", required_argument, NULL, OPTION_RESIDENT},
					     {"transport", required_argument, NULL, OPTION_TRANSPORT},
					     {"rivals", required_argument, NULL, OPTION_RIVALS},
					     {"only", required_argument, NULL, OPTION_ONLY},
					     {"graph", no_argument, NULL, OPTION_GRAPH},
					     {"passes", required_argument, NULL, OPTION_PASSES},
					     {"rounds", required_argument, NULL, OPTION_ROUNDS},
					     {"warm-ms", required_argument, NULL, OPTION_WARM},
					     {"slow-rank-percent", required_argument, NULL, OPTION_SLOW},
					     {"all-compute", no_argument, NULL, OPTION_ALL_COMPUTE},
					     {"margin", required_argument, NULL, OPTION_MARGIN},
					     {"json", no_argument, NULL, OPTION_JSON},
					     {"save", required_argument, NULL, OPTION_SAVE},
					     {"help", no_argument, NULL, 'h'},
					     {NULL, 0, NULL, 0}};

/* clang-format off: one line of text per line */
static const char help_text[] = "Usage: layershard bench step --devices D[,D]... [OPTION]...\n"
				"\n"
				"Passes over a stack of real layers on GPUs: two linears each, in bfloat16 by\n"
				"cuBLAS; the weight of the second one is sharded. Ranks are processes. All\n"
				"weights are random and all ways get the same ones; what they compute is compared\n"
				"bit by bit with what everything resident computes.\n"
				"\n"
				"  --devices D[,D]...     the GPU of each rank: 0,1 are two GPUs, 0,0 two\n"
				"                         processes on one\n"
				"The stack\n"
				"  --layers N             layers (default 16)\n"
				"  --dims HxF             a layer is H -> F -> H (default 7168x16384)\n"
				"  --tokens T[,T]...      rows that a rank computes at once (default\n"
				"                         8192,4096,2048,1024,512,16)\n"
				"  --placement P          owner (default) or striped\n"
				"  --prefetch K[,K]...    prefetch steps (default 1)\n"
				"  --resident A[,A]...    memory for further layers: bytes, or a percentage of\n"
				"                         the layers that a rank does not store (default 0)\n"
				"  --transport SPEC       as in lshard_group_options (default cuda)\n"
				"The ways\n"
				"  --graph                resident and overlapped from CUDA graphs too, each\n"
				"                         captured for one pass\n"
				"  --rivals R[,R]...      none (default), all, or of: broadcast (NCCL, k = 1),\n"
				"                         allgather (NCCL, of stripes), allgather-ce (the same by\n"
				"                         copy engines), peer-copy (copies that run on the GPU\n"
				"                         they come from)\n"
				"  --only W[,W]...        of control, copies, overlapped and serial only these,\n"
				"                         beside resident and rivals: for less time, or one way\n"
				"                         under a profiler\n"
				"  --slow-rank-percent S  also: the last rank computes S % more in every pass, on\n"
				"                         pulls and on broadcast\n"
				"  --all-compute          every rank runs passes although ranks share a GPU,\n"
				"                         whose time they then take from each other; without it\n"
				"                         rank 0 computes there and the others hold their layers\n"
				"The measurement\n"
				"  --passes P             passes of a sample (default 4)\n"
				"  --rounds R             samples of each way, in shuffled order (default 31, at\n"
				"                         least 3)\n"
				"  --warm-ms W            a sample follows W ms of the same way, so that the GPU\n"
				"                         has the clock and the power of it and not of the one\n"
				"                         before (default 200)\n"
				"  --margin P             inconclusive when resident first and last differ by\n"
				"                         more than P % (default 0.5)\n"
				"  --json                 one JSON object instead of the tables\n"
				"  --save FILE            that object also into FILE, with machine, date, command\n"
				"                         and versions\n"
				"  -h, --help             this text\n"
				"\n"
				"Environment: LAYERSHARD_CUBLAS_SO_PATH and LAYERSHARD_NCCL_SO_PATH name those\n"
				"libraries where the loader does not find them. Without NVML clocks and power are\n"
				"not told.\n"
				"\n" CLI_EXIT_HELP CLI_EXIT_HELP_INCONCLUSIVE;
/* clang-format on */

static const char *const rival_names[GEMM_RIVALS] = {"broadcast", "allgather", "allgather-ce", "peer-copy"};

const char *gemm_rival_name(enum gemm_rival rival)
{
	return rival_names[rival];
}

const char *gemm_kind_name(enum gemm_kind kind)
{
	static const char *const names[GEMM_RIVAL] = {"resident", "control", "copies", "overlapped", "serial"};

	return names[kind];
}

bool gemm_shares_device(const struct gemm_options *options)
{
	for (uint32_t rank = 1; rank < options->ranks; rank++)
		for (uint32_t other = 0; other < rank; other++)
			if (options->devices[rank] == options->devices[other])
				return true;
	return false;
}

uint64_t gemm_layer_bytes(const struct gemm_options *options)
{
	return (uint64_t)options->hidden * options->inner * 2;
}

static int take_number(const char *name, const char *text, uint64_t least, uint64_t most, uint32_t *value)
{
	return cli_take_number(COMMAND, name, text, least, most, value);
}

static int take_positive(const char *name, const char *text, double most, double *value)
{
	return bench_take_positive(COMMAND, name, text, most, value);
}

/* ---- Lists --------------------------------------------------------------------------------------------------- */

static int take_device(void *user, uint32_t index, const char *item)
{
	struct gemm_options *options = user;

	options->ranks = index + 1;
	return take_number("devices", item, 0, 1023, &options->devices[index]);
}

static int take_tokens(void *user, uint32_t index, const char *item)
{
	struct gemm_options *options = user;

	options->token_count = index + 1;
	return take_number("tokens", item, 1, 1u << 20, &options->tokens[index]);
}

static int take_prefetch(void *user, uint32_t index, const char *item)
{
	struct gemm_options *options = user;

	options->prefetch_count = index + 1;
	return take_number("prefetch", item, 0, UINT32_MAX, &options->prefetches[index]);
}

static int take_resident(void *user, uint32_t index, const char *item)
{
	struct gemm_options *options = user;

	options->resident_count = index + 1;
	return bench_take_resident(COMMAND, item, &options->residents[index]);
}

static int take_rival(void *user, uint32_t index, const char *item)
{
	struct gemm_options *options = user;
	const bool all = strcmp(item, "all") == 0;
	bool known = all || strcmp(item, "none") == 0;

	for (unsigned rival = 0; rival < GEMM_RIVALS; rival++) {
		const bool named = strcmp(item, rival_names[rival]) == 0;

		options->rivals[rival] = (index > 0 && options->rivals[rival]) || all || named;
		known |= named;
	}
	return known ? CLI_DONE
		     : cli_usage(COMMAND,
				 "--rivals has no '%s'; there are none, all, broadcast, allgather, allgather-ce, "
				 "peer-copy",
				 item);
}

static int take_way(void *user, uint32_t index, const char *item)
{
	struct gemm_options *options = user;

	for (unsigned kind = GEMM_CONTROL; kind < GEMM_RIVAL; kind++)
		if (strcmp(item, gemm_kind_name((enum gemm_kind)kind)) == 0) {
			options->left_out = (index ? options->left_out : GEMM_EVERY_KIND) & ~(1u << kind);
			return CLI_DONE;
		}
	return cli_usage(COMMAND, "--only has no '%s'; there are control, copies, overlapped, serial", item);
}

static int take_list(struct gemm_options *options, const char *name, const char *text,
		     int (*take)(void *options, uint32_t index, const char *item))
{
	const uint32_t most = take == take_device ? GEMM_RANKS_MOST : GEMM_LIST_MOST;

	return bench_take_list(COMMAND, name, text, most, take, options);
}

/* ---- One option ---------------------------------------------------------------------------------------------- */

/* Of what cuBLAS multiplies fast: rows of 16 bytes at least. */
static int take_dims(struct gemm_options *options, const char *text)
{
	char copy[64];
	char *inner;
	uint64_t hidden_number, inner_number;

	snprintf(copy, sizeof copy, "%s", text);
	inner = strchr(copy, 'x');
	if (inner)
		*inner++ = '\0';
	if (!inner || !cli_parse_count(copy, 8, 1u << 20, &hidden_number) ||
	    !cli_parse_count(inner, 8, 1u << 20, &inner_number) || hidden_number % 8 || inner_number % 8)
		return cli_usage(COMMAND, "--dims is '%s'; it must be two multiples of 8, like 7168x16384", text);
	options->hidden = (uint32_t)hidden_number;
	options->inner = (uint32_t)inner_number;
	return CLI_DONE;
}

static int take_transport(struct gemm_options *options, const char *text)
{
	lshard_transport_information found;

	for (uint32_t i = 0; lshard_transport_info(i, &found) == LSHARD_OK; i++)
		if (found.memory == LSHARD_MEMORY_CUDA && cli_transport_is(text, found.name)) {
			options->transport = text;
			return CLI_DONE;
		}
	return cli_usage(COMMAND, "--transport is '%s'; with --devices it must carry layers in a GPU's memory: cuda",
			 text);
}

static int take_stack_option(struct gemm_options *options, int option, const char *text)
{
	switch (option) {
	case OPTION_DEVICES:
		return take_list(options, "devices", text, take_device);
	case OPTION_LAYERS:
		return take_number("layers", text, 1, 4096, &options->layers);
	case OPTION_DIMS:
		return take_dims(options, text);
	case OPTION_TOKENS:
		return take_list(options, "tokens", text, take_tokens);
	case OPTION_PREFETCH:
		return take_list(options, "prefetch", text, take_prefetch);
	case OPTION_RESIDENT:
		return take_list(options, "resident", text, take_resident);
	case OPTION_PLACEMENT:
		return bench_take_placement(COMMAND, text, &options->placement);
	default:
		return take_transport(options, text);
	}
}

static int take_option(void *user, int option, const char *text)
{
	struct gemm_options *options = user;

	switch (option) {
	case OPTION_RIVALS:
		return take_list(options, "rivals", text, take_rival);
	case OPTION_ONLY:
		return take_list(options, "only", text, take_way);
	case OPTION_GRAPH:
		options->graph = true;
		return CLI_DONE;
	case OPTION_PASSES:
		return take_number("passes", text, 1, 100000, &options->passes);
	case OPTION_ROUNDS:
		return take_number("rounds", text, ROUNDS_LEAST, 10000, &options->rounds);
	case OPTION_WARM:
		return take_positive("warm-ms", text, 10000, &options->warm_ms);
	case OPTION_SLOW:
		return take_positive("slow-rank-percent", text, 1000, &options->slow_percent);
	case OPTION_ALL_COMPUTE:
		options->all_compute = true;
		return CLI_DONE;
	case OPTION_MARGIN:
		return take_positive("margin", text, 100, &options->margin_percent);
	case OPTION_JSON:
		options->json = true;
		return CLI_DONE;
	case OPTION_SAVE:
		options->save = text;
		return CLI_DONE;
	default:
		return take_stack_option(options, option, text);
	}
}

/* What was not given; and what does not go together. */
static int complete(struct gemm_options *options)
{
	static const uint32_t tokens[] = {8192, 4096, 2048, 1024, 512, 16};

	if (options->slow_percent > 0 && options->left_out & 1u << GEMM_OVERLAPPED)
		return cli_usage(COMMAND, "--slow-rank-percent delays what is overlapped, which --only leaves out");
	if (options->slow_percent > 0 && (options->ranks < 2 || gemm_shares_device(options)))
		return cli_usage(COMMAND, "--slow-rank-percent needs at least 2 ranks, each on a GPU of its own: on a "
					  "shared one more work for one rank slows all");
	if (!options->token_count) {
		memcpy(options->tokens, tokens, sizeof tokens);
		options->token_count = sizeof tokens / sizeof *tokens;
	}
	if (!options->prefetch_count)
		options->prefetches[options->prefetch_count++] = 1;
	if (!options->resident_count && take_resident(options, 0, "0") != CLI_DONE)
		return CLI_USAGE;
	options->all_compute |= !gemm_shares_device(options);
	return CLI_DONE;
}

int gemm_options_parse(int argc, char **argv, struct gemm_options *options, bool *help)
{
	static const struct bench_syntax syntax = {COMMAND, long_options, help_text, take_option};
	int result;

	*options = (struct gemm_options){.layers = 16,
					 .hidden = 7168,
					 .inner = 16384,
					 .transport = "cuda",
					 .passes = 4,
					 .rounds = 31,
					 .warm_ms = 200,
					 .margin_percent = 0.5};
	result = bench_options_read(&syntax, argc, argv, options, help);
	return result == CLI_DONE && !*help ? complete(options) : result;
}
