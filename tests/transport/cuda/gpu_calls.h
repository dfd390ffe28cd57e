/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_calls.h - what the files of gpu_calls share: gpu_calls.c (what is run), gpu_calls_raw.c (calls of the driver by
 * themselves), gpu_calls_trace.c (the transport's calls of the driver), gpu_calls_series.c (reach, wait and release).
 * Functions that return int give 0, with a message, when something is not as it should be.
 */
#ifndef TESTS_GPU_CALLS_H
#define TESTS_GPU_CALLS_H

#include "gpu_rank.h"
#include "gpu_samples.h"

#include <stdatomic.h>

/* What the other ranks' processes do while rank 0 is timed. */
enum others { OTHERS_NOTHING, OTHERS_COMPUTE, OTHERS_COPY, OTHERS_PASSES, OTHERS };

/* In memory that all ranks share. */
struct shared {
	atomic_int stop; /* the others' work */
};

struct probe {
	struct plan plan; /* first: what a rank is given */
	const char *name;
	struct shared *shared;
	size_t repeats;
	double limit_us; /* of one line */
	int enqueued;    /* the driver records no graph: copies one by one */
	int pinned;      /* each rank to a processor of its own */
	int remedies;    /* lines for what might make it faster */
};

extern const char *const gpu_others_names[OTHERS];

/* Until shared->stop: work of kind @p what on the device. */
int gpu_disturb(struct rank *rank, struct probe *probe, enum others what);

/* ---- gpu_calls_raw.c ---- */

/* Rank 0: a table of the driver's calls. */
int gpu_tells_raw_calls(struct rank *rank, const struct probe *probe, enum others others);

/* ---- gpu_calls_trace.c ---- */

enum traced {
	TRACED_CONTEXT,
	TRACED_CAPTURING,
	TRACED_RECORD,
	TRACED_WAIT,
	TRACED_LAUNCH,
	TRACED_COPY,
	TRACED_COPY_2D,
	TRACED_HOST,
	TRACED
};

struct trace {
	int on;      /* time the calls */
	int unasked; /* context known to be current, stream not to be captured: the driver is not asked */
	int refuse;  /* captures */
	double us[TRACED];
	unsigned calls[TRACED];
};

extern struct trace gpu_trace;
extern const char *const gpu_traced_names[TRACED];

/* Put the trace between the group's transport and the driver. */
void gpu_trace_group(lshard_group *group);
void gpu_trace_clear(void);

/* ---- gpu_calls_series.c ---- */

/* Rank 0: lines about the series' calls, while the others do what is said. The others' part is gpu_disturb. */
int gpu_tells_series_calls(struct rank *rank, const struct probe *probe, enum others others);

#endif
