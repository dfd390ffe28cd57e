/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_split.c - see bench_gemm_rank.h: where the time of a pass goes. Marks on the stream before and after a
 * layer is brought tell how long it stood there (stalled) from how long it computed; compute that takes longer than
 * with everything resident was slowed by the copies beside it. Apart from the samples, which have no marks.
 */
#include "bench_gemm_rank.h"

#include <stdlib.h>

static bool add_up(struct gemm_rank *self, struct gemm_sample *sample)
{
	for (uint32_t i = 0; i < 2 * self->bench->options.layers; i++) {
		double elapsed = 0;

		if (gpu_event_elapsed(&self->gpu, self->marks[i], self->marks[i + 1], &elapsed) != LSHARD_OK)
			return gemm_fail_gpu(self);
		if (i % 2 == 0)
			sample->stalled_ns += elapsed;
		else
			sample->computed_ns += elapsed;
	}
	return true;
}

static bool split_pass(struct gemm_rank *self, uint32_t arm, struct gemm_sample *sample)
{
	const uint32_t warm = gemm_warm_passes(self, arm);

	for (uint32_t pass = 0; pass <= warm; pass++)
		if (!gemm_pass(self, arm)) /* what counts are the marks of the last one */
			return false;
	return gemm_rest(self, &self->bench->arms[arm]) && add_up(self, sample);
}

static bool is_split(const struct gemm_arm *arm, uint32_t index)
{
	return index == GEMM_ARM_FIRST || (arm->kind == GEMM_OVERLAPPED && !arm->graph && !arm->delayed);
}

static bool split_rounds(struct gemm_rank *self, uint32_t tokens)
{
	struct gemm_bench *bench = self->bench;

	for (uint32_t round = 0; round < GEMM_SPLIT_ROUNDS && round < bench->options.rounds; round++)
		for (uint32_t arm = 0; arm < bench->arm_count; arm++) {
			if (!is_split(&bench->arms[arm], arm))
				continue;
			if (!bench_ranks_meet(&bench->shared->ranks, self->rank))
				return false;
			if (self->computes &&
			    !split_pass(self, arm, gemm_sample_at(bench, tokens, arm, (uint32_t)self->rank, round)))
				return false;
		}
	return true;
}

bool gemm_split(struct gemm_rank *self, uint32_t tokens)
{
	const uint32_t count = 2 * self->bench->options.layers + 1;
	gpu_event *marks = calloc(count, sizeof *marks);
	bool good = marks != NULL;

	if (!marks)
		bench_ranks_fail(&self->bench->shared->ranks, "rank %d: no memory for marks", (int)self->rank);
	for (uint32_t i = 0; good && i < count; i++)
		good = gpu_event_open(&self->gpu, &marks[i]) == LSHARD_OK || gemm_fail_gpu(self);
	self->marks = marks;
	good = good && split_rounds(self, tokens);
	self->marks = NULL;
	for (uint32_t i = 0; marks && i < count; i++)
		gpu_event_close(&self->gpu, marks[i]);
	free(marks);
	return good;
}
