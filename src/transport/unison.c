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

/* The first rank that is gone, does something else, or failed of its own accord, makes all fail alike. */
static lshard_status judge(const struct unison *unison, const char *what, const struct unison_report *mine)
{
	const struct mesh *mesh = unison->control->mesh;
	const struct unison_report *told = NULL;

	for (int32_t rank = 0; rank < mesh->context->size; rank++) {
		const struct unison_report *report = &unison->reports[rank];

		if (!unison->alive[rank])
			return lshard_fail(unison->error, LSHARD_ERR_PEER_FAILED, "%s: rank %d (process %d) is gone",
					   what, (int)rank, (int)mesh->peers[rank].pid);
		if (report->what != mine->what || report->step != mine->step)
			return lshard_fail(unison->error, LSHARD_ERR_MISMATCH,
					   "%s: rank %d makes another call than rank %d", what, (int)rank,
					   (int)mesh->context->rank);
		if (report->status != LSHARD_OK && (!told || (told->echo && !report->echo)))
			told = report;
	}
	if (told)
		return lshard_fail(unison->error, (lshard_status)told->status, "rank %d: %.*s",
				   (int)(told - unison->reports), (int)sizeof told->text, told->text);
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
	mine->status = status;
	if (status != LSHARD_OK)
		snprintf(mine->text, sizeof mine->text, "%.*s", (int)sizeof mine->text - 1, cause.text);
	met = control_exchange(unison->control, mine, unison->reports, sizeof *mine, unison->alive, round, deadline);
	if (met == LSHARD_OK)
		return judge(unison, what, mine);
	if (status == LSHARD_OK)
		return met;
	*unison->error = cause;
	return status;
}
