/* SPDX-License-Identifier: Apache-2.0
 *
 * gathering.c - see gathering.h. Everything goes in frames of one size, so that the frame of a rank that is at its end
 * fits to those of ranks that are in the middle of something.
 */
#include "gathering.h"
#include "verdict.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

#define PAYLOAD_BYTES 400u

struct gathering_frame {
	struct lshard__outcome outcome;
	uint64_t bytes; /* of what is gathered; the end: ALL_DONE */
	char payload[PAYLOAD_BYTES];
};

#define ALL_DONE UINT64_MAX

static struct gathering_frame *own_frame(const struct gathering *gathering)
{
	return &gathering->frames[gathering->context->size];
}

/* ---- One frame of each rank ------------------------------------------------------------------------------------ */

static lshard_status end(struct gathering *gathering, lshard_status status, int32_t rank, const char *text)
{
	gathering->ended = lshard_fail(&gathering->why, status, "rank %d: %.*s", (int)rank, (int)PAYLOAD_BYTES, text);
	return status;
}

static lshard_status evaluate(struct gathering *gathering)
{
	const struct lshard__record_set set = {.first = gathering->frames,
					       .bytes = sizeof *gathering->frames,
					       .size = gathering->context->size,
					       .rank = gathering->context->rank};
	const struct lshard__verdict verdict = lshard__evaluate(&set);
	const int32_t other =
		lshard__first_differing(&set, offsetof(struct gathering_frame, bytes), sizeof gathering->frames->bytes);

	if (verdict.finding == LSHARD__FAILED)
		return end(gathering, (lshard_status)verdict.status, verdict.rank,
			   gathering->frames[verdict.rank].payload);
	if (other >= 0)
		return end(gathering, LSHARD_ERR_MISMATCH, other,
			   "it is at another step of opening the transport than rank 0");
	return LSHARD_OK;
}

static lshard_status exchange(struct gathering *gathering)
{
	const lshard_bootstrap *bootstrap = gathering->context->bootstrap;
	const int failed = bootstrap->allgather(bootstrap->user, own_frame(gathering), gathering->frames,
						sizeof *gathering->frames);

	if (!failed)
		return evaluate(gathering);
	gathering->ended =
		lshard_fail(&gathering->why, LSHARD_ERR_TRANSPORT, "the bootstrap's all-gather returned %d", failed);
	return gathering->ended;
}

/* ---- Gathers --------------------------------------------------------------------------------------------------- */

static int gather(void *user, const void *send, void *receive, size_t bytes)
{
	struct gathering *gathering = user;
	size_t part;

	for (size_t done = 0; done < bytes && gathering->ended == LSHARD_OK; done += part) {
		part = bytes - done < PAYLOAD_BYTES ? bytes - done : PAYLOAD_BYTES;
		*own_frame(gathering) = (struct gathering_frame){.bytes = bytes};
		memcpy(own_frame(gathering)->payload, (const char *)send + done, part);
		if (exchange(gathering) != LSHARD_OK)
			break;
		for (int32_t rank = 0; rank < gathering->context->size; rank++)
			memcpy((char *)receive + (size_t)rank * bytes + done, gathering->frames[rank].payload, part);
	}
	return gathering->ended;
}

lshard_status gathering_open(struct gathering *gathering, const lshard_context *context, lshard_error *error)
{
	*gathering = (struct gathering){.context = context, .bootstrap = {sizeof(lshard_bootstrap), gather, gathering}};
	gathering->frames = context->allocate(context, ((size_t)context->size + 1) * sizeof *gathering->frames);
	if (gathering->frames)
		return LSHARD_OK;
	return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "no memory to gather the answers of %d ranks",
			   (int)context->size);
}

void gathering_close(struct gathering *gathering)
{
	if (gathering->frames)
		gathering->context->release(gathering->context, gathering->frames);
	gathering->frames = NULL;
}

/* What comes of another rank's end: that one tells more. */
static int is_echo(lshard_status status)
{
	return status == LSHARD_ERR_PEER_FAILED || status == LSHARD_ERR_TIMEOUT || status == LSHARD_ERR_TRANSPORT;
}

lshard_status gathering_conclude(struct gathering *gathering, lshard_status opened, lshard_error *error)
{
	struct gathering_frame *mine = own_frame(gathering);

	if (gathering->ended == LSHARD_OK) {
		*mine = (struct gathering_frame){.outcome = {opened, is_echo(opened)}, .bytes = ALL_DONE};
		if (opened < 0)
			snprintf(mine->payload, sizeof mine->payload, "%.*s", (int)sizeof mine->payload - 1,
				 error->text);
		(void)exchange(gathering);
	}
	if (gathering->ended == LSHARD_OK || (opened < 0 && !is_echo(opened)))
		return opened;
	if (opened == LSHARD_OK || gathering->ended != LSHARD_ERR_TRANSPORT) {
		*error = gathering->why;
		return gathering->ended;
	}
	return opened;
}
