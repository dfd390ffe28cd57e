/* SPDX-License-Identifier: Apache-2.0
 *
 * walk_calls.c - the calls of a random walk, the bytes they lead to, and what the header promises of each. See
 * test_walk.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include "walk.h"
#include <cmocka.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

uint64_t walk_draw(uint64_t *random, uint64_t below)
{
	uint64_t z = *random += 0x9e3779b97f4a7c15u;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return (z ^ (z >> 31)) % below;
}

int32_t walk_rank_of(const struct walk *walk, const struct walker *walker)
{
	return (int32_t)(walker - walk->walkers);
}

/* ---- Telling what went wrong ---- */

void walk_note(struct walk *walk, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(walk->history[walk->steps++ % HISTORY], sizeof walk->history[0], format, arguments);
	va_end(arguments);
}

void walk_give_up(struct walk *walk, const char *format, ...)
{
	char text[512];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	for (uint64_t i = walk->steps > HISTORY ? walk->steps - HISTORY : 0; i < walk->steps; i++)
		print_error("%s\n", walk->history[i % HISTORY]);
	print_error("LAYERSHARD_WALK_SEED=%" PRIu64 ": %s, n %d, layers [%u, %u), k %u, placement %d, resident %" PRIu64
		    ", %u streams\n",
		    walk->seed, walk->ops->name, walk->n, walk->options.first_layer,
		    walk->options.first_layer + walk->options.layer_count, walk->options.prefetch,
		    (int)walk->options.placement, walk->options.resident_bytes, walk->n_streams);
	fail_msg("%s", text);
	abort();
}

void walk_look_for_violations(struct walk *walk)
{
	if (sim_report(walk->world)->violations)
		walk_give_up(walk, "%" PRIu64 " violations, first: %s", sim_report(walk->world)->violations,
			     sim_report(walk->world)->first);
}

/* ---- The bytes ---- */

void walk_make_truth(struct walk *walk)
{
	for (size_t i = 0; i < walk->options.layer_count * walk->truth_bytes; i++)
		walk->truth[i] = (unsigned char)walk_draw(&walk->random, 256);
}

static const unsigned char *truth_of(const struct walk *walk, uint32_t position, uint32_t tensor)
{
	return walk->truth + position * walk->truth_bytes + walk->tensor_at[tensor];
}

int walk_write_layer(void *user, uint32_t layer, void *const *tensors)
{
	const struct walk *walk = user;

	for (uint32_t t = 0; t < walk->options.tensor_count; t++)
		memcpy(tensors[t], truth_of(walk, layer - walk->options.first_layer, t), walk->tensors[t].bytes);
	return 0;
}

/* Something reads the tensor: at once on a host, by a kernel on a device. */
static void read_bytes(struct walk *walk, struct walker *walker, uint32_t position, uint32_t tensor,
		       const unsigned char *truth, unsigned stream)
{
	const unsigned char *address = walker->address[position][tensor];
	size_t bytes = walk->tensors[tensor].bytes;

	if (!walk->host) {
		sim_kernel(walker->streams[stream], address, truth, bytes, walk->options.first_layer + position);
		return;
	}
	walk->host_kernels++;
	if (memcmp(address, truth, bytes) != 0)
		walk_give_up(walk, "rank %d: wrong bytes in layer %u", walk_rank_of(walk, walker),
			     walk->options.first_layer + position);
}

void walk_compute(struct walk *walk, struct walker *walker, uint32_t position, unsigned stream)
{
	const uint32_t tensor = (uint32_t)walk_draw(&walk->random, walk->options.tensor_count);

	read_bytes(walk, walker, position, tensor, truth_of(walk, position, tensor), stream);
}

/* ---- Calls, and what they must return ---- */

static void *stream_of(const struct walk *walk, const struct walker *walker, unsigned stream)
{
	return walk->host ? NULL : walker->streams[stream];
}

static void begin_step(struct walk *walk, struct walker *walker, const char *call, uint32_t position, unsigned stream)
{
	walker->steps++;
	walk_note(walk, "rank %d: %s(%u, stream %u)%s", walk_rank_of(walk, walker), call,
		  walk->options.first_layer + position, stream, walker->program.mode == CAPTURE ? " captured" : "");
}

void walk_must_be_ok(struct walk *walk, const struct walker *walker, const char *call, lshard_status status)
{
	if (status != LSHARD_OK)
		walk_give_up(walk, "rank %d: %s returned %s: %s", walk_rank_of(walk, walker), call,
			     lshard_status_name(status), lshard_series_error(walker->series));
}

static void end_views(struct walk *walk, struct walker *walker, uint32_t except)
{
	for (uint32_t p = 0; p < walk->options.layer_count; p++)
		if (p != except)
			walker->views.live[p] = false;
}

static bool window_is_viewed(const struct walk *walk, const struct walker *walker, uint32_t position)
{
	for (uint32_t p = 0; p < walk->options.layer_count; p++)
		if (p != position && walker->views.live[p] && walker->address[p][0] == walker->address[position][0])
			return true;
	return false;
}

/* Layers that share an address are in a window. */
static bool is_in_window(const struct walk *walk, const struct walker *walker, uint32_t position)
{
	for (uint32_t p = 0; p < walk->options.layer_count; p++)
		if (p != position && walker->address[p][0] == walker->address[position][0])
			return true;
	return false;
}

/*
 * Reads a window of which no view lives: with poison that is all it sees. Not where another stream may begin a view
 * before the reader runs.
 */
static void trespass(struct walk *walk, struct walker *walker, unsigned stream)
{
	uint32_t position, tensor;

	if (!walker->poisoned || walk->n_streams > 1)
		return;
	position = (uint32_t)walk_draw(&walk->random, walk->options.layer_count);
	tensor = (uint32_t)walk_draw(&walk->random, walk->options.tensor_count);
	if (walker->views.live[position] || !is_in_window(walk, walker, position) ||
	    window_is_viewed(walk, walker, position))
		return;
	read_bytes(walk, walker, position, tensor, walk->poison_of[tensor], stream);
}

void walk_reach(struct walk *walk, struct walker *walker, uint32_t position, unsigned stream)
{
	begin_step(walk, walker, "reach", position, stream);
	walk_must_be_ok(
		walk, walker, "reach",
		lshard_reach(walker->series, walk->options.first_layer + position, stream_of(walk, walker, stream)));
	end_views(walk, walker, position);
	walker->views.position = position;
	trespass(walk, walker, stream);
}

void walk_mend(struct walk *walk, struct walker *walker)
{
	sim_fail_fetches(walk->world, walk_rank_of(walk, walker), 0);
	walker->armed = false;
}

lshard_status walk_wait_for(struct walk *walk, struct walker *walker, uint32_t position, unsigned stream)
{
	bool busy = window_is_viewed(walk, walker, position);
	lshard_status status;

	begin_step(walk, walker, "wait", position, stream);
	status = lshard_wait(walker->series, walk->options.first_layer + position, stream_of(walk, walker, stream));
	if (status == LSHARD_ERR_PEER_FAILED && walker->may_fail) {
		walker->views.live[position] = false;
		return status;
	}
	if (busy && status == LSHARD_ERR_BUSY)
		return status;
	if (busy)
		walk_give_up(walk, "rank %d: wait gave %s for a window that is viewed", walk_rank_of(walk, walker),
			     lshard_status_name(status));
	walk_must_be_ok(walk, walker, "wait", status);
	walker->views.live[position] = true;
	walker->views.stream[position] = stream;
	walk_compute(walk, walker, position, stream);
	return status;
}

void walk_release(struct walk *walk, struct walker *walker, uint32_t position, unsigned stream)
{
	begin_step(walk, walker, "release", position, stream);
	walk_must_be_ok(
		walk, walker, "release",
		lshard_release(walker->series, walk->options.first_layer + position, stream_of(walk, walker, stream)));
	walker->views.live[position] = false;
	trespass(walk, walker, stream);
}

lshard_status walk_prepare(struct walk *walk, struct walker *walker, unsigned stream)
{
	lshard_status status;

	begin_step(walk, walker, "prepare", 0, stream);
	status = lshard_series_prepare(walker->series, stream_of(walk, walker, stream));
	if (status == LSHARD_ERR_PEER_FAILED && walker->may_fail) {
		walk_mend(walk, walker);
		status = lshard_series_prepare(walker->series, stream_of(walk, walker, stream));
	}
	walk_must_be_ok(walk, walker, "prepare", status);
	walker->may_fail &= walker->armed; /* every window was filled */
	end_views(walk, walker, UINT32_MAX);
	walker->views.position = 0;
	trespass(walk, walker, stream);
	return status;
}

lshard_status walk_join(struct walk *walk, struct walker *walker, unsigned stream)
{
	lshard_status status;

	begin_step(walk, walker, "join", 0, stream);
	status = lshard_series_join(walker->series, stream_of(walk, walker, stream));
	end_views(walk, walker, UINT32_MAX);
	if (status == LSHARD_OK && walker->program.mode != CAPTURE)
		trespass(walk, walker, stream);
	return status;
}

void walk_switch_poison(struct walk *walk, struct walker *walker, unsigned stream)
{
	lshard_status status;

	begin_step(walk, walker, walker->poisoned ? "poison off" : "poison on", 0, stream);
	status = lshard_series_poison(walker->series, !walker->poisoned, stream_of(walk, walker, stream));
	end_views(walk, walker, UINT32_MAX);
	if (status == LSHARD_ERR_PEER_FAILED && walker->may_fail)
		return;
	walk_must_be_ok(walk, walker, "poison", status);
	walker->poisoned = !walker->poisoned;
	walker->n_graphs = 0; /* they were captured as it was before */
	trespass(walk, walker, stream);
}

void walk_get_stats(struct walk *walk, struct walker *walker, lshard_stats *stats)
{
	*stats = (lshard_stats)LSHARD_STATS_INIT;
	if (lshard_series_stats(walker->series, stats) != LSHARD_OK)
		walk_give_up(walk, "rank %d: no statistics", walk_rank_of(walk, walker));
}
