/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_pace.h - a bound on the bytes per second that a rank's copies take, kept by functions of the host between them.
 * Knows a clock; knows no stream and no layer. All of it may be called from any thread.
 *
 * The driver has one thread for all host functions of a process and device: while one sleeps here, others wait, also
 * those of the program. That is what pacing costs; it is off unless asked for.
 */
#ifndef LAYERSHARD_CUDA_PACE_H
#define LAYERSHARD_CUDA_PACE_H

#include <stdatomic.h>
#include <stdint.h>

struct cuda_pace {
	double ns_per_byte;
	_Atomic uint64_t due_ns; /* when the next slice may begin */
	atomic_int bypassed;     /* not 0: nothing sleeps */
};

/* What stands in front of a slice of a copy; stays where it is while any graph may run the slice. */
struct cuda_charge {
	struct cuda_pace *pace;
	uint64_t bytes;
};

/* Bytes that are copied in one go at this pace. */
uint64_t cuda_pace_slice(const struct cuda_pace *pace);
/* A host function: sleeps until the slice of the charge (its argument) may begin. */
void cuda_pace_wait(void *charge);
/* While somebody waits for the end of all copies they run unpaced; counted, @p step is 1 or -1. NULL: nothing. */
void cuda_pace_bypass(struct cuda_pace *pace, int step);

#endif
