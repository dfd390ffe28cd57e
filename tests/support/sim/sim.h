/* SPDX-License-Identifier: Apache-2.0
 *
 * sim.h - a simulated machine for tests: virtual ranks and devices in one process, with streams, events, copies,
 * kernels, capture and replay, run in any order the rules of streams allow. Memory is plain heap.
 *
 * A stream is a queue of virtual operations. Nothing runs when it is enqueued: sim_run executes heads of queues in an
 * adversarial order drawn from a seed. A kernel compares the bytes it reads with those it should see when it runs, a
 * copy moves bytes when it runs; both run in two halves, between which anything may happen. So a missing dependency is
 * seen as wrong bytes.
 *
 * Knows: the SPI and a model of the stream rules of GPUs. Must not know: rings, slot maps, the core's private headers.
 * Calls come from one thread, except for those made inside sim_collective, one thread per rank.
 */
#ifndef LAYERSHARD_TEST_SIM_H
#define LAYERSHARD_TEST_SIM_H

#include <layershard/transport.h>
#include <stdbool.h>

struct sim_world;
struct sim_stream;
struct sim_graph;

/* The flavours of the transport, for lshard_group_options.custom_transport. */
extern const lshard_transport_ops sim_one_sided;      /* one-sided, streams, capture */
extern const lshard_transport_ops sim_lockstep;       /* collective, streams, capture */
extern const lshard_transport_ops sim_host_one_sided; /* one-sided, host memory */
extern const lshard_transport_ops sim_host_lockstep;  /* collective, host memory */

/* What runs first where there is a choice. */
enum sim_policy { SIM_UNIFORM, SIM_COPIES_LATE, SIM_COPIES_EARLY, SIM_KERNELS_LATE, SIM_POLICIES };

/* NULL when there is no memory. Destroy it after the groups in it. */
struct sim_world *sim_world_create(int32_t ranks, uint64_t seed, enum sim_policy policy);
void sim_world_destroy(struct sim_world *world);
const lshard_bootstrap *sim_bootstrap(const struct sim_world *world, int32_t rank);

/* Run @p call once per rank, each in a thread of its own, and wait for all. */
void sim_collective(struct sim_world *world, void (*call)(void *user, int32_t rank), void *user);

/* ---- Streams: what a program does on its device ---- */

struct sim_stream *sim_stream_create(struct sim_world *world, int32_t rank);

/* A kernel that must see @p bytes equal to @p expected at @p address at the time it runs. @p layer is for messages. */
void sim_kernel(struct sim_stream *stream, const void *address, const void *expected, size_t bytes, uint32_t layer);

/* What follows on @p stream comes after everything enqueued on @p other so far (event record and wait). */
void sim_follow(struct sim_stream *stream, struct sim_stream *other);

/* Capture what is enqueued on @p stream, and on streams forked from it, instead of running it. */
void sim_capture_begin(struct sim_stream *stream);
/* The captured graph; NULL when the rules were broken (a fork not joined, an event from outside), see
 * sim_capture_error. */
struct sim_graph *sim_capture_end(struct sim_stream *stream);
/* Throw the capture away, whatever state it is in. */
void sim_capture_abort(struct sim_stream *stream);
const char *sim_capture_error(const struct sim_world *world);
void sim_graph_launch(struct sim_stream *stream, struct sim_graph *graph); /* graphs live as long as their world */
size_t sim_graph_nodes(const struct sim_graph *graph);

/* ---- Time ---- */

/* Run at most @p steps halves of operations; returns how many ran. Fewer: nothing more can run. */
size_t sim_run(struct sim_world *world, size_t steps);
/* Run until nothing can; false if operations are left that wait for what never comes. */
bool sim_finish(struct sim_world *world);

/* ---- Trouble ---- */

/* The next @p count fetches of @p rank fail to start with PEER_FAILED. */
void sim_fail_fetches(struct sim_world *world, int32_t rank, unsigned count);
/* Every rank's exchange after its next @p skip ones times out, as where one is late; UINT_MAX: none does. */
void sim_fail_exchange(struct sim_world *world, unsigned skip);

struct sim_report {
	uint64_t kernels;    /* that ran to their end */
	uint64_t copies;     /* that ran to their end */
	uint64_t replays;    /* graphs that ran to their end */
	uint64_t violations; /* wrong bytes, two copies into one buffer at once, broken stream rules */
	char first[512];     /* the first violation */
};
const struct sim_report *sim_report(const struct sim_world *world);

#endif
