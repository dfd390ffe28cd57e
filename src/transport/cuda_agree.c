/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_agree.c - ranks that open something together: all have it, or none, and all hear why. Knows the control channel;
 * knows nothing of what is opened.
 */
#include "cuda_transport.h"
#include "text_hash.h"

#include <stdio.h>
#include <string.h>

/* The first rank that is gone, does something else, or failed of its own accord, makes all fail alike. */
static lshard_status judge(struct cuda *cuda, const char *what, const struct cuda_report *mine)
{
	const lshard_context *context = cuda->base.context;
	lshard_error *error = &cuda->base.error;
	const struct cuda_report *told = NULL;

	for (int32_t rank = 0; rank < context->size; rank++) {
		const struct cuda_report *report = &cuda->reports[rank];

		if (!cuda->alive[rank])
			return lshard_fail(error, LSHARD_ERR_PEER_FAILED, "%s: rank %d (process %d) is gone", what,
					   (int)rank, (int)cuda->mesh.peers[rank].pid);
		if (report->what != mine->what || report->step != mine->step)
			return lshard_fail(error, LSHARD_ERR_MISMATCH, "%s: rank %d makes another call than rank %d",
					   what, (int)rank, (int)context->rank);
		if (report->status != LSHARD_OK && (!told || (told->echo && !report->echo)))
			told = report;
	}
	if (told)
		return lshard_fail(error, (lshard_status)told->status, "rank %d: %.*s", (int)(told - cuda->reports),
				   (int)sizeof told->text, told->text);
	return LSHARD_OK;
}

lshard_status cuda_agree(struct cuda *cuda, const char *what, struct cuda_report *mine, lshard_status status,
			 uint64_t *round, uint64_t deadline)
{
	const lshard_error cause = cuda->base.error;
	lshard_status met;

	if (status == LSHARD_ERR_ABORTED)
		return status; /* the others see this rank as gone */
	mine->what = lshard__text_hash(what);
	mine->status = status;
	if (status != LSHARD_OK)
		snprintf(mine->text, sizeof mine->text, "%.*s", (int)sizeof mine->text - 1, cause.text);
	met = control_exchange(&cuda->control, mine, cuda->reports, sizeof *mine, cuda->alive, round, deadline);
	if (met == LSHARD_OK)
		return judge(cuda, what, mine);
	if (status == LSHARD_OK)
		return met;
	cuda->base.error = cause;
	return status;
}
