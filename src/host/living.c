/* SPDX-License-Identifier: Apache-2.0
 *
 * living.c - see living.h.
 */
#include "living.h"
#include "outside.h"
#include "sockets.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define ANSWER_MS 1000 /* of one rank, which may be stopped, before the next is asked */

struct living_words living_words_of(const lshard_context *context, const char *transport)
{
	struct living_words words = {.memory = (int32_t)context->memory,
				     .large_pages = (int32_t)context->large_pages,
				     .numa = (int32_t)context->numa,
				     .large_page_bytes = context->large_page_bytes};

	snprintf(words.transport, sizeof words.transport, "%s", transport);
	snprintf(words.options, sizeof words.options, "%.*s", (int)sizeof words.options - 1, context->options);
	return words;
}

static lshard_status hear(struct lshard__living *living, const struct door_answer *answer, lshard_error *error,
			  uint64_t deadline_ns)
{
	lshard_status status = LSHARD_ERR_MISMATCH;

	memcpy(&living->words, answer->words, sizeof living->words);
	living->words.transport[sizeof living->words.transport - 1] = 0;
	living->words.options[sizeof living->words.options - 1] = 0;
	if (answer->bytes == 0 && answer->n == 1)
		status = door_hear_descriptors(answer, &living->page, deadline_ns);
	if (status == LSHARD_OK)
		return LSHARD_OK;
	return lshard_fail(error, status, "rank %d: what rank %d of job '%s' says of its group does not come whole",
			   (int)living->context->rank, (int)living->rank, living->context->job);
}

static lshard_status ask(struct lshard__living *living, int32_t rank, lshard_error *error)
{
	const uint64_t deadline_ns = lshard__deadline_ns(ANSWER_MS);
	struct door_answer answer;
	lshard_status status = door_ask(living->context, rank, door_token(ASK_GROUP, 0), &answer, error, deadline_ns);

	living->rank = rank;
	if (status == LSHARD_OK)
		status = hear(living, &answer, error, deadline_ns);
	door_leave(&answer);
	return status;
}

/* PEER_FAILED: nobody lives. TIMEOUT: somebody may, and does not answer. */
static lshard_status ask_all(struct lshard__living *living, lshard_error *error)
{
	lshard_status found = LSHARD_ERR_PEER_FAILED;
	lshard_error why;

	for (int32_t rank = 0; rank < living->context->size; rank++) {
		const lshard_status status = rank == living->context->rank ? found : ask(living, rank, &why);

		if (status == LSHARD_OK)
			return status;
		if (status == found)
			continue;
		found = status;
		*error = why;
		if (status != LSHARD_ERR_TIMEOUT)
			return status;
	}
	return found;
}

lshard_status lshard__living_find(const lshard_context *context, struct lshard__living **living, lshard_error *error)
{
	const uint64_t deadline_ns = lshard__deadline_ns(context->timeout_ms);
	struct lshard__living *found = context->allocate(context, sizeof *found);
	lshard_status status;

	*living = NULL;
	if (!found)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "rank %d: no memory to look for its group",
				   (int)context->rank);
	*found = (struct lshard__living){.context = context, .page = -1};
	do
		status = ask_all(found, error);
	while (status == LSHARD_ERR_TIMEOUT && lshard__left_ms(deadline_ns));
	if (status == LSHARD_OK) {
		*living = found;
		return LSHARD_OK;
	}
	lshard__living_close(found);
	return status == LSHARD_ERR_PEER_FAILED ? LSHARD_OK : status;
}

void lshard__living_close(struct lshard__living *living)
{
	if (!living)
		return;
	if (living->page >= 0)
		close(living->page);
	living->context->release(living->context, living);
}
