/* SPDX-License-Identifier: Apache-2.0
 *
 * test_control_page.c - the page that ranks share comes from another process: it is looked at before it is used, and
 * what is written there later misleads nobody.
 */
#include "control_page.h"
#include "exchanged_words.h"
#include "memfd.h"
#include "outside.h"
#include "shm.h"
#include "sockets.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum forgery {
	SMALL,
	EMPTY,
	HEAD_ALONE,
	SHRINKABLE,
	OF_ANOTHER_BUILD,
	OF_MORE_RANKS,
	OF_LARGER_RECORDS,
	NO_MEMORY_AT_ALL,
	FORGERIES
};

static const char *const forgery_says[FORGERIES] = {
	[SMALL] = "has 8 bytes instead of",
	[EMPTY] = "has 0 bytes instead of",
	[HEAD_ALONE] = "bytes for 2 ranks instead of",
	[SHRINKABLE] = "is not sealed",
	[OF_ANOTHER_BUILD] = "runs version 0.99.0 (messages of",
	[OF_MORE_RANKS] = "for 3 ranks instead of",
	[OF_LARGER_RECORDS] = "give all ranks one build",
	[NO_MEMORY_AT_ALL] = "is not sealed",
};

/* As rank 0 makes it for two ranks, but for what is forged. */
static int forge_page(enum forgery kind)
{
	const size_t bytes = kind == EMPTY        ? 0
			     : kind == SMALL      ? 8
			     : kind == HEAD_ALONE ? sizeof(struct control_block)
						  : control_page_bytes(2);
	const int seals = F_SEAL_GROW | F_SEAL_SEAL | (kind == SHRINKABLE ? 0 : F_SEAL_SHRINK);
	struct control_block head = {.size = kind == OF_MORE_RANKS ? 3 : 2};
	int fd;

	if (kind == NO_MEMORY_AT_ALL)
		return open("/dev/null", O_RDWR | O_CLOEXEC);
	head.greeting = lshard__greeting_make(CONTROL_MAGIC, sizeof head, sizeof(struct control_rank));
	head.greeting.version = kind == OF_ANOTHER_BUILD ? 99u << 8 : head.greeting.version;
	head.greeting.bytes[1] += kind == OF_LARGER_RECORDS ? 1024 : 0;
	fd = lshard__memfd_create("layershard:forged");
	if (fd >= 0 && pwrite(fd, &head, bytes < sizeof head ? bytes : sizeof head, 0) >= 0 &&
	    ftruncate(fd, (off_t)bytes) == 0 && fcntl(fd, F_ADD_SEALS, seals) == 0)
		return fd;
	if (fd >= 0)
		close(fd);
	return -1;
}

/* Rank 0 shares what is no control page: rank 1 says so and lives, and has nothing open. */
static int takes_a_forgery(const struct member *member)
{
	const enum forgery *kind = member->user;
	lshard_bootstrap bootstrap;
	lshard_context context = context_for_member(member, "", LONG_MS);
	const uint64_t deadline = lshard__deadline_ns(LONG_MS);
	lshard__rendezvous *rendezvous = NULL;
	lshard_error error = {""};
	struct control control = {.block = NULL};
	struct mesh mesh = {.peers = NULL};
	int fds[2] = {-1, -1};
	int forged = -1;

	context.bootstrap = &bootstrap;
	EXPECT(member,
	       lshard__rendezvous_open(&context, member->job, &rendezvous, &bootstrap, &error) == LSHARD_OK &&
		       mesh_open(&mesh, &context, &error, deadline) == LSHARD_OK,
	       "%s", error.text);
	if (member->rank == 0) {
		forged = forge_page(*kind);
		EXPECT(member, forged >= 0, "forging");
		EXPECT(member, mesh_swap(&mesh, 0, forged, fds, deadline) == LSHARD_OK, "%s", error.text);
	} else {
		EXPECT(member, control_open(&control, &mesh, &error, deadline) == LSHARD_ERR_MISMATCH, "%s",
		       error.text);
		EXPECT(member, strstr(error.text, forgery_says[*kind]), "'%s' lacks '%s'", error.text,
		       forgery_says[*kind]);
	}
	EXPECT(member, team_barrier(member), "another rank failed");
	if (forged >= 0)
		close(forged);
	mesh_close(&mesh);
	lshard__rendezvous_close(rendezvous);
	return 0;
failed:
	lshard__rendezvous_close(rendezvous);
	return 1;
}

static void a_control_page_is_looked_at_before_it_is_used(void **state)
{
	(void)state;
	for (enum forgery kind = SMALL; kind < FORGERIES; kind++)
		assert_int_equal(team_of_processes(2, takes_a_forgery, &kind), 0);
}

/* A rank that writes where the page says how many ranks there are misleads nobody. */
static int spoils_the_page(const struct member *member)
{
	struct shm_rank rank;
	int32_t all[2] = {-1, -1};
	uint8_t alive[2];

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	if (member->rank == 1)
		((struct shm *)rank.transport)->control.block->size = 100000;
	EXPECT(member, team_barrier(member), "another rank failed");
	EXPECT(member, exchange(&rank, &member->rank, all, sizeof all[0], alive) == LSHARD_OK, "%s",
	       rank.transport->error.text);
	EXPECT(member, alive[0] && alive[1] && all[0] == 0 && all[1] == 1, "%d and %d", (int)all[0], (int)all[1]);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void the_page_does_not_say_how_many_ranks_there_are(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, spoils_the_page, NULL), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_control_page_is_looked_at_before_it_is_used),
		cmocka_unit_test(the_page_does_not_say_how_many_ranks_there_are),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
