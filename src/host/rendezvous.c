/* SPDX-License-Identifier: Apache-2.0
 *
 * rendezvous.c - how separately started ranks of one host and user find each other by a job's name.
 * Knows ranks and sockets; knows no transport. Threads of one process may meet as well.
 *
 * Rank 0 listens under an abstract name made of the user and the job; the others connect to it, say who they are, and
 * stay. Once all have come the listener is closed. An allgather goes through rank 0. Whatever goes wrong at rank 0 is
 * told to all others in its own words, so that every rank's message names the cause.
 */
#include "outside.h"
#include "lobby.h"
#include "sockets.h"
#include "text_hash.h"
#include "verdict.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAGIC      0x6c73686du
#define PROTOCOL   1u
#define NAME_BYTES 104 /* of an abstract socket */

struct hello {
	uint32_t magic;
	uint32_t protocol;
	int32_t rank;
	int32_t size;
};

_Static_assert(sizeof(struct hello) == LSHARD__HELLO_BYTES, "the lobby waits for a whole hello");

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
	int heard;  /* it said all we wait for now: its hello, its contribution */
	size_t got; /* bytes of its frame and contribution that came so far */
	struct frame frame;
};

struct lshard__rendezvous {
	const lshard_context *context;
	lshard_error error;
	lshard_status failure;      /* of the last all-gather, if it failed */
	int listener;               /* rank 0, while ranks are missing */
	int root;                   /* others: the connection to rank 0 */
	int process;                /* others: of rank 0, as that of a member */
	struct member *members;     /* rank 0: [size]; its own entry is unused */
	struct lshard__lobby lobby; /* rank 0, while ranks are missing */
	struct pollfd *polled;      /* rank 0: [size] members, [size] their processes, then the lobby's */
	char job[64];
};

static void close_if_open(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* ---- names ---- */

/* A job's name may be longer than an abstract name: its hash keeps long ones apart, its beginning is for the eye. */
static void socket_name(const char *job, char name[NAME_BYTES])
{
	snprintf(name, NAME_BYTES, "layershard/%lu/%016llx/%.40s", (unsigned long)geteuid(),
		 (unsigned long long)lshard__text_hash(job), job);
}

/* Those that were not heard. */
static struct lshard__ranks find_missing(const lshard__rendezvous *r)
{
	struct lshard__ranks missing = {0};

	for (int32_t rank = 1; rank < r->context->size; rank++)
		if (!r->members[rank].heard)
			lshard__ranks_add(&missing, rank);
	return missing;
}

/* ---- rank 0 ---- */

static void tell(int fd, lshard_status status, const void *text, uint64_t bytes)
{
	struct frame frame = {MAGIC, status, bytes};
	struct iovec parts[2] = {{&frame, sizeof frame}, {(void *)(uintptr_t)text, (size_t)bytes}};
	struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};

	/* Best effort: who cannot take it sees the connection close. */
	(void)sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Tell everybody who is here why it failed. */
static lshard_status tell_all(lshard__rendezvous *r, lshard_status status)
{
	for (int32_t rank = 1; rank < r->context->size; rank++)
		if (r->members[rank].fd >= 0)
			tell(r->members[rank].fd, status, r->error.text, strlen(r->error.text));
	for (size_t i = 0; i < r->lobby.count; i++)
		tell(r->lobby.newcomers[i].fd, status, r->error.text, strlen(r->error.text));
	return status;
}

/* Is it one of ours? The text is for the newcomer as well. */
static lshard_status check_hello(lshard__rendezvous *r, const struct hello *hello, pid_t pid)
{
	int32_t size = r->context->size;
	pid_t other;

	if (hello->magic != MAGIC || hello->protocol != PROTOCOL)
		return lshard_fail(&r->error, LSHARD_ERR_MISMATCH,
				   "job '%s': process %d speaks another version of this library", r->job, (int)pid);
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

/* Take in those of the lobby that have said who they are. */
static lshard_status welcome(lshard__rendezvous *r)
{
	struct lshard__newcomer newcomer;
	struct hello hello;

	if (lshard__lobby_hear(&r->lobby, r->polled + 2 * r->context->size) < 0)
		return lshard_fail(&r->error, LSHARD_ERR_SYSTEM, "job '%s': accept: %s", r->job, strerror(errno));
	while (lshard__lobby_next(&r->lobby, &newcomer)) {
		lshard_status status;

		memcpy(&hello, newcomer.hello, sizeof hello);
		status = check_hello(r, &hello, newcomer.pid);
		if (status != LSHARD_OK) {
			tell(newcomer.fd, status, r->error.text, strlen(r->error.text));
			close(newcomer.fd);
			return status;
		}
		r->members[hello.rank] = (struct member){.fd = newcomer.fd,
							 .process = lshard__socket_peer_process(newcomer.fd),
							 .pid = newcomer.pid,
							 .heard = 1};
	}
	return LSHARD_OK;
}

static lshard_status left_early(lshard__rendezvous *r, int32_t rank)
{
	return lshard_fail(&r->error, LSHARD_ERR_PEER_FAILED, "rank %d of job '%s' (process %d) is gone", (int)rank,
			   r->job, (int)r->members[rank].pid);
}

/* Wait until one of those who are here, or somebody new, has something to say. */
static lshard_status await_members(lshard__rendezvous *r, uint64_t deadline)
{
	int32_t size = r->context->size;
	struct lshard__ranks missing;
	size_t count;
	int ready;

	for (int32_t rank = 0; rank < size; rank++) {
		r->polled[rank] = (struct pollfd){.fd = r->members[rank].fd, .events = POLLIN};
		r->polled[size + rank] = (struct pollfd){.fd = r->members[rank].process, .events = POLLIN};
	}
	count = 2 * (size_t)size + lshard__lobby_poll(&r->lobby, r->listener, r->polled + 2 * size);
	ready = poll(r->polled, count, lshard__left_ms(deadline));
	if (ready > 0 || (ready < 0 && errno == EINTR))
		return LSHARD_OK;
	if (ready < 0)
		return lshard_fail(&r->error, LSHARD_ERR_SYSTEM, "job '%s': poll: %s", r->job, strerror(errno));
	missing = find_missing(r);
	return lshard_fail(&r->error, LSHARD_ERR_TIMEOUT, "rank 0 waited %u ms for %s of job '%s'",
			   (unsigned)r->context->timeout_ms, lshard__ranks_text(&missing), r->job);
}

/* With nothing left to be heard: its socket may live on in a child of its. */
static int has_ended(const lshard__rendezvous *r, int32_t rank)
{
	return !r->polled[rank].revents && r->polled[r->context->size + rank].revents;
}

static int all_heard(const lshard__rendezvous *r)
{
	for (int32_t rank = 1; rank < r->context->size; rank++)
		if (!r->members[rank].heard)
			return 0;
	return 1;
}

/* Its deadline came before ours: the group will not come about, and it is the missing ones that matter, not it. */
static lshard_status gave_up(lshard__rendezvous *r, int32_t rank, uint32_t waited_ms)
{
	struct lshard__ranks missing = find_missing(r);

	return lshard_fail(&r->error, LSHARD_ERR_TIMEOUT, "rank %d waited %u ms for %s of job '%s'", (int)rank,
			   (unsigned)waited_ms, lshard__ranks_text(&missing), r->job);
}

/* Until all have come a member has nothing to say but that it gives up. */
static lshard_status hear_early(lshard__rendezvous *r, int32_t rank)
{
	uint32_t waited_ms;
	ssize_t got = recv(r->members[rank].fd, &waited_ms, sizeof waited_ms, 0);

	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return LSHARD_OK;
	return got == (ssize_t)sizeof waited_ms ? gave_up(r, rank, waited_ms) : left_early(r, rank);
}

static lshard_status gather_members(lshard__rendezvous *r, uint64_t deadline)
{
	while (!all_heard(r)) {
		lshard_status status = await_members(r, deadline);

		for (int32_t rank = 1; rank < r->context->size && status == LSHARD_OK; rank++)
			if (has_ended(r, rank))
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
	if (member->got >= head && (member->frame.magic != MAGIC || member->frame.bytes != bytes))
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
			if (has_ended(r, rank))
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
	struct frame frame = {MAGIC, LSHARD_OK, bytes};
	int fd = r->members[rank].fd;
	lshard_status status = lshard__socket_send(fd, &frame, sizeof frame, deadline);

	if (status == LSHARD_OK)
		status = lshard__socket_send(fd, all, bytes, deadline);
	if (status == LSHARD_OK)
		return LSHARD_OK;
	return lshard_fail(&r->error, status, "job '%s': rank %d (process %d) does not take its answer", r->job,
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

static lshard_status no_answer(lshard__rendezvous *r, lshard_status status)
{
	int32_t rank = r->context->rank;

	if (status == LSHARD_ERR_TIMEOUT)
		return lshard_fail(&r->error, status, "rank %d waited %u ms for word from rank 0 of job '%s'",
				   (int)rank, (unsigned)r->context->timeout_ms, r->job);
	if (status == LSHARD_ERR_PEER_FAILED)
		return lshard_fail(&r->error, status, "rank %d: rank 0 of job '%s' is gone", (int)rank, r->job);
	return lshard_fail(&r->error, status, "rank %d: rank 0 of job '%s': %s", (int)rank, r->job, strerror(errno));
}

/* What rank 0 says: @p bytes bytes, or why there are none. */
static lshard_status hear_root(lshard__rendezvous *r, int fd, void *into, size_t bytes, uint64_t deadline)
{
	struct frame frame;
	lshard_status status = lshard__socket_receive(fd, r->process, &frame, sizeof frame, deadline);
	char text[sizeof r->error.text];

	if (status != LSHARD_OK)
		return no_answer(r, status);
	if (frame.magic != MAGIC || (frame.status == LSHARD_OK ? frame.bytes != bytes : frame.bytes >= sizeof text))
		return lshard_fail(&r->error, LSHARD_ERR_MISMATCH,
				   "job '%s': rank 0 speaks another version of this library", r->job);
	status = lshard__socket_receive(fd, r->process, frame.status == LSHARD_OK ? into : text, (size_t)frame.bytes,
					deadline);
	if (status != LSHARD_OK)
		return no_answer(r, status);
	if (frame.status == LSHARD_OK)
		return LSHARD_OK;
	text[frame.bytes] = 0;
	return lshard_fail(&r->error, (lshard_status)frame.status, "%s", text);
}

/* Only rank 0 knows who is missing: tell it shortly before the deadline that we are leaving, so that it can still say.
 */
static void give_up_in_time(const lshard__rendezvous *r, int fd, uint64_t deadline)
{
	uint32_t timeout_ms = r->context->timeout_ms;
	uint32_t early_ms = timeout_ms / 8 < 100 ? timeout_ms / 8 : 100;

	if (lshard__socket_wait(fd, r->process, POLLIN, deadline - early_ms * (uint64_t)1000000) == LSHARD_ERR_TIMEOUT)
		(void)lshard__socket_send(fd, &timeout_ms, sizeof timeout_ms, deadline);
}

static lshard_status introduce(lshard__rendezvous *r, int fd, uint64_t deadline)
{
	struct hello hello = {MAGIC, PROTOCOL, r->context->rank, r->context->size};
	lshard_status status;
	pid_t pid;
	uid_t uid;

	if (lshard__socket_peer(fd, &pid, &uid))
		return no_answer(r, LSHARD_ERR_SYSTEM);
	if (uid != geteuid())
		return lshard_fail(&r->error, LSHARD_ERR_SYSTEM,
				   "job '%s': process %d that listens under its name belongs to user %lu, not %lu",
				   r->job, (int)pid, (unsigned long)uid, (unsigned long)geteuid());
	r->process = lshard__socket_peer_process(fd);
	if (r->process < 0 && errno == ESRCH) /* a child of its still listens */
		return no_answer(r, LSHARD_ERR_PEER_FAILED);
	status = lshard__socket_send(fd, &hello, sizeof hello, deadline);
	/* Rank 0 may have closed after telling why: then the answer is there although the hello does not go. */
	if (status == LSHARD_ERR_TIMEOUT || status == LSHARD_ERR_SYSTEM)
		return no_answer(r, status);
	give_up_in_time(r, fd, deadline);
	return hear_root(r, fd, NULL, 0, deadline);
}

static lshard_status open_member(lshard__rendezvous *r, const char *name, uint64_t deadline)
{
	lshard_status status = lshard__socket_connect(name, SOCK_STREAM, deadline, &r->root);

	if (status == LSHARD_ERR_TIMEOUT)
		return lshard_fail(&r->error, status, "rank %d waited %u ms for rank 0 of job '%s'",
				   (int)r->context->rank, (unsigned)r->context->timeout_ms, r->job);
	return status == LSHARD_OK ? introduce(r, r->root, deadline) : no_answer(r, status);
}

static lshard_status member_allgather(lshard__rendezvous *r, const void *send, void *receive, size_t bytes,
				      uint64_t deadline)
{
	struct frame frame = {MAGIC, LSHARD_OK, bytes};
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
static lshard_status challenge(lshard__rendezvous *r, const char *name, uint64_t deadline)
{
	lshard_status status;
	int fd;

	if (lshard__socket_connect(name, SOCK_STREAM, lshard__now_ns(), &fd) != LSHARD_OK)
		return LSHARD_IN_PROGRESS;
	status = introduce(r, fd, deadline);
	close(fd);
	close_if_open(&r->process);
	return status == LSHARD_ERR_PEER_FAILED ? LSHARD_IN_PROGRESS : status;
}

static lshard_status take_name(lshard__rendezvous *r, const char *name, uint64_t deadline)
{
	for (;;) {
		lshard_status status;

		r->listener = lshard__socket_listen(name, SOCK_STREAM);
		if (r->listener >= 0)
			return LSHARD_OK;
		if (errno != EADDRINUSE || !lshard__left_ms(deadline))
			return lshard_fail(&r->error, LSHARD_ERR_SYSTEM, "job '%s': cannot listen as rank 0: %s",
					   r->job, strerror(errno));
		status = challenge(r, name, deadline);
		if (status != LSHARD_IN_PROGRESS)
			return status;
		poll(NULL, 0, 1);
	}
}

static lshard_status open_root(lshard__rendezvous *r, const char *name, uint64_t deadline)
{
	lshard_status status = take_name(r, name, deadline);

	if (status != LSHARD_OK)
		return status;
	status = gather_members(r, deadline);
	if (status != LSHARD_OK)
		return tell_all(r, status);
	close(r->listener);
	r->listener = -1;
	lshard__lobby_close(&r->lobby);
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
	r->root = -1;
	r->process = -1;
	snprintf(r->job, sizeof r->job, "%s", job);
	if (context->rank)
		return r;
	r->members = context->allocate(context, size * sizeof *r->members);
	r->polled = context->allocate(context, (2 * size + lshard__lobby_polls(context->size)) * sizeof *r->polled);
	for (size_t i = 0; r->members && i < size; i++)
		r->members[i].fd = r->members[i].process = -1;
	if (lshard__lobby_open(&r->lobby, context) && r->members && r->polled)
		return r;
	lshard__rendezvous_close(r);
	return NULL;
}

lshard_status lshard__rendezvous_open(const lshard_context *context, const char *job, lshard__rendezvous **rendezvous,
				      lshard_bootstrap *bootstrap, lshard_error *error)
{
	uint64_t deadline = lshard__deadline_ns(context->timeout_ms);
	lshard__rendezvous *r = allocate(context, job);
	char name[NAME_BYTES];
	lshard_status status;

	if (!r)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "rank %d: no memory to meet %d ranks of job '%s'",
				   (int)context->rank, (int)context->size, job);
	socket_name(job, name);
	status = context->rank ? open_member(r, name, deadline) : open_root(r, name, deadline);
	if (status != LSHARD_OK) {
		if (error)
			*error = r->error;
		lshard__rendezvous_close(r);
		return status;
	}
	*rendezvous = r;
	*bootstrap = (lshard_bootstrap){allgather, r};
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
	close_if_open(&r->listener);
	close_if_open(&r->root);
	close_if_open(&r->process);
	for (int32_t rank = 1; r->members && rank < r->context->size; rank++) {
		close_if_open(&r->members[rank].fd);
		close_if_open(&r->members[rank].process);
	}
	lshard__lobby_close(&r->lobby);
	if (r->polled)
		r->context->release(r->context, r->polled);
	if (r->members)
		r->context->release(r->context, r->members);
	r->context->release(r->context, r);
}
