/* SPDX-License-Identifier: Apache-2.0
 *
 * local_ranks.h - what the tests of the core's calls share that need no more than the transport `local`: ranks as
 * threads of this process, with the conformance suite's series.
 */
#ifndef LAYERSHARD_TEST_LOCAL_RANKS_H
#define LAYERSHARD_TEST_LOCAL_RANKS_H

#include "conformance.h"

/* Run @p body on @p size threads, each a rank over @p spec; all must end well. */
void play(const char *spec, int32_t size, member_body body, void *user);
/* Of two tensors whose sizes are multiples of nothing. */
struct setting small_setting(uint32_t layers, uint32_t prefetch);
/* The group of one rank. */
lshard_group *create_alone(const char *spec);

#endif
