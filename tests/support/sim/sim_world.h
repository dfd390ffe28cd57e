/* SPDX-License-Identifier: Apache-2.0
 *
 * sim_world.h - what the files of the simulated machine share among themselves. Tests include sim.h only.
 */
#ifndef LAYERSHARD_TEST_SIM_WORLD_H
#define LAYERSHARD_TEST_SIM_WORLD_H

#include "sim.h"
#include <pthread.h>

#define SIM_RANKS 64
#define SIM_NODES 1024 /* of one graph */
#define SIM_POSTS 4096 /* transfers of a collective transport that may be under way at once */

struct sim_store;

/* A set of nodes of one graph. */
struct sim_set {
	uint64_t words[SIM_NODES / 64];
};

enum sim_kind { SIM_KERNEL, SIM_COPY, SIM_MOVE, SIM_WAIT, SIM_LAUNCH };

struct sim_op {
	enum sim_kind kind;
	uint8_t half;    /* halves done */
	bool cancelled;  /* a copy that will not happen */
	uint32_t number; /* kernel: layer; copy: position; move: the buffer from which */
	uint32_t buffer;
	uint64_t amount; /* kernel: bytes; copy: sequence; wait: operations of `from` that must be done */
	const void *address;
	const void *expected;
	struct sim_store *store;
	struct sim_stream *from;
	struct sim_graph *graph;
	uint8_t *halves; /* launch: halves done, per node */
};

struct sim_node {
	struct sim_op op;
	struct sim_set before; /* nodes that must be done, closed under their own */
};

struct sim_graph {
	struct sim_graph *next;
	struct sim_node *nodes;
	size_t count;
};

/* A capture under way; its graph grows. */
struct sim_capture {
	uint64_t id;
	struct sim_stream *origin;
	struct sim_graph *graph;
	bool broken;
};

struct sim_stream {
	struct sim_world *world;
	struct sim_stream *next;
	int32_t rank;
	struct sim_op *ops;
	uint64_t capacity; /* a power of two */
	uint64_t done;     /* operations ever finished: the head of the queue */
	uint64_t queued;   /* operations ever enqueued: its tail */
	struct sim_capture *capture;
	struct sim_set before; /* what follows in the capture comes after these */
};

/* A point of a stream: eager, or inside a capture. */
struct sim_event {
	struct sim_stream *stream; /* NULL: never recorded, always past */
	uint64_t count;
	uint64_t capture;
	struct sim_set before;
};

/* A transfer of a collective transport that some rank has asked for. */
struct sim_post {
	uint64_t sequence;
	uint64_t ranks; /* bit r: rank r asked for it */
	bool mismatch;
	int32_t first; /* the rank that asked first */
	uint32_t position;
	char series[64];
};

struct sim_exchange_point {
	uint64_t generation;
	bool here[SIM_RANKS];
	const void *send[SIM_RANKS];
	size_t bytes;
	uint8_t alive[SIM_RANKS];
	unsigned char *result; /* [ranks * LSHARD_EXCHANGE_BYTES] */
};

struct sim_rank {
	struct sim_world *world;
	int32_t rank;
	lshard_bootstrap bootstrap;
	bool gone;
	bool aborted;
	unsigned fail;
	unsigned fail_exchange;   /* its number from now on, from 1; 0: none */
	struct sim_stream *plain; /* what a NULL stream means */
	struct sim_stream *copy;
	struct sim_stream *capture_copy; /* only ever used inside captures */
	/* the collective read under way */
	const struct sim_store *read_store;
	uint32_t read_position;
	void *read_to;
};

struct sim_shard {
	struct sim_shard *next;
	void *bytes;
};

struct sim_world {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	int32_t size;
	uint64_t random;
	enum sim_policy policy;
	struct sim_stream *streams;
	struct sim_graph *graphs;
	struct sim_shard *shards; /* outlive the ranks that keep them */
	uint64_t captures;
	char capture_error[256];
	struct sim_exchange_point exchange;
	struct sim_exchange_point read;
	struct sim_post *posts;
	struct sim_report report;
	struct sim_rank ranks[SIM_RANKS];
};

/* A store of the transport, as much of it as copies need. */
struct sim_buffer {
	struct sim_event ready;
	struct sim_event captured_ready;
	struct sim_event used[16];
	unsigned n_used;
	struct sim_event captured_used;
	bool filling; /* a copy is between its halves */
	uint64_t sequence;
	uint32_t position;
};

struct sim_store {
	lshard_store base;
	struct sim_rank *rank;
	bool collective;
	bool streams;
	unsigned char *shard;
	unsigned char *buffers;
	struct sim_buffer *buffer;
	const unsigned char *shards[SIM_RANKS];
	uint64_t fork; /* the capture whose beginning is noted */
};

/* sim_world.c */
void sim_fault(struct sim_world *world, const char *format, ...) __attribute__((format(printf, 2, 3)));
uint64_t sim_random(struct sim_world *world, uint64_t below);
void *sim_memory(size_t count, size_t bytes); /* zeroed; ends the program when there is none */

/* sim_stream.c */
void sim_push(struct sim_stream *stream, const struct sim_op *op);
void sim_record(struct sim_stream *stream, struct sim_event *event);
void sim_order(struct sim_stream *stream, const struct sim_event *event);
bool sim_past(const struct sim_event *event);

/* sim_run.c; the world is locked */
bool sim_step(struct sim_world *world);

/* sim_copy.c */
void sim_copy_half(const struct sim_op *op, unsigned half);
void sim_move_half(const struct sim_op *op, unsigned half);
void sim_gather(const struct sim_store *store, uint32_t position, unsigned char *to, uint64_t from_byte,
		uint64_t to_byte);

/* sim_exchange.c */
void sim_bootstrap_open(struct sim_rank *rank);
/* By the bootstrap in the context, or, where the library has put its own round it, by the one that was called last. */
struct sim_rank *sim_rank_of(const lshard_context *context);
lshard_status sim_exchange(struct sim_rank *rank, struct sim_exchange_point *point, const void *send, void *receive,
			   size_t bytes, uint8_t *alive, uint32_t timeout_ms);
void sim_pause(struct sim_world *world, uint32_t ms); /* lets other ranks' threads run */
void sim_leave(struct sim_rank *rank);

#endif
