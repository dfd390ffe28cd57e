/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory runs out at every possible moment: the k-th allocation of one rank fails, for k = 1, 2, ... until a whole life
 * (group, series, commit, passes, update, destruction) goes through without meeting it. Each time the rank that ran out
 * says NO_MEMORY, its peer gets an error instead of waiting for the deadline, and nothing stays allocated on either.
 */
#include "patience.h"
#include "threads.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define MAX_RANKS 2
#define LAYERS    5u
#define BYTES     1000u

struct rank {
	uint64_t fails_at; /* 0: never */
	uint64_t allocations;
	int64_t alive;
	lshard_status status;
	char cause[512];
};

/* One life of a group. */
struct life {
	const char *transport;
	lshard_placement placement;
	lshard_poison poison;
	int32_t size;
	struct rank ranks[MAX_RANKS];
};

static void *count_allocate(void *user, size_t bytes)
{
	struct rank *rank = user;
	void *memory;

	if (++rank->allocations == rank->fails_at)
		return NULL;
	memory = malloc(bytes);
	rank->alive += memory != NULL;
	return memory;
}

static void count_release(void *user, void *pointer)
{
	struct rank *rank = user;

	rank->alive -= pointer != NULL;
	free(pointer);
}

static int write_layer(void *user, uint32_t layer, void *const *tensors)
{
	const int *generation = user;

	memset(tensors[0], (int)layer + *generation, BYTES);
	memset(tensors[1], (int)layer + *generation + 100, 1);
	return 0;
}

static lshard_status check_layer(lshard_series *series, uint32_t layer, int generation)
{
	void *first;
	void *second;
	lshard_status status = lshard_series_address(series, layer, 0, &first);

	if (status == LSHARD_OK)
		status = lshard_series_address(series, layer, 1, &second);
	if (status != LSHARD_OK)
		return status;
	for (size_t i = 0; i < BYTES; i++)
		if (((unsigned char *)first)[i] != layer + (unsigned)generation)
			return LSHARD_ERR_CORRUPT;
	return *(unsigned char *)second == layer + (unsigned)generation + 100 ? LSHARD_OK : LSHARD_ERR_CORRUPT;
}

static lshard_status pass(lshard_series *series, int generation)
{
	lshard_status status = LSHARD_OK;

	for (uint32_t layer = 0; layer < LAYERS && status == LSHARD_OK; layer++) {
		status = lshard_reach(series, layer, NULL);
		if (status == LSHARD_OK)
			status = lshard_wait(series, layer, NULL);
		if (status == LSHARD_OK)
			status = check_layer(series, layer, generation);
	}
	return status;
}

/* Everything that a committed series can do; it allocates nothing, so it never sees a failing allocation. */
static lshard_status use(lshard_series *series)
{
	int generation = 2;
	lshard_status status = pass(series, 1);

	if (status == LSHARD_OK)
		status = pass(series, 1);
	if (status == LSHARD_OK)
		status = lshard_series_update_begin(series);
	if (status == LSHARD_OK)
		status = lshard_series_update_end(series, write_layer, &generation);
	if (status == LSHARD_OK)
		status = pass(series, generation);
	if (status == LSHARD_OK)
		status = lshard_series_verify(series, NULL);
	return status;
}

static lshard_status create_series(const struct life *life, lshard_group *group, lshard_series **series)
{
	const lshard_tensor tensors[] = {{"weight", BYTES, 0, LSHARD_STRIPE_BYTES, 0, 0},
					 {"scale", 1, 0, LSHARD_STRIPE_BYTES, 0, 0}};
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;

	options.name = "blocks";
	options.layer_count = LAYERS;
	options.tensors = tensors;
	options.tensor_count = 2;
	options.placement = life->placement;
	options.poison = life->poison;
	options.resident_bytes = 2 * BYTES; /* one layer */
	return lshard_series_create(group, &options, series);
}

static lshard_status create_group(const struct member *member, struct rank *rank, lshard_group **group)
{
	const struct life *life = member->user;
	const lshard_allocator allocator = {sizeof allocator, count_allocate, count_release, rank};
	lshard_group_options options = member_options(member, life->transport, LONG_MS);

	options.allocator = &allocator;
	options.error = rank->cause;
	options.error_bytes = sizeof rank->cause;
	return lshard_group_create(&options, group);
}

static lshard_status live_in_group(const struct life *life, struct rank *rank, lshard_group *group)
{
	lshard_series *series = NULL;
	int generation = 1;
	lshard_status status = create_series(life, group, &series);

	if (status != LSHARD_OK) {
		snprintf(rank->cause, sizeof rank->cause, "%s", lshard_group_error(group));
		return status;
	}
	status = lshard_series_commit(series, write_layer, &generation);
	if (status == LSHARD_OK)
		status = use(series);
	snprintf(rank->cause, sizeof rank->cause, "%s", lshard_series_error(series));
	return lshard_series_destroy(series) == LSHARD_OK ? status : LSHARD_ERR_BUSY;
}

/* Failing makes the peer's wait in the bootstrap fail, as a launcher's would. */
static int live(const struct member *member)
{
	struct life *life = member->user;
	struct rank *rank = &life->ranks[member->rank];
	lshard_group *group = NULL;

	rank->status = create_group(member, rank, &group);
	if (rank->status == LSHARD_OK)
		rank->status = live_in_group(life, rank, group);
	if (lshard_group_destroy(group) != LSHARD_OK)
		rank->status = LSHARD_ERR_BUSY;
	return rank->status != LSHARD_OK;
}

static void check_rank(const struct life *life, int32_t number, bool is_victim, bool failed)
{
	const struct rank *rank = &life->ranks[number];
	const bool right = !failed     ? rank->status == LSHARD_OK
			   : is_victim ? rank->status == LSHARD_ERR_NO_MEMORY
				       : rank->status < 0;

	if (!right || rank->alive != 0 || (failed && !rank->cause[0]))
		fail_msg("%s, rank %d of %d, failing allocation %d: %s (%s), %d allocations alive", life->transport,
			 (int)number, (int)life->size, (int)rank->fails_at, lshard_status_name(rank->status),
			 rank->cause, (int)rank->alive);
}

/* One life in which allocation number @p fails_at of rank @p victim fails. False: it came to no such allocation. */
static bool live_with_failure(struct life *life, int32_t victim, uint64_t fails_at)
{
	const time_t begin = time(NULL);
	bool failed;

	memset(life->ranks, 0, sizeof life->ranks);
	life->ranks[victim].fails_at = fails_at;
	team_of_threads(life->size, live, life);
	assert_true(time(NULL) - begin < LONG_MS / 2000); /* nobody waited for the deadline */
	failed = life->ranks[victim].allocations >= fails_at;
	for (int32_t rank = 0; rank < life->size; rank++)
		check_rank(life, rank, rank == victim, failed);
	return failed;
}

static void exhaust_life(struct life *life, int32_t victim)
{
	uint64_t fails_at = 1;

	while (live_with_failure(life, victim, fails_at))
		fails_at++;
	print_message("%s, %d ranks, rank %d runs out: %d allocations\n", life->transport, (int)life->size, (int)victim,
		      (int)fails_at - 1);
	assert_true(fails_at > 3); /* the hook is really used */
}

static void exhaust(const char *transport, lshard_placement placement, int32_t size, int32_t victim)
{
	struct life life = {.transport = transport, .placement = placement, .size = size};

	exhaust_life(&life, victim);
}

static void one_rank(void **state)
{
	(void)state;
	exhaust("local", LSHARD_WHOLE, 1, 0);
	exhaust("local", LSHARD_STRIPED, 1, 0);
}

static void first_of_two_ranks(void **state)
{
	(void)state;
	exhaust("local", LSHARD_WHOLE, 2, 0);
	exhaust("local:lockstep", LSHARD_STRIPED, 2, 0);
}

static void second_of_two_ranks(void **state)
{
	(void)state;
	exhaust("local:at=wait", LSHARD_WHOLE, 2, 1);
	exhaust("local", LSHARD_STRIPED, 2, 1);
}

static void with_poison(void **state)
{
	struct life life = {.transport = "local", .poison = LSHARD_POISON_ON, .size = 2};

	(void)state;
	exhaust_life(&life, 0);
	life.placement = LSHARD_STRIPED;
	exhaust_life(&life, 1);
}

static void behind_wrappers(void **state)
{
	(void)state;
	exhaust("throttle=1e12,local", LSHARD_WHOLE, 2, 1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(one_rank),
		cmocka_unit_test(first_of_two_ranks),
		cmocka_unit_test(second_of_two_ranks),
		cmocka_unit_test(with_poison),
		cmocka_unit_test(behind_wrappers),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
