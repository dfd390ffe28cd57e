/* SPDX-License-Identifier: Apache-2.0
 *
 * walk_program.c - what a rank of a random walk does next: whole passes, captures, replays, or anything. See
 * test_walk.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include "walk.h"
#include <cmocka.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* ---- Passes from the first layer to the last, nothing else: no miss, and no more transfers than planned ---- */

static void begin_passes(struct walker *walker, unsigned stream)
{
	walker->program = (struct program){.mode = PASSES,
					   .stream = stream,
					   .wanted = 2 + (unsigned)walk_draw(&walker->random, 3),
					   .releases = walk_draw(&walker->random, 2)};
}

static void end_of_pass(struct walk *walk, struct walker *walker)
{
	struct program *program = &walker->program;
	lshard_stats stats;
	uint64_t fetches;

	walk_get_stats(walk, walker, &stats);
	fetches = stats.fetches - program->fetches;
	program->fetches = stats.fetches;
	program->next = 0;
	if (program->passes++ > 0 && !walker->may_fail && fetches != stats.fetched_layers)
		walk_give_up(walk, "rank %d: a steady pass fetched %" PRIu64 " layers, planned were %u",
			     walk_rank_of(walk, walker), fetches, stats.fetched_layers);
	if (program->passes == program->wanted)
		program->mode = FREE;
}

static void check_no_miss(struct walk *walk, struct walker *walker, uint64_t misses)
{
	lshard_stats stats;

	walk_get_stats(walk, walker, &stats);
	if (stats.misses != misses)
		walk_give_up(walk, "rank %d: a miss in a sequential pass", walk_rank_of(walk, walker));
}

static void step_of_passes(struct walk *walk, struct walker *walker)
{
	struct program *program = &walker->program;
	lshard_stats stats;

	program->reached = !program->reached;
	if (program->reached) {
		walk_reach(walk, walker, program->next, program->stream);
		return;
	}
	walk_get_stats(walk, walker, &stats);
	walk_wait_for(walk, walker, program->next, program->stream);
	check_no_miss(walk, walker, stats.misses);
	if (program->releases)
		walk_release(walk, walker, program->next, program->stream);
	if (++program->next == walk->options.layer_count)
		end_of_pass(walk, walker);
}

/* ---- Captures ---- */

static void break_something(struct walk *walk, struct walker *walker)
{
	unsigned count = 1 + (unsigned)walk_draw(&walker->random, 2);

	if (walk->collective)
		return;
	walk_note(walk, "rank %d: the next %u fetches fail", walk_rank_of(walk, walker), count);
	sim_fail_fetches(walk->world, walk_rank_of(walk, walker), count);
	walker->armed = walker->may_fail = true;
}

static void begin_capture(struct walk *walk, struct walker *walker, unsigned stream)
{
	uint32_t layers = walk->options.layer_count;
	struct program program = {.mode = CAPTURE, .stream = stream, .other = stream};
	lshard_stats stats;

	program.prepared = walk_draw(&walker->random, 4) != 0;
	program.begin =
		program.prepared || walk_draw(&walker->random, 2) ? 0 : (uint32_t)walk_draw(&walker->random, layers);
	program.joins = walk_draw(&walker->random, 3) != 0;
	program.passes = 1 + (unsigned)walk_draw(&walker->random, 2);
	program.left = program.joins ? layers * program.passes : (uint32_t)walk_draw(&walker->random, layers + 1);
	if (walk->n_streams > 1 && walk_draw(&walker->random, 3) == 0)
		program.other = (stream + 1) % walk->n_streams;
	if (program.prepared)
		walk_prepare(walk, walker, stream);
	walk_get_stats(walk, walker, &stats);
	program.fetches = stats.fetches;
	walker->before_capture = walker->views;
	walker->program = program;
	walk_note(walk, "rank %d: capture begins on stream %u%s", walk_rank_of(walk, walker), stream,
		  program.joins ? "" : ", to be thrown away");
	sim_capture_begin(walker->streams[stream]);
	if (program.other != stream)
		sim_follow(walker->streams[program.other], walker->streams[stream]);
}

void walk_drop_capture(struct walk *walk, struct walker *walker, const char *why)
{
	walk_note(walk, "rank %d: capture thrown away: %s", walk_rank_of(walk, walker), why);
	sim_capture_abort(walker->streams[walker->program.stream]);
	walker->views = walker->before_capture;
	walker->program.mode = FREE;
}

static void keep_graph(struct walk *walk, struct walker *walker)
{
	struct program *program = &walker->program;
	struct sim_graph *graph = sim_capture_end(walker->streams[program->stream]);

	if (!graph)
		walk_give_up(walk, "rank %d: the capture is broken: %s", walk_rank_of(walk, walker),
			     sim_capture_error(walk->world));
	walker->graphs[walker->n_graphs++ % MOST_GRAPHS] = graph;
	walker->views = walker->before_capture;
	program->mode = FREE;
}

/* What replays begin without they bring, and what they end without they do not. */
static void check_captured_fetches(struct walk *walk, struct walker *walker)
{
	const struct program *program = &walker->program;
	lshard_stats stats;

	walk_get_stats(walk, walker, &stats);
	if (program->prepared && !walker->may_fail &&
	    stats.fetches - program->fetches != (uint64_t)program->passes * stats.fetched_layers)
		walk_give_up(walk, "rank %d: %u captured passes fetched %" PRIu64 " layers, planned were %u each",
			     walk_rank_of(walk, walker), program->passes, stats.fetches - program->fetches,
			     stats.fetched_layers);
}

static void end_capture(struct walk *walk, struct walker *walker)
{
	struct program *program = &walker->program;
	lshard_status status;

	if (!program->joins) {
		walk_drop_capture(walk, walker, "as planned");
		return;
	}
	if (program->other != program->stream)
		sim_follow(walker->streams[program->stream], walker->streams[program->other]);
	status = walk_join(walk, walker, program->stream);
	if (status == LSHARD_OK) {
		check_captured_fetches(walk, walker);
		keep_graph(walk, walker);
	} else if ((status == LSHARD_ERR_NOT_PERIODIC && !program->prepared) ||
		   (status == LSHARD_ERR_PEER_FAILED && walker->may_fail)) {
		walk_drop_capture(walk, walker, lshard_status_name(status));
	} else {
		walk_must_be_ok(walk, walker, "join", status);
	}
}

static unsigned either_stream(struct walker *walker)
{
	return walk_draw(&walker->random, 2) ? walker->program.stream : walker->program.other;
}

static void step_of_capture(struct walk *walk, struct walker *walker)
{
	struct program *program = &walker->program;
	uint32_t position = (program->begin + program->next) % walk->options.layer_count;

	if (!program->reached && program->left == 0) {
		end_capture(walk, walker);
		return;
	}
	if (walk_draw(&walker->random, 40) == 0)
		break_something(walk, walker);
	program->reached = !program->reached;
	if (program->reached) {
		walk_reach(walk, walker, position, either_stream(walker));
		return;
	}
	program->next++;
	program->left--;
	if (walk_draw(&walker->random, 8) == 0)
		return; /* skipped, though reached */
	if (walk_wait_for(walk, walker, position, either_stream(walker)) != LSHARD_OK)
		walk_drop_capture(walk, walker, "a fetch failed");
}

static void replay(struct walk *walk, struct walker *walker, unsigned stream)
{
	unsigned kept = walker->n_graphs < MOST_GRAPHS ? walker->n_graphs : MOST_GRAPHS;

	if (!kept)
		return;
	walk_prepare(walk, walker, stream);
	walk_note(walk, "rank %d: replay on stream %u", walk_rank_of(walk, walker), stream);
	walker->steps++;
	walker->replayed = true;
	walker->replay_stream = stream;
	sim_graph_launch(walker->streams[stream], walker->graphs[walk_draw(&walker->random, kept)]);
}

/* ---- Anything goes ---- */

/* Work on a live view may be enqueued on another stream, if the call that ends the view names that stream. */
static void read_on_another_stream(struct walk *walk, struct walker *walker, unsigned stream)
{
	uint32_t next = (walker->views.position + 1) % walk->options.layer_count;

	for (uint32_t p = 0; p < walk->options.layer_count; p++) {
		if (!walker->views.live[p] || walk->host)
			continue;
		sim_follow(walker->streams[stream], walker->streams[walker->views.stream[p]]);
		walk_compute(walk, walker, p, stream);
	}
	walk_reach(walk, walker, next, stream);
}

static void read_again(struct walk *walk, struct walker *walker)
{
	for (uint32_t p = 0; p < walk->options.layer_count; p++)
		if (walker->views.live[p])
			walk_compute(walk, walker, p, walker->views.stream[p]);
}

static void wait_somewhere(struct walk *walk, struct walker *walker, unsigned stream)
{
	uint32_t position = walker->views.position,
		 any = (uint32_t)walk_draw(&walker->random, walk->options.layer_count);

	if (!walk->collective && walk_draw(&walker->random, 3) == 0) {
		walk_wait_for(walk, walker, any, stream);
		return;
	}
	if (walk->collective)
		walk_reach(walk, walker, position, stream); /* what is waited for was sent */
	if (walk_wait_for(walk, walker, position, stream) != LSHARD_ERR_PEER_FAILED)
		return;
	walk_mend(walk, walker);
	walk_reach(walk, walker, position, stream);
	if (walk_wait_for(walk, walker, position, stream) != LSHARD_OK)
		walk_give_up(walk, "rank %d: a layer did not come when its source was back",
			     walk_rank_of(walk, walker));
}

static void step_of_device(struct walk *walk, struct walker *walker, unsigned stream)
{
	switch (walk_draw(&walker->random, 5)) {
	case 0:
		begin_capture(walk, walker, stream);
		break;
	case 1:
	case 2:
		replay(walk, walker, stream);
		break;
	case 3:
		walk_prepare(walk, walker, stream);
		break;
	default:
		read_on_another_stream(walk, walker, stream);
	}
}

static void join_eagerly(struct walk *walk, struct walker *walker, unsigned stream)
{
	lshard_status status = walk_join(walk, walker, stream);

	if (status != LSHARD_ERR_PEER_FAILED || !walker->may_fail)
		walk_must_be_ok(walk, walker, "join", status);
}

static void step_of_free(struct walk *walk, struct walker *walker)
{
	uint32_t layers = walk->options.layer_count, any = (uint32_t)walk_draw(&walker->random, layers);
	unsigned stream = (unsigned)walk_draw(&walker->random, walk->n_streams);
	uint64_t choice = walk_draw(&walker->random, 100);

	if (choice < 30)
		walk_reach(walk, walker, (walker->views.position + 1) % layers, stream);
	else if (choice < 35)
		walk_reach(walk, walker, any, stream);
	else if (choice < 40)
		walk_reach(walk, walker, walker->views.position, stream);
	else if (choice < 70)
		wait_somewhere(walk, walker, stream);
	else if (choice < 74)
		walk_release(walk, walker, any, stream);
	else if (choice < 78)
		read_again(walk, walker);
	else if (choice < 80 && !(walk->host && walk->collective))
		join_eagerly(walk, walker, stream);
	else if (walk->poison && choice < 81 && !(walk->host && walk->collective))
		walk_switch_poison(walk, walker, stream);
	else if (choice < 82)
		break_something(walk, walker);
	else if (choice < 85)
		begin_passes(walker, stream);
	else if (!walk->host)
		step_of_device(walk, walker, stream);
	else
		walk_reach(walk, walker, (walker->views.position + 1) % layers, stream);
}

/* After a replay a program goes on on the same stream or prepares another one; its further streams follow that one. */
static void go_on_after_replay(struct walk *walk, struct walker *walker)
{
	unsigned stream = (unsigned)walk_draw(&walker->random, walk->n_streams);

	walker->replayed = false;
	if (stream != walker->replay_stream)
		walk_prepare(walk, walker, stream);
	for (unsigned s = 0; s < walk->n_streams; s++)
		if (s != stream)
			sim_follow(walker->streams[s], walker->streams[stream]);
}

void walk_step(struct walk *walk, struct walker *walker)
{
	if (walker->replayed && walk_draw(&walker->random, 3) == 0) {
		replay(walk, walker, (unsigned)walk_draw(&walker->random, walk->n_streams));
		return;
	}
	if (walker->replayed)
		go_on_after_replay(walk, walker);
	switch (walker->program.mode) {
	case PASSES:
		step_of_passes(walk, walker);
		break;
	case CAPTURE:
		step_of_capture(walk, walker);
		break;
	default:
		step_of_free(walk, walker);
	}
}
