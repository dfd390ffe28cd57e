/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_check.c - `gpu_check [REPLAYS [BYTES [SEED [gently]]]]`: the cuda transport on a real device, through the public
 * interface, ranks as processes. Runs on one device as on several; on the stub too, whose order of work SEED chooses.
 * BYTES: of a weight. gently: as few processes as will do, once, and none is killed; for tools that slow all down.
 *
 * A kernel compares every layer, in stream order where a program would compute from it, with what its source wrote, and
 * counts the words that differ. Prints what it measured; exits 77 where there is no device.
 */
#include "gpu_rank.h"
#include "transports.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define STRIPES(dimension) .placement = LSHARD_STRIPED, .stripe = LSHARD_STRIPE_##dimension, .turns = 1

static int walks(struct rank *rank)
{
	unsigned state = 7u + (unsigned)rank->member->rank;

	for (int pass = 0; pass < 10; pass++)
		if (!gpu_one_pass(rank, LAYERS, rank->device.streams[0]))
			goto failed;
	for (int step = 0; step < 100; step++) {
		state = state * 1103515245u + 12345u;
		if (!gpu_visit(rank, FIRST + (state >> 16) % LAYERS, rank->device.streams[state >> 8 & 1]))
			goto failed;
	}
	EXPECT(rank->member, gpu_differences(rank) == 0, "walks read wrong words");
	if (!gpu_visit(rank, FIRST, rank->device.streams[0]) ||
	    !gpu_compare(rank, FIRST, 0, FIRST + 1, rank->device.streams[0]))
		goto failed;
	EXPECT(rank->member, gpu_differences(rank) > 0, "the comparison finds nothing where all differs");
	return 1;
failed:
	return 0;
}

/* Its rows in a row, from wherever they lie with whatever pitch. */
static int gather(struct rank *rank, int scratch, cuda_address from, uint64_t pitch, uint64_t width, uint64_t rows)
{
	const struct cuda_copy_2d copy = {.from_kind = CUDA_KIND_UNIFIED,
					  .from = from,
					  .from_pitch = pitch,
					  .to_kind = CUDA_KIND_UNIFIED,
					  .to = rank->scratch[scratch],
					  .to_pitch = width,
					  .width = width,
					  .rows = rows};

	return rank->device.driver.copy_2d(&copy, rank->device.streams[0]) == CUDA_OK;
}

/* Compares the own stripe of a tensor, where the library says it is, with this rank's rows or columns. */
static int looks_at_stripe(struct rank *rank, uint32_t layer, uint32_t tensor)
{
	const int by_rows = rank->plan->stripe == LSHARD_STRIPE_ROWS;
	const uint64_t row_bytes = rank->bytes[tensor] / gpu_rows_of(rank, tensor);
	cuda_address expected = rank->reference[layer - FIRST][tensor];
	void *address = NULL;
	lshard_range range = LSHARD_RANGE_INIT;
	uint64_t width;
	uint64_t rows;

	OK(rank, lshard_series_stripe(rank->series, layer, tensor, &address, &range));
	EXPECT(rank->member, range.end > range.begin, "no stripe");
	width = by_rows ? row_bytes : range.end - range.begin;
	rows = by_rows ? range.end - range.begin : gpu_rows_of(rank, tensor);
	expected += range.begin * (by_rows ? row_bytes : 1);
	EXPECT(rank->member, gather(rank, 0, (uintptr_t)address, range.row_bytes, width, rows), "copying a stripe");
	EXPECT(rank->member, gather(rank, 1, expected, row_bytes, width, rows), "copying what it should be");
	return gpu_compare_bytes(rank, rank->scratch[0], rank->scratch[1], width * rows, rank->device.streams[0]);
failed:
	return 0;
}

static int looks_at_stripes(struct rank *rank)
{
	if (rank->plan->stripe == LSHARD_STRIPE_BYTES)
		return 1;
	EACH_SERIES(rank)
	for (uint32_t i = 0; i < LAYERS * TENSORS; i++)
		if (!looks_at_stripe(rank, FIRST + i / TENSORS, i % TENSORS))
			goto failed;
	EXPECT(rank->member, gpu_differences(rank) == 0, "the own stripes are not this rank's rows or columns");
	return 1;
failed:
	return 0;
}

/* A call that cannot be captured says so, and what is then thrown away harms nobody. */
static int spoils_a_capture(struct rank *rank)
{
	const cuda_stream stream = rank->device.streams[0];
	cuda_graph graph = NULL;

	CALL(rank, rank->device.capture_begin(stream, 0));
	if (!gpu_one_pass(rank, 3, stream))
		goto failed;
	EXPECT(rank->member, lshard_series_prepare(rank->series, stream) == LSHARD_ERR_STATE, "captured");
	rank->device.capture_end(stream, &graph);
	if (graph)
		rank->device.graph_destroy(graph);
	return 1;
failed:
	return 0;
}

static int replays(struct rank *rank, cuda_graph_exec *exec)
{
	if (!gpu_capture_pass(rank, exec))
		goto failed;
	for (unsigned i = 0; i < rank->plan->replays; i++)
		if (!gpu_replay(rank, *exec))
			goto failed;
	EXPECT(rank->member, gpu_differences(rank) == 0, "replays read wrong words");
	for (unsigned i = 0; i < 20; i++) {
		const cuda_stream other = rank->device.streams[i & 1];

		if (!gpu_replay(rank, *exec))
			goto failed;
		EACH_SERIES(rank) /* the program goes on elsewhere than where the graph ran */
		OK(rank, i & 1 ? lshard_series_prepare(rank->series, other) : LSHARD_OK);
		if (!gpu_one_pass(rank, LAYERS, other) || !gpu_one_pass(rank, i % LAYERS, rank->device.streams[0]))
			goto failed;
		if (i % 5 == 0 && !spoils_a_capture(rank))
			goto failed;
	}
	EXPECT(rank->member, gpu_differences(rank) == 0, "graph and eager passes mixed read wrong words");
	return 1;
failed:
	return 0;
}

static int updates(struct rank *rank, cuda_graph_exec exec)
{
	for (int round = 0; round < 3; round++) {
		if (!gpu_one_pass(rank, 1 + (uint32_t)(round + rank->member->rank) % LAYERS, rank->device.streams[0]))
			goto failed;
		EACH_SERIES(rank)
		OK(rank, lshard_series_update_begin(rank->series));
		EXPECT(rank->member, gpu_differences(rank) == 0, "before an update");
		rank->generation++;
		if (!gpu_fill_references(rank))
			goto failed;
		EACH_SERIES(rank)
		OK(rank, lshard_series_update_end(rank->series, gpu_fill_layer, rank));
		if (!gpu_one_pass(rank, LAYERS, rank->device.streams[1]) || !gpu_replay(rank, exec) ||
		    !gpu_replay(rank, exec))
			goto failed;
		EXPECT(rank->member, gpu_differences(rank) == 0, "after update %d", round + 1);
	}
	return 1;
failed:
	return 0;
}

static int survives(struct rank *rank, cuda_graph_exec exec)
{
	if (!gpu_one_pass(rank, 4, rank->device.streams[0]) || !team_barrier(rank->member))
		goto failed;
	if (rank->member->rank == 1) {
		team_dies(rank->member);
		raise(SIGKILL);
	}
	for (int pass = 0; pass < 100; pass++)
		if (!gpu_one_pass(rank, LAYERS, rank->device.streams[0]) || !gpu_replay(rank, exec))
			goto failed;
	EXPECT(rank->member, gpu_differences(rank) == 0, "passes after a rank was killed read wrong words");
	printf("  rank %d: 100 passes and 100 replays after rank 1 was killed: bit-exact\n", (int)rank->member->rank);
	return 1;
failed:
	return 0;
}

/* A shard is given back when the last of the other survivors has destroyed its series too: up to 30 s. */
static bool comes_back(struct rank *rank, uint64_t free_at_least)
{
	for (int tries = 0; tries < 3000 && gpu_free_memory(rank) < free_at_least; tries++)
		nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
	return gpu_free_memory(rank) >= free_at_least;
}

/*
 * Create, walk, replay, update, destroy. The driver keeps something at the first use of graphs: a second turn must add
 * nothing.
 */
static int live_once(struct rank *rank, int turn)
{
	const uint64_t free_before = gpu_free_memory(rank);
	lshard_stats stats = LSHARD_STATS_INIT;
	cuda_graph_exec exec = NULL;
	uint64_t free_open;
	double begin;

	if (!team_barrier(rank->member) || !gpu_open_all(rank) || !team_barrier(rank->member))
		goto failed;
	free_open = gpu_free_memory(rank);
	gpu_tell_memory(rank, "series open", free_before, free_open);
	begin = gpu_now_us();
	if (!team_barrier(rank->member) || !looks_at_stripes(rank) || !walks(rank) || !replays(rank, &exec) ||
	    !updates(rank, exec) || !looks_at_stripes(rank) || !gpu_keeps_its_pace(rank, exec) ||
	    !gpu_tells_host_time(rank, 0) || !gpu_tells_host_time(rank, 1))
		goto failed;
	EXPECT(rank->member, gpu_differences(rank) == 0, "the end");
	printf("  rank %d: walks, %u replays, mixtures, aborted captures, 3 updates: bit-exact, %.1f s\n",
	       (int)rank->member->rank, rank->plan->replays, (gpu_now_us() - begin) / 1e6);
	if (!team_barrier(rank->member) || (rank->plan->kill && !survives(rank, exec)))
		goto failed;
	CALL(rank, rank->device.graph_exec_destroy(exec));
	OK(rank, lshard_series_stats(rank->series, &stats));
	free_open = gpu_free_memory(rank);
	EXPECT(rank->member, gpu_close_all(rank), "destroy");
	if (rank->plan->kill) {
		EXPECT(rank->member, comes_back(rank, free_open + stats.shard_bytes + stats.window_bytes),
		       "destroy by a survivor leaves memory of the device behind");
		gpu_tell_memory(rank, "destroy by a survivor", free_open, gpu_free_memory(rank));
		return 1;
	}
	EXPECT(rank->member, team_barrier(rank->member), "the others");
	gpu_tell_memory(rank, turn ? "destroyed, second turn" : "destroyed", free_before, gpu_free_memory(rank));
	EXPECT(rank->member, turn == 0 || gpu_free_memory(rank) >= free_before,
	       "destroy leaves memory of the device behind");
	return team_barrier(rank->member);
failed:
	return 0;
}

static int run_rank(const struct member *member)
{
	struct rank rank = {.member = member, .plan = member->user};

	setvbuf(stdout, NULL, _IOLBF, 0);
	rank.bytes[0] = rank.plan->weight_bytes;
	rank.bytes[1] = 5000;
	if (!gpu_open(&rank) || !gpu_make_references(&rank) || !gpu_tells_call_times(&rank) ||
	    !gpu_tells_graph_cost(&rank) || !gpu_fill_references(&rank))
		goto failed;
	gpu_differences(&rank);
	EXPECT(member, team_barrier(member), "the others");
	for (int turn = 0; turn < (rank.plan->kill || rank.plan->gently ? 1 : 2); turn++) {
		rank.n_series = 0;
		if (!live_once(&rank, turn))
			goto failed;
	}
	free(rank.host);
	return 0;
failed:
	return 1;
}

int main(int count, char **arguments)
{
	const unsigned replays = count > 1 ? (unsigned)atoi(arguments[1]) : 1000;
	const uint64_t bytes = count > 2 ? strtoull(arguments[2], NULL, 10) : 24u << 20;
	const int gently = count > 4 && !strcmp(arguments[4], "gently");
	static const char *const words[] = {"", " by rows", " by columns"};
	const int32_t sizes[] = {2, 3};
	const struct plan plans[] = {
		{.spec = "cuda:copy", .prefetch = 1, .series = 1, .turns = 3},
		{.spec = "cuda:copy", .prefetch = 2, .series = 1, .turns = 1, .resident_layers = 1, .fewer = 10},
		{.spec = "cuda:copy", .prefetch = 0, .series = 2, .turns = 1, .fewer = 10},
		{.spec = "cuda:copy", .prefetch = 1, .series = 1, .turns = 2, .placement = LSHARD_STRIPED, .fewer = 10},
		{.spec = "cuda:copy", .series = 1, STRIPES(ROWS), .fewer = 20},
		{.spec = "cuda:copy", .series = 1, STRIPES(COLUMNS), .fewer = 20},
		{.spec = "cuda:copy+ipc", .prefetch = 1, .series = 1, .turns = 2, .fewer = 10},
		{.spec = "cuda:copy+ipc", .size = 3, .series = 2, STRIPES(COLUMNS), .fewer = 50},
		{.spec = "cuda:copy+pace=20",
		 .pace = 20,
		 .size = 2,
		 .prefetch = 1,
		 .series = 1,
		 .turns = 1,
		 .fewer = 50},
		{.spec = "cuda:copy+pace=40",
		 .pace = 40,
		 .size = 3,
		 .series = 2,
		 .turns = 1,
		 .placement = LSHARD_STRIPED,
		 .fewer = 100},
		{.spec = "cuda", .prefetch = 1, .series = 1, .turns = 2, .fewer = 10},
		{.spec = "cuda", .prefetch = 1, .series = 1, .turns = 2, .placement = LSHARD_STRIPED, .fewer = 10},
		{.spec = "cuda", .size = 4, .series = 1, STRIPES(ROWS), .fewer = 50},
		{.spec = "cuda:copy", .size = 4, .prefetch = 1, .series = 1, .turns = 1, .fewer = 20},
		{.spec = "cuda:copy", .size = 4, .series = 2, STRIPES(ROWS), .fewer = 50},
		{.spec = "cuda:copy", .prefetch = 1, .series = 2, .turns = 1, .fewer = 50, .lent = 1},
		{.spec = "cuda", .size = 3, .prefetch = 1, .series = 1, .turns = 1, .fewer = 50, .lent = 1},
		{.spec = "cuda:copy", .prefetch = 1, .series = 1, .turns = 2, .fewer = 100, .kill = 1},
		{.spec = "cuda:copy", .series = 1, STRIPES(ROWS), .fewer = 100, .kill = 1},
		{.spec = "cuda:copy+ipc", .prefetch = 1, .series = 1, .turns = 2, .fewer = 100, .kill = 1},
		{.spec = "cuda", .prefetch = 1, .series = 1, .turns = 2, .fewer = 100, .kill = 1},
	};
	lshard_error error = {{0}};
	int failures = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!lshard__cuda.available(&error)) {
		printf("skipped: %s\n", error.text);
		return 77;
	}
	for (size_t i = 0; i < sizeof plans / sizeof plans[0]; i++)
		for (size_t j = 0; j < sizeof sizes / sizeof sizes[0]; j++) {
			struct plan plan = plans[i];
			int failed;

			plan.size = plan.size ? plan.size : sizes[j];
			plan.gently = gently;
			if (((plans[i].size || gently) && j > 0) || (gently && (plan.kill || plan.size > 3)))
				continue;
			plan.replays = replays / (plan.fewer ? plan.fewer : 1);
			plan.weight_bytes = bytes;
			plan.late = count > 3 ? atoi(arguments[3]) : 0;

			printf("%s, %s%s, %d ranks, k = %u, %u replays%s%s\n", plan.spec,
			       plan.placement == LSHARD_WHOLE ? "WHOLE" : "STRIPED", words[plan.stripe], (int)plan.size,
			       plan.prefetch, plan.replays, plan.lent ? ", memory of the program's" : "",
			       plan.kill ? ", rank 1 is killed" : "");
			failed = team_of_processes(plan.size, run_rank, &plan);
			printf("%s\n", failed ? "FAILED" : "passed");
			failures += failed;
		}
	return failures != 0;
}
