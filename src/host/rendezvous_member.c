/* SPDX-License-Identifier: Apache-2.0
 *
 * rendezvous_member.c - the other ranks of a rendezvous: each connects to rank 0, says who it is, and stays. So does a
 * rank 0 whose place is taken, to be told by whom.
 */
#include "rendezvous.h"
#include "limit_reason.h"
#include "sockets.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>

lshard_status rendezvous_blocked(lshard__rendezvous *r, int error, lshard_status otherwise, const char *text)
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
		return rendezvous_blocked(r, rank ? 0 : EADDRINUSE, status, late.text);
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
	struct rendezvous_frame frame;
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
	struct lshard__hello hello = {rendezvous_greeting(), 0, r->context->rank, r->context->size};
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
	const enum lshard__listening now = lshard__place_look(&r->place, deadline);

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
	return rendezvous_blocked(r, error, LSHARD_ERR_TIMEOUT, late.text);
}

lshard_status rendezvous_open_member(lshard__rendezvous *r, uint64_t deadline)
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
		rendezvous_close_fd(&r->root);
		rendezvous_close_fd(&r->process);
		poll(NULL, 0, 5);
	}
}

lshard_status rendezvous_challenge(lshard__rendezvous *r, uint64_t deadline)
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
	rendezvous_close_fd(&r->process);
	return status == LSHARD_ERR_PEER_FAILED ? LSHARD_IN_PROGRESS : status;
}

lshard_status rendezvous_member_allgather(lshard__rendezvous *r, const void *send, void *receive, size_t bytes,
					  uint64_t deadline)
{
	struct rendezvous_frame frame = {LSHARD__HELLO_MAGIC, LSHARD_OK, bytes};
	lshard_status status = lshard__socket_send(r->root, &frame, sizeof frame, deadline);

	if (status == LSHARD_OK)
		status = lshard__socket_send(r->root, send, bytes, deadline);
	if (status == LSHARD_ERR_TIMEOUT || status == LSHARD_ERR_SYSTEM)
		return no_answer(r, status);
	return hear_root(r, r->root, receive, bytes * (size_t)r->context->size, deadline);
}
