/* SPDX-License-Identifier: Apache-2.0
 *
 * socket_circle.c - see socket_circle.h. Each collective is bytes sent to and got from the others, in any order, until
 * all are through; pairs of ranks make the same collectives in the same order, so nothing has to say whose they are.
 */
#include "socket_circle.h"
#include "patience.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* ---- Collectives ----------------------------------------------------------------------------------------------- */

void socket_circle_die(struct socket_circle *circle)
{
	team_dies(circle->member);
	raise(SIGKILL);
}

static void maybe_die(struct socket_circle *circle)
{
	if (circle->die_at >= 0 && circle->die_at-- == 0)
		socket_circle_die(circle);
}

static lshard_status begin(struct socket_circle *circle, const void *send, void *receive, size_t count, int32_t root,
			   void **work)
{
	maybe_die(circle);
	circle->send = send;
	circle->receive = receive;
	circle->count = count;
	circle->root = root;
	memset(circle->sent, 0, sizeof circle->sent);
	memset(circle->got, 0, sizeof circle->got);
	if (root < 0)
		memcpy((char *)receive + (size_t)circle->member->rank * count, send, count);
	*work = circle;
	return LSHARD_OK;
}

static lshard_status circle_broadcast(void *user, void *bytes, size_t count, int32_t root, void **work, char *error,
				      size_t error_bytes)
{
	(void)error;
	(void)error_bytes;
	return begin(user, bytes, bytes, count, root, work);
}

static lshard_status circle_allgather(void *user, const void *send, void *receive, size_t count, void **work,
				      char *error, size_t error_bytes)
{
	(void)error;
	(void)error_bytes;
	return begin(user, send, receive, count, -1, work);
}

static size_t due_to(const struct socket_circle *circle)
{
	return circle->root < 0 || circle->root == circle->member->rank ? circle->count : 0;
}

static size_t due_from(const struct socket_circle *circle, int32_t peer)
{
	return circle->root < 0 || circle->root == peer ? circle->count : 0;
}

/* One step with one peer; false when it is gone. */
static bool move(struct socket_circle *circle, int32_t peer)
{
	const int end = circle->ends[peer];
	char *to = circle->receive + (circle->root < 0 ? (size_t)peer * circle->count : 0);
	ssize_t moved;

	if (circle->sent[peer] < due_to(circle)) {
		moved = send(end, circle->send + circle->sent[peer], circle->count - circle->sent[peer],
			     MSG_DONTWAIT | MSG_NOSIGNAL);
		if (moved < 0 && errno != EAGAIN && errno != EINTR)
			return false;
		circle->sent[peer] += moved > 0 ? (size_t)moved : 0;
	}
	if (circle->got[peer] < due_from(circle, peer)) {
		moved = recv(end, to + circle->got[peer], circle->count - circle->got[peer], MSG_DONTWAIT);
		if (moved == 0 || (moved < 0 && errno != EAGAIN && errno != EINTR))
			return false;
		circle->got[peer] += moved > 0 ? (size_t)moved : 0;
	}
	return true;
}

/* What is still to be waited for. */
static nfds_t list(const struct socket_circle *circle, struct pollfd *polls)
{
	nfds_t count = 0;

	for (int32_t peer = 0; peer < CIRCLE_RANKS; peer++) {
		const bool out = circle->sent[peer] < due_to(circle), in = circle->got[peer] < due_from(circle, peer);

		if (peer != circle->member->rank && (out || in))
			polls[count++] = (struct pollfd){circle->ends[peer],
							 (short)((out ? POLLOUT : 0) | (in ? POLLIN : 0)), 0};
	}
	return count;
}

/*
 * The last rank is the one that is killed; others stop because of that. The kernel closes its sockets one after the
 * other, so another may have stopped already while the one to this rank is open still.
 */
static int32_t who_went_first(const struct socket_circle *circle, int32_t seen)
{
	const int32_t last = CIRCLE_RANKS - 1;
	struct pollfd closed = {circle->ends[last], POLLRDHUP, 0};

	return circle->member->rank != last && poll(&closed, 1, (int)patience(1000)) > 0 ? last : seen;
}

static lshard_status circle_finish(void *user, void *work, uint32_t timeout_ms, char *error, size_t error_bytes)
{
	struct socket_circle *circle = user;
	struct pollfd polls[CIRCLE_RANKS];
	bool again = true;

	(void)work;
	maybe_die(circle);
	for (;;) {
		nfds_t count;

		for (int32_t peer = 0; peer < CIRCLE_RANKS; peer++)
			if (peer != circle->member->rank && !move(circle, peer)) {
				snprintf(error, error_bytes, "rank %d is gone", (int)who_went_first(circle, peer));
				return LSHARD_ERR_PEER_FAILED;
			}
		count = list(circle, polls);
		if (count == 0)
			return LSHARD_OK;
		if (!again)
			return LSHARD_IN_PROGRESS;
		again = poll(polls, count, (int)timeout_ms) > 0;
	}
}

static void circle_stop(void *user)
{
	const struct socket_circle *circle = user;

	for (int32_t peer = 0; peer < CIRCLE_RANKS; peer++)
		if (peer != circle->member->rank)
			shutdown(circle->ends[peer], SHUT_RDWR);
}

static int gather(void *user, const void *send, void *receive, size_t bytes)
{
	struct socket_circle *circle = user;
	lshard_status status = LSHARD_IN_PROGRESS;
	char text[64];
	void *work;

	begin(circle, send, receive, bytes, -1, &work);
	while (status == LSHARD_IN_PROGRESS)
		status = circle_finish(circle, work, 1000, text, sizeof text);
	return status != LSHARD_OK;
}

lshard_bootstrap socket_circle_bootstrap(struct socket_circle *circle)
{
	return (lshard_bootstrap){sizeof(lshard_bootstrap), gather, circle};
}

/* ---- Joining --------------------------------------------------------------------------------------------------- */

/* A name that goes with its processes. */
static socklen_t name_of(const struct member *member, int32_t rank, struct sockaddr_un *address)
{
	*address = (struct sockaddr_un){.sun_family = AF_UNIX};
	snprintf(address->sun_path + 1, sizeof address->sun_path - 1, "%s-circle-%d", member->job, (int)rank);
	return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(address->sun_path + 1));
}

/* To those before this rank. */
static bool call_peer(struct socket_circle *circle, int32_t peer)
{
	const int32_t mine = circle->member->rank;
	const int end = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct sockaddr_un address;
	const socklen_t length = name_of(circle->member, peer, &address);

	circle->ends[peer] = end;
	return end >= 0 && connect(end, (struct sockaddr *)&address, length) == 0 &&
	       send(end, &mine, sizeof mine, MSG_NOSIGNAL) == sizeof mine;
}

static bool answer_peer(struct socket_circle *circle, int listener)
{
	const int end = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	int32_t peer = -1;

	if (end < 0 || recv(end, &peer, sizeof peer, MSG_WAITALL) != sizeof peer)
		return false;
	circle->ends[peer] = end;
	return true;
}

void socket_circle_open(struct socket_circle *circle, const struct member *member)
{
	circle->member = member;
	circle->die_at = -1;
	circle->callbacks = (lshard_callbacks){sizeof circle->callbacks,
					       circle_broadcast,
					       circle_allgather,
					       circle_finish,
					       circle_stop,
					       circle,
					       NULL,
					       1};
}

bool socket_circle_join(struct socket_circle *circle, const struct member *member)
{
	const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct sockaddr_un address;
	const socklen_t length = name_of(member, member->rank, &address);
	bool joined = listener >= 0 && bind(listener, (struct sockaddr *)&address, length) == 0 &&
		      listen(listener, CIRCLE_RANKS) == 0;

	*circle = (struct socket_circle){.member = member, .die_at = -1};
	joined = team_barrier(member) && joined;
	for (int32_t peer = 0; peer < member->rank && joined; peer++)
		joined = call_peer(circle, peer);
	for (int32_t peer = member->rank + 1; peer < CIRCLE_RANKS && joined; peer++)
		joined = answer_peer(circle, listener);
	close(listener);
	socket_circle_open(circle, member);
	return joined;
}

void socket_circle_leave(struct socket_circle *circle)
{
	for (int32_t peer = 0; peer < CIRCLE_RANKS; peer++)
		if (circle->member && peer != circle->member->rank)
			close(circle->ends[peer]);
}
