/* SPDX-License-Identifier: Apache-2.0
 *
 * callback_circle.h - a communicator among the threads of a team, for the callback transport: broadcast and all-gather
 * by memcpy, which happen when the last rank has come. As strict as a real one is not: collectives that do not match
 * end the program. Faults can be put into it.
 */
#ifndef TESTS_CALLBACK_CIRCLE_H
#define TESTS_CALLBACK_CIRCLE_H

#include "threads.h"

#include <layershard/callbacks.h>

struct seat;

/* Take this rank's seat; collective over the team. NULL when a rank has left. */
struct seat *circle_join(const struct member *member);
/* The last to leave frees the circle. NULL is allowed. */
void circle_leave(struct seat *seat);

const lshard_callbacks *seat_callbacks(const struct seat *seat);

/* From now on: the @p calls-th call of broadcast, allgather or finish (counted from 0) fails; -1: none. */
void seat_fail_at(struct seat *seat, long calls);
/* From now on: finish never ends, whatever happens, and stop changes nothing. */
void seat_get_stuck(struct seat *seat);
/* From now on: finish does not even return, until it is woken. */
void seat_fall_asleep(struct seat *seat);
/* Returns when finish has: nothing of the circle is in use by then. */
void seat_wake(struct seat *seat);
/* Calls of broadcast, allgather and finish so far. */
long seat_calls(const struct seat *seat);
/* Collectives begun so far. */
long seat_collectives(const struct seat *seat);

#endif
