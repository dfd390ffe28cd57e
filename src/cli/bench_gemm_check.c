/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_check.c - see bench_gemm_rank.h: are the bits right, and what do the calls cost the host?
 */
#include "bench_gemm_rank.h"
#include "bench_gemm_weights.h"

#include <string.h>

#define CALL_PASSES 8u

/* ---- What passes put out ------------------------------------------------------------------------------------- */

static uint64_t output_bytes(const struct gemm_rank *self)
{
	return (uint64_t)self->tokens * self->bench->options.hidden * 2;
}

static bool take_output(struct gemm_rank *self, void *to)
{
	return gpu_copy_now(&self->gpu, (uintptr_t)to, self->output, output_bytes(self), self->stream) == LSHARD_OK ||
	       gemm_fail_gpu(self);
}

/* Of numbers that are all zero or beyond bfloat16 wrong layers would make the same ones. */
static bool tells_apart(const uint16_t *numbers, uint64_t count)
{
	const uint16_t exponent = 0x7f80;
	uint64_t zeros = 0;

	for (uint64_t i = 0; i < count; i++) {
		if ((numbers[i] & exponent) == exponent)
			return false;
		zeros += (numbers[i] & exponent) == 0;
	}
	return zeros < count / 2;
}

bool gemm_keep_reference(struct gemm_rank *self)
{
	if (!take_output(self, self->reference))
		return false;
	if (tells_apart(self->reference, output_bytes(self) / sizeof(uint16_t)))
		return true;
	return bench_ranks_fail(&self->bench->shared->ranks,
				"rank %d: what %u layers compute leaves the range of bfloat16, so that bits cannot be "
				"compared: give fewer --layers or other --dims",
				(int)self->rank, self->bench->options.layers);
}

bool gemm_check_output(struct gemm_rank *self, const struct gemm_arm *arm)
{
	char text[64];

	if (arm->kind == GEMM_COPIES)
		return true;
	if (!take_output(self, self->host))
		return false;
	if (memcmp(self->host, self->reference, (size_t)output_bytes(self)) == 0)
		return true;
	return bench_ranks_fail(&self->bench->shared->ranks,
				"wrong bits: with %u tokens '%s' computes on rank %d what '%s' does not", self->tokens,
				gemm_arm_text(self->bench, arm, text, sizeof text), (int)self->rank, "A resident");
}

/* ---- What layers hold ---------------------------------------------------------------------------------------- */

static bool check_layer(struct gemm_rank *self, const struct gemm_layers *one, uint32_t layer)
{
	const uint64_t bytes = gemm_layer_bytes(&self->bench->options);

	if (lshard_reach(one->series, layer, self->stream) != LSHARD_OK ||
	    lshard_wait(one->series, layer, self->stream) != LSHARD_OK)
		return gemm_fail_series(self, one);
	if (gpu_copy_now(&self->gpu, (uintptr_t)self->host, one->addresses[layer], bytes, self->stream) != LSHARD_OK)
		return gemm_fail_gpu(self);
	if (memcmp(self->host, self->expected, (size_t)bytes) == 0)
		return true;
	return bench_ranks_fail(&self->bench->shared->ranks,
				"wrong bits: layer %u on rank %d is not what its source wrote", layer, (int)self->rank);
}

bool gemm_check_layers(struct gemm_rank *self)
{
	const struct gemm_options *options = &self->bench->options;

	for (uint32_t layer = 0; layer < options->layers; layer++) {
		gemm_fill(self->expected, gemm_layer_bytes(options), GEMM_DOWN, layer, options->inner);
		for (uint32_t index = 0; index < self->bench->series_count; index++)
			if (!check_layer(self, &self->layers[index], layer))
				return false;
	}
	return true;
}

/* ---- What calls cost ----------------------------------------------------------------------------------------- */

struct timed_calls {
	double with[CALL_PASSES * 4096];
	double without[CALL_PASSES * 4096];
	size_t with_count;
	size_t without_count;
};

static uint64_t fetches_of(const struct gemm_layers *one)
{
	lshard_stats stats = LSHARD_STATS_INIT;

	lshard_series_stats(one->series, &stats);
	return stats.fetches;
}

static bool time_layer(struct gemm_rank *self, const struct gemm_layers *one, uint32_t layer, struct timed_calls *timed)
{
	const uint64_t before = fetches_of(one);
	const uint64_t begin = bench_now_ns();
	double elapsed;

	if (lshard_reach(one->series, layer, self->stream) != LSHARD_OK ||
	    lshard_wait(one->series, layer, self->stream) != LSHARD_OK)
		return gemm_fail_series(self, one);
	elapsed = (double)(bench_now_ns() - begin);
	if (fetches_of(one) > before)
		timed->with[timed->with_count++] = elapsed;
	else
		timed->without[timed->without_count++] = elapsed;
	return gemm_compute_layer(self, layer, one->addresses[layer]);
}

/* The stream is drained after each pass: a full queue would make the calls wait for the device. */
static bool time_series(struct gemm_rank *self, const struct gemm_layers *one, struct timed_calls *timed)
{
	timed->with_count = 0;
	timed->without_count = 0;
	for (uint32_t pass = 0; pass <= CALL_PASSES; pass++) {
		if (pass == 1) /* the first one wakes everything */
			timed->with_count = timed->without_count = 0;
		for (uint32_t layer = 0; layer < self->bench->options.layers; layer++)
			if (!time_layer(self, one, layer, timed))
				return false;
		if (gpu_stream_finish(&self->gpu, self->stream) != LSHARD_OK)
			return gemm_fail_gpu(self);
	}
	return true;
}

bool gemm_time_calls(struct gemm_rank *self)
{
	struct timed_calls *timed = calloc(1, sizeof *timed);
	bool good = timed != NULL;

	if (!timed)
		bench_ranks_fail(&self->bench->shared->ranks, "rank %d: no memory", (int)self->rank);
	for (uint32_t index = 0; good && index < self->bench->series_count; index++) {
		struct gemm_calls *calls = &self->bench->shared->results[self->rank].series[index].calls;

		*calls = (struct gemm_calls){-1, -1, -1};
		good = time_series(self, &self->layers[index], timed);
		if (good && timed->with_count > 0) {
			const struct bench_spread spread = bench_spread_of(timed->with, timed->with_count);

			calls->with_transfer = spread.median;
			calls->worst_with_transfer = spread.most;
		}
		if (good && timed->without_count > 0)
			calls->without = bench_spread_of(timed->without, timed->without_count).median;
	}
	free(timed);
	return good;
}
