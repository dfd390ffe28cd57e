/* SPDX-License-Identifier: Apache-2.0
 *
 * test_wrapper.c - what a wrapper's join or wait has told of a transfer that failed is told by every wait for it, too.
 */
#include "callback_circle.h"
#include "contexts.h"
#include "outside.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#define PAIR_BYTES 512u

/* Two layers, one of each of two ranks, without the core. */
struct pair {
	lshard_context context;
	lshard_store_plan plan;
	lshard_piece pieces[2];
	uint32_t first_piece[3];
	uint64_t shard_bytes[2];
	struct seat *seat;
	lshard__stack *stack;
	lshard_transport *transport;
	lshard_store *store;
};

static bool pair_open(struct pair *pair, const struct member *member)
{
	lshard_error error = {""};

	*pair = (struct pair){.context = context_for_member(member, "", 20000), .first_piece = {0, 1, 2}};
	for (int32_t rank = 0; rank < 2; rank++) {
		pair->pieces[rank] = (lshard_piece){.rank = rank, .width = PAIR_BYTES, .rows = 1};
		pair->shard_bytes[rank] = PAIR_BYTES;
	}
	pair->plan = (lshard_store_plan){.name = "s",
					 .layers = 2,
					 .layer_bytes = PAIR_BYTES,
					 .shard_bytes = PAIR_BYTES,
					 .shard_bytes_of = pair->shard_bytes,
					 .buffers = 2,
					 .windows = 2,
					 .pieces = pair->pieces,
					 .first_piece = pair->first_piece};
	pair->seat = circle_join(member);
	EXPECT(member, pair->seat, "a rank failed");
	pair->context.callbacks = seat_callbacks(pair->seat);
	EXPECT(member, lshard__stack_open(&pair->context, member->user, NULL, &pair->stack, &error) == LSHARD_OK, "%s",
	       error.text);
	pair->transport = lshard__stack_top(pair->stack);
	EXPECT(member, pair->transport->ops->store_open(pair->transport, &pair->plan, &pair->store) == LSHARD_OK, "%s",
	       pair->transport->error.text);
	memset(pair->transport->ops->shard(pair->store), member->rank + 1, PAIR_BYTES);
	return true;
failed:
	return false;
}

static void pair_close(struct pair *pair)
{
	if (pair->store)
		pair->transport->ops->store_close(pair->store);
	lshard__stack_close(pair->stack);
	circle_leave(pair->seat);
}

/* Each asks for the other's layer: never the same. Later both ask for that of rank 1. */
static int join_body(const struct member *member)
{
	const lshard_transport_ops *ops;
	const uint32_t other = 1 - (uint32_t)member->rank;
	struct pair pair;
	lshard_arrival arrival;
	const uint64_t mine = 0;
	uint64_t all[2];
	uint8_t alive[2];
	int failed = 1;

	if (!pair_open(&pair, member))
		goto failed;
	ops = pair.transport->ops;
	EXPECT(member, ops->fetch(pair.store, other, 0, NULL, 0) == LSHARD_OK, "fetch");
	EXPECT(member, ops->join(pair.store, NULL) == LSHARD_ERR_OUT_OF_STEP, "join: %s", pair.store->error.text);
	pair.store->error = (lshard_error){""};
	EXPECT(member, ops->wait(pair.store, 0, NULL, &arrival) == LSHARD_ERR_OUT_OF_STEP,
	       "%s: what join has told is forgotten", (const char *)member->user);
	SAYS(member, pair.store->error.text, "'s'");
	EXPECT(member, ops->join(pair.store, NULL) == LSHARD_OK, "join again: %s", pair.store->error.text);
	EXPECT(member, ops->wait(pair.store, 0, NULL, &arrival) == LSHARD_ERR_OUT_OF_STEP,
	       "%s: what a wait has told is forgotten", (const char *)member->user);
	EXPECT(member, ops->drain(pair.store) == LSHARD_OK, "drain: %s", pair.store->error.text);
	EXPECT(member, ops->wait(pair.store, 0, NULL, &arrival) == LSHARD_OK, "%s: what drain has dropped is told",
	       (const char *)member->user);
	EXPECT(member, ops->exchange(pair.transport, &mine, all, sizeof mine, alive) == LSHARD_OK, "exchange");
	EXPECT(member, ops->fetch(pair.store, 1, member->rank ? LSHARD_NO_BUFFER : 0, NULL, 1) == LSHARD_OK, "fetch");
	EXPECT(member, ops->join(pair.store, NULL) == LSHARD_OK, "join: %s", pair.store->error.text);
	EXPECT(member, ops->wait(pair.store, 0, NULL, &arrival) == LSHARD_OK, "wait: %s", pair.store->error.text);
	EXPECT(member, member->rank || *(char *)ops->buffer(pair.store, 0, 1) == 2, "other bytes");
	EXPECT(member, team_barrier(member), "a rank failed");
	failed = 0;
failed:
	pair_close(&pair);
	return failed;
}

static void what_join_has_told_is_told_by_every_wait_too(void **state)
{
	static const char *const specs[] = {"local:lockstep",
					    "callback",
					    "throttle=1e9,local:lockstep",
					    "throttle=1e9,callback",
					    "faults=wait@9=fail,local:lockstep",
					    "throttle=1e9,faults=wait@9=fail,callback"};

	(void)state;
	for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++)
		assert_int_equal(team_of_threads(2, join_body, (void *)(uintptr_t)specs[i]), 0);
}

/* Rank 1 fetches twice and waits for the second; that the first one failed, its throttled link has seen on the way. */
static int overtaken_body(const struct member *member)
{
	const lshard_transport_ops *ops;
	const bool looks = member->rank == 1;
	struct pair pair;
	lshard_arrival arrival;
	int failed = 1;

	if (!pair_open(&pair, member))
		goto failed;
	ops = pair.transport->ops;
	for (uint32_t buffer = 0; buffer < 2; buffer++)
		EXPECT(member, ops->fetch(pair.store, 0, looks ? buffer : LSHARD_NO_BUFFER, NULL, buffer) == LSHARD_OK,
		       "fetch");
	if (looks) {
		EXPECT(member, ops->wait(pair.store, 1, NULL, &arrival) == LSHARD_OK, "%s", pair.store->error.text);
		EXPECT(member, ops->join(pair.store, NULL) == LSHARD_ERR_TRANSPORT, "join forgets a failure");
		EXPECT(member, ops->drain(pair.store) == LSHARD_OK, "%s", pair.store->error.text);
		EXPECT(member, ops->wait(pair.store, 0, NULL, &arrival) == LSHARD_OK, "what drain has dropped is told");
	}
	EXPECT(member, team_barrier(member), "a rank failed");
	failed = 0;
failed:
	pair_close(&pair);
	return failed;
}

static void join_tells_what_a_wait_for_another_layer_has_seen(void **state)
{
	static const char spec[] = "throttle=1e9,faults=r1.wait@2=fail,local:lockstep";

	(void)state;
	assert_int_equal(team_of_threads(2, overtaken_body, (void *)(uintptr_t)spec), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(what_join_has_told_is_told_by_every_wait_too),
		cmocka_unit_test(join_tells_what_a_wait_for_another_layer_has_seen),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
