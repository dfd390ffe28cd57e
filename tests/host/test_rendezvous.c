/* SPDX-License-Identifier: Apache-2.0
 *
 * test_rendezvous.c - separately started ranks that find each other by a job's name and gather, and ranks of which some
 * are missing, late, gone or not what the others take them for.
 */
#include "job_ranks.h"
#include "outside.h"
#include "patience.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#define SHORT_MS 1000u

static void processes_find_each_other(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(1, come_and_gather, NULL), 0);
	assert_int_equal(team_of_processes(2, come_and_gather, NULL), 0);
	assert_int_equal(team_of_processes(5, come_and_gather, NULL), 0);
}

static void threads_find_each_other_and_leave_nothing(void **state)
{
	int before = count_fds();
	char job[64];

	(void)state;
	snprintf(job, sizeof job, "test-threads-%ld", (long)getpid());
	assert_int_equal(team_of_threads(3, come_and_gather, job), 0);
	assert_int_equal(count_fds(), before);
	assert_int_equal(contexts_outstanding(), 0);
}

/* More bytes than sockets hold. */
static int gather_much(const struct member *member)
{
	struct job_rank self = {.rendezvous = NULL};
	size_t bytes = 1u << 20;
	unsigned char *all = malloc(bytes * (size_t)member->size);
	unsigned char *mine = malloc(bytes);

	EXPECT(member, all && mine, "no memory");
	memset(mine, member->rank + 1, bytes);
	EXPECT(member, job_rank_open(&self, member), "open");
	EXPECT(member, self.bootstrap.allgather(self.bootstrap.user, mine, all, bytes) == 0, "%s",
	       lshard__rendezvous_error(self.rendezvous)->text);
	for (size_t i = 0; i < bytes * (size_t)member->size; i++)
		EXPECT(member, all[i] == i / bytes + 1, "byte %zu is %d", i, all[i]);
	lshard__rendezvous_close(self.rendezvous);
	free(mine);
	free(all);
	return 0;
failed:
	lshard__rendezvous_close(self.rendezvous);
	free(mine);
	free(all);
	return 1;
}

static void much_is_gathered(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, gather_much, NULL), 0);
}

/* Ranks in two different all-gathers: all hear how much each gives, at once. */
static int gathers_another_size(const struct member *member)
{
	const size_t larger = *(const size_t *)member->user;
	struct job_rank self;
	char mine[64] = "", all[3 * 64];
	char says[64];

	snprintf(says, sizeof says, "gives %zu bytes where rank 0 gives 40", larger);
	EXPECT(member, job_rank_open(&self, member), "open");
	EXPECT(member, self.bootstrap.allgather(self.bootstrap.user, mine, all, member->rank == 1 ? larger : 40) != 0,
	       "gathered");
	EXPECT(member, lshard__rendezvous_failure(self.rendezvous) == LSHARD_ERR_MISMATCH, "%s",
	       lshard__rendezvous_error(self.rendezvous)->text);
	EXPECT(member, strstr(lshard__rendezvous_error(self.rendezvous)->text, says), "%s",
	       lshard__rendezvous_error(self.rendezvous)->text);
	lshard__rendezvous_close(self.rendezvous);
	return 0;
failed:
	lshard__rendezvous_close(self.rendezvous);
	return 1;
}

static void gathers_of_different_sizes_are_told(void **state)
{
	size_t sizes[] = {64, 8};

	(void)state;
	for (int i = 0; i < 2; i++)
		assert_int_equal(team_of_processes(3, gathers_another_size, &sizes[i]), 0);
}

/* A group of five to which ranks 2 and 3 never come: rank 4 is started as the team's third. */
static int some_are_missing(const struct member *member)
{
	static const struct failure expected = {LSHARD_ERR_TIMEOUT, "1000 ms for ranks 2, 3 of job 'test-",
						"of job 'test-"};

	return opens_badly(member, member->rank == 2 ? 4 : member->rank, 5, SHORT_MS, &expected);
}

static void missing_ranks_are_named(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, some_are_missing, NULL), 0);
}

static int root_is_missing(const struct member *member)
{
	static const struct failure expected = {LSHARD_ERR_TIMEOUT, "", "waited 1000 ms for rank 0 of job 'test-"};

	return opens_badly(member, member->rank + 1, 3, SHORT_MS, &expected);
}

static void a_missing_rank_0_is_named(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, root_is_missing, NULL), 0);
}

/* Four start, two of them as rank 1 of a group of five: all are told at once, nobody waits. */
static int two_say_the_same(const struct member *member)
{
	static const struct failure expected = {LSHARD_ERR_MISMATCH, "both say they are rank 1",
						"both say they are rank 1"};

	return opens_badly(member, member->rank == 2 ? 1 : member->rank, 4, LONG_MS, &expected);
}

static void two_with_the_same_rank_are_named(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, two_say_the_same, NULL), 0);
}

static int two_say_zero(const struct member *member)
{
	static const struct failure expected = {LSHARD_ERR_MISMATCH, "both say they are rank 0", ""};

	return opens_badly(member, 0, 3, LONG_MS, &expected);
}

static void two_with_rank_0_are_named(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, two_say_zero, NULL), 0);
}

static int sizes_differ(const struct member *member)
{
	static const struct failure expected = {LSHARD_ERR_MISMATCH, "for 2 ranks, rank 1", "for 2 ranks, rank 1"};

	return opens_badly(member, member->rank, member->rank ? 3 : 2, LONG_MS, &expected);
}

static void different_sizes_are_named(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, sizes_differ, NULL), 0);
}

/* Rank 1 comes when rank 0 has been waiting for long: all is well. Rank 0 comes last: all is well too. */
static int comes_late(const struct member *member)
{
	const int32_t *late = member->user;

	if (member->rank == *late)
		usleep(200000);
	return come_and_gather(member);
}

static void late_ranks_are_waited_for(void **state)
{
	int32_t late;

	(void)state;
	for (late = 0; late < 2; late++)
		assert_int_equal(team_of_processes(3, comes_late, &late), 0);
}

/* Rank 1 dies between two all-gathers: the others see it at once and say so, although their deadline is far. */
static int one_dies(const struct member *member)
{
	struct job_rank self;
	int32_t all[3];
	int failed;

	EXPECT(member, job_rank_open(&self, member), "open");
	EXPECT(member, self.bootstrap.allgather(self.bootstrap.user, &member->rank, all, sizeof all[0]) == 0, "first");
	if (member->rank == 1) {
		team_dies(member);
		raise(SIGKILL);
	}
	failed = self.bootstrap.allgather(self.bootstrap.user, &member->rank, all, sizeof all[0]);
	EXPECT(member, failed == LSHARD_ERR_PEER_FAILED, "%d", failed);
	EXPECT(member, strstr(lshard__rendezvous_error(self.rendezvous)->text, "rank 1 of job") != NULL, "%s",
	       lshard__rendezvous_error(self.rendezvous)->text);
	lshard__rendezvous_close(self.rendezvous);
	return 0;
failed:
	lshard__rendezvous_close(self.rendezvous);
	return 1;
}

static void a_dead_rank_is_seen_at_once(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, one_dies, NULL), 0);
}

/* Which rank dies after all have met, and its child, which has its connections and lives on. */
struct survived {
	int32_t dies;
	pid_t child;
};

static void die_before_the_child(const struct member *member, struct survived *survived)
{
	pid_t forked = fork();

	if (forked == 0) {
		alarm(60);
		pause();
		_exit(0);
	}
	survived->child = forked;
	team_dies(member);
	raise(SIGKILL);
}

static int its_child_lives(const struct member *member)
{
	struct survived *survived = member->user;
	struct job_rank self;
	char name[16];
	int32_t all[3];

	EXPECT(member, job_rank_open(&self, member), "open");
	if (member->rank == survived->dies)
		die_before_the_child(member, survived);
	snprintf(name, sizeof name, "rank %d", (int)survived->dies);
	EXPECT(member, self.bootstrap.allgather(self.bootstrap.user, &member->rank, all, sizeof all[0]) != 0,
	       "it came to an end");
	EXPECT(member, lshard__rendezvous_failure(self.rendezvous) == LSHARD_ERR_PEER_FAILED, "%s",
	       lshard__rendezvous_error(self.rendezvous)->text);
	EXPECT(member, strstr(lshard__rendezvous_error(self.rendezvous)->text, name) != NULL, "%s",
	       lshard__rendezvous_error(self.rendezvous)->text);
	lshard__rendezvous_close(self.rendezvous);
	return 0;
failed:
	lshard__rendezvous_close(self.rendezvous);
	return 1;
}

static void a_dead_rank_is_seen_although_its_child_lives(void **state)
{
	struct survived *survived =
		mmap(NULL, sizeof *survived, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	(void)state;
	assert_true(survived != MAP_FAILED);
	for (survived->dies = 0; survived->dies < 2; survived->dies++) {
		const int failures = team_of_processes(3, its_child_lives, survived);
		const bool lived = survived->child > 0 && kill(survived->child, SIGKILL) == 0;

		assert_int_equal(failures, 0);
		assert_true(lived); /* all the time */
	}
	munmap(survived, sizeof *survived);
}

/* Rank 2 does not come to the all-gather: both others hear its number. */
static int one_stays_away(const struct member *member)
{
	struct job_rank self;
	int32_t all[3];
	int failed;

	EXPECT(member, job_rank_open(&self, member), "open");
	if (member->rank == 0)
		self.context.timeout_ms = SHORT_MS;
	if (member->rank < 2) {
		failed = self.bootstrap.allgather(self.bootstrap.user, &member->rank, all, sizeof all[0]);
		EXPECT(member, failed == LSHARD_ERR_TIMEOUT, "%d", failed);
		EXPECT(member,
		       strstr(lshard__rendezvous_error(self.rendezvous)->text,
			      "rank 0 waited 1000 ms for rank 2 of job"),
		       "%s", lshard__rendezvous_error(self.rendezvous)->text);
	}
	EXPECT(member, team_barrier(member), "another rank failed");
	lshard__rendezvous_close(self.rendezvous);
	return 0;
failed:
	lshard__rendezvous_close(self.rendezvous);
	return 1;
}

static void a_rank_that_stays_away_is_named_to_all(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, one_stays_away, NULL), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(processes_find_each_other),
		cmocka_unit_test(threads_find_each_other_and_leave_nothing),
		cmocka_unit_test(much_is_gathered),
		cmocka_unit_test(gathers_of_different_sizes_are_told),
		cmocka_unit_test(missing_ranks_are_named),
		cmocka_unit_test(a_missing_rank_0_is_named),
		cmocka_unit_test(two_with_the_same_rank_are_named),
		cmocka_unit_test(two_with_rank_0_are_named),
		cmocka_unit_test(different_sizes_are_named),
		cmocka_unit_test(late_ranks_are_waited_for),
		cmocka_unit_test(a_dead_rank_is_seen_at_once),
		cmocka_unit_test(a_dead_rank_is_seen_although_its_child_lives),
		cmocka_unit_test(a_rank_that_stays_away_is_named_to_all),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
