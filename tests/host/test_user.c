/* SPDX-License-Identifier: Apache-2.0
 *
 * test_user.c - user namespaces, in which nobody may be able to tell users apart: who is let in there, and by what.
 */
#include "hello.h"
#include "job_ranks.h"
#include "mesh.h"
#include "outside.h"
#include "patience.h"
#include "sockets.h"
#include "text_hash.h"
#include "user.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#define SHORT_MS 700u

static bool write_text(const char *path, const char *text)
{
	const int fd = open(path, O_WRONLY | O_CLOEXEC);
	const ssize_t written = fd >= 0 ? write(fd, text, strlen(text)) : -1;

	if (fd >= 0)
		close(fd);
	return written == (ssize_t)strlen(text);
}

/* Whom a user namespace maps: nobody, or this user alone, to the superuser or to the overflow user. */
enum map { MAPS_NOBODY, MAPS_TO_ROOT, MAPS_TO_OVERFLOW };

/* Become a process of one. */
static bool enter_namespace(enum map map)
{
	char text[64];

	snprintf(text, sizeof text, "%u %u 1", map == MAPS_TO_ROOT ? 0 : NOBODY, (unsigned)geteuid());
	return unshare(CLONE_NEWUSER) == 0 && (map == MAPS_NOBODY || write_text("/proc/self/uid_map", text));
}

#define SKIPPED 77

/* Run @p body in a child inside such a namespace; 77: there can be none here. */
static int in_namespace(enum map map, int (*body)(void))
{
	int status = -1;
	pid_t child = fork();

	if (child == 0) {
		if (!enter_namespace(map)) {
			printf("skipped: no user namespace: %s\n", strerror(errno));
			fflush(stdout);
			_exit(SKIPPED);
		}
		_exit(body());
	}
	if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status))
		return -1;
	return WEXITSTATUS(status);
}

/* A process of another user that calls itself rank 1 of 2, as soon as somebody listens. */
static pid_t impostor(const char *name)
{
	const struct lshard__hello hello = {lshard__hello_greeting(16), 0, 1, 2};
	pid_t child = fork();
	int fd = -1;

	if (child != 0)
		return child;
	if (setuid(STRANGER) == 0 && prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 &&
	    lshard__socket_connect(name, SOCK_STREAM, lshard__deadline_ns(LONG_MS), &fd) == LSHARD_OK)
		(void)send(fd, &hello, sizeof hello, MSG_NOSIGNAL);
	pause();
	_exit(0);
}

static int nobody_is_found_by_a_name(void)
{
	int failed = 0;

	for (int32_t rank = 0; rank < 2; rank++) {
		const struct member member = {.rank = rank, .size = 2};
		lshard_context context = context_for_member(&member, "", LONG_MS);
		lshard__rendezvous *rendezvous = NULL;
		lshard_bootstrap bootstrap;
		lshard_error error = {""};
		const lshard_status status =
			lshard__rendezvous_open(&context, own_job(), &rendezvous, &bootstrap, &error);

		if (status != LSHARD_ERR_NOT_SUPPORTED ||
		    !strstr(error.text, "is 65534 here, as which its user namespace shows every user") ||
		    !strstr(error.text, VARIABLE) || !strstr(error.text, "bootstrap of your own")) {
			fprintf(stderr, "rank %d: status %d: '%s'\n", (int)rank, (int)status, error.text);
			failed = 1;
		}
	}
	return failed;
}

/* Where all users look alike a stranger was let in as rank 1. */
static void where_users_look_alike_nobody_is_found_by_a_name(void **state)
{
	char name[128];
	pid_t child;
	int result;

	(void)state;
	if (geteuid() != 0) {
		printf("skipped: only root can start a process of another user\n");
		skip();
	}
	snprintf(name, sizeof name, "layershard/%u/%016llx/%s", NOBODY,
		 (unsigned long long)lshard__text_hash(own_job()), own_job());
	child = impostor(name);
	assert_true(child > 0);
	result = in_namespace(MAPS_NOBODY, nobody_is_found_by_a_name);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	if (result == SKIPPED)
		skip();
	assert_int_equal(result, 0);
}

/* Nor where the namespace maps a user to the number of those that it does not map: of that user the same is true. */
static void a_user_that_is_shown_as_the_strangers_are_is_told(void **state)
{
	const int result = in_namespace(MAPS_TO_OVERFLOW, nobody_is_found_by_a_name);

	(void)state;
	if (result == SKIPPED)
		skip();
	assert_int_equal(result, 0);
}

/* In the child of a superuser that maps itself alone, as the first of the users that there are: not this one. */
static int beside_a_superuser_who_is_mapped(int parent)
{
	char byte = setuid(STRANGER) == 0 && unshare(CLONE_NEWUSER) == 0;

	if (send(parent, &byte, 1, 0) != 1 || recv(parent, &byte, 1, 0) != 1 || !byte)
		return SKIPPED;
	return lshard__user_is_told();
}

static bool map_superuser(pid_t child, int channel)
{
	char path[64], byte = 0;

	snprintf(path, sizeof path, "/proc/%ld/uid_map", (long)child);
	if (recv(channel, &byte, 1, 0) == 1 && byte)
		byte = write_text(path, "0 0 1");
	return send(channel, &byte, 1, 0) == 1 && byte;
}

/* A map of the superuser begins as one of all users does. */
static void a_map_of_one_user_is_not_one_of_all(void **state)
{
	int ends[2], result = -1;
	bool mapped;
	pid_t child;

	(void)state;
	if (geteuid() != 0) {
		printf("skipped: only root can map the superuser\n");
		skip();
	}
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
	child = fork();
	if (child == 0)
		_exit(beside_a_superuser_who_is_mapped(ends[1]));
	mapped = map_superuser(child, ends[0]);
	assert_int_equal(waitpid(child, &result, 0), child);
	close(ends[0]);
	close(ends[1]);
	if (!mapped) {
		printf("skipped: no user namespace\n");
		skip();
	}
	assert_int_equal(result, 0);
}

/* All the way to sockets between every two ranks. */
static int connects(const struct member *member)
{
	lshard_bootstrap bootstrap;
	lshard_context context = context_for_member(member, "", LONG_MS);
	lshard__rendezvous *rendezvous = NULL;
	lshard_error error = {""};
	struct mesh mesh = {.peers = NULL};
	int fds[3] = {-1, -1, -1};

	context.bootstrap = &bootstrap;
	EXPECT(member, lshard__rendezvous_open(&context, member->job, &rendezvous, &bootstrap, &error) == LSHARD_OK,
	       "%s", error.text);
	EXPECT(member, mesh_open(&mesh, &context, &error, lshard__deadline_ns(LONG_MS)) == LSHARD_OK, "%s", error.text);
	EXPECT(member, mesh_swap(&mesh, 1, -1, fds, lshard__deadline_ns(LONG_MS)) == LSHARD_OK, "%s", error.text);
	mesh_close(&mesh);
	lshard__rendezvous_close(rendezvous);
	return 0;
failed:
	lshard__rendezvous_close(rendezvous);
	return 1;
}

static int three_connect(void)
{
	return team_of_processes(3, connects, NULL);
}

static void where_users_look_alike_ranks_find_each_other_in_a_directory(void **state)
{
	const struct folder *folder = *state;
	const int result = in_namespace(MAPS_NOBODY, three_connect);

	if (result == SKIPPED)
		skip();
	assert_int_equal(result, 0);
	assert_int_equal(count_files(folder->path), 0);
}

/* Rank 0 of two, to which nobody but the impostor comes. */
static int sends_the_impostor_away(void)
{
	const struct member member = {.rank = 0, .size = 2};
	lshard_context context = context_for_member(&member, "", SHORT_MS);
	lshard__rendezvous *rendezvous = NULL;
	lshard_bootstrap bootstrap;
	lshard_error error = {""};
	const lshard_status status = lshard__rendezvous_open(&context, own_job(), &rendezvous, &bootstrap, &error);

	if (status == LSHARD_ERR_TIMEOUT && strstr(error.text, "for rank 1 of job 'own-"))
		return 0;
	fprintf(stderr, "status %d: '%s'\n", (int)status, error.text);
	return 1;
}

/* A namespace that maps its own user knows it: ranks find each other by name. Who is not mapped is a stranger. */
static void a_user_that_is_mapped_is_found_by_a_name(void **state)
{
	char name[128];
	pid_t child;
	int result = in_namespace(MAPS_TO_ROOT, three_connect);

	(void)state;
	if (result == SKIPPED)
		skip();
	assert_int_equal(result, 0);
	if (geteuid() != 0) {
		printf("skipped: only root can start a process of another user\n");
		return;
	}
	name_of(own_job(), name, sizeof name);
	child = impostor(name);
	assert_true(child > 0);
	result = in_namespace(MAPS_TO_ROOT, sends_the_impostor_away);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	assert_int_equal(result, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(where_users_look_alike_nobody_is_found_by_a_name),
		in_a_folder(where_users_look_alike_ranks_find_each_other_in_a_directory),
		cmocka_unit_test(a_user_that_is_mapped_is_found_by_a_name),
		cmocka_unit_test(a_user_that_is_shown_as_the_strangers_are_is_told),
		cmocka_unit_test(a_map_of_one_user_is_not_one_of_all),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
