/* SPDX-License-Identifier: Apache-2.0
 *
 * lobby.c - see lobby.h. Every rank connects once, so a full lobby is full of strangers: the first must go of whichever
 * process has come most often. A rank that is slow to say its hello stays, whoever crowds in beside it.
 */
#include "lobby.h"
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

bool lshard__lobby_open(struct lshard__lobby *lobby, const lshard_context *context, struct lshard__greeting greeting)
{
	lobby->context = context;
	lobby->greeting = greeting;
	lobby->count = 0;
	lobby->strangers = 0;
	lobby->newcomers = context->allocate(context, room_for(context->size) * sizeof lobby->newcomers[0]);
	return lobby->newcomers != NULL;
}

static void log_more(const struct lshard__lobby *lobby)
{
	const lshard_context *context = lobby->context;

	if (lobby->strangers > 1)
		context->log(context, LSHARD_LOG_WARN, "rank %d: %" PRIu64 " more that connected were sent away",
			     (int)context->rank, lobby->strangers - 1);
}

void lshard__lobby_close(struct lshard__lobby *lobby)
{
	if (!lobby->newcomers)
		return;
	log_more(lobby);
	for (size_t i = 0; i < lobby->count; i++)
		close(lobby->newcomers[i].fd);
	lobby->context->release(lobby->context, lobby->newcomers);
	lobby->newcomers = NULL;
	lobby->count = 0;
}

size_t lshard__lobby_polls(int32_t size)
{
	return room_for(size) + 1;
}

size_t lshard__lobby_poll(const struct lshard__lobby *lobby, int listener, struct pollfd *polled)
{
	polled[0] = (struct pollfd){.fd = listener, .events = POLLIN};
	for (size_t i = 0; i < lobby->count; i++)
		polled[i + 1] = (struct pollfd){.fd = lobby->newcomers[i].fd, .events = POLLIN};
	return lobby->count + 1;
}

static void take_out(struct lshard__lobby *lobby, size_t index)
{
	struct lshard__newcomer *newcomer = &lobby->newcomers[index];

	lobby->count--;
	memmove(newcomer, newcomer + 1, (lobby->count - index) * sizeof *newcomer);
}

/* False: it has gone. */
static bool hear_one(struct lshard__newcomer *newcomer)
{
	size_t missing = sizeof newcomer->hello - newcomer->got;
	ssize_t got = recv(newcomer->fd, (char *)&newcomer->hello + newcomer->got, missing, 0);

	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return true;
	if (got > 0)
		newcomer->got += (size_t)got;
	return got > 0;
}

/* The first newcomer of the process that has most of them. */
static size_t find_crowding(const struct lshard__lobby *lobby)
{
	size_t found = 0;
	size_t most = 0;

	for (size_t i = 0; i < lobby->count && most < lobby->count - i; i++) {
		size_t same = 0;

		for (size_t other = i; other < lobby->count; other++)
			same += lobby->newcomers[other].pid == lobby->newcomers[i].pid;
		if (same > most) {
			most = same;
			found = i;
		}
	}
	return found;
}

bool lshard__lobby_first_stranger(struct lshard__lobby *lobby)
{
	return lobby->strangers++ == 0;
}

static void send_away(struct lshard__lobby *lobby, const struct lshard__newcomer *newcomer, uid_t uid)
{
	const lshard_context *context = lobby->context;

	if (lshard__lobby_first_stranger(lobby))
		context->log(context, LSHARD_LOG_WARN,
			     "rank %d: process %d of user %lu has connected and is sent away: ranks are of user %lu",
			     (int)context->rank, (int)newcomer->pid, (unsigned long)uid, (unsigned long)geteuid());
	close(newcomer->fd);
}

lshard_status lshard__lobby_accept(struct lshard__lobby *lobby, int listener, struct lshard__newcomer *newcomer)
{
	uid_t uid = 0;

	*newcomer = (struct lshard__newcomer){.fd = lshard__socket_accept(listener)};
	if (newcomer->fd < 0)
		return errno == EAGAIN || errno == ECONNABORTED || errno == EINTR ? LSHARD_IN_PROGRESS
										  : LSHARD_ERR_SYSTEM;
	if (lshard__socket_peer(newcomer->fd, &newcomer->pid, &uid) || uid != geteuid()) {
		send_away(lobby, newcomer, uid);
		newcomer->fd = -1;
	}
	return LSHARD_OK;
}

static lshard_status accept_one(struct lshard__lobby *lobby, int listener)
{
	struct lshard__newcomer newcomer;
	const lshard_status status = lshard__lobby_accept(lobby, listener, &newcomer);

	if (newcomer.fd < 0)
		return status;
	if (lobby->count == room_for(lobby->context->size)) {
		const size_t crowding = find_crowding(lobby);

		close(lobby->newcomers[crowding].fd);
		take_out(lobby, crowding);
	}
	lobby->newcomers[lobby->count++] = newcomer;
	return LSHARD_OK;
}

lshard_status lshard__lobby_hear(struct lshard__lobby *lobby, const struct pollfd *polled)
{
	for (size_t i = lobby->count; i-- > 0;) {
		if (!polled[i + 1].revents || hear_one(&lobby->newcomers[i]))
			continue;
		close(lobby->newcomers[i].fd);
		take_out(lobby, i);
	}
	return polled[0].revents & POLLIN ? accept_one(lobby, polled[0].fd) : LSHARD_OK;
}

static bool is_heard(const struct lshard__lobby *lobby, const struct lshard__newcomer *newcomer)
{
	return newcomer->got == sizeof newcomer->hello ||
	       (newcomer->got >= sizeof lobby->greeting &&
		memcmp(&newcomer->hello.greeting, &lobby->greeting, sizeof lobby->greeting) != 0);
}

bool lshard__lobby_next(struct lshard__lobby *lobby, struct lshard__newcomer *newcomer)
{
	for (size_t i = 0; i < lobby->count; i++) {
		if (!is_heard(lobby, &lobby->newcomers[i]))
			continue;
		*newcomer = lobby->newcomers[i];
		take_out(lobby, i);
		return true;
	}
	return false;
}
