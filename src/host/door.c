/* SPDX-License-Identifier: Apache-2.0
 *
 * door.c - see door.h.
 */
#include "door.h"
#include "limit_reason.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define VISIT_MS     1000 /* for one answer */
#define PACKET_BYTES 4096
#define RETRY_MS     5

/* In front of every answer. */
struct header {
	uint32_t magic;
	int32_t status;
	uint64_t bytes;
	int32_t descriptors;
	int32_t pid;
	char words[DOOR_WORDS_BYTES]; /* of a refusal: its text */
};

static struct lshard__greeting greeting(void)
{
	return lshard__hello_greeting(sizeof(struct header));
}

static lshard_status open_place(struct lshard__place *place, const lshard_context *context, int32_t rank,
				lshard_error *error)
{
	char name[256];
	lshard_status status;

	/* The number first: names are cut. */
	snprintf(name, sizeof name, "%d@%s", (int)rank, context->job);
	status = lshard__place_open(place, name, error);
	place->type = SOCK_SEQPACKET;
	return status;
}

/* ---- telling ---- */

static void give(struct door_visitor *visitor, const void *bytes, size_t count, int descriptor)
{
	while (!visitor->failed && !lshard__socket_give(visitor->fd, bytes, count, descriptor))
		visitor->failed = (errno != EAGAIN && errno != EINTR && errno != ETOOMANYREFS) ||
				  lshard__socket_wait(visitor->fd, -1, POLLOUT, visitor->deadline_ns) != LSHARD_OK;
}

void door_tell(struct door_visitor *visitor, const struct door_reply *reply)
{
	struct header header = {LSHARD__HELLO_MAGIC, LSHARD_OK, reply->count, reply->n, (int32_t)getpid(), ""};
	const char *bytes = reply->bytes;

	if (reply->words)
		memcpy(header.words, reply->words, reply->words_bytes);
	give(visitor, &header, sizeof header, -1);
	for (size_t at = 0; at < reply->count; at += PACKET_BYTES)
		give(visitor, bytes + at, reply->count - at < PACKET_BYTES ? reply->count - at : PACKET_BYTES, -1);
	for (int32_t i = 0; i < reply->n; i++)
		give(visitor, &(char){reply->descriptors[i] >= 0}, 1, reply->descriptors[i]);
}

void door_refuse(struct door_visitor *visitor, lshard_status status, const char *text)
{
	struct header header = {LSHARD__HELLO_MAGIC, status, 0, 0, (int32_t)getpid(), ""};

	snprintf(header.words, sizeof header.words, "%s", text);
	give(visitor, &header, sizeof header, -1);
	visitor->failed = 1;
}

/* ---- the thread ---- */

/* Whoever else connects is no rank of this build. */
static bool is_rank(struct door *door, const struct lshard__connecting_peer *connecting)
{
	const lshard_context *context = door->context;

	if (connecting->got == sizeof connecting->hello &&
	    !memcmp(&connecting->hello.greeting, &door->pending.greeting, sizeof door->pending.greeting))
		return true;
	if (lshard__pending_first_stranger(&door->pending))
		context->log(
			context, LSHARD_LOG_WARN,
			"rank %d: process %d has come to its door, does not speak as a rank of this build does, and "
			"is sent away",
			(int)context->rank, (int)connecting->pid);
	return false;
}

static bool is_of_group(const struct door *door, struct door_visitor *visitor)
{
	const struct lshard__hello *hello = &visitor->hello;
	const lshard_context *context = door->context;
	char text[200];

	if (hello->size == context->size && hello->rank >= 0 && hello->rank < context->size &&
	    hello->rank != context->rank)
		return true;
	snprintf(text, sizeof text,
		 "rank %d of job '%.64s' (process %d) is one of %d ranks; who comes is rank %d of %d",
		 (int)context->rank, context->job, (int)getpid(), (int)context->size, (int)hello->rank,
		 (int)hello->size);
	door_refuse(visitor, LSHARD_ERR_MISMATCH, text);
	return false;
}

static void let_in(struct door *door, const struct lshard__connecting_peer *connecting)
{
	struct door_visitor visitor = {.hello = connecting->hello,
				       .pid = connecting->pid,
				       .fd = connecting->fd,
				       .deadline_ns = lshard__deadline_ns(VISIT_MS)};

	if (is_rank(door, connecting) && is_of_group(door, &visitor))
		door->host.answer(door->host.user, &visitor);
	close(visitor.fd);
}

static void *serve(void *user)
{
	struct door *door = user;
	struct lshard__connecting_peer connecting;
	size_t count;

	for (;;) {
		door->polled[0] = (struct pollfd){.fd = door->stop, .events = POLLIN};
		count = 1 + lshard__pending_poll(&door->pending, door->listener, door->polled + 1);
		if (poll(door->polled, count, -1) < 0 && errno != EINTR)
			break;
		if (door->polled[0].revents)
			break;
		/* Where no descriptor is left the visitor waits, and so does this thread, until one is. */
		if (lshard__pending_hear(&door->pending, door->polled + 1) < 0)
			poll(NULL, 0, RETRY_MS);
		while (lshard__pending_next(&door->pending, &connecting))
			let_in(door, &connecting);
	}
	(void)shutdown(door->listener, SHUT_RDWR); /* who waits there is told that nobody is there */
	return NULL;
}

/* ---- opening and closing ---- */

static lshard_status occupied(struct door *door, lshard_error *error, int cause)
{
	const lshard_context *context = door->context;
	char why[300];

	if (cause != EADDRINUSE) {
		lshard__place_reason(&door->place, cause, why, sizeof why);
		return lshard_fail(error, LSHARD_ERR_SYSTEM,
				   "rank %d of job '%s' cannot listen for ranks that come back: %s", (int)context->rank,
				   context->job, why);
	}
	return lshard_fail(
		error, LSHARD_ERR_TIMEOUT,
		"rank %d waited %u ms for its own number in job '%s': another process has it, or a child that "
		"it left behind ('ss -xlp' lists it as %.70s): end it, or choose another job name",
		(int)context->rank, (unsigned)context->timeout_ms, context->job, door->place.name);
}

static lshard_status take_place(struct door *door, lshard_error *error, uint64_t deadline_ns)
{
	for (;;) {
		door->listener = lshard__place_listen(&door->place, deadline_ns);
		if (door->listener >= 0)
			return LSHARD_OK;
		if (errno != EADDRINUSE || !lshard__left_ms(deadline_ns))
			return occupied(door, error, errno);
		poll(NULL, 0, RETRY_MS);
	}
}

lshard_status door_open(struct door *door, const lshard_context *context, lshard_error *error, uint64_t deadline_ns)
{
	lshard_status status;

	*door = (struct door){.context = context, .listener = -1, .stop = -1, .place.directory = -1};
	door->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	door->polled = context->allocate(context, (1 + lshard__pending_polls(context->size)) * sizeof *door->polled);
	if (!lshard__pending_open(&door->pending, context, greeting()) || !door->polled)
		status = lshard_fail(error, LSHARD_ERR_NO_MEMORY, "no memory for the door of rank %d",
				     (int)context->rank);
	else if (door->stop < 0)
		status = lshard_fail(error, LSHARD_ERR_SYSTEM, "eventfd: %s", lshard__reason(errno, 0).text);
	else
		status = open_place(&door->place, context, context->rank, error);
	if (status == LSHARD_OK)
		status = take_place(door, error, deadline_ns);
	if (status != LSHARD_OK)
		door_close(door);
	return status;
}

lshard_status door_start(struct door *door, const struct door_host *host, lshard_error *error)
{
	int failed;

	door->host = *host;
	failed = pthread_create(&door->thread, NULL, serve, door);
	door->started = !failed;
	return failed ? lshard_fail(error, LSHARD_ERR_SYSTEM, "no thread for the door of rank %d: %s",
				    (int)door->context->rank, lshard__reason(failed, 0).text)
		      : LSHARD_OK;
}

void door_stop(struct door *door)
{
	const uint64_t one = 1;
	ssize_t written;

	if (door->stop < 0)
		return;
	written = write(door->stop, &one, sizeof one);
	(void)written; /* it fails only where it is set already */
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* In a child there is no thread, and the place is its parent's. */
void door_close(struct door *door)
{
	const lshard_context *context = door->context;

	if (!context)
		return;
	if (!context->forked(context)) {
		door_stop(door);
		if (door->started)
			pthread_join(door->thread, NULL);
		if (door->listener >= 0)
			lshard__place_leave(&door->place);
	}
	close_fd(&door->listener);
	close_fd(&door->stop);
	lshard__place_close(&door->place);
	lshard__pending_close(&door->pending);
	if (door->polled)
		context->release(context, door->polled);
	*door = (struct door){.listener = -1, .stop = -1};
}

/* ---- the visitor's side ---- */

/* Somebody listens there, and it is not only a child that a rank which has ended left behind. */
static lshard_status connect_to(const lshard_context *context, int32_t rank, int *fd, int *process,
				uint64_t deadline_ns)
{
	lshard_error discarded;
	struct lshard__place place;
	lshard_status status = open_place(&place, context, rank, &discarded);
	uid_t uid = 0;
	int tried;
	pid_t pid;

	if (status != LSHARD_OK)
		return LSHARD_ERR_PEER_FAILED; /* this rank's own place tells why */
	do {                                   /* a full queue (EAGAIN) is waited for, and nobody else */
		status = lshard__socket_connect(place.name, SOCK_SEQPACKET, lshard__now_ns(), fd);
		tried = errno;
	} while (status == LSHARD_ERR_TIMEOUT && tried == EAGAIN && lshard__left_ms(deadline_ns) && !poll(NULL, 0, 1));
	lshard__place_close(&place);
	if (status != LSHARD_OK)
		return tried == ECONNREFUSED || tried == ENOENT ? LSHARD_ERR_PEER_FAILED : status;
	*process = lshard__socket_peer_process(*fd);
	if (!lshard__socket_peer_ended(*process) && !lshard__socket_peer(*fd, &pid, &uid) && uid == geteuid())
		return LSHARD_OK;
	close_fd(process);
	close_fd(fd);
	return LSHARD_ERR_PEER_FAILED;
}

static lshard_status take_packet(const struct door_answer *answer, int process, void *bytes, size_t count,
				 size_t skipped, struct lshard__attached *attached, uint64_t deadline_ns)
{
	for (;;) {
		lshard_status status = lshard__socket_wait(answer->fd, process, POLLIN, deadline_ns);
		ssize_t got;

		if (status != LSHARD_OK)
			return status;
		got = lshard__socket_take(answer->fd, bytes, count, attached);
		if ((got < 0 && (errno == EAGAIN || errno == EINTR)) || (got > 0 && (size_t)got == skipped))
			continue;
		if (got == (ssize_t)count)
			return LSHARD_OK;
		if (got > 0 && attached->descriptor >= 0)
			close(attached->descriptor);
		return got > 0 ? LSHARD_ERR_MISMATCH : LSHARD_ERR_PEER_FAILED;
	}
}

static lshard_status take(const struct door_answer *answer, int process, void *bytes, size_t count,
			  struct lshard__attached *attached, uint64_t deadline_ns)
{
	return take_packet(answer, process, bytes, count, 0, attached, deadline_ns);
}

/* Behind nudges of the rank's mesh, which may have the connection already. */
static lshard_status take_header(struct door_answer *answer, int process, struct header *header, uint64_t deadline_ns)
{
	struct lshard__attached attached;
	lshard_status status = take_packet(answer, process, header, sizeof *header, 1, &attached, deadline_ns);

	if (status == LSHARD_OK && attached.descriptor >= 0)
		close(attached.descriptor);
	if (status != LSHARD_OK)
		return status;
	if (header->magic != LSHARD__HELLO_MAGIC || header->status > 0 || header->descriptors < 0)
		return LSHARD_ERR_MISMATCH;
	answer->pid = header->pid;
	answer->bytes = (size_t)header->bytes;
	answer->n = header->descriptors;
	memcpy(answer->words, header->words, sizeof header->words);
	return (lshard_status)header->status;
}

lshard_status door_ask(const lshard_context *context, int32_t rank, uint64_t token, struct door_answer *answer,
		       lshard_error *error, uint64_t deadline_ns)
{
	const struct lshard__hello hello = {greeting(), token, context->rank, context->size};
	struct header header = {.words = ""};
	int process = -1;
	lshard_status status;

	*answer = (struct door_answer){.fd = -1};
	status = connect_to(context, rank, &answer->fd, &process, deadline_ns);
	if (status == LSHARD_OK)
		status = lshard__socket_send(answer->fd, &hello, sizeof hello, deadline_ns);
	if (status == LSHARD_OK)
		status = take_header(answer, process, &header, deadline_ns);
	close_fd(&process);
	if (status == LSHARD_OK)
		return LSHARD_OK;
	door_leave(answer);
	if (answer->words[0] && header.status < 0)
		return lshard_fail(error, status, "%s", answer->words);
	if (status == LSHARD_ERR_TIMEOUT)
		return lshard_fail(error, status, "rank %d waited %u ms for an answer of rank %d of job '%s'",
				   (int)context->rank, (unsigned)context->timeout_ms, (int)rank, context->job);
	return lshard_fail(error, status, "rank %d: rank %d of job '%s' %s", (int)context->rank, (int)rank,
			   context->job, status == LSHARD_ERR_PEER_FAILED ? "is gone" : "cannot be asked");
}

lshard_status door_hear(const struct door_answer *answer, void *bytes, uint64_t deadline_ns)
{
	lshard_status status = LSHARD_OK;
	struct lshard__attached attached;

	for (size_t at = 0; at < answer->bytes && status == LSHARD_OK; at += PACKET_BYTES) {
		const size_t rest = answer->bytes - at;

		status = take(answer, -1, (char *)bytes + at, rest < PACKET_BYTES ? rest : PACKET_BYTES, &attached,
			      deadline_ns);
		if (status == LSHARD_OK && attached.descriptor >= 0)
			close(attached.descriptor);
	}
	return status;
}

lshard_status door_hear_descriptors(const struct door_answer *answer, int *descriptors, uint64_t deadline_ns)
{
	lshard_status status = LSHARD_OK;
	int32_t count = 0;

	while (count < answer->n && status == LSHARD_OK) {
		struct lshard__attached attached;
		char has = 0;

		status = take(answer, -1, &has, 1, &attached, deadline_ns);
		if (status != LSHARD_OK)
			break;
		descriptors[count++] = attached.descriptor;
		if (has == (attached.descriptor >= 0))
			continue;
		errno = attached.lost ? attached.lost : EINVAL;
		status = LSHARD_ERR_SYSTEM;
	}
	for (int32_t i = 0; i < count && status != LSHARD_OK; i++) {
		const int saved = errno;

		close_fd(&descriptors[i]);
		errno = saved;
	}
	return status;
}

void door_leave(struct door_answer *answer)
{
	close_fd(&answer->fd);
}
