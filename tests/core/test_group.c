/* SPDX-License-Identifier: Apache-2.0
 *
 * test_group.c - what a group is created of: options that are refused, what the environment adds to them; and ranks
 * that take part in different calls.
 */
#include "local_ranks.h"
#include "sim/sim.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* ---- Options ----------------------------------------------------------------------------------------------------- */

static void *take(void *user, size_t bytes)
{
	(void)user;
	return malloc(bytes);
}

static void hooks_that_are_given_are_whole(void **state)
{
	static const lshard_bootstrap nowhere = LSHARD_BOOTSTRAP_INIT;
	static const lshard_allocator keeper = {sizeof keeper, take, NULL, NULL}, none = LSHARD_ALLOCATOR_INIT;
	const struct {
		const lshard_bootstrap *bootstrap;
		const lshard_allocator *allocator;
		const char *says;
	} lacking[] = {{&nowhere, NULL, "needs an allgather"},
		       {NULL, &keeper, "needs both allocate and release"},
		       {NULL, &none, "needs both allocate and release"}};

	(void)state;
	for (size_t i = 0; i < sizeof lacking / sizeof lacking[0]; i++) {
		lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;
		lshard_group *group = NULL;
		char error[512] = "";

		options.rank = 0;
		options.size = 1;
		options.bootstrap = lacking[i].bootstrap;
		options.allocator = lacking[i].allocator;
		options.error = error;
		options.error_bytes = sizeof error;
		assert_int_equal(lshard_group_create(&options, &group), LSHARD_ERR_INVALID);
		assert_non_null(strstr(error, lacking[i].says));
		assert_null(group);
	}
}

static void rank_and_size_are_given_both_or_not_at_all(void **state)
{
	static const int32_t halves[][2] = {{0, -1}, {-1, 2}, {-1, 1}};

	(void)state;
	for (size_t i = 0; i < sizeof halves / sizeof halves[0]; i++) {
		lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;
		lshard_group *group = NULL;
		char error[512] = "";

		options.rank = halves[i][0];
		options.size = halves[i][1];
		options.transport = "local";
		options.error = error;
		options.error_bytes = sizeof error;
		assert_int_equal(lshard_group_create(&options, &group), LSHARD_ERR_INVALID);
		assert_non_null(strstr(error, "give both"));
		assert_null(group);
	}
}

/* ---- What the environment says ----------------------------------------------------------------------------------- */

/* The simulated machine, and what the group told it. */
static lshard_transport_ops noting_ops;
static uint32_t noted_timeout_ms;

static lshard_status noting_open(const lshard_context *context, lshard_transport *inner, lshard_transport **transport,
				 lshard_error *error)
{
	noted_timeout_ms = context->timeout_ms;
	return sim_host_one_sided.open(context, inner, transport, error);
}

static lshard_status open_alone(uint32_t timeout_ms, char *error, size_t error_bytes)
{
	struct sim_world *world = sim_world_create(1, 1, SIM_UNIFORM);
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;
	lshard_group *group = NULL;
	lshard_status status;

	noting_ops = sim_host_one_sided;
	noting_ops.open = noting_open;
	options.rank = 0;
	options.size = 1;
	options.custom_transport = &noting_ops;
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
	assert_int_equal(noted_timeout_ms, 1234);
	assert_int_equal(open_alone(77, error, sizeof error), LSHARD_OK); /* the caller's word goes first */
	assert_int_equal(noted_timeout_ms, 77);
	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
		assert_int_equal(setenv("LAYERSHARD_TIMEOUT_MS", wrong[i], 1), 0);
		assert_int_equal(open_alone(0, error, sizeof error), LSHARD_ERR_INVALID);
		assert_non_null(strstr(error, "LAYERSHARD_TIMEOUT_MS"));
		assert_non_null(strstr(error, wrong[i]));
	}
	assert_int_equal(unsetenv("LAYERSHARD_TIMEOUT_MS"), 0);
	assert_int_equal(open_alone(0, error, sizeof error), LSHARD_OK);
	assert_int_equal(noted_timeout_ms, 30000);
}

static void a_transport_of_the_callers_own_goes_before_the_environments(void **state)
{
	char error[512] = "";

	(void)state;
	assert_int_equal(setenv("LAYERSHARD_TRANSPORT", "shm", 1), 0);
	if (open_alone(0, error, sizeof error) != LSHARD_OK)
		fail_msg("%s", error);
	assert_int_equal(noted_timeout_ms, 30000); /* it was this one that was opened */
	assert_int_equal(unsetenv("LAYERSHARD_TRANSPORT"), 0);
}

/* Who mistyped it looks for the variable: nothing in the program has that word. */
static void a_transport_of_the_environments_is_refused_with_the_variable(void **state)
{
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;
	lshard_group *group = NULL;
	char error[512] = "";

	(void)state;
	options.rank = 0;
	options.size = 1;
	options.error = error;
	options.error_bytes = sizeof error;
	assert_int_equal(setenv("LAYERSHARD_TRANSPORT", "smh", 1), 0);
	assert_int_equal(lshard_group_create(&options, &group), LSHARD_ERR_INVALID);
	assert_non_null(strstr(error, "LAYERSHARD_TRANSPORT='smh': there is no transport 'smh'"));
	options.transport = "pigeon";
	assert_int_equal(lshard_group_create(&options, &group), LSHARD_ERR_INVALID);
	assert_non_null(strstr(error, "there is no transport 'pigeon'"));
	assert_null(strstr(error, "LAYERSHARD_TRANSPORT"));
	assert_int_equal(unsetenv("LAYERSHARD_TRANSPORT"), 0);
}

/* ---- What ranks compare in a call -------------------------------------------------------------------------------- */

/* Two series of one name: rank 0 would change the first while rank 1 holds its breath for the second. */
static int twins_body(const struct member *member)
{
	const struct setting setting = small_setting(4, 1);
	const lshard_series_options options = rank_series_options(&setting);
	lshard_series *twin = NULL;
	struct rank rank;
	lshard_status status;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	EXPECT(member, lshard_series_create(rank.group, &options, &twin) == LSHARD_OK, "%s",
	       lshard_group_error(rank.group));
	EXPECT(member, lshard_series_commit(twin, fill_layer, &rank) == LSHARD_OK, "%s", lshard_series_error(twin));
	status = lshard_series_update_begin(member->rank ? twin : rank.series);
	EXPECT(member, status == LSHARD_ERR_MISMATCH, "%s", lshard_status_name(status));
	SAYS(member, lshard_series_error(member->rank ? twin : rank.series), "'s'");
	if (!one_pass(&rank)) /* nothing was changed */
		goto failed;
	OK_SERIES(&rank, lshard_series_update_begin(rank.series)); /* and where all mean the same */
	rank.generation = 1;
	OK_SERIES(&rank, lshard_series_update_end(rank.series, fill_layer, &rank));
	right = one_pass(&rank) && team_barrier(member);
failed:
	right = lshard_series_destroy(twin) == LSHARD_OK && right;
	return rank_close(&rank) && right ? 0 : 1;
}

static void series_of_one_name_are_told_apart(void **state)
{
	(void)state;
	play("local", 2, twins_body, NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(rank_and_size_are_given_both_or_not_at_all),
		cmocka_unit_test(hooks_that_are_given_are_whole),
		cmocka_unit_test(the_timeout_may_come_from_the_environment),
		cmocka_unit_test(a_transport_of_the_callers_own_goes_before_the_environments),
		cmocka_unit_test(a_transport_of_the_environments_is_refused_with_the_variable),
		cmocka_unit_test(series_of_one_name_are_told_apart),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
