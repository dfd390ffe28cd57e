/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_meter.h - clocks, power and throttling of one GPU while something is measured, by NVML. It is optional: without
 * NVML a meter opens and tells nothing. Knows: NVML's binary interface, POSIX threads. Does not know: what is measured.
 */
#ifndef GPU_METER_H
#define GPU_METER_H

#include "gpu.h"

struct gpu_meter;

/* Medians of the samples of an interval; those that could not be had are below 0. */
struct gpu_reading {
	double sm_mhz;
	double memory_mhz;
	double watts;
	unsigned long long throttled; /* NVML's reasons, seen in any sample; 0 also when unknown */
	unsigned samples;
};

/** NULL where there is no NVML, no such device or no memory: all functions take that and tell nothing. */
struct gpu_meter *gpu_meter_open(const struct gpu *gpu);
void gpu_meter_close(struct gpu_meter *meter);
/** Sample every few milliseconds from here, in a thread, until gpu_meter_end. */
void gpu_meter_begin(struct gpu_meter *meter);
void gpu_meter_end(struct gpu_meter *meter, struct gpu_reading *reading);
/** "power cap, thermal"; "none" for 0, "-" without samples. Returns @p text. */
const char *gpu_throttle_text(const struct gpu_reading *reading, char *text, size_t bytes);

#endif
