/* SPDX-License-Identifier: Apache-2.0
 *
 * test_calls.c - calls at the border of what is allowed, through the public interface on the `local` transport: what is
 * refused and in which words, what is compared between ranks, and what a call leaves behind.
 */
#include "conformance.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define SAYS(member, text, word) EXPECT(member, strstr(text, word) != NULL, "the text lacks '%s': %s", word, text)

static void play(const char *spec, int32_t size, member_body body, void *user)
{
	subject = (struct subject){.spec = spec, .kind = "threads"};
	assert_int_equal(team_of_threads(size, body, user), 0);
}

static struct setting small_setting(uint32_t layers, uint32_t prefetch)
{
	struct setting setting = {.layers = layers, .prefetch = prefetch};

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	return setting;
}

static lshard_group *create_alone(const char *spec)
{
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;
	lshard_group *group = NULL;

	options.rank = 0;
	options.size = 1;
	options.transport = spec;
	assert_int_equal(lshard_group_create(&options, &group), LSHARD_OK);
	return group;
}

/* ---- Options --------------------------------------------------------------------------------------------------- */

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

/* ---- What ranks compare ---------------------------------------------------------------------------------------- */

static int residents_differ_body(const struct member *member)
{
	const bool *must_agree = member->user;
	struct setting setting = small_setting(6, 1);
	lshard_series_options options;
	struct rank rank;
	lshard_status status;
	bool right = false;

	setting.resident_bytes = member->rank ? UINT64_MAX : 0;
	options = rank_series_options(&setting);
	if (!*must_agree) {
		if (!rank_open(&rank, member, &setting))
			return 1;
		right = one_pass(&rank) && one_pass(&rank);
		return rank_close(&rank) && right ? 0 : 1;
	}
	if (!rank_group(&rank, member, &setting))
		return 1;
	status = lshard_series_create(rank.group, &options, &rank.series);
	EXPECT(member, status == LSHARD_ERR_MISMATCH, "%s", lshard_status_name(status));
	SAYS(member, lshard_group_error(rank.group), "resident_bytes");
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void residents_may_differ_only_where_ranks_are_not_in_step(void **state)
{
	bool must_agree[] = {false, true};

	(void)state;
	play("local", 2, residents_differ_body, &must_agree[0]);
	play("local:lockstep", 2, residents_differ_body, &must_agree[1]);
}

static int columns_differ_body(const struct member *member)
{
	struct setting setting = {.layers = 4, .placement = LSHARD_STRIPED, .n_tensors = 1};
	lshard_series_options options;
	struct rank rank;
	lshard_status status;
	bool right = false;

	setting.tensors[0] = (lshard_tensor){"weight", 8 * 64, 0, LSHARD_STRIPE_COLUMNS, 8, member->rank ? 4 : 2};
	options = rank_series_options(&setting);
	if (!rank_group(&rank, member, &setting))
		return 1;
	status = lshard_series_create(rank.group, &options, &rank.series);
	EXPECT(member, status == LSHARD_ERR_MISMATCH, "%s", lshard_status_name(status));
	SAYS(member, lshard_group_error(rank.group), "column_bytes of tensor 'weight'");
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void columns_of_other_widths_are_named(void **state)
{
	(void)state;
	play("local", 2, columns_differ_body, NULL);
}

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

/* ---- What calls do and leave ----------------------------------------------------------------------------------- */

/* One window for all layers from elsewhere, and a live view in it. */
static int verify_body(const struct member *member)
{
	const struct setting setting = small_setting(6, 0);
	struct rank rank;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	for (uint32_t position = 0; position < setting.layers; position++) {
		if (!visit(&rank, position == 2 ? 3 : 2))
			goto failed;
		OK_SERIES(&rank, lshard_series_verify(rank.series, NULL));
		OK_SERIES(&rank, lshard_wait(rank.series, position, NULL));
		if (!layer_is_right(&rank, position))
			goto failed;
	}
	right = one_pass(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

/* The third layer to come is not what was stored; the views end all the same. */
static int corrupt_body(const struct member *member)
{
	const struct setting setting = small_setting(6, 0);
	struct rank rank;
	lshard_status status;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	status = lshard_series_verify(rank.series, NULL);
	EXPECT(member, status == LSHARD_ERR_CORRUPT, "%s", lshard_status_name(status));
	for (uint32_t position = 0; position < 2; position++)
		OK_SERIES(&rank, lshard_wait(rank.series, position, NULL));
	right = one_pass(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void verify_ends_every_view(void **state)
{
	(void)state;
	play("local", 2, verify_body, NULL);
	play("faults=wait@3=flip,local", 2, corrupt_body, NULL);
}

static lshard_status verify_with_a_bit_turned(struct rank *rank, uint32_t tensor, uint64_t byte, uint64_t *hash)
{
	unsigned char *at = (unsigned char *)rank->addresses[0][tensor] + byte;
	lshard_status status;

	*at ^= 1;
	status = lshard_series_verify(rank->series, hash);
	*at ^= 1;
	return status;
}

/* Alone: what is stored is what it should be, and every byte of it is in the hash. */
static int hashing_body(const struct member *member)
{
	struct setting setting = small_setting(2, 0);
	uint64_t true_hash = 0, hash = 0;
	struct rank rank;
	bool right = false;

	setting_tensors(&setting, MAX_TENSORS, LSHARD_STRIPE_BYTES);
	if (!rank_open(&rank, member, &setting))
		return 1;
	OK_SERIES(&rank, lshard_series_verify(rank.series, &true_hash));
	for (uint32_t tensor = 0; tensor < MAX_TENSORS; tensor++)
		for (uint64_t byte = 0; byte < setting.tensors[tensor].bytes; byte++) {
			OK_SERIES(&rank, verify_with_a_bit_turned(&rank, tensor, byte, &hash));
			EXPECT(member, hash != true_hash, "tensor %u, byte %u", tensor, (unsigned)byte);
		}
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

/* Rank 1 has layer 0 in memory of its own, where a bit of a row's own stripe or of rank 0's is turned. */
static int comparing_body(const struct member *member)
{
	struct setting setting = small_setting(1, 0);
	struct rank rank;
	lshard_status status;
	bool right = false;

	setting_tensors(&setting, 1, LSHARD_STRIPE_COLUMNS);
	setting.placement = LSHARD_STRIPED;
	setting.resident_bytes = 1 << 20;
	if (!rank_open(&rank, member, &setting))
		return 1;
	for (uint64_t byte = 0; byte < setting.tensors[0].bytes; byte++) {
		status = member->rank == 1 ? verify_with_a_bit_turned(&rank, 0, byte, NULL)
					   : lshard_series_verify(rank.series, NULL);
		EXPECT(member, status == (member->rank == 1 ? LSHARD_ERR_CORRUPT : LSHARD_OK), "byte %u: %s",
		       (unsigned)byte, lshard_status_name(status));
	}
	OK_SERIES(&rank, lshard_series_verify(rank.series, NULL));
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void verify_looks_at_every_byte(void **state)
{
	(void)state;
	play("local", 1, hashing_body, NULL);
	play("local", 2, comparing_body, NULL);
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

/* ---- Destroying ------------------------------------------------------------------------------------------------ */

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
		cmocka_unit_test(rank_and_size_are_given_both_or_not_at_all),
		cmocka_unit_test(hooks_that_are_given_are_whole),
		cmocka_unit_test(a_memory_source_gives_and_takes),
		cmocka_unit_test(the_last_layer_number_is_a_layer),
		cmocka_unit_test(residents_may_differ_only_where_ranks_are_not_in_step),
		cmocka_unit_test(columns_of_other_widths_are_named),
		cmocka_unit_test(series_of_one_name_are_told_apart),
		cmocka_unit_test(verify_ends_every_view),
		cmocka_unit_test(verify_looks_at_every_byte),
		cmocka_unit_test(a_wait_that_timed_out_leaves_no_view),
		cmocka_unit_test(only_bytes_from_other_ranks_are_counted),
		cmocka_unit_test(abort_ends_the_loading_of_layers),
		cmocka_unit_test(a_series_that_cannot_be_drained_stays),
		cmocka_unit_test(two_threads_destroy_two_series),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
