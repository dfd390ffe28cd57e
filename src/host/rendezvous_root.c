/* SPDX-License-Identifier: Apache-2.0
 *
 * rendezvous_root.c - rank 0 of a rendezvous: it listens, hears who the others are, and gathers what they give.
 * Knows who is missing; whatever goes wrong it tells all others.
 */
#include "rendezvous.h"
#include "limit_reason.h"
#include "sockets.h"
#include "verdict.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

/* Those that were not heard. */
static struct lshard__ranks find_missing(const lshard__rendezvous *r)
{
	struct lshard__ranks missing = {0};

	for (int32_t rank = 1; rank < r->context->size; rank++)
		if (!r->members[rank].heard)
			lshard__ranks_add(&missing, rank);
	return missing;
}

static void tell(int fd, lshard_status status, const void *text, uint64_t bytes)
{
	struct rendezvous_frame frame = {LSHARD__HELLO_MAGIC, status, bytes};
	struct iovec parts[2] = {{&frame, sizeof frame}, {(void *)(uintptr_t)text, (size_t)bytes}};
	struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};

	/* Best effort: who cannot take it sees the connection close. */
	(void)sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Those who have connected and wait to be accepted; from now on nobody can connect. */
static void tell_queued(lshard__rendezvous *r, lshard_status status)
{
	struct lshard__connecting_peer connecting;

	if (r->listener < 0)
		return;
	(void)shutdown(r->listener, SHUT_RDWR);
	rendezvous_close_fd(&r->spare);
	while (lshard__pending_accept(&r->pending, r->listener, &connecting) == LSHARD_OK) {
		if (connecting.fd >= 0)
			tell(connecting.fd, status, r->error.text, strlen(r->error.text));
		rendezvous_close_fd(&connecting.fd);
	}
}

/* Tell everybody who is here why it failed. */
static lshard_status tell_all(lshard__rendezvous *r, lshard_status status)
{
	tell_queued(r, status);
	for (int32_t rank = 1; rank < r->context->size; rank++)
		if (r->members[rank].fd >= 0)
			tell(r->members[rank].fd, status, r->error.text, strlen(r->error.text));
	for (size_t i = 0; i < r->pending.count; i++)
		tell(r->pending.peers[i].fd, status, r->error.text, strlen(r->error.text));
	return status;
}

/* ---- Who connects ---- */

/* Is it one of ours? The text is for the connecting peer as well. */
static lshard_status check_hello(lshard__rendezvous *r, const struct lshard__hello *hello, pid_t pid)
{
	int32_t size = r->context->size;
	pid_t other;

	if (hello->size != size)
		return lshard_fail(
			&r->error, LSHARD_ERR_MISMATCH,
			"job '%s': rank 0 (process %d) was started for %d ranks, rank %d (process %d) for %d", r->job,
			(int)getpid(), (int)size, (int)hello->rank, (int)pid, (int)hello->size);
	if (hello->rank < 0 || hello->rank >= size)
		return lshard_fail(&r->error, LSHARD_ERR_MISMATCH, "job '%s': process %d says it is rank %d of %d",
				   r->job, (int)pid, (int)hello->rank, (int)size);
	if (hello->rank != 0 && r->members[hello->rank].fd < 0)
		return LSHARD_OK;
	other = hello->rank ? r->members[hello->rank].pid : getpid();
	return lshard_fail(&r->error, LSHARD_ERR_MISMATCH,
			   "job '%s': process %d and process %d both say they are rank %d", r->job, (int)other,
			   (int)pid, (int)hello->rank);
}

/* Another build's hello may be of another form: nothing is read of it but its greeting. */
static lshard_status check_greeting(lshard__rendezvous *r, const struct lshard__connecting_peer *connecting)
{
	char whom[120];

	snprintf(whom, sizeof whom, "process %d, which has come to job '%s',", (int)connecting->pid, r->job);
	return lshard__greeting_compare(&r->pending.greeting, &connecting->hello.greeting, "rank 0", whom, &r->error);
}

/* Whatever else connects is no rank, and ends nobody's rendezvous. */
static int is_stranger(lshard__rendezvous *r, const struct lshard__connecting_peer *connecting)
{
	const lshard_context *context = r->context;

	if (connecting->hello.greeting.magic == r->pending.greeting.magic)
		return 0;
	if (lshard__pending_first_stranger(&r->pending))
		context->log(
			context, LSHARD_LOG_WARN,
			"rank 0: process %d has connected to job '%s', does not speak as a rank does, and is sent away",
			(int)connecting->pid, r->job);
	return 1;
}

static lshard_status cannot(lshard__rendezvous *r, const char *what, int error)
{
	return lshard_fail(&r->error, LSHARD_ERR_SYSTEM, "rank 0 (process %d) of job '%s' cannot %s: %s", (int)getpid(),
			   r->job, what, lshard__reason(error, 0).text);
}

/* It is a member from here on, and told with the others where rank 0 fails. */
static lshard_status take_in(lshard__rendezvous *r, const struct lshard__connecting_peer *connecting)
{
	struct rendezvous_member *member = &r->members[connecting->hello.rank];

	*member = (struct rendezvous_member){.fd = connecting->fd,
					     .process = lshard__socket_peer_process(connecting->fd),
					     .pid = connecting->pid,
					     .heard = 1};
	if (member->process < 0 && (errno == EMFILE || errno == ENFILE))
		return cannot(r, "watch the other ranks", errno);
	return LSHARD_OK;
}

static lshard_status hear_peer(lshard__rendezvous *r, const struct lshard__connecting_peer *connecting)
{
	lshard_status status;

	if (is_stranger(r, connecting)) {
		close(connecting->fd);
		return LSHARD_OK;
	}
	status = check_greeting(r, connecting);
	if (status == LSHARD_OK)
		status = check_hello(r, &connecting->hello, connecting->pid);
	if (status == LSHARD_OK)
		return take_in(r, connecting);
	tell(connecting->fd, status, r->error.text, strlen(r->error.text));
	close(connecting->fd);
	return status;
}

/* Take in the pending connections that have said who they are. */
static lshard_status welcome(lshard__rendezvous *r)
{
	struct lshard__connecting_peer connecting;
	lshard_status status = LSHARD_OK;

	if (lshard__pending_hear(&r->pending, r->polled + r->context->size) < 0)
		return cannot(r, "accept the other ranks", errno);
	while (status == LSHARD_OK && lshard__pending_next(&r->pending, &connecting))
		status = hear_peer(r, &connecting);
	return status;
}

/* ---- Until all have come ---- */

static lshard_status left_early(lshard__rendezvous *r, int32_t rank)
{
	return lshard_fail(&r->error, LSHARD_ERR_PEER_FAILED, "rank %d of job '%s' (process %d) is gone", (int)rank,
			   r->job, (int)r->members[rank].pid);
}

/*
 * Rank @p rank was the first whose time was up: the group will not come about, and it is the missing ones that matter.
 * Where some have not even connected, what they may have differently is said as well.
 */
static lshard_status waited(lshard__rendezvous *r, int32_t rank, uint32_t waited_ms)
{
	struct lshard__ranks missing = find_missing(r);
	char hint[200];

	return lshard_fail(&r->error, LSHARD_ERR_TIMEOUT, "rank %d waited %u ms for %s of job '%s'%s%s", (int)rank,
			   (unsigned)waited_ms, lshard__ranks_text(&missing), r->job, r->listener >= 0 ? ", " : "",
			   r->listener >= 0 ? lshard__place_hint(&r->place, hint, sizeof hint) : "");
}

static size_t add_processes(const lshard__rendezvous *r, size_t count)
{
	for (int32_t rank = 1; rank < r->context->size; rank++)
		if (r->members[rank].process >= 0)
			r->polled[count++] = (struct pollfd){.fd = r->members[rank].process, .events = POLLIN};
	return count;
}

/* @p count: where they were added; 0: nothing was seen. */
static void note_ended(lshard__rendezvous *r, size_t count)
{
	for (int32_t rank = 1; rank < r->context->size && count; rank++)
		if (r->members[rank].process >= 0)
			r->members[rank].ended = r->polled[count++].revents && !r->polled[rank].revents;
}

/* Wait until one of those who are here, or somebody new, has something to say. */
static lshard_status await_members(lshard__rendezvous *r, uint64_t deadline)
{
	int32_t size = r->context->size;
	size_t count;
	int ready;

	for (int32_t rank = 0; rank < size; rank++)
		r->polled[rank] = (struct pollfd){.fd = r->members[rank].fd, .events = POLLIN};
	count = (size_t)size + lshard__pending_poll(&r->pending, r->listener, r->polled + size);
	ready = poll(r->polled, add_processes(r, count), lshard__left_ms(deadline));
	note_ended(r, ready > 0 ? count : 0);
	if (ready > 0 || (ready < 0 && errno == EINTR))
		return LSHARD_OK;
	if (ready < 0) /* EINVAL: more to wait for than the process may have open */
		return cannot(r, "wait for the other ranks", errno == EINVAL ? EMFILE : errno);
	return waited(r, 0, r->context->timeout_ms);
}

static int all_heard(const lshard__rendezvous *r)
{
	for (int32_t rank = 1; rank < r->context->size; rank++)
		if (!r->members[rank].heard)
			return 0;
	return 1;
}

/* Until all have come a member has nothing to say but that it gives up. */
static lshard_status hear_early(lshard__rendezvous *r, int32_t rank)
{
	uint32_t waited_ms;
	ssize_t got = recv(r->members[rank].fd, &waited_ms, sizeof waited_ms, 0);

	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return LSHARD_OK;
	return got == (ssize_t)sizeof waited_ms ? waited(r, rank, waited_ms) : left_early(r, rank);
}

static lshard_status gather_members(lshard__rendezvous *r, uint64_t deadline)
{
	while (!all_heard(r)) {
		lshard_status status = await_members(r, deadline);

		for (int32_t rank = 1; rank < r->context->size && status == LSHARD_OK; rank++)
			if (r->members[rank].ended)
				status = left_early(r, rank);
			else if (r->polled[rank].fd >= 0 && r->polled[rank].revents)
				status = hear_early(r, rank);
		if (status == LSHARD_OK)
			status = welcome(r);
		if (status != LSHARD_OK)
			return status;
	}
	return LSHARD_OK;
}

/* ---- Listening ---- */

static lshard_status cannot_listen(lshard__rendezvous *r)
{
	const int error = errno;
	lshard_error refused;
	char why[400];

	lshard__place_reason(&r->place, error, why, sizeof why);
	(void)lshard_fail(&refused, LSHARD_ERR_SYSTEM, "job '%s': cannot listen as rank 0 (process %d): %s", r->job,
			  (int)getpid(), why);
	return rendezvous_blocked(r, error, LSHARD_ERR_SYSTEM, refused.text);
}

static lshard_status take_place(lshard__rendezvous *r, uint64_t deadline)
{
	for (;;) {
		lshard_status status;

		r->listener = lshard__place_listen(&r->place, deadline);
		if (r->listener >= 0)
			return LSHARD_OK;
		if (errno != EADDRINUSE || !lshard__left_ms(deadline))
			return cannot_listen(r);
		status = rendezvous_challenge(r, deadline);
		if (status != LSHARD_IN_PROGRESS)
			return status;
		poll(NULL, 0, 1);
	}
}

void rendezvous_stop_listening(lshard__rendezvous *r)
{
	if (r->listener < 0)
		return;
	lshard__place_leave(&r->place);
	rendezvous_close_fd(&r->spare);
	rendezvous_close_fd(&r->listener);
}

lshard_status rendezvous_open_root(lshard__rendezvous *r, uint64_t deadline)
{
	lshard_status status = take_place(r, deadline);

	if (status != LSHARD_OK)
		return status;
	r->spare = fcntl(r->listener, F_DUPFD_CLOEXEC, 0);
	status = r->spare < 0 ? cannot(r, "accept the other ranks", errno) : gather_members(r, deadline);
	if (status != LSHARD_OK)
		return tell_all(r, status);
	rendezvous_stop_listening(r);
	lshard__pending_close(&r->pending);
	for (int32_t rank = 1; rank < r->context->size; rank++)
		tell(r->members[rank].fd, LSHARD_OK, NULL, 0);
	return LSHARD_OK;
}

/* ---- The all-gather ---- */

/* Take what member @p rank has sent of its frame and then, at @p place, of its contribution. */
static lshard_status take_part(lshard__rendezvous *r, int32_t rank, char *place, size_t bytes)
{
	struct rendezvous_member *member = &r->members[rank];
	size_t head = sizeof member->frame;
	ssize_t got;

	if (member->got < head)
		got = recv(member->fd, (char *)&member->frame + member->got, head - member->got, 0);
	else
		got = recv(member->fd, place + (member->got - head), head + bytes - member->got, 0);
	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return LSHARD_OK;
	if (got <= 0)
		return left_early(r, rank);
	member->got += (size_t)got;
	if (member->got >= head && (member->frame.magic != LSHARD__HELLO_MAGIC || member->frame.bytes != bytes))
		return lshard_fail(&r->error, LSHARD_ERR_MISMATCH,
				   "job '%s': rank %d (process %d) gives %llu bytes where rank 0 gives %llu", r->job,
				   (int)rank, (int)member->pid, (unsigned long long)member->frame.bytes,
				   (unsigned long long)bytes);
	member->heard = member->got == head + bytes;
	return LSHARD_OK;
}

/* Whoever has given its part and speaks again has left: it gets no answer before all have given theirs. */
static lshard_status gather_parts(lshard__rendezvous *r, char *receive, size_t bytes, uint64_t deadline)
{
	int32_t size = r->context->size;

	for (int32_t rank = 1; rank < size; rank++) {
		r->members[rank].got = 0;
		r->members[rank].heard = 0;
	}
	while (!all_heard(r)) {
		lshard_status status = await_members(r, deadline);

		for (int32_t rank = 1; rank < size && status == LSHARD_OK; rank++) {
			if (r->members[rank].ended)
				status = left_early(r, rank);
			else if (r->polled[rank].revents)
				status = r->members[rank].heard
						 ? left_early(r, rank)
						 : take_part(r, rank, receive + (size_t)rank * bytes, bytes);
		}
		if (status != LSHARD_OK)
			return status;
	}
	return LSHARD_OK;
}

static lshard_status answer(lshard__rendezvous *r, int32_t rank, const void *all, size_t bytes, uint64_t deadline)
{
	struct rendezvous_frame frame = {LSHARD__HELLO_MAGIC, LSHARD_OK, bytes};
	int fd = r->members[rank].fd;
	lshard_status status = lshard__socket_send(fd, &frame, sizeof frame, deadline);

	if (status == LSHARD_OK)
		status = lshard__socket_send(fd, all, bytes, deadline);
	if (status == LSHARD_OK)
		return LSHARD_OK;
	return lshard_fail(&r->error, status, "job '%s': rank %d (process %d) does not read its answer", r->job,
			   (int)rank, (int)r->members[rank].pid);
}

lshard_status rendezvous_root_allgather(lshard__rendezvous *r, const void *send, char *receive, size_t bytes,
					uint64_t deadline)
{
	int32_t size = r->context->size;
	lshard_status status;

	memcpy(receive, send, bytes);
	status = gather_parts(r, receive, bytes, deadline);
	for (int32_t rank = 1; rank < size && status == LSHARD_OK; rank++)
		status = answer(r, rank, receive, bytes * (size_t)size, deadline);
	return status == LSHARD_OK ? LSHARD_OK : tell_all(r, status);
}
