/* SPDX-License-Identifier: Apache-2.0
 *
 * verdict.c - see verdict.h.
 */
#include "verdict.h"

#include <layershard/layershard.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

/* ---- Names ----------------------------------------------------------------------------------------------------- */

void lshard__ranks_add(struct lshard__ranks *ranks, int32_t rank)
{
	if (ranks->count < LSHARD__RANKS_NAMED)
		ranks->named[ranks->count] = rank;
	ranks->count++;
}

struct lshard__ranks lshard__ranks_absent(const uint8_t *alive, int32_t size)
{
	struct lshard__ranks absent = {0};

	for (int32_t rank = 0; rank < size; rank++)
		if (!alive[rank])
			lshard__ranks_add(&absent, rank);
	return absent;
}

const char *lshard__ranks_text(struct lshard__ranks *ranks)
{
	const size_t room = sizeof ranks->text;
	size_t used = (size_t)snprintf(ranks->text, room, "%s",
				       ranks->count == 0  ? "no rank"
				       : ranks->count > 1 ? "ranks"
							  : "rank");

	for (int32_t index = 0; index < ranks->count && index < LSHARD__RANKS_NAMED; index++)
		used += (size_t)snprintf(ranks->text + used, room - used, "%s %d", index ? "," : "",
					 (int)ranks->named[index]);
	if (ranks->count > LSHARD__RANKS_NAMED)
		snprintf(ranks->text + used, room - used, " and %d more", (int)(ranks->count - LSHARD__RANKS_NAMED));
	return ranks->text;
}

/* ---- Records --------------------------------------------------------------------------------------------------- */

struct lshard__outcome lshard__outcome_of(int32_t status)
{
	return (struct lshard__outcome){.status = status, .echo = status == LSHARD_ERR_PEER_FAILED};
}

static const unsigned char *record_of(const struct lshard__record_set *set, int32_t rank)
{
	return (const unsigned char *)set->first + (size_t)rank * set->bytes;
}

static bool is_here(const struct lshard__record_set *set, int32_t rank)
{
	return !set->alive || set->alive[rank];
}

static bool is_elsewhere(const struct lshard__record_set *set, int32_t rank)
{
	const size_t head = sizeof(struct lshard__outcome);

	return memcmp(record_of(set, rank) + head, record_of(set, set->rank) + head, set->call_bytes) != 0;
}

/* What is to be said of one rank. @p echoes: failures that came of others count too. */
static enum lshard__finding find(const struct lshard__record_set *set, int32_t rank, bool echoes)
{
	struct lshard__outcome outcome;

	if (!is_here(set, rank))
		return LSHARD__MISSING;
	if (is_elsewhere(set, rank))
		return LSHARD__ELSEWHERE;
	memcpy(&outcome, record_of(set, rank), sizeof outcome);
	if (outcome.status < 0 && (echoes || !outcome.echo))
		return LSHARD__FAILED;
	return LSHARD__AGREED;
}

/* True if there is a rank of which @p finding is to be said. */
static bool collect(const struct lshard__record_set *set, enum lshard__finding finding, bool echoes,
		    struct lshard__verdict *verdict)
{
	struct lshard__outcome outcome;

	*verdict = (struct lshard__verdict){.finding = finding, .rank = -1};
	for (int32_t rank = 0; rank < set->size; rank++)
		if (find(set, rank, echoes) == finding)
			lshard__ranks_add(&verdict->ranks, rank);
	if (verdict->ranks.count == 0)
		return false;
	verdict->rank = verdict->ranks.named[0];
	memcpy(&outcome, record_of(set, verdict->rank), sizeof outcome);
	verdict->status = finding == LSHARD__FAILED ? outcome.status : 0;
	verdict->echo = finding == LSHARD__FAILED && echoes;
	return true;
}

struct lshard__verdict lshard__evaluate(const struct lshard__record_set *set)
{
	struct lshard__verdict verdict;

	if (collect(set, LSHARD__ELSEWHERE, true, &verdict) ||
	    (!set->may_miss && collect(set, LSHARD__MISSING, true, &verdict)) ||
	    collect(set, LSHARD__FAILED, false, &verdict) || collect(set, LSHARD__FAILED, true, &verdict))
		return verdict;
	return (struct lshard__verdict){.finding = LSHARD__AGREED, .rank = -1};
}

int32_t lshard__first_differing(const struct lshard__record_set *set, size_t offset, size_t bytes)
{
	for (int32_t rank = 1; rank < set->size; rank++)
		if (is_here(set, rank) && memcmp(record_of(set, rank) + offset, record_of(set, 0) + offset, bytes) != 0)
			return rank;
	return -1;
}
