/* SPDX-License-Identifier: Apache-2.0
 *
 * test_shm_copy.c - the copying thread of the shm transport and whose memory it may touch, and when. The test stands
 * between the thread and its copies by the linker. Right bytes are test_shm.c's.
 */
#include "host_copy.h"
#include "shm_ranks.h"
#include "shm.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdatomic.h>
#include <unistd.h>
#include <cmocka.h>

#define LAYERS 4u

/* ---- Copies whose time the test chooses ------------------------------------------------------------------------ */

static _Atomic enum {
	AT_ONCE,
	SLOWLY,  /* until the store is closed, or for a while */
	IN_TURN, /* the first once a second one was asked for; that one when the buffer was looked at, or later */
} manner;
static atomic_int begun; /* copies */
static atomic_bool asked_again, looked_at;
static atomic_bool closed; /* the store is */
static atomic_bool torn;   /* it was while a copy ran */

void __real_lshard__host_copy_layer(const lshard_store_plan *plan, uint32_t position, const void *const *shards,
				    void *layer);
void __wrap_lshard__host_copy_layer(const lshard_store_plan *plan, uint32_t position, const void *const *shards,
				    void *layer);

/* What is done too early has this long to be done. */
#define A_WHILE_MS 200

static void hold_until(const atomic_bool *flag)
{
	for (int ms = 0; ms < A_WHILE_MS && !atomic_load(flag); ms++)
		usleep(1000);
}

void __wrap_lshard__host_copy_layer(const lshard_store_plan *plan, uint32_t position, const void *const *shards,
				    void *layer)
{
	const int before = atomic_fetch_add(&begun, 1);

	if (manner == SLOWLY)
		hold_until(&closed);
	else if (manner == IN_TURN)
		hold_until(before == 0 ? &asked_again : &looked_at);
	if (atomic_load(&closed))
		atomic_store(&torn, true); /* plan, shards and layer have gone */
	else
		__real_lshard__host_copy_layer(plan, position, shards, layer);
}

static int closes_while_it_copies(const struct member *member)
{
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};
	const uint32_t others = member->rank ? 0 : 1;

	EXPECT(member, shm_rank_open(&rank, member, "copy", LONG_MS), "open");
	shm_series_plan(&series, member, WHOLE, LAYERS, 0, 1);
	EXPECT(member, shm_series_open(&rank, &series) == LSHARD_OK, "%s", rank.transport->error.text);
	manner = SLOWLY;
	EXPECT(member, rank.transport->ops->fetch(series.store, others, 0, NULL, 0) == LSHARD_OK, "fetch");
	while (atomic_load(&begun) == 0)
		usleep(100);
	shm_series_close(&series);
	atomic_store(&closed, true);
	shm_rank_close(&rank); /* ends the thread */
	EXPECT(member, !atomic_load(&torn), "the store was closed while its copy ran");
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void a_store_is_not_closed_under_its_copy(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, closes_while_it_copies, NULL), 0);
}

/* A layer is fetched into the buffer into which another is being copied: the wait is for the newer one. */
static int fetches_while_it_copies(const struct member *member)
{
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};
	const uint32_t others = member->rank ? 0 : 1;
	const lshard_transport_ops *ops;
	lshard_arrival arrival;

	EXPECT(member, shm_rank_open(&rank, member, "copy", LONG_MS), "open");
	ops = rank.transport->ops;
	shm_series_plan(&series, member, WHOLE, LAYERS, 0, 1);
	EXPECT(member, shm_series_open(&rank, &series) == LSHARD_OK, "%s", rank.transport->error.text);
	shm_series_fill(&series, 3);
	EXPECT(member, team_barrier(member), "another rank failed");
	manner = IN_TURN;
	EXPECT(member, ops->fetch(series.store, others, 0, NULL, 0) == LSHARD_OK, "fetch");
	while (atomic_load(&begun) == 0)
		usleep(100);
	EXPECT(member, ops->fetch(series.store, others + 2, 0, NULL, 0) == LSHARD_OK, "fetch");
	atomic_store(&asked_again, true);
	EXPECT(member, ops->wait(series.store, 0, NULL, &arrival) == LSHARD_OK, "%s", series.store->error.text);
	EXPECT(member, shm_series_right(&series, others + 2, 3, ops->buffer(series.store, 0, others + 2)), "bytes");
	atomic_store(&looked_at, true);
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void an_overtaken_copy_is_not_what_is_waited_for(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, fetches_while_it_copies, NULL), 0);
}

/* ---- The program's signals ------------------------------------------------------------------------------------- */

/* A new thread blocks all signals until it has begun, so the thread is looked at after it has copied something. */
static int looks_at_its_threads(const struct member *member)
{
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};
	lshard_arrival arrival;
	int open = 0;

	EXPECT(member, shm_rank_open(&rank, member, "copy", LONG_MS), "open");
	shm_series_plan(&series, member, WHOLE, LAYERS, 0, 1);
	EXPECT(member, shm_series_open(&rank, &series) == LSHARD_OK, "%s", rank.transport->error.text);
	EXPECT(member,
	       rank.transport->ops->fetch(series.store, member->rank ? 0 : 1, 0, NULL, 0) == LSHARD_OK &&
		       rank.transport->ops->wait(series.store, 0, NULL, &arrival) == LSHARD_OK,
	       "%s", series.store->error.text);
	EXPECT(member, threads_named("layershard-copy", &open) == 1, "no thread, or more than one");
	EXPECT(member, open == 0, "a handler of the program's could run on the copying thread");
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void the_thread_takes_no_signals(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, looks_at_its_threads, NULL), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_store_is_not_closed_under_its_copy),
		cmocka_unit_test(an_overtaken_copy_is_not_what_is_waited_for),
		cmocka_unit_test(the_thread_takes_no_signals),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
