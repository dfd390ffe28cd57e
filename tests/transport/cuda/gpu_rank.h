/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_rank.h - a rank of gpu_check: its device, a series of known bytes, a kernel that compares them where a program
 * would compute from them. Functions that return int give 0, with a message, when something is not as it should be.
 */
#ifndef TESTS_GPU_RANK_H
#define TESTS_GPU_RANK_H

#include "stub_cuda/stub_cuda.h"
#include "threads.h"

#define LAYERS  7u
#define FIRST   3u
#define TENSORS 2u

/* The driver, with what tests need of it. */
struct device {
	struct cuda_driver driver;
#define CUDA_MEMBER(member, symbol, parameters) cuda_result(*member) parameters;
	CUDA_TEST_FUNCTIONS(CUDA_MEMBER)
#undef CUDA_MEMBER
	int devices; /* how many there are */
	cuda_device device;
	cuda_context context;
	cuda_function kernel;
	cuda_stream streams[2];
};

struct plan {
	const char *spec;
	lshard_placement placement;
	uint32_t prefetch;
	uint64_t resident_layers;
	int32_t size; /* ranks; 0: all that are tried */
	lshard_stripe stripe;
	double pace;    /* GB/s that the spec asks for */
	unsigned fewer; /* a part of the replays asked for */
	unsigned replays;
	uint64_t weight_bytes;
	uint64_t turns; /* of the comparing kernel: how long a layer "computes" */
	int kill;
	int lent; /* shards and windows are the program's memory */
	int gently;
	unsigned series;
	int late; /* on the stub: seed */
};

struct rank {
	const struct member *member;
	const struct plan *plan;
	struct device device;
	lshard_group *group;
	lshard_series *all[2];
	unsigned n_series;
	lshard_series *series; /* one of them */
	uint64_t bytes[TENSORS];
	cuda_address reference[LAYERS][TENSORS];
	cuda_address counter;
	cuda_address scratch[2]; /* a weight each */
	uint32_t *host;
	uint64_t generation;
};

#define CALL(rank, call) EXPECT((rank)->member, (call) == CUDA_OK, "the driver refuses")
#define OK(rank, call)   EXPECT((rank)->member, (call) == LSHARD_OK, "%s", lshard_series_error((rank)->series))

#define EACH_SERIES(rank) for (unsigned one = 0; one < (rank)->n_series && ((rank)->series = (rank)->all[one]); one++)

/* Driver, context, kernel and streams. */
int gpu_open(struct rank *rank);
uint64_t gpu_free_memory(struct rank *rank);

/* What all layers must be, on the device: made once, filled for each generation. */
int gpu_make_references(struct rank *rank);
int gpu_fill_references(struct rank *rank);
int gpu_fill_layer(void *user, uint32_t layer, void *const *tensors);
uint64_t gpu_rows_of(const struct rank *rank, uint32_t tensor);

/* Group, unless it is open, and series. */
int gpu_open_group(struct rank *rank);
int gpu_open_all(struct rank *rank);
int gpu_close_all(struct rank *rank);

/* Enqueue a comparison with what layer @p with_layer must be. */
int gpu_compare(struct rank *rank, uint32_t layer, uint32_t tensor, uint32_t with_layer, cuda_stream stream);
int gpu_compare_bytes(struct rank *rank, cuda_address found, cuda_address expected, uint64_t bytes, cuda_stream stream);
/* Words that differed since the last call; ends all work first. */
uint64_t gpu_differences(struct rank *rank);
/* reach, wait, compare. */
int gpu_visit(struct rank *rank, uint32_t layer, cuda_stream stream);
int gpu_one_pass(struct rank *rank, uint32_t layers, cuda_stream stream);
/* A whole pass as a graph. */
int gpu_capture_pass(struct rank *rank, cuda_graph_exec *exec);
int gpu_replay(struct rank *rank, cuda_graph_exec exec);

/* ---- gpu_times.c ---- */

double gpu_now_us(void);
int gpu_tells_call_times(struct rank *rank);
int gpu_tells_graph_cost(struct rank *rank);
int gpu_tells_host_time(struct rank *rank, int busy);
int gpu_keeps_its_pace(struct rank *rank, cuda_graph_exec exec);
void gpu_tell_memory(const struct rank *rank, const char *what, uint64_t free_before, uint64_t free_now);

#endif
