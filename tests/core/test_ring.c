/* SPDX-License-Identifier: Apache-2.0
 *
 * test_ring.c - the state machine of the windows: each transition by itself, then long random sequences under the
 * invariants of ring_check.h, and three more that need whole passes.
 *
 *   I10  passes flow: sequential passes never miss, and each starts exactly the fetches of the layers that share a
 *        window
 *
 *   I11  a sequential step starts at most two fetches; in a capture the first of a pass one for each window of the tail
 *
 *   I12  what windows hold after a reach depends on where the program is, not on how it came there
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include "ring_check.h"
#include <cmocka.h>
#include <stdio.h>

#define ALL        UINT64_MAX
#define NO_HORIZON UINT32_MAX

static void broken(const struct ring_check *check, const char *what)
{
	char holds[512] = "";

	for (uint32_t window = 0, used = 0; window < check->map.n_slots && used < 400; window++)
		used += (uint32_t)snprintf(holds + used, sizeof holds - used, " %d%s",
					   (int)check->windows[window].holds, check->windows[window].viewed ? "v" : "");
	fail_msg("N %u, m %u, horizon %u, at %u%s, windows%s: %s", check->map.n_positions, check->map.n_remote,
		 check->ring.horizon, check->ring.position, check->ring.passed ? " (passed)" : "", holds, what);
}

static void open_ring(struct ring_check *check, uint32_t n, uint64_t remote, uint32_t k, uint32_t horizon)
{
	ring_check_open(check, n, n < 64 ? remote & (((uint64_t)1 << n) - 1) : remote, k, horizon, broken);
}

static uint32_t held_at(const struct ring_check *check, uint32_t position)
{
	return check->windows[check->slot_of[position]].holds;
}

/* ---- One transition at a time; six layers, all elsewhere, two windows: layers 0 2 4 and 1 3 5 ---- */

static void open_six(struct ring_check *check)
{
	open_ring(check, 6, ALL, 1, NO_HORIZON);
	assert_int_equal(check->map.n_slots, 2);
	for (uint32_t p = 0; p < 6; p++)
		assert_int_equal(check->slot_of[p], check->slot_of[p % 2]);
}

static void nothing_is_held_at_first(void **state)
{
	struct ring_check check;
	struct ring_fetch fetch;

	(void)state;
	open_six(&check);
	assert_int_equal(check.windows[0].holds, POSITION_NONE);
	assert_int_equal(check.ring.position, 0);
	assert_true(ring_next_fetch(&check.ring, &fetch));
	assert_int_equal(fetch.position, 0);
	assert_true(ring_next_fetch(&check.ring, &fetch));
	assert_int_equal(fetch.position, 1);
	assert_false(ring_next_fetch(&check.ring, &fetch));
}

static void reach_refills_what_lies_behind(void **state)
{
	struct ring_check check;

	(void)state;
	open_six(&check);
	assert_int_equal(ring_check_reach(&check, 0), 2);
	assert_int_equal(ring_check_reach(&check, 0), 0);
	assert_int_equal(ring_check_reach(&check, 1), 1);
	assert_int_equal(held_at(&check, 0), 2);
	assert_int_equal(held_at(&check, 1), 1);
}

static void a_view_keeps_its_window_until_another_layer_is_reached(void **state)
{
	struct ring_check check;

	(void)state;
	open_six(&check);
	ring_check_reach(&check, 0);
	assert_int_equal(ring_check_wait(&check, 0, 0), RING_HELD);
	assert_int_equal(ring_check_wait(&check, 0, 1), RING_HELD); /* twice is allowed */
	assert_int_equal(check.windows[check.slot_of[0]].streams, 3);
	assert_int_equal(ring_check_reach(&check, 0), 0);
	assert_true(check.windows[check.slot_of[0]].viewed);
	assert_int_equal(ring_check_wait(&check, 2, 0), RING_BUSY);
	assert_int_equal(ring_check_wait(&check, 4, 0), RING_BUSY);
	assert_int_equal(ring_check_reach(&check, 1), 1);
	assert_false(check.windows[check.slot_of[0]].viewed);
	assert_int_equal(ring_check_wait(&check, 2, 0), RING_HELD); /* ahead of the program: on its way */
}

static void release_lets_the_window_go_on(void **state)
{
	struct ring_check check;

	(void)state;
	open_six(&check);
	ring_check_reach(&check, 0);
	ring_check_wait(&check, 0, 0);
	assert_int_equal(ring_check_release(&check, 0), 1);
	assert_int_equal(held_at(&check, 0), 2);
	assert_int_equal(ring_check_release(&check, 0), 0); /* again: nothing to release */
	assert_int_equal(ring_check_release(&check, 5), 0); /* not there */
	assert_int_equal(ring_check_reach(&check, 1), 0);
}

static void release_without_a_view_counts_as_passed(void **state)
{
	struct ring_check check;

	(void)state;
	open_six(&check);
	ring_check_reach(&check, 0);
	assert_int_equal(ring_check_release(&check, 0), 1);
	assert_int_equal(held_at(&check, 0), 2);
	assert_int_equal(ring_check_release(&check, 3), 0); /* the program is not there */
}

static void releasing_a_layer_ahead_keeps_it(void **state)
{
	struct ring_check check;

	(void)state;
	open_six(&check);
	ring_check_reach(&check, 0);
	assert_int_equal(ring_check_wait(&check, 1, 0), RING_HELD);
	assert_int_equal(ring_check_release(&check, 1), 0);
	assert_int_equal(held_at(&check, 1), 1);
}

static void a_wait_for_what_is_not_there_is_a_miss(void **state)
{
	struct ring_check check;

	(void)state;
	open_six(&check);
	ring_check_reach(&check, 0);
	assert_int_equal(ring_check_wait(&check, 4, 0), RING_MISS);
	assert_int_equal(ring_check_wait(&check, 4, 0), RING_HELD);
	assert_int_equal(ring_check_wait(&check, 0, 0), RING_BUSY); /* overwritten by the miss */
	assert_int_equal(ring_check_reach(&check, 0), 1);           /* and brought again */
	assert_int_equal(ring_check_wait(&check, 0, 0), RING_HELD);
}

static void stored_layers_need_no_window(void **state)
{
	struct ring_check check;

	(void)state;
	open_ring(&check, 6, 0x2a, 1, NO_HORIZON); /* 1, 3, 5 elsewhere */
	ring_check_reach(&check, 0);
	assert_int_equal(ring_check_wait(&check, 0, 0), RING_STORED);
	assert_int_equal(ring_check_release(&check, 2), 0);
	open_ring(&check, 6, 0, 1, NO_HORIZON);
	assert_int_equal(check.map.n_slots, 0);
	assert_int_equal(ring_check_reach(&check, 5), 0);
	assert_int_equal(ring_check_join(&check), 0);
	assert_int_equal(ring_check_prepare(&check), 0);
	assert_int_equal(ring_check_wait(&check, 3, 0), RING_STORED);
}

static void one_layer_never_leaves_its_window(void **state)
{
	struct ring_check check;

	(void)state;
	open_ring(&check, 1, 1, 3, NO_HORIZON);
	assert_int_equal(ring_check_reach(&check, 0), 1);
	for (int pass = 0; pass < 3; pass++) {
		assert_int_equal(ring_check_wait(&check, 0, 0), RING_HELD);
		assert_int_equal(ring_check_release(&check, 0), 0);
		assert_int_equal(ring_check_reach(&check, 0), 0);
	}
}

static void a_jump_costs_only_transfers(void **state)
{
	struct ring_check check;

	(void)state;
	open_six(&check);
	ring_check_reach(&check, 0);
	ring_check_wait(&check, 0, 0);
	assert_int_equal(ring_check_reach(&check, 4), 2);
	assert_int_equal(held_at(&check, 0), 4);
	assert_int_equal(held_at(&check, 1), 5);
	assert_int_equal(ring_check_reach(&check, 2), 2); /* back */
	assert_int_equal(ring_check_wait(&check, 2, 0), RING_HELD);
	assert_int_equal(ring_check_wait(&check, 3, 0), RING_HELD);
}

static void join_and_prepare_end_a_pass(void **state)
{
	struct ring_check check;

	(void)state;
	open_six(&check);
	for (uint32_t p = 0; p < 6; p++) {
		ring_check_reach(&check, p);
		ring_check_wait(&check, p, 0);
	}
	assert_int_equal(held_at(&check, 0), 0); /* of the next pass */
	assert_int_equal(held_at(&check, 1), 5);
	assert_int_equal(ring_check_join(&check), 1);
	assert_int_equal(held_at(&check, 1), 1);
	assert_int_equal(ring_check_prepare(&check), 0);
	assert_int_equal(held_at(&check, 0), 0);
	assert_int_equal(held_at(&check, 1), POSITION_NONE);
	assert_int_equal(ring_check_prepare(&check), 0); /* nothing to do in steady use */
	assert_int_equal(ring_check_join(&check), 0);
	assert_int_equal(ring_check_release(&check, 5), 0);
	assert_int_equal(ring_check_reach(&check, 0), 1);
	ring_check_reach(&check, 3); /* a pass that is broken off */
	assert_int_equal(ring_check_prepare(&check), 1);
	assert_int_equal(held_at(&check, 0), 0);
	assert_int_equal(held_at(&check, 1), POSITION_NONE);
	ring_check_reach(&check, 3);
	assert_int_equal(ring_check_restart(&check), 2);
	assert_int_equal(held_at(&check, 0), 0);
	assert_int_equal(held_at(&check, 1), 1);
}

/* What a replay does to the windows is what the ring says of them before and after it. */
static void a_captured_pass_ends_as_it_began(void **state)
{
	struct ring_check check;

	(void)state;
	open_six(&check);
	ring_check_prepare(&check);
	ring_check_capture(&check);
	assert_int_equal(ring_check_reach(&check, 0), 1);
	assert_int_equal(held_at(&check, 1), 1);
	for (uint32_t p = 0; p < 6; p++) {
		assert_int_equal(ring_check_reach(&check, p), p == 0 ? 0 : 1);
		assert_int_equal(ring_check_wait(&check, p, 0), RING_HELD);
	}
	assert_int_equal(ring_check_release(&check, 5), 0);
	assert_int_equal(ring_check_join(&check), 0);
	assert_int_equal(held_at(&check, 0), 0);
	assert_int_equal(held_at(&check, 1), 5); /* until the next pass, also in the same capture */
	assert_int_equal(ring_check_reach(&check, 0), 1);
	ring_check_capture(&check);
	assert_int_equal(held_at(&check, 1), POSITION_NONE);
	assert_int_equal(ring_check_reach(&check, 0), 1);
}

/* Whatever was there: a replay will not find it. */
static void a_capture_begins_without_what_the_tail_holds(void **state)
{
	struct ring_check check;

	(void)state;
	open_six(&check);
	ring_check_reach(&check, 1);
	ring_check_wait(&check, 1, 0);
	ring_check_capture(&check);
	assert_int_equal(ring_check_wait(&check, 1, 0), RING_MISS);
	ring_check_capture(&check);
	assert_int_equal(ring_check_wait(&check, 1, 0), RING_HELD);
}

static void a_failed_fetch_is_tried_again(void **state)
{
	struct ring_check check;

	(void)state;
	open_six(&check);
	ring_check_reach(&check, 0);
	assert_int_equal(ring_check_wait(&check, 0, 0), RING_HELD);
	ring_check_fail(&check, check.slot_of[0]);
	assert_int_equal(ring_check_wait(&check, 0, 0), RING_MISS); /* by the next wait */
	ring_check_fail(&check, check.slot_of[0]);
	assert_int_equal(ring_check_reach(&check, 0), 1); /* or the next reach */
	assert_int_equal(ring_check_wait(&check, 0, 0), RING_HELD);
}

static void reset_forgets_everything(void **state)
{
	struct ring_check check;

	(void)state;
	open_six(&check);
	ring_check_reach(&check, 3);
	ring_check_wait(&check, 3, 0);
	assert_int_equal(ring_check_reset(&check), 2);
	assert_int_equal(held_at(&check, 0), 0);
	assert_int_equal(held_at(&check, 1), 1);
}

static void noted_streams_stay_until_the_caller_clears_them(void **state)
{
	struct ring_check check;

	(void)state;
	open_six(&check);
	ring_check_reach(&check, 0);
	ring_check_wait(&check, 0, 2);
	ring_note_stream(&check.ring, 5);
	assert_int_equal(check.windows[check.slot_of[0]].streams, 1 << 2 | 1 << 5);
	assert_int_equal(check.windows[check.slot_of[1]].streams, 1 << 5);
	ring_check_reach(&check, 1);
	assert_int_equal(check.windows[check.slot_of[0]].streams, 1 << 2 | 1 << 5);
}

static void a_horizon_holds_fetches_back(void **state)
{
	struct ring_check check;

	(void)state;
	open_ring(&check, 8, 0x88, 1, 1); /* layers 3 and 7, a window each */
	assert_int_equal(ring_check_reach(&check, 0), 0);
	assert_int_equal(ring_check_reach(&check, 1), 0);
	assert_int_equal(ring_check_reach(&check, 2), 1); /* layer 3 is one ahead */
	assert_int_equal(ring_check_reach(&check, 3), 0);
	assert_int_equal(ring_check_reach(&check, 7), 1); /* jumped right to it */
}

/* ---- Whole passes ---- */

/* Layers that share their window with another, and so are brought once per pass. */
static uint32_t per_pass(const struct ring_check *check)
{
	uint32_t count = 0;

	for (uint32_t i = 0; i < check->map.n_remote; i++) {
		uint32_t p = check->map.remote[i];

		count += ring_check_next(check, check->slot_of[p], (p + 1) % check->map.n_positions) != p;
	}
	return count;
}

static void run_passes(struct ring_check *check)
{
	uint32_t n = check->map.n_positions;

	for (int pass = 0; pass < 4; pass++) {
		uint32_t fetches = 0;

		for (uint32_t p = 0; p < n; p++) {
			uint32_t started = ring_check_reach(check, p);
			enum ring_access access = ring_check_wait(check, p, 0);

			if (pass && started > 2 && (p || !check->outside.map))
				broken(check, "I11: more than two fetches in a sequential step");
			if (access != RING_STORED && access != RING_HELD)
				broken(check, "I10: a miss in a sequential pass");
			fetches += started;
		}
		if (pass > 1 && fetches != per_pass(check))
			broken(check, "I10: a steady pass brings too much or too little");
	}
}

static uint64_t next_random(uint64_t *random)
{
	uint64_t z = *random += 0x9e3779b97f4a7c15u;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

static void open_random(struct ring_check *check, uint64_t *random)
{
	uint32_t n = 1 + (uint32_t)(next_random(random) % (next_random(random) % 4 ? 14 : 64));
	uint64_t remote = next_random(random) % 3 ? next_random(random) | next_random(random) : ALL;
	uint32_t k = (uint32_t)(next_random(random) % 8);

	open_ring(check, n, remote, k, next_random(random) % 3 ? NO_HORIZON : k);
}

static void passes_flow(void **state)
{
	struct ring_check check;
	uint64_t random = 1;

	(void)state;
	for (int i = 0; i < 3000; i++) {
		open_random(&check, &random);
		run_passes(&check);
	}
}

static void random_call(struct ring_check *check, uint64_t *random)
{
	uint32_t n = check->map.n_positions, position = (uint32_t)(next_random(random) % n);

	switch (next_random(random) % 11) {
	case 0:
		ring_check_reach(check, position);
		break;
	case 1:
	case 2:
		ring_check_wait(check, position, (unsigned)(next_random(random) % RING_STREAMS));
		break;
	case 3:
		ring_check_wait(check, check->ring.position, 0);
		break;
	case 4:
		ring_check_release(check, position);
		break;
	case 5:
		ring_check_release(check, check->ring.position);
		break;
	case 6:
		if (check->map.n_slots)
			ring_check_fail(check, (uint32_t)(next_random(random) % check->map.n_slots));
		break;
	case 7:
		if (position % 2)
			ring_check_join(check);
		else
			ring_check_prepare(check);
		break;
	case 8:
		if (next_random(random) % 4 == 0)
			ring_check_capture(check);
		else if (next_random(random) % 4 == 0)
			ring_check_restart(check);
		break;
	default:
		ring_check_reach(check, (check->ring.position + 1) % n);
	}
}

static void end_capture(struct ring_check *check)
{
	if (check->outside.map)
		ring_check_capture(check);
}

static void any_sequence_keeps_the_invariants(void **state)
{
	struct ring_check check;
	uint64_t random = 2;

	(void)state;
	for (int i = 0; i < 2000; i++) {
		open_random(&check, &random);
		for (int call = 0; call < 200; call++)
			random_call(&check, &random);
		run_passes(&check); /* captured or not */
	}
}

static void history_does_not_matter(void **state)
{
	struct ring_check check, fresh;
	uint64_t random = 3;

	(void)state;
	for (int i = 0; i < 2000; i++) {
		uint32_t n = 1 + (uint32_t)(next_random(&random) % 30), k = (uint32_t)(next_random(&random) % 6);
		uint64_t remote = next_random(&random) | next_random(&random);
		uint32_t position = (uint32_t)(next_random(&random) % n);

		open_ring(&check, n, remote, k, NO_HORIZON);
		open_ring(&fresh, n, remote, k, NO_HORIZON);
		for (int call = 0; call < 50; call++)
			random_call(&check, &random);
		end_capture(&check);
		ring_check_join(&check); /* no views */
		ring_check_reach(&check, position);
		ring_check_reach(&fresh, position);
		for (uint32_t window = 0; window < check.map.n_slots; window++)
			if (check.windows[window].holds != fresh.windows[window].holds)
				broken(&check, "I12: history matters");
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(nothing_is_held_at_first),
		cmocka_unit_test(reach_refills_what_lies_behind),
		cmocka_unit_test(a_view_keeps_its_window_until_another_layer_is_reached),
		cmocka_unit_test(release_lets_the_window_go_on),
		cmocka_unit_test(release_without_a_view_counts_as_passed),
		cmocka_unit_test(releasing_a_layer_ahead_keeps_it),
		cmocka_unit_test(a_wait_for_what_is_not_there_is_a_miss),
		cmocka_unit_test(stored_layers_need_no_window),
		cmocka_unit_test(one_layer_never_leaves_its_window),
		cmocka_unit_test(a_jump_costs_only_transfers),
		cmocka_unit_test(join_and_prepare_end_a_pass),
		cmocka_unit_test(a_captured_pass_ends_as_it_began),
		cmocka_unit_test(a_capture_begins_without_what_the_tail_holds),
		cmocka_unit_test(a_failed_fetch_is_tried_again),
		cmocka_unit_test(reset_forgets_everything),
		cmocka_unit_test(noted_streams_stay_until_the_caller_clears_them),
		cmocka_unit_test(a_horizon_holds_fetches_back),
		cmocka_unit_test(passes_flow),
		cmocka_unit_test(any_sequence_keeps_the_invariants),
		cmocka_unit_test(history_does_not_matter),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
