/* SPDX-License-Identifier: Apache-2.0
 *
 * callback_ranks.h - what the tests of the callback transport share: ranks as threads over a circle, which ends the
 * program when collectives do not match.
 */
#ifndef LAYERSHARD_TEST_CALLBACK_RANKS_H
#define LAYERSHARD_TEST_CALLBACK_RANKS_H

#include "conformance.h"

/* Run @p body on @p size ranks over the transport; all must end well. */
void play(int32_t size, member_body body, void *user);
/* Reach the layer at @p position and wait for it. */
lshard_status go_to(struct rank *rank, uint32_t position);

#endif
