/* SPDX-License-Identifier: Apache-2.0
 *
 * unison.h - ranks that open something together: all have it, or none, and all hear why.
 * Knows the control channel; knows nothing of what is opened.
 */
#ifndef LAYERSHARD_UNISON_H
#define LAYERSHARD_UNISON_H

#include "control.h"
#include "verdict.h"

#define UNISON_BODY_BYTES 112

/* What every rank says at each step of an opening. */
struct unison_report {
	struct lshard__record record;
	uint64_t what; /* hash of the name of what is opened: ranks open in the same order */
	int64_t step;
	unsigned char body[UNISON_BODY_BYTES];
	char text[400];
};

struct unison {
	struct control *control;
	lshard_error *error;           /* of the transport */
	struct unison_report *reports; /* [size] of the last agreement */
	uint8_t *alive;                /* [size] */
};

/* Tables: there also when there is no memory left for what is opened. Local. On failure nothing is left. */
lshard_status unison_make(struct unison *unison, const lshard_context *context, struct control *control,
			  lshard_error *error);
void unison_free(struct unison *unison, const lshard_context *context);

/*
 * Meet the others; all go on or all fail alike, with the text of the first rank that failed. @p mine: step, echo and
 * body. @p status and the transport's error: how this rank fared. All ranks' reports are left in unison->reports.
 * @p round: as control_exchange.
 */
lshard_status unison_agree(struct unison *unison, const char *what, struct unison_report *mine, lshard_status status,
			   uint64_t *round, uint64_t deadline);

/* Something that takes two steps; the first member of a struct that knows more. */
struct unison_opening {
	const char *what;
	uint64_t deadline;
	struct unison_report report;                                           /* as unison_agree's @p mine */
	lshard_status (*make)(struct unison_opening *opening);                 /* what this rank gives */
	lshard_status (*take)(struct unison_opening *opening, uint64_t round); /* what the others give */
};

/* Make and take, each on all ranks or none. A failed step leaves its text in the transport's error. */
lshard_status unison_open(struct unison *unison, struct unison_opening *opening);

#endif
