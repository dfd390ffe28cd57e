/* SPDX-License-Identifier: Apache-2.0
 *
 * test_cuda_verify.c - lshard_series_verify on device memory, over a stand-in for the driver: transfers that spoil
 * bytes are found on the rank that sees them, a copy that fails is told to all, and nothing stays.
 */
#include "cuda_ranks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* On this rank. */
static int verify_says(struct rank *rank, lshard_status due, const char *words)
{
	uint64_t hash = 1;
	const lshard_status status = lshard_series_verify(rank->series, &hash);

	EXPECT(rank->member, status == due, "%s, due %s: %s", lshard_status_name(status), lshard_status_name(due),
	       lshard_series_error(rank->series));
	EXPECT(rank->member, due == LSHARD_OK || strstr(lshard_series_error(rank->series), words), "not '%s': %s",
	       words, lshard_series_error(rank->series));
	EXPECT(rank->member, due == LSHARD_OK || hash == 1, "a hash was written on failure");
	return 1;
failed:
	return 0;
}

static int leaves_nothing(struct rank *rank)
{
	const int32_t number = rank->member->rank;

	cuda_close_rank(rank);
	if (stub_cuda_outstanding())
		fprintf(stderr, "rank %d: %d objects are left\n", (int)number, stub_cuda_outstanding());
	return stub_cuda_outstanding() == 0;
}

/* Rank 1's windows get a wrong byte each; once the copies are right again, so are they. */
static int finds_spoilt_copies(const struct member *member)
{
	const int spoils = member->rank == 1;
	struct rank rank;
	int right = 0;

	if (!cuda_open_rank(&rank, member))
		return 1;
	if (!verify_says(&rank, LSHARD_OK, ""))
		goto failed;
	stub_cuda_set(STUB_GARBLE, spoils);
	right = verify_says(&rank, spoils ? LSHARD_ERR_CORRUPT : LSHARD_OK, "is not what rank ");
	stub_cuda_set(STUB_GARBLE, 0);
	OK(&rank, lshard_series_update_begin(rank.series)); /* nothing is left of the wrong bytes */
	OK(&rank, lshard_series_update_end(rank.series, cuda_fill_layer, &rank));
	right = right && verify_says(&rank, LSHARD_OK, "") && cuda_one_pass(&rank, LAYERS, rank.streams[0]) &&
		cuda_all_right(&rank, "after verify");
failed:
	return !leaves_nothing(&rank) || !right;
}

static void spoilt_copies_are_found(void **state)
{
	struct setting settings[] = {{.spec = "cuda", .prefetch = 1},
				     {.spec = "cuda", .prefetch = 0, .placement = LSHARD_STRIPED},
				     {.spec = "cuda:ipc", .prefetch = 2, .late = 5}};

	(void)state;
	for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++)
		assert_int_equal(team_of_processes(3, finds_spoilt_copies, &settings[i]), 0);
}

/* The first copy is that of a rank's own shard: its hash is missing on all ranks. */
static int hears_of_a_failed_copy(const struct member *member)
{
	struct rank rank;
	int right = 0;

	if (!cuda_open_rank(&rank, member))
		return 1;
	cuda_all_right(&rank, "before verify");
	if (member->rank == 1)
		stub_cuda_fail("cuMemcpyAsync", 1, CUDA_NO_MEMORY);
	right = verify_says(&rank, LSHARD_ERR_NO_MEMORY, "rank 1") && verify_says(&rank, LSHARD_OK, "");
	return !leaves_nothing(&rank) || !right;
}

static void a_failed_copy_is_told_to_all(void **state)
{
	struct setting setting = {.spec = "cuda", .prefetch = 4}; /* windows for all: only verify copies */

	(void)state;
	assert_int_equal(team_of_processes(3, hears_of_a_failed_copy, &setting), 0);
}

/* The processor would write through an address of the device. */
static int refuses_to_flip(const struct member *member)
{
	const struct setting setting = {.spec = "faults=wait@1=flip,cuda"};
	struct rank rank;

	cuda_set_stub(member, &setting);
	EXPECT(member, cuda_open_group(&rank, member, &setting) == LSHARD_ERR_NOT_SUPPORTED, "%s", rank.error);
	EXPECT(member, strstr(rank.error, "flip is for transports in host memory"), "%s", rank.error);
	return 0;
failed:
	return 1;
}

static void a_flip_is_refused(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, refuses_to_flip, NULL), 0);
}

int main(int count, char **arguments)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(spoilt_copies_are_found),
		cmocka_unit_test(a_failed_copy_is_told_to_all),
		cmocka_unit_test(a_flip_is_refused),
	};

	if (count != 2) {
		fprintf(stderr, "usage: test_cuda_verify PATH-OF-THE-STUB\n");
		return 2;
	}
	setenv("LAYERSHARD_CUDA_SO_PATH", arguments[1], 1);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
