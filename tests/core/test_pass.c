/* SPDX-License-Identifier: Apache-2.0
 *
 * test_pass.c - reach, wait and release: when transfers start and in which order, what is counted, and what a call that
 * is refused or times out leaves behind. On the transport `local`, and on the simulated machine where the calls that
 * arrive at a transport are watched.
 */
#include "local_ranks.h"
#include "patience.h"
#include "simulated_ranks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

/* ---- When transfers start ---------------------------------------------------------------------------------------- */

static void release_starts_the_next_transfer_at_once(void **state)
{
	static const lshard_transport_ops *const flavours[] = {&sim_one_sided, &sim_host_one_sided};

	(void)state;
	for (size_t f = 0; f < 2; f++) {
		struct run *run = run_open(flavours[f], 2, 0, 6, 0); /* rank 0: 1, 3, 5 through one window */
		struct run_member *member = &run->members[0];
		void *stream = f ? NULL : member->stream;
		uint64_t before;

		run_call_ok(member, "reach", 1, lshard_reach(member->series, 1, stream));
		run_call_ok(member, "wait", 1, lshard_wait(member->series, 1, stream));
		before = run_stats(run, 0).fetches;
		run_call_ok(member, "release", 1, lshard_release(member->series, 1, stream));
		assert_int_equal(run_stats(run, 0).fetches, before + 1);
		run_call_ok(member, "reach", 3, lshard_reach(member->series, 3, stream));
		run_call_ok(member, "wait", 3, lshard_wait(member->series, 3, stream));
		assert_int_equal(run_stats(run, 0).fetches, before + 1); /* it was layer 3 */
		assert_int_equal(run_misses(run), 0);
		run_close(run);
	}
}

/* ---- Calls as they arrive at the transport ----------------------------------------------------------------------- */

#define WATCHED 4096

/* One rank's calls at a time are watched; the simulated machine does the work. */
static struct {
	uint32_t fetched[WATCHED];
	size_t n_fetched;
	const uint64_t *blocked_ns; /* what the next waits say; NULL: nothing is changed */
	uint32_t timeout_ms;
	bool refuses; /* every fetch of rank 0, each for a cause of its own */
} watched;

static lshard_status watched_fetch(lshard_store *store, uint32_t position, uint32_t buffer, void *stream,
				   uint64_t sequence)
{
	if (store->transport->context->rank == 0 && watched.n_fetched < WATCHED)
		watched.fetched[watched.n_fetched++] = position;
	if (store->transport->context->rank == 0 && watched.refuses)
		return lshard_fail(&store->error, LSHARD_ERR_TRANSPORT, "no way to position %u", position);
	return sim_host_one_sided.fetch(store, position, buffer, stream, sequence);
}

static lshard_status watched_wait(lshard_store *store, uint32_t buffer, void *stream, lshard_arrival *arrival)
{
	const lshard_status status = sim_host_one_sided.wait(store, buffer, stream, arrival);

	if (watched.blocked_ns)
		arrival->blocked_ns = *watched.blocked_ns++;
	return status;
}

static lshard_transport_ops watched_ops;

static lshard_status watched_open(const lshard_context *context, lshard_transport *inner, lshard_transport **transport,
				  lshard_error *error)
{
	const lshard_status status = sim_host_one_sided.open(context, inner, transport, error);

	if (context->rank == 0) /* the other ranks open theirs at the same time */
		watched.timeout_ms = context->timeout_ms;
	if (status == LSHARD_OK)
		(*transport)->ops = &watched_ops;
	return status;
}

static const lshard_transport_ops *watch(void)
{
	memset(&watched, 0, sizeof watched);
	watched_ops = sim_host_one_sided;
	watched_ops.open = watched_open;
	watched_ops.fetch = watched_fetch;
	watched_ops.wait = watched_wait;
	return &watched_ops;
}

/* 3001 layers in 1001 windows: one of these is used in one stretch of the circle only, and its need is the farthest. */
static void a_far_jump_starts_every_transfer_in_order_of_need(void **state)
{
	static const uint32_t jumps[] = {3001, 5501, 2001, 4101, 1001};          /* far from each other */
	struct run *run = run_create_within(watch(), 2, 0, 6003, 1000, LONG_MS); /* rank 0 brings the odd ones */
	struct run_member *member = &run->members[0];
	const uint32_t layers = run->options.layer_count;

	(void)state;
	run_together(run, run_commit_rank);
	assert_int_equal(run_stats(run, 0).windows, 1001);
	for (size_t j = 0; j < sizeof jumps / sizeof jumps[0]; j++) {
		size_t n;

		watched.n_fetched = 0;
		run_call_ok(member, "reach", jumps[j], lshard_reach(member->series, jumps[j], NULL));
		n = watched.n_fetched;
		assert_int_equal(watched.fetched[0], jumps[j]);
		assert_in_range(n, 1000, 1001); /* one may hold its layer already */
		for (size_t i = 1; i < n; i++)
			assert_true((watched.fetched[i] + layers - jumps[j]) % layers >
				    (watched.fetched[i - 1] + layers - jumps[j]) % layers);
		run_call_ok(member, "reach", jumps[j], lshard_reach(member->series, jumps[j], NULL));
		assert_int_equal(watched.n_fetched, n); /* all are there or coming */
	}
	run_close(run);
}

static void the_longest_time_blocked_is_kept(void **state)
{
	static const uint64_t blocked[] = {30, 900, 7, 0, 0};
	struct run *run = run_open(watch(), 2, 0, 8, 0);
	lshard_stats stats;

	(void)state;
	watched.blocked_ns = blocked;
	for (uint32_t layer = 1; layer < 8; layer += 2) {
		run_call_ok(&run->members[0], "reach", layer, lshard_reach(run->members[0].series, layer, NULL));
		run_call_ok(&run->members[0], "wait", layer, lshard_wait(run->members[0].series, layer, NULL));
	}
	watched.blocked_ns = NULL;
	stats = run_stats(run, 0);
	assert_int_equal(stats.max_blocked_ns, 900);
	assert_int_equal(stats.blocked_ns, 937);
	assert_int_equal(stats.stalls, 3);
	run_close(run);
}

static void assert_cause(const struct run_member *member, lshard_status status, const char *cause)
{
	assert_int_equal(status, LSHARD_ERR_TRANSPORT);
	if (!strstr(lshard_series_error(member->series), cause))
		fail_msg("not \"%s\": %s", cause, lshard_series_error(member->series));
}

/* Layers 1 and 5 are refused one after the other, before the first is waited for. */
static void each_fetch_that_could_not_start_keeps_its_cause(void **state)
{
	struct run *run = run_create(watch(), 2, 0, 6, 1);
	struct run_member *member = &run->members[0];

	(void)state;
	watched.refuses = true;
	run_together(run, run_commit_rank);
	assert_int_equal(watched.n_fetched, 2);
	assert_cause(member, lshard_wait(member->series, 1, NULL), "no way to position 1");
	assert_cause(member, lshard_wait(member->series, 5, NULL), "no way to position 5");
	watched.n_fetched = 0;
	assert_cause(member, lshard_series_prepare(member->series, NULL), "no way to position 1");
	assert_int_equal(watched.n_fetched, 2);
	watched.refuses = false;
	run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, NULL));
	run_call_ok(member, "wait", 1, lshard_wait(member->series, 1, NULL));
	run_call_ok(member, "wait", 5, lshard_wait(member->series, 5, NULL));
	run_close(run);
}

/* ---- What calls count and leave ---------------------------------------------------------------------------------- */

static void prepare_does_not_belong_into_a_capture(void **state)
{
	struct run *run = run_open(&sim_one_sided, 2, 1, 7, 1);
	struct run_member *member = &run->members[0];

	(void)state;
	run_pass(run, 0);
	sim_capture_begin(member->stream);
	assert_int_equal(lshard_series_prepare(member->series, member->stream), LSHARD_ERR_STATE);
	assert_non_null(strstr(lshard_series_error(member->series), "before a capture"));
	assert_int_equal(lshard_series_join(member->series, member->stream), LSHARD_ERR_STATE);
	assert_non_null(strstr(lshard_series_error(member->series), "capture again"));
	sim_capture_abort(member->stream);
	run_pass(run, 0); /* nothing was changed */
	run_close(run);
}

static struct sim_graph *capture(struct run *run, uint32_t layers)
{
	struct run_member *member = &run->members[0];

	sim_capture_begin(member->stream);
	for (uint32_t layer = 0; layer < layers; layer++)
		run_layer(run, 0, layer);
	member->status = lshard_series_join(member->series, member->stream);
	if (member->status == LSHARD_OK)
		return sim_capture_end(member->stream);
	sim_capture_abort(member->stream);
	return NULL;
}

static uint64_t fetches_since(const struct run *run, uint64_t *before)
{
	const uint64_t now = run_stats(run, 0).fetches, since = now - *before;

	*before = now;
	return since;
}

/*
 * Layers 1, 3, ... 11 come through two windows: 1, 5, 9 and 3, 7, 11. The refill with layer 3, whose window is free
 * when the last layer is done with, is the next pass's; the one with layer 1 is there at the end.
 */
static void the_end_of_a_pass_leaves_a_refill_to_the_next(void **state)
{
	struct run *run = run_open(&sim_one_sided, 2, 0, 12, 1);
	struct run_member *member = &run->members[0];
	struct sim_graph *graph;
	uint64_t before = 0;

	(void)state;
	run_pass(run, 0);
	run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, member->stream));
	fetches_since(run, &before);
	run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, member->stream));
	run_call_ok(member, "join", 0, lshard_series_join(member->series, member->stream));
	run_call_ok(member, "release", 11, lshard_release(member->series, 11, member->stream));
	assert_int_equal(fetches_since(run, &before), 0);
	run_call_ok(member, "reach", 0, lshard_reach(member->series, 0, member->stream));
	assert_int_equal(fetches_since(run, &before), 1);
	run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, member->stream));
	graph = capture(run, 12);
	assert_non_null(graph);
	assert_int_equal(fetches_since(run, &before), 6);
	for (int replay = 0; replay < 3; replay++) {
		run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, member->stream));
		sim_graph_launch(member->stream, graph);
	}
	assert_int_equal(fetches_since(run, &before), 0);
	run_pass(run, 0); /* knows that the replays left layer 11 where it needs layer 3 */
	assert_int_equal(fetches_since(run, &before), 6);
	assert_int_equal(run_stats(run, 0).misses, 0);
	run_close(run);
}

static void a_captured_region_ends_as_it_began(void **state)
{
	struct run *run = run_open(&sim_one_sided, 2, 0, 12, 1);
	struct run_member *member = &run->members[0];

	(void)state;
	run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, member->stream));
	assert_null(capture(run, 7));
	assert_int_equal(member->status, LSHARD_ERR_NOT_PERIODIC);
	assert_non_null(strstr(lshard_series_error(member->series), "begins the captured region with layer 1"));
	for (uint32_t layer = 0; layer < 6; layer++)
		run_layer(run, 0, layer);
	assert_null(capture(run, 12)); /* begun in the middle of a pass */
	assert_int_equal(member->status, LSHARD_ERR_NOT_PERIODIC);
	run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, member->stream));
	assert_non_null(capture(run, 12));
	run_pass(run, 0);
	run_close(run);
}

/* Each begins as a replay does, also right behind another. */
static void a_capture_may_hold_several_regions(void **state)
{
	struct run *run = run_open(&sim_one_sided, 2, 0, 12, 1);
	struct run_member *member = &run->members[0];
	struct sim_graph *graph;

	(void)state;
	run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, member->stream));
	sim_capture_begin(member->stream);
	for (int region = 0; region < 2; region++) {
		run_pass(run, 0);
		run_call_ok(member, "join", 0, lshard_series_join(member->series, member->stream));
	}
	graph = sim_capture_end(member->stream);
	assert_non_null(graph);
	for (int replay = 0; replay < 3; replay++) {
		run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, member->stream));
		sim_graph_launch(member->stream, graph);
		if (replay == 1)
			run_pass(run, 0);
	}
	run_close(run);
}

/* What the region did before it would be forgotten: replays would read layer 5 where they read layer 1 again. */
static void a_region_is_over_when_a_call_is_not_in_it(void **state)
{
	struct run *run = run_open(&sim_one_sided, 2, 0, 12, 1);
	struct run_member *member = &run->members[0];
	struct sim_stream *other = sim_stream_create(run->world, 0);

	(void)state;
	run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, member->stream));
	sim_capture_begin(member->stream);
	for (uint32_t layer = 0; layer < 6; layer++)
		run_layer(run, 0, layer);
	run_call_ok(member, "release", 1, lshard_release(member->series, 1, other));
	assert_int_equal(lshard_reach(member->series, 0, member->stream), LSHARD_ERR_STATE);
	assert_non_null(strstr(lshard_series_error(member->series), "capture again"));
	sim_capture_abort(member->stream);
	run_pass(run, 0);
	run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, member->stream));
	assert_non_null(capture(run, 12));
	run_close(run);
}

/* After join every window is full: a graph captured then is as good as one captured after prepare. */
static void a_capture_may_follow_a_join(void **state)
{
	struct run *run = run_open(&sim_one_sided, 2, 0, 12, 1);
	struct run_member *member = &run->members[0];
	struct sim_graph *graph;

	(void)state;
	run_pass(run, 0);
	run_call_ok(member, "join", 0, lshard_series_join(member->series, member->stream));
	graph = capture(run, 12);
	assert_non_null(graph);
	run_pass(run, 0);
	for (int replay = 0; replay < 3; replay++) {
		run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, member->stream));
		sim_graph_launch(member->stream, graph);
	}
	run_close(run);
}

/* One window: a view of layer 1 would be in the way of layer 3. */
static int timeout_body(const struct member *member)
{
	const struct setting setting = small_setting(6, 0);
	lshard_stats stats = LSHARD_STATS_INIT;
	struct rank rank;
	lshard_status status;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	if (member->rank == 0) {
		status = lshard_wait(rank.series, 1, NULL);
		EXPECT(member, status == LSHARD_ERR_TIMEOUT, "%s", lshard_status_name(status));
		OK_SERIES(&rank, lshard_wait(rank.series, 3, NULL));
		OK_SERIES(&rank, lshard_series_stats(rank.series, &stats));
		EXPECT(member, stats.misses == 1, "%llu misses", (unsigned long long)stats.misses);
		if (!layer_is_right(&rank, 3))
			goto failed;
	}
	right = one_pass(&rank) && team_barrier(member);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void a_wait_that_timed_out_leaves_no_view(void **state)
{
	(void)state;
	play("faults=r0.wait@1=timeout,local", 2, timeout_body, NULL);
}

/* 6 rows over 3 ranks: a third of each layer is here already. */
static int stripes_body(const struct member *member)
{
	struct setting setting = {.layers = 5, .placement = LSHARD_STRIPED, .n_tensors = 1};
	lshard_stats stats = LSHARD_STATS_INIT;
	struct rank rank;
	bool right = false;

	setting.tensors[0] = (lshard_tensor){"weight", 6 * 256, 0, LSHARD_STRIPE_ROWS, 6, 0};
	if (!rank_open(&rank, member, &setting))
		return 1;
	if (!one_pass(&rank) || !one_pass(&rank))
		goto failed;
	OK_SERIES(&rank, lshard_series_stats(rank.series, &stats));
	EXPECT(member, stats.layer_bytes == 6 * 256 && stats.fetches >= 10, "%llu fetches",
	       (unsigned long long)stats.fetches);
	EXPECT(member, stats.fetched_bytes == stats.fetches * 4 * 256, "%llu bytes in %llu fetches",
	       (unsigned long long)stats.fetched_bytes, (unsigned long long)stats.fetches);
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void only_bytes_from_other_ranks_are_counted(void **state)
{
	(void)state;
	play("local", 3, stripes_body, NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(release_starts_the_next_transfer_at_once),
		cmocka_unit_test(a_far_jump_starts_every_transfer_in_order_of_need),
		cmocka_unit_test(the_longest_time_blocked_is_kept),
		cmocka_unit_test(each_fetch_that_could_not_start_keeps_its_cause),
		cmocka_unit_test(prepare_does_not_belong_into_a_capture),
		cmocka_unit_test(the_end_of_a_pass_leaves_a_refill_to_the_next),
		cmocka_unit_test(a_captured_region_ends_as_it_began),
		cmocka_unit_test(a_capture_may_hold_several_regions),
		cmocka_unit_test(a_region_is_over_when_a_call_is_not_in_it),
		cmocka_unit_test(a_capture_may_follow_a_join),
		cmocka_unit_test(a_wait_that_timed_out_leaves_no_view),
		cmocka_unit_test(only_bytes_from_other_ranks_are_counted),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
