/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_read.c - `layershard-bench read`: has two ranks measure, and reports.
 * Knows: processes as ranks. Does not know: how a rank measures, how a result is printed.
 */
#include "bench_read.h"
#include "cli.h"

#include <stdlib.h>
#include <unistd.h>

#define COMMAND "read"

const char *read_memory_name(const struct read_bench *bench, uint32_t variant)
{
	if (!read_is_shared(variant))
		return "private";
	return bench->shared->in_place ? "shared" : "window";
}

uint64_t read_page_bytes(uint32_t variant)
{
	return read_is_large(variant) ? READ_LARGE_BYTES : (uint64_t)sysconf(_SC_PAGESIZE);
}

struct read_sample *read_sample_at(const struct read_bench *bench, uint32_t work, uint32_t variant, uint32_t round)
{
	return &bench->shared->samples[(work * READ_VARIANTS + variant) * bench->options.rounds + round];
}

static int measure(struct read_bench *bench)
{
	int result = CLI_FAILED;
	bool good;

	bench->shared_bytes = sizeof *bench->shared +
			      (uint64_t)READ_WORKS * READ_VARIANTS * bench->options.rounds * sizeof(struct read_sample);
	bench->shared = bench_shared_allocate(bench->shared_bytes);
	if (!bench->shared) {
		cli_message(COMMAND ": no memory for the samples");
		return CLI_FAILED;
	}
	snprintf(bench->job, sizeof bench->job, "bench-read-%ld", (long)getpid());
	good = bench_ranks_run(&bench->shared->ranks, READ_RANKS, read_rank_run, bench);
	cli_progress_erase();
	if (good)
		result = read_report(bench);
	else
		cli_message(COMMAND ": %s", bench->shared->ranks.failure);
	bench_shared_free(bench->shared, bench->shared_bytes);
	return result;
}

int bench_read(int argc, char **argv)
{
	struct read_bench bench = {.shared = NULL};
	bool help = false;
	const int result = read_options_parse(argc, argv, &bench.options, &help);

	return result == CLI_DONE && !help ? measure(&bench) : result;
}
