/* SPDX-License-Identifier: Apache-2.0
 *
 * pending_connections.h - connections that were accepted and have not said yet who they are. Whoever connects and then
 * says nothing (it was stopped, or is a stranger) keeps nobody else waiting. Knows sockets, users and whether somebody
 * speaks as ranks of this build do; does not know who is awaited.
 */
#ifndef LAYERSHARD_PENDING_CONNECTIONS_H
#define LAYERSHARD_PENDING_CONNECTIONS_H

#include "hello.h"

#include <poll.h>
#include <stdbool.h>
#include <sys/types.h>

struct lshard__connecting_peer {
	int fd;
	pid_t pid;
	size_t got; /* bytes of its hello that came so far */
	struct lshard__hello hello;
};

struct lshard__pending_connections {
	const lshard_context *context;
	struct lshard__greeting greeting;      /* what a hello begins with */
	struct lshard__connecting_peer *peers; /* [count], the one that came first in front; NULL: closed */
	size_t count;
	uint64_t strangers; /* that were sent away */
};

/* Room for every rank of the group and some strangers. False: there is no memory. */
bool lshard__pending_open(struct lshard__pending_connections *pending, const lshard_context *context,
			  struct lshard__greeting greeting);
/* Sends away who is still here, and logs how many strangers came after the first. */
void lshard__pending_close(struct lshard__pending_connections *pending);

/* How many entries lshard__pending_poll may write in a group of @p size. */
size_t lshard__pending_polls(int32_t size);
/* What to poll for: the listener, then who is here. Returns the number of entries. */
size_t lshard__pending_poll(const struct lshard__pending_connections *pending, int listener, struct pollfd *polled);

/*
 * A stranger is sent away: true for the first, which its finder logs. Whoever connects again and again must not fill
 * the program's log.
 */
bool lshard__pending_first_stranger(struct lshard__pending_connections *pending);

/*
 * After poll(): take what connecting peers sent and accept one more. Those of other users are strangers and are sent
 * away, and so are those that went away. SYSTEM, with errno: nobody can be accepted.
 */
lshard_status lshard__pending_hear(struct lshard__pending_connections *pending, const struct pollfd *polled);
/*
 * Accept one more, who does not become a pending connection. One of another user is logged and sent away: -1 its
 * descriptor. IN_PROGRESS: nobody waits. SYSTEM, with errno: nobody can be accepted.
 */
lshard_status lshard__pending_accept(struct lshard__pending_connections *pending, int listener,
				     struct lshard__connecting_peer *connecting);
/*
 * Take out one whose hello is whole, or begins with another greeting than a rank's of this build: nothing is known then
 * of what else it may say. Its descriptor is the caller's. False: there is none.
 */
bool lshard__pending_next(struct lshard__pending_connections *pending, struct lshard__connecting_peer *connecting);

#endif
