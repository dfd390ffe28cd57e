/* SPDX-License-Identifier: Apache-2.0
 *
 * test_rendezvous_place.c - a directory in which the ranks of a job find each other: whose it has to be, and who
 * listens there where several would.
 */
#include "job_ranks.h"
#include "outside.h"
#include "patience.h"
#include "rendezvous_place.h"
#include "sockets.h"
#include "text_hash.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#define SHORT_MS 700u

/* ---- A directory ------------------------------------------------------------------------------------------------- */

static void ranks_find_each_other_in_a_directory_and_leave_it_empty(void **state)
{
	const struct folder *folder = *state;

	assert_int_equal(team_of_processes(1, gather_once, NULL), 0);
	assert_int_equal(team_of_processes(4, gather_once, NULL), 0);
	assert_int_equal(team_of_threads(3, gather_once, NULL), 0);
	assert_int_equal(count_files(folder->path), 0);
	assert_int_equal(contexts_outstanding(), 0);
}

/* Longer than an address of a socket can be. */
static void the_path_may_be_long(void **state)
{
	struct folder *folder = *state;
	char deep[sizeof folder->path + 200];

	snprintf(deep, sizeof deep, "%s/%0150d", folder->path, 7);
	assert_int_equal(mkdir(deep, 0700), 0);
	assert_int_equal(setenv(VARIABLE, deep, 1), 0);
	assert_int_equal(team_of_processes(2, gather_once, NULL), 0);
	assert_int_equal(count_files(deep), 0);
}

/* Rank 0 listens until it is killed. Its socket stays. */
static pid_t lone_root(const char *job, const char *path)
{
	pid_t child = fork();

	if (child == 0) {
		struct member member = {.rank = 0, .size = 2};
		lshard_context context = context_for_member(&member, "", LONG_MS);
		lshard__rendezvous *rendezvous;
		lshard_bootstrap bootstrap;

		(void)lshard__rendezvous_open(&context, job, &rendezvous, &bootstrap, NULL);
		_exit(1);
	}
	for (int tries = 0; child > 0 && tries < 10000 && count_files(path) < 1; tries++)
		usleep(1000);
	return child;
}

static void what_a_killed_rank_left_is_replaced(void **state)
{
	const struct folder *folder = *state;
	char job[] = "killed";
	pid_t child = lone_root(job, folder->path);

	assert_true(child > 0);
	assert_int_equal(count_files(folder->path), 1);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	assert_int_equal(count_files(folder->path), 1);
	assert_int_equal(team_of_processes(3, gather_as_left, job), 0);
	assert_int_equal(count_files(folder->path), 0);
}

/* Many groups of one name, one after another and some at once: whoever is rank 0 second hears of the first. */
static int is_a_second_root(const struct member *member)
{
	lshard_context context = context_for_member(member, "", SHORT_MS);
	lshard__rendezvous *rendezvous = NULL;
	lshard_bootstrap bootstrap;
	lshard_error error = {""};
	lshard_status status;

	context.rank = 0;
	status = lshard__rendezvous_open(&context, member->job, &rendezvous, &bootstrap, &error);
	EXPECT(member, status == LSHARD_ERR_MISMATCH && strstr(error.text, "both say they are rank 0"), "%s",
	       error.text);
	return 0;
failed:
	lshard__rendezvous_close(rendezvous);
	return 1;
}

static void two_with_rank_0_are_named_there_too(void **state)
{
	const struct folder *folder = *state;

	assert_int_equal(team_of_processes(2, is_a_second_root, NULL), 0);
	assert_int_equal(count_files(folder->path), 0);
}

/* Rank 1 was started without the variable: both say what to look at. */
static int disagrees(const struct member *member)
{
	lshard_context context = context_for_member(member, "", SHORT_MS);
	lshard__rendezvous *rendezvous = NULL;
	lshard_bootstrap bootstrap;
	lshard_error error = {""};
	lshard_status status;

	if (member->rank == 1)
		unsetenv(VARIABLE);
	status = lshard__rendezvous_open(&context, member->job, &rendezvous, &bootstrap, &error);
	EXPECT(member, status == LSHARD_ERR_TIMEOUT, "status %d: %s", (int)status, error.text);
	EXPECT(member,
	       strstr(error.text,
		      member->rank ? "none of them " VARIABLE "?" : "in " VARIABLE "='/tmp/layershard-job-"),
	       "%s", error.text);
	return 0;
failed:
	lshard__rendezvous_close(rendezvous);
	return 1;
}

static void ranks_that_disagree_are_told_what_to_look_at(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, disagrees, NULL), 0);
}

static void refuses(const char *path, const char *says)
{
	const struct member member = {.rank = 0, .size = 2};
	lshard_context context = context_for_member(&member, "", SHORT_MS);
	lshard__rendezvous *rendezvous = NULL;
	lshard_bootstrap bootstrap;
	lshard_error error = {""};

	assert_int_equal(setenv(VARIABLE, path, 1), 0);
	assert_int_equal(lshard__rendezvous_open(&context, "job", &rendezvous, &bootstrap, &error), LSHARD_ERR_INVALID);
	if (!strstr(error.text, says) || !strstr(error.text, path) || !strstr(error.text, "mode 0700"))
		fail_msg("'%s' lacks '%s'", error.text, says);
}

static void directories_that_others_can_enter_are_refused(void **state)
{
	const struct folder *folder = *state;
	char path[300];
	int fd;

	refuses("folder", "does not begin with '/'");
	snprintf(path, sizeof path, "%s/none", folder->path);
	refuses(path, "No such file");
	snprintf(path, sizeof path, "%s/file", folder->path);
	fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0700);
	assert_true(fd >= 0);
	close(fd);
	refuses(path, "Not a directory");
	snprintf(path, sizeof path, "%s/link", folder->path);
	assert_int_equal(symlink(folder->path, path), 0);
	refuses(path, "symbolic link");
	strcat(path, "/");
	refuses(path, "symbolic link");
	assert_int_equal(chmod(folder->path, 0710), 0);
	refuses(folder->path, "mode is 0710");
	assert_int_equal(chmod(folder->path, 0701), 0);
	refuses(folder->path, "mode is 0701");
	if (geteuid() != 0) {
		printf("skipped: only root can give a directory away\n");
		return;
	}
	assert_int_equal(chmod(folder->path, 0700), 0);
	assert_int_equal(chown(folder->path, STRANGER, STRANGER), 0);
	refuses(folder->path, "belongs to user 54321, not to user 0");
}

/* The directory is as it should be, and no other is asked for. */
static void a_limit_is_not_taken_for_an_unfit_directory(void **state)
{
	struct rlimit before, none;
	struct lshard__place place;
	lshard_error error = {""};
	lshard_status status;

	(void)state;
	assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
	none = (struct rlimit){.rlim_cur = 0, .rlim_max = before.rlim_max};
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
	status = lshard__place_open(&place, "job", &error);
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
	if (status != LSHARD_ERR_SYSTEM || !strstr(error.text, "RLIMIT_NOFILE") || strstr(error.text, "0700"))
		fail_msg("status %d: '%s'", (int)status, error.text);
}

/* Nothing is removed that is no socket of a rank. */
static void what_is_no_socket_stays(void **state)
{
	const struct folder *folder = *state;
	const struct member member = {.rank = 0, .size = 2};
	lshard_context context = context_for_member(&member, "", SHORT_MS);
	lshard__rendezvous *rendezvous = NULL;
	lshard_bootstrap bootstrap;
	lshard_error error = {""};
	char path[300];
	int fd;

	snprintf(path, sizeof path, "%s/layershard-%016llx", folder->path,
		 (unsigned long long)lshard__text_hash("job"));
	fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
	assert_true(fd >= 0);
	close(fd);
	assert_int_equal(lshard__rendezvous_open(&context, "job", &rendezvous, &bootstrap, &error), LSHARD_ERR_SYSTEM);
	assert_non_null(strstr(error.text, path));
	assert_non_null(strstr(error.text, "is no socket"));
	assert_int_equal(access(path, F_OK), 0);
}

/* Not a limit's fault. */
static void who_keeps_the_lock_is_to_blame(void **state)
{
	const struct folder *folder = *state;
	const struct member member = {.rank = 0, .size = 2};
	lshard_context context = context_for_member(&member, "", SHORT_MS);
	lshard__rendezvous *rendezvous = NULL;
	lshard_bootstrap bootstrap;
	lshard_error error = {""};
	const int fd = open(folder->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	assert_true(fd >= 0 && flock(fd, LOCK_EX) == 0);
	assert_int_equal(lshard__rendezvous_open(&context, "job", &rendezvous, &bootstrap, &error), LSHARD_ERR_SYSTEM);
	close(fd);
	assert_non_null(strstr(error.text, "holds the lock (flock) of " VARIABLE));
	assert_non_null(strstr(error.text, folder->path));
	assert_null(strstr(error.text, "RLIMIT"));
}

/* ---- Who listens in a directory ---------------------------------------------------------------------------------- */

/* Happens once, where somebody is about to remove a file: the linker leads the library's calls here. */
static void (*before_removal)(void);

int __real_unlinkat(int directory, const char *path, int flags);
int __wrap_unlinkat(int directory, const char *path, int flags);

int __wrap_unlinkat(int directory, const char *path, int flags)
{
	void (*const happen)(void) = before_removal;

	before_removal = NULL;
	if (happen)
		happen();
	return __real_unlinkat(directory, path, flags);
}

/* Does who comes to the place come to @p listener? */
static bool leads_to(const struct lshard__place *place, int listener)
{
	int comer = -1, taken = -1;
	const bool came = lshard__socket_connect(place->name, SOCK_STREAM, lshard__now_ns(), &comer) == LSHARD_OK;

	if (came) {
		taken = lshard__socket_accept(listener);
		close(comer);
	}
	if (taken >= 0)
		close(taken);
	return taken >= 0;
}

/* The second of two that find what a killed rank left, in the middle of the first one's removal of it. */
static struct latecomer {
	struct lshard__place place;
	int listener;
	int failed;
} latecomer;

static void come_second(void)
{
	latecomer.listener = lshard__place_listen(&latecomer.place, lshard__now_ns());
	latecomer.failed = errno;
}

static void two_that_replace_what_is_left_do_not_both_listen(void **state)
{
	struct lshard__place first;
	int listener;

	(void)state;
	open_place(&first, true);
	open_place(&latecomer.place, false);
	before_removal = come_second;
	listener = lshard__place_listen(&first, lshard__deadline_ns(LONG_MS));
	assert_null(before_removal);
	assert_int_equal(latecomer.listener, -1);
	assert_int_equal(latecomer.failed, EWOULDBLOCK);
	assert_true(leads_to(&first, listener));
	lshard__place_leave(&first);
	close(listener);
	lshard__place_close(&first);
	lshard__place_close(&latecomer.place);
}

/* Somebody has removed the socket by hand, and another rank 0 listens there now. */
static void who_leaves_removes_no_other_ranks_socket(void **state)
{
	struct lshard__place first, other;
	int listeners[2];

	(void)state;
	open_place(&first, false);
	open_place(&other, false);
	listeners[0] = lshard__place_listen(&first, lshard__deadline_ns(LONG_MS));
	assert_int_equal(unlink(first.name), 0);
	listeners[1] = lshard__place_listen(&other, lshard__deadline_ns(LONG_MS));
	assert_true(listeners[0] >= 0 && listeners[1] >= 0);
	lshard__place_leave(&first);
	close(listeners[0]);
	assert_true(leads_to(&other, listeners[1]));
	lshard__place_leave(&other);
	close(listeners[1]);
	assert_int_equal(access(other.name, F_OK), -1);
	lshard__place_close(&first);
	lshard__place_close(&other);
}

/* Between the removal of a dead rank's socket and the next one nobody is not yet nobody. */
static void who_is_replacing_what_is_left_is_waited_for(void **state)
{
	const struct folder *folder = *state;
	const int directory = open(folder->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	struct lshard__place place;
	lshard_error error = {""};

	assert_int_equal(lshard__place_open(&place, "replaced", &error), LSHARD_OK);
	assert_int_equal(flock(directory, LOCK_EX), 0);
	assert_int_equal(lshard__place_look(&place, lshard__deadline_ns(50)), LSHARD__SOMEBODY);
	assert_int_equal(flock(directory, LOCK_UN), 0);
	assert_int_equal(lshard__place_look(&place, lshard__deadline_ns(LONG_MS)), LSHARD__NOBODY);
	lshard__place_close(&place);
	close(directory);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		in_a_folder(ranks_find_each_other_in_a_directory_and_leave_it_empty),
		in_a_folder(the_path_may_be_long),
		in_a_folder(what_a_killed_rank_left_is_replaced),
		in_a_folder(two_with_rank_0_are_named_there_too),
		in_a_folder(ranks_that_disagree_are_told_what_to_look_at),
		in_a_folder(directories_that_others_can_enter_are_refused),
		in_a_folder(a_limit_is_not_taken_for_an_unfit_directory),
		in_a_folder(what_is_no_socket_stays),
		in_a_folder(who_keeps_the_lock_is_to_blame),
		in_a_folder(two_that_replace_what_is_left_do_not_both_listen),
		in_a_folder(who_is_replacing_what_is_left_is_waited_for),
		in_a_folder(who_leaves_removes_no_other_ranks_socket),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
