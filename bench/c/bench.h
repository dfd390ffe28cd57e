/* SPDX-License-Identifier: Apache-2.0
 *
 * bench.h - what the benches share: the clock, spreads of samples, shuffling, layers whose every
 * byte is known, ranks as threads with a barrier. Knows: the public header and POSIX threads. Does not know: what is
 * measured, options, how a result is printed.
 */
#ifndef BENCH_H
#define BENCH_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "layershard/layershard.h"

/* The benches; argv[0] is the bench's own name. Each returns a cli_exit. */
int bench_calls(int argc, char **argv);
int bench_link(int argc, char **argv);
int bench_read(int argc, char **argv);
int bench_step(int argc, char **argv);

/* ---- Time and samples (bench_sample.c) ----------------------------------------------------------------------- */

/** CLOCK_MONOTONIC in nanoseconds. */
uint64_t bench_now_ns(void);
/**
 * Return when the clock shows @p deadline_ns, to the microsecond: the model of a kernel that computes. Like the host of
 * a device it leaves the core to others meanwhile, so that more ranks than cores can compute at once.
 */
void bench_compute_until(uint64_t deadline_ns);

struct bench_spread {
	double median;
	double least;
	double most;
};
/** Sorts @p samples (count > 0). */
struct bench_spread bench_spread_of(double *samples, size_t count);
/** {"median", "min", "max"}. NULL: no memory. */
json_t *bench_spread_json(const struct bench_spread *spread);

/** The next number of a reproducible stream (splitmix64). */
uint64_t bench_random(uint64_t *state);
/** A new order of @p items by that stream. */
void bench_shuffle(uint32_t *items, uint32_t count, uint64_t *state);

/* ---- Layers whose bytes are known (bench_data.c): random-looking, for zeros compute and compress faster than data  */

#define BENCH_LINE_BYTES 64u /* layers are multiples of it */

void bench_fill(void *layer_bytes, uint64_t bytes, uint32_t layer);
/** True when the first line, the last line and one word chosen by @p pick are those of @p layer. A few dozen ns. */
bool bench_probe(const void *layer_bytes, uint64_t bytes, uint32_t layer, uint64_t pick);
/** True when every byte is that of @p layer. */
bool bench_compare(const void *layer_bytes, uint64_t bytes, uint32_t layer);
/** An lshard_post_process for series of one tensor; user is a const uint64_t *: the layer's bytes. */
int bench_post_process(void *user, uint32_t layer, void *const *tensors);
/** Reach, wait and compare every byte of every layer. *wrong: the first layer that differs, or -1. */
lshard_status bench_compare_series(lshard_series *series, uint32_t layers, uint64_t bytes, int64_t *wrong);

/* ---- Ranks as threads (bench_circle.c) ----------------------------------------------------------------------- */

/* The barrier of one group's rank threads. A rank that fails breaks it, and nobody waits for the missing any more. */
struct bench_circle {
	pthread_mutex_t mutex;
	pthread_cond_t changed;
	int32_t size;
	int32_t arrived;
	uint64_t barriers; /* that all have passed */
	bool broken;
	char failure[768]; /* of the rank that failed first */
	const void **sent; /* [size] during an all-gather */
};

struct bench_member {
	struct bench_circle *circle;
	int32_t rank;
};

bool bench_circle_open(struct bench_circle *circle, int32_t size);
void bench_circle_close(struct bench_circle *circle);
/** Wait for all ranks; false when the circle is broken. */
bool bench_circle_barrier(struct bench_circle *circle);
/** Break the circle, keeping the text of the first failure. Returns false. */
bool bench_circle_fail(struct bench_circle *circle, const char *format, ...) __attribute__((format(printf, 2, 3)));
/** An lshard_bootstrap's allgather; user is a struct bench_member. */
int bench_circle_allgather(void *user, const void *send, void *receive, size_t bytes);

/** Run @p body for ranks 0..size-1, rank 0 on this thread, and return when all have ended. False: no thread could be
 * made. */
bool bench_threads_run(int32_t size, void (*body)(void *user, int32_t rank), void *user, struct bench_circle *circle);

#endif
