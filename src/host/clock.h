/* SPDX-License-Identifier: Apache-2.0
 *
 * clock.h - the one clock of the library: CLOCK_MONOTONIC in nanoseconds, and conditions whose deadlines are of it.
 * Knows nothing else.
 */
#ifndef LAYERSHARD_CLOCK_H
#define LAYERSHARD_CLOCK_H

#include <pthread.h>
#include <stdint.h>

uint64_t lshard__now_ns(void);
/* 0, or the system's error. */
int lshard__condition_open(pthread_cond_t *condition);

#endif
