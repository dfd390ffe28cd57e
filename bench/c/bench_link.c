/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_link.c - `layershard-bench link`: turns options into sizes, variants and rows, has the ranks measure them, and
 * reports. Knows: processes and threads as ranks. Does not know: how a rank measures, how a result is printed.
 */
#include "bench_link.h"
#include "cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define COMMAND "link"

/* ---- Sizes, variants, rows --------------------------------------------------------------------------------------- */

uint64_t link_biggest(const struct link_bench *bench)
{
	return bench->sizes[bench->size_count - 1];
}

#define GRANULE_MOST (2u << 20)

uint64_t link_block_bytes(const struct link_bench *bench)
{
	return 2 * (link_biggest(bench) + (uint64_t)bench->options.ranks * GRANULE_MOST);
}

struct link_sample *link_sample_at(const struct link_bench *bench, uint32_t variant, int32_t rank, uint32_t round)
{
	const size_t row = (size_t)variant * (size_t)bench->options.ranks + (size_t)rank;

	return &bench->shared->samples[row * bench->options.rounds + round];
}

static uint32_t add_variant(struct link_bench *bench, struct link_variant variant, enum link_kind kind)
{
	variant.kind = kind;
	bench->variants[bench->variant_count] = variant;
	return bench->variant_count++;
}

/* A fetch, and beside it the bare copy between the same ranks. */
static void add_fetch(struct link_bench *bench, struct link_variant variant)
{
	const uint32_t fetch = add_variant(bench, variant, LINK_FETCH);

	bench->rows[bench->row_count++] = (struct link_row){fetch, add_variant(bench, variant, LINK_BARE)};
}

static void add_placement(struct link_bench *bench, uint32_t placement, uint32_t size)
{
	const struct link_options *options = &bench->options;
	const bool striped = options->placements[placement] == LSHARD_STRIPED;
	const int32_t readers = (int32_t)options->readers;
	struct link_variant variant = {.placement = placement, .size = size, .to_count = 1};

	for (int32_t to = 0; to < options->ranks; to++)
		for (int32_t from = 0; from < (striped ? 1 : options->ranks); from++) {
			variant.first_to = to;
			variant.from = striped ? LINK_ALL : from;
			if (variant.from != to)
				add_fetch(bench, variant);
		}
	if (readers == 0)
		return;
	variant.from = striped ? LINK_ALL : 0;
	variant.first_to = options->ranks - readers;
	variant.to_count = readers;
	variant.is_readers = true;
	add_fetch(bench, variant);
}

static void add_size(struct link_bench *bench, uint32_t size)
{
	for (uint32_t placement = 0; placement < bench->options.placement_count; placement++)
		add_placement(bench, placement, size);
	for (int32_t rank = 0; rank < bench->options.ranks; rank++) {
		const struct link_variant inside = {.size = size, .from = rank, .first_to = rank, .to_count = 1};

		bench->rows[bench->row_count++] =
			(struct link_row){LINK_NO_VARIANT, add_variant(bench, inside, LINK_BARE)};
	}
}

static void add_sizes(struct link_bench *bench)
{
	const struct link_options *options = &bench->options;

	for (uint64_t bytes = options->least_bytes; bytes <= options->most_bytes; bytes *= options->factor)
		bench->sizes[bench->size_count++] = bytes;
	for (uint32_t size = 0; size < bench->size_count; size++)
		add_size(bench, size);
}

/* ---- What the ranks share ------------------------------------------------------------------------------------ */

static bool open_mail(struct link_bench *bench)
{
	for (int32_t rank = 0; rank < bench->options.ranks && bench->options.has_devices; rank++)
		if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, bench->mail[rank]) != 0) {
			cli_message(COMMAND ": no socket for rank %d: %s", (int)rank, strerror(errno));
			return false;
		}
	return true;
}

static bool open_sources(struct link_bench *bench)
{
	for (int32_t rank = 0; rank < bench->options.ranks && !bench->options.has_devices; rank++) {
		bench->sources[rank] = bench_shared_allocate(link_block_bytes(bench));
		if (!bench->sources[rank]) {
			cli_message(COMMAND ": no memory of %llu bytes that the ranks could share",
				    (unsigned long long)link_block_bytes(bench));
			return false;
		}
	}
	return true;
}

static bool open_shared(struct link_bench *bench)
{
	const struct link_options *options = &bench->options;

	bench->shared_bytes = sizeof *bench->shared + (uint64_t)bench->variant_count * (uint64_t)options->ranks *
							      options->rounds * sizeof(struct link_sample);
	bench->shared = bench_shared_allocate(bench->shared_bytes);
	if (!bench->shared) {
		cli_message(COMMAND ": no memory for the samples");
		return false;
	}
	return open_mail(bench) && open_sources(bench);
}

static void close_shared(struct link_bench *bench)
{
	for (int32_t rank = 0; rank < bench->options.ranks; rank++) {
		bench_shared_free(bench->sources[rank], link_block_bytes(bench));
		for (int end = 0; end < 2; end++)
			if (bench->mail[rank][end] > 0)
				close(bench->mail[rank][end]);
	}
	bench_shared_free(bench->shared, bench->shared_bytes);
}

/* ---- The run ------------------------------------------------------------------------------------------------- */

/* `local` carries layers between the threads of one process. */
static bool run_threads(struct link_bench *bench)
{
	struct bench_ranks *ranks = &bench->shared->ranks;

	ranks->size = bench->options.ranks;
	if (!bench_circle_open(&bench->circle, ranks->size))
		return bench_ranks_fail(ranks, "no memory for the ranks");
	if (!bench_threads_run(ranks->size, link_rank_run, bench, &bench->circle))
		bench_ranks_fail(ranks, "%s", bench->circle.failure);
	bench_circle_close(&bench->circle);
	return !bench_ranks_broken(ranks);
}

static bool run(struct link_bench *bench)
{
	snprintf(bench->job, sizeof bench->job, "bench-link-%ld", (long)getpid());
	if (cli_transport_is(bench->options.transport, "local"))
		return run_threads(bench);
	return bench_ranks_run(&bench->shared->ranks, bench->options.ranks, link_rank_run, bench);
}

static int measure(struct link_bench *bench, int argc, char **argv)
{
	int result = CLI_FAILED;
	bool good;

	if (!open_shared(bench))
		goto close_shared;
	good = run(bench);
	cli_progress_erase();
	if (good)
		result = link_report(bench, argc, argv);
	else
		cli_message(COMMAND ": %s", bench->shared->ranks.failure);
close_shared:
	close_shared(bench);
	return result;
}

int bench_link(int argc, char **argv)
{
	struct link_bench *bench = calloc(1, sizeof *bench);
	int result = CLI_FAILED;
	bool help = false;

	if (bench) {
		bench->variants = calloc(LINK_VARIANTS_MOST, sizeof *bench->variants);
		bench->rows = calloc(LINK_VARIANTS_MOST, sizeof *bench->rows);
	}
	if (!bench || !bench->variants || !bench->rows) {
		cli_message(COMMAND ": no memory");
		goto free_bench;
	}
	result = link_options_parse(argc, argv, &bench->options, &help);
	if (result == CLI_DONE && !help) {
		add_sizes(bench);
		result = measure(bench, argc, argv);
	}
free_bench:
	if (bench) {
		free(bench->rows);
		free(bench->variants);
	}
	free(bench);
	return result;
}
