/* SPDX-License-Identifier: Apache-2.0
 *
 * control.h - an all-gather among the living ranks of a host that happens for all of them or for none.
 * Knows the mesh and a page all ranks share; knows nothing of what is exchanged.
 */
#ifndef LAYERSHARD_CONTROL_H
#define LAYERSHARD_CONTROL_H

#include "mesh.h"

struct control_block;

struct control {
	struct mesh *mesh;
	lshard_error *error;
	struct control_block *block; /* shared by all ranks */
	size_t bytes;
	int fd; /* of the page, for those who come back; -1: nobody can */
};

/* Rank 0 makes the page, the others get it through the mesh. Collective. */
lshard_status control_open(struct control *control, struct mesh *mesh, lshard_error *error, uint64_t deadline_ns);
void control_close(struct control *control);

/* See lshard_transport_ops.exchange. @p round: the number this exchange has for all ranks; may be NULL. */
lshard_status control_exchange(struct control *control, const void *send, void *receive, size_t bytes, uint8_t *alive,
			       uint64_t *round, uint64_t deadline_ns);

/* ---- control_return.c: ranks that come back ---- */

/*
 * A call of several agreements begins (1) or ends (-1) here: meanwhile nobody is counted who was not. @p note: a number
 * that all ranks have alike, for those who come back.
 */
void control_busy(struct control *control, int change, uint64_t note);

/* Whom a rank that comes back waits for. */
struct control_obstacle {
	int32_t rank; /* -1: nobody lives */
	enum { CONTROL_NOT_CONNECTED, CONTROL_BUSY, CONTROL_EXCHANGING } why;
};

/* Map the page @p fd, which becomes this object's, of a group that lives, and begin as a rank that is gone. */
lshard_status control_attach(struct control *control, struct mesh *mesh, lshard_error *error, int fd,
			     uint64_t deadline_ns);
/* The process of the number @p rank that lives, counted from 0; -1: it is gone. */
int64_t control_incarnation(struct control *control, int32_t rank, uint64_t deadline_ns);
/*
 * Be counted from now on, if no other rank is in an exchange or busy, and this one is connected to all that live.
 * IN_PROGRESS: not yet, because of @p obstacle. PEER_FAILED: none lives. @p note: the highest of the others'.
 */
lshard_status control_return(struct control *control, struct control_obstacle *obstacle, uint64_t *note,
			     uint64_t deadline_ns);

#endif
