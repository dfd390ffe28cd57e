/* SPDX-License-Identifier: Apache-2.0
 *
 * test_tail.c - what the tail rule costs and keeps, searched over all small maps and links of many speeds: chains of
 * eager passes and of replays in virtual time, with one link that carries one layer at a time.
 *
 * Knows: ring.h. Written from the rule in docs/design.md:
 *
 *   I18 replays see the bytes that the capture saw, whatever the windows of the tail hold before them, and leave what
 *       the ring says
 *
 *   I19 a replay is later than an eager pass by at most the compute of the layers given up: of each window the fewer of
 *       those that its refill across the end has before the end and after it, and of all windows the most
 *
 *   I20 eager passes start the same transfers at the same calls as if there were no tail
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include "ring.h"
#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#define MOST_LAYERS 80
#define NO_HORIZON  UINT32_MAX
#define COMPUTE     6u /* of a layer; transfers take less and more */
#define WARM        5u
#define TIMED       6u

struct chain {
	struct ring ring;
	struct slotmap map;
	struct ring_window windows[MOST_LAYERS];
	uint32_t remote[MOST_LAYERS], slot_of[MOST_LAYERS], at_or_after[MOST_LAYERS];
	uint32_t contents[MOST_LAYERS]; /* of windows: what was last copied there */
	uint64_t arrives[MOST_LAYERS];
	uint64_t now, link_free, transfer;
	uint32_t k, horizon;
};

static void broken(const struct chain *chain, const char *what)
{
	char layers[2 * MOST_LAYERS + 1] = "";

	for (uint32_t p = 0; p < chain->map.n_positions; p++)
		strcat(layers, chain->slot_of[p] == SLOT_NONE ? "-" : "x");
	fail_msg("layers %s, k %u, horizon %u, transfers of %u/%u layers: %s", layers, chain->k, chain->horizon,
		 (unsigned)chain->transfer, COMPUTE, what);
}

static void open_chain(struct chain *chain, uint32_t n, const uint8_t *elsewhere, uint32_t k, uint32_t horizon)
{
	uint32_t m = 0;

	memset(chain, 0, sizeof *chain);
	chain->k = k;
	chain->horizon = horizon;
	for (uint32_t p = 0; p < n; p++)
		if (elsewhere[p])
			chain->remote[m++] = p;
	slotmap_build(&chain->map, n, chain->remote, m, k, chain->slot_of, chain->at_or_after);
}

static void begin_chain(struct chain *chain, uint64_t transfer)
{
	ring_init(&chain->ring, &chain->map, chain->windows, chain->horizon);
	chain->now = chain->link_free = 0;
	chain->transfer = transfer;
	for (uint32_t window = 0; window < chain->map.n_slots; window++)
		chain->contents[window] = POSITION_NONE;
}

/* ---- One pass ---- */

static void start_fetches(struct chain *chain)
{
	struct ring_fetch fetch;

	while (ring_next_fetch(&chain->ring, &fetch)) {
		if (chain->link_free < chain->now)
			chain->link_free = chain->now;
		chain->link_free += chain->transfer;
		chain->arrives[fetch.window] = chain->link_free;
		chain->contents[fetch.window] = fetch.position;
	}
}

static void run_pass(struct chain *chain)
{
	for (uint32_t position = 0; position < chain->map.n_positions; position++) {
		uint32_t window, other;
		enum ring_access access;

		ring_reach(&chain->ring, position);
		start_fetches(chain);
		access = ring_wait(&chain->ring, position, 0, &window, &other);
		if (access != RING_STORED && (access != RING_HELD || chain->contents[window] != position))
			broken(chain, "a layer was not there");
		if (access != RING_STORED && chain->now < chain->arrives[window])
			chain->now = chain->arrives[window];
		chain->now += COMPUTE;
	}
}

/* Join and prepare bring what they bring however far ahead, and wait for it. */
static void settle(struct chain *chain)
{
	chain->ring.horizon = NO_HORIZON;
	start_fetches(chain);
	chain->ring.horizon = chain->horizon;
	if (chain->now < chain->link_free)
		chain->now = chain->link_free;
}

static void run_captured_pass(struct chain *chain)
{
	run_pass(chain);
	ring_join(&chain->ring);
	settle(chain);
}

static void prepare(struct chain *chain)
{
	ring_prepare(&chain->ring);
	settle(chain);
}

/* ---- What a chain of passes takes ---- */

static uint64_t time_eager(struct chain *chain, uint64_t transfer)
{
	uint64_t begin;

	begin_chain(chain, transfer);
	for (unsigned pass = 0; pass < WARM; pass++)
		run_pass(chain);
	begin = chain->now;
	for (unsigned pass = 0; pass < TIMED; pass++)
		run_pass(chain);
	return chain->now - begin;
}

static uint64_t time_captured(struct chain *chain, uint64_t transfer)
{
	uint64_t begin;

	begin_chain(chain, transfer);
	prepare(chain);
	ring_enter_capture(&chain->ring);
	for (unsigned pass = 0; pass < WARM; pass++)
		run_captured_pass(chain);
	begin = chain->now;
	for (unsigned pass = 0; pass < TIMED; pass++)
		run_captured_pass(chain);
	return chain->now - begin;
}

/* Of the layers between the start of each refill across the end and its use, the fewer on one side; the most of all. */
static uint32_t given_up(const struct chain *chain)
{
	const uint32_t n = chain->map.n_positions;
	uint32_t most = 0;

	for (uint32_t window = 0; window < chain->map.n_slots; window++) {
		uint32_t first = n, last = 0, before = 0;

		for (uint32_t p = n; p-- > 0;) {
			if (chain->slot_of[p] != window)
				continue;
			first = p;
			last = last > p ? last : p;
		}
		for (uint32_t p = last + 1; p < n; p++)
			before += n + first - p <= chain->horizon;
		if (first == last)
			continue;
		before = before < first ? before : first;
		most = most > before ? most : before;
	}
	return most;
}

struct figures {
	unsigned long chains, later, maps, fetches;
	double worst; /* of a pass, as a share of it */
};

static void compare_times(struct chain *chain, uint32_t most_transfer, struct figures *figures)
{
	const uint64_t explained = (uint64_t)given_up(chain) * COMPUTE * TIMED;

	figures->maps++;
	for (uint32_t transfer = 1; transfer <= most_transfer; transfer += 1 + transfer / 5) {
		const uint64_t eager = time_eager(chain, transfer), captured = time_captured(chain, transfer);

		figures->chains++;
		if (captured > eager + explained)
			broken(chain, "I19: a replay is later than the tail rule explains");
		if (captured <= eager)
			continue;
		figures->later++;
		if ((double)(captured - eager) / (double)eager > figures->worst)
			figures->worst = (double)(captured - eager) / (double)eager;
	}
}

/* ---- All small maps ---- */

typedef void (*try_map)(struct chain *chain, struct figures *figures);

static void for_all_small_maps(uint32_t most_layers, try_map try, struct figures *figures)
{
	struct chain chain;
	uint8_t elsewhere[16];

	for (uint32_t n = 1; n <= most_layers; n++)
		for (uint32_t layers = 1; layers < 1u << n; layers++) {
			for (uint32_t p = 0; p < n; p++)
				elsewhere[p] = layers >> p & 1;
			for (uint32_t k = 0; k < 4; k++)
				for (int collective = 0; collective < 2; collective++) {
					open_chain(&chain, n, elsewhere, k, collective ? k : NO_HORIZON);
					try(&chain, figures);
				}
		}
}

static void try_times(struct chain *chain, struct figures *figures)
{
	compare_times(chain, 4 * COMPUTE, figures);
}

static void tell(const char *what, const struct figures *figures)
{
	print_message("%s: %lu maps, %lu chains, %lu later than eager, by %.1f %% at most\n", what, figures->maps,
		      figures->chains, figures->later, 100 * figures->worst);
}

static void a_replay_is_no_later_than_the_rule_explains(void **state)
{
	struct figures figures = {0};

	(void)state;
	for_all_small_maps(8, try_times, &figures);
	tell("all maps of 8 layers and fewer", &figures);
	assert_true(figures.later > 0);
}

/* Every n-th layer stored here, as in a group of n ranks. */
static void open_rank(struct chain *chain, uint32_t layers, uint32_t n, uint32_t rank, uint32_t k)
{
	uint8_t elsewhere[MOST_LAYERS];

	for (uint32_t p = 0; p < layers; p++)
		elsewhere[p] = p % n != rank;
	open_chain(chain, layers, elsewhere, k, NO_HORIZON);
}

static void models_of_usual_depths_too(void **state)
{
	static const uint32_t depths[] = {12, 16, 24, 32, 61, 80};
	struct figures figures = {0};
	struct chain chain;

	(void)state;
	for (size_t d = 0; d < sizeof depths / sizeof depths[0]; d++)
		for (uint32_t n = 2; n <= 8; n += 1 + n / 3)
			for (uint32_t rank = 0; rank < n; rank++)
				for (uint32_t k = 0; k < 3; k++) {
					open_rank(&chain, depths[d], n, rank, k);
					compare_times(&chain, 4 * COMPUTE, &figures);
				}
	tell("usual depths", &figures);
}

/* Between two ranks, at any speed of the link: what was measured, and what the rule was made for. */
static void between_two_ranks_a_replay_takes_what_a_pass_takes(void **state)
{
	struct chain chain;

	(void)state;
	for (uint32_t rank = 0; rank < 2; rank++)
		for (uint32_t k = 0; k < 2; k++)
			for (uint32_t layers = 4; layers <= MOST_LAYERS; layers += 4) {
				open_rank(&chain, layers, 2, rank, k);
				for (uint32_t transfer = 1; transfer <= 10 * COMPUTE; transfer += 1 + transfer / 8)
					if (time_captured(&chain, transfer) != time_eager(&chain, transfer))
						broken(&chain, "a replay takes another time than a pass");
			}
}

/* ---- Bytes ---- */

/* What a graph does to the windows, again and again. */
struct graph {
	struct {
		uint32_t position, window;
		bool wait;
	} steps[4 * 16];
	unsigned count;
};

static void record_fetches(struct chain *chain, struct graph *graph)
{
	struct ring_fetch fetch;

	while (ring_next_fetch(&chain->ring, &fetch)) {
		graph->steps[graph->count].position = fetch.position;
		graph->steps[graph->count].window = fetch.window;
		graph->steps[graph->count++].wait = false;
	}
}

static void capture(struct chain *chain, struct graph *graph)
{
	const struct ring outside = chain->ring;
	struct ring_window windows[MOST_LAYERS];

	memcpy(windows, chain->windows, sizeof windows);
	graph->count = 0;
	ring_enter_capture(&chain->ring);
	for (uint32_t position = 0; position < chain->map.n_positions; position++) {
		uint32_t window, other;

		ring_reach(&chain->ring, position);
		record_fetches(chain, graph);
		if (ring_wait(&chain->ring, position, 0, &window, &other) == RING_STORED)
			continue;
		graph->steps[graph->count].position = position;
		graph->steps[graph->count].window = window;
		graph->steps[graph->count++].wait = true;
	}
	ring_join(&chain->ring);
	chain->ring.horizon = NO_HORIZON;
	record_fetches(chain, graph);
	chain->ring = outside;
	memcpy(chain->windows, windows, sizeof windows);
}

static void replay(struct chain *chain, const struct graph *graph)
{
	for (unsigned step = 0; step < graph->count; step++) {
		const uint32_t position = graph->steps[step].position, window = graph->steps[step].window;

		if (!graph->steps[step].wait)
			chain->contents[window] = position;
		else if (chain->contents[window] != position)
			broken(chain, "I18: a replay sees another layer");
	}
	for (uint32_t window = 0; window < chain->map.n_slots; window++)
		if (chain->windows[window].holds != POSITION_NONE &&
		    chain->windows[window].holds != chain->contents[window])
			broken(chain, "I18: a replay leaves another layer than the ring says");
}

/* Captured wherever the program is; replayed, mixed with eager passes and with passes that are broken off. */
static void try_bytes(struct chain *chain, struct figures *figures)
{
	struct graph graph;

	figures->maps++;
	begin_chain(chain, 1);
	run_pass(chain);
	prepare(chain);
	capture(chain, &graph);
	replay(chain, &graph);
	prepare(chain);
	replay(chain, &graph);
	run_pass(chain);
	run_pass(chain);
	prepare(chain);
	replay(chain, &graph);
	for (uint32_t p = 0; p < chain->map.n_positions; p++) {
		ring_reach(&chain->ring, p);
		start_fetches(chain);
		prepare(chain);
		replay(chain, &graph);
		run_pass(chain);
	}
}

static void replays_see_their_layers(void **state)
{
	struct figures figures = {0};

	(void)state;
	for_all_small_maps(7, try_bytes, &figures);
	assert_true(figures.maps > 0);
}

/* ---- Eager passes ---- */

/* The same calls on a ring of which no window is one of the tail. */
static void try_eager(struct chain *chain, struct figures *figures)
{
	struct chain plain = *chain;

	figures->maps++;
	begin_chain(chain, 1);
	begin_chain(&plain, 1);
	for (uint32_t window = 0; window < plain.map.n_slots; window++)
		plain.windows[window].tail = false;
	for (uint32_t step = 0; step < 4 * chain->map.n_positions; step++) {
		struct ring *rings[2] = {&chain->ring, &plain.ring};
		struct ring_fetch fetch[2] = {{0, 0}, {0, 0}};
		bool more[2];

		for (int r = 0; r < 2; r++) {
			uint32_t window, other;

			ring_reach(rings[r], step % chain->map.n_positions);
			ring_wait(rings[r], step % chain->map.n_positions, 0, &window, &other);
			if (step % 5 == 4)
				ring_join(rings[r]);
			else if (step % 7 == 6)
				ring_restart(rings[r]);
		}
		do {
			for (int r = 0; r < 2; r++)
				more[r] = ring_next_fetch(rings[r], &fetch[r]);
			if (more[0] != more[1] || memcmp(&fetch[0], &fetch[1], sizeof fetch[0]))
				broken(chain, "I20: the tail changes an eager pass");
			figures->fetches += more[0];
		} while (more[0]);
	}
}

static void eager_passes_know_nothing_of_it(void **state)
{
	struct figures figures = {0};

	(void)state;
	for_all_small_maps(8, try_eager, &figures);
	assert_true(figures.fetches > figures.maps);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_replay_is_no_later_than_the_rule_explains),
		cmocka_unit_test(models_of_usual_depths_too),
		cmocka_unit_test(between_two_ranks_a_replay_takes_what_a_pass_takes),
		cmocka_unit_test(replays_see_their_layers),
		cmocka_unit_test(eager_passes_know_nothing_of_it),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
