/* SPDX-License-Identifier: Apache-2.0
 *
 * sim_stream.c - streams, events, capture and graphs of the simulated machine: what is ordered after what.
 *
 * Knows: the rules of streams and of capture. Does not know: when anything runs, what a copy moves.
 *
 * An event is a point of a queue, so recording one takes no operation: it is past when the queue's head is.
 */
#include "sim_world.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct sim_stream *sim_stream_create(struct sim_world *world, int32_t rank)
{
	struct sim_stream *stream = sim_memory(1, sizeof *stream);

	stream->world = world;
	stream->rank = rank;
	stream->capacity = 16;
	stream->ops = sim_memory(stream->capacity, sizeof *stream->ops);
	stream->next = world->streams;
	world->streams = stream;
	return stream;
}

static void grow(struct sim_stream *stream)
{
	uint64_t capacity = stream->capacity * 2;
	struct sim_op *ops = sim_memory(capacity, sizeof *ops);

	for (uint64_t i = stream->done; i < stream->queued; i++)
		ops[i & (capacity - 1)] = stream->ops[i & (stream->capacity - 1)];
	free(stream->ops);
	stream->ops = ops;
	stream->capacity = capacity;
}

/* ---- Captures ---- */

static void break_capture(struct sim_stream *stream, const char *why)
{
	stream->capture->broken = true;
	snprintf(stream->world->capture_error, sizeof stream->world->capture_error, "rank %d: %s", stream->rank, why);
}

static void add_to_set(struct sim_set *set, size_t node)
{
	set->words[node / 64] |= (uint64_t)1 << (node % 64);
}

static void unite(struct sim_set *set, const struct sim_set *other)
{
	for (size_t i = 0; i < SIM_NODES / 64; i++)
		set->words[i] |= other->words[i];
}

static bool contains(const struct sim_set *set, const struct sim_set *other)
{
	for (size_t i = 0; i < SIM_NODES / 64; i++)
		if (other->words[i] & ~set->words[i])
			return false;
	return true;
}

static void push_node(struct sim_stream *stream, const struct sim_op *op)
{
	struct sim_graph *graph = stream->capture->graph;

	if (graph->count == SIM_NODES) {
		break_capture(stream, "graph too large for the simulated machine");
		return;
	}
	graph->nodes[graph->count].op = *op;
	graph->nodes[graph->count].before = stream->before;
	add_to_set(&stream->before, graph->count++);
}

void sim_push(struct sim_stream *stream, const struct sim_op *op)
{
	if (stream->capture) {
		push_node(stream, op);
		return;
	}
	if (stream->queued - stream->done == stream->capacity)
		grow(stream);
	stream->ops[stream->queued++ & (stream->capacity - 1)] = *op;
}

/* ---- Events ---- */

void sim_record(struct sim_stream *stream, struct sim_event *event)
{
	event->stream = stream;
	event->count = stream->queued;
	event->capture = stream->capture ? stream->capture->id : 0;
	if (stream->capture)
		event->before = stream->before;
}

bool sim_past(const struct sim_event *event)
{
	return !event->stream || (!event->capture && event->stream->done >= event->count);
}

static struct sim_capture *find_capture(const struct sim_world *world, uint64_t id)
{
	for (struct sim_stream *stream = world->streams; stream; stream = stream->next)
		if (stream->capture && stream->capture->id == id)
			return stream->capture;
	return NULL;
}

static void order_after_captured(struct sim_stream *stream, const struct sim_event *event)
{
	struct sim_capture *capture = find_capture(stream->world, event->capture);

	if (!capture) {
		sim_fault(stream->world, "rank %d waits for an event of a capture that has ended", stream->rank);
		return;
	}
	if (!stream->capture) {
		stream->capture = capture; /* forked into it */
		memset(&stream->before, 0, sizeof stream->before);
	}
	if (stream->capture == capture)
		unite(&stream->before, &event->before);
	else
		break_capture(stream, "an event of another capture was waited for");
}

void sim_order(struct sim_stream *stream, const struct sim_event *event)
{
	struct sim_op wait = {.kind = SIM_WAIT};

	if (!event->stream)
		return;
	if (event->capture) {
		order_after_captured(stream, event);
	} else if (stream->capture) {
		break_capture(stream, "an event from outside the capture was waited for");
	} else if (!sim_past(event) && event->stream != stream) {
		wait.from = event->stream;
		wait.amount = event->count;
		sim_push(stream, &wait);
	}
}

void sim_follow(struct sim_stream *stream, struct sim_stream *other)
{
	struct sim_event event;

	sim_record(other, &event);
	sim_order(stream, &event);
}

/* ---- Begin and end ---- */

void sim_capture_begin(struct sim_stream *stream)
{
	struct sim_capture *capture;

	if (stream->capture) {
		sim_fault(stream->world, "rank %d begins a capture inside a capture", stream->rank);
		return;
	}
	capture = sim_memory(1, sizeof *capture);
	capture->id = ++stream->world->captures;
	capture->origin = stream;
	capture->graph = sim_memory(1, sizeof *capture->graph);
	capture->graph->nodes = sim_memory(SIM_NODES, sizeof *capture->graph->nodes);
	stream->capture = capture;
	memset(&stream->before, 0, sizeof stream->before);
	stream->world->capture_error[0] = '\0';
}

static void leave_capture(struct sim_world *world, struct sim_capture *capture, bool check)
{
	for (struct sim_stream *stream = world->streams; stream; stream = stream->next) {
		if (stream->capture != capture)
			continue;
		if (check && !contains(&capture->origin->before, &stream->before))
			break_capture(stream, "a stream forked into the capture was not joined");
		stream->capture = NULL;
	}
}

static void free_graph(struct sim_graph *graph)
{
	free(graph->nodes);
	free(graph);
}

void sim_capture_abort(struct sim_stream *stream)
{
	struct sim_capture *capture = stream->capture;

	if (!capture)
		return;
	leave_capture(stream->world, capture, false);
	free_graph(capture->graph);
	free(capture);
}

struct sim_graph *sim_capture_end(struct sim_stream *stream)
{
	struct sim_capture *capture = stream->capture;
	struct sim_graph *graph = NULL;

	if (!capture || capture->origin != stream) {
		sim_fault(stream->world, "rank %d ends a capture it did not begin", stream->rank);
		return NULL;
	}
	leave_capture(stream->world, capture, true);
	if (capture->broken) {
		free_graph(capture->graph);
	} else {
		graph = capture->graph;
		graph->next = stream->world->graphs;
		stream->world->graphs = graph;
	}
	free(capture);
	return graph;
}

void sim_graph_launch(struct sim_stream *stream, struct sim_graph *graph)
{
	struct sim_op launch = {.kind = SIM_LAUNCH, .graph = graph};

	launch.halves = sim_memory(graph->count, 1);
	if (stream->capture)
		sim_fault(stream->world, "rank %d launches a graph inside a capture", stream->rank);
	sim_push(stream, &launch);
}

size_t sim_graph_nodes(const struct sim_graph *graph)
{
	return graph->count;
}

void sim_kernel(struct sim_stream *stream, const void *address, const void *expected, size_t bytes, uint32_t layer)
{
	struct sim_op kernel = {
		.kind = SIM_KERNEL, .number = layer, .address = address, .expected = expected, .amount = bytes};

	sim_push(stream, &kernel);
}
