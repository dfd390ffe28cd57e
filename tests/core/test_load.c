/* SPDX-License-Identifier: Apache-2.0
 *
 * test_load.c - how the ranks hear of each other while layers are loaded and updated: what fails on one fails on all,
 * and a rank that dies is looked at each time they agree.
 */
#include "local_ranks.h"
#include "patience.h"
#include "transports.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

/* ---- The last agreement of a load -------------------------------------------------------------------------------- */

/* A layer that rank 1 is to keep does not come to it. Rank 0 has all it needs, and the load fails there too. */
static int resident_body(const struct member *member)
{
	struct setting setting = {.layers = 6, .first_layer = 1, .prefetch = 1, .resident_bytes = 1 << 20};
	lshard_series_options options;
	struct rank rank;
	lshard_status status;
	bool right = false;

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	options = rank_series_options(&setting);
	if (!rank_group(&rank, member, &setting))
		return 1;
	EXPECT(member, lshard_series_create(rank.group, &options, &rank.series) == LSHARD_OK, "%s",
	       lshard_group_error(rank.group));
	status = lshard_series_commit(rank.series, fill_layer, &rank);
	EXPECT(member, status == LSHARD_ERR_TRANSPORT, "%s: %s", lshard_status_name(status),
	       lshard_series_error(rank.series));
	SAYS(member, lshard_series_error(rank.series), "rank 1");
	EXPECT(member, lshard_reach(rank.series, 1, NULL) == LSHARD_ERR_STATE, "a pass over a load that failed");
	OK_SERIES(&rank, lshard_series_commit(rank.series, fill_layer, &rank));
	right = rank_note_addresses(&rank) && one_pass(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void a_resident_that_does_not_come_fails_all(void **state)
{
	(void)state;
	subject = (struct subject){.spec = "faults=r1.read@1=fail,local", .kind = "threads"};
	assert_int_equal(team_of_threads(2, resident_body, NULL), 0);
}

/* ---- Rounds of stripes ----------------------------------------------------------------------------------------- */

/* Rank 1 is slow to take its part of the first layer: rank 0 does not put the next one in its place meanwhile. */
static int slow_taker_body(const struct member *member)
{
	struct setting setting = {.layers = 6, .prefetch = 1, .placement = LSHARD_STRIPED};
	struct rank rank;
	bool right = false;

	setting_tensors(&setting, 2, LSHARD_STRIPE_ROWS);
	if (!rank_open(&rank, member, &setting))
		return 1;
	right = one_pass(&rank) && team_barrier(member);
	return rank_close(&rank) && right ? 0 : 1;
}

static void stripes_are_taken_before_the_next_round(void **state)
{
	(void)state;
	subject = (struct subject){.spec = "faults=r1.read@1=delay:100,local", .kind = "threads"};
	assert_int_equal(team_of_threads(2, slow_taker_body, NULL), 0);
}

/* ---- A source that dies ---------------------------------------------------------------------------------------- */

/* Of this process: whoever is rank 1 dies where an update drains, between its two agreements. */
static const struct member *mortal;
static lshard_transport_ops mortal_ops;

static lshard_status die(lshard_store *store)
{
	(void)store;
	team_dies(mortal);
	raise(SIGKILL);
	return LSHARD_ERR_SYSTEM;
}

static lshard_status open_mortal(const lshard_context *context, lshard_transport *inner, lshard_transport **transport,
				 lshard_error *error)
{
	const lshard_status status = lshard__shm.open(context, inner, transport, error);

	if (status == LSHARD_OK && context->rank == 1) {
		mortal_ops = *(*transport)->ops;
		mortal_ops.drain = die;
		(*transport)->ops = &mortal_ops;
	}
	return status;
}

static int dying_source_body(const struct member *member)
{
	struct setting setting = {.layers = 7, .first_layer = 1, .prefetch = 1};
	lshard_group_options options = member_options(member, NULL, LONG_MS);
	struct rank rank = {.member = member, .setting = &setting, .fail_at = -1};
	lshard_transport_ops ops = lshard__shm;
	lshard_status status;
	char error[512] = "";
	bool right = false;

	mortal = member;
	ops.open = open_mortal;
	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	options.custom_transport = &ops;
	options.error = error;
	options.error_bytes = sizeof error;
	EXPECT(member, lshard_group_create(&options, &rank.group) == LSHARD_OK, "%s", error);
	EXPECT(member, rank_series(&rank) && one_pass(&rank), "a pass");
	status = lshard_series_update_begin(rank.series);
	EXPECT(member, status == LSHARD_ERR_PEER_FAILED, "%s: %s", lshard_status_name(status),
	       lshard_series_error(rank.series));
	SAYS(member, lshard_series_error(rank.series), "rank 1");
	SAYS(member, lshard_series_error(rank.series), "nothing was changed");
	right = one_pass(&rank); /* of the old bytes */
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void a_source_that_dies_between_the_agreements_is_told(void **state)
{
	(void)state;
	subject = (struct subject){.spec = "shm", .kind = "forks", .direct = true};
	assert_int_equal(team_of_processes(3, dying_source_body, NULL), 0);
}

/* Two striped layers, three ranks. Rank 2 loads nothing and stores a third of everything. */
static int dying_keeper_body(const struct member *member)
{
	struct setting setting = {.layers = 2, .prefetch = 1, .placement = LSHARD_STRIPED};
	struct rank rank;
	lshard_status status;
	bool right = false;

	setting_tensors(&setting, 2, LSHARD_STRIPE_ROWS);
	if (!rank_open(&rank, member, &setting))
		return 1;
	if (member->rank == 2) {
		team_dies(member);
		raise(SIGKILL);
	}
	status = lshard_series_update_begin(rank.series);
	EXPECT(member, status == LSHARD_ERR_PEER_FAILED, "%s: %s", lshard_status_name(status),
	       lshard_series_error(rank.series));
	SAYS(member, lshard_series_error(rank.series), "rank 2");
	SAYS(member, lshard_series_error(rank.series), "2 layers can have no new weights: 0 1");
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void a_rank_that_only_keeps_stripes_is_missed(void **state)
{
	(void)state;
	subject = (struct subject){.spec = "shm:copy", .kind = "forks"};
	assert_int_equal(team_of_processes(3, dying_keeper_body, NULL), 0);
}

/* ---- Some layers only ------------------------------------------------------------------------------------------ */

#define SOME_LAYERS 5u
#define SOME_BYTES  64u

/* All layers where the generation is 0; later the even ones. */
static int write_some(void *user, uint32_t layer, void *const *tensors)
{
	const int generation = *(const int *)user;

	if (generation == 0 || layer % 2 == 0)
		memset(tensors[0], (int)layer + 100 * generation, SOME_BYTES);
	return 0;
}

static int some_body(const struct member *member)
{
	const lshard_tensor tensor = {"w", SOME_BYTES, 0, LSHARD_STRIPE_BYTES, 0, 0};
	const lshard_group_options group_options = member_options(member, "local", 0);
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;
	struct rank rank = {.member = member};
	bool right = false;
	int generation = 0;

	options.name = "some";
	options.layer_count = SOME_LAYERS;
	options.tensors = &tensor;
	options.tensor_count = 1;
	EXPECT(member, lshard_group_create(&group_options, &rank.group) == LSHARD_OK, "group");
	EXPECT(member, lshard_series_create(rank.group, &options, &rank.series) == LSHARD_OK, "%s",
	       lshard_group_error(rank.group));
	OK_SERIES(&rank, lshard_series_commit(rank.series, write_some, &generation));
	OK_SERIES(&rank, lshard_series_update_begin(rank.series));
	generation = 1;
	OK_SERIES(&rank, lshard_series_update_end(rank.series, write_some, &generation));
	for (uint32_t layer = 0; layer < SOME_LAYERS; layer++) {
		void *bytes = NULL;

		OK_SERIES(&rank, lshard_reach(rank.series, layer, NULL));
		OK_SERIES(&rank, lshard_wait(rank.series, layer, NULL));
		OK_SERIES(&rank, lshard_series_address(rank.series, layer, 0, &bytes));
		EXPECT(member, *(unsigned char *)bytes == layer + (layer % 2 == 0 ? 100 : 0), "layer %u is %u", layer,
		       *(unsigned char *)bytes);
	}
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void layers_that_an_update_does_not_write_keep_their_bytes(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(2, some_body, NULL), 0);
}

/* ---- A rank ends it ---------------------------------------------------------------------------------------------- */

struct aborting {
	lshard_group *group;
	int calls;
};

static int abort_at_the_second(void *user, uint32_t layer, void *const *tensors)
{
	struct aborting *aborting = user;

	(void)layer;
	(void)tensors;
	if (++aborting->calls == 2)
		lshard_group_abort(aborting->group);
	return 0;
}

/* Each of two ranks is source of four layers. */
static int abort_body(const struct member *member)
{
	const struct setting setting = small_setting(8, 1);
	const lshard_series_options options = rank_series_options(&setting);
	struct aborting aborting = {NULL, 0};
	struct rank rank;
	lshard_status status;
	bool right = false;

	if (!rank_group(&rank, member, &setting))
		return 1;
	EXPECT(member, lshard_series_create(rank.group, &options, &rank.series) == LSHARD_OK, "%s",
	       lshard_group_error(rank.group));
	aborting.group = rank.group;
	if (member->rank == 0) {
		status = lshard_series_commit(rank.series, abort_at_the_second, &aborting);
		EXPECT(member, status == LSHARD_ERR_ABORTED, "%s", lshard_status_name(status));
		SAYS(member, lshard_series_error(rank.series), "aborted");
		EXPECT(member, aborting.calls == 2, "%d layers were processed", aborting.calls);
	} else {
		status = lshard_series_commit(rank.series, fill_layer, &rank);
		EXPECT(member, status == LSHARD_ERR_PEER_FAILED, "%s", lshard_status_name(status));
	}
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void abort_ends_the_loading_of_layers(void **state)
{
	(void)state;
	play("local", 2, abort_body, NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(layers_that_an_update_does_not_write_keep_their_bytes),
		cmocka_unit_test(a_resident_that_does_not_come_fails_all),
		cmocka_unit_test(stripes_are_taken_before_the_next_round),
		cmocka_unit_test(a_source_that_dies_between_the_agreements_is_told),
		cmocka_unit_test(a_rank_that_only_keeps_stripes_is_missed),
		cmocka_unit_test(abort_ends_the_loading_of_layers),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
