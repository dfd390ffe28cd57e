/* SPDX-License-Identifier: Apache-2.0
 *
 * sim_run.c - the scheduler of the simulated machine: of all that may run now it picks one half of an operation, by
 * dice and policy.
 *
 * Knows: which operations may run. Does not know: what a transport is, what a copy moves.
 */
#include "sim_world.h"
#include <stdlib.h>
#include <string.h>

/* An operation whose turn it is: the head of a queue, or a node of the graph that is launched there. */
struct turn {
	struct sim_stream *stream;
	struct sim_op *op;
	uint8_t *half;
	size_t node; /* SIZE_MAX: not of a graph */
};

static struct sim_op *head_of(const struct sim_stream *stream)
{
	if (stream->done == stream->queued)
		return NULL;
	return &stream->ops[stream->done & (stream->capacity - 1)];
}

static bool node_ready(const struct sim_op *launch, const struct sim_set *done, size_t node)
{
	const struct sim_set *before = &launch->graph->nodes[node].before;

	for (size_t i = 0; i < SIM_NODES / 64; i++)
		if (before->words[i] & ~done->words[i])
			return false;
	return true;
}

static struct sim_set nodes_done(const struct sim_op *launch)
{
	struct sim_set done = {{0}};

	for (size_t i = 0; i < launch->graph->count; i++)
		if (launch->halves[i] == 2)
			done.words[i / 64] |= (uint64_t)1 << (i % 64);
	return done;
}

/* Call @p visit for everything whose turn it is on @p stream. */
static void each_turn(struct sim_stream *stream, void (*visit)(void *user, const struct turn *turn), void *user)
{
	struct sim_op *head = head_of(stream);
	struct sim_set done;

	if (!head)
		return;
	if (head->kind != SIM_LAUNCH) {
		visit(user, &(struct turn){stream, head, &head->half, SIZE_MAX});
		return;
	}
	done = nodes_done(head);
	for (size_t i = 0; i < head->graph->count; i++)
		if (head->halves[i] < 2 && node_ready(head, &done, i))
			visit(user, &(struct turn){stream, &head->graph->nodes[i].op, &head->halves[i], i});
}

/* ---- Transfers that need all ranks ---- */

struct match {
	const struct sim_op *copy;
	struct turn turn;
	bool found;
};

static bool same_transfer(const struct sim_op *one, const struct sim_op *other)
{
	return one->number == other->number && one->amount == other->amount &&
	       strcmp(one->store->base.plan->name, other->store->base.plan->name) == 0;
}

static void match_turn(void *user, const struct turn *turn)
{
	struct match *match = user;

	if (turn->op->kind != SIM_COPY || *turn->half || turn->op->cancelled || !same_transfer(turn->op, match->copy))
		return;
	match->turn = *turn;
	match->found = true;
}

static bool find_partner(const struct sim_world *world, const struct sim_op *copy, int32_t rank, struct turn *turn)
{
	struct match match = {copy, {NULL, NULL, NULL, 0}, false};

	for (struct sim_stream *stream = world->streams; stream && !match.found; stream = stream->next)
		if (stream->rank == rank)
			each_turn(stream, match_turn, &match);
	*turn = match.turn;
	return match.found;
}

static bool copy_ready(const struct sim_world *world, const struct turn *turn)
{
	struct turn partner;

	if (!turn->op->store->collective || *turn->half || turn->op->cancelled)
		return true;
	for (int32_t r = 0; r < world->size; r++)
		if (!find_partner(world, turn->op, r, &partner))
			return false;
	return true;
}

/* ---- Choosing ---- */

struct choice {
	struct sim_world *world;
	bool by_policy;
	unsigned rank; /* of the best so far: lower goes first */
	uint64_t equals;
	struct turn turn;
};

static bool ready(const struct sim_world *world, const struct turn *turn)
{
	if (turn->op->kind == SIM_WAIT)
		return turn->op->from->done >= turn->op->amount;
	if (turn->op->kind == SIM_COPY)
		return copy_ready(world, turn);
	return true;
}

static unsigned order_of(enum sim_policy policy, enum sim_kind kind)
{
	switch (policy) {
	case SIM_COPIES_LATE:
		return kind == SIM_COPY;
	case SIM_COPIES_EARLY:
		return kind != SIM_COPY;
	case SIM_KERNELS_LATE:
		return kind == SIM_KERNEL;
	default:
		return 0;
	}
}

static void consider(void *user, const struct turn *turn)
{
	struct choice *choice = user;
	unsigned order = choice->by_policy ? order_of(choice->world->policy, turn->op->kind) : 0;

	if ((choice->equals && order > choice->rank) || !ready(choice->world, turn))
		return;
	if (choice->equals && order == choice->rank && sim_random(choice->world, ++choice->equals) != 0)
		return;
	if (!choice->equals || order < choice->rank)
		choice->equals = 1;
	choice->rank = order;
	choice->turn = *turn;
}

/* ---- Running ---- */

/* Half a kernel reads half its bytes; the other half may change before it reads them. */
static void kernel_half(struct sim_world *world, const struct turn *turn)
{
	const struct sim_op *op = turn->op;
	size_t middle = op->amount / 2, begin = *turn->half ? middle : 0, end = *turn->half ? op->amount : middle;
	const unsigned char *seen = op->address, *expected = op->expected;

	if (end > begin && memcmp(seen + begin, expected + begin, end - begin) != 0)
		sim_fault(world, "rank %d: the kernel of layer %u saw wrong bytes in its %s half%s", turn->stream->rank,
			  op->number, *turn->half ? "second" : "first", turn->node == SIZE_MAX ? "" : " (replayed)");
	if (*turn->half)
		world->report.kernels++;
}

static void run_copy(struct sim_world *world, const struct turn *turn)
{
	struct turn partner;
	unsigned half = *turn->half;

	if (turn->op->cancelled) {
		*turn->half = 2;
		return;
	}
	if (half)
		world->report.copies++;
	if (half || !turn->op->store->collective) {
		sim_copy_half(turn->op, half);
		++*turn->half;
		return;
	}
	for (int32_t r = 0; r < world->size; r++)
		if (find_partner(world, turn->op, r, &partner)) {
			sim_copy_half(partner.op, 0);
			*partner.half = 1;
		}
}

static void run_turn(struct sim_world *world, const struct turn *turn)
{
	if (turn->op->kind == SIM_COPY) {
		run_copy(world, turn);
		return;
	}
	if (turn->op->kind == SIM_KERNEL)
		kernel_half(world, turn);
	if (turn->op->kind == SIM_MOVE)
		sim_move_half(turn->op, *turn->half);
	*turn->half = turn->op->kind == SIM_WAIT ? 2 : (uint8_t)(*turn->half + 1);
}

static bool finished(const struct sim_op *op)
{
	if (op->kind != SIM_LAUNCH)
		return op->half == 2;
	for (size_t i = 0; i < op->graph->count; i++)
		if (op->halves[i] < 2)
			return false;
	return true;
}

/* A graph without nodes is finished as soon as it is the head, so look before and after every step. */
static bool finish_heads(struct sim_world *world)
{
	bool any = false;

	for (struct sim_stream *stream = world->streams; stream; stream = stream->next) {
		for (struct sim_op *head = head_of(stream); head && finished(head); head = head_of(stream)) {
			if (head->kind == SIM_LAUNCH)
				world->report.replays++;
			free(head->halves);
			head->halves = NULL;
			stream->done++;
			any = true;
		}
	}
	return any;
}

bool sim_step(struct sim_world *world)
{
	struct choice choice = {.world = world, .by_policy = sim_random(world, 8) != 0};
	bool any = finish_heads(world);

	for (struct sim_stream *stream = world->streams; stream; stream = stream->next)
		each_turn(stream, consider, &choice);
	if (!choice.equals)
		return any;
	run_turn(world, &choice.turn);
	finish_heads(world);
	return true;
}

size_t sim_run(struct sim_world *world, size_t steps)
{
	size_t ran = 0;

	while (ran < steps && sim_step(world))
		ran++;
	return ran;
}

bool sim_finish(struct sim_world *world)
{
	while (sim_step(world))
		;
	for (struct sim_stream *stream = world->streams; stream; stream = stream->next)
		if (stream->done != stream->queued)
			return false;
	return true;
}
