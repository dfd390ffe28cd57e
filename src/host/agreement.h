/* SPDX-License-Identifier: Apache-2.0
 *
 * agreement.h - ranks that open something together: all have it, or none, and all hear why.
 * Knows the control channel, or another transport that the ranks hear each other by; knows nothing of what is opened.
 */
#ifndef LAYERSHARD_AGREEMENT_H
#define LAYERSHARD_AGREEMENT_H

#include "control.h"
#include "verdict.h"

#define AGREEMENT_BODY_BYTES 160

/* What every rank says at each step of an opening. */
struct agreement_report {
	struct lshard__outcome outcome;
	uint64_t what; /* hash of the name of what is opened: ranks open in the same order */
	int64_t step;
	unsigned char body[AGREEMENT_BODY_BYTES];
	char text[400];
};

struct agreement {
	const lshard_context *context;
	struct control *control;          /* among processes of a host */
	lshard_transport *over;           /* or, not NULL: the transport whose exchange is taken instead */
	lshard_error *error;              /* of the transport */
	struct agreement_report *reports; /* [size] of the last agreement */
	uint8_t *alive;                   /* [size] */
	bool may_miss;                    /* of the others some may be gone */
};

/* Tables: there also when there is no memory left for what is opened. Local. On failure nothing is left. */
lshard_status agreement_make(struct agreement *agreement, const lshard_context *context, struct control *control,
			     lshard_error *error);
void agreement_free(struct agreement *agreement, const lshard_context *context);

/*
 * An exchange by whichever there is; see lshard_transport_ops.exchange. @p round: as control_exchange; 0 over a
 * transport, which has a deadline of its own, too.
 */
lshard_status agreement_gather(struct agreement *agreement, const void *send, void *receive, size_t bytes,
			       uint8_t *alive, uint64_t *round, uint64_t deadline);

/*
 * Exchange reports with the others; all go on or all fail alike, with the text of the first rank that failed. @p mine:
 * step, echo and body. @p status and the transport's error: how this rank fared. All ranks' reports are left in
 * agreement->reports. @p round: as control_exchange.
 */
lshard_status agreement_exchange(struct agreement *agreement, const char *what, struct agreement_report *mine,
				 lshard_status status, uint64_t *round, uint64_t deadline);

/* Something that takes two steps; the first member of a struct that knows more. */
struct agreement_opening {
	const char *what;
	uint64_t deadline;
	struct agreement_report report;                                           /* as agreement_exchange's @p mine */
	lshard_status (*make)(struct agreement_opening *opening);                 /* what this rank gives */
	lshard_status (*take)(struct agreement_opening *opening, uint64_t round); /* what the others give */
};

/* Make and take, each on all ranks or none. A failed step leaves its text in the transport's error. */
lshard_status agreement_open(struct agreement *agreement, struct agreement_opening *opening);

#endif
