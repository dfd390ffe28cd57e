/* SPDX-License-Identifier: Apache-2.0
 *
 * rendezvous.c - how separately started ranks of one host and user find each other by a job's name.
 * Knows ranks and sockets; knows no transport. Threads of one process may as well.
 *
 * Rank 0 listens at the place of the job (rendezvous_place.h); the others connect to it, say who they are, and stay.
 * Once all have come the listener is closed. An allgather goes through rank 0. Whatever goes wrong at rank 0 is told to
 * all others in its own words, so that every rank's message names the cause.
 */
#include "rendezvous.h"
#include "sockets.h"

#include <stdio.h>

static int allgather(void *user, const void *send, void *receive, size_t bytes)
{
	lshard__rendezvous *r = user;
	uint64_t deadline = lshard__deadline_ns(r->context->timeout_ms);

	if (r->context->rank == 0)
		r->failure = rendezvous_root_allgather(r, send, receive, bytes, deadline);
	else
		r->failure = rendezvous_member_allgather(r, send, receive, bytes, deadline);
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
	if (lshard__pending_open(&r->pending, context, rendezvous_greeting()) && r->members && r->polled)
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
		status = context->rank ? rendezvous_open_member(r, deadline) : rendezvous_open_root(r, deadline);
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
	rendezvous_stop_listening(r);
	lshard__place_close(&r->place);
	rendezvous_close_fd(&r->root);
	rendezvous_close_fd(&r->process);
	for (int32_t rank = 1; r->members && rank < r->context->size; rank++) {
		rendezvous_close_fd(&r->members[rank].fd);
		rendezvous_close_fd(&r->members[rank].process);
	}
	lshard__pending_close(&r->pending);
	if (r->polled)
		r->context->release(r->context, r->polled);
	if (r->members)
		r->context->release(r->context, r->members);
	r->context->release(r->context, r);
}
