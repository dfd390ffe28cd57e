/* SPDX-License-Identifier: Apache-2.0
 *
 * test_numa_copies.c - one copy of the shards a NUMA node, on a feigned machine of two: which memory ranks read, how
 * much there is of it and whose bytes it holds is the kernel's word.
 */
#include "numa_ranks.h"
#include "outside.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

/* ---- One copy a node ------------------------------------------------------------------------------------------- */

static void note(struct rank *rank)
{
	struct noted *noted = rank->wish->noted;
	lshard_stats stats = LSHARD_STATS_INIT;
	const int32_t own = rank->member->rank;
	unsigned mappings;
	char rights[5];

	for (uint32_t layer = 0; layer < rank->wish->layers; layer++)
		noted->inode[own][layer] = inode_at(look_at(rank, layer), rights);
	(void)lshard_series_stats(rank->series, &stats);
	noted->copied[own] = stats.numa_copy_bytes;
	noted->kib[own] = part_of("layershard:near", &mappings);
}

static bool reads_near(const struct noted *noted, uint32_t layer)
{
	const uint64_t (*inode)[LAYERS] = noted->inode;

	return inode[0][layer] && inode[0][layer] == inode[1][layer] && inode[2][layer] == inode[3][layer] &&
	       inode[0][layer] != inode[2][layer];
}

/* In place: ranks of a node read the same memory, those of the other node other memory, and it is there once a node. */
static int has_one_copy_a_node(const struct member *member)
{
	const struct wish *wish = member->user;
	const uint64_t all = wish->layers * wish->layer_bytes;
	struct rank rank = {.member = member, .wish = wish};
	uint64_t copied = 0, kib = 0;
	int failed = 1;

	run_on((uint32_t)member->rank / 2);
	EXPECT(member, enter(&rank), "%s", rank.error);
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	note(&rank);
	EXPECT(member, team_barrier(member), "a rank is gone");
	for (int32_t other = 0; other < RANKS; other++) {
		copied += wish->noted->copied[other];
		kib += wish->noted->kib[other];
	}
	for (uint32_t layer = 0; wish->placement == LSHARD_WHOLE && layer < wish->layers; layer++)
		EXPECT(member, reads_near(wish->noted, layer), "layer %u", layer);
	EXPECT(member, copied == all, "%llu bytes are copied", (unsigned long long)copied);
	/* The kernel rounds what it tells of each mapping. */
	EXPECT(member, kib * 1024 > 2 * all - all / 8 && kib * 1024 < 2 * all + all / 8, "%llu KiB",
	       (unsigned long long)kib);
	SAYS(member, rank.log, member->rank < 2 ? "is copied to node 0, for 0 1" : "is copied to node 1, for 2 3");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

/* Memory that the processes of a test write to. */
static struct noted *note_book(void)
{
	void *book = mmap(NULL, sizeof(struct noted), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	assert_ptr_not_equal(book, MAP_FAILED);
	return book;
}

static void ranks_of_a_node_share_one_copy(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.noted = note_book();
	assert_int_equal(team_of_processes(RANKS, has_one_copy_a_node, &wish), 0);
	wish.placement = LSHARD_STRIPED;
	assert_int_equal(team_of_processes(RANKS, has_one_copy_a_node, &wish), 0);
	munmap(wish.noted, sizeof *wish.noted);
}

/* ---- Right bytes, whatever happens ----------------------------------------------------------------------------- */

/* In place layers begin at a page where their shard does, at a large one where it is as large; copies do too. */
static bool layers_are_aligned(struct rank *rank)
{
	const struct wish *wish = rank->wish;
	const uint64_t large = wish->large_pages == LSHARD_LARGE_PAGES_NEVER ? 0 : lshard__large_page_bytes();
	const uint64_t page = large && wish->layer_bytes >= large ? large : 4096;

	for (uint32_t layer = 0; layer < RANKS && layer < wish->layers && wish->placement == LSHARD_WHOLE; layer++)
		if ((uintptr_t)look_at(rank, layer) % page != 0)
			return false;
	return true;
}

static int reads_what_was_loaded(const struct member *member)
{
	const struct wish *wish = member->user;
	struct rank rank = {.member = member, .wish = wish};
	const int fds = count_fds();
	unsigned mappings;
	int failed = 1;

	run_on(wish->alone ? member->rank > 0 : (uint32_t)member->rank / 2);
	EXPECT(member, enter(&rank), "%s", rank.error);
	EXPECT(member, layers_are_aligned(&rank), "a layer");
	for (int turn = 0; turn < 3; turn++) {
		EXPECT(member, pass_is_right(&rank) && pass_is_right(&rank), "a byte, in turn %d", turn);
		EXPECT(member, lshard_series_verify(rank.series, NULL) == LSHARD_OK, "%s",
		       lshard_series_error(rank.series));
		EXPECT(member, update(&rank) == LSHARD_OK, "%s", lshard_series_error(rank.series));
	}
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	leave(&rank);
	part_of("layershard:near", &mappings);
	EXPECT(member, mappings == 0 && count_fds() == fds, "%u mappings and %d descriptors are left", mappings,
	       count_fds() - fds);
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void copies_hold_the_bytes_also_after_updates(void **state)
{
	struct wish wish = plain;

	(void)state;
	for (int placement = LSHARD_WHOLE; placement <= LSHARD_STRIPED; placement++) {
		wish.placement = (lshard_placement)placement;
		wish.transport = "shm";
		assert_int_equal(team_of_processes(RANKS, reads_what_was_loaded, &wish), 0);
		wish.transport = "throttle=1e12,shm:copy";
		wish.poison = LSHARD_POISON_ON;
		wish.resident_bytes = 2 * LAYER_BYTES;
		assert_int_equal(team_of_processes(RANKS, reads_what_was_loaded, &wish), 0);
		wish.poison = LSHARD_POISON_OFF;
		wish.resident_bytes = 0;
	}
}

/* ---- Whose memory it is ---------------------------------------------------------------------------------------- */

/* Rank 3, which makes the copy of layer 1, has it made writable and writes to it; rank 2 sees that, and may not. */
static int sees_what_is_wrong_with_a_copy(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	lshard_status status;
	unsigned char *bytes;
	int failed = 1;

	run_on((uint32_t)member->rank / 2);
	EXPECT(member, enter(&rank), "%s", rank.error);
	bytes = look_at(&rank, 1);
	EXPECT(member, is_writable(bytes) == (member->rank == 1), "another rank's layer is");
	if (member->rank == 3) {
		EXPECT(member, mprotect(bytes, 4096, PROT_READ | PROT_WRITE) == 0, "mprotect");
		bytes[13 * 8] ^= 1; /* where passes look */
	} else {
		EXPECT(member, mprotect(bytes, 4096, PROT_READ | PROT_WRITE) != 0 || member->rank == 1, "writable");
	}
	EXPECT(member, team_barrier(member), "a rank is gone");
	EXPECT(member, pass_is_right(&rank) == (member->rank < 2), "a byte");
	status = lshard_series_verify(rank.series, NULL);
	EXPECT(member, status == (member->rank < 2 ? LSHARD_OK : LSHARD_ERR_CORRUPT), "%s", lshard_status_name(status));
	if (member->rank >= 2)
		SAYS(member, lshard_series_error(rank.series), "layer 1 is not what rank 1 stores");
	EXPECT(member, update(&rank) == LSHARD_OK, "%s", lshard_series_error(rank.series));
	EXPECT(member, pass_is_right(&rank), "a byte after the update");
	EXPECT(member, is_writable(bytes) == (member->rank == 1), "after the update another rank's layer is");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void verify_looks_at_copies_and_no_program_writes_them(void **state)
{
	struct wish wish = plain;

	(void)state;
	assert_int_equal(team_of_processes(RANKS, sees_what_is_wrong_with_a_copy, &wish), 0);
}

/* Rank 0 has room for what it makes itself and for one descriptor more; nobody waits until the time is up. */
static int has_no_room(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	int room[3] = {-1, -1, -1}, failed = 1;
	struct rlimit before, small;
	struct timespec begin, end;

	run_on((uint32_t)member->rank / 2);
	EXPECT(member, join(&rank, rank.wish->numa) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, getrlimit(RLIMIT_NOFILE, &before) == 0, "getrlimit");
	for (int i = 0; i < 3; i++)
		room[i] = dup(STDERR_FILENO);
	small = before;
	small.rlim_cur = (rlim_t)room[2] + 1;
	for (int i = 0; i < 3; i++)
		EXPECT(member, room[i] >= 0 && close(room[i]) == 0, "dup");
	EXPECT(member, setrlimit(RLIMIT_NOFILE, member->rank == 0 ? &small : &before) == 0, "setrlimit");
	clock_gettime(CLOCK_MONOTONIC, &begin);
	EXPECT(member, open_series(&rank) == LSHARD_ERR_SYSTEM, "%s", lshard_group_error(rank.group));
	clock_gettime(CLOCK_MONOTONIC, &end);
	EXPECT(member, setrlimit(RLIMIT_NOFILE, &before) == 0, "setrlimit");
	SAYS(member, lshard_group_error(rank.group), "no room for the descriptor that rank ");
	EXPECT(member, end.tv_sec - begin.tv_sec < TIMEOUT_MS / 2000, "%d s", (int)(end.tv_sec - begin.tv_sec));
	EXPECT(member, open_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void a_rank_without_room_for_descriptors_keeps_nobody_waiting(void **state)
{
	struct wish wish = plain;

	(void)state;
	assert_int_equal(team_of_processes(RANKS, has_no_room, &wish), 0);
}

/* Fewer layers than ranks, and a node whose ranks store none. */
static void ranks_that_store_nothing_keep_copies(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.layers = 2;
	assert_int_equal(team_of_processes(RANKS, reads_what_was_loaded, &wish), 0);
}

/* What three ranks store lies one behind the other in what the fourth copies, and is of no whole pages. */
static void a_rank_that_is_alone_copies_all_shards_of_others(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.alone = true;
	for (int large = 0; large < 2; large++) {
		wish.large_pages = large ? LSHARD_LARGE_PAGES_AUTO : LSHARD_LARGE_PAGES_NEVER;
		wish.layer_bytes = (large ? UINT64_C(2) << 20 : LAYER_BYTES) + 100;
		wish.placement = LSHARD_WHOLE;
		assert_int_equal(team_of_processes(RANKS, reads_what_was_loaded, &wish), 0);
		wish.placement = LSHARD_STRIPED;
		assert_int_equal(team_of_processes(RANKS, reads_what_was_loaded, &wish), 0);
	}
}

static void copies_are_in_large_pages_too(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.large_pages = LSHARD_LARGE_PAGES_AUTO;
	wish.layer_bytes = UINT64_C(3) << 20;
	wish.layers = 5;
	assert_int_equal(team_of_processes(RANKS, reads_what_was_loaded, &wish), 0);
}

/* 128 MiB of series, and a shard of 32: more than half a second. */
static int waits_for_copies(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	int failed = 1;

	run_on((uint32_t)member->rank / 2);
	EXPECT(member, enter(&rank), "%s", rank.error);
	EXPECT(member, machine.waits_ns > (TIMEOUT_MS + 300) * UINT64_C(1000000), "%llu ns",
	       (unsigned long long)machine.waits_ns);
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void ranks_wait_longer_for_large_copies(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.layer_bytes = UINT64_C(16) << 20;
	wish.layers = 8;
	assert_int_equal(team_of_processes(RANKS, waits_for_copies, &wish), 0);
}

/* ---- Ranks that die -------------------------------------------------------------------------------------------- */

static int outlives_another(const struct member *member)
{
	const struct wish *wish = member->user;
	struct rank rank = {.member = member, .wish = wish};
	const int32_t dead = wish->dies >= 0 ? wish->dies : wish->dies_late;
	char named[32];
	int failed = 1;

	run_on((uint32_t)member->rank / 2);
	EXPECT(member, enter(&rank), "%s", rank.error);
	EXPECT(member, team_barrier(member), "a rank is gone");
	if (member->rank == dead)
		team_dies(member);
	if (member->rank == wish->dies)
		raise(SIGKILL);
	machine.dies_copying = member->rank == wish->dies_late;
	EXPECT(member, pass_is_right(&rank) && pass_is_right(&rank), "a byte");
	snprintf(named, sizeof named, "rank %d is gone", (int)dead);
	EXPECT(member, update(&rank) == LSHARD_ERR_PEER_FAILED, "%s", lshard_series_error(rank.series));
	SAYS(member, lshard_series_error(rank.series), named);
	if (wish->dies >= 0) /* before anything was written */
		EXPECT(member, pass_is_right(&rank), "a byte after the refused update");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void readers_outlive_sources_and_makers_of_copies(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.dies = 0; /* a source, and it has copied for its node */
	assert_int_equal(team_of_processes(RANKS, outlives_another, &wish), 0);
	wish.layers = 2;
	wish.dies = 3; /* stores nothing: without copies the update would do without it */
	assert_int_equal(team_of_processes(RANKS, outlives_another, &wish), 0);
}

static void a_rank_that_dies_while_it_copies_is_named(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.layers = 2;
	wish.dies_late = 3;
	assert_int_equal(team_of_processes(RANKS, outlives_another, &wish), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(ranks_of_a_node_share_one_copy),
		cmocka_unit_test(copies_hold_the_bytes_also_after_updates),
		cmocka_unit_test(verify_looks_at_copies_and_no_program_writes_them),
		cmocka_unit_test(a_rank_without_room_for_descriptors_keeps_nobody_waiting),
		cmocka_unit_test(ranks_that_store_nothing_keep_copies),
		cmocka_unit_test(a_rank_that_is_alone_copies_all_shards_of_others),
		cmocka_unit_test(copies_are_in_large_pages_too),
		cmocka_unit_test(ranks_wait_longer_for_large_copies),
		cmocka_unit_test(readers_outlive_sources_and_makers_of_copies),
		cmocka_unit_test(a_rank_that_dies_while_it_copies_is_named),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
