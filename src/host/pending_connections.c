/* SPDX-License-Identifier: Apache-2.0
 *
 * pending_connections.c - see pending_connections.h. Every rank connects once, so a full table is full of strangers:
 * the first must go of whichever process has come most often. A rank that is slow to say its hello stays, whoever
 * crowds in beside it.
 */
#include "pending_connections.h"
#include "sockets.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define STRANGERS 16u

static size_t room_for(int32_t size)
{
	return (size_t)size + STRANGERS;
}

bool lshard__pending_open(struct lshard__pending_connections *pending, const lshard_context *context,
			  struct lshard__greeting greeting)
{
	pending->context = context;
	pending->greeting = greeting;
	pending->count = 0;
	pending->strangers = 0;
	pending->peers = context->allocate(context, room_for(context->size) * sizeof pending->peers[0]);
	return pending->peers != NULL;
}

static void log_more(const struct lshard__pending_connections *pending)
{
	const lshard_context *context = pending->context;

	if (pending->strangers > 1)
		context->log(context, LSHARD_LOG_WARN, "rank %d: %" PRIu64 " more that connected were sent away",
			     (int)context->rank, pending->strangers - 1);
}

void lshard__pending_close(struct lshard__pending_connections *pending)
{
	if (!pending->peers)
		return;
	log_more(pending);
	for (size_t i = 0; i < pending->count; i++)
		close(pending->peers[i].fd);
	pending->context->release(pending->context, pending->peers);
	pending->peers = NULL;
	pending->count = 0;
}

size_t lshard__pending_polls(int32_t size)
{
	return room_for(size) + 1;
}

size_t lshard__pending_poll(const struct lshard__pending_connections *pending, int listener, struct pollfd *polled)
{
	polled[0] = (struct pollfd){.fd = listener, .events = POLLIN};
	for (size_t i = 0; i < pending->count; i++)
		polled[i + 1] = (struct pollfd){.fd = pending->peers[i].fd, .events = POLLIN};
	return pending->count + 1;
}

static void take_out(struct lshard__pending_connections *pending, size_t index)
{
	struct lshard__connecting_peer *connecting = &pending->peers[index];

	pending->count--;
	memmove(connecting, connecting + 1, (pending->count - index) * sizeof *connecting);
}

/* False: it has gone. */
static bool hear_one(struct lshard__connecting_peer *connecting)
{
	size_t missing = sizeof connecting->hello - connecting->got;
	ssize_t got = recv(connecting->fd, (char *)&connecting->hello + connecting->got, missing, 0);

	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return true;
	if (got > 0)
		connecting->got += (size_t)got;
	return got > 0;
}

/* The first connecting peer of the process that has most of them. */
static size_t find_crowding(const struct lshard__pending_connections *pending)
{
	size_t found = 0;
	size_t most = 0;

	for (size_t i = 0; i < pending->count && most < pending->count - i; i++) {
		size_t same = 0;

		for (size_t other = i; other < pending->count; other++)
			same += pending->peers[other].pid == pending->peers[i].pid;
		if (same > most) {
			most = same;
			found = i;
		}
	}
	return found;
}

bool lshard__pending_first_stranger(struct lshard__pending_connections *pending)
{
	return pending->strangers++ == 0;
}

static void send_away(struct lshard__pending_connections *pending, const struct lshard__connecting_peer *connecting,
		      uid_t uid)
{
	const lshard_context *context = pending->context;

	if (lshard__pending_first_stranger(pending))
		context->log(context, LSHARD_LOG_WARN,
			     "rank %d: process %d of user %lu has connected and is sent away: ranks are of user %lu",
			     (int)context->rank, (int)connecting->pid, (unsigned long)uid, (unsigned long)geteuid());
	close(connecting->fd);
}

lshard_status lshard__pending_accept(struct lshard__pending_connections *pending, int listener,
				     struct lshard__connecting_peer *connecting)
{
	uid_t uid = 0;

	*connecting = (struct lshard__connecting_peer){.fd = lshard__socket_accept(listener)};
	if (connecting->fd < 0)
		return errno == EAGAIN || errno == ECONNABORTED || errno == EINTR ? LSHARD_IN_PROGRESS
										  : LSHARD_ERR_SYSTEM;
	if (lshard__socket_peer(connecting->fd, &connecting->pid, &uid) || uid != geteuid()) {
		send_away(pending, connecting, uid);
		connecting->fd = -1;
	}
	return LSHARD_OK;
}

static lshard_status accept_one(struct lshard__pending_connections *pending, int listener)
{
	struct lshard__connecting_peer connecting;
	const lshard_status status = lshard__pending_accept(pending, listener, &connecting);

	if (connecting.fd < 0)
		return status;
	if (pending->count == room_for(pending->context->size)) {
		const size_t crowding = find_crowding(pending);

		close(pending->peers[crowding].fd);
		take_out(pending, crowding);
	}
	pending->peers[pending->count++] = connecting;
	return LSHARD_OK;
}

lshard_status lshard__pending_hear(struct lshard__pending_connections *pending, const struct pollfd *polled)
{
	for (size_t i = pending->count; i-- > 0;) {
		if (!polled[i + 1].revents || hear_one(&pending->peers[i]))
			continue;
		close(pending->peers[i].fd);
		take_out(pending, i);
	}
	return polled[0].revents & POLLIN ? accept_one(pending, polled[0].fd) : LSHARD_OK;
}

static bool is_heard(const struct lshard__pending_connections *pending,
		     const struct lshard__connecting_peer *connecting)
{
	return connecting->got == sizeof connecting->hello ||
	       (connecting->got >= sizeof pending->greeting &&
		memcmp(&connecting->hello.greeting, &pending->greeting, sizeof pending->greeting) != 0);
}

bool lshard__pending_next(struct lshard__pending_connections *pending, struct lshard__connecting_peer *connecting)
{
	for (size_t i = 0; i < pending->count; i++) {
		if (!is_heard(pending, &pending->peers[i]))
			continue;
		*connecting = pending->peers[i];
		take_out(pending, i);
		return true;
	}
	return false;
}
