/* SPDX-License-Identifier: Apache-2.0
 *
 * test_readers.c - work that is still queued: nothing is overwritten or freed under a reader, whatever stream it is on.
 *
 * Knows: the public header, the simulated machine.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include "simulated_ranks.h"
#include <cmocka.h>
#include <string.h>

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

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(an_update_waits_for_readers_of_the_sources_own_layers),
		cmocka_unit_test(destroy_waits_for_readers_of_the_sources_own_layers),
		cmocka_unit_test(destroy_frees_nothing_under_a_reader_that_does_not_end),
		cmocka_unit_test(a_replay_is_a_reader_of_every_window),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
