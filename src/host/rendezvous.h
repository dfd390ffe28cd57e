/* SPDX-License-Identifier: Apache-2.0
 *
 * rendezvous.h - what the files of the rendezvous share: rendezvous.c (its life), rendezvous_root.c (rank 0) and
 * rendezvous_member.c (the others). Everybody else knows outside.h.
 */
#ifndef LAYERSHARD_RENDEZVOUS_H
#define LAYERSHARD_RENDEZVOUS_H

#include "outside.h"
#include "pending_connections.h"
#include "rendezvous_place.h"

#include <poll.h>
#include <sys/types.h>
#include <unistd.h>

/* In front of every answer and contribution. On failure the text follows instead of the bytes. */
struct rendezvous_frame {
	uint32_t magic;
	int32_t status;
	uint64_t bytes;
};

struct rendezvous_member {
	int fd;      /* -1: not here */
	int process; /* readable once it has ended, see lshard__socket_peer_process; -1: not known */
	pid_t pid;
	int ended;  /* its process has, and it left nothing to be heard */
	int heard;  /* it said all we wait for now: its hello, its contribution */
	size_t got; /* bytes of its frame and contribution that came so far */
	struct rendezvous_frame frame;
};

struct lshard__rendezvous {
	const lshard_context *context;
	lshard_error error;
	lshard_status failure; /* of the last all-gather, if it failed */
	int listener;          /* rank 0, while ranks are missing */
	int spare;             /* as long: closed where descriptors run out, so that one can be accepted and told */
	int root;              /* others: the connection to rank 0 */
	int process;           /* others: of rank 0, as that of a member */
	pid_t root_pid;        /* others: as the system tells, 0 before */
	struct lshard__place place;
	struct rendezvous_member *members;          /* rank 0: [size]; its own entry is unused */
	struct lshard__pending_connections pending; /* rank 0, while ranks are missing */
	struct pollfd *polled;                      /* rank 0: [size] members, pending connections, their processes */
	char job[64];
};

static inline void rendezvous_close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static inline struct lshard__greeting rendezvous_greeting(void)
{
	return lshard__hello_greeting(sizeof(struct rendezvous_frame));
}

/* ---- rendezvous_root.c ---- */

/* Listen at the place of the job until all have come. */
lshard_status rendezvous_open_root(lshard__rendezvous *r, uint64_t deadline);
/* Whatever fails is told to all others in the same words. */
lshard_status rendezvous_root_allgather(lshard__rendezvous *r, const void *send, char *receive, size_t bytes,
					uint64_t deadline);
void rendezvous_stop_listening(lshard__rendezvous *r);

/* ---- rendezvous_member.c ---- */

/* Connect to rank 0, and stay. */
lshard_status rendezvous_open_member(lshard__rendezvous *r, uint64_t deadline);
lshard_status rendezvous_member_allgather(lshard__rendezvous *r, const void *send, void *receive, size_t bytes,
					  uint64_t deadline);

/*
 * The name is taken: introduce ourselves as rank 0 to whoever has it and be told that there is one already.
 * IN_PROGRESS: it went away meanwhile, try again.
 */
lshard_status rendezvous_challenge(lshard__rendezvous *r, uint64_t deadline);
/* Does somebody sit there? @p error: what it was tried with; @p text: what to say where nobody does. */
lshard_status rendezvous_blocked(lshard__rendezvous *r, int error, lshard_status otherwise, const char *text);

#endif
