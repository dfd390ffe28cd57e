/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_rank.h - one rank of `bench step --devices`: what its files share. bench_gemm_rank.c opens and closes it
 * and runs the rounds, bench_gemm_pass.c runs passes, bench_gemm_check.c compares bits and takes the time of calls,
 * bench_gemm_split.c takes passes apart, bench_gemm_meter.c reads clocks and power, bench_gemm_rival.c moves layers as
 * others do.
 */
#ifndef BENCH_GEMM_RANK_H
#define BENCH_GEMM_RANK_H

#include "bench_gemm.h"
#include "cli.h"
#include "gpu.h"
#include "gpu_blas.h"
#include "gpu_meter.h"

struct gemm_rivals; /* bench_gemm_rival.c */

struct gemm_layers {
	lshard_series *series;
	gpu_address *addresses; /* [layers] */
	uint32_t *awaited;      /* [layers] whose transfer is under way after reach with one window (D) */
};

struct gemm_rank {
	struct gemm_bench *bench;
	int32_t rank;
	bool computes;
	struct gpu gpu;
	struct gpu_blas blas;
	struct gpu_meter *meter;
	gpu_stream stream; /* of the compute */
	gpu_event from, to;
	void *host;     /* one layer, or what a pass puts out */
	void *expected; /* the same */
	/* ranks that compute only */
	gpu_address up;   /* first weights of all layers */
	gpu_address down; /* second weights of all layers (A) */
	gpu_address input, inner, output;
	void *reference; /* what everything resident puts out with the present token count */
	struct cli_log log;
	lshard_group *group;
	struct gemm_layers layers[GEMM_SERIES_MOST];
	gpu_graph graphs[GEMM_ARMS_MOST]; /* of the present token count */
	uint32_t tokens;
	struct gemm_rivals *rivals;
	gpu_event *marks; /* [2 * layers + 1] while a pass is taken apart; else NULL */
};

/** Break the run with what the GPU, the series or the group says. They return false. */
bool gemm_fail_gpu(struct gemm_rank *self);
bool gemm_fail_series(struct gemm_rank *self, const struct gemm_layers *one);

static inline gpu_address gemm_own_layer(const struct gemm_rank *self, uint32_t layer)
{
	return self->down + layer * gemm_layer_bytes(&self->bench->options);
}

/** Passes of @p arm before those that are timed: until clock and power are its own. */
uint32_t gemm_warm_passes(const struct gemm_rank *self, uint32_t arm);
/** Time per pass of @p passes passes of an arm after @p warm that are not timed, on the stream of the compute. */
bool gemm_time_passes(struct gemm_rank *self, uint32_t arm, uint32_t warm, uint32_t passes, double *pass_ns);

/* ---- bench_gemm_pass.c ---- */

bool gemm_compute_layer(struct gemm_rank *self, uint32_t layer, gpu_address down);
/** Enqueue a pass of @p arm, or launch its graph. */
bool gemm_pass(struct gemm_rank *self, uint32_t arm);
/** Bring what @p arm moves to rest: nothing is under way, the next pass begins as any other. */
bool gemm_rest(struct gemm_rank *self, const struct gemm_arm *arm);
/** Make the graphs of all arms that are run from one. */
bool gemm_capture_all(struct gemm_rank *self);
void gemm_forget_graphs(struct gemm_rank *self);
/** With one window: which transfer D has to wait for at each layer. */
void gemm_find_awaited(struct gemm_layers *one, uint32_t layers);

/* ---- bench_gemm_check.c ---- */

/** Keep what the last pass put out as what all others must put out, if it is fit for that. */
bool gemm_keep_reference(struct gemm_rank *self);
/** Is what the last pass put out the same, bit for bit? Breaks the run if not. */
bool gemm_check_output(struct gemm_rank *self, const struct gemm_arm *arm);
/** Every byte of every layer of every series, as this rank sees it. */
bool gemm_check_layers(struct gemm_rank *self);
/** Host time of reach and wait, with and without a transfer. */
bool gemm_time_calls(struct gemm_rank *self);

/* ---- bench_gemm_split.c ---- */

/** How long overlapped passes stand before a layer and how long they compute, beside resident ones. */
bool gemm_split(struct gemm_rank *self, uint32_t tokens);

/* ---- bench_gemm_meter.c ---- */

/** Clocks and power of those arms that say something, where there is a meter. */
bool gemm_meter(struct gemm_rank *self, uint32_t tokens);

/* ---- bench_gemm_rival.c ---- */

/** Open those that are wanted and can be had; collective. */
bool gemm_rivals_open(struct gemm_rank *self);
void gemm_rivals_close(struct gemm_rank *self);
/** Make @p layer usable on the stream of the compute, and start what comes next. */
bool gemm_rival_bring(struct gemm_rank *self, enum gemm_rival rival, uint32_t layer, gpu_address *down);
bool gemm_rival_rest(struct gemm_rank *self, enum gemm_rival rival);

#endif
