/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_ranks.h - ranks of a bench as processes of their own, as GPUs need them: forked, with a barrier in shared
 * memory; none outlives the others' failure. Knows: processes. Does not know: GPUs, groups, what the ranks do.
 */
#ifndef BENCH_RANKS_H
#define BENCH_RANKS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* Lies in memory that all ranks share. */
struct bench_ranks {
	int32_t size;
	atomic_uint arrived;
	atomic_uint barriers; /* that all have passed */
	atomic_uint claimed;  /* by the rank that failed first */
	atomic_uint broken;   /* and its text is there */
	char failure[768];
};

/** Zeroed memory that forked processes share; NULL: none. Freed by bench_shared_free. */
void *bench_shared_allocate(uint64_t bytes);
void bench_shared_free(void *memory, uint64_t bytes);

/** Wait for all ranks, at most two minutes; false when one has failed or does not arrive. */
bool bench_ranks_barrier(struct bench_ranks *ranks, int32_t rank);
/** Break the barrier, keeping the text of the first failure. Returns false. */
bool bench_ranks_fail(struct bench_ranks *ranks, const char *format, ...) __attribute__((format(printf, 2, 3)));
bool bench_ranks_broken(struct bench_ranks *ranks);

/**
 * Fork a process per rank, have each run @p body, and return when all have ended; those that hang after another's
 * failure are killed. False: a rank failed, with the text in ranks->failure.
 */
bool bench_ranks_run(struct bench_ranks *ranks, int32_t size, void (*body)(void *user, int32_t rank), void *user);

#endif
