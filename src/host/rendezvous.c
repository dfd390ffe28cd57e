/* SPDX-License-Identifier: Apache-2.0
 *
 * rendezvous.c - how separately started ranks of one host and user find each other by a job's name.
 * Knows ranks and sockets; knows no transport. Threads of one process may as well.
 *
 * Rank 0 listens at the place of the job (rendezvous_place.h); the others connect to it, say who they are, and stay.
 * Once all have come the listener is closed. An allgather goes through rank 0. Whatever goes wrong at rank 0 is told to
 * all others in its own words, so that every rank's message names the cause.
 */
#include "outside.h"
#include "limit_reason.h"
#include "pending_connections.h"
#include "rendezvous_place.h"
#include "sockets.h"
#include "verdict.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* In front of every answer and contribution. On failure the text follows instead of the bytes. */
struct frame {
	uint32_t magic;
	int32_t status;
	uint64_t bytes;
};

struct member {
	int fd;      /* -1: not here */
	int process; /* readable once it has ended, see lshard__socket_peer_process; -1: not known */
	pid_t pid;
	int ended;  /* its process has, and it left nothing to be heard */
	int heard;  /* it said all we wait for now: its hello, its contribution */
	size_t got; /* bytes of its frame and contribution that came so far */
	struct frame frame;
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
	struct member *members;                     /* rank 0: [size]; its own entry is unused */
	struct lshard__pending_connections pending; /* rank 0, while ranks are missing */
	struct pollfd *polled;                      /* rank 0: [size] members, pending connections, their processes */
	char job[64];
};

static void close_if_open(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static struct lshard__greeting greeting(void)
{
	return lshard__hello_greeting(sizeof(struct frame));
}

/* ---- rank 0 ---- */

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
	struct frame frame = {LSHARD__HELLO_MAGIC, status, bytes};
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
	close_if_open(&r->spare);
	while (lshard__pending_accept(&r->pending, r->listener, &connecting) == LSHARD_OK) {
		if (connecting.fd >= 0)
			tell(connecting.fd, status, r->error.text, strlen(r->error.text));
		close_if_open(&connecting.fd);
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
	struct member *member = &r->members[connecting->hello.rank];

	*member = (struct member){.fd = connecting->fd,
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

/* Take what member @p rank has sent of its frame and then, at @p place, of its contribution. */
static lshard_status take_part(lshard__rendezvous *r, int32_t rank, char *place, size_t bytes)
{
	struct member *member = &r->members[rank];
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
	struct frame frame = {LSHARD__HELLO_MAGIC, LSHARD_OK, bytes};
	int fd = r->members[rank].fd;
	lshard_status status = lshard__socket_send(fd, &frame, sizeof frame, deadline);

	if (status == LSHARD_OK)
		status = lshard__socket_send(fd, all, bytes, deadline);
	if (status == LSHARD_OK)
		return LSHARD_OK;
	return lshard_fail(&r->error, status, "job '%s': rank %d (process %d) does not read its answer", r->job,
			   (int)rank, (int)r->members[rank].pid);
}

static lshard_status root_allgather(lshard__rendezvous *r, const void *send, char *receive, size_t bytes,
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

/* ---- the others ---- */

/* Does somebody sit there? @p error: what it was tried with; @p text: what to say where nobody does. */
static lshard_status blocked(lshard__rendezvous *r, int error, lshard_status otherwise, const char *text)
{
	const lshard_context *context = r->context;
	lshard_status status = lshard__place_blocked(&r->place, error, context->rank, context->timeout_ms, &r->error);

	return status == LSHARD_OK ? lshard_fail(&r->error, otherwise, "%s", text) : status;
}

static lshard_status no_answer(lshard__rendezvous *r, lshard_status status)
{
	const int error = errno;
	int32_t rank = r->context->rank;
	char process[32] = "";
	lshard_error late;

	if (r->root_pid > 0)
		snprintf(process, sizeof process, " (process %d)", (int)r->root_pid);
	if (status == LSHARD_ERR_TIMEOUT) {
		(void)lshard_fail(&late, status, "rank %d waited %u ms for an answer from rank 0%s of job '%s'",
				  (int)rank, (unsigned)r->context->timeout_ms, process, r->job);
		return blocked(r, rank ? 0 : EADDRINUSE, status, late.text);
	}
	if (status == LSHARD_ERR_PEER_FAILED)
		return lshard_fail(&r->error, status, "rank %d: rank 0%s of job '%s' is gone", (int)rank, process,
				   r->job);
	return lshard_fail(&r->error, status, "rank %d (process %d) cannot send to rank 0%s of job '%s': %s", (int)rank,
			   (int)getpid(), process, r->job, lshard__reason(error, 0).text);
}

/* What rank 0 says: @p bytes bytes, or why there are none. */
static lshard_status hear_root(lshard__rendezvous *r, int fd, void *into, size_t bytes, uint64_t deadline)
{
	struct frame frame;
	lshard_status status = lshard__socket_receive(fd, r->process, &frame, sizeof frame, deadline);
	char text[sizeof r->error.text];

	if (status != LSHARD_OK)
		return no_answer(r, status);
	if (frame.magic != LSHARD__HELLO_MAGIC || frame.status > 0 ||
	    (frame.status == LSHARD_OK ? frame.bytes != bytes : frame.bytes >= sizeof text))
		return lshard_fail(&r->error, LSHARD_ERR_MISMATCH,
				   "rank %d: the process that listens as rank 0 of job '%s' is no rank of this library",
				   (int)r->context->rank, r->job);
	status = lshard__socket_receive(fd, r->process, frame.status == LSHARD_OK ? into : text, (size_t)frame.bytes,
					deadline);
	if (status != LSHARD_OK)
		return no_answer(r, status);
	if (frame.status == LSHARD_OK)
		return LSHARD_OK;
	text[frame.bytes] = 0;
	return lshard_fail(&r->error, (lshard_status)frame.status, "%s", text);
}

/* Only rank 0 knows who is missing: tell it shortly before the deadline that we leave, so that it can still say. */
static void give_up_in_time(const lshard__rendezvous *r, int fd, uint64_t deadline)
{
	uint32_t timeout_ms = r->context->timeout_ms;
	uint32_t early_ms = timeout_ms / 8 < 100 ? timeout_ms / 8 : 100;

	if (lshard__socket_wait(fd, r->process, POLLIN, deadline - early_ms * (uint64_t)1000000) == LSHARD_ERR_TIMEOUT)
		(void)lshard__socket_send(fd, &timeout_ms, sizeof timeout_ms, deadline);
}

/* IN_PROGRESS: it says nothing, and the process that began to listen has ended. */
static lshard_status introduce(lshard__rendezvous *r, int fd, uint64_t deadline)
{
	struct lshard__hello hello = {greeting(), 0, r->context->rank, r->context->size};
	lshard_status status;
	uid_t uid;

	if (lshard__socket_peer(fd, &r->root_pid, &uid))
		return no_answer(r, LSHARD_ERR_SYSTEM);
	if (uid != geteuid())
		return lshard__place_foreign(&r->place, r->context->rank, r->root_pid, uid, &r->error);
	r->process = lshard__socket_peer_process(fd);
	if (lshard__socket_peer_ended(r->process) && /* it may have said why it went */
	    lshard__socket_wait(fd, -1, POLLIN, lshard__now_ns()) == LSHARD_ERR_TIMEOUT)
		return LSHARD_IN_PROGRESS;
	status = lshard__socket_send(fd, &hello, sizeof hello, deadline);
	/* Rank 0 may have closed after telling why: then the answer is there although the hello does not go. */
	if (status == LSHARD_ERR_TIMEOUT || status == LSHARD_ERR_SYSTEM)
		return no_answer(r, status);
	give_up_in_time(r, fd, deadline);
	return hear_root(r, fd, NULL, 0, deadline);
}

/*
 * After introduce found that who began to listen has ended. IN_PROGRESS: another rank 0 listens by now, or is about to
 * replace what was left in a directory.
 */
static lshard_status ended_before(lshard__rendezvous *r, uint64_t deadline)
{
	const enum lshard__listening now = lshard__socket_look(r->place.name, SOCK_STREAM);

	if (now == LSHARD__LEFT_BEHIND && r->place.directory < 0)
		return lshard__place_left_behind(&r->place, r->context->rank, r->root_pid, &r->error);
	if (now == LSHARD__NOBODY || !lshard__left_ms(deadline))
		return no_answer(r, LSHARD_ERR_PEER_FAILED);
	return LSHARD_IN_PROGRESS;
}

static lshard_status too_late(lshard__rendezvous *r, int error)
{
	lshard_error late;
	char hint[200];

	(void)lshard_fail(&late, LSHARD_ERR_TIMEOUT, "rank %d waited %u ms for rank 0 of job '%s', %s",
			  (int)r->context->rank, (unsigned)r->context->timeout_ms, r->job,
			  lshard__place_hint(&r->place, hint, sizeof hint));
	return blocked(r, error, LSHARD_ERR_TIMEOUT, late.text);
}

static lshard_status open_member(lshard__rendezvous *r, uint64_t deadline)
{
	for (;;) {
		lshard_status status = lshard__socket_connect(r->place.name, SOCK_STREAM, deadline, &r->root);

		if (status != LSHARD_OK)
			return status == LSHARD_ERR_TIMEOUT ? too_late(r, errno) : no_answer(r, status);
		status = introduce(r, r->root, deadline);
		if (status == LSHARD_IN_PROGRESS)
			status = ended_before(r, deadline);
		if (status != LSHARD_IN_PROGRESS)
			return status;
		close_if_open(&r->root);
		close_if_open(&r->process);
		poll(NULL, 0, 5);
	}
}

static lshard_status member_allgather(lshard__rendezvous *r, const void *send, void *receive, size_t bytes,
				      uint64_t deadline)
{
	struct frame frame = {LSHARD__HELLO_MAGIC, LSHARD_OK, bytes};
	lshard_status status = lshard__socket_send(r->root, &frame, sizeof frame, deadline);

	if (status == LSHARD_OK)
		status = lshard__socket_send(r->root, send, bytes, deadline);
	if (status == LSHARD_ERR_TIMEOUT || status == LSHARD_ERR_SYSTEM)
		return no_answer(r, status);
	return hear_root(r, r->root, receive, bytes * (size_t)r->context->size, deadline);
}

/* ---- both ---- */

/*
 * The name is taken: introduce ourselves as rank 0 to whoever has it and be told that there is one already.
 * IN_PROGRESS: it went away meanwhile, try again.
 */
static lshard_status challenge(lshard__rendezvous *r, uint64_t deadline)
{
	lshard_status status;
	int fd;

	status = lshard__socket_connect(r->place.name, SOCK_STREAM, lshard__now_ns(), &fd);
	if (status != LSHARD_OK)
		return status == LSHARD_ERR_TIMEOUT ? LSHARD_IN_PROGRESS : no_answer(r, status);
	status = introduce(r, fd, deadline);
	if (status == LSHARD_IN_PROGRESS)
		status = ended_before(r, deadline);
	close(fd);
	close_if_open(&r->process);
	return status == LSHARD_ERR_PEER_FAILED ? LSHARD_IN_PROGRESS : status;
}

static lshard_status cannot_listen(lshard__rendezvous *r)
{
	const int error = errno;
	lshard_error refused;
	char why[400];

	lshard__place_reason(&r->place, error, why, sizeof why);
	(void)lshard_fail(&refused, LSHARD_ERR_SYSTEM, "job '%s': cannot listen as rank 0 (process %d): %s", r->job,
			  (int)getpid(), why);
	return blocked(r, error, LSHARD_ERR_SYSTEM, refused.text);
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
		status = challenge(r, deadline);
		if (status != LSHARD_IN_PROGRESS)
			return status;
		poll(NULL, 0, 1);
	}
}

static void stop_listening(lshard__rendezvous *r)
{
	if (r->listener < 0)
		return;
	lshard__place_leave(&r->place);
	close_if_open(&r->spare);
	close_if_open(&r->listener);
}

static lshard_status open_root(lshard__rendezvous *r, uint64_t deadline)
{
	lshard_status status = take_place(r, deadline);

	if (status != LSHARD_OK)
		return status;
	r->spare = fcntl(r->listener, F_DUPFD_CLOEXEC, 0);
	status = r->spare < 0 ? cannot(r, "accept the other ranks", errno) : gather_members(r, deadline);
	if (status != LSHARD_OK)
		return tell_all(r, status);
	stop_listening(r);
	lshard__pending_close(&r->pending);
	for (int32_t rank = 1; rank < r->context->size; rank++)
		tell(r->members[rank].fd, LSHARD_OK, NULL, 0);
	return LSHARD_OK;
}

static int allgather(void *user, const void *send, void *receive, size_t bytes)
{
	lshard__rendezvous *r = user;
	uint64_t deadline = lshard__deadline_ns(r->context->timeout_ms);

	if (r->context->rank == 0)
		r->failure = root_allgather(r, send, receive, bytes, deadline);
	else
		r->failure = member_allgather(r, send, receive, bytes, deadline);
	return r->failure;
}

static lshard__rendezvous *allocate(const lshard_context *context, const char *job)
{
	lshard__rendezvous *r = context->allocate(context, sizeof *r);
	size_t size = (size_t)context->size;

	if (!r)
		return NULL;
	r->context = context;
	r->listener = -1;
	r->spare = -1;
	r->root = -1;
	r->process = -1;
	r->place.directory = -1;
	snprintf(r->job, sizeof r->job, "%s", job);
	if (context->rank)
		return r;
	r->members = context->allocate(context, size * sizeof *r->members);
	r->polled = context->allocate(context, (2 * size + lshard__pending_polls(context->size)) * sizeof *r->polled);
	for (size_t i = 0; r->members && i < size; i++)
		r->members[i].fd = r->members[i].process = -1;
	if (lshard__pending_open(&r->pending, context, greeting()) && r->members && r->polled)
		return r;
	lshard__rendezvous_close(r);
	return NULL;
}

lshard_status lshard__rendezvous_open(const lshard_context *context, const char *job, lshard__rendezvous **rendezvous,
				      lshard_bootstrap *bootstrap, lshard_error *error)
{
	uint64_t deadline = lshard__deadline_ns(context->timeout_ms);
	lshard__rendezvous *r = allocate(context, job);
	lshard_status status;

	if (!r)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "rank %d: no memory to connect %d ranks of job '%s'",
				   (int)context->rank, (int)context->size, job);
	status = lshard__place_open(&r->place, job, &r->error);
	if (status == LSHARD_OK)
		status = context->rank ? open_member(r, deadline) : open_root(r, deadline);
	if (status != LSHARD_OK) {
		if (error)
			*error = r->error;
		lshard__rendezvous_close(r);
		return status;
	}
	*rendezvous = r;
	*bootstrap = (lshard_bootstrap){sizeof *bootstrap, allgather, r};
	return LSHARD_OK;
}

lshard_status lshard__rendezvous_failure(const lshard__rendezvous *rendezvous)
{
	return rendezvous->failure;
}

const lshard_error *lshard__rendezvous_error(const lshard__rendezvous *rendezvous)
{
	return &rendezvous->error;
}

void lshard__rendezvous_close(lshard__rendezvous *r)
{
	if (!r)
		return;
	stop_listening(r);
	lshard__place_close(&r->place);
	close_if_open(&r->root);
	close_if_open(&r->process);
	for (int32_t rank = 1; r->members && rank < r->context->size; rank++) {
		close_if_open(&r->members[rank].fd);
		close_if_open(&r->members[rank].process);
	}
	lshard__pending_close(&r->pending);
	if (r->polled)
		r->context->release(r->context, r->polled);
	if (r->members)
		r->context->release(r->context, r->members);
	r->context->release(r->context, r);
}
