/* SPDX-License-Identifier: Apache-2.0
 *
 * process_group.h - where the threads of one process that are ranks of one group talk: an all-gather among the living,
 * and the book of what each rank has asked for where all of them must ask for the same. Knows ranks and time; knows no
 * bytes of layers.
 */
#ifndef LAYERSHARD_PROCESS_GROUP_H
#define LAYERSHARD_PROCESS_GROUP_H

#include "clock.h"

#include <layershard/transport.h>
#include <stdbool.h>

#define LSHARD__PROCESS_GROUP_TAG_BYTES 64

struct lshard__process_group;

/*
 * Join the others through context->bootstrap. Collective. @p tag is a text that must be the same on all ranks (MISMATCH
 * names who has another one); @p ready is 0 if this rank must give up: then all do.
 */
lshard_status lshard__process_group_join(const lshard_context *context, const char *tag, bool ready,
					 struct lshard__process_group **group, lshard_error *error);
/* This rank is gone; the last one frees the in-process group. */
void lshard__process_group_leave(struct lshard__process_group *group, int32_t rank);
/* In a child by fork: a rank's copy is not used any more; the last one frees its memory. */
void lshard__process_group_drop(struct lshard__process_group *group);
/* This rank is gone for the others, and all its calls return ABORTED. Any thread. */
void lshard__process_group_abort(struct lshard__process_group *group, int32_t rank);

/* What one rank gives to an exchange, as lshard_transport_ops.exchange says. Ranks with another kind or size:
 * OUT_OF_STEP for all. */
struct lshard__process_group_offer {
	uint32_t kind;
	const void *send;
	void *receive;
	size_t bytes;
	uint8_t *alive;
};

lshard_status lshard__process_group_exchange(struct lshard__process_group *group, int32_t rank,
					     const struct lshard__process_group_offer *offer, lshard_error *error);

/* A transfer that all ranks take part in: number @p sequence in the order of the group. Sequences of a rank only grow.
 */
struct lshard__process_group_post {
	uint64_t sequence;
	uint32_t store;
	uint32_t position;
	uint64_t posted_ns;
};

/*
 * Make room in the book for @p posts more of this rank that it has not waited for yet. Before the first post. False:
 * there is no memory; nothing has changed.
 */
bool lshard__process_group_reserve(struct lshard__process_group *group, int32_t rank, uint32_t posts);
/* They will not be made any more. */
void lshard__process_group_unreserve(struct lshard__process_group *group, int32_t rank, uint32_t posts);

/* That of a call that begins now. */
uint64_t lshard__process_group_deadline(const struct lshard__process_group *group);

/* Write down that this rank takes part; posted_ns is filled in. Allocates nothing. */
void lshard__process_group_post(struct lshard__process_group *group, int32_t rank,
				const struct lshard__process_group_post *post);

/*
 * Block until every rank has posted @p post->sequence, no longer than until @p deadline_ns; *started_ns: when the last
 * one did. TIMEOUT names those who have not, PEER_FAILED those that are gone, OUT_OF_STEP a rank that posted something
 * else.
 */
lshard_status lshard__process_group_await(struct lshard__process_group *group, int32_t rank,
					  const struct lshard__process_group_post *post, uint64_t deadline_ns,
					  uint64_t *started_ns, lshard_error *error);

#endif
