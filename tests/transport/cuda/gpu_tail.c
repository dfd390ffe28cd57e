/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_tail.c - a pass replayed from a graph beside the same pass run as it is, on a device: `gpu_tail [BYTES OF A
 * WEIGHT [SEED]]`, where SEED is for the stub, whose times mean nothing. Two processes share a series by copies, and
 * one after the other they make passes while the other rests. Kernels that compare each word take as long as is
 * wanted of them, so that the copies fill half of a pass, most of it, and more than it. Both must read the right
 * words, and on two devices the ratio of the two must be what lshard_plan says of this rank, or less. Ranks that
 * share a device share its memory's bandwidth too: copies then slow kernels down, of which a plan knows nothing (on
 * one H200 a pass of copies that should fill half of it takes as long as both one after the other, and a replay 1.02
 * to 1.06 of it).
 */
#include "gpu_rank.h"
#include "transports.h"

#include <layershard/plan.h>
#include <stdlib.h>

#define PASSES 20 /* of a sample */
#define ROUNDS 9
#define MARGIN 0.03

/* Copies that fill this share of a pass. */
static const double shares[] = {0.5, 0.75, 0.9, 1.3};

struct tail {
	struct rank rank;
	cuda_graph_exec graph;
	uint64_t compared; /* bytes of each weight */
	double transfer_us, compute_us;
};

static int by_size(const void *a, const void *b)
{
	return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static int compute(struct tail *tail, uint32_t layer)
{
	struct rank *rank = &tail->rank;
	void *address = NULL;

	OK(rank, lshard_series_address(rank->series, layer, 0, &address));
	return !tail->compared || gpu_compare_bytes(rank, (uintptr_t)address, rank->reference[layer - FIRST][0],
						    tail->compared, rank->device.streams[0]);
failed:
	return 0;
}

static int make_pass(struct tail *tail)
{
	struct rank *rank = &tail->rank;

	for (uint32_t layer = FIRST; layer < FIRST + LAYERS; layer++) {
		OK(rank, lshard_reach(rank->series, layer, rank->device.streams[0]));
		OK(rank, lshard_wait(rank->series, layer, rank->device.streams[0]));
		if (!compute(tail, layer))
			goto failed;
	}
	return 1;
failed:
	return 0;
}

static int capture(struct tail *tail)
{
	struct rank *rank = &tail->rank;
	const cuda_stream stream = rank->device.streams[0];
	cuda_graph graph = NULL;

	OK(rank, lshard_series_prepare(rank->series, stream));
	CALL(rank, rank->device.capture_begin(stream, 0));
	if (!make_pass(tail))
		goto failed;
	OK(rank, lshard_series_join(rank->series, stream));
	CALL(rank, rank->device.capture_end(stream, &graph));
	CALL(rank, rank->device.graph_instantiate(&tail->graph, graph, 0));
	CALL(rank, rank->device.graph_destroy(graph));
	return 1;
failed:
	return 0;
}

/* Microseconds a pass, of passes that follow each other. */
static int sample(struct tail *tail, bool replayed, double *us)
{
	const cuda_stream stream = tail->rank.device.streams[0];
	double begin = 0;

	for (int pass = -3; pass < PASSES; pass++) {
		if (pass == 0) {
			tail->rank.device.stream_synchronize(stream);
			begin = gpu_now_us();
		}
		if (!(replayed ? gpu_replay(&tail->rank, tail->graph) : make_pass(tail)))
			return 0;
	}
	tail->rank.device.stream_synchronize(stream);
	*us = (gpu_now_us() - begin) / PASSES;
	return 1;
}

static int compare_alone(struct tail *tail, double *us)
{
	struct rank *rank = &tail->rank;
	double begin = 0;

	for (int turn = -3; turn < PASSES; turn++) {
		if (turn == 0) {
			rank->device.stream_synchronize(rank->device.streams[0]);
			begin = gpu_now_us();
		}
		if (!gpu_compare_bytes(rank, rank->reference[0][0], rank->reference[0][0], tail->compared,
				       rank->device.streams[0]))
			return 0;
	}
	rank->device.stream_synchronize(rank->device.streams[0]);
	*us = (gpu_now_us() - begin) / PASSES;
	return 1;
}

static int plan(const struct tail *tail, lshard_plan_result *result)
{
	const struct rank *rank = &tail->rank;
	const lshard_tensor tensor = {.name = "weight", .bytes = rank->bytes[0]};
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;
	lshard_plan_input input = LSHARD_PLAN_INPUT_INIT;

	options.name = "layers";
	options.layer_count = LAYERS;
	options.tensors = &tensor;
	options.tensor_count = 1;
	options.prefetch = rank->plan->prefetch;
	input.rank = rank->member->rank;
	input.size = rank->member->size;
	input.compute_ns = (uint64_t)(tail->compute_us * 1e3) + 1;
	input.link_bytes_per_s = (uint64_t)((double)rank->bytes[0] / tail->transfer_us * 1e6) + 1;
	return lshard_plan(&options, &input, result) == LSHARD_OK;
}

/* The kernel's part of a weight that takes as long as is wanted. */
static int set_compute(struct tail *tail, double wanted_us)
{
	const uint64_t all = tail->rank.bytes[0];
	double us = 0;

	tail->compared = all;
	if (!compare_alone(tail, &us))
		return 0;
	if (us > wanted_us)
		tail->compared = (uint64_t)((double)all * wanted_us / us) & ~(uint64_t)4095;
	tail->compared = tail->compared ? tail->compared : 4096;
	return compare_alone(tail, &tail->compute_us);
}

static bool is_judged(const struct rank *rank)
{
	return !rank->plan->late && rank->device.devices > 1;
}

static int measure(struct tail *tail, double share, unsigned fetched)
{
	struct rank *rank = &tail->rank;
	double times[2][ROUNDS];
	double ratio;
	double planned;
	lshard_plan_result result = LSHARD_PLAN_RESULT_INIT;

	if (!set_compute(tail, tail->transfer_us * fetched / LAYERS / share) || !plan(tail, &result) || !capture(tail))
		goto failed;
	for (int round = 0; round < ROUNDS; round++)
		for (int replayed = 0; replayed < 2; replayed++)
			if (!sample(tail, replayed, &times[replayed][round]))
				goto failed;
	CALL(rank, rank->device.graph_exec_destroy(tail->graph));
	EXPECT(rank->member, gpu_differences(rank) == 0, "passes and replays read wrong words");
	for (int replayed = 0; replayed < 2; replayed++)
		qsort(times[replayed], ROUNDS, sizeof times[0][0], by_size);
	ratio = times[1][ROUNDS / 2] / times[0][ROUNDS / 2];
	planned = (double)result.captured_pass_ns / (double)result.pass_ns;
	printf("  rank %d, k = %u: a transfer %.1f us, a layer's compute %.1f us: a pass %.1f us, planned %.1f; a "
	       "replay %.1f us: %.3f of it, planned %.3f; a transfer is %.3f\n",
	       (int)rank->member->rank, rank->plan->prefetch, tail->transfer_us, tail->compute_us, times[0][ROUNDS / 2],
	       (double)result.pass_ns / 1e3, times[1][ROUNDS / 2], ratio, planned,
	       tail->transfer_us / times[0][ROUNDS / 2]);
	EXPECT(rank->member, !is_judged(rank) || ratio < planned + MARGIN, "a replay takes longer than planned");
	return 1;
failed:
	return 0;
}

static int measure_all(struct tail *tail)
{
	struct rank *rank = &tail->rank;
	lshard_stats stats = LSHARD_STATS_INIT;
	double us = 0;

	OK(rank, lshard_series_stats(rank->series, &stats));
	if (!stats.fetched_layers) /* each has a window of its own */
		return 1;
	tail->compared = 0;
	if (!sample(tail, false, &us))
		goto failed;
	tail->transfer_us = us / stats.fetched_layers;
	for (size_t i = 0; i < sizeof shares / sizeof shares[0]; i++)
		if (!measure(tail, shares[i], stats.fetched_layers))
			goto failed;
	return 1;
failed:
	return 0;
}

static int run_rank(const struct member *member)
{
	struct tail tail = {.rank = {.member = member, .plan = member->user}};
	struct rank *rank = &tail.rank;

	setvbuf(stdout, NULL, _IOLBF, 0);
	rank->bytes[0] = rank->plan->weight_bytes;
	rank->bytes[1] = 5000;
	if (!gpu_open(rank) || !gpu_make_references(rank) || !gpu_fill_references(rank) || !gpu_open_all(rank))
		goto failed;
	gpu_differences(rank);
	if (member->rank == 0 && !rank->plan->late && !is_judged(rank))
		printf("does not apply: a_replay_takes_no_longer_than_planned: the ranks share one device\n");
	for (int32_t turn = 0; turn < member->size; turn++) {
		EXPECT(member, team_barrier(member), "the others");
		if (turn == member->rank && !measure_all(&tail))
			goto failed;
	}
	EXPECT(member, team_barrier(member) && gpu_close_all(rank), "destroy");
	free(rank->host);
	return 0;
failed:
	return 1;
}

int main(int count, char **arguments)
{
	struct plan plan = {.spec = "cuda:copy", .series = 1, .turns = 1, .size = 2};
	lshard_error error = {{0}};
	int failures = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!lshard__cuda.available(&error)) {
		printf("skipped: %s\n", error.text);
		return 77;
	}
	plan.weight_bytes = count > 1 ? strtoull(arguments[1], NULL, 10) : 256u << 20;
	plan.late = count > 2 ? atoi(arguments[2]) : 0;
	for (plan.prefetch = 1; plan.prefetch < 3; plan.prefetch++)
		failures += team_of_processes(plan.size, run_rank, &plan);
	printf("%s\n", failures ? "FAILED" : "passed");
	return failures != 0;
}
