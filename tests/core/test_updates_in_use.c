/* SPDX-License-Identifier: Apache-2.0
 *
 * test_updates_in_use.c - a thousand updates, at each of which one rank is still in a pass when the others are in the
 * update already: every pass sees the bytes of one generation, before the update or after it. In processes of their
 * own, each of which does what it is told as fast as it can, without a word between.
 */
#include "patience.h"
#include "told_ranks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <unistd.h>

#include <cmocka.h>

#define RANKS   3
#define UPDATES 1000
/* Orders that wait in a socket; fewer than it holds. */
#define ORDERS_OF_ONE 4

static void tell(const struct told_rank *told, enum order order, uint64_t value)
{
	assert_true(told_tell(told, order, 0, value));
}

/* The one that reads makes a pass first. All make one afterwards. */
static void tell_update(const struct told_rank *told, int reads, uint64_t generation)
{
	if (reads)
		tell(told, TOLD_PASS, generation);
	tell(told, TOLD_BEGIN, 0);
	tell(told, TOLD_END, generation + 1);
	tell(told, TOLD_PASS, generation + 1);
}

static void hear(const struct told_rank *told, int orders, uint64_t generation)
{
	struct told_reply reply;

	for (int i = 0; i < orders; i++) {
		assert_true(told_hear(told, &reply));
		if (reply.status != LSHARD_OK)
			fail_msg("update %llu, rank %d: %s: %s", (unsigned long long)generation, told->rank,
				 lshard_status_name(reply.status), reply.text);
	}
}

static void update_in_use(const char *transport, lshard_placement placement)
{
	const struct told_options options = {.transport = transport,
					     .placement = placement,
					     .layers = 6,
					     .tensor_bytes = 4096 * RANKS,
					     .timeout_ms = LONG_MS,
					     .prefetch = 1};
	static const enum order begin[] = {TOLD_GROUP, TOLD_SERIES, TOLD_COMMIT};
	const struct told_rank *told[RANKS];
	struct told_rank of[RANKS];
	char job[64];

	snprintf(job, sizeof job, "updates %d %s %d", (int)getpid(), transport, (int)placement);
	for (int rank = 0; rank < RANKS; rank++) {
		told_start(&of[rank], rank, RANKS, job, &options);
		told[rank] = &of[rank];
	}
	for (int step = 0; step < 3; step++)
		assert_int_equal(told_all(told, RANKS, begin[step], 0, 0).status, LSHARD_OK);
	for (uint64_t generation = 0; generation < UPDATES; generation++) {
		for (int rank = 0; rank < RANKS; rank++)
			tell_update(told[rank], generation % RANKS == (uint64_t)rank, generation);
		for (int rank = 0; rank < RANKS; rank++)
			hear(told[rank], ORDERS_OF_ONE - (generation % RANKS != (uint64_t)rank), generation);
	}
	for (int rank = 0; rank < RANKS; rank++)
		told_kill(&of[rank]);
}

static void each_pass_sees_one_generation_in_place(void **state)
{
	(void)state;
	update_in_use("shm", LSHARD_WHOLE);
}

static void each_pass_sees_one_generation_through_windows(void **state)
{
	(void)state;
	update_in_use("shm:copy", LSHARD_WHOLE);
}

static void each_pass_sees_one_generation_in_stripes(void **state)
{
	(void)state;
	update_in_use("shm", LSHARD_STRIPED);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(each_pass_sees_one_generation_in_place),
		cmocka_unit_test(each_pass_sees_one_generation_through_windows),
		cmocka_unit_test(each_pass_sees_one_generation_in_stripes),
	};

	return cmocka_run_group_tests_name("updates_in_use", tests, NULL, NULL);
}
