/* SPDX-License-Identifier: Apache-2.0
 *
 * test_cuda_agreement.c - what goes wrong on one rank while a series is opened on the cuda transport, over a stand-in
 * for the driver: a rank is killed, an allocation lies crooked. All are told, at once, and keep nothing.
 */
#include "cuda_ranks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* ---- deaths ---- */

/* Where rank 1 is killed: in which call of the driver, once the group is there. */
struct death {
	struct setting setting;
	const char *symbol;
	unsigned nth;
};

static int hears_of_it(const struct member *member)
{
	const struct death *death = member->user;
	double began_s;
	struct rank rank;
	lshard_status status;

	cuda_set_stub(member, &death->setting);
	EXPECT(member, cuda_open_group(&rank, member, &death->setting) == LSHARD_OK, "%s", rank.error);
	if (!team_barrier(member))
		goto failed;
	if (member->rank == 1) {
		team_dies(member);
		stub_cuda_fail(death->symbol, death->nth, STUB_KILLED);
	}
	began_s = cuda_now_s();
	status = cuda_create_series(&rank);
	EXPECT(member, status == LSHARD_ERR_PEER_FAILED, "%s: status %d: %s", death->symbol, (int)status,
	       lshard_group_error(rank.group));
	EXPECT(member, strstr(lshard_group_error(rank.group), "rank 1"), "%s", lshard_group_error(rank.group));
	/* Who waits for the time to be up has not been told. */
	EXPECT(member, cuda_now_s() - began_s < LONG_MS / 2e3, "told after %.1f s", cuda_now_s() - began_s);
	cuda_close_rank(&rank);
	EXPECT(member, stub_cuda_outstanding() == 0, "%s: %d objects are left", death->symbol, stub_cuda_outstanding());
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

/* Before the first agreement, between the turns in which descriptors go round, before the last. */
static void deaths_in_every_agreement_are_told(void **state)
{
	const struct setting owner = {.spec = "cuda", .prefetch = 1, .timeout_ms = LONG_MS};
	const struct setting ipc = {.spec = "cuda:ipc", .prefetch = 1, .timeout_ms = LONG_MS};
	const struct death deaths[] = {
		{owner, "cuMemCreate", 1},
		{owner, "cuStreamCreateWithPriority", 2},
		{owner, "cuMemExportToShareableHandle", 1},
		{owner, "cuMemImportFromShareableHandle", 1},
		{owner, "cuMemSetAccess", 4},
		{owner, "cuStreamBeginCapture_v2", 1},
		{owner, "cuGraphUpload", 2},
		{ipc, "cuMemAlloc_v2", 1},
		{ipc, "cuIpcGetMemHandle", 1},
		{ipc, "cuIpcOpenMemHandle_v2", 1},
		{ipc, "cuIpcOpenMemHandle_v2", 2},
	};

	(void)state;
	for (size_t i = 0; i < sizeof deaths / sizeof deaths[0]; i++) {
		struct death death = deaths[i];

		assert_int_equal(team_of_processes(3, hears_of_it, &death), 0);
	}
}

/* ---- allocations that are not aligned ---- */

static int refuses_crooked_memory(const struct member *member)
{
	struct rank rank;
	lshard_status status;

	cuda_set_stub(member, member->user);
	EXPECT(member, cuda_open_group(&rank, member, member->user) == LSHARD_OK, "%s", rank.error);
	if (member->rank == 1)
		stub_cuda_set(STUB_CROOKED, 64);
	status = cuda_create_series(&rank);
	EXPECT(member, status == LSHARD_ERR_NOT_SUPPORTED, "status %d: %s", (int)status,
	       lshard_group_error(rank.group));
	EXPECT(member,
	       strstr(lshard_group_error(rank.group), "rank 1: series 'blocks': the driver puts its shard at 0x") &&
		       strstr(lshard_group_error(rank.group), "which is not aligned to 256"),
	       "%s", lshard_group_error(rank.group));
	cuda_close_rank(&rank);
	EXPECT(member, stub_cuda_outstanding() == 0, "%d objects are left", stub_cuda_outstanding());
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void crooked_memory_is_refused(void **state)
{
	struct setting setting = {.spec = "cuda:ipc", .prefetch = 1};

	(void)state;
	assert_int_equal(team_of_processes(2, refuses_crooked_memory, &setting), 0);
}

int main(int count, char **arguments)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(deaths_in_every_agreement_are_told),
		cmocka_unit_test(crooked_memory_is_refused),
	};

	if (count != 2) {
		fprintf(stderr, "usage: test_cuda_agreement PATH-OF-THE-STUB\n");
		return 2;
	}
	setenv("LAYERSHARD_CUDA_SO_PATH", arguments[1], 1);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
