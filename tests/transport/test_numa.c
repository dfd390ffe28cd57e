/* SPDX-License-Identifier: Apache-2.0
 *
 * test_numa.c - on which NUMA nodes memory is asked for, on a feigned machine of two. Which node a page is on nobody
 * sees here. test_numa_copies.c: one copy a node.
 */
#include "numa.h"
#include "numa_ranks.h"
#include "outside.h"

#include <layershard/plan.h>
#include <layershard/transport.h>

#include <linux/mempolicy.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cmocka.h>

/* ---- Where memory is asked for --------------------------------------------------------------------------------- */

static int asks_for_its_node(const struct member *member)
{
	const struct wish *wish = member->user;
	const int mode = wish->numa == LSHARD_NUMA_INTERLEAVE ? MPOL_INTERLEAVE : MPOL_PREFERRED;
	const unsigned long nodes = wish->numa == LSHARD_NUMA_INTERLEAVE ? 3 : 1ul << member->rank / 2;
	const unsigned shared = wish->numa == LSHARD_NUMA_COPY ? 2 : 1; /* shards, and copies */
	struct rank rank = {.member = member, .wish = wish};
	int failed = 1;

	run_on((uint32_t)member->rank / 2);
	EXPECT(member, enter(&rank), "%s", rank.error);
	EXPECT(member, machine.n_placed == shared, "%u calls", machine.n_placed);
	for (unsigned i = 0; i < machine.n_placed; i++) {
		const struct placed *placed = &machine.placed[i];

		EXPECT(member, placed->mode == mode && placed->nodes == nodes, "%d %lu", placed->mode, placed->nodes);
		EXPECT(member, placed->pages_there == 0, "%llu pages", (unsigned long long)placed->pages_there);
		EXPECT(member, placed->bytes >= wish->layer_bytes, "%llu", (unsigned long long)placed->bytes);
	}
	EXPECT(member, pass_is_right(&rank), "a byte");
	SAYS(member, rank.log, member->rank < 2 ? "runs on node 0; it may use 2 nodes" : "runs on node 1");
	EXPECT(member, !strstr(rank.log, "lie where"), "%s", rank.log);
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void nodes_are_asked_for_before_any_page_is_there(void **state)
{
	static const lshard_numa all[] = {LSHARD_NUMA_INTERLEAVE, LSHARD_NUMA_SOURCE, LSHARD_NUMA_COPY};
	struct wish wish = plain;

	(void)state;
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
		wish.numa = all[i];
		wish.transport = "shm:copy";
		wish.large_pages = LSHARD_LARGE_PAGES_NEVER;
		wish.layer_bytes = LAYER_BYTES;
		assert_int_equal(team_of_processes(RANKS, asks_for_its_node, &wish), 0);
		wish.transport = "shm";
		wish.large_pages = LSHARD_LARGE_PAGES_AUTO;
		wish.layer_bytes = UINT64_C(4) << 20;
		assert_int_equal(team_of_processes(RANKS, asks_for_its_node, &wish), 0);
	}
}

/* The system makes reserved pages by the policy of the thread that asks for them, which then has its own again. */
static int asks_for_reserved_pages(const struct member *member)
{
	const struct wish *wish = member->user;
	struct rank rank = {.member = member, .wish = wish};
	int failed = 1;

	run_on((uint32_t)member->rank);
	machine.reserves = true;
	EXPECT(member, enter(&rank), "%s", rank.error);
	EXPECT(member, machine.filled_by == (wish->numa == LSHARD_NUMA_INTERLEAVE ? MPOL_INTERLEAVE : MPOL_PREFERRED),
	       "%d", machine.filled_by);
	EXPECT(member, machine.policy == MPOL_LOCAL, "%d", machine.policy);
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void reserved_pages_are_asked_for_by_node(void **state)
{
	struct wish wish = plain;

	(void)state;
	if (lshard__large_page_bytes() != UINT64_C(2) << 20) {
		printf("skipped: this system has no pages of 2 MiB\n");
		return;
	}
	wish.large_pages = LSHARD_LARGE_PAGES_AUTO;
	wish.layer_bytes = UINT64_C(2) << 20;
	wish.numa = LSHARD_NUMA_COPY;
	assert_int_equal(team_of_processes(2, asks_for_reserved_pages, &wish), 0);
	wish.numa = LSHARD_NUMA_INTERLEAVE;
	assert_int_equal(team_of_processes(2, asks_for_reserved_pages, &wish), 0);
}

/* The thread that fills windows may run on another node than the one that creates the series. */
static int touches_its_windows(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	lshard_stats stats = LSHARD_STATS_INIT;
	unsigned mappings;
	uint64_t kib;
	int failed = 1;

	run_on((uint32_t)member->rank / 2);
	EXPECT(member, join(&rank, rank.wish->numa) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, create_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	kib = part_of("layershard:near:windows", &mappings);
	(void)lshard_series_stats(rank.series, &stats);
	EXPECT(member, mappings > 0 && kib * 1024 == stats.window_bytes + stats.resident_bytes, "%llu KiB",
	       (unsigned long long)kib);
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void windows_come_on_the_node_of_who_creates_them(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.transport = "shm:copy";
	wish.numa = LSHARD_NUMA_SOURCE;
	wish.resident_bytes = 2 * LAYER_BYTES;
	assert_int_equal(team_of_processes(RANKS, touches_its_windows, &wish), 0);
}

/* All memory of a node without any comes on the one where the others are. */
static int has_no_memory_near(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	lshard_stats stats = LSHARD_STATS_INIT;
	int failed = 1;

	run_on(member->rank < 2 ? 1 : 5);
	EXPECT(member, enter(&rank), "%s", rank.error);
	(void)lshard_series_stats(rank.series, &stats);
	EXPECT(member, stats.numa_copy_bytes == 0, "%llu bytes", (unsigned long long)stats.numa_copy_bytes);
	EXPECT(member, machine.n_placed == 1 && machine.placed[0].nodes == 2, "%lu", machine.placed[0].nodes);
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void nothing_is_copied_to_a_node_without_memory(void **state)
{
	struct wish wish = plain;

	(void)state;
	assert_int_equal(team_of_processes(RANKS, has_no_memory_near, &wish), 0);
}

static int asks_for_nothing(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	int failed = 1;

	run_on((uint32_t)member->rank);
	EXPECT(member, enter(&rank), "%s", rank.error);
	EXPECT(member, machine.n_placed == 0 && machine.policies == 0, "%u calls", machine.n_placed);
	SAYS(member, rank.log, "numa none: rank");
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void nothing_is_placed_unasked(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.numa = LSHARD_NUMA_AUTO;
	assert_int_equal(team_of_processes(2, asks_for_nothing, &wish), 0);
}

/* ---- What cannot be had ---------------------------------------------------------------------------------------- */

/* Ranks of the second node may still look where pages are. */
static int may_not_place(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	int failed = 1;

	run_on((uint32_t)member->rank / 2);
	machine.forbidden = true;
	machine.full_of = (uint32_t)member->rank / 2;
	EXPECT(member, enter(&rank), "%s", rank.error);
	SAYS(member, rank.log, "mbind of the shard: Operation not permitted (a container may forbid it");
	EXPECT(member, !strstr(strstr(rank.log, "mbind of") + 1, "mbind of"), "told twice: %s", rank.log);
	EXPECT(member, !strstr(rank.log, "lie where"), "told in other words: %s", rank.log);
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void a_container_that_forbids_it_is_told_and_survived(void **state)
{
	static const lshard_numa all[] = {LSHARD_NUMA_INTERLEAVE, LSHARD_NUMA_SOURCE, LSHARD_NUMA_COPY};
	struct wish wish = plain;

	(void)state;
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
		wish.numa = all[i];
		assert_int_equal(team_of_processes(RANKS, may_not_place, &wish), 0);
	}
}

static int finds_its_node_full(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	int failed = 1;

	run_on(1);
	machine.full_of = 1;
	EXPECT(member, enter(&rank), "%s", rank.error);
	SAYS(member, rank.log, "where they should, others on node 0: a node is full");
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void a_node_without_memory_is_told(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.numa = LSHARD_NUMA_SOURCE;
	assert_int_equal(team_of_processes(2, finds_its_node_full, &wish), 0);
	wish.numa = LSHARD_NUMA_INTERLEAVE;
	assert_int_equal(team_of_processes(2, finds_its_node_full, &wish), 0);
}

static int is_on_one_node(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	int failed = 1;

	machine = (struct machine){.nodes = 1};
	EXPECT(member, enter(&rank), "%s", rank.error);
	SAYS(member, rank.log, "numa copy: rank");
	SAYS(member, rank.log, "may use one node, where all its memory comes");
	EXPECT(member, machine.n_placed == 0, "%u calls", machine.n_placed);
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void one_node_has_nothing_to_place(void **state)
{
	struct wish wish = plain;

	(void)state;
	assert_int_equal(team_of_processes(2, is_on_one_node, &wish), 0);
}

/* ---- What ranks and the environment say ------------------------------------------------------------------------ */

static int disagrees(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	const lshard_status status = join(&rank, member->rank == 0 ? LSHARD_NUMA_NONE : LSHARD_NUMA_COPY);

	EXPECT(member, status == LSHARD_ERR_MISMATCH, "%s", lshard_status_name(status));
	SAYS(member, rank.error, "rank 0 has none for numa, rank 1 copy");
	return 0;
failed:
	leave(&rank);
	return 1;
}

static int is_refused(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	const lshard_status status = join(&rank, rank.wish->numa);

	EXPECT(member, status == LSHARD_ERR_NOT_SUPPORTED, "%s", lshard_status_name(status));
	SAYS(member, rank.error, "the transport local places nothing on nodes: take shm");
	return 0;
failed:
	leave(&rank);
	return 1;
}

static void ranks_that_want_different_things_are_named(void **state)
{
	struct wish wish = plain;

	(void)state;
	assert_int_equal(team_of_processes(2, disagrees, &wish), 0);
}

static void threads_are_refused_what_only_shm_does(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.transport = "local";
	assert_int_equal(team_of_threads(2, is_refused, &wish), 0);
	wish.numa = LSHARD_NUMA_INTERLEAVE;
	assert_int_equal(team_of_threads(1, is_refused, &wish), 0);
}

static void the_environment_is_read_where_the_options_leave_it(void **state)
{
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;
	lshard_group *group = NULL;
	char error[256] = "";

	(void)state;
	options.rank = 0;
	options.size = 1;
	options.error = error;
	options.error_bytes = sizeof error;
	setenv("LAYERSHARD_NUMA", "interleave, source", 1);
	assert_int_equal(lshard_group_create(&options, &group), LSHARD_ERR_INVALID);
	assert_non_null(strstr(error, "LAYERSHARD_NUMA='interleave, source' is none of none, interleave, source"));
	setenv("LAYERSHARD_NUMA", "interleave", 1);
	options.transport = "local";
	assert_int_equal(lshard_group_create(&options, &group), LSHARD_ERR_NOT_SUPPORTED);
	options.numa = LSHARD_NUMA_COPY; /* of one rank: nothing is to be done */
	assert_int_equal(lshard_group_create(&options, &group), LSHARD_OK);
	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
	options.numa = (lshard_numa)5;
	assert_int_equal(lshard_group_create(&options, &group), LSHARD_ERR_INVALID);
	unsetenv("LAYERSHARD_NUMA");
}

/* ---- Nodes ----------------------------------------------------------------------------------------------------- */

static void nodes_are_told_as_the_system_has_them(void **state)
{
	lshard_node node = LSHARD_NODE_INIT;

	(void)state;
	run_on(1);
	assert_int_equal(lshard_node_info(1, &node), LSHARD_OK);
	assert_int_equal(node.number, 1);
	assert_true(node.usable && node.here);
	assert_int_equal(node.memory_bytes, 2048 * 1024);
	assert_int_equal(node.free_bytes, 1024 * 1024);
	assert_string_equal(node.processors, "2-3");
	assert_int_equal(lshard_node_info(2, &node), LSHARD_OK);
	assert_int_equal(node.number, 5);
	assert_false(node.usable || node.here);
	assert_int_equal(lshard_node_info(3, &node), LSHARD_ERR_RANGE);
	assert_int_equal(numa_home(), 1);
	run_on(5);
	assert_int_equal(numa_home(), 1); /* 17 away, and the first 32 */
	machine.nodes = 0;
}

/* ---- The machine as it is -------------------------------------------------------------------------------------- */

static void count_lines(const lshard_context *context, lshard_log_level level, const char *format, ...)
{
	(void)level;
	++*(int *)context->group;
	printf("told: %s\n", format);
}

static bool may_place(void)
{
	unsigned long first = 1;
	void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const bool may =
		page != MAP_FAILED && !__real_syscall(SYS_mbind, page, 4096ul, MPOL_PREFERRED, &first, 64ul, 0);

	munmap(page, 4096);
	return may;
}

/* The real calls on its first node: their arguments are as it takes them, and the thread's own policy comes back. */
static void the_system_takes_what_it_is_asked(void **state)
{
	const uint64_t bytes = UINT64_C(4) << 20;
	struct numa_wish wishes[2] = {{.where = NUMA_ON_NODE}, {.where = NUMA_INTERLEAVED}};
	int lines = 0, before = -1, within = -1, after = -1;
	lshard_context context = {.log = count_lines, .group = &lines, .numa = LSHARD_NUMA_SOURCE};
	struct numa_policy kept;

	(void)state;
	if (!may_place()) {
		printf("skipped: this process may not call mbind\n");
		return;
	}
	numa_add(&wishes[1].nodes, 0);
	for (int i = 0; i < 2; i++) {
		const struct numa_use use = {&context, "near", "shard", &wishes[i]};
		void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

		numa_bind(&use, memory, bytes);
		assert_int_equal(count_pages(memory, bytes), 0);
		numa_settle(&use, memory, bytes);
		assert_int_equal(count_pages(memory, bytes), bytes / 4096);
		assert_int_equal(lines, 0);
		munmap(memory, bytes);
		syscall(SYS_get_mempolicy, &before, NULL, 0ul, NULL, 0);
		numa_policy_begin(&wishes[i], &kept);
		syscall(SYS_get_mempolicy, &within, NULL, 0ul, NULL, 0);
		numa_policy_end(&kept);
		syscall(SYS_get_mempolicy, &after, NULL, 0ul, NULL, 0);
		assert_int_equal(within, i == 0 ? MPOL_PREFERRED : MPOL_INTERLEAVE);
		assert_int_equal(after, before);
	}
}

/* A large page made of one small one is where that is: nodes take turns by small pages. */
static void large_pages_take_turns(void **state)
{
	(void)state;
	for (uint32_t turns = 1; turns <= 9; turns++)
		for (uint64_t number = 0; number < 40; number++) {
			const uint64_t turn = numa_turn(number, 512, turns);

			assert_in_range(turn, 0, turns - 1);
			assert_int_equal((number * 512 + turn) % turns, number % turns);
		}
	assert_int_equal(numa_turn(7, 4, 8), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(nodes_are_asked_for_before_any_page_is_there),
		cmocka_unit_test(reserved_pages_are_asked_for_by_node),
		cmocka_unit_test(windows_come_on_the_node_of_who_creates_them),
		cmocka_unit_test(nothing_is_copied_to_a_node_without_memory),
		cmocka_unit_test(nothing_is_placed_unasked),
		cmocka_unit_test(a_container_that_forbids_it_is_told_and_survived),
		cmocka_unit_test(a_node_without_memory_is_told),
		cmocka_unit_test(one_node_has_nothing_to_place),
		cmocka_unit_test(ranks_that_want_different_things_are_named),
		cmocka_unit_test(threads_are_refused_what_only_shm_does),
		cmocka_unit_test(the_environment_is_read_where_the_options_leave_it),
		cmocka_unit_test(nodes_are_told_as_the_system_has_them),
		cmocka_unit_test(the_system_takes_what_it_is_asked),
		cmocka_unit_test(large_pages_take_turns),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
