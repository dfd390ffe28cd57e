/* SPDX-License-Identifier: Apache-2.0
 *
 * contexts.h - a transport's context without a group: malloc, no log. For tests of transports and the rendezvous.
 */
#ifndef TESTS_CONTEXTS_H
#define TESTS_CONTEXTS_H

#include "threads.h"

#include <layershard/transport.h>

/* Of one member of a team; the bootstrap is the team's own (threads) or empty (processes). */
lshard_context context_for_member(const struct member *member, const char *options, uint32_t timeout_ms);

/* Blocks of contexts that were allocated and not released yet, in this process. */
int contexts_outstanding(void);

#endif
