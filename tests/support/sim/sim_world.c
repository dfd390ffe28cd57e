/* SPDX-License-Identifier: Apache-2.0
 *
 * sim_world.c - the simulated machine's making and unmaking, its dice and its book of violations, and a thread per rank
 * for collective calls.
 *
 * Knows: what belongs to a world. Does not know: what streams and transports do.
 */
#include "sim_world.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *sim_memory(size_t count, size_t bytes)
{
	void *memory = calloc(count ? count : 1, bytes ? bytes : 1);

	if (!memory)
		abort(); /* a test without memory proves nothing */
	return memory;
}

/* splitmix64 */
uint64_t sim_random(struct sim_world *world, uint64_t below)
{
	uint64_t z = world->random += 0x9e3779b97f4a7c15u;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return (z ^ (z >> 31)) % below;
}

void sim_fault(struct sim_world *world, const char *format, ...)
{
	va_list arguments;

	if (world->report.violations++)
		return;
	va_start(arguments, format);
	vsnprintf(world->report.first, sizeof world->report.first, format, arguments);
	va_end(arguments);
}

const struct sim_report *sim_report(const struct sim_world *world)
{
	return &world->report;
}

const char *sim_capture_error(const struct sim_world *world)
{
	return world->capture_error;
}

void sim_fail_exchange(struct sim_world *world, unsigned skip)
{
	for (int32_t rank = 0; rank < world->size; rank++)
		world->ranks[rank].fail_exchange = skip + 1;
}

void sim_fail_fetches(struct sim_world *world, int32_t rank, unsigned count)
{
	world->ranks[rank].fail = count;
}

struct sim_world *sim_world_create(int32_t ranks, uint64_t seed, enum sim_policy policy)
{
	struct sim_world *world;
	pthread_condattr_t attributes;
	size_t results = (size_t)ranks * LSHARD_EXCHANGE_BYTES;

	if (ranks < 1 || ranks > SIM_RANKS)
		return NULL;
	world = sim_memory(1, sizeof *world);
	pthread_mutex_init(&world->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&world->changed, &attributes);
	pthread_condattr_destroy(&attributes);
	world->size = ranks;
	world->random = seed;
	world->policy = policy;
	world->exchange.result = sim_memory(results, 1);
	world->read.result = sim_memory(results, 1);
	world->posts = sim_memory(SIM_POSTS, sizeof *world->posts);
	for (int32_t r = 0; r < ranks; r++) {
		world->ranks[r].world = world;
		world->ranks[r].rank = r;
		sim_bootstrap_open(&world->ranks[r]);
		world->ranks[r].plain = sim_stream_create(world, r);
		world->ranks[r].copy = sim_stream_create(world, r);
		world->ranks[r].capture_copy = sim_stream_create(world, r);
	}
	return world;
}

static void free_streams(struct sim_world *world)
{
	while (world->streams) {
		struct sim_stream *stream = world->streams;

		world->streams = stream->next;
		for (uint64_t i = stream->done; i < stream->queued; i++)
			free(stream->ops[i & (stream->capacity - 1)].halves);
		free(stream->ops);
		free(stream);
	}
}

static void free_graphs(struct sim_world *world)
{
	while (world->graphs) {
		struct sim_graph *graph = world->graphs;

		world->graphs = graph->next;
		free(graph->nodes);
		free(graph);
	}
}

static void free_shards(struct sim_world *world)
{
	while (world->shards) {
		struct sim_shard *shard = world->shards;

		world->shards = shard->next;
		free(shard->bytes);
		free(shard);
	}
}

void sim_world_destroy(struct sim_world *world)
{
	if (!world)
		return;
	for (struct sim_stream *stream = world->streams; stream; stream = stream->next)
		if (stream->capture && stream->capture->origin == stream)
			sim_capture_abort(stream);
	free_streams(world);
	free_graphs(world);
	free_shards(world);
	free(world->posts);
	free(world->read.result);
	free(world->exchange.result);
	pthread_cond_destroy(&world->changed);
	pthread_mutex_destroy(&world->lock);
	free(world);
}

/* ---- A thread per rank ---- */

struct sim_call {
	void (*call)(void *user, int32_t rank);
	void *user;
	int32_t rank;
};

static void *run_call(void *argument)
{
	const struct sim_call *call = argument;

	call->call(call->user, call->rank);
	return NULL;
}

void sim_collective(struct sim_world *world, void (*call)(void *user, int32_t rank), void *user)
{
	pthread_t threads[SIM_RANKS];
	struct sim_call calls[SIM_RANKS];

	for (int32_t r = 0; r < world->size; r++)
		calls[r] = (struct sim_call){call, user, r};
	for (int32_t r = 1; r < world->size; r++)
		if (pthread_create(&threads[r], NULL, run_call, &calls[r]) != 0)
			abort();
	run_call(&calls[0]);
	for (int32_t r = 1; r < world->size; r++)
		pthread_join(threads[r], NULL);
}
