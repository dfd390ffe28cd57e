/* SPDX-License-Identifier: Apache-2.0
 *
 * control_page.h - what lies in the page that all ranks of a host share. For control.c, control_return.c and their
 * tests alone.
 */
#ifndef LAYERSHARD_CONTROL_PAGE_H
#define LAYERSHARD_CONTROL_PAGE_H

#include "control.h"
#include "greeting.h"

#include <pthread.h>
#include <stdatomic.h>

#define CONTROL_MAGIC 0x6c736370u

struct control_rank {
	uint64_t arrived;  /* in this round; 0: in none */
	uint64_t withdrew; /* from this round, when its deadline passed */
	uint32_t gone;
	uint8_t took_part[2]; /* in the decided round of that parity */
	uint8_t unused[2];
	uint32_t incarnation; /* processes that came back under this number */
	atomic_uint busy;     /* these two the rank writes without the lock: see control_busy */
	atomic_uint_least64_t noted;
	uint8_t bytes[2][LSHARD_EXCHANGE_BYTES];
};

struct control_block {
	struct lshard__greeting greeting; /* sizes of this struct and of a rank's */
	uint64_t size;                    /* ranks */
	pthread_mutex_t lock;
	uint64_t round; /* the one being gathered; all below are decided */
	struct control_rank ranks[];
};

/* The page of a group of @p size ranks, in bytes. */
size_t control_page_bytes(int32_t size);

/*
 * Is @p fd the page of a group of @p size ranks that cannot change its size, made by a rank of this build? Nothing of
 * it is mapped by this. Text of a failure, a MISMATCH: @p error.
 */
lshard_status control_page_check(int fd, int32_t size, lshard_error *error);

/* Map the page, which was looked at. */
lshard_status control_map(struct control *control, int fd);
/* TIMEOUT: whoever holds the lock is stopped. */
lshard_status control_lock(struct control *control, uint64_t deadline_ns);
void control_unlock(struct control *control);
/* With the lock. What this rank's sockets have shown becomes what all ranks know. */
void control_note_gone(struct control *control);

#endif
