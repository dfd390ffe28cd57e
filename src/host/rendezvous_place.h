/* SPDX-License-Identifier: Apache-2.0
 *
 * rendezvous_place.h - where the ranks of a job find each other: an abstract name, or a socket in a directory that only
 * their user can enter (LAYERSHARD_RENDEZVOUS_DIR). Knows names, files and users; does not know what is said there.
 */
#ifndef LAYERSHARD_RENDEZVOUS_PLACE_H
#define LAYERSHARD_RENDEZVOUS_PLACE_H

#include "sockets.h"

#include <layershard/transport.h>

#include <sys/types.h>

struct lshard__place {
	char name[108]; /* for sockets.h: abstract, or the path of the socket */
	char job[64];   /* for messages */
	char path[256]; /* LAYERSHARD_RENDEZVOUS_DIR, for messages */
	int directory;  /* -1: the name is abstract */
	dev_t device;   /* of the socket that place_listen made in the directory */
	ino_t inode;    /* 0: none */
	int type;       /* of the sockets there: SOCK_STREAM, unless changed before it is used */
};

/*
 * Where the ranks of @p job find each other. INVALID: LAYERSHARD_RENDEZVOUS_DIR is no directory that only this user can
 * enter. SYSTEM: a limit keeps this process from opening it. NOT_SUPPORTED: it is not set, and this process cannot tell
 * its own user from others. After a failure there is nothing to close.
 */
lshard_status lshard__place_open(struct lshard__place *place, const char *job, lshard_error *error);
void lshard__place_close(struct lshard__place *place);

/*
 * Listen there; what a killed rank left is removed. Returns the descriptor, or -1 and errno: EADDRINUSE: somebody has
 * the place, EEXIST: what lies there is no socket, EWOULDBLOCK: the directory's lock was held until the deadline.
 */
int lshard__place_listen(struct lshard__place *place, uint64_t deadline_ns);
/*
 * Who listens there; not while one who takes a dead rank's place has removed its file and does not listen yet. SOMEBODY
 * where the directory's lock is held until the deadline.
 */
enum lshard__listening lshard__place_look(const struct lshard__place *place, uint64_t deadline_ns);
/* Why it failed, by its errno @p error: which file or lock is in the way, or which limit. */
void lshard__place_reason(const struct lshard__place *place, int error, char *text, size_t bytes);
/* Nobody can come any more; before @p listener is closed. */
void lshard__place_leave(struct lshard__place *place);

/* For the text of a deadline that passed: what all ranks must have alike to find each other. Static or in @p place. */
const char *lshard__place_hint(const struct lshard__place *place, char *text, size_t bytes);

/*
 * After @p rank has tried for so long to listen or to connect, the last time with @p tried (errno): does somebody sit
 * there, so that no rank can? SYSTEM if it cannot be one of the ranks, TIMEOUT if it may be one that hangs, with
 * who it is as far as the system tells. OK: nobody does.
 */
lshard_status lshard__place_blocked(const struct lshard__place *place, int tried, int32_t rank, uint32_t waited_ms,
				    lshard_error *error);
/* The process @p other of another user, @p user, listens there: the text for it. */
lshard_status lshard__place_foreign(const struct lshard__place *place, int32_t rank, pid_t other, uid_t user,
				    lshard_error *error);
/* LSHARD__LEFT_BEHIND (sockets.h) at an abstract name, by the process @p root: the text for it. */
lshard_status lshard__place_left_behind(const struct lshard__place *place, int32_t rank, pid_t root,
					lshard_error *error);

#endif
