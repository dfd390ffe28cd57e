/* SPDX-License-Identifier: Apache-2.0
 *
 * shm_ranks.h - what the tests of the shm transport share: a rank with its transport open, series over it, known bytes.
 */
#ifndef TESTS_SHM_RANKS_H
#define TESTS_SHM_RANKS_H

#include "contexts.h"
#include "patience.h"
#include "transports.h"

#define MOST_RANKS 8

struct shm_rank {
	lshard_context context;
	lshard_transport *transport;
};

/* Processes find each other by their job. The transport's own words are printed where it fails. */
int shm_rank_open(struct shm_rank *rank, const struct member *member, const char *options, uint32_t timeout_ms);
void shm_rank_close(struct shm_rank *rank);

enum shape {
	WHOLE,   /* layer p whole on rank p % n */
	PAGES,   /* every rank has whole pages of every layer */
	COLUMNS, /* every rank has a slice of every row: two-dimensional pieces */
};

/* A plan and the arrays it points to. */
struct shm_series {
	lshard_store_plan plan;
	lshard_piece pieces[64];
	uint32_t first_piece[33];
	uint64_t shard_bytes[MOST_RANKS];
	lshard_store *store;
};

void shm_series_plan(struct shm_series *series, const struct member *member, enum shape shape, uint32_t layers,
		     int direct, uint32_t buffers);
lshard_status shm_series_open(struct shm_rank *rank, struct shm_series *series);
/* Also where it is not open. */
void shm_series_close(struct shm_series *series);
/* Put this rank's part of every layer into its shard. @p generation changes every byte. */
void shm_series_fill(struct shm_series *series, unsigned generation);
/* The layer's bytes at @p found are what was filled in. Prints the first that is not. */
int shm_series_right(const struct shm_series *series, uint32_t position, unsigned generation, const void *found);

#endif
