/* SPDX-License-Identifier: Apache-2.0
 *
 * local.h - what the files of the local transport share: local.c (table, transfers, reads), local_options.c, and
 * local_store.c (shards and buffers). process_group.h connects the ranks.
 */
#ifndef LAYERSHARD_LOCAL_H
#define LAYERSHARD_LOCAL_H

#include "process_group.h"
#include "verdict.h"

/* Kinds of exchanges in the process: ranks in different ones are out of step. */
enum exchange_kind { EXCHANGE_OF_GROUP, EXCHANGE_OPEN, EXCHANGE_READ };

/* When a transfer copies. */
enum moment { AT_REACH, AT_WAIT, AT_DRAWN, IN_LOCKSTEP };

struct local {
	lshard_transport base;
	lshard_transport_ops ops; /* of this instance: lockstep has other capabilities */
	struct lshard__process_group *group;
	enum moment moment;
	uint64_t seed;
	uint32_t stores_opened;             /* the same on all ranks, so it numbers them */
	struct announcement *announcements; /* [size] */
	uint8_t *alive;                     /* [size] */
};

/* What store_open tells the others. */
struct announcement {
	struct lshard__outcome outcome;
	struct shard *shard;
};

/* The last fetch into one buffer. */
struct transfer {
	bool pending;  /* asked for, not copied yet */
	bool unwaited; /* nobody waited since */
	uint32_t position;
	uint32_t calls_left; /* AT_DRAWN: calls until the copy */
	uint64_t sequence;
	lshard_status status; /* in lockstep: of one that failed, until the next fetch or drain */
	lshard_error error;
	lshard_arrival arrival;
};

struct local_store {
	lshard_store base;
	uint32_t number;
	uint64_t random;
	struct shard **shards; /* [size] */
	const void **bases;    /* [size] their memory */
	void *buffers_block;   /* as allocated */
	unsigned char *buffers;
	uint64_t buffer_pitch;
	struct transfer *transfers; /* [buffers] */
	uint32_t *queue;            /* buffers with a pending transfer, in the order of fetch */
	uint32_t queued;
	bool reserved; /* its buffers have room in the group's book */
};

static inline struct local *local_of(const lshard_transport *transport)
{
	return (struct local *)transport;
}

static inline struct local_store *store_of(lshard_store *store)
{
	return (struct local_store *)store;
}

/* ---- local_options.c ---- */

/* Words joined by '+'. All of them say when transfers copy, so there is at most one. */
lshard_status local_read_options(struct local *local, const char *options, lshard_error *error);

/* ---- local_store.c ---- */

lshard_status local_store_open(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **opened);
void local_store_close(lshard_store *store);
void *local_shard(lshard_store *store);
void *local_buffer(lshard_store *store, uint32_t buffer, uint32_t position);

#endif
