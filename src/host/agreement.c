/* SPDX-License-Identifier: Apache-2.0
 *
 * agreement.c - see agreement.h.
 */
#include "agreement.h"
#include "text_hash.h"

#include <stdio.h>

lshard_status agreement_make(struct agreement *agreement, const lshard_context *context, struct control *control,
			     lshard_error *error)
{
	const size_t size = (size_t)context->size;

	*agreement = (struct agreement){.context = context, .control = control, .error = error};
	agreement->reports = context->allocate(context, size * sizeof *agreement->reports);
	agreement->alive = context->allocate(context, size);
	if (agreement->reports && agreement->alive)
		return LSHARD_OK;
	agreement_free(agreement, context);
	return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "no memory for the reports of %d ranks", (int)context->size);
}

void agreement_free(struct agreement *agreement, const lshard_context *context)
{
	if (agreement->alive)
		context->release(context, agreement->alive);
	if (agreement->reports)
		context->release(context, agreement->reports);
	*agreement = (struct agreement){.control = NULL};
}

static lshard_status fail_gone(const struct agreement *agreement, const char *what, struct lshard__verdict *verdict)
{
	if (verdict->ranks.count == 1 && !agreement->over)
		return lshard_fail(agreement->error, LSHARD_ERR_PEER_FAILED, "%s: rank %d (process %d) is gone", what,
				   (int)verdict->rank, (int)agreement->control->mesh->peers[verdict->rank].pid);
	return lshard_fail(agreement->error, LSHARD_ERR_PEER_FAILED, "%s: %s %s gone", what,
			   lshard__ranks_text(&verdict->ranks), lshard__ranks_are(&verdict->ranks));
}

/* What the reports say makes all fail alike. */
static lshard_status evaluate(const struct agreement *agreement, const char *what)
{
	const lshard_context *context = agreement->context;
	const struct lshard__record_set set = {.first = agreement->reports,
					       .bytes = sizeof *agreement->reports,
					       .call_bytes = offsetof(struct agreement_report, body) -
							     sizeof(struct lshard__outcome),
					       .size = context->size,
					       .rank = context->rank,
					       .alive = agreement->alive,
					       .may_miss = agreement->may_miss};
	struct lshard__verdict verdict = lshard__evaluate(&set);

	switch (verdict.finding) {
	case LSHARD__ELSEWHERE:
		return lshard_fail(agreement->error, LSHARD_ERR_MISMATCH, "%s: %s %s in another call than rank %d",
				   what, lshard__ranks_text(&verdict.ranks), lshard__ranks_are(&verdict.ranks),
				   (int)context->rank);
	case LSHARD__FAILED:
		return lshard_fail(agreement->error, (lshard_status)verdict.status, "rank %d: %.*s", (int)verdict.rank,
				   (int)sizeof agreement->reports->text, agreement->reports[verdict.rank].text);
	case LSHARD__MISSING:
		return fail_gone(agreement, what, &verdict);
	case LSHARD__AGREED:
		break;
	}
	return LSHARD_OK;
}

lshard_status agreement_gather(struct agreement *agreement, const void *send, void *receive, size_t bytes,
			       uint8_t *alive, uint64_t *round, uint64_t deadline)
{
	lshard_transport *over = agreement->over;
	lshard_status status;

	if (!over)
		return control_exchange(agreement->control, send, receive, bytes, alive, round, deadline);
	status = over->ops->exchange(over, send, receive, bytes, alive);
	return status == LSHARD_OK ? status : lshard_fail(agreement->error, status, "%s", over->error.text);
}

lshard_status agreement_exchange(struct agreement *agreement, const char *what, struct agreement_report *mine,
				 lshard_status status, uint64_t *round, uint64_t deadline)
{
	const lshard_error cause = *agreement->error;
	lshard_status agreed;

	if (status == LSHARD_ERR_ABORTED)
		return status; /* the others see this rank as gone */
	mine->what = lshard__text_hash(what);
	mine->outcome = (struct lshard__outcome){status, mine->outcome.echo || lshard__outcome_of(status).echo};
	if (status != LSHARD_OK)
		snprintf(mine->text, sizeof mine->text, "%.*s", (int)sizeof mine->text - 1, cause.text);
	agreed = agreement_gather(agreement, mine, agreement->reports, sizeof *mine, agreement->alive, round, deadline);
	if (agreed == LSHARD_OK)
		return evaluate(agreement, what);
	if (status == LSHARD_OK || (mine->outcome.echo && agreed == LSHARD_ERR_PEER_FAILED))
		return agreed;
	*agreement->error = cause;
	return status;
}

lshard_status agreement_open(struct agreement *agreement, struct agreement_opening *opening)
{
	uint64_t round = 0;
	lshard_status status;

	opening->report.step = 1;
	status = agreement_exchange(agreement, opening->what, &opening->report, opening->make(opening), &round,
				    opening->deadline);
	if (status != LSHARD_OK)
		return status;
	status = opening->take(opening, round);
	/* The time is up for one rank only: give it some to say so, or the others would wait for it. */
	if (status == LSHARD_ERR_TIMEOUT)
		opening->deadline += 1000000000u;
	opening->report.step = 2;
	return agreement_exchange(agreement, opening->what, &opening->report, status, NULL, opening->deadline);
}
