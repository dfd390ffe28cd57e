/* SPDX-License-Identifier: Apache-2.0
 *
 * test_throttle.c - a link of a bandwidth: what it takes, what it does not, and what its waits say. Times are only ever
 * compared with what such a link could not have done faster, or with many times what it needs.
 */
#include "patience.h"
#include "test_clock.h"
#include "transports.h"
#include "wrapped_ranks.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

/* One tensor of 1 MiB a layer; through a link of 200 MB/s it takes 5.24288 ms exactly. */
#define BIG_BYTES  1048576u
#define BIG_TAKES  5242880u
#define BIG_LAYERS 6u
#define BIG_PASSES 4

/* One window: every layer from elsewhere comes once in each pass, so what was waited for is known. */
static struct setting big_setting(lshard_placement placement)
{
	struct setting setting = {.layers = BIG_LAYERS, .placement = placement, .n_tensors = 1};

	setting.tensors[0] = (lshard_tensor){"weight", BIG_BYTES, 0, LSHARD_STRIPE_BYTES, 0, 0};
	return setting;
}

/* Every waited transfer took the link its exact time, and they came one after the other. */
static int throttled_body(const struct member *member)
{
	const struct setting *setting = member->user;
	struct rank rank;
	lshard_stats stats = LSHARD_STATS_INIT;
	uint64_t began = now_ns(), transfers, takes;
	bool right = false;

	if (!rank_open(&rank, member, setting))
		return 1;
	for (int pass = 0; pass < BIG_PASSES; pass++) {
		if (member->rank == 1)
			pause_ms(10); /* on a collective transport, the others' transfers begin later */
		if (!one_pass(&rank))
			goto failed;
	}
	OK_SERIES(&rank, lshard_series_stats(rank.series, &stats));
	transfers = (uint64_t)BIG_PASSES * stats.fetched_layers;
	takes = setting->placement == LSHARD_STRIPED ? BIG_TAKES / 2 : BIG_TAKES; /* half of a stripe's layer is here */
	EXPECT(member, stats.fetched_layers == (setting->placement == LSHARD_STRIPED ? BIG_LAYERS : BIG_LAYERS / 2),
	       "%u", stats.fetched_layers);
	EXPECT(member, stats.link_busy_ns == transfers * takes, "%llu ns for %llu transfers",
	       (unsigned long long)stats.link_busy_ns, (unsigned long long)transfers);
	EXPECT(member, now_ns() - began >= transfers * takes, "%llu transfers were faster than the link",
	       (unsigned long long)transfers);
	EXPECT(member, stats.blocked_ns > 0 && stats.stalls > 0, "nothing was waited for");
	EXPECT(member, team_barrier(member), "a rank failed");
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void a_throttled_link_takes_its_time(void **state)
{
	static const char *const specs[] = {"throttle=2e8,local", "throttle=200000000,local:at=wait",
					    "throttle=2e8,local:lockstep"};

	(void)state;
	for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++)
		for (int placement = LSHARD_WHOLE; placement <= LSHARD_STRIPED; placement++) {
			struct setting setting = big_setting((lshard_placement)placement);

			subject = (struct subject){.spec = specs[i], .kind = "threads"};
			assert_int_equal(team_of_threads(2, throttled_body, &setting), 0);
		}
}

/* Two thousand jumps over a link that takes 50 ms a layer: those that never began cost nothing. */
static int dropping_body(const struct member *member)
{
	struct setting setting = big_setting(LSHARD_STRIPED);
	struct rank rank;
	uint64_t began;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	began = now_ns();
	for (uint32_t jump = 0; jump < 2000; jump++)
		OK_SERIES(&rank, lshard_reach(rank.series, jump * 2 % BIG_LAYERS, NULL));
	if (!visit(&rank, 3))
		goto failed;
	EXPECT(member, now_ns() - began < 50000000000u, "dropped transfers kept the link busy");
	EXPECT(member, team_barrier(member), "a rank failed");
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void what_never_began_costs_no_link_time(void **state)
{
	(void)state;
	subject = (struct subject){.spec = "throttle=10485760,local", .kind = "threads"};
	assert_int_equal(team_of_threads(2, dropping_body, NULL), 0);
}

static void *abort_soon(void *group)
{
	pause_ms(200);
	lshard_group_abort(group);
	return NULL;
}

/* A link that would take a quarter of an hour: the deadline holds, and so does an abort. */
static int hopeless_body(const struct member *member)
{
	struct setting setting = big_setting(LSHARD_WHOLE);
	struct rank rank;
	pthread_t aborter;
	uint32_t other = member->rank == 0 ? 1 : 0;
	uint64_t began;
	bool aborts = member->rank == 0, right = false;
	char words[24];

	setting.timeout_ms = aborts ? LONG_MS : patience(500);
	if (!rank_open(&rank, member, &setting))
		return 1;
	OK_SERIES(&rank, lshard_reach(rank.series, other, NULL));
	began = now_ns();
	if (aborts) {
		if (pthread_create(&aborter, NULL, abort_soon, rank.group) != 0)
			goto failed;
		EXPECT(member, lshard_wait(rank.series, other, NULL) == LSHARD_ERR_ABORTED, "%s",
		       lshard_series_error(rank.series));
		pthread_join(aborter, NULL);
		EXPECT(member, now_ns() - began < LONG_MS * UINT64_C(500000), "the abort was not heard");
	} else {
		EXPECT(member, lshard_wait(rank.series, other, NULL) == LSHARD_ERR_TIMEOUT, "%s",
		       lshard_series_error(rank.series));
		EXPECT(member, now_ns() - began >= setting.timeout_ms * UINT64_C(1000000), "too early");
		snprintf(words, sizeof words, " %u ms", setting.timeout_ms);
		SAYS(member, lshard_series_error(rank.series), words);
	}
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void a_hopeless_link_does_not_hang(void **state)
{
	(void)state;
	subject = (struct subject){.spec = "throttle=1000,local", .kind = "threads"};
	assert_int_equal(team_of_threads(2, hopeless_body, NULL), 0);
}

/* A wait whose time is up says how long it blocked and changes nothing: the next one goes on. The link takes 3 s. */
static int waits_twice(const struct member *member)
{
	struct narrow narrow;
	lshard_arrival arrival = {0, 1, 1, 1};

	if (!narrow_open(&narrow, member, member->user, &lshard__throttle, "100"))
		goto failed;
	if (member->rank == 0)
		memset(narrow.transport->ops->shard(narrow.store), 77, 300);
	EXPECT(member, team_barrier(member), "a rank failed");
	EXPECT(member, narrow.transport->ops->fetch(narrow.store, 0, 0, NULL, 0) == LSHARD_OK, "fetch");
	narrow.contexts[1].timeout_ms = 50;
	for (int i = 0; i < 2 && member->rank == 1; i++) {
		EXPECT(member, narrow.transport->ops->wait(narrow.store, 0, NULL, &arrival) == LSHARD_ERR_TIMEOUT, "%s",
		       narrow.store->error.text);
		EXPECT(member, arrival.blocked_ns >= 50000000u && arrival.busy_ns == 0, "%llu ns",
		       (unsigned long long)arrival.blocked_ns);
	}
	narrow.contexts[1].timeout_ms = LONG_MS;
	EXPECT(member, narrow.transport->ops->wait(narrow.store, 0, NULL, &arrival) == LSHARD_OK, "%s",
	       narrow.store->error.text);
	EXPECT(member, member->rank == 0 || arrival.busy_ns == 3000000000u, "%llu ns on the link",
	       (unsigned long long)arrival.busy_ns);
	EXPECT(member, *(char *)narrow.transport->ops->buffer(narrow.store, 0, 0) == 77, "the bytes");
	EXPECT(member, team_barrier(member), "a rank failed");
	narrow_close(&narrow);
	return 0;
failed:
	narrow_close(&narrow);
	return 1;
}

static void a_wait_in_vain_can_be_repeated(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(2, waits_twice, (void *)(uintptr_t)"at=wait"), 0);
	assert_int_equal(team_of_threads(2, waits_twice, (void *)(uintptr_t)"lockstep"), 0);
}

/* In step, a layer takes the link when the last rank has asked for it, not when the first has. */
static int asks_last(const struct member *member)
{
	atomic_uint_least64_t *asked_ns = member->user;
	struct narrow narrow;
	lshard_arrival arrival;

	if (!narrow_open(&narrow, member, "lockstep", &lshard__throttle, "30000"))
		goto failed;
	if (member->rank == 1)
		EXPECT(member, narrow.transport->ops->fetch(narrow.store, 0, 0, NULL, 0) == LSHARD_OK, "fetch");
	EXPECT(member, team_barrier(member), "a rank failed");
	if (member->rank == 0) {
		atomic_store(asked_ns, now_ns());
		EXPECT(member, narrow.transport->ops->fetch(narrow.store, 0, 0, NULL, 0) == LSHARD_OK, "fetch");
	}
	EXPECT(member, narrow.transport->ops->wait(narrow.store, 0, NULL, &arrival) == LSHARD_OK, "%s",
	       narrow.store->error.text);
	if (member->rank == 1) {
		EXPECT(member, arrival.started_ns >= atomic_load(asked_ns), "it began before rank 0 had asked for it");
		EXPECT(member, arrival.finished_ns - arrival.started_ns == 10000000u, "300 bytes took %llu ns",
		       (unsigned long long)(arrival.finished_ns - arrival.started_ns));
	}
	EXPECT(member, team_barrier(member), "a rank failed");
	narrow_close(&narrow);
	return 0;
failed:
	narrow_close(&narrow);
	return 1;
}

static void a_transfer_in_step_begins_when_all_have_asked(void **state)
{
	atomic_uint_least64_t asked_ns = 0;

	(void)state;
	assert_int_equal(team_of_threads(2, asks_last, &asked_ns), 0);
}

static void bandwidths_are_checked(void **state)
{
	static const char *const wrong[] = {"", "fast", "-1", "0", "nan", "inf", "1e9x", "1e-3"};

	(void)state;
	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
		char spec[48];

		snprintf(spec, sizeof spec, "throttle=%s,local", wrong[i]);
		assert_refused(spec, LSHARD_ERR_INVALID, "throttle");
	}
	assert_refused("throttle=1e9,shm", LSHARD_ERR_NOT_SUPPORTED, "in place");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_throttled_link_takes_its_time),
		cmocka_unit_test(what_never_began_costs_no_link_time),
		cmocka_unit_test(a_hopeless_link_does_not_hang),
		cmocka_unit_test(a_wait_in_vain_can_be_repeated),
		cmocka_unit_test(a_transfer_in_step_begins_when_all_have_asked),
		cmocka_unit_test(bandwidths_are_checked),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
