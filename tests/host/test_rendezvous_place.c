/* SPDX-License-Identifier: Apache-2.0
 *
 * test_rendezvous_place.c - where the ranks of a job find each other, and who can get in their way: a directory of
 * their own, user namespaces in which nobody can tell users apart, and names that somebody sits on.
 */
#include "contexts.h"
#include "hello.h"
#include "rendezvous_place.h"
#include "mesh.h"
#include "outside.h"
#include "patience.h"
#include "sockets.h"
#include "text_hash.h"
#include "user.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#define SHORT_MS 700u
#define VARIABLE "LAYERSHARD_MEET_DIR"
#define NOBODY   65534u
#define STRANGER 54321u

/* ---- A directory ----------------------------------------------------------------------------------------------- */

struct folder {
	char path[256];
};

static int make_folder(void **state)
{
	static struct folder folder;

	snprintf(folder.path, sizeof folder.path, "/tmp/layershard-meet-XXXXXX");
	*state = &folder;
	if (!mkdtemp(folder.path) || setenv(VARIABLE, folder.path, 1))
		return -1;
	return 0;
}

static int count_files(const char *path)
{
	DIR *directory = opendir(path);
	int count = -2; /* "." and ".." */

	while (directory && readdir(directory))
		count++;
	if (directory)
		closedir(directory);
	return count;
}

static int remove_folder(void **state)
{
	const struct folder *folder = *state;
	char command[300];

	unsetenv(VARIABLE);
	snprintf(command, sizeof command, "rm -rf '%s'", folder->path);
	return system(command);
}

static int meet(const struct member *member)
{
	lshard_context context = context_for_member(member, "", LONG_MS);
	const char *job = member->job ? member->job : "threads";
	lshard__rendezvous *rendezvous = NULL;
	lshard_bootstrap bootstrap;
	lshard_error error = {""};
	int32_t all[8];

	EXPECT(member, lshard__rendezvous_open(&context, job, &rendezvous, &bootstrap, &error) == LSHARD_OK, "%s",
	       error.text);
	EXPECT(member, bootstrap.allgather(bootstrap.user, &member->rank, all, sizeof all[0]) == 0, "all-gather");
	for (int32_t rank = 0; rank < member->size; rank++)
		EXPECT(member, all[rank] == rank, "rank %d gave %d", (int)rank, (int)all[rank]);
	lshard__rendezvous_close(rendezvous);
	return 0;
failed:
	lshard__rendezvous_close(rendezvous);
	return 1;
}

static void ranks_meet_in_a_directory_and_leave_it_empty(void **state)
{
	const struct folder *folder = *state;

	assert_int_equal(team_of_processes(1, meet, NULL), 0);
	assert_int_equal(team_of_processes(4, meet, NULL), 0);
	assert_int_equal(team_of_threads(3, meet, NULL), 0);
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
	assert_int_equal(team_of_processes(2, meet, NULL), 0);
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

static int meet_as_left(const struct member *member)
{
	struct member named = *member;

	named.job = member->user;
	return meet(&named);
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
	assert_int_equal(team_of_processes(3, meet_as_left, job), 0);
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
		      member->rank ? "none of them " VARIABLE "?" : "in " VARIABLE "='/tmp/layershard-meet-"),
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

	refuses("meet", "does not begin with '/'");
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

/* ---- Who listens in a directory -------------------------------------------------------------------------------- */

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

/* A place of the job "listens", where the socket of a killed rank may lie. */
static void open_place(struct lshard__place *place, bool killed)
{
	lshard_error error = {""};

	if (lshard__place_open(place, "listens", &error) != LSHARD_OK)
		fail_msg("%s", error.text);
	if (killed)
		assert_int_equal(close(lshard__socket_listen(place->name, SOCK_STREAM)), 0);
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

/* ---- User namespaces ------------------------------------------------------------------------------------------- */

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

/* The job of the cases below, which another run of them at the same time does not have. */
static const char *own_job(void)
{
	static char job[32];

	if (!*job)
		snprintf(job, sizeof job, "own-%ld", (long)getpid());
	return job;
}

/* The abstract name of @p job here. */
static void name_of(const char *job, char *name, size_t bytes)
{
	snprintf(name, bytes, "layershard/%lu/%016llx/%.40s", (unsigned long)geteuid(),
		 (unsigned long long)lshard__text_hash(job), job);
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

static int nobody_meets_by_a_name(void)
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
static void where_users_look_alike_nobody_meets_by_a_name(void **state)
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
	result = in_namespace(MAPS_NOBODY, nobody_meets_by_a_name);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	if (result == SKIPPED)
		skip();
	assert_int_equal(result, 0);
}

/* Nor where the namespace maps a user to the number of those that it does not map: of that user the same is true. */
static void a_user_that_is_shown_as_the_strangers_are_is_told(void **state)
{
	const int result = in_namespace(MAPS_TO_OVERFLOW, nobody_meets_by_a_name);

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

static void where_users_look_alike_ranks_meet_in_a_directory(void **state)
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

/* A namespace that maps its own user knows that user: ranks meet by a name, and who is not mapped is a stranger. */
static void a_user_that_is_mapped_meets_by_a_name(void **state)
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

/* ---- Names that somebody sits on ------------------------------------------------------------------------------- */

/* How somebody has a name until it is killed. */
enum squat { BINDS, BINDS_DATAGRAMS, LISTENS };

static socklen_t address_of(const char *name, struct sockaddr_un *address)
{
	*address = (struct sockaddr_un){.sun_family = AF_UNIX};
	memcpy(address->sun_path + 1, name, strlen(name));
	return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name));
}

/* Connects until no more connections are taken: nobody accepts them. */
static bool fill_queue(const struct sockaddr_un *address, socklen_t length)
{
	for (int tries = 0; tries < 100; tries++)
		if (connect(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0), (const struct sockaddr *)address, length))
			return errno == EAGAIN;
	return false;
}

static bool squat(const char *name, enum squat how)
{
	const int fd = socket(AF_UNIX, how == BINDS_DATAGRAMS ? SOCK_DGRAM : SOCK_STREAM, 0);
	struct sockaddr_un address;
	const socklen_t length = address_of(name, &address);

	return bind(fd, (struct sockaddr *)&address, length) == 0 &&
	       (how != LISTENS || (listen(fd, 0) == 0 && fill_queue(&address, length)));
}

static pid_t squatter(const char *name, enum squat how)
{
	int ready[2];
	char byte = 0;
	pid_t child;

	if (pipe(ready) != 0)
		return -1;
	child = fork();
	if (child == 0) {
		const bool is_other = geteuid() != 0 || setuid(STRANGER) == 0;

		byte = is_other && prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 && squat(name, how);
		if (write(ready[1], &byte, 1) == 1)
			pause();
		_exit(0);
	}
	close(ready[1]);
	if (read(ready[0], &byte, 1) != 1 || !byte)
		child = -1;
	close(ready[0]);
	return child;
}

/* Ranks 0 and 1 of two cannot meet, and each says so. */
static void are_told(const char *job, uint32_t timeout_ms, lshard_status expected, const char *const says[2])
{
	const int before = count_files("/proc/self/fd");

	for (int32_t rank = 0; rank < 2; rank++) {
		const struct member member = {.rank = rank, .size = 2};
		lshard_context context = context_for_member(&member, "", timeout_ms);
		lshard__rendezvous *rendezvous = NULL;
		lshard_bootstrap bootstrap;
		lshard_error error = {""};
		const lshard_status status = lshard__rendezvous_open(&context, job, &rendezvous, &bootstrap, &error);

		if (status != expected || !strstr(error.text, says[0]) || !strstr(error.text, says[1]))
			fail_msg("rank %d: status %d: '%s'", (int)rank, (int)status, error.text);
	}
	assert_int_equal(count_files("/proc/self/fd"), before);
}

static void end(pid_t child)
{
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
}

/* By a name that nobody can listen under, or under which somebody else does and does not answer. */
static void who_sits_on_a_name_is_named(void **state)
{
	const bool is_root = geteuid() == 0;
	char says[128], name[128];

	(void)state;
	name_of(own_job(), name, sizeof name);
	for (int listens = 0; listens < 2; listens++) {
		const pid_t child = squatter(name, listens ? LISTENS : BINDS);

		assert_true(child > 0);
		snprintf(says, sizeof says, "of user %u %s the name of job '%s' and %s", is_root ? STRANGER : geteuid(),
			 listens ? "listens under" : "has taken", own_job(),
			 listens ? "lets nobody in" : "does not listen");
		are_told(own_job(), SHORT_MS, listens && !is_root ? LSHARD_ERR_TIMEOUT : LSHARD_ERR_SYSTEM,
			 (const char *const[]){says, VARIABLE});
		end(child);
	}
}

/* Sockets of another type have names of their own. */
static void who_has_a_name_of_another_type_is_not_to_blame(void **state)
{
	char name[128];
	pid_t child;

	(void)state;
	name_of(own_job(), name, sizeof name);
	child = squatter(name, BINDS_DATAGRAMS);
	assert_true(child > 0);
	are_told(own_job(), SHORT_MS, LSHARD_ERR_TIMEOUT, (const char *const[]){"700 ms for rank", "one job name"});
	end(child);
}

/* ---- What a rank 0 leaves to a child ---------------------------------------------------------------------------- */

/* A process that listens, forks, and has ended when this returns: its child has its socket. Returns the child. */
static pid_t orphan(const char *name)
{
	int ready[2];
	pid_t child = -1;
	pid_t parent;

	if (pipe(ready) != 0)
		return -1;
	parent = fork();
	if (parent == 0) {
		if (lshard__socket_listen(name, SOCK_STREAM) < 0)
			_exit(1);
		child = fork();
		if (child == 0) {
			alarm(LONG_MS / 1000);
			pause();
			_exit(0);
		}
		_exit(write(ready[1], &child, sizeof child) != sizeof child);
	}
	close(ready[1]);
	if (read(ready[0], &child, sizeof child) != sizeof child)
		child = -1;
	close(ready[0]);
	waitpid(parent, NULL, 0);
	return child;
}

/* At once, as far as the kernel shows that a process has ended. */
static void a_child_that_has_a_dead_ranks_name_is_named(void **state)
{
	char says[64], name[128];
	pid_t child;

	(void)state;
	name_of(own_job(), name, sizeof name);
	child = orphan(name);
	assert_true(child > 0);
	snprintf(says, sizeof says, "has ended, but process %d (", (int)child);
	are_told(own_job(), LONG_MS, LSHARD_ERR_SYSTEM, (const char *const[]){says, "lets nobody in: end it, or "});
	kill(child, SIGKILL);
}

/* There it has a file, which can be replaced. */
static void what_a_dead_rank_left_to_a_child_is_replaced(void **state)
{
	const struct folder *folder = *state;
	char job[] = "listens";
	struct lshard__place place;
	pid_t child;

	open_place(&place, false);
	child = orphan(place.name);
	lshard__place_close(&place);
	assert_true(child > 0);
	assert_int_equal(count_files(folder->path), 1);
	assert_int_equal(team_of_processes(3, meet_as_left, job), 0);
	assert_int_equal(kill(child, SIGKILL), 0);
	assert_int_equal(count_files(folder->path), 0);
}

/* Ranks that have met sit on no name, although what connects them still has it. */
static int comes_to_ranks_that_have_met(const struct member *member)
{
	lshard_context context = context_for_member(member, "", LONG_MS);
	lshard__rendezvous *rendezvous = NULL;
	lshard__rendezvous *second = NULL;
	lshard_bootstrap bootstrap;
	lshard_error error = {""};
	lshard_status status;

	EXPECT(member, lshard__rendezvous_open(&context, member->job, &rendezvous, &bootstrap, &error) == LSHARD_OK,
	       "%s", error.text);
	if (member->rank == 1) {
		context.timeout_ms = SHORT_MS;
		status = lshard__rendezvous_open(&context, member->job, &second, &bootstrap, &error);
		EXPECT(member, status == LSHARD_ERR_TIMEOUT && strstr(error.text, "for rank 0 of job"), "status %d: %s",
		       (int)status, error.text);
	}
	EXPECT(member, team_barrier(member), "another rank failed");
	lshard__rendezvous_close(rendezvous);
	return 0;
failed:
	lshard__rendezvous_close(second);
	lshard__rendezvous_close(rendezvous);
	return 1;
}

static void ranks_that_have_met_sit_on_no_name(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, comes_to_ranks_that_have_met, NULL), 0);
}

#define in_a_folder(test) cmocka_unit_test_setup_teardown(test, make_folder, remove_folder)

int main(void)
{
	const struct CMUnitTest tests[] = {
		in_a_folder(ranks_meet_in_a_directory_and_leave_it_empty),
		in_a_folder(the_path_may_be_long),
		in_a_folder(what_a_killed_rank_left_is_replaced),
		in_a_folder(two_with_rank_0_are_named_there_too),
		in_a_folder(ranks_that_disagree_are_told_what_to_look_at),
		in_a_folder(directories_that_others_can_enter_are_refused),
		in_a_folder(a_limit_is_not_taken_for_an_unfit_directory),
		in_a_folder(what_is_no_socket_stays),
		in_a_folder(who_keeps_the_lock_is_to_blame),
		in_a_folder(two_that_replace_what_is_left_do_not_both_listen),
		in_a_folder(who_leaves_removes_no_other_ranks_socket),
		cmocka_unit_test(where_users_look_alike_nobody_meets_by_a_name),
		in_a_folder(where_users_look_alike_ranks_meet_in_a_directory),
		cmocka_unit_test(a_user_that_is_mapped_meets_by_a_name),
		cmocka_unit_test(a_user_that_is_shown_as_the_strangers_are_is_told),
		cmocka_unit_test(a_map_of_one_user_is_not_one_of_all),
		cmocka_unit_test(who_sits_on_a_name_is_named),
		cmocka_unit_test(who_has_a_name_of_another_type_is_not_to_blame),
		cmocka_unit_test(a_child_that_has_a_dead_ranks_name_is_named),
		in_a_folder(what_a_dead_rank_left_to_a_child_is_replaced),
		cmocka_unit_test(ranks_that_have_met_sit_on_no_name),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
