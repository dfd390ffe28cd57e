/* SPDX-License-Identifier: Apache-2.0
 *
 * simulated_ranks.h - a group of simulated ranks with one series of three tensors: made, used and unmade in a
 * few calls, every byte read by a kernel that knows what it should be.
 */
#ifndef LAYERSHARD_TEST_SIMULATED_RANKS_H
#define LAYERSHARD_TEST_SIMULATED_RANKS_H

#include "sim/sim.h"

#define RANKS       4
#define TENSORS     3
#define TRUTH_BYTES 734 /* of one layer */

struct run_member {
	lshard_group *group;
	lshard_series *series;
	struct sim_stream *stream;
	lshard_status status;
	uint64_t steps;
};

struct run {
	struct sim_world *world;
	const lshard_transport_ops *ops;
	int32_t n;
	uint32_t timeout_ms;
	lshard_series_options options;
	unsigned generation;
	struct run_member members[RANKS];
	unsigned char *truth;
};

extern const lshard_tensor run_tensors[TENSORS];

/* Make ranks, groups, series; commit. */
struct run *run_create(const lshard_transport_ops *ops, int32_t n, uint32_t first, uint32_t count,
		       uint32_t k); /* not committed */
struct run *run_open(const lshard_transport_ops *ops, int32_t n, uint32_t first, uint32_t count, uint32_t k);
/* As run_create, where more is done than fits into the usual deadline on a slow machine. */
struct run *run_create_within(const lshard_transport_ops *ops, int32_t n, uint32_t first, uint32_t count, uint32_t k,
			      uint32_t timeout_ms);
/* Let everything end, unmake all, and fail if anything ever read wrong bytes. */
void run_close(struct run *run);

/* A collective call on all ranks; fails the test unless every rank's status is OK. */
void run_together(struct run *run, void (*call)(void *user, int32_t rank));
void run_commit_rank(void *user, int32_t rank);
void run_update_begin_rank(void *user, int32_t rank);
void run_update_end_rank(void *user, int32_t rank);
void run_rewind_rank(void *user, int32_t rank);

/* What the layers' bytes should be. */
void run_make_truth(struct run *run, unsigned generation);
unsigned char *run_truth(const struct run *run, uint32_t layer, uint32_t tensor);
int run_write_layer(void *user, uint32_t layer, void *const *to);

/* Arrive at a layer and read all of its tensors; every layer in order. */
void run_layer(struct run *run, int32_t rank, uint32_t layer);
void run_pass(struct run *run, int32_t rank);
void run_call_ok(const struct run_member *member, const char *call, uint32_t layer, lshard_status status);

lshard_stats run_stats(const struct run *run, int32_t rank);
uint64_t run_misses(const struct run *run); /* of all ranks */

#endif
