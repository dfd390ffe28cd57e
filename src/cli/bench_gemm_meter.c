/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_meter.c - see bench_gemm_rank.h: clocks and power of one way of running passes, for as long as it takes
 * until they are its own. Apart from the samples: what asks a driver for its clock every few milliseconds makes what
 * starts work on the GPU wait for it.
 */
#include "bench_gemm_rank.h"

#define METERED_NS 1000000000.0

static bool is_metered(const struct gemm_bench *bench, uint32_t index)
{
	const struct gemm_arm *arm = &bench->arms[index];

	if (arm->delayed || !gemm_is_run(bench, arm))
		return false;
	return index != GEMM_ARM_LAST;
}

static bool meter_arm(struct gemm_rank *self, uint32_t index, struct gemm_sample *sample)
{
	const uint32_t passes = gemm_passes_in(self->bench, index, METERED_NS);
	const uint32_t warm = gemm_warm_passes(self, index);
	struct gpu_reading reading;
	bool good;

	if (!gemm_time_passes(self, index, 0, warm, &sample->sustained_ns)) /* and wait for their end */
		return false;
	gpu_meter_begin(self->meter);
	good = gemm_time_passes(self, index, 0, passes, &sample->sustained_ns);
	gpu_meter_end(self->meter, &reading);
	sample->sm_mhz = reading.sm_mhz;
	sample->watts = reading.watts;
	sample->throttled = reading.throttled;
	return good && gemm_rest(self, &self->bench->arms[index]);
}

bool gemm_meter(struct gemm_rank *self, uint32_t tokens)
{
	struct gemm_bench *bench = self->bench;

	for (uint32_t arm = 0; bench->shared->results[0].has_meter && arm < bench->arm_count; arm++) {
		if (!is_metered(bench, arm))
			continue;
		if (!bench_ranks_meet(&bench->shared->ranks, self->rank))
			return false;
		if (self->computes &&
		    !meter_arm(self, arm, gemm_sample_at(bench, tokens, arm, (uint32_t)self->rank, 0)))
			return false;
	}
	return true;
}
