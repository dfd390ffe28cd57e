/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_pass.c - see bench_gemm_rank.h: passes over the stack, eager and from graphs. Nothing here waits for the
 * device.
 */
#include "bench_gemm_rank.h"

bool gemm_compute_layer(struct gemm_rank *self, uint32_t layer, gpu_address down)
{
	const struct gemm_options *options = &self->bench->options;
	const gpu_address up = self->up + layer * gemm_layer_bytes(options);
	const gpu_address in = layer == 0 ? self->input : self->output;
	const int tokens = (int)self->tokens;

	if (gpu_blas_linear(&self->blas, self->stream, self->inner, in, up, tokens, (int)options->inner,
			    (int)options->hidden) != LSHARD_OK ||
	    gpu_blas_linear(&self->blas, self->stream, self->output, self->inner, down, tokens, (int)options->hidden,
			    (int)options->inner) != LSHARD_OK)
		return gemm_fail_gpu(self);
	return true;
}

/* ---- Bringing a layer ---------------------------------------------------------------------------------------- */

/* With a single window the layers that share an address with another are those that come through it. */
static bool is_windowed(const struct gemm_layers *one, uint32_t layer, uint32_t layers)
{
	for (uint32_t other = 0; other < layers; other++)
		if (other != layer && one->addresses[other] == one->addresses[layer])
			return true;
	return false;
}

/* Twice round the circle backwards: the second time what follows the last layer is known. */
void gemm_find_awaited(struct gemm_layers *one, uint32_t layers)
{
	uint32_t next = UINT32_MAX;

	for (uint32_t left = 2 * layers; left > 0; left--) {
		const uint32_t layer = (left - 1) % layers;

		if (is_windowed(one, layer, layers))
			next = layer;
		one->awaited[layer] = next == UINT32_MAX ? layer : next;
	}
}

static bool bring_from_series(struct gemm_rank *self, const struct gemm_arm *arm, uint32_t layer, gpu_address *down)
{
	const struct gemm_layers *one = &self->layers[arm->series];

	if (lshard_reach(one->series, layer, self->stream) != LSHARD_OK ||
	    lshard_wait(one->series, layer, self->stream) != LSHARD_OK)
		return gemm_fail_series(self, one);
	if (arm->kind == GEMM_SERIAL && one->awaited[layer] != layer &&
	    lshard_wait(one->series, one->awaited[layer], self->stream) != LSHARD_OK)
		return gemm_fail_series(self, one);
	*down = one->addresses[layer];
	return true;
}

static bool bring(struct gemm_rank *self, const struct gemm_arm *arm, uint32_t layer, gpu_address *down)
{
	if (arm->kind == GEMM_RIVAL)
		return gemm_rival_bring(self, arm->rival, layer, down);
	if (arm->series != GEMM_NO_SERIES)
		return bring_from_series(self, arm, layer, down);
	*down = gemm_own_layer(self, layer);
	return true;
}

/* ---- Passes -------------------------------------------------------------------------------------------------- */

/* Work that no other rank has, before the pass that puts out what is compared. */
static bool delay(struct gemm_rank *self)
{
	const struct gemm_options *options = &self->bench->options;
	const uint32_t more = (uint32_t)((double)options->layers * options->slow_percent / 100 + 0.5);

	for (uint32_t i = 0; i < more; i++)
		if (!gemm_compute_layer(self, i % options->layers, gemm_own_layer(self, i % options->layers)))
			return false;
	return true;
}

static bool mark(struct gemm_rank *self, uint32_t index)
{
	if (!self->marks || gpu_event_record(&self->gpu, self->marks[index], self->stream) == LSHARD_OK)
		return true;
	return gemm_fail_gpu(self);
}

static bool enqueue(struct gemm_rank *self, const struct gemm_arm *arm)
{
	const uint32_t ranks = self->bench->options.ranks;

	if (arm->delayed && self->rank == (int32_t)ranks - 1 && !delay(self))
		return false;
	for (uint32_t layer = 0; layer < self->bench->options.layers; layer++) {
		gpu_address down;

		if (!mark(self, 2 * layer) || !bring(self, arm, layer, &down) || !mark(self, 2 * layer + 1))
			return false;
		if (arm->kind != GEMM_COPIES && !gemm_compute_layer(self, layer, down))
			return false;
	}
	return mark(self, 2 * self->bench->options.layers);
}

static bool prepare(struct gemm_rank *self, const struct gemm_arm *arm)
{
	const struct gemm_layers *one = arm->series == GEMM_NO_SERIES ? NULL : &self->layers[arm->series];

	if (one && lshard_series_prepare(one->series, self->stream) != LSHARD_OK)
		return gemm_fail_series(self, one);
	return true;
}

bool gemm_pass(struct gemm_rank *self, uint32_t arm)
{
	if (!self->graphs[arm])
		return enqueue(self, &self->bench->arms[arm]);
	if (!prepare(self, &self->bench->arms[arm]))
		return false;
	return gpu_graph_launch(&self->gpu, self->graphs[arm], self->stream) == LSHARD_OK || gemm_fail_gpu(self);
}

bool gemm_rest(struct gemm_rank *self, const struct gemm_arm *arm)
{
	if (arm->kind == GEMM_RIVAL ? !gemm_rival_rest(self, arm->rival) : !prepare(self, arm))
		return false;
	return gpu_stream_finish(&self->gpu, self->stream) == LSHARD_OK || gemm_fail_gpu(self);
}

/* ---- Graphs -------------------------------------------------------------------------------------------------- */

static bool capture(struct gemm_rank *self, uint32_t index)
{
	const struct gemm_arm *arm = &self->bench->arms[index];
	const struct gemm_layers *one = arm->series == GEMM_NO_SERIES ? NULL : &self->layers[arm->series];

	if (!prepare(self, arm))
		return false;
	if (gpu_capture_begin(&self->gpu, self->stream) != LSHARD_OK)
		return gemm_fail_gpu(self);
	if (!enqueue(self, arm))
		return false;
	if (one && lshard_series_join(one->series, self->stream) != LSHARD_OK)
		return gemm_fail_series(self, one);
	return gpu_capture_end(&self->gpu, self->stream, &self->graphs[index]) == LSHARD_OK || gemm_fail_gpu(self);
}

bool gemm_capture_all(struct gemm_rank *self)
{
	for (uint32_t arm = 0; arm < self->bench->arm_count; arm++)
		if (self->bench->arms[arm].graph && !capture(self, arm))
			return false;
	return true;
}

void gemm_forget_graphs(struct gemm_rank *self)
{
	for (uint32_t arm = 0; arm < self->bench->arm_count; arm++) {
		gpu_graph_close(&self->gpu, self->graphs[arm]);
		self->graphs[arm] = NULL;
	}
}
