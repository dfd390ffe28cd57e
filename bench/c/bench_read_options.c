/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_read_options.c - the options of `bench read` and their help.
 */
#include "bench_options.h"
#include "bench_read.h"
#include "bench_save.h"
#include "cli.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COMMAND       "read"
#define ROUNDS_LEAST  9u
#define BYTES_MOST    (UINT64_C(16) << 30)
#define BYTES_DEFAULT (UINT64_C(1) << 30)

enum {
	OPTION_BYTES = 256,
	OPTION_TRANSPORT,
	OPTION_SCATTER,
	OPTION_ROUNDS,
	OPTION_MIN_TO_LARGE,
	OPTION_MIN_TO_SMALL,
	OPTION_JSON,
	OPTION_SAVE
};

static const struct option long_options[] = {{"bytes", required_argument, NULL, OPTION_BYTES},
					     {"transport", required_argument, NULL, OPTION_TRANSPORT},
					     {"scatter", no_argument, NULL, OPTION_SCATTER},
					     {"rounds", required_argument, NULL, OPTION_ROUNDS},
					     {"min-to-large", required_argument, NULL, OPTION_MIN_TO_LARGE},
					     {"min-to-small", required_argument, NULL, OPTION_MIN_TO_SMALL},
					     {"json", no_argument, NULL, OPTION_JSON},
					     {"save", required_argument, NULL, OPTION_SAVE},
					     {"help", no_argument, NULL, 'h'},
					     {NULL, 0, NULL, 0}};

/* clang-format off: one line of text per line */
static const char help_text[] = "Usage: layershard-bench read [OPTION]...\n"
				"\n"
				"How fast weights in host memory are read: a rank's own in small pages and in\n"
				"pages of 2 MiB, beside those of a layershard series whose source is another\n"
				"process, without large pages and with. One core, and all that this process may\n"
				"use, add up all weights and multiply matrices of 4096 floats a row by a vector\n"
				"(cblas_sgemv), in the same rounds. All results and all bytes are compared, and\n"
				"the kernel is asked which pages each of them got.\n"
				"\n"
				"  --bytes B         of each of the four, a multiple of 2M up to 16G (default 1G,\n"
				"                    or 8 times the last cache if that is more, or what there\n"
				"                    is memory for; suffix K, M or G)\n"
				"  --transport SPEC  shm (default): the source's own memory is read; shm:copy: a\n"
				"                    copy of it\n"
				"  --scatter         small pages are touched in no order before they are filled:\n"
				"                    none lie one behind the other, as many do in a program that\n"
				"                    begins on a machine at rest\n"
				"  --rounds R        samples of each line, at least 9 (default 9)\n"
				"  --min-to-large R  exit status 1 when one core adds up shared weights in large\n"
				"                    pages at less than R times the speed of private ones in\n"
				"                    large pages; 3 when one of them is not to be had\n"
				"  --min-to-small R  the same, of private ones in small pages\n"
				"  --json            one JSON object instead of the table\n"
				"  --save FILE       also write it to FILE, with machine, date, command and\n"
				"                    version\n"
				"  -h, --help        this text\n"
				"\n" CLI_EXIT_HELP CLI_EXIT_HELP_INCONCLUSIVE;
/* clang-format on */

static int take_bytes(const char *text, uint64_t *bytes)
{
	if (!cli_parse_bytes(text, bytes) || *bytes == 0 || *bytes > BYTES_MOST || *bytes % READ_LARGE_BYTES != 0)
		return cli_usage(COMMAND, "--bytes is '%s'; it must be a multiple of 2M, up to 16G", text);
	return CLI_DONE;
}

/* Its ranks are two processes, and read host memory. */
static int take_transport(const char *text, const char **transport)
{
	if (!cli_transport_is(text, "shm"))
		return cli_usage(COMMAND, "--transport is '%s'; it may be shm or shm:copy, with wrappers before it",
				 text);
	*transport = text;
	return CLI_DONE;
}

static int take_option(void *user, int option, const char *text)
{
	struct read_options *options = user;

	switch (option) {
	case OPTION_BYTES:
		return take_bytes(text, &options->bytes);
	case OPTION_TRANSPORT:
		return take_transport(text, &options->transport);
	case OPTION_SCATTER:
		options->scatter = true;
		return CLI_DONE;
	case OPTION_ROUNDS:
		return cli_take_number(COMMAND, "rounds", text, ROUNDS_LEAST, 10000, &options->rounds);
	case OPTION_MIN_TO_LARGE:
		return bench_take_positive(COMMAND, "min-to-large", text, 1e9, &options->least_to_large);
	case OPTION_MIN_TO_SMALL:
		return bench_take_positive(COMMAND, "min-to-small", text, 1e9, &options->least_to_small);
	case OPTION_JSON:
		options->json = true;
		return CLI_DONE;
	default:
		options->save = text;
		return CLI_DONE;
	}
}

/* The number in KiB that stands behind @p name in a line of a file, in bytes; 0: none. */
static uint64_t told_bytes(const char *path, const char *name)
{
	FILE *file = fopen(path, "re");
	uint64_t kib = 0;
	char line[256];

	while (file && kib == 0 && fgets(line, sizeof line, file))
		if (strncmp(line, name, strlen(name)) == 0)
			kib = strtoull(line + strlen(name), NULL, 10);
	if (file)
		(void)fclose(file);
	return kib * 1024;
}

/* Far more than the cache holds (sysconf is wrong of it on some machines), and some is left to others. */
static uint64_t default_bytes(void)
{
	const uint64_t cache = told_bytes("/sys/devices/system/cpu/cpu0/cache/index3/size", "");
	const uint64_t most = told_bytes("/proc/meminfo", "MemAvailable:") / (READ_VARIANTS + 1);
	uint64_t bytes = cache * 8 > BYTES_DEFAULT ? cache * 8 : BYTES_DEFAULT;

	if (bytes > most && most >= READ_LARGE_BYTES)
		bytes = most;
	return bytes / READ_LARGE_BYTES * READ_LARGE_BYTES;
}

int read_options_parse(int argc, char **argv, struct read_options *options, bool *help)
{
	static const struct bench_syntax syntax = {COMMAND, long_options, help_text, take_option};
	int result;

	*options = (struct read_options){.transport = "shm", .rounds = ROUNDS_LEAST, .argc = argc, .argv = argv};
	result = bench_options_read(&syntax, argc, argv, options, help);
	if (result != CLI_DONE || *help)
		return result;
	if (options->bytes == 0)
		options->bytes = default_bytes();
	return options->save && !bench_save_possible(COMMAND, options->save) ? CLI_USAGE : CLI_DONE;
}
