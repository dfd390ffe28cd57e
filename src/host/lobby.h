/* SPDX-License-Identifier: Apache-2.0
 *
 * lobby.h - connections that were accepted and have not said yet who they are. Whoever connects and then says nothing
 * (it was stopped, or is a stranger) keeps nobody else waiting. Knows sockets, users and whether somebody
 * speaks as ranks of this build do; does not know who is awaited.
 */
#ifndef LAYERSHARD_LOBBY_H
#define LAYERSHARD_LOBBY_H

#include "hello.h"

#include <poll.h>
#include <stdbool.h>
#include <sys/types.h>

struct lshard__newcomer {
	int fd;
	pid_t pid;
	size_t got; /* bytes of its hello that came so far */
	struct lshard__hello hello;
};

struct lshard__lobby {
	const lshard_context *context;
	struct lshard__greeting greeting;   /* what a hello begins with */
	struct lshard__newcomer *newcomers; /* [count], the one that came first in front; NULL: closed */
	size_t count;
	uint64_t strangers; /* that were sent away */
};

/* Room for every rank of the group and some strangers. False: there is no memory. */
bool lshard__lobby_open(struct lshard__lobby *lobby, const lshard_context *context, struct lshard__greeting greeting);
/* Sends away who is still here, and logs how many strangers came after the first. */
void lshard__lobby_close(struct lshard__lobby *lobby);

/* How many entries lshard__lobby_poll may write in a group of @p size. */
size_t lshard__lobby_polls(int32_t size);
/* What to poll for: the listener, then who is here. Returns the number of entries. */
size_t lshard__lobby_poll(const struct lshard__lobby *lobby, int listener, struct pollfd *polled);

/*
 * A stranger is sent away: true for the first, which its finder logs. Whoever connects again and again must not fill
 * the program's log.
 */
bool lshard__lobby_first_stranger(struct lshard__lobby *lobby);

/*
 * After poll(): take what newcomers sent and accept one more. Those of other users are strangers and are sent
 * away, and so are those that went away. SYSTEM, with errno: nobody can be accepted.
 */
lshard_status lshard__lobby_hear(struct lshard__lobby *lobby, const struct pollfd *polled);
/*
 * Accept one more, who does not come into the lobby. One of another user is logged and sent away: -1 its descriptor.
 * IN_PROGRESS: nobody waits. SYSTEM, with errno: nobody can be accepted.
 */
lshard_status lshard__lobby_accept(struct lshard__lobby *lobby, int listener, struct lshard__newcomer *newcomer);
/*
 * Take out one whose hello is whole, or begins with another greeting than a rank's of this build: nothing is known then
 * of what else it may say. Its descriptor is the caller's. False: there is none.
 */
bool lshard__lobby_next(struct lshard__lobby *lobby, struct lshard__newcomer *newcomer);

#endif
