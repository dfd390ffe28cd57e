/* SPDX-License-Identifier: Apache-2.0
 *
 * walk.h - what the files of the random walk share: a walk is one configuration of ranks, each a walker with a
 * program of its own. test_walk.c chooses configurations, walk_together.c moves all ranks, walk_program.c decides what
 * a rank does next, walk_calls.c makes the calls and knows what they must return.
 */
#ifndef LAYERSHARD_TEST_WALK_H
#define LAYERSHARD_TEST_WALK_H

#include "sim/sim.h"

#define MOST_LAYERS    24
#define MOST_RANKS     5
#define MOST_STREAMS   3
#define MOST_TENSORS   3
#define MOST_GRAPHS    3
#define HISTORY        20
#define STEPS_OF_EPOCH 40
#define MOST_BYTES     256 /* of a tensor */
#define EPOCHS         4

enum mode { FREE, PASSES, CAPTURE };

/* What one rank's program is doing. */
struct program {
	enum mode mode;
	uint32_t next;   /* offset of the next layer of the pass */
	bool reached;    /* its reach is done, its wait comes next */
	uint32_t begin;  /* layer at which a captured pass begins */
	uint32_t left;   /* layers until the end of a capture, or until it is thrown away */
	unsigned passes; /* whole ones since PASSES began; to be captured */
	unsigned wanted;
	bool releases;
	bool prepared;
	bool joins;             /* the capture will be kept */
	unsigned stream, other; /* equal: one stream only */
	uint64_t fetches;
};

struct views {
	uint32_t position;
	bool live[MOST_LAYERS];
	unsigned stream[MOST_LAYERS];
};

struct walker {
	lshard_group *group;
	lshard_series *series;
	struct sim_stream *streams[MOST_STREAMS];
	struct sim_graph *graphs[MOST_GRAPHS];
	unsigned n_graphs;
	unsigned char *address[MOST_LAYERS][MOST_TENSORS];
	struct views views;
	struct views before_capture;
	struct program program;
	uint64_t random; /* of what the program does: the same on all ranks in lockstep */
	uint64_t steps;
	bool armed;    /* some fetch to come will fail */
	bool may_fail; /* some fetch has failed, and its layer's wait has perhaps not said so yet */
	bool replayed; /* the last thing done was a replay, on replay_stream */
	unsigned replay_stream;
	bool poisoned;        /* windows are, outside of views */
	lshard_status status; /* of the last call that all ranks made */
};

struct walk {
	uint64_t seed;
	uint64_t random; /* of when things happen */
	const lshard_transport_ops *ops;
	bool host, collective;
	int32_t n;
	unsigned n_streams;
	lshard_series_options options;
	lshard_tensor tensors[MOST_TENSORS];
	size_t tensor_at[MOST_TENSORS]; /* in the truth of a layer */
	size_t truth_bytes;
	unsigned char *truth; /* [layers][truth_bytes] */
	bool poison;          /* can be had */
	lshard_poison_pattern patterns[MOST_TENSORS];
	unsigned char poison_of[MOST_TENSORS][MOST_BYTES];
	struct sim_world *world;
	struct walker walkers[MOST_RANKS];
	char history[HISTORY][160];
	uint64_t steps;
	uint64_t host_kernels;
};

/* splitmix64; below @p below. */
uint64_t walk_draw(uint64_t *random, uint64_t below);
int32_t walk_rank_of(const struct walk *walk, const struct walker *walker);

/* The history is told when something is wrong; giving up fails the test. */
void walk_note(struct walk *walk, const char *format, ...) __attribute__((format(printf, 2, 3)));
void walk_give_up(struct walk *walk, const char *format, ...) __attribute__((format(printf, 2, 3), noreturn));
void walk_look_for_violations(struct walk *walk);

/* New bytes for all layers, and the callback that stores them. */
void walk_make_truth(struct walk *walk);
int walk_write_layer(void *user, uint32_t layer, void *const *tensors);

/* The calls; what they must not return gives up. */
void walk_compute(struct walk *walk, struct walker *walker, uint32_t position, unsigned stream);
void walk_reach(struct walk *walk, struct walker *walker, uint32_t position, unsigned stream);
lshard_status walk_wait_for(struct walk *walk, struct walker *walker, uint32_t position, unsigned stream);
void walk_release(struct walk *walk, struct walker *walker, uint32_t position, unsigned stream);
lshard_status walk_prepare(struct walk *walk, struct walker *walker, unsigned stream);
lshard_status walk_join(struct walk *walk, struct walker *walker, unsigned stream);
/* Poison is switched to what it was not. */
void walk_switch_poison(struct walk *walk, struct walker *walker, unsigned stream);
void walk_get_stats(struct walk *walk, struct walker *walker, lshard_stats *stats);
/* What was broken on purpose is repaired: what is fetched from now on comes. */
void walk_mend(struct walk *walk, struct walker *walker);

/* What all ranks call together must be OK; @p call leaves each one's status. */
void walk_together(struct walk *walk, const char *what, void (*call)(void *user, int32_t rank));
/* An update, a rewind, a verification, or nothing; some of them fail first, or only fail. */
void walk_between_epochs(struct walk *walk);

void walk_must_be_ok(struct walk *walk, const struct walker *walker, const char *call, lshard_status status);

/* The capture under way is thrown away, without telling the library. */
void walk_drop_capture(struct walk *walk, struct walker *walker, const char *why);
/* One step of a rank's program. */
void walk_step(struct walk *walk, struct walker *walker);

#endif
