/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_link_options.c - the options of `bench link` and their help.
 */
#include "bench_link.h"
#include "bench_options.h"
#include "bench_save.h"
#include "cli.h"

#include <layershard/plan.h>

#include <string.h>

#define COMMAND        "link"
#define ROUNDS_LEAST   9u
#define BYTES_LEAST    4096u
#define BYTES_MOST     (UINT64_C(16) << 30)
#define DEFAULT_LEAST  (UINT64_C(64) << 10)
#define DEFAULT_HOST   (UINT64_C(16) << 20)
#define DEFAULT_DEVICE (UINT64_C(256) << 20)

enum {
	OPTION_DEVICES = 256,
	OPTION_RANKS,
	OPTION_TRANSPORT,
	OPTION_PLACEMENT,
	OPTION_MIN_BYTES,
	OPTION_MAX_BYTES,
	OPTION_FACTOR,
	OPTION_ITERS,
	OPTION_WARMUP,
	OPTION_ROUNDS,
	OPTION_READERS,
	OPTION_JSON,
	OPTION_SAVE
};

static const struct option long_options[] = {{"devices", required_argument, NULL, OPTION_DEVICES},
					     {"ranks", required_argument, NULL, OPTION_RANKS},
					     {"transport", required_argument, NULL, OPTION_TRANSPORT},
					     {"placement", required_argument, NULL, OPTION_PLACEMENT},
					     {"min-bytes", required_argument, NULL, OPTION_MIN_BYTES},
					     {"max-bytes", required_argument, NULL, OPTION_MAX_BYTES},
					     {"factor", required_argument, NULL, OPTION_FACTOR},
					     {"iters", required_argument, NULL, OPTION_ITERS},
					     {"warmup", required_argument, NULL, OPTION_WARMUP},
					     {"rounds", required_argument, NULL, OPTION_ROUNDS},
					     {"readers", required_argument, NULL, OPTION_READERS},
					     {"json", no_argument, NULL, OPTION_JSON},
					     {"save", required_argument, NULL, OPTION_SAVE},
					     {"help", no_argument, NULL, 'h'},
					     {NULL, 0, NULL, 0}};

/* clang-format off: one line of text per line */
static const char help_text[] = "Usage: layershard-bench link --devices 0,1 [OPTION]...\n"
				"       layershard-bench link [--transport SPEC] [OPTION]...\n"
				"\n"
				"How fast a layer is fetched from another rank, by size: lshard_reach and\n"
				"lshard_wait with a transfer, beside a bare copy of as many bytes between the\n"
				"same ranks in the same rounds, and a copy inside one memory. All bytes are\n"
				"compared at the end.\n"
				"\n"
				"The ranks\n"
				"  --devices D[,D]...    one process per entry on that GPU: 0,1 are two GPUs, 0,0\n"
				"                        two processes on one GPU. Without it layers lie in host\n"
				"                        memory\n"
				"  --ranks N             in host memory: how many, 2 to 8 (default 2)\n"
				"  --transport SPEC      as in lshard_group_options (default cuda with --devices,\n"
				"                        else shm:copy); cuda:copy copies between ranks on one\n"
				"                        GPU too; on local, ranks are threads\n"
				"  --placement P[,P]     whole (default), striped, or both\n"
				"  --readers R           also: the last R ranks fetch from rank 0 (striped: from\n"
				"                        all) at once\n"
				"The sizes\n"
				"  --min-bytes B         the smallest, a multiple of 64 (default 64K; suffix K, M\n"
				"                        or G)\n"
				"  --max-bytes B         the biggest (default 256M with --devices, else 16M)\n"
				"  --factor F            from one to the next, 2 to 1024 (default 4)\n"
				"The measurement\n"
				"  --iters I             fetches of a sample, one after the other (default 20)\n"
				"  --warmup W            fetches before them, at least 1 (default 3)\n"
				"  --rounds R            samples of each line, at least 9 (default 9)\n"
				"  --json                one JSON object instead of the table\n"
				"  --save FILE           also write it to FILE, with machine, date, command and\n"
				"                        versions\n"
				"  -h, --help            this text\n"
				"\n" CLI_EXIT_HELP CLI_EXIT_HELP_INCONCLUSIVE;
/* clang-format on */

static int take_bytes(const char *name, const char *text, uint64_t *bytes)
{
	uint64_t number;

	if (!cli_parse_bytes(text, &number) || number < BYTES_LEAST || number > BYTES_MOST ||
	    number % BENCH_LINE_BYTES != 0)
		return cli_usage(COMMAND, "--%s is '%s'; it must be a multiple of %u bytes from 4K to 16G", name, text,
				 BENCH_LINE_BYTES);
	*bytes = number;
	return CLI_DONE;
}

static int take_device(void *user, uint32_t index, const char *item)
{
	struct link_options *options = user;

	options->ranks = (int32_t)index + 1;
	return cli_take_number(COMMAND, "devices", item, 0, 1023, &options->devices[index]);
}

static int take_placement(void *user, uint32_t index, const char *item)
{
	struct link_options *options = user;

	const int result = bench_take_placement(COMMAND, item, &options->placements[index]);

	if (result == CLI_DONE && index > 0 && options->placements[index] == options->placements[0])
		return cli_usage(COMMAND, "--placement names '%s' twice", item);
	options->placement_count = index + 1;
	return result;
}

static int take_option(void *user, int option, const char *text)
{
	struct link_options *options = user;

	switch (option) {
	case OPTION_DEVICES:
		options->has_devices = true;
		return bench_take_list(COMMAND, "devices", text, LINK_RANKS_MOST, take_device, options);
	case OPTION_RANKS:
		return cli_take_number(COMMAND, "ranks", text, 2, LINK_RANKS_MOST, &options->wanted_ranks);
	case OPTION_TRANSPORT:
		options->transport = text;
		return CLI_DONE;
	case OPTION_PLACEMENT:
		return bench_take_list(COMMAND, "placement", text, LINK_PLACEMENTS_MOST, take_placement, options);
	case OPTION_MIN_BYTES:
		return take_bytes("min-bytes", text, &options->least_bytes);
	case OPTION_MAX_BYTES:
		return take_bytes("max-bytes", text, &options->most_bytes);
	case OPTION_FACTOR:
		return cli_take_number(COMMAND, "factor", text, 2, 1024, &options->factor);
	case OPTION_ITERS:
		return cli_take_number(COMMAND, "iters", text, 1, 1000000, &options->iterations);
	case OPTION_WARMUP:
		return cli_take_number(COMMAND, "warmup", text, 1, 1000000, &options->warm_up);
	case OPTION_ROUNDS:
		return cli_take_number(COMMAND, "rounds", text, ROUNDS_LEAST, 10000, &options->rounds);
	case OPTION_READERS:
		return cli_take_number(COMMAND, "readers", text, 1, LINK_RANKS_MOST - 1, &options->readers);
	case OPTION_JSON:
		options->json = true;
		return CLI_DONE;
	default:
		options->save = text;
		return CLI_DONE;
	}
}

/* ---- All of them --------------------------------------------------------------------------------------------- */

/* The transport exists and carries the memory that the ranks have. */
static int check_transport(const struct link_options *options)
{
	lshard_transport_information found = LSHARD_TRANSPORT_INFORMATION_INIT;
	uint32_t index = 0;

	while (lshard_transport_info(index, &found) == LSHARD_OK && !cli_transport_is(options->transport, found.name))
		index++;
	if (lshard_transport_info(index, &found) != LSHARD_OK)
		return cli_usage(COMMAND, "--transport '%s': there is no such transport; 'layershard info' lists them",
				 options->transport);
	if (cli_transport_is_collective(options->transport))
		return cli_usage(COMMAND, "on '%s' no rank can fetch alone", options->transport);
	if (options->has_devices && found.memory != LSHARD_MEMORY_CUDA)
		return cli_usage(COMMAND, "--devices needs a transport for a GPU's memory, and %s is for the host's",
				 found.name);
	if (!options->has_devices && found.memory != LSHARD_MEMORY_HOST)
		return cli_usage(COMMAND, "%s carries layers in a GPU's memory: give --devices", found.name);
	if (!found.available) {
		cli_message(COMMAND ": %s cannot be used here: %s", found.name, found.reason);
		return CLI_FAILED;
	}
	return CLI_DONE;
}

static int check_all(const struct link_options *options)
{
	uint32_t sizes = 0;

	if (options->ranks < 2)
		return cli_usage(COMMAND, "--devices needs two entries at least: 0,0 are two processes on one GPU");
	if (options->least_bytes > options->most_bytes)
		return cli_usage(COMMAND, "--min-bytes is more than --max-bytes");
	for (uint64_t bytes = options->least_bytes; bytes <= options->most_bytes; bytes *= options->factor)
		sizes++;
	if (sizes > LINK_SIZES_MOST)
		return cli_usage(COMMAND, "%u sizes are more than %u: give a larger --factor", sizes, LINK_SIZES_MOST);
	if (options->readers >= (uint32_t)options->ranks)
		return cli_usage(COMMAND, "--readers %u: %d ranks have %d that can fetch from rank 0", options->readers,
				 (int)options->ranks, (int)options->ranks - 1);
	if (options->save && !bench_save_possible(COMMAND, options->save))
		return CLI_USAGE;
	return check_transport(options);
}

static int fill_in(struct link_options *options)
{
	const uint32_t ranks = options->wanted_ranks;

	if (options->has_devices && ranks)
		return cli_usage(COMMAND, "--devices says how many ranks there are; --ranks is for host memory");
	if (!options->has_devices)
		options->ranks = ranks ? (int32_t)ranks : 2;
	if (!options->transport)
		options->transport = options->has_devices ? "cuda" : "shm:copy";
	if (!options->most_bytes)
		options->most_bytes = options->has_devices ? DEFAULT_DEVICE : DEFAULT_HOST;
	if (!options->least_bytes)
		options->least_bytes = options->most_bytes < DEFAULT_LEAST ? options->most_bytes : DEFAULT_LEAST;
	return check_all(options);
}

int link_options_parse(int argc, char **argv, struct link_options *options, bool *help)
{
	static const struct bench_syntax syntax = {COMMAND, long_options, help_text, take_option};
	int result;

	*options = (struct link_options){.placements = {LSHARD_WHOLE},
					 .placement_count = 1,
					 .factor = 4,
					 .iterations = 20,
					 .warm_up = 3,
					 .rounds = ROUNDS_LEAST};
	result = bench_options_read(&syntax, argc, argv, options, help);
	return result == CLI_DONE && !*help ? fill_in(options) : result;
}
