/* SPDX-License-Identifier: Apache-2.0
 *
 * clock.h - the one clock of the library: CLOCK_MONOTONIC in nanoseconds. Knows nothing else.
 */
#ifndef LAYERSHARD_CLOCK_H
#define LAYERSHARD_CLOCK_H

#include <stdint.h>

uint64_t lshard__now_ns(void);

#endif
