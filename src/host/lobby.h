/* SPDX-License-Identifier: Apache-2.0
 *
 * lobby.h - connections that were accepted and have not said yet who they are. Whoever connects and then says nothing
 * (it was stopped, or is a stranger) keeps nobody else waiting. Knows sockets and users; does not know what a hello
 * says.
 */
#ifndef LAYERSHARD_LOBBY_H
#define LAYERSHARD_LOBBY_H

#include <layershard/transport.h>

#include <poll.h>
#include <stdbool.h>
#include <sys/types.h>

#define LSHARD__HELLO_BYTES 16u

struct lshard__newcomer {
	int fd;
	pid_t pid;
	size_t got; /* bytes of its hello that came so far */
	unsigned char hello[LSHARD__HELLO_BYTES];
};

struct lshard__lobby {
	const lshard_context *context;
	struct lshard__newcomer *newcomers; /* [count], the one that came first in front; NULL: closed */
	size_t count;
};

/* Room for every rank of the group and some strangers. False: there is no memory. */
bool lshard__lobby_open(struct lshard__lobby *lobby, const lshard_context *context);
/* Sends away who is still here. */
void lshard__lobby_close(struct lshard__lobby *lobby);

/* How many entries lshard__lobby_poll may write in a group of @p size. */
size_t lshard__lobby_polls(int32_t size);
/* What to poll for: the listener, then who is here. Returns the number of entries. */
size_t lshard__lobby_poll(const struct lshard__lobby *lobby, int listener, struct pollfd *polled);

/*
 * After poll(): take what newcomers sent and accept one more. Those of other users, and those that went away, are sent
 * away. SYSTEM, with errno: nobody can be accepted.
 */
lshard_status lshard__lobby_hear(struct lshard__lobby *lobby, const struct pollfd *polled);
/* Take out one whose hello is whole; its descriptor is the caller's. False: there is none. */
bool lshard__lobby_next(struct lshard__lobby *lobby, struct lshard__newcomer *newcomer);

#endif
