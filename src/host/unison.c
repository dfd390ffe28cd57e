/* SPDX-License-Identifier: Apache-2.0
 *
 * unison.c - see unison.h.
 */
#include "unison.h"
#include "text_hash.h"

#include <stdio.h>

lshard_status unison_make(struct unison *unison, const lshard_context *context, struct control *control,
			  lshard_error *error)
{
	const size_t size = (size_t)context->size;

	*unison = (struct unison){.control = control, .error = error};
	unison->reports = context->allocate(context, size * sizeof *unison->reports);
	unison->alive = context->allocate(context, size);
	if (unison->reports && unison->alive)
		return LSHARD_OK;
	unison_free(unison, context);
	return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "no memory for the reports of %d ranks", (int)context->size);
}

void unison_free(struct unison *unison, const lshard_context *context)
{
	if (unison->alive)
		context->release(context, unison->alive);
	if (unison->reports)
		context->release(context, unison->reports);
	*unison = (struct unison){.control = NULL};
}

static lshard_status fail_gone(const struct unison *unison, const char *what, struct lshard__verdict *verdict)
{
	if (verdict->ranks.count == 1)
		return lshard_fail(unison->error, LSHARD_ERR_PEER_FAILED, "%s: rank %d (process %d) is gone", what,
				   (int)verdict->rank, (int)unison->control->mesh->peers[verdict->rank].pid);
	return lshard_fail(unison->error, LSHARD_ERR_PEER_FAILED, "%s: %s are gone", what,
			   lshard__ranks_text(&verdict->ranks));
}

/* What the reports say makes all fail alike. */
static lshard_status judge(const struct unison *unison, const char *what)
{
	const lshard_context *context = unison->control->mesh->context;
	const struct lshard__records records = {.first = unison->reports,
						.bytes = sizeof *unison->reports,
						.call_bytes = offsetof(struct unison_report, body) -
							      sizeof(struct lshard__record),
						.size = context->size,
						.rank = context->rank,
						.alive = unison->alive};
	struct lshard__verdict verdict = lshard__judge(&records);

	switch (verdict.finding) {
	case LSHARD__ELSEWHERE:
		return lshard_fail(unison->error, LSHARD_ERR_MISMATCH, "%s: %s %s in another call than rank %d", what,
				   lshard__ranks_text(&verdict.ranks), lshard__ranks_are(&verdict.ranks),
				   (int)context->rank);
	case LSHARD__FAILED:
		return lshard_fail(unison->error, (lshard_status)verdict.status, "rank %d: %.*s", (int)verdict.rank,
				   (int)sizeof unison->reports->text, unison->reports[verdict.rank].text);
	case LSHARD__MISSING:
		return fail_gone(unison, what, &verdict);
	case LSHARD__AGREED:
		break;
	}
	return LSHARD_OK;
}

lshard_status unison_agree(struct unison *unison, const char *what, struct unison_report *mine, lshard_status status,
			   uint64_t *round, uint64_t deadline)
{
	const lshard_error cause = *unison->error;
	lshard_status met;

	if (status == LSHARD_ERR_ABORTED)
		return status; /* the others see this rank as gone */
	mine->what = lshard__text_hash(what);
	mine->record = (struct lshard__record){status, mine->record.echo || lshard__record_of(status).echo};
	if (status != LSHARD_OK)
		snprintf(mine->text, sizeof mine->text, "%.*s", (int)sizeof mine->text - 1, cause.text);
	met = control_exchange(unison->control, mine, unison->reports, sizeof *mine, unison->alive, round, deadline);
	if (met == LSHARD_OK)
		return judge(unison, what);
	if (status == LSHARD_OK)
		return met;
	*unison->error = cause;
	return status;
}

lshard_status unison_open(struct unison *unison, struct unison_opening *opening)
{
	uint64_t round = 0;
	lshard_status status;

	opening->report.step = 1;
	status = unison_agree(unison, opening->what, &opening->report, opening->make(opening), &round,
			      opening->deadline);
	if (status != LSHARD_OK)
		return status;
	status = opening->take(opening, round);
	/* The time is up for one rank only: give it some to say so, or the others would wait for it. */
	if (status == LSHARD_ERR_TIMEOUT)
		opening->deadline += 1000000000u;
	opening->report.step = 2;
	return unison_agree(unison, opening->what, &opening->report, status, NULL, opening->deadline);
}
