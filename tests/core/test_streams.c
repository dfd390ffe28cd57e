/* SPDX-License-Identifier: Apache-2.0
 *
 * test_streams.c - what the library promises about work that is still queued, and about when transfers start, on the
 * simulated machine: nothing is overwritten or freed under a reader, whatever stream it is on.
 *
 * Knows: the public header, the simulated machine, and the transport interface to watch the calls that arrive there.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include "simulated_ranks.h"
#include "patience.h"
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

/* ---- Readers that are still queued ----------------------------------------------------------------------------- */

#define OTHER_WORK 40 /* kernels */

/*
 * After other work, a kernel on @p stream, which no reach ever sees, reads layer 0 on rank 0, its source. It must see
 * @p seen, a copy of the present bytes.
 */
static void queue_reader_of_own_layer(struct run *run, struct sim_stream *stream, unsigned char *seen)
{
	struct run_member *member = &run->members[0];
	void *address = NULL;

	memcpy(seen, run_truth(run, 0, 0), run_tensors[0].bytes);
	run_call_ok(member, "reach", 0, lshard_reach(member->series, 0, member->stream));
	run_call_ok(member, "wait", 0, lshard_wait(member->series, 0, stream));
	run_call_ok(member, "address", 0, lshard_series_address(member->series, 0, 0, &address));
	for (int i = 0; i < OTHER_WORK; i++)
		sim_kernel(stream, seen, seen, run_tensors[0].bytes, 0);
	sim_kernel(stream, address, seen, run_tensors[0].bytes, 0);
	assert_int_equal(sim_report(run->world)->kernels, 0);
}

static void an_update_waits_for_readers_of_the_sources_own_layers(void **state)
{
	static const lshard_transport_ops *const flavours[] = {&sim_one_sided, &sim_lockstep};
	unsigned char seen[700];

	(void)state;
	for (size_t f = 0; f < 2; f++) {
		struct run *run = run_open(flavours[f], 2, 0, 7, 1); /* kernels run late */

		queue_reader_of_own_layer(run, sim_stream_create(run->world, 0), seen);
		run_together(run, run_update_begin_rank);
		assert_int_equal(sim_report(run->world)->kernels, OTHER_WORK + 1);
		run_make_truth(run, 1);
		run_together(run, run_update_end_rank);
		run_close(run); /* fails if the kernel saw the new bytes */
	}
}

static void destroy_waits_for_readers_of_the_sources_own_layers(void **state)
{
	struct run *run = run_open(&sim_one_sided, 2, 0, 7, 1);
	unsigned char seen[700];

	(void)state;
	queue_reader_of_own_layer(run, sim_stream_create(run->world, 0), seen);
	run_call_ok(&run->members[0], "destroy", 0, lshard_series_destroy(run->members[0].series));
	run->members[0].series = NULL;
	assert_int_equal(sim_report(run->world)->kernels, OTHER_WORK + 1);
	run_close(run);
}

/* The reader comes after a transfer to rank 1 that rank 0 has not asked for: nothing that rank 0 waits for ends it. */
static void destroy_frees_nothing_under_a_reader_that_does_not_end(void **state)
{
	struct run *run = run_open(&sim_lockstep, 2, 0, 6, 0);
	struct sim_stream *stuck = sim_stream_create(run->world, 0);
	struct run_member *first = &run->members[0], *second = &run->members[1];
	unsigned char seen[700];

	(void)state;
	assert_true(sim_finish(run->world));
	run_call_ok(second, "reach", 2, lshard_reach(second->series, 2, second->stream));
	run_call_ok(second, "wait", 2, lshard_wait(second->series, 2, second->stream));
	sim_follow(stuck, second->stream);
	queue_reader_of_own_layer(run, stuck, seen);

	for (int i = 0; i < 2; i++) {
		assert_int_equal(lshard_series_destroy(first->series), LSHARD_ERR_TIMEOUT);
		assert_non_null(strstr(lshard_series_error(first->series), "blocks"));
		assert_int_equal(lshard_group_destroy(first->group), LSHARD_ERR_BUSY);
		assert_int_equal(sim_report(run->world)->kernels, 0);
	}
	run_call_ok(second, "destroy", 0, lshard_series_destroy(second->series)); /* drops its transfer */
	second->series = NULL;
	assert_true(sim_finish(run->world));
	assert_int_equal(sim_report(run->world)->kernels, OTHER_WORK + 1);
	run_close(run); /* destroys the series of rank 0, now OK */
}

/* ---- Captures -------------------------------------------------------------------------------------------------- */

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

/*
 * What runs on the stream of a prepare, a replay say, makes no call, and may read any window until what comes after it
 * on another stream is reached.
 */
static void a_replay_is_a_reader_of_every_window(void **state)
{
	struct run *run = run_open(&sim_one_sided, 2, 0, 6, 0); /* rank 0: 1, 3, 5 through one window */
	struct sim_stream *replay = sim_stream_create(run->world, 0);
	struct run_member *member = &run->members[0];
	unsigned char seen[700];
	void *address = NULL;

	(void)state;
	memcpy(seen, run_truth(run, 1, 0), run_tensors[0].bytes);
	run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, replay));
	run_call_ok(member, "address", 1, lshard_series_address(member->series, 1, 0, &address));
	for (int i = 0; i < OTHER_WORK; i++)
		sim_kernel(replay, seen, seen, run_tensors[0].bytes, 0);
	sim_kernel(replay, address, seen, run_tensors[0].bytes, 0);
	run_layer(run, 0, 3);
	run_close(run); /* fails if the kernel saw layer 3 */
}

/* ---- When transfers start -------------------------------------------------------------------------------------- */

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

/* ---- Calls as they arrive at the transport --------------------------------------------------------------------- */

#define WATCHED 4096

/* One rank's calls at a time are watched; the simulated machine does the work. */
static struct {
	uint32_t fetched[WATCHED];
	size_t n_fetched;
	const uint64_t *blocked_ns; /* what the next waits say; NULL: nothing is changed */
	uint32_t timeout_ms;
} watched;

static lshard_status watched_fetch(lshard_store *store, uint32_t position, uint32_t buffer, void *stream,
				   uint64_t sequence)
{
	if (store->transport->context->rank == 0 && watched.n_fetched < WATCHED)
		watched.fetched[watched.n_fetched++] = position;
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

/* ---- What the environment says --------------------------------------------------------------------------------- */

static lshard_status open_alone(uint32_t timeout_ms, char *error, size_t error_bytes)
{
	struct sim_world *world = sim_world_create(1, 1, SIM_UNIFORM);
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;
	lshard_group *group = NULL;
	lshard_status status;

	options.rank = 0;
	options.size = 1;
	options.custom_transport = watch();
	options.bootstrap = sim_bootstrap(world, 0);
	options.timeout_ms = timeout_ms;
	options.error = error;
	options.error_bytes = error_bytes;
	status = lshard_group_create(&options, &group);
	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
	sim_world_destroy(world);
	return status;
}

static void the_timeout_may_come_from_the_environment(void **state)
{
	static const char *const wrong[] = {"soon", "0", "-5", "5s", "4294967296"};
	char error[512] = "";

	(void)state;
	assert_int_equal(setenv("LAYERSHARD_TIMEOUT_MS", "1234", 1), 0);
	assert_int_equal(open_alone(0, error, sizeof error), LSHARD_OK);
	assert_int_equal(watched.timeout_ms, 1234);
	assert_int_equal(open_alone(77, error, sizeof error), LSHARD_OK); /* the caller's word goes first */
	assert_int_equal(watched.timeout_ms, 77);
	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
		assert_int_equal(setenv("LAYERSHARD_TIMEOUT_MS", wrong[i], 1), 0);
		assert_int_equal(open_alone(0, error, sizeof error), LSHARD_ERR_INVALID);
		assert_non_null(strstr(error, "LAYERSHARD_TIMEOUT_MS"));
		assert_non_null(strstr(error, wrong[i]));
	}
	assert_int_equal(unsetenv("LAYERSHARD_TIMEOUT_MS"), 0);
	assert_int_equal(open_alone(0, error, sizeof error), LSHARD_OK);
	assert_int_equal(watched.timeout_ms, 30000);
}

static void a_transport_of_the_callers_own_goes_before_the_environments(void **state)
{
	char error[512] = "";

	(void)state;
	assert_int_equal(setenv("LAYERSHARD_TRANSPORT", "shm", 1), 0);
	if (open_alone(0, error, sizeof error) != LSHARD_OK)
		fail_msg("%s", error);
	assert_int_equal(watched.timeout_ms, 30000); /* it was this one that was opened */
	assert_int_equal(unsetenv("LAYERSHARD_TRANSPORT"), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(an_update_waits_for_readers_of_the_sources_own_layers),
		cmocka_unit_test(destroy_waits_for_readers_of_the_sources_own_layers),
		cmocka_unit_test(destroy_frees_nothing_under_a_reader_that_does_not_end),
		cmocka_unit_test(prepare_does_not_belong_into_a_capture),
		cmocka_unit_test(a_replay_is_a_reader_of_every_window),
		cmocka_unit_test(release_starts_the_next_transfer_at_once),
		cmocka_unit_test(a_far_jump_starts_every_transfer_in_order_of_need),
		cmocka_unit_test(the_longest_time_blocked_is_kept),
		cmocka_unit_test(the_timeout_may_come_from_the_environment),
		cmocka_unit_test(a_transport_of_the_callers_own_goes_before_the_environments),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
