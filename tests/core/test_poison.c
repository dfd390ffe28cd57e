/* SPDX-License-Identifier: Apache-2.0
 *
 * test_poison.c - poison as it is asked for, refused, and as it fails. What is seen through poisoned windows is the
 * conformance suite's (conformance_poison.c) and the random walk's.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include "simulated_ranks.h"

#include <layershard/plan.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#define VARIABLE "LAYERSHARD_POISON"

static void set_variable(const char *value)
{
	assert_int_equal(value ? setenv(VARIABLE, value, 1) : unsetenv(VARIABLE), 0);
}

/* A run whose series is created as the variable says. */
static struct run *open_with(const char *value, const lshard_transport_ops *ops)
{
	struct run *run;

	set_variable(value);
	run = run_open(ops, 2, 0, 6, 1); /* rank 0 brings 1, 3, 5 through two windows */
	set_variable(NULL);
	return run;
}

static bool holds(const struct run *run, uint32_t layer, unsigned char byte)
{
	void *address = NULL;

	run_call_ok(&run->members[0], "address", layer,
		    lshard_series_address(run->members[0].series, layer, 0, &address));
	for (uint64_t i = 0; i < run_tensors[0].bytes; i++)
		if (((unsigned char *)address)[i] != byte)
			return false;
	return true;
}

/* Rank 0 of hosts: bytes are there at the wait. */
static void pass_of_hosts(struct run *run)
{
	for (uint32_t layer = 0; layer < run->options.layer_count; layer++) {
		struct run_member *member = &run->members[0];
		void *address = NULL;

		run_call_ok(member, "reach", layer, lshard_reach(member->series, layer, NULL));
		run_call_ok(member, "wait", layer, lshard_wait(member->series, layer, NULL));
		run_call_ok(member, "address", layer, lshard_series_address(member->series, layer, 0, &address));
		assert_memory_equal(address, run_truth(run, layer, 0), run_tensors[0].bytes);
	}
}

/* ---- The variable ---------------------------------------------------------------------------------------------- */

static void the_environment_poisons_any_series(void **state)
{
	static const char *const values[] = {NULL, "0", "ready", "1"};

	(void)state;
	for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
		struct run *run = open_with(values[i], &sim_host_one_sided);
		const lshard_stats stats = run_stats(run, 0);
		const lshard_status switched = lshard_series_poison(run->members[0].series, i < 3, NULL);

		assert_int_equal(stats.windows, 2);
		assert_int_equal(stats.window_bytes, (i < 3 ? 2 : 5) * stats.layer_bytes);
		assert_int_equal(run_stats(run, 0).window_bytes, (i < 2 ? 2 : 5) * stats.layer_bytes);
		assert_int_equal(switched, i < 2 ? LSHARD_ERR_STATE : LSHARD_OK);
		if (i < 2)
			assert_non_null(strstr(lshard_series_error(run->members[0].series), VARIABLE));
		assert_true(sim_finish(run->world));
		assert_int_equal(holds(run, 1, 0xff), i == 2);
		pass_of_hosts(run);
		run_close(run);
	}
}

/* A second series, asked for by each rank in its own way. */
struct asked {
	struct run *run;
	lshard_series_options options[2];
	lshard_series *series[2];
	lshard_status status[2];
};

static void ask(void *user, int32_t rank)
{
	struct asked *asked = user;

	asked->status[rank] =
		lshard_series_create(asked->run->members[rank].group, &asked->options[rank], &asked->series[rank]);
}

static void destroy_asked(void *user, int32_t rank)
{
	struct asked *asked = user;

	asked->status[rank] = lshard_series_destroy(asked->series[rank]);
}

static struct asked plain_question(struct run *run)
{
	struct asked asked = {.run = run, .options = {run->options, run->options}};

	asked.options[0].name = asked.options[1].name = "second";
	return asked;
}

/* All ranks get the status, and a text that holds the word. */
static void expect(struct asked *asked, lshard_status status, const char *word)
{
	sim_collective(asked->run->world, ask, asked);
	for (int32_t rank = 0; rank < 2; rank++) {
		const char *text = lshard_group_error(asked->run->members[rank].group);

		if (asked->status[rank] != status || (status < 0 && !strstr(text, word)))
			fail_msg("rank %d: %s, no '%s' in: %s", rank, lshard_status_name(asked->status[rank]), word,
				 text);
	}
	if (status == LSHARD_OK)
		sim_collective(asked->run->world, destroy_asked, asked);
}

static void other_values_are_refused(void **state)
{
	static const char *const wrong[] = {"2", "on", "yes", " 1", "readyy"};
	struct run *run = run_open(&sim_host_one_sided, 2, 0, 6, 1);
	struct asked asked = plain_question(run);

	(void)state;
	for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
		set_variable(wrong[i]);
		expect(&asked, LSHARD_ERR_INVALID, VARIABLE);
	}
	set_variable(NULL);
	run_close(run);
}

static void wrong_options_are_refused_on_all_ranks(void **state)
{
	static const lshard_poison_pattern longer[TENSORS] = {{"x", 1}, {"ab", 2}, {NULL, 3}};
	static const lshard_poison_pattern none[TENSORS] = {{"x", 1}, {"ab", 0}, {NULL, 0}};
	struct run *run = run_open(&sim_host_one_sided, 2, 0, 6, 1);
	struct asked asked = plain_question(run);

	(void)state;
	asked.options[1].poison = (lshard_poison)3;
	sim_collective(run->world, ask, &asked);
	assert_int_equal(asked.status[0], LSHARD_ERR_INVALID); /* which is wrong on rank 1 only */
	assert_int_equal(asked.status[1], LSHARD_ERR_INVALID);
	assert_non_null(strstr(lshard_group_error(run->members[1].group), "there is no poison 3"));
	asked = plain_question(run);
	asked.options[0].poison_patterns = asked.options[1].poison_patterns = longer;
	expect(&asked, LSHARD_ERR_INVALID, "tensor number 2");
	asked.options[0].poison_patterns = asked.options[1].poison_patterns = none;
	expect(&asked, LSHARD_ERR_INVALID, "tensor number 1");
	run_close(run);
}

static void ranks_agree_on_poison(void **state)
{
	struct run *run = run_open(&sim_host_one_sided, 2, 0, 6, 1);
	struct asked asked = plain_question(run);

	(void)state;
	asked.options[1].poison = LSHARD_POISON_ON;
	expect(&asked, LSHARD_ERR_MISMATCH, "poison is 0 on rank 0 and 1 on rank 1");
	asked.options[0].poison = LSHARD_POISON_READY; /* the same memory */
	expect(&asked, LSHARD_OK, "");
	run_close(run);
}

/* ---- What it costs --------------------------------------------------------------------------------------------- */

static lshard_plan_result planned(lshard_poison poison, int32_t size, int direct)
{
	static const lshard_tensor tensor = {"weight", 1 << 20, 0, LSHARD_STRIPE_ROWS, 1 << 10, 0};
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;
	lshard_plan_input input = LSHARD_PLAN_INPUT_INIT;
	lshard_plan_result result = LSHARD_PLAN_RESULT_INIT;

	options.name = "blocks";
	options.layer_count = 9;
	options.tensors = &tensor;
	options.tensor_count = 1;
	options.placement = LSHARD_STRIPED;
	options.poison = poison;
	input.size = size;
	input.direct = direct;
	input.granule_bytes = 65536;
	assert_int_equal(lshard_plan(&options, &input, &result), LSHARD_OK);
	return result;
}

/* Windows that hold half of a layer, the other half mapped, become whole ones. Where there are none, none come. */
static void a_plan_counts_what_poison_takes(void **state)
{
	(void)state;
	assert_int_equal(planned(LSHARD_POISON_OFF, 2, 2).window_bytes, 2 << 19);
	assert_int_equal(planned(LSHARD_POISON_READY, 2, 2).window_bytes, 5 << 20);
	assert_int_equal(planned(LSHARD_POISON_ON, 2, 2).window_bytes, 5 << 20);
	assert_int_equal(planned(LSHARD_POISON_ON, 2, 2).windows, 2);
	assert_int_equal(planned(LSHARD_POISON_ON, 2, 3).window_bytes, 0);
	assert_int_equal(planned(LSHARD_POISON_ON, 2, 3).shard_bytes, planned(LSHARD_POISON_OFF, 2, 3).shard_bytes);
	assert_int_equal(planned(LSHARD_POISON_ON, 1, 0).window_bytes, 0);
}

static void a_rank_without_windows_has_nothing_to_switch(void **state)
{
	struct run *run = run_open(&sim_host_one_sided, 1, 0, 6, 1);

	(void)state;
	assert_int_equal(lshard_series_poison(run->members[0].series, 1, NULL), LSHARD_OK);
	run_close(run);
}

/* ---- Transports and captures ----------------------------------------------------------------------------------- */

static lshard_transport_ops poor; /* a table of the simulated machine, changed */
static const lshard_transport_ops *sound = &sim_one_sided;
static int fails_after = -1;      /* so many copies one fails */
static bool fails_late;           /* when its bytes are there */
static int wait_fails_after = -1; /* so many of the transport's waits one fails */

static lshard_status poor_open(const lshard_context *context, lshard_transport *inner, lshard_transport **transport,
			       lshard_error *error)
{
	const lshard_status status = sound->open(context, inner, transport, error);

	if (status == LSHARD_OK)
		(*transport)->ops = &poor;
	return status;
}

static void a_transport_that_cannot_copy_buffers_is_named(void **state)
{
	struct asked asked;
	struct run *run;

	(void)state;
	poor = sim_one_sided;
	poor.name = "poor";
	poor.open = poor_open;
	poor.copy_buffer = NULL;
	run = run_open(&poor, 2, 0, 6, 1); /* as usual */
	asked = plain_question(run);
	asked.options[0].poison = asked.options[1].poison = LSHARD_POISON_READY;
	expect(&asked, LSHARD_ERR_NOT_SUPPORTED, "the transport poor");
	run_close(run);
}

static lshard_status failing_copy_buffer(lshard_store *store, uint32_t to, uint32_t from, void *stream)
{
	const bool fails = fails_after >= 0 && fails_after-- == 0;
	const lshard_status status = fails && !fails_late ? LSHARD_OK : sound->copy_buffer(store, to, from, stream);

	if (fails)
		return lshard_fail(&store->error, LSHARD_ERR_TRANSPORT, "the device is unwell");
	return status;
}

static lshard_status failing_wait(lshard_store *store, uint32_t buffer, void *stream, lshard_arrival *arrival)
{
	if (wait_fails_after < 0 || wait_fails_after-- > 0)
		return sound->wait(store, buffer, stream, arrival);
	memset(arrival, 0, sizeof *arrival);
	return lshard_fail(&store->error, LSHARD_ERR_TRANSPORT, "the device is unwell");
}

static struct run *open_poor(const char *value, const lshard_transport_ops *ops)
{
	sound = ops;
	poor = *ops;
	poor.open = poor_open;
	poor.copy_buffer = failing_copy_buffer;
	poor.wait = failing_wait;
	return open_with(value, &poor);
}

static bool shows_layer(const struct run *run, uint32_t layer)
{
	void *address = NULL;

	run_call_ok(&run->members[0], "address", layer,
		    lshard_series_address(run->members[0].series, layer, 0, &address));
	return memcmp(address, run_truth(run, layer, 0), run_tensors[0].bytes) == 0;
}

static void layers_share_a_window(const struct run *run, uint32_t one, uint32_t other)
{
	void *addresses[2] = {NULL, NULL};

	run_call_ok(&run->members[0], "address", one,
		    lshard_series_address(run->members[0].series, one, 0, &addresses[0]));
	run_call_ok(&run->members[0], "address", other,
		    lshard_series_address(run->members[0].series, other, 0, &addresses[1]));
	assert_ptr_equal(addresses[0], addresses[1]);
}

static void a_layer_that_could_not_be_hidden_is_no_other_one(void **state)
{
	struct run *run = open_poor("1", &sim_one_sided);
	struct run_member *member = &run->members[0];

	(void)state;
	layers_share_a_window(run, 1, 3);
	run_layer(run, 0, 1);
	fails_after = 0;
	assert_int_equal(lshard_reach(member->series, 3, member->stream), LSHARD_ERR_TRANSPORT);
	run_call_ok(member, "wait", 3, lshard_wait(member->series, 3, member->stream));
	assert_true(sim_finish(run->world));
	assert_true(shows_layer(run, 3));
	run_close(run);
}

/* A view's second wait fails: on the transfer, and on the copy. */
static void a_wait_that_fails_ends_the_view(void **state)
{
	(void)state;
	for (int skip = 0; skip < 2; skip++) {
		struct run *run = open_poor("1", &sim_one_sided);
		struct run_member *member = &run->members[0];

		run_layer(run, 0, 1);
		wait_fails_after = skip;
		assert_int_equal(lshard_wait(member->series, 1, member->stream), LSHARD_ERR_TRANSPORT);
		assert_true(sim_finish(run->world));
		assert_true(holds(run, 1, 0xff));
		run_call_ok(member, "wait", 3, lshard_wait(member->series, 3, member->stream));
		assert_true(sim_finish(run->world));
		assert_true(shows_layer(run, 3));
		run_close(run);
	}
}

/* Whatever is left in its window by the copy, it is copied again. */
static void a_layer_that_was_half_hidden_is_shown_again(void **state)
{
	struct run *run = open_poor("1", &sim_one_sided);
	struct run_member *member = &run->members[0];
	void *address = NULL;

	(void)state;
	run_layer(run, 0, 1);
	assert_true(sim_finish(run->world));
	fails_after = 0;
	assert_int_equal(lshard_release(member->series, 1, member->stream), LSHARD_ERR_TRANSPORT);
	run_call_ok(member, "address", 1, lshard_series_address(member->series, 1, 0, &address));
	memset(address, 0xff, run_tensors[0].bytes / 2);
	run_call_ok(member, "wait", 1, lshard_wait(member->series, 1, member->stream));
	assert_true(sim_finish(run->world));
	assert_true(shows_layer(run, 1));
	run_close(run);
}

/* The bytes are there, and the wait said that they are not. */
static void a_copy_that_fails_late_is_hidden(void **state)
{
	struct run *run = open_poor("1", &sim_one_sided);
	struct run_member *member = &run->members[0];

	(void)state;
	run_call_ok(member, "reach", 1, lshard_reach(member->series, 1, member->stream));
	fails_late = true;
	fails_after = 0;
	assert_int_equal(lshard_wait(member->series, 1, member->stream), LSHARD_ERR_TRANSPORT);
	fails_late = false;
	assert_true(sim_finish(run->world));
	assert_true(holds(run, 1, 0xff));
	run_close(run);
}

static void rewind_both(struct run *run, lshard_status status)
{
	sim_collective(run->world, run_rewind_rank, run);
	assert_int_equal(run->members[0].status, status);
	assert_int_equal(run->members[1].status, status);
}

/* One rank cannot hide a layer: none begins the pass. */
static void a_rewind_that_cannot_hide_a_layer_fails_on_all_ranks(void **state)
{
	struct run *run = open_poor("1", &sim_lockstep);

	(void)state;
	for (int32_t rank = 0; rank < 2; rank++)
		run_layer(run, rank, 0);
	for (int32_t rank = 0; rank < 2; rank++)
		run_layer(run, rank, 1);
	assert_true(sim_finish(run->world));
	fails_after = 0;
	rewind_both(run, LSHARD_ERR_TRANSPORT);
	assert_non_null(strstr(lshard_series_error(run->members[1].series), "rank 0"));
	assert_int_equal(lshard_wait(run->members[0].series, 1, run->members[0].stream), LSHARD_ERR_OUT_OF_STEP);
	rewind_both(run, LSHARD_OK);
	for (uint32_t layer = 0; layer < 6; layer++)
		for (int32_t rank = 0; rank < 2; rank++)
			run_layer(run, rank, layer);
	run_close(run);
}

/* Ranks in step: the window that was lost cannot be filled by this rank alone. */
static void a_switch_that_fails_in_step_asks_for_a_rewind(void **state)
{
	struct run *run = open_poor("ready", &sim_lockstep);
	struct run_member *member = &run->members[0];

	(void)state;
	fails_after = 0;
	assert_int_equal(lshard_series_poison(member->series, 1, member->stream), LSHARD_ERR_TRANSPORT);
	assert_int_equal(lshard_wait(member->series, 1, member->stream), LSHARD_ERR_OUT_OF_STEP);
	assert_non_null(strstr(lshard_series_error(member->series), "lshard_series_poison failed"));
	assert_int_equal(lshard_series_poison(member->series, 0, member->stream), LSHARD_ERR_OUT_OF_STEP);
	rewind_both(run, LSHARD_OK);
	for (uint32_t layer = 0; layer < 6; layer++)
		for (int32_t rank = 0; rank < 2; rank++)
			run_layer(run, rank, layer);
	run_close(run);
}

/* Each copy of it fails once: what is left in a window is hidden by the next call. */
static void a_switch_that_fails_leaves_nothing_to_see(void **state)
{
	(void)state;
	for (int skip = 0; skip < 4; skip++) {
		struct run *run = open_poor("ready", &sim_one_sided);
		struct run_member *member = &run->members[0];

		run_pass(run, 0);
		fails_after = skip;
		assert_int_equal(lshard_series_poison(member->series, 1, member->stream), LSHARD_ERR_TRANSPORT);
		run_call_ok(member, "reach", 0, lshard_reach(member->series, 0, member->stream));
		assert_true(sim_finish(run->world));
		for (uint32_t layer = 1; layer < 6; layer += 2)
			assert_true(holds(run, layer, 0xff));
		run_pass(run, 0);
		run_close(run);
	}
}

/* A call that cannot hide or show a layer says so, and the next one does it. */
static void a_copy_that_fails_is_made_up_for(void **state)
{
	struct run *run = open_poor("1", &sim_one_sided);
	struct run_member *member = &run->members[0];

	(void)state;
	run_layer(run, 0, 1);
	fails_after = 0;
	assert_int_equal(lshard_reach(member->series, 3, member->stream), LSHARD_ERR_TRANSPORT);
	assert_non_null(strstr(lshard_series_error(member->series), "unwell"));
	run_call_ok(member, "reach", 3, lshard_reach(member->series, 3, member->stream));
	assert_true(sim_finish(run->world));
	assert_true(holds(run, 1, 0xff));
	fails_after = 0;
	assert_int_equal(lshard_wait(member->series, 3, member->stream), LSHARD_ERR_TRANSPORT);
	assert_true(sim_finish(run->world));
	assert_true(holds(run, 3, 0xff));
	run_layer(run, 0, 3);
	fails_after = 0;
	assert_int_equal(lshard_series_poison(member->series, 0, member->stream), LSHARD_ERR_TRANSPORT);
	assert_true(sim_finish(run->world)); /* the last view was not hidden, so nothing is switched */
	run_pass(run, 0);
	run_close(run);
}

/* Two views end at once, and the copy over one of their windows fails, whichever it is. */
static void one_of_two_copies_that_fails_is_told(void **state)
{
	(void)state;
	for (int skip = 0; skip < 2; skip++) {
		struct run *run = open_poor("1", &sim_one_sided);
		struct run_member *member = &run->members[0];

		run_layer(run, 0, 1);
		run_call_ok(member, "wait", 5, lshard_wait(member->series, 5, member->stream));
		fails_after = skip;
		assert_int_equal(lshard_reach(member->series, 0, member->stream), LSHARD_ERR_TRANSPORT);
		run_call_ok(member, "reach", 0, lshard_reach(member->series, 0, member->stream));
		assert_true(sim_finish(run->world));
		assert_true(holds(run, 1, 0xff));
		assert_true(holds(run, 5, 0xff));
		run_close(run);
	}
}

/* Each copy of a switch fails once: the program sees the right bytes whatever is left in the windows. */
static void a_switch_that_fails_loses_no_layer(void **state)
{
	(void)state;
	for (int skip = 0; skip < 6; skip++) {
		struct run *run = open_poor("1", &sim_one_sided);
		struct run_member *member = &run->members[0];

		run_pass(run, 0);
		for (int on = 0; on < 2; on++) {
			fails_after = skip;
			lshard_series_poison(member->series, on, member->stream);
			fails_after = -1;
			run_pass(run, 0);
			run_pass(run, 0);
		}
		run_close(run);
	}
}

/* What begins a replay was in the spare buffers, and lies in the windows now. */
static void a_graph_of_before_the_switch_sees_poison(void **state)
{
	struct run *run = open_with("1", &sim_one_sided);
	struct run_member *member = &run->members[0];
	unsigned char poison[700];
	void *address = NULL;
	struct sim_graph *graph;

	(void)state;
	memset(poison, 0xff, sizeof poison);
	run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, member->stream));
	sim_capture_begin(member->stream);
	run_call_ok(member, "reach", 1, lshard_reach(member->series, 1, member->stream));
	run_call_ok(member, "wait", 1, lshard_wait(member->series, 1, member->stream));
	run_call_ok(member, "address", 1, lshard_series_address(member->series, 1, 0, &address));
	sim_kernel(member->stream, address, poison, sizeof poison, 1);
	run_call_ok(member, "reach", 0, lshard_reach(member->series, 0, member->stream));
	run_call_ok(member, "join", 0, lshard_series_join(member->series, member->stream));
	graph = sim_capture_end(member->stream);
	assert_non_null(graph);
	run_call_ok(member, "poison", 0, lshard_series_poison(member->series, 0, member->stream));
	run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, member->stream));
	sim_graph_launch(member->stream, graph);
	assert_true(sim_finish(run->world));
	assert_int_equal(sim_report(run->world)->replays, 1);
	run_close(run); /* fails if the kernel saw anything else */
}

static void poison_is_not_switched_inside_a_capture(void **state)
{
	struct run *run = open_with("ready", &sim_one_sided);
	struct run_member *member = &run->members[0];

	(void)state;
	run_pass(run, 0);
	run_call_ok(member, "prepare", 0, lshard_series_prepare(member->series, member->stream));
	sim_capture_begin(member->stream);
	assert_int_equal(lshard_series_poison(member->series, 1, member->stream), LSHARD_ERR_STATE);
	assert_non_null(strstr(lshard_series_error(member->series), "before a capture"));
	sim_capture_abort(member->stream);
	run_call_ok(member, "poison", 0, lshard_series_poison(member->series, 1, member->stream));
	run_pass(run, 0);
	run_close(run);
}

static void poison_is_switched_in_committed_series_only(void **state)
{
	struct run *run = run_create(&sim_host_one_sided, 2, 0, 6, 1);

	(void)state;
	assert_int_equal(lshard_series_poison(run->members[0].series, 1, NULL), LSHARD_ERR_STATE);
	run_together(run, run_commit_rank);
	run_together(run, run_update_begin_rank);
	assert_int_equal(lshard_series_poison(run->members[0].series, 0, NULL), LSHARD_ERR_STATE);
	run_together(run, run_update_end_rank);
	run_close(run);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_environment_poisons_any_series),
		cmocka_unit_test(other_values_are_refused),
		cmocka_unit_test(wrong_options_are_refused_on_all_ranks),
		cmocka_unit_test(ranks_agree_on_poison),
		cmocka_unit_test(a_plan_counts_what_poison_takes),
		cmocka_unit_test(a_rank_without_windows_has_nothing_to_switch),
		cmocka_unit_test(a_transport_that_cannot_copy_buffers_is_named),
		cmocka_unit_test(a_copy_that_fails_is_made_up_for),
		cmocka_unit_test(one_of_two_copies_that_fails_is_told),
		cmocka_unit_test(a_layer_that_could_not_be_hidden_is_no_other_one),
		cmocka_unit_test(a_wait_that_fails_ends_the_view),
		cmocka_unit_test(a_layer_that_was_half_hidden_is_shown_again),
		cmocka_unit_test(a_copy_that_fails_late_is_hidden),
		cmocka_unit_test(a_rewind_that_cannot_hide_a_layer_fails_on_all_ranks),
		cmocka_unit_test(a_switch_that_fails_loses_no_layer),
		cmocka_unit_test(a_switch_that_fails_leaves_nothing_to_see),
		cmocka_unit_test(a_switch_that_fails_in_step_asks_for_a_rewind),
		cmocka_unit_test(a_graph_of_before_the_switch_sees_poison),
		cmocka_unit_test(poison_is_not_switched_inside_a_capture),
		cmocka_unit_test(poison_is_switched_in_committed_series_only),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
