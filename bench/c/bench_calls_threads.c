/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_calls_threads.c - groups of 2, 8 and 64 ranks as threads on the `local` transport, side by side: thread r is
 * rank r of every group that is larger than r. Only rank 0 calls anything between commit and destroy. Knows: the public
 * header. Does not know: how calls are timed.
 */
#include "bench_calls.h"
#include "cli.h"

#include <stdio.h>

const int32_t calls_sizes[CALLS_SIZES] = {2, 8, 64};
const uint32_t calls_counts[CALLS_COUNTS] = {8, 64, 512, 8192};

#define LARGEST (CALLS_SIZES - 1)
#define KINDS   2u /* CALLS_RESIDENT, CALLS_HELD */

/* What one thread has open. */
struct calls_thread {
	struct bench_member member[CALLS_SIZES];
	lshard_group *group[CALLS_SIZES];
	lshard_series *series[CALLS_SIZES][CALLS_COUNTS][KINDS];
};

static bool open_series(struct bench_circle *all, lshard_group *group, uint32_t layers, enum calls_kind kind,
			lshard_series **series)
{
	const lshard_tensor tensor = {"weight", CALLS_LAYER_BYTES, 0, LSHARD_STRIPE_BYTES, 0, 0};
	uint64_t bytes = CALLS_LAYER_BYTES;
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;
	char name[32];

	snprintf(name, sizeof name, "%s-%u", kind == CALLS_RESIDENT ? "stored" : "held", layers);
	options.name = name;
	options.layer_count = layers;
	options.tensors = &tensor;
	options.tensor_count = 1;
	options.resident_bytes = kind == CALLS_RESIDENT ? UINT64_MAX : 0;
	if (lshard_series_create(group, &options, series) != LSHARD_OK)
		return bench_circle_fail(all, "%s", lshard_group_error(group));
	if (lshard_series_commit(*series, bench_post_process, &bytes) != LSHARD_OK)
		return bench_circle_fail(all, "%s", lshard_series_error(*series));
	return true;
}

static bool open_group(struct calls_threads *threads, struct calls_thread *self, unsigned size, int32_t rank)
{
	struct bench_circle *all = &threads->circle[LARGEST];
	char error[512] = "";
	const lshard_bootstrap bootstrap = {sizeof bootstrap, bench_circle_allgather, &self->member[size]};
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;

	self->member[size] = (struct bench_member){&threads->circle[size], rank};
	options.rank = rank;
	options.size = calls_sizes[size];
	options.transport = "local";
	options.bootstrap = &bootstrap;
	options.error = error;
	options.error_bytes = sizeof error;
	if (lshard_group_create(&options, &self->group[size]) != LSHARD_OK)
		return bench_circle_fail(all, "%s", error);
	for (unsigned count = 0; count < CALLS_COUNTS; count++)
		for (unsigned kind = 0; kind < KINDS; kind++)
			if (!open_series(all, self->group[size], calls_counts[count], (enum calls_kind)kind,
					 &self->series[size][count][kind]))
				return false;
	return true;
}

static void list_rows(struct calls_row *row, const struct calls_thread *self)
{
	for (unsigned size = 0; size < CALLS_SIZES; size++)
		for (unsigned count = 0; count < CALLS_COUNTS; count++)
			for (unsigned kind = 0; kind < KINDS; kind++)
				*row++ = (struct calls_row){(enum calls_kind)kind, "local", calls_sizes[size],
							    calls_counts[count], self->series[size][count][kind]};
}

static void close_all(struct calls_thread *self, struct bench_circle *all)
{
	char error[512];

	for (unsigned size = 0; size < CALLS_SIZES; size++) {
		for (unsigned count = 0; count < CALLS_COUNTS; count++)
			for (unsigned kind = 0; kind < KINDS; kind++)
				lshard_series_destroy(self->series[size][count][kind]);
		if (cli_group_leave(self->group[size], error, sizeof error) < 0)
			(void)bench_circle_fail(all, "rank %d: %s", (int)self->member[size].rank, error);
	}
}

/* A failure breaks the smaller circles too: ranks that wait there for an all-gather must not wait for ever. */
static void break_all(struct calls_threads *threads)
{
	for (unsigned size = 0; size < LARGEST; size++)
		bench_circle_fail(&threads->circle[size], "a rank failed");
}

static void run_thread(void *user, int32_t rank)
{
	struct calls_threads *threads = user;
	struct calls_thread self = {0};
	bool good = true;

	for (unsigned size = 0; size < CALLS_SIZES && good; size++)
		good = rank >= calls_sizes[size] || open_group(threads, &self, size, rank);
	if (!good)
		break_all(threads);
	if (good && bench_circle_barrier(&threads->circle[LARGEST])) {
		if (rank == 0) {
			list_rows(threads->rows, &self);
			threads->measure(threads->user);
		}
		bench_circle_barrier(&threads->circle[LARGEST]);
	}
	close_all(&self, &threads->circle[LARGEST]);
}

bool calls_threads_run(struct calls_threads *threads, char *failure, size_t failure_bytes)
{
	struct bench_circle *all = &threads->circle[LARGEST];
	unsigned open = 0;
	bool good = false;

	while (open < CALLS_SIZES && bench_circle_open(&threads->circle[open], calls_sizes[open]))
		open++;
	if (open == CALLS_SIZES) {
		bench_threads_run(calls_sizes[LARGEST], run_thread, threads, all);
		good = !all->broken;
	}
	if (!good)
		snprintf(failure, failure_bytes, "%s", open == CALLS_SIZES ? all->failure : "no memory for the ranks");
	while (open > 0)
		bench_circle_close(&threads->circle[--open]);
	return good;
}
