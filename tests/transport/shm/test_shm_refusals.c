/* SPDX-License-Identifier: Apache-2.0
 *
 * test_shm_refusals.c - shards that the shm transport cannot or must not take from another rank. Both kinds are made by
 * the system's own means, a limit and a filter of system calls: the library runs as it is.
 */
#include "memfd.h"
#include "shm_ranks.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#define LAYERS 7u

/* Where rank 0 may open nothing more, its own shard and one more fit in, but not both of the others'. */
static int has_no_room(const struct member *member)
{
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};
	struct rlimit before, small;
	int lowest = -1, next = -1;

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	EXPECT(member, getrlimit(RLIMIT_NOFILE, &before) == 0, "getrlimit");
	small = before;
	if (member->rank == 0) {
		lowest = dup(STDERR_FILENO);
		next = dup(STDERR_FILENO);
		small.rlim_cur = (rlim_t)next + 1;
		EXPECT(member, lowest >= 0 && next >= 0 && close(lowest) == 0 && close(next) == 0, "dup");
		EXPECT(member, setrlimit(RLIMIT_NOFILE, &small) == 0, "setrlimit");
	}
	shm_series_plan(&series, member, WHOLE, LAYERS, 1, 0);
	EXPECT(member, shm_series_open(&rank, &series) == LSHARD_ERR_SYSTEM, "%s", rank.transport->error.text);
	EXPECT(member, strstr(rank.transport->error.text, "rank 0: no room for the descriptor that rank "), "%s",
	       rank.transport->error.text);
	EXPECT(member, setrlimit(RLIMIT_NOFILE, &before) == 0, "setrlimit");
	if (member->rank == 0) {
		int again = dup(STDERR_FILENO), after = dup(STDERR_FILENO);

		close(after);
		close(again);
		EXPECT(member, again == lowest && after == next, "a descriptor was left open");
	}
	EXPECT(member, shm_series_open(&rank, &series) == LSHARD_OK, "%s", rank.transport->error.text);
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 1;
}

static void no_room_for_descriptors_is_said(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, has_no_room, NULL), 0);
}

/* From now on this process only seems to seal its files: the kernel says yes and does nothing. */
static int pretend_to_seal(void)
{
	struct sock_filter rules[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (unsigned)offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fcntl, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (unsigned)offsetof(struct seccomp_data, args[1]) +
							   (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? 4u : 0u)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, F_ADD_SEALS, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof rules / sizeof rules[0], rules};

	return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

/* A shard that could shrink would kill its readers: it is not taken. */
static int does_not_seal(const struct member *member)
{
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	EXPECT(member, member->rank == 0 || !pretend_to_seal(), "%s", strerror(errno));
	shm_series_plan(&series, member, WHOLE, LAYERS, 1, 0);
	EXPECT(member, shm_series_open(&rank, &series) == LSHARD_ERR_MISMATCH, "%s", rank.transport->error.text);
	EXPECT(member,
	       strstr(rank.transport->error.text, "rank 1 shares ") && strstr(rank.transport->error.text, "sealed"),
	       "%s", rank.transport->error.text);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 1;
}

static void shards_that_could_shrink_are_refused(void **state)
{
	pid_t child;
	int status = -1;

	(void)state;
	child = fork();
	if (child == 0)
		_exit(pretend_to_seal() != 0);
	assert_int_equal(waitpid(child, &status, 0), child);
	if (status != 0) {
		printf("skipped: this system lets no process filter its system calls\n");
		skip();
	}
	assert_int_equal(team_of_processes(2, does_not_seal, NULL), 0);
}

/* ---- Memory that is never executed ------------------------------------------------------------------------------ */

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008u
#endif
#ifndef F_SEAL_EXEC
#define F_SEAL_EXEC 0x0020
#endif

/* From now on this process's kernel is one that does not know MFD_NOEXEC_SEAL. */
static int be_an_older_kernel(void)
{
	struct sock_filter rules[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (unsigned)offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_memfd_create, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (unsigned)offsetof(struct seccomp_data, args[1]) +
							   (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? 4u : 0u)),
		BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, MFD_NOEXEC_SEAL, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EINVAL),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof rules / sizeof rules[0], rules};

	return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

/* The seals of new memory; -1: there is none. */
static int seals_of_new_memory(void)
{
	const int fd = lshard__memfd_create("layershard:test");
	const int seals = fd >= 0 ? fcntl(fd, F_GET_SEALS) : -1;

	if (fd >= 0)
		close(fd);
	return seals;
}

static void shared_memory_is_never_executable(void **state)
{
	const int probe = memfd_create("probe", MFD_NOEXEC_SEAL);
	pid_t child;
	int status = -1;

	(void)state;
	if (probe >= 0) {
		assert_true(seals_of_new_memory() & F_SEAL_EXEC);
		close(probe);
	} else {
		printf("skipped: this kernel does not know MFD_NOEXEC_SEAL\n");
	}
	child = fork();
	if (child == 0)
		_exit(be_an_older_kernel() ? 77 : seals_of_new_memory() != 0);
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_true(WIFEXITED(status));
	if (WEXITSTATUS(status) == 77)
		printf("skipped: this system lets no process filter its system calls\n");
	else
		assert_int_equal(WEXITSTATUS(status), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(no_room_for_descriptors_is_said),
		cmocka_unit_test(shards_that_could_shrink_are_refused),
		cmocka_unit_test(shared_memory_is_never_executable),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
