/* SPDX-License-Identifier: Apache-2.0
 *
 * test_sim.c - the simulated machine itself: it must let right programs pass and catch wrong ones, or the tests that
 * stand on it prove nothing. Speaks to the transport's table directly, without the library's core.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include "patience.h"
#include "sim/sim.h"
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#define RANKS   2
#define LAYERS  4 /* layer p lies whole on rank p % 2 */
#define BYTES   64
#define WINDOWS 2

struct machine {
	struct sim_world *world;
	const lshard_transport_ops *ops;
	lshard_context context[RANKS];
	lshard_transport *transport[RANKS];
	lshard_store_plan plan[RANKS];
	lshard_store *store[RANKS];
	lshard_piece pieces[LAYERS];
	uint32_t first_piece[LAYERS + 1];
	uint64_t shard_bytes_of[RANKS];
	unsigned char truth[LAYERS][BYTES];
	struct sim_stream *stream[RANKS];
};

static void *allocate(const lshard_context *context, size_t bytes)
{
	(void)context;
	return calloc(1, bytes ? bytes : 1);
}

static void release(const lshard_context *context, void *pointer)
{
	(void)context;
	free(pointer);
}

static void open_rank(void *user, int32_t rank)
{
	struct machine *machine = user;
	lshard_error error;

	machine->context[rank] = (lshard_context){.struct_size = sizeof(lshard_context),
						  .rank = rank,
						  .size = RANKS,
						  .timeout_ms = patience(500),
						  .options = "",
						  .bootstrap = sim_bootstrap(machine->world, rank),
						  .allocate = allocate,
						  .release = release};
	machine->plan[rank] = (lshard_store_plan){.name = "s",
						  .layers = LAYERS,
						  .layer_bytes = BYTES,
						  .shard_bytes = machine->shard_bytes_of[rank],
						  .shard_bytes_of = machine->shard_bytes_of,
						  .buffers = WINDOWS,
						  .windows = WINDOWS,
						  .pieces = machine->pieces,
						  .first_piece = machine->first_piece};
	if (machine->ops->open(&machine->context[rank], NULL, &machine->transport[rank], &error) != LSHARD_OK)
		abort();
	if (machine->ops->store_open(machine->transport[rank], &machine->plan[rank], &machine->store[rank]) !=
	    LSHARD_OK)
		abort();
	for (uint32_t p = (uint32_t)rank; p < LAYERS; p += RANKS)
		memcpy((unsigned char *)machine->ops->shard(machine->store[rank]) + machine->pieces[p].shard_offset,
		       machine->truth[p], BYTES);
}

static struct machine *machine_open(const lshard_transport_ops *ops, uint64_t seed, enum sim_policy policy)
{
	struct machine *machine = calloc(1, sizeof *machine);

	assert_non_null(machine);
	machine->world = sim_world_create(RANKS, seed, policy);
	machine->ops = ops;
	for (uint32_t p = 0; p < LAYERS; p++) {
		machine->pieces[p] = (lshard_piece){.rank = (int32_t)(p % RANKS),
						    .shard_offset = p / RANKS * BYTES,
						    .shard_pitch = BYTES,
						    .layer_pitch = BYTES,
						    .width = BYTES,
						    .rows = 1};
		machine->first_piece[p + 1] = p + 1;
		machine->shard_bytes_of[p % RANKS] += BYTES;
		for (size_t i = 0; i < BYTES; i++)
			machine->truth[p][i] = (unsigned char)(seed * 31 + p * 67 + i);
	}
	for (int32_t r = 0; r < RANKS; r++)
		machine->stream[r] = sim_stream_create(machine->world, r);
	sim_collective(machine->world, open_rank, machine);
	return machine;
}

static void machine_close(struct machine *machine)
{
	for (int32_t r = 0; r < RANKS; r++)
		machine->ops->store_close(machine->store[r]);
	for (int32_t r = 0; r < RANKS; r++)
		machine->ops->close(machine->transport[r]);
	sim_world_destroy(machine->world);
	free(machine);
}

/* ---- What a program does on rank 0, whose remote layers are 1 and 3 ---- */

static void fetch(struct machine *machine, uint32_t position, uint32_t buffer)
{
	assert_int_equal(machine->ops->fetch(machine->store[0], position, buffer, machine->stream[0], 0), LSHARD_OK);
}

static void wait_for(struct machine *machine, uint32_t buffer)
{
	lshard_arrival arrival;

	assert_int_equal(machine->ops->wait(machine->store[0], buffer, machine->stream[0], &arrival), LSHARD_OK);
}

static void compute(struct machine *machine, uint32_t position, uint32_t buffer)
{
	sim_kernel(machine->stream[0], machine->ops->buffer(machine->store[0], buffer, position),
		   machine->truth[position], BYTES, position);
}

static void record_use(struct machine *machine, uint32_t buffer)
{
	assert_int_equal(machine->ops->record_use(machine->store[0], buffer, machine->stream[0]), LSHARD_OK);
}

/* Layers 1, 3, 1, 3... through one window; each part of the rule can be left out. */
static uint64_t run_pass(uint64_t seed, enum sim_policy policy, bool waits, bool records)
{
	struct machine *machine = machine_open(&sim_one_sided, seed, policy);
	uint64_t violations;

	for (uint32_t i = 0; i < 6; i++) {
		uint32_t position = i % 2 ? 3 : 1;

		fetch(machine, position, 0);
		if (waits)
			wait_for(machine, 0);
		compute(machine, position, 0);
		if (records)
			record_use(machine, 0);
		sim_run(machine->world, seed % 5);
	}
	assert_true(sim_finish(machine->world));
	assert_int_equal(sim_report(machine->world)->kernels, 6);
	assert_int_equal(sim_report(machine->world)->copies, 6);
	violations = sim_report(machine->world)->violations;
	machine_close(machine);
	return violations;
}

static uint64_t violations_of_all(bool waits, bool records)
{
	uint64_t violations = 0;

	for (uint64_t seed = 0; seed < 40; seed++)
		violations += run_pass(seed, (enum sim_policy)(seed % SIM_POLICIES), waits, records) > 0;
	return violations;
}

static void right_order_is_clean_and_wrong_order_is_caught(void **state)
{
	(void)state;
	assert_int_equal(violations_of_all(true, true), 0);
	assert_true(violations_of_all(false, true) > 20); /* a kernel before its bytes */
	assert_true(violations_of_all(true, false) > 10); /* a copy over bytes still read */
	assert_true(run_pass(1, SIM_COPIES_LATE, false, true) > 0);
	assert_true(run_pass(3, SIM_KERNELS_LATE, true, false) > 0);
}

static void a_failed_fetch_is_reported_once(void **state)
{
	struct machine *machine = machine_open(&sim_one_sided, 1, SIM_UNIFORM);

	(void)state;
	sim_fail_fetches(machine->world, 0, 1);
	assert_int_equal(machine->ops->fetch(machine->store[0], 1, 0, NULL, 0), LSHARD_ERR_PEER_FAILED);
	assert_non_null(strstr(machine->store[0]->error.text, "position 1"));
	fetch(machine, 1, 0);
	wait_for(machine, 0);
	compute(machine, 1, 0);
	assert_true(sim_finish(machine->world));
	assert_int_equal(sim_report(machine->world)->violations, 0);
	machine_close(machine);
}

/* ---- Capture ---- */

static void start_of_pass(struct machine *machine)
{
	assert_int_equal(machine->ops->join(machine->store[0], machine->stream[0]), LSHARD_OK);
}

/* One pass of 1, 3 through window 0, ending as it began: with layer 1 in it. */
static void captured_pass(struct machine *machine)
{
	uint64_t number;

	assert_int_equal(machine->ops->capture(machine->store[0], machine->stream[0], &number), LSHARD_OK);
	assert_true(number > 0);
	wait_for(machine, 0); /* from before the capture: nothing to wait for */
	compute(machine, 1, 0);
	record_use(machine, 0);
	fetch(machine, 3, 0);
	wait_for(machine, 0);
	compute(machine, 3, 0);
	record_use(machine, 0);
	fetch(machine, 1, 0);
}

static void graphs_replay_in_any_order_their_edges_allow(void **state)
{
	(void)state;
	for (uint64_t seed = 0; seed < 40; seed++) {
		struct machine *machine = machine_open(&sim_one_sided, seed, (enum sim_policy)(seed % SIM_POLICIES));
		struct sim_graph *graph;

		fetch(machine, 1, 0);
		start_of_pass(machine);
		sim_capture_begin(machine->stream[0]);
		captured_pass(machine);
		assert_int_equal(machine->ops->join(machine->store[0], machine->stream[0]), LSHARD_OK);
		graph = sim_capture_end(machine->stream[0]);
		assert_non_null(graph);
		assert_int_equal(sim_graph_nodes(graph), 4);
		for (int i = 0; i < 3; i++) {
			start_of_pass(machine);
			sim_graph_launch(machine->stream[0], graph);
		}
		assert_true(sim_finish(machine->world));
		assert_int_equal(sim_report(machine->world)->kernels, 6);
		assert_int_equal(sim_report(machine->world)->replays, 3);
		assert_string_equal(sim_report(machine->world)->first, "");
		machine_close(machine);
	}
}

static void a_fork_that_is_not_joined_breaks_the_capture(void **state)
{
	struct machine *machine = machine_open(&sim_one_sided, 1, SIM_UNIFORM);

	(void)state;
	fetch(machine, 1, 0);
	start_of_pass(machine);
	sim_capture_begin(machine->stream[0]);
	captured_pass(machine);
	assert_null(sim_capture_end(machine->stream[0]));
	assert_non_null(strstr(sim_capture_error(machine->world), "not joined"));
	machine_close(machine);
}

static void an_event_from_outside_breaks_the_capture(void **state)
{
	struct machine *machine = machine_open(&sim_one_sided, 1, SIM_UNIFORM);
	struct sim_stream *other = sim_stream_create(machine->world, 0);

	(void)state;
	sim_capture_begin(machine->stream[0]);
	sim_follow(machine->stream[0], other);
	assert_null(sim_capture_end(machine->stream[0]));
	assert_non_null(strstr(sim_capture_error(machine->world), "outside"));
	machine_close(machine);
}

/* A second stream of the program, drawn into the capture and joined, is as good as the first. */
static void streams_fork_and_join(void **state)
{
	struct machine *machine = machine_open(&sim_one_sided, 1, SIM_KERNELS_LATE);
	struct sim_stream *other = sim_stream_create(machine->world, 0);
	struct sim_graph *graph;

	(void)state;
	sim_capture_begin(machine->stream[0]);
	sim_follow(other, machine->stream[0]);
	sim_kernel(other, machine->truth[0], machine->truth[0], BYTES, 0);
	sim_kernel(machine->stream[0], machine->truth[1], machine->truth[1], BYTES, 1);
	sim_follow(machine->stream[0], other);
	graph = sim_capture_end(machine->stream[0]);
	assert_non_null(graph);
	sim_kernel(other, machine->truth[2], machine->truth[2], BYTES, 2); /* eager again */
	sim_graph_launch(machine->stream[0], graph);
	assert_true(sim_finish(machine->world));
	assert_int_equal(sim_report(machine->world)->kernels, 3);
	machine_close(machine);
}

static void a_capture_thrown_away_leaves_nothing(void **state)
{
	(void)state;
	for (uint64_t seed = 0; seed < 20; seed++) {
		struct machine *machine = machine_open(&sim_one_sided, seed, (enum sim_policy)(seed % SIM_POLICIES));

		fetch(machine, 1, 0);
		wait_for(machine, 0);
		compute(machine, 1, 0);
		record_use(machine, 0); /* of a reader outside */
		start_of_pass(machine);
		sim_capture_begin(machine->stream[0]);
		captured_pass(machine);
		sim_capture_abort(machine->stream[0]);
		wait_for(machine, 0);
		compute(machine, 1, 0);
		record_use(machine, 0);
		fetch(machine, 3, 0);
		wait_for(machine, 0);
		compute(machine, 3, 0);
		assert_true(sim_finish(machine->world));
		assert_int_equal(sim_report(machine->world)->kernels, 3);
		assert_string_equal(sim_report(machine->world)->first, "");
		machine_close(machine);
	}
}

/* ---- Lockstep ---- */

static lshard_status send_and_receive(struct machine *machine, int32_t rank, uint32_t position, uint64_t sequence)
{
	bool sends = position % RANKS == (uint32_t)rank;

	return machine->ops->fetch(machine->store[rank], position, sends ? LSHARD_NO_BUFFER : 0, machine->stream[rank],
				   sequence);
}

static void a_broadcast_waits_for_all_ranks(void **state)
{
	struct machine *machine = machine_open(&sim_lockstep, 1, SIM_UNIFORM);
	lshard_arrival arrival;

	(void)state;
	assert_int_equal(send_and_receive(machine, 0, 1, 7), LSHARD_OK);
	assert_int_equal(machine->ops->wait(machine->store[0], 0, machine->stream[0], &arrival), LSHARD_OK);
	compute(machine, 1, 0);
	assert_false(sim_finish(machine->world)); /* rank 1 has not come */
	assert_int_equal(sim_report(machine->world)->kernels, 0);
	assert_int_equal(send_and_receive(machine, 1, 1, 7), LSHARD_OK);
	assert_true(sim_finish(machine->world));
	assert_int_equal(sim_report(machine->world)->kernels, 1);
	assert_string_equal(sim_report(machine->world)->first, "");
	machine_close(machine);
}

static void ranks_that_ask_for_different_layers_are_told(void **state)
{
	struct machine *machine = machine_open(&sim_lockstep, 1, SIM_UNIFORM);
	lshard_arrival arrival;

	(void)state;
	assert_int_equal(send_and_receive(machine, 1, 2, 7), LSHARD_OK);
	assert_int_equal(send_and_receive(machine, 0, 1, 7), LSHARD_OK);
	assert_int_equal(machine->ops->wait(machine->store[0], 0, machine->stream[0], &arrival),
			 LSHARD_ERR_OUT_OF_STEP);
	assert_non_null(strstr(machine->store[0]->error.text, "rank 1 asked first, for position 2"));
	assert_int_equal(machine->ops->wait(machine->store[1], 0, machine->stream[1], &arrival),
			 LSHARD_ERR_OUT_OF_STEP);
	assert_int_equal(machine->ops->drain(machine->store[0]), LSHARD_OK);
	assert_int_equal(machine->ops->drain(machine->store[1]), LSHARD_OK);
	assert_int_equal(send_and_receive(machine, 0, 1, 8), LSHARD_OK); /* together again */
	assert_int_equal(send_and_receive(machine, 1, 1, 8), LSHARD_OK);
	assert_int_equal(machine->ops->wait(machine->store[0], 0, machine->stream[0], &arrival), LSHARD_OK);
	compute(machine, 1, 0);
	assert_true(sim_finish(machine->world));
	assert_string_equal(sim_report(machine->world)->first, "");
	machine_close(machine);
}

static void a_host_that_waits_in_vain_learns_for_whom(void **state)
{
	struct machine *machine = machine_open(&sim_host_lockstep, 1, SIM_UNIFORM);
	lshard_arrival arrival;

	(void)state;
	assert_int_equal(send_and_receive(machine, 0, 1, 0), LSHARD_OK);
	assert_int_equal(machine->ops->wait(machine->store[0], 0, NULL, &arrival), LSHARD_ERR_TIMEOUT);
	assert_non_null(strstr(machine->store[0]->error.text, "not asked for by rank 1"));
	assert_int_equal(send_and_receive(machine, 1, 1, 0), LSHARD_OK);
	assert_int_equal(machine->ops->wait(machine->store[0], 0, NULL, &arrival), LSHARD_OK);
	assert_memory_equal(machine->ops->buffer(machine->store[0], 0, 1), machine->truth[1], BYTES);
	machine_close(machine);
}

/* ---- Agreement ---- */

static void nobody_waits_for_ever(void **state)
{
	struct machine *machine = machine_open(&sim_one_sided, 1, SIM_UNIFORM);
	unsigned char send = 1, receive[RANKS];
	uint8_t alive[RANKS];

	(void)state;
	assert_int_equal(machine->ops->exchange(machine->transport[0], &send, receive, 1, alive), LSHARD_ERR_TIMEOUT);
	assert_int_equal(alive[0], 1);
	assert_int_equal(alive[1], 0);
	machine->ops->abort(machine->transport[1]); /* gone: no longer waited for */
	assert_int_equal(machine->ops->exchange(machine->transport[0], &send, receive, 1, alive), LSHARD_OK);
	assert_int_equal(alive[1], 0);
	assert_int_equal(receive[0], 1);
	assert_int_equal(receive[1], 0);
	assert_int_equal(machine->ops->exchange(machine->transport[1], &send, receive, 1, alive), LSHARD_ERR_ABORTED);
	machine_close(machine);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(right_order_is_clean_and_wrong_order_is_caught),
		cmocka_unit_test(a_failed_fetch_is_reported_once),
		cmocka_unit_test(graphs_replay_in_any_order_their_edges_allow),
		cmocka_unit_test(a_fork_that_is_not_joined_breaks_the_capture),
		cmocka_unit_test(an_event_from_outside_breaks_the_capture),
		cmocka_unit_test(streams_fork_and_join),
		cmocka_unit_test(a_capture_thrown_away_leaves_nothing),
		cmocka_unit_test(a_broadcast_waits_for_all_ranks),
		cmocka_unit_test(ranks_that_ask_for_different_layers_are_told),
		cmocka_unit_test(a_host_that_waits_in_vain_learns_for_whom),
		cmocka_unit_test(nobody_waits_for_ever),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
