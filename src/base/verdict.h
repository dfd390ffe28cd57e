/* SPDX-License-Identifier: Apache-2.0
 *
 * verdict.h - what the ranks' records say together: who is missing, who is in another call, whose failure counts; and
 * how ranks are named in messages. All who let ranks agree on something evaluate by it, so every rank comes to the
 * same end. Pure: knows records and ranks; knows nothing of how records travel, nor what they are about.
 */
#ifndef LAYERSHARD_VERDICT_H
#define LAYERSHARD_VERDICT_H

#include <stddef.h>
#include <stdint.h>

/* ---- Names ----------------------------------------------------------------------------------------------------- */

#define LSHARD__RANKS_NAMED 16

/* A set of ranks for a message; begins as {0}. */
struct lshard__ranks {
	int32_t count;
	int32_t named[LSHARD__RANKS_NAMED]; /* the first of them */
	char text[192];
};

void lshard__ranks_add(struct lshard__ranks *ranks, int32_t rank);
/* Those of the @p size ranks whose alive[] is 0. */
struct lshard__ranks lshard__ranks_absent(const uint8_t *alive, int32_t size);
/* "rank 2", "ranks 2, 5", "ranks 2, 5, ... and 3 more"; "no rank". Lives in the set, until the next is added. */
const char *lshard__ranks_text(struct lshard__ranks *ranks);

/* The verb that goes with it: rank 2 "is" gone, ranks 2, 5 "are". */
static inline const char *lshard__ranks_are(const struct lshard__ranks *ranks)
{
	return ranks->count > 1 ? "are" : "is";
}

/* ---- Records --------------------------------------------------------------------------------------------------- */

/* What every record begins with. Behind it stand the bytes that are the same on all ranks in the same call. */
struct lshard__outcome {
	int32_t status; /* how the rank fared: an lshard_status */
	int32_t echo;   /* 1: of a failure elsewhere, which tells more */
};

/* Of a rank that fared so. That it has lost another rank is an echo: it lives, and may itself have heard it said. */
struct lshard__outcome lshard__outcome_of(int32_t status);

/* One record of each rank. */
struct lshard__record_set {
	const void *first;    /* [size] structs that begin with a struct lshard__outcome */
	size_t bytes;         /* of each */
	size_t call_bytes;    /* behind its beginning: the call */
	int32_t size;         /* ranks */
	int32_t rank;         /* this one */
	const uint8_t *alive; /* [size]; the record of a rank that is not means nothing; NULL: all are */
	int may_miss;         /* 1: all that live are enough, and MISSING is never found */
};

enum lshard__finding { LSHARD__AGREED, LSHARD__ELSEWHERE, LSHARD__FAILED, LSHARD__MISSING };

struct lshard__verdict {
	enum lshard__finding finding;
	int32_t status;             /* FAILED: that of the rank that counts */
	int32_t rank;               /* the one that counts; -1: none */
	int32_t echo;               /* FAILED: 1: none failed of its own accord */
	struct lshard__ranks ranks; /* all that were found so */
};

/*
 * The first of these that there is: ranks in another call than this one; ranks that are missing, of which what others
 * failed in may have come; ranks that failed of their own accord; ranks that failed because of another's failure.
 */
struct lshard__verdict lshard__evaluate(const struct lshard__record_set *set);

/* The first living rank whose @p bytes at @p offset of the record differ from those of rank 0; -1: none. */
int32_t lshard__first_differing(const struct lshard__record_set *set, size_t offset, size_t bytes);

#endif
