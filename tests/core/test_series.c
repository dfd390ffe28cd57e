/* SPDX-License-Identifier: Apache-2.0
 *
 * test_series.c - how a series comes into being and how it goes: memory of the caller's, the last number that a layer
 * can have, and two that are destroyed at once. What destroy waits for is test_readers.c's.
 */
#include "local_ranks.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* ---- Creating ---------------------------------------------------------------------------------------------------- */

static void *allocate(void *user, lshard_purpose purpose, size_t bytes, size_t alignment)
{
	(void)user;
	(void)purpose;
	return aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

static void release(void *user, lshard_purpose purpose, void *pointer)
{
	(void)user;
	(void)purpose;
	free(pointer);
}

static void a_memory_source_gives_and_takes(void **state)
{
	static const lshard_memory_source halves[] = {{sizeof *halves, allocate, NULL, NULL},
						      {sizeof *halves, NULL, release, NULL}};
	const struct setting setting = small_setting(3, 1);
	lshard_group *group = create_alone("local");

	(void)state;
	for (size_t i = 0; i < 2; i++) {
		lshard_series_options options = rank_series_options(&setting);
		lshard_series *series = NULL;

		options.memory_source = &halves[i];
		assert_int_equal(lshard_series_create(group, &options, &series), LSHARD_ERR_INVALID);
		assert_non_null(strstr(lshard_group_error(group), "both allocate and release"));
		assert_null(series);
	}
	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
}

/* The only layer that is the last one there can be. */
static int last_layer_body(const struct member *member)
{
	struct setting setting = small_setting(1, 1);
	lshard_series_options options;
	struct rank rank;
	bool right = false;

	setting.first_layer = UINT32_MAX;
	options = rank_series_options(&setting);
	if (!rank_group(&rank, member, &setting))
		return 1;
	rank.fail_at = -2; /* -1, none, is this layer */
	EXPECT(member, lshard_series_create(rank.group, &options, &rank.series) == LSHARD_OK, "%s",
	       lshard_group_error(rank.group));
	if (!rank_note_addresses(&rank))
		goto failed;
	OK_SERIES(&rank, lshard_series_commit(rank.series, fill_layer, &rank));
	EXPECT(member, lshard_series_is_source(rank.series, UINT32_MAX) == (member->rank == UINT32_MAX % 2), "source");
	EXPECT(member, lshard_reach(rank.series, 0, NULL) == LSHARD_ERR_RANGE, "layer 0");
	SAYS(member, lshard_series_error(rank.series), "4294967295");
	OK_SERIES(&rank, lshard_series_verify(rank.series, NULL));
	right = one_pass(&rank) && one_pass(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void the_last_layer_number_is_a_layer(void **state)
{
	struct setting setting = small_setting(2, 1);
	lshard_series_options options;
	lshard_group *group = create_alone("local");
	lshard_series *series = NULL;

	(void)state;
	play("local", 2, last_layer_body, NULL);
	setting.first_layer = UINT32_MAX; /* and there is none after it */
	options = rank_series_options(&setting);
	assert_int_equal(lshard_series_create(group, &options, &series), LSHARD_ERR_INVALID);
	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
}

/* ---- Destroying -------------------------------------------------------------------------------------------------- */

static void a_series_that_cannot_be_drained_stays(void **state)
{
	const struct setting setting = small_setting(3, 1);
	const lshard_series_options options = rank_series_options(&setting);
	struct rank rank = {.setting = &setting, .fail_at = -1};

	(void)state;
	rank.group = create_alone("faults=drain@1=timeout,local");
	assert_int_equal(lshard_series_create(rank.group, &options, &rank.series), LSHARD_OK);
	assert_int_equal(lshard_series_commit(rank.series, fill_layer, &rank), LSHARD_OK);
	assert_int_equal(lshard_series_destroy(rank.series), LSHARD_ERR_TIMEOUT);
	assert_non_null(strstr(lshard_series_error(rank.series), "'s'"));
	assert_int_equal(lshard_group_destroy(rank.group), LSHARD_ERR_BUSY);
	assert_int_equal(lshard_series_destroy(rank.series), LSHARD_OK);
	assert_int_equal(lshard_group_destroy(rank.group), LSHARD_OK);
}

struct leaver {
	pthread_barrier_t *start;
	lshard_series *series;
	lshard_status status;
};

static void *destroy_with_the_other(void *user)
{
	struct leaver *leaver = user;

	pthread_barrier_wait(leaver->start);
	leaver->status = lshard_series_destroy(leaver->series);
	return NULL;
}

static void two_threads_destroy_two_series(void **state)
{
	const struct setting setting = small_setting(3, 1);
	const lshard_series_options options = rank_series_options(&setting);
	lshard_group *group = create_alone("local");
	pthread_barrier_t start;

	(void)state;
	assert_int_equal(pthread_barrier_init(&start, NULL, 2), 0);
	for (int round = 0; round < 100; round++) {
		struct leaver leavers[2] = {{&start, NULL, LSHARD_OK}, {&start, NULL, LSHARD_OK}};
		pthread_t thread;

		for (int i = 0; i < 2; i++)
			assert_int_equal(lshard_series_create(group, &options, &leavers[i].series), LSHARD_OK);
		assert_int_equal(pthread_create(&thread, NULL, destroy_with_the_other, &leavers[0]), 0);
		destroy_with_the_other(&leavers[1]);
		pthread_join(thread, NULL);
		assert_int_equal(leavers[0].status, LSHARD_OK);
		assert_int_equal(leavers[1].status, LSHARD_OK);
	}
	pthread_barrier_destroy(&start);
	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_memory_source_gives_and_takes),
		cmocka_unit_test(the_last_layer_number_is_a_layer),
		cmocka_unit_test(a_series_that_cannot_be_drained_stays),
		cmocka_unit_test(two_threads_destroy_two_series),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
