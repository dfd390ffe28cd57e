/* SPDX-License-Identifier: Apache-2.0
 *
 * socket_circle.h - a communicator among forked ranks, for the callback transport: broadcast and all-gather over a pair
 * of sockets for each two ranks. A rank that has died ends what the others wait for. A rank can be told to be killed
 * in the middle of its collectives.
 */
#ifndef TESTS_SOCKET_CIRCLE_H
#define TESTS_SOCKET_CIRCLE_H

#include "threads.h"

#include <layershard/callbacks.h>

#include <stdatomic.h>

#define CIRCLE_RANKS 3

struct socket_circle {
	int ends[CIRCLE_RANKS]; /* of the pairs with the others */
	const struct member *member;
	lshard_callbacks callbacks;
	atomic_long die_at; /* the callback from now on at which this rank is killed; -1: none */

	/* the collective in progress */
	const char *send;
	char *receive;
	size_t count;
	int32_t root; /* -1: all-gather */
	size_t sent[CIRCLE_RANKS];
	size_t got[CIRCLE_RANKS];
};

/* Collective over the team, whose ranks are processes. False when a rank is not there. */
bool socket_circle_join(struct socket_circle *circle, const struct member *member);
/* Over pairs of sockets that there are already: circle->ends is filled in. */
void socket_circle_open(struct socket_circle *circle, const struct member *member);
/* The same circle as a group's bootstrap, for as long as nothing else uses it. */
lshard_bootstrap socket_circle_bootstrap(struct socket_circle *circle);
/* This rank is killed now. */
void socket_circle_die(struct socket_circle *circle);
/* When nothing calls it any more. */
void socket_circle_leave(struct socket_circle *circle);

#endif
