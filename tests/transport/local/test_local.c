/* SPDX-License-Identifier: Apache-2.0
 *
 * test_local.c - the `local` transport by itself, through the transport interface: how ranks agree, time out, go and
 * come too late, and when its options let transfers copy. What it has in common with other transports is in
 * conformance.c.
 */
#include "contexts.h"
#include "patience.h"
#include "transports.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <setjmp.h>
#include <cmocka.h>

#define LAYERS      6u
#define LAYER_BYTES 512u

/* ---- A group of one transport, without the core ---------------------------------------------------------------- */

/* WHOLE: the layer at position p is in the shard of rank p % size, all of it in one piece. */
struct arrangement {
	lshard_store_plan plan;
	lshard_piece pieces[LAYERS];
	uint32_t first_piece[LAYERS + 1];
	uint64_t shard_bytes[8];
};

static void arrange(struct arrangement *arrangement, const struct member *member, uint32_t windows)
{
	memset(arrangement, 0, sizeof *arrangement);
	for (uint32_t position = 0; position < LAYERS; position++) {
		int32_t source = (int32_t)position % member->size;

		arrangement->pieces[position] = (lshard_piece){.rank = source,
							       .shard_offset = arrangement->shard_bytes[source],
							       .width = LAYER_BYTES,
							       .rows = 1};
		arrangement->first_piece[position + 1] = position + 1;
		arrangement->shard_bytes[source] += LAYER_BYTES;
	}
	arrangement->plan = (lshard_store_plan){.name = "s",
						.layers = LAYERS,
						.layer_bytes = LAYER_BYTES,
						.shard_bytes = arrangement->shard_bytes[member->rank],
						.shard_bytes_of = arrangement->shard_bytes,
						.buffers = windows,
						.windows = windows,
						.pieces = arrangement->pieces,
						.first_piece = arrangement->first_piece};
}

static void fill_shard(const struct arrangement *arrangement, const struct member *member, unsigned char *shard)
{
	for (uint32_t position = 0; position < LAYERS; position++)
		if (arrangement->pieces[position].rank == member->rank)
			memset(shard + arrangement->pieces[position].shard_offset, (int)position + 1, LAYER_BYTES);
}

static bool buffer_has(lshard_store *store, uint32_t buffer, uint32_t position)
{
	const unsigned char *bytes = store->transport->ops->buffer(store, buffer, position);

	return bytes[0] == position + 1 && bytes[LAYER_BYTES - 1] == position + 1;
}

/* ---- Agreement ------------------------------------------------------------------------------------------------- */

/* A rank that is late makes nothing happen for the others, and the next exchange is whole again. */
static int late_rank(const struct member *member)
{
	lshard_context context = context_for_member(member, "", patience(500));
	lshard_transport *transport = NULL;
	lshard_error error = {""};
	uint8_t alive[3];
	int32_t all[3] = {-1, -1, -1};
	lshard_status status;

	EXPECT(member, lshard__local.open(&context, NULL, &transport, &error) == LSHARD_OK, "%s", error.text);
	EXPECT(member, team_barrier(member), "a rank failed"); /* both that come do so together */
	if (member->rank != 1) {
		status = transport->ops->exchange(transport, &member->rank, all, sizeof member->rank, alive);
		EXPECT(member, status == LSHARD_ERR_TIMEOUT, "%d", (int)status);
		EXPECT(member, strstr(transport->error.text, "for rank 1") != NULL, "%s", transport->error.text);
		EXPECT(member, alive[1] == 0 && alive[member->rank] == 1, "%d", (int)alive[1]);
		EXPECT(member, all[0] == -1 && all[2] == -1, "a failed exchange wrote %d", (int)all[0]);
	}
	EXPECT(member, team_barrier(member), "a rank failed");
	context.timeout_ms = LONG_MS;
	status = transport->ops->exchange(transport, &member->rank, all, sizeof member->rank, alive);
	if (status ==
	    LSHARD_ERR_TIMEOUT) /* the group keeps the deadline it was made with: on a slow machine, once more */
		status = transport->ops->exchange(transport, &member->rank, all, sizeof member->rank, alive);
	EXPECT(member, status == LSHARD_OK, "%s", transport->error.text);
	EXPECT(member, all[0] == 0 && all[1] == 1 && all[2] == 2, "%d %d %d", (int)all[0], (int)all[1], (int)all[2]);
	transport->ops->close(transport);
	return 0;
failed:
	if (transport)
		transport->ops->close(transport);
	return 1;
}

static void a_late_rank_times_the_exchange_out_for_all(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(3, late_rank, NULL), 0);
}

/* Rank 0 aborts while the others wait for it: they go on without it at once, with a zero in its place. */
static int gone_rank(const struct member *member)
{
	lshard_context context = context_for_member(member, "", LONG_MS);
	lshard_transport *transport = NULL;
	lshard_error error = {""};
	uint8_t alive[3] = {9, 9, 9};
	int32_t mine = member->rank + 10, all[3] = {-1, -1, -1};
	lshard_status status;

	EXPECT(member, lshard__local.open(&context, NULL, &transport, &error) == LSHARD_OK, "%s", error.text);
	if (member->rank == 0) {
		nanosleep(&(struct timespec){0, 30000000}, NULL);
		transport->ops->abort(transport);
	}
	status = transport->ops->exchange(transport, &mine, all, sizeof mine, alive);
	if (member->rank == 0) {
		EXPECT(member, status == LSHARD_ERR_ABORTED, "%d", (int)status);
	} else {
		EXPECT(member, status == LSHARD_OK, "%s", transport->error.text);
		EXPECT(member, alive[0] == 0 && alive[1] == 1 && alive[2] == 1, "alive");
		EXPECT(member, all[0] == 0 && all[1] == 11 && all[2] == 12, "payload");
	}
	transport->ops->close(transport);
	return 0;
failed:
	if (transport)
		transport->ops->close(transport);
	return 1;
}

static void a_rank_that_goes_ends_the_waiting(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(3, gone_rank, NULL), 0);
}

static int with_options(const struct member *member)
{
	const char *const *options = member->user;
	lshard_context context = context_for_member(member, options[member->rank], LONG_MS);
	lshard_transport *transport = NULL;
	lshard_error error = {""};
	lshard_status status = lshard__local.open(&context, NULL, &transport, &error);

	EXPECT(member, status == LSHARD_ERR_MISMATCH, "%d", (int)status);
	EXPECT(member, strstr(error.text, "at=wait") && strstr(error.text, "rank 1"), "%s", error.text);
	EXPECT(member, transport == NULL, "something was opened");
	return 0;
failed:
	if (transport)
		transport->ops->close(transport);
	return 1;
}

static void ranks_with_other_options_do_not_join(void **state)
{
	const char *options[] = {"at=reach", "at=wait"};

	(void)state;
	assert_int_equal(team_of_threads(2, with_options, options), 0);
}

static void unknown_options_are_named(void **state)
{
	static const char *const wrong[] = {"at=never", "seed=", "seed=x", "lockstep+", "+", "at=reach+seed=1"};
	struct member alone = {.size = 1};

	(void)state;
	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
		lshard_context context = context_for_member(&alone, wrong[i], LONG_MS);
		lshard_transport *transport = NULL;
		lshard_error error = {""};

		assert_int_equal(lshard__local.open(&context, NULL, &transport, &error), LSHARD_ERR_INVALID);
		assert_non_null(strchr(error.text, '\''));
		assert_null(transport);
	}
}

/* ---- When transfers copy --------------------------------------------------------------------------------------- */

/* Rank 1 of 2 fetches position 0 (of rank 0) and says after what it was there. */
struct timing {
	const char *options;
	bool at_fetch[2]; /* seen: there after the fetch; for two fetches */
	uint64_t drawn;   /* bit i: fetch i was there at once */
};

static int time_copies(const struct member *member)
{
	struct timing *timing = member->user;
	struct arrangement arrangement;
	lshard_context context = context_for_member(member, timing->options, LONG_MS);
	lshard_transport *transport = NULL;
	lshard_store *store = NULL;
	lshard_arrival arrival;
	lshard_error error = {""};

	arrange(&arrangement, member, 2);
	EXPECT(member, lshard__local.open(&context, NULL, &transport, &error) == LSHARD_OK, "%s", error.text);
	EXPECT(member, transport->ops->store_open(transport, &arrangement.plan, &store) == LSHARD_OK, "%s",
	       transport->error.text);
	fill_shard(&arrangement, member, transport->ops->shard(store));
	EXPECT(member, team_barrier(member), "a rank failed");
	for (uint32_t step = 0; member->rank == 1 && step < 48; step++) {
		uint32_t position = step % 3 * 2, buffer = step % 2;
		bool early;

		EXPECT(member, transport->ops->fetch(store, position, buffer, NULL, step) == LSHARD_OK, "fetch");
		early = buffer_has(store, buffer, position);
		timing->drawn |= (uint64_t)early << step;
		EXPECT(member, transport->ops->wait(store, buffer, NULL, &arrival) == LSHARD_OK, "wait");
		EXPECT(member, buffer_has(store, buffer, position), "step %u", step);
		EXPECT(member, arrival.finished_ns >= arrival.started_ns && arrival.started_ns > 0, "no times");
		EXPECT(member, !early || arrival.blocked_ns == 0, "blocked for what was there");
		EXPECT(member, transport->ops->wait(store, buffer, NULL, &arrival) == LSHARD_OK, "second wait");
		EXPECT(member, arrival.busy_ns == 0, "a transfer was counted twice");
	}
	EXPECT(member, team_barrier(member), "a rank failed");
	transport->ops->store_close(store);
	transport->ops->close(transport);
	return 0;
failed:
	if (store)
		transport->ops->store_close(store);
	if (transport)
		transport->ops->close(transport);
	return 1;
}

static uint64_t drawn_with(const char *options)
{
	struct timing timing = {.options = options};

	assert_int_equal(team_of_threads(2, time_copies, &timing), 0);
	return timing.drawn;
}

static void options_say_when_transfers_copy(void **state)
{
	const uint64_t all = ((uint64_t)1 << 48) - 1;
	uint64_t seven = drawn_with("seed=7");

	(void)state;
	assert_int_equal(drawn_with(""), all);
	assert_int_equal(drawn_with("at=reach"), all);
	assert_int_equal(drawn_with("at=wait"), 0);
	assert_true(seven != 0 && seven != all);
	assert_int_equal(drawn_with("seed=7"), seven);
	assert_int_not_equal(drawn_with("seed=8"), seven);
}

/* ---- In lockstep ----------------------------------------------------------------------------------------------- */

struct lockstep {
	struct arrangement arrangement;
	lshard_context context;
	lshard_transport *transport;
	lshard_store *store;
};

static bool lockstep_open(struct lockstep *lockstep, const struct member *member, uint32_t windows, uint32_t timeout_ms)
{
	lshard_error error = {""};

	*lockstep = (struct lockstep){.context = context_for_member(member, "lockstep", timeout_ms)};
	arrange(&lockstep->arrangement, member, windows);
	EXPECT(member, lshard__local.open(&lockstep->context, NULL, &lockstep->transport, &error) == LSHARD_OK, "%s",
	       error.text);
	EXPECT(member,
	       lockstep->transport->ops->store_open(lockstep->transport, &lockstep->arrangement.plan,
						    &lockstep->store) == LSHARD_OK,
	       "%s", lockstep->transport->error.text);
	fill_shard(&lockstep->arrangement, member, lockstep->transport->ops->shard(lockstep->store));
	EXPECT(member, team_barrier(member), "a rank failed");
	return true;
failed:
	return false;
}

static void lockstep_close(struct lockstep *lockstep)
{
	if (lockstep->store)
		lockstep->transport->ops->store_close(lockstep->store);
	if (lockstep->transport)
		lockstep->transport->ops->close(lockstep->transport);
}

#define MANY 1000u

/* As many transfers on their way as there are windows; rank 1 asks for another layer at the number *user. */
static int many_ahead(const struct member *member)
{
	const uint32_t *wrong = member->user;
	struct lockstep lockstep;
	lshard_arrival arrival;

	if (!lockstep_open(&lockstep, member, MANY, LONG_MS))
		goto failed;
	for (uint32_t buffer = 0; buffer < MANY; buffer++) {
		uint32_t position = (buffer + (member->rank == 1 && buffer == *wrong)) % LAYERS;

		EXPECT(member,
		       lockstep.transport->ops->fetch(lockstep.store, position, buffer, NULL, buffer) == LSHARD_OK,
		       "fetch");
	}
	EXPECT(member, team_barrier(member), "a rank failed");
	for (uint32_t buffer = 0; buffer < MANY; buffer++) {
		lshard_status status = lockstep.transport->ops->wait(lockstep.store, buffer, NULL, &arrival);

		EXPECT(member, status == (buffer == *wrong ? LSHARD_ERR_OUT_OF_STEP : LSHARD_OK), "transfer %u: %s",
		       buffer, lockstep.store->error.text);
		EXPECT(member, status < 0 || buffer_has(lockstep.store, buffer, buffer % LAYERS), "transfer %u",
		       buffer);
	}
	EXPECT(member, team_barrier(member), "a rank failed");
	lockstep_close(&lockstep);
	return 0;
failed:
	lockstep_close(&lockstep);
	return 1;
}

static void any_number_of_windows_goes_in_lockstep(void **state)
{
	uint32_t wrong = MANY; /* nowhere */

	(void)state;
	assert_int_equal(team_of_threads(2, many_ahead, &wrong), 0);
	wrong = 0;
	assert_int_equal(team_of_threads(2, many_ahead, &wrong), 0);
	wrong = 700;
	assert_int_equal(team_of_threads(3, many_ahead, &wrong), 0);
}

/*
 * Rank 0 jumps a thousand times and waits for the last layer only; rank 1 comes after it and waits for every one. What
 * both fetched before all that is still there to be waited for.
 */
static int jumps_ahead(const struct member *member)
{
	struct lockstep lockstep;
	lshard_arrival arrival;

	if (!lockstep_open(&lockstep, member, 2, LONG_MS))
		goto failed;
	EXPECT(member, member->rank == 0 || team_barrier(member), "a rank failed");
	EXPECT(member, lockstep.transport->ops->fetch(lockstep.store, 3, 1, NULL, 0) == LSHARD_OK, "fetch");
	for (uint32_t jump = 0; jump < MANY; jump++) {
		EXPECT(member,
		       lockstep.transport->ops->fetch(lockstep.store, jump % LAYERS, 0, NULL, jump + 1) == LSHARD_OK,
		       "fetch");
		if (member->rank == 0)
			continue;
		EXPECT(member, lockstep.transport->ops->wait(lockstep.store, 0, NULL, &arrival) == LSHARD_OK, "%s",
		       lockstep.store->error.text);
		EXPECT(member, buffer_has(lockstep.store, 0, jump % LAYERS), "jump %u", jump);
		EXPECT(member, arrival.started_ns > 0 && arrival.busy_ns < LONG_MS * UINT64_C(1000000), "its times");
	}
	EXPECT(member, member->rank == 1 || team_barrier(member), "a rank failed");
	EXPECT(member, lockstep.transport->ops->wait(lockstep.store, 0, NULL, &arrival) == LSHARD_OK, "%s",
	       lockstep.store->error.text);
	EXPECT(member, buffer_has(lockstep.store, 0, (MANY - 1) % LAYERS), "the last");
	EXPECT(member, lockstep.transport->ops->wait(lockstep.store, 1, NULL, &arrival) == LSHARD_OK, "%s",
	       lockstep.store->error.text);
	EXPECT(member, buffer_has(lockstep.store, 1, 3) && arrival.busy_ns < LONG_MS * UINT64_C(1000000), "the first");
	lockstep_close(&lockstep);
	return 0;
failed:
	lockstep_close(&lockstep);
	return 1;
}

/* While a transfer is on its way, a series with many windows is opened, and closed again. */
static int opens_another(const struct member *member)
{
	struct lockstep lockstep;
	struct arrangement large;
	lshard_store *other = NULL;
	lshard_arrival arrival;

	if (!lockstep_open(&lockstep, member, 2, LONG_MS))
		goto failed;
	arrange(&large, member, MANY);
	EXPECT(member, lockstep.transport->ops->fetch(lockstep.store, 2, 0, NULL, 300) == LSHARD_OK, "fetch");
	EXPECT(member,
	       lockstep.transport->ops->fetch(lockstep.store, 3 + (uint32_t)member->rank, 1, NULL, 301) == LSHARD_OK,
	       "fetch");
	EXPECT(member, lockstep.transport->ops->store_open(lockstep.transport, &large.plan, &other) == LSHARD_OK, "%s",
	       lockstep.transport->error.text);
	EXPECT(member, lockstep.transport->ops->wait(lockstep.store, 0, NULL, &arrival) == LSHARD_OK, "%s",
	       lockstep.store->error.text);
	EXPECT(member, buffer_has(lockstep.store, 0, 2), "the bytes");
	EXPECT(member, lockstep.transport->ops->wait(lockstep.store, 1, NULL, &arrival) == LSHARD_ERR_OUT_OF_STEP,
	       "different layers");
	lockstep.transport->ops->store_close(other);
	EXPECT(member, team_barrier(member), "a rank failed");
	lockstep_close(&lockstep);
	return 0;
failed:
	lockstep_close(&lockstep);
	return 1;
}

static void a_series_that_opens_disturbs_no_transfer(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(2, opens_another, NULL), 0);
}

static void jumps_without_waits_stay_in_step(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(2, jumps_ahead, NULL), 0);
}

/* A wait whose time is up says how long it blocked and changes nothing: the next one goes on. */
static int waits_twice(const struct member *member)
{
	struct lockstep lockstep;
	lshard_arrival arrival = {0, 1, 1, 1};

	if (!lockstep_open(&lockstep, member, 2, patience(500)))
		goto failed;
	EXPECT(member, member->rank == 0 || team_barrier(member), "a rank failed");
	for (uint32_t buffer = 0; buffer < 2; buffer++)
		EXPECT(member,
		       lockstep.transport->ops->fetch(lockstep.store, buffer, buffer, NULL, buffer) == LSHARD_OK,
		       "fetch");
	for (int i = 0; i < 2 && member->rank == 0; i++) {
		EXPECT(member, lockstep.transport->ops->wait(lockstep.store, 1, NULL, &arrival) == LSHARD_ERR_TIMEOUT,
		       "rank 1 has asked for nothing yet");
		EXPECT(member, arrival.blocked_ns >= patience(500) * UINT64_C(1000000) && arrival.busy_ns == 0,
		       "%llu ns", (unsigned long long)arrival.blocked_ns);
	}
	EXPECT(member, member->rank == 1 || team_barrier(member), "a rank failed");
	EXPECT(member, team_barrier(member), "a rank failed");
	EXPECT(member, lockstep.transport->ops->wait(lockstep.store, 1, NULL, &arrival) == LSHARD_OK, "%s",
	       lockstep.store->error.text);
	EXPECT(member, buffer_has(lockstep.store, 1, 1) && arrival.finished_ns >= arrival.started_ns,
	       "what was fetched");
	lockstep_close(&lockstep);
	return 0;
failed:
	lockstep_close(&lockstep);
	return 1;
}

static void a_wait_in_vain_can_be_repeated(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(2, waits_twice, NULL), 0);
}

/* ---- Shards outlive their rank --------------------------------------------------------------------------------- */

static int read_after_close(const struct member *member)
{
	struct arrangement arrangement;
	lshard_context context = context_for_member(member, "at=wait", LONG_MS);
	lshard_transport *transport = NULL;
	lshard_store *store = NULL;
	lshard_arrival arrival;
	lshard_error error = {""};

	arrange(&arrangement, member, 1);
	EXPECT(member, lshard__local.open(&context, NULL, &transport, &error) == LSHARD_OK, "%s", error.text);
	EXPECT(member, transport->ops->store_open(transport, &arrangement.plan, &store) == LSHARD_OK, "%s",
	       transport->error.text);
	fill_shard(&arrangement, member, transport->ops->shard(store));
	EXPECT(member, team_barrier(member), "a rank failed");
	if (member->rank == 0) {
		transport->ops->store_close(store);
		transport->ops->close(transport);
		store = NULL;
		transport = NULL;
	}
	EXPECT(member, team_barrier(member), "a rank failed");
	if (member->rank == 1) {
		EXPECT(member, transport->ops->fetch(store, 4, 0, NULL, 0) == LSHARD_OK, "fetch");
		EXPECT(member, transport->ops->wait(store, 0, NULL, &arrival) == LSHARD_OK, "wait");
		EXPECT(member, buffer_has(store, 0, 4), "the bytes of a rank that left");
		transport->ops->store_close(store);
		transport->ops->close(transport);
	}
	return 0;
failed:
	if (store)
		transport->ops->store_close(store);
	if (transport)
		transport->ops->close(transport);
	return 1;
}

static void a_shard_outlives_its_rank(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(2, read_after_close, NULL), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_late_rank_times_the_exchange_out_for_all),
		cmocka_unit_test(a_rank_that_goes_ends_the_waiting),
		cmocka_unit_test(ranks_with_other_options_do_not_join),
		cmocka_unit_test(unknown_options_are_named),
		cmocka_unit_test(options_say_when_transfers_copy),
		cmocka_unit_test(any_number_of_windows_goes_in_lockstep),
		cmocka_unit_test(jumps_without_waits_stay_in_step),
		cmocka_unit_test(a_series_that_opens_disturbs_no_transfer),
		cmocka_unit_test(a_wait_in_vain_can_be_repeated),
		cmocka_unit_test(a_shard_outlives_its_rank),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
