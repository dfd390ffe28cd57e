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

/* ---- A copy that takes long ------------------------------------------------------------------------------------ */

static atomic_bool slowly; /* from now on */
static atomic_bool began;
static atomic_bool closed; /* the store of the copy is */
static atomic_bool torn;   /* it was while the copy ran */

void __real_lshard__host_copy_layer(const lshard_store_plan *plan, uint32_t position, const void *const *shares,
				    void *layer);
void __wrap_lshard__host_copy_layer(const lshard_store_plan *plan, uint32_t position, const void *const *shares,
				    void *layer);

/* What closes a store has this long to do it too early. */
#define SLOWLY_MS 200

void __wrap_lshard__host_copy_layer(const lshard_store_plan *plan, uint32_t position, const void *const *shares,
				    void *layer)
{
	if (atomic_load(&slowly)) {
		atomic_store(&began, true);
		for (int ms = 0; ms < SLOWLY_MS && !atomic_load(&closed); ms++)
			usleep(1000);
		if (atomic_load(&closed)) {
			atomic_store(&torn, true);
			return; /* plan, shares and layer have gone */
		}
	}
	__real_lshard__host_copy_layer(plan, position, shares, layer);
}

static int closes_while_it_copies(const struct member *member)
{
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};
	const uint32_t others = member->rank ? 0 : 1;

	EXPECT(member, shm_rank_open(&rank, member, "copy", LONG_MS), "open");
	shm_series_plan(&series, member, OWNED, LAYERS, 0, 1);
	EXPECT(member, rank.transport->ops->store_open(rank.transport, &series.plan, &series.store) == LSHARD_OK, "%s",
	       rank.transport->error.text);
	atomic_store(&slowly, true);
	EXPECT(member, rank.transport->ops->fetch(series.store, others, 0, NULL, 0) == LSHARD_OK, "fetch");
	while (!atomic_load(&began))
		usleep(100);
	rank.transport->ops->store_close(series.store);
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

/* ---- The program's signals ------------------------------------------------------------------------------------- */

static int looks_at_its_threads(const struct member *member)
{
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};
	int open = 0;

	EXPECT(member, shm_rank_open(&rank, member, "copy", LONG_MS), "open");
	shm_series_plan(&series, member, OWNED, LAYERS, 0, 1);
	EXPECT(member, rank.transport->ops->store_open(rank.transport, &series.plan, &series.store) == LSHARD_OK, "%s",
	       rank.transport->error.text);
	EXPECT(member, threads_named("layershard-copy", &open) == 1, "no thread, or more than one");
	EXPECT(member, open == 0, "a handler of the program's could run on the copying thread");
	rank.transport->ops->store_close(series.store);
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
		cmocka_unit_test(the_thread_takes_no_signals),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
