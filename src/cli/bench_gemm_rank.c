/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_rank.c - see bench_gemm_rank.h: the life of a rank, and its rounds.
 *
 * All ranks walk through the same arms in the same order and meet before each sample; nothing else keeps them in step.
 * A sample is warm passes and then P that are timed by events on the stream of the compute, so that it begins and ends
 * in the steady state in which passes flow into one another. The warm ones are many: a GPU at its power cap takes a
 * while to find its clock, and a short sample has the one of the way before it.
 */
#include "bench_gemm_rank.h"
#include "bench_gemm_weights.h"

#include <stdlib.h>

#define LOAD_TIMEOUT_MS 120000u /* of meetings in which ranks load layers */

static struct bench_ranks *ranks_of(const struct gemm_rank *self)
{
	return &self->bench->shared->ranks;
}

static bool meet(struct gemm_rank *self)
{
	return bench_ranks_meet(ranks_of(self), self->rank);
}

bool gemm_fail_gpu(struct gemm_rank *self)
{
	return bench_ranks_fail(ranks_of(self), "rank %d: %s", (int)self->rank, self->gpu.error);
}

bool gemm_fail_series(struct gemm_rank *self, const struct gemm_layers *one)
{
	return bench_ranks_fail(ranks_of(self), "%s", lshard_series_error(one->series)); /* it names the rank */
}

static bool fail_memory(struct gemm_rank *self)
{
	return bench_ranks_fail(ranks_of(self), "rank %d: no memory", (int)self->rank);
}

/* ---- The device ---------------------------------------------------------------------------------------------- */

static bool open_device(struct gemm_rank *self)
{
	struct gemm_rank_result *result = &self->bench->shared->results[self->rank];

	if (gpu_open(&self->gpu, (int)self->bench->options.devices[self->rank]) != LSHARD_OK ||
	    gpu_stream_open(&self->gpu, false, &self->stream) != LSHARD_OK ||
	    gpu_event_open(&self->gpu, &self->from) != LSHARD_OK || gpu_event_open(&self->gpu, &self->to) != LSHARD_OK)
		return gemm_fail_gpu(self);
	if (self->computes && gpu_blas_open(&self->blas, &self->gpu) != LSHARD_OK)
		return gemm_fail_gpu(self);
	if (self->computes)
		self->meter = gpu_meter_open(&self->gpu);
	snprintf(result->device, sizeof result->device, "%s", self->gpu.name);
	snprintf(result->bus, sizeof result->bus, "%s", self->gpu.bus);
	result->driver_version = self->gpu.driver_version;
	result->blas_version = self->blas.version;
	result->has_meter = self->meter != NULL;
	return true;
}

static uint32_t most_tokens(const struct gemm_options *options)
{
	uint32_t most = 0;

	for (uint32_t i = 0; i < options->token_count; i++)
		if (options->tokens[i] > most)
			most = options->tokens[i];
	return most;
}

/* ---- Weights and activations --------------------------------------------------------------------------------- */

static bool upload(struct gemm_rank *self, gpu_address to, uint64_t bytes, enum gemm_use use, uint32_t layer,
		   uint32_t terms)
{
	gemm_fill(self->host, bytes, use, layer, terms);
	return gpu_copy_now(&self->gpu, to, (uintptr_t)self->host, bytes, self->stream) == LSHARD_OK;
}

static bool upload_all(struct gemm_rank *self, gpu_address to, enum gemm_use use, uint32_t terms)
{
	const uint64_t bytes = gemm_layer_bytes(&self->bench->options);

	for (uint32_t layer = 0; layer < self->bench->options.layers; layer++)
		if (!upload(self, to + layer * bytes, bytes, use, layer, terms))
			return gemm_fail_gpu(self);
	return true;
}

/* The whole stack of second weights: for A, and where a rival takes layers from. */
static bool open_down(struct gemm_rank *self)
{
	const struct gemm_options *options = &self->bench->options;

	if (!self->computes && !options->rivals[GEMM_PEER_COPY])
		return true;
	if (gpu_allocate(&self->gpu, gemm_layer_bytes(options) * options->layers, &self->down) != LSHARD_OK)
		return gemm_fail_gpu(self);
	return upload_all(self, self->down, GEMM_DOWN, options->inner);
}

static bool open_compute(struct gemm_rank *self)
{
	const struct gemm_options *options = &self->bench->options;
	const uint64_t rows = most_tokens(options);
	const uint64_t outer_bytes = rows * options->hidden * 2;

	if (!self->computes)
		return true;
	self->reference = malloc(outer_bytes);
	if (!self->reference)
		return fail_memory(self);
	if (gpu_allocate(&self->gpu, gemm_layer_bytes(options) * options->layers, &self->up) != LSHARD_OK ||
	    gpu_allocate(&self->gpu, outer_bytes, &self->input) != LSHARD_OK ||
	    gpu_allocate(&self->gpu, rows * options->inner * 2, &self->inner) != LSHARD_OK ||
	    gpu_allocate(&self->gpu, outer_bytes, &self->output) != LSHARD_OK ||
	    !upload(self, self->input, outer_bytes, GEMM_INPUT, (uint32_t)self->rank, 1))
		return gemm_fail_gpu(self);
	return upload_all(self, self->up, GEMM_UP, options->hidden);
}

static bool open_weights(struct gemm_rank *self)
{
	const struct gemm_options *options = &self->bench->options;
	const uint64_t output_bytes = (uint64_t)most_tokens(options) * options->hidden * 2;
	const uint64_t layer_bytes = gemm_layer_bytes(options);

	self->host = malloc(layer_bytes > output_bytes ? layer_bytes : output_bytes);
	self->expected = malloc(layer_bytes);
	if (!self->host || !self->expected)
		return fail_memory(self);
	return open_compute(self) && open_down(self);
}

/* ---- Series -------------------------------------------------------------------------------------------------- */

static bool open_group(struct gemm_rank *self)
{
	char error[512] = "";
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;

	if (!cli_log_open(&self->log, self->rank))
		return bench_ranks_fail(ranks_of(self), "LAYERSHARD_LOG is not understood");
	cli_log_default_to_warnings(&self->log); /* a slow link is told of there alone */
	cli_log_attach(&self->log, &options);
	options.rank = self->rank;
	options.size = (int32_t)self->bench->options.ranks;
	options.transport = self->bench->options.transport;
	options.job = self->bench->job;
	options.timeout_ms = LOAD_TIMEOUT_MS;
	options.memory = LSHARD_MEMORY_CUDA;
	options.device = (int32_t)self->bench->options.devices[self->rank];
	options.error = error;
	options.error_bytes = sizeof error;
	if (lshard_group_create(&options, &self->group) != LSHARD_OK)
		return bench_ranks_fail(ranks_of(self), "%s", error);
	snprintf(self->bench->shared->results[self->rank].transport,
		 sizeof self->bench->shared->results[self->rank].transport, "%s", lshard_group_transport(self->group));
	return true;
}

static int load_layer(void *user, uint32_t layer, void *const *tensors)
{
	struct gemm_rank *self = user;
	const uint64_t bytes = gemm_layer_bytes(&self->bench->options);
	const gpu_address to = (uintptr_t)tensors[0];

	if (self->down)
		return gpu_copy_now(&self->gpu, to, gemm_own_layer(self, layer), bytes, self->stream) != LSHARD_OK;
	return !upload(self, to, bytes, GEMM_DOWN, layer, self->bench->options.inner);
}

static bool find_addresses(struct gemm_rank *self, struct gemm_layers *one)
{
	const uint32_t layers = self->bench->options.layers;

	one->addresses = calloc(layers, sizeof *one->addresses);
	one->awaited = calloc(layers, sizeof *one->awaited);
	if (!one->addresses || !one->awaited)
		return fail_memory(self);
	for (uint32_t layer = 0; layer < layers; layer++) {
		void *address = NULL;

		if (lshard_series_address(one->series, layer, 0, &address) != LSHARD_OK)
			return gemm_fail_series(self, one);
		one->addresses[layer] = (uintptr_t)address;
	}
	gemm_find_awaited(one, layers);
	return true;
}

static bool create_series(struct gemm_rank *self, uint32_t index)
{
	struct gemm_layers *one = &self->layers[index];
	lshard_series_options options;
	lshard_tensor tensor;
	char name[32];

	gemm_series_options(self->bench, &self->bench->series[index], &tensor, &options);
	snprintf(name, sizeof name, "stack-%u", index);
	options.name = name;
	if (lshard_series_create(self->group, &options, &one->series) != LSHARD_OK)
		return bench_ranks_fail(ranks_of(self), "%s", lshard_group_error(self->group));
	if (lshard_series_commit(one->series, load_layer, self) != LSHARD_OK)
		return gemm_fail_series(self, one);
	return find_addresses(self, one);
}

/* Between meetings, for the driver's figure is of the whole device. */
static bool open_series(struct gemm_rank *self, uint32_t index)
{
	struct gemm_series_result *result = &self->bench->shared->results[self->rank].series[index];
	uint64_t before, after;

	if (!meet(self))
		return false;
	if (gpu_free_bytes(&self->gpu, &before) != LSHARD_OK)
		return gemm_fail_gpu(self);
	if (!meet(self) || !create_series(self, index) || !meet(self))
		return false;
	if (gpu_free_bytes(&self->gpu, &after) != LSHARD_OK)
		return gemm_fail_gpu(self);
	result->device_bytes = (int64_t)before - (int64_t)after;
	return meet(self); /* nobody takes more before all have looked */
}

static bool open_rank(struct gemm_rank *self)
{
	bool good = open_device(self) && open_weights(self) && meet(self) && open_group(self);

	for (uint32_t index = 0; good && index < self->bench->series_count; index++)
		good = open_series(self, index);
	return good && gemm_rivals_open(self);
}

static void close_rank(struct gemm_rank *self)
{
	char error[512];

	if (self->gpu.driver)
		(void)gpu_enter(&self->gpu);
	gemm_rivals_close(self);
	for (uint32_t index = 0; index < self->bench->series_count; index++) {
		(void)lshard_series_destroy(self->layers[index].series);
		free(self->layers[index].addresses);
		free(self->layers[index].awaited);
	}
	if (cli_group_leave(self->group, error, sizeof error) < 0)
		bench_ranks_fail(ranks_of(self), "rank %d: %s", (int)self->rank, error);
	gpu_meter_close(self->meter);
	if (self->gpu.driver) {
		gpu_blas_close(&self->blas);
		gpu_free(&self->gpu, self->output);
		gpu_free(&self->gpu, self->inner);
		gpu_free(&self->gpu, self->input);
		gpu_free(&self->gpu, self->down);
		gpu_free(&self->gpu, self->up);
		gpu_event_close(&self->gpu, self->to);
		gpu_event_close(&self->gpu, self->from);
		gpu_stream_close(&self->gpu, self->stream);
	}
	gpu_close(&self->gpu);
	free(self->reference);
	free(self->expected);
	free(self->host);
}

/* ---- Samples ------------------------------------------------------------------------------------------------- */

static bool run_passes(struct gemm_rank *self, uint32_t arm, uint32_t count)
{
	for (uint32_t pass = 0; pass < count; pass++)
		if (!gemm_pass(self, arm))
			return false;
	return true;
}

uint32_t gemm_warm_passes(const struct gemm_rank *self, uint32_t arm)
{
	return gemm_passes_in(self->bench, arm, self->bench->options.warm_ms * 1e6);
}

bool gemm_time_passes(struct gemm_rank *self, uint32_t arm, uint32_t warm, uint32_t passes, double *pass_ns)
{
	double elapsed = 0;

	if (!run_passes(self, arm, warm))
		return false;
	if (gpu_event_record(&self->gpu, self->from, self->stream) != LSHARD_OK)
		return gemm_fail_gpu(self);
	if (!run_passes(self, arm, passes))
		return false;
	if (gpu_event_record(&self->gpu, self->to, self->stream) != LSHARD_OK ||
	    gpu_event_finish(&self->gpu, self->to) != LSHARD_OK ||
	    gpu_event_elapsed(&self->gpu, self->from, self->to, &elapsed) != LSHARD_OK)
		return gemm_fail_gpu(self);
	*pass_ns = elapsed / passes;
	return true;
}

/* The bits of the first and the last round are looked at. */
static bool run_sample(struct gemm_rank *self, uint32_t tokens, uint32_t index, uint32_t round)
{
	struct gemm_bench *bench = self->bench;
	const struct gemm_arm *arm = &bench->arms[index];
	struct gemm_sample *sample = gemm_sample_at(bench, tokens, index, (uint32_t)self->rank, round);

	if (!meet(self))
		return false;
	if (!self->computes || !gemm_is_run(bench, arm))
		return true;
	if (!gemm_time_passes(self, index, gemm_warm_passes(self, index), bench->options.passes, &sample->pass_ns) ||
	    !gemm_rest(self, arm))
		return false;
	return (round > 0 && round + 1 < bench->options.rounds) || gemm_check_output(self, arm);
}

/* All ranks draw the same orders. */
static bool run_rounds(struct gemm_rank *self, uint32_t tokens)
{
	const struct gemm_bench *bench = self->bench;
	const uint32_t count = bench->arm_count - GEMM_ARM_SHUFFLED;
	uint32_t order[GEMM_ARMS_MOST];
	uint64_t random = 1;

	for (uint32_t i = 0; i < count; i++)
		order[i] = GEMM_ARM_SHUFFLED + i;
	for (uint32_t round = 0; round < bench->options.rounds; round++) {
		if (self->rank == 0)
			cli_progress("bench step: %u tokens, round %u of %u", self->tokens, round + 1,
				     bench->options.rounds);
		bench_shuffle(order, count, &random);
		if (!run_sample(self, tokens, GEMM_ARM_FIRST, round))
			return false;
		for (uint32_t i = 0; i < count; i++)
			if (!run_sample(self, tokens, order[i], round))
				return false;
		if (!run_sample(self, tokens, GEMM_ARM_LAST, round))
			return false;
	}
	return true;
}

/* What everything resident puts out, and graphs: of one number of tokens. */
static bool begin_tokens(struct gemm_rank *self)
{
	double unused;

	if (!self->computes)
		return true;
	return gemm_time_passes(self, GEMM_ARM_FIRST, 1, 1, &unused) && gemm_keep_reference(self) &&
	       gemm_capture_all(self);
}

/* How long passes take, for how many of them fill a time; the first samples of all are the better for it, too. */
static bool size_arms(struct gemm_rank *self)
{
	struct gemm_bench *bench = self->bench;
	double pass_ns = 0;

	for (uint32_t arm = 0; arm < bench->arm_count; arm++) {
		if (!gemm_is_run(bench, &bench->arms[arm]))
			continue;
		if (!meet(self))
			return false;
		if (self->computes &&
		    (!gemm_time_passes(self, arm, 2, 2, &pass_ns) || !gemm_rest(self, &bench->arms[arm])))
			return false;
		if (self->rank == 0)
			bench->shared->pass_ns[arm] = pass_ns;
	}
	return meet(self);
}

static bool run_tokens(struct gemm_rank *self, uint32_t tokens)
{
	bool good;

	self->tokens = self->bench->options.tokens[tokens];
	good = meet(self) && begin_tokens(self) && size_arms(self) && run_rounds(self, tokens) &&
	       gemm_split(self, tokens) && gemm_meter(self, tokens);
	gemm_forget_graphs(self);
	return good;
}

static bool run_all(struct gemm_rank *self)
{
	bool good = true;

	for (uint32_t tokens = 0; good && tokens < self->bench->options.token_count; tokens++)
		good = run_tokens(self, tokens);
	good = good && meet(self) && gemm_check_layers(self);
	return good && (!self->computes || gemm_time_calls(self)) && meet(self);
}

void gemm_rank_run(void *user, int32_t rank)
{
	struct gemm_bench *bench = user;
	struct gemm_rank *self = calloc(1, sizeof *self);

	if (!self) {
		bench_ranks_fail(&bench->shared->ranks, "rank %d: no memory", (int)rank);
		return;
	}
	self->bench = bench;
	self->rank = rank;
	self->computes = gemm_computes(bench, rank);
	if (open_rank(self) && run_all(self))
		for (uint32_t index = 0; index < bench->series_count; index++) {
			lshard_stats *stats = &bench->shared->results[rank].series[index].stats;

			*stats = (lshard_stats)LSHARD_STATS_INIT;
			lshard_series_stats(self->layers[index].series, stats);
		}
	cli_progress_erase();
	close_rank(self);
	free(self);
}
