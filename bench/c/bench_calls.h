/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_calls.h - the series whose calls are timed, opened on all their ranks: threads of this process, and a second
 * process. Knows: the public header. Does not know: how calls are timed, what is printed.
 */
#ifndef BENCH_CALLS_H
#define BENCH_CALLS_H

#include "bench.h"

#include <sys/types.h>

#define CALLS_SIZES       3u /* groups of threads: 2, 8 and 64 ranks */
#define CALLS_COUNTS      4u /* series of 8, 64, 512 and 8192 layers */
#define CALLS_LAYER_BYTES 64u

extern const int32_t calls_sizes[CALLS_SIZES];
extern const uint32_t calls_counts[CALLS_COUNTS];

/* Why nothing is transferred. */
enum calls_kind {
	CALLS_RESIDENT, /* every layer is resident */
	CALLS_HELD,     /* the same layer over and over: it stays in its window */
	CALLS_DIRECT    /* computed from where the source stores it: nothing ever moves */
};

/* One timed series, as rank 0 holds it. */
struct calls_row {
	enum calls_kind kind;
	const char *transport;
	int32_t ranks;
	uint32_t layers;
	lshard_series *series;
};

/* ---- Ranks as threads (bench_calls_threads.c) ---- */

struct calls_threads {
	struct bench_circle circle[CALLS_SIZES];
	void (*measure)(void *user); /* on rank 0, while all others are idle */
	void *user;
	struct calls_row *rows; /* room for 2 * CALLS_SIZES * CALLS_COUNTS */
};

/** Open all groups and series, measure, close. False: the text of the failure is in *failure (bench_circle's size). */
bool calls_threads_run(struct calls_threads *threads, char *failure, size_t failure_bytes);

/* ---- Two processes on shm (bench_calls_pair.c) ---- */

struct calls_pair {
	pid_t child;
	int pipe; /* to the child; closing it ends the child */
	char job[48];
	lshard_group *group;
	lshard_series *series[CALLS_COUNTS];
};

/** Fork the second rank and open the series with it. Call it while the process has one thread. */
bool calls_pair_open(struct calls_pair *pair, char *failure, size_t failure_bytes);
/** False when one of the ranks failed. */
bool calls_pair_close(struct calls_pair *pair);

#endif
