/* SPDX-License-Identifier: Apache-2.0
 *
 * mesh.h - a socket between every two ranks of a host: wake-ups, descriptors, and the death of a peer seen at once.
 * Knows ranks and descriptors; does not know what a descriptor holds, nor what ranks agree on.
 *
 * One thread uses a mesh at a time, except mesh_abort and mesh_admit.
 */
#ifndef LAYERSHARD_MESH_H
#define LAYERSHARD_MESH_H

#include "arrivals.h"

#include <poll.h>
#include <stdatomic.h>
#include <sys/types.h>

/* A packet that nobody has asked for yet. */
struct mesh_packet {
	int here; /* 0: none */
	int fd;   /* its descriptor, or -1 */
	int lost; /* why it had one that this process could not have, as an errno; 0: it had none, or it is here */
	uint64_t tag;
};

struct mesh_peer {
	int fd;      /* -1: none (this rank itself) */
	int process; /* readable once its process has ended, whoever else holds its socket; -1: not to be had */
	pid_t pid;
	uint32_t incarnation;        /* as in arrivals.h */
	int gone;                    /* its end is closed, or its process has ended */
	int left_out;                /* of the swap under way */
	int owed;                    /* mesh_swap has not sent it its packet yet */
	struct mesh_packet inbox[2]; /* by the tag's parity: a peer may be one swap ahead */
};

struct mesh {
	const lshard_context *context;
	lshard_error *error;
	struct mesh_peer *peers; /* [size] */
	struct pollfd *polled;   /* [2 * size - 1] in use: wake, sockets, processes */
	int wake;                /* eventfd: written to by mesh_abort and mesh_admit */
	atomic_int aborted;
	uint64_t awaited;         /* the lowest tag of a swap that is not over */
	struct arrivals arrivals; /* where ranks can come back */
};

/*
 * Connect all ranks of the group; collective, uses the bootstrap once. Texts of failures go to @p error, now and later.
 * On failure nothing is left open.
 */
lshard_status mesh_open(struct mesh *mesh, const lshard_context *context, lshard_error *error, uint64_t deadline_ns);
/* The same for a rank that comes back, connected to nobody yet: all others seem gone. Local. */
lshard_status mesh_open_alone(struct mesh *mesh, const lshard_context *context, lshard_error *error);
void mesh_close(struct mesh *mesh);

/* A rank that came back has connected; its descriptors are the mesh's. Any thread, where ranks can come back. */
void mesh_admit(struct mesh *mesh, int32_t rank, struct arrival arrival);
/* Take in those admitted so far. mesh_wait does it too; for whoever looks at peers[] before it waits. */
void mesh_take_in(struct mesh *mesh);

/* Make every wait return ABORTED, now and later; the others see this rank as gone. Any thread. */
void mesh_abort(struct mesh *mesh);

/* Wake every peer that waits. Never blocks; a peer that cannot take it has something to read anyway. */
void mesh_nudge(struct mesh *mesh);

/* Has the peer's process ended? 0 also where the kernel does not say. Any thread. */
int mesh_process_ended(const struct mesh *mesh, int32_t rank);

/* Wait until a peer nudges, sends or goes. OK: look again at what was waited for, and at peers[].gone. */
lshard_status mesh_wait(struct mesh *mesh, uint64_t deadline_ns);

/*
 * Give @p fd (-1: none) to every peer and get theirs, in rank order, -1 for none and for this rank; the caller closes
 * them. @p tag: a number that all ranks know this round by, larger than any before, by 1 if this swap follows
 * another at once. Collective; fails when a peer is
 * gone, and with SYSTEM where this process has no room for a descriptor. On failure there are none to close.
 */
lshard_status mesh_swap(struct mesh *mesh, uint64_t tag, int fd, int *fds, uint64_t deadline_ns);
/* The same among the ranks of which @p alive [size] is not 0, the same on all of them. */
lshard_status mesh_swap_among(struct mesh *mesh, const uint8_t *alive, uint64_t tag, int fd, int *fds,
			      uint64_t deadline_ns);

#endif
