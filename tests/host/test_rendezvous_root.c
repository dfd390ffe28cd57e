/* SPDX-License-Identifier: Apache-2.0
 *
 * test_rendezvous_root.c - who connects to rank 0: ranks that are slow, silent or of another version, and all who are
 * no ranks.
 */
#include "hello.h"
#include "job_ranks.h"
#include "outside.h"
#include "patience.h"
#include "sockets.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#define SHORT_MS 1000u

/*
 * Before the others come, some say nothing or three bytes and stay, more of them than there is room for: all ranks come
 * together nevertheless.
 */
static int comes_among_silent_ones(const struct member *member)
{
	int silent[24];
	char name[128];

	for (size_t i = 0; i < 24; i++)
		silent[i] = -1;
	if (member->rank == 1) {
		EXPECT(member, find_listener(member->job, name, sizeof name), "rank 0 does not listen");
		for (size_t i = 0; i < 24; i++) {
			silent[i] = connect_to(name);
			EXPECT(member, silent[i] >= 0, "connecting");
			EXPECT(member, i % 2 || send(silent[i], "xyz", 3, 0) == 3, "three bytes");
		}
	}
	if (member->rank != 0)
		EXPECT(member, find_listener(member->job, name, sizeof name), "rank 0 does not listen");
	if (member->rank > 1)
		usleep(50000); /* mostly after the silent ones */
	EXPECT(member, come_and_gather(member) == 0, "the silent ones were waited for");
	for (size_t i = 0; i < 24 && silent[i] >= 0; i++)
		close(silent[i]);
	return 0;
failed:
	for (size_t i = 0; i < 24 && silent[i] >= 0; i++)
		close(silent[i]);
	return 1;
}

static void silent_connections_stop_nobody(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(4, comes_among_silent_ones, NULL), 0);
}

/* A process that connects and says that it is rank 2 of 3 once a byte comes at @p go. Ends well if rank 0 answers. */
static pid_t slow_rank(const char *name, const int go[2], const int here[2])
{
	const struct lshard__hello hello = {lshard__hello_greeting(16), 0, 2, 3};
	pid_t child = fork();
	char bytes[16];
	int fd;

	if (child != 0)
		return child;
	close(go[1]);
	fd = connect_to(name);
	if (write(here[1], "", 1) != 1 || read(go[0], bytes, 1) != 1 ||
	    send(fd, &hello, sizeof hello, MSG_NOSIGNAL) != sizeof hello ||
	    lshard__socket_wait(fd, -1, POLLIN, lshard__deadline_ns(LONG_MS)) != LSHARD_OK)
		_exit(1);
	_exit(recv(fd, bytes, sizeof bytes, 0) != sizeof bytes);
}

/* It came first and says its hello last; meanwhile another process connects more often than there is room for. */
static int comes_late_in_a_crowd(const struct member *member)
{
	lshard_context context = context_for_member(member, "", LONG_MS);
	lshard__rendezvous *rendezvous = NULL;
	lshard_bootstrap bootstrap;
	lshard_error error = {""};
	int go[2] = {-1, -1}, here[2] = {-1, -1}, silent[24];
	char name[128], byte;
	int ended = 0;
	pid_t child = -1;

	context.size = 3;
	if (member->rank == 1) {
		EXPECT(member, find_listener(member->job, name, sizeof name) && !pipe(go) && !pipe(here),
		       "no listener");
		child = slow_rank(name, go, here);
		EXPECT(member, child > 0 && read(here[0], &byte, 1) == 1, "no slow rank");
		for (size_t i = 0; i < 24; i++) {
			silent[i] = connect_to(name);
			EXPECT(member, silent[i] >= 0, "connecting");
		}
		/* The first of the crowd is sent away when its last has come. */
		EXPECT(member, lshard__socket_wait(silent[4], -1, POLLIN, lshard__deadline_ns(LONG_MS)) == LSHARD_OK,
		       "the crowd has room");
		EXPECT(member, write(go[1], "", 1) == 1, "go");
	}
	EXPECT(member, lshard__rendezvous_open(&context, member->job, &rendezvous, &bootstrap, &error) == LSHARD_OK,
	       "%s", error.text);
	EXPECT(member, child < 0 || (waitpid(child, &ended, 0) == child && ended == 0), "the slow rank was sent away");
	lshard__rendezvous_close(rendezvous);
	return 0;
failed:
	end_child(child);
	lshard__rendezvous_close(rendezvous);
	return 1;
}

static void a_slow_rank_is_not_crowded_out(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, comes_late_in_a_crowd, NULL), 0);
}

/* A rank that was stopped after it connected is the one that is named, and not one that came. */
static int one_is_silent(const struct member *member)
{
	static const struct failure expected = {LSHARD_ERR_TIMEOUT, "1000 ms for rank 1 of job 'test-",
						"for rank 1 of job 'test-"};
	char name[128];
	int fd = -1;

	if (member->rank == 0)
		return opens_badly(member, 0, 3, SHORT_MS, &expected);
	EXPECT(member, find_listener(member->job, name, sizeof name), "rank 0 does not listen");
	if (member->rank == 2)
		return opens_badly(member, 2, 3, LONG_MS, &expected);
	fd = connect_to(name);
	EXPECT(member, fd >= 0, "connecting");
	EXPECT(member, lshard__socket_wait(fd, -1, POLLIN, lshard__deadline_ns(LONG_MS)) == LSHARD_OK,
	       "rank 0 never gave up");
	EXPECT(member, recv(fd, name, sizeof name, 0) > 0, "rank 0 did not say why");
	close(fd);
	return 0;
failed:
	if (fd >= 0)
		close(fd);
	return 1;
}

static void a_rank_that_connects_and_says_nothing_is_named(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, one_is_silent, NULL), 0);
}

/* What rank @p rank of @p size says first. */
static struct lshard__hello hello_of(int32_t rank, int32_t size)
{
	return (struct lshard__hello){lshard__hello_greeting(16), 0, rank, size};
}

/* A connection of a process that has ended, which is not waited for yet; it stays open here. */
static int connection_of_the_dead(const char *name)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	const size_t length = strlen(name);
	const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	siginfo_t ended = {.si_status = -1};
	pid_t child;

	memcpy(address.sun_path + 1, name, length);
	child = fork();
	if (child == 0)
		_exit(connect(fd, (struct sockaddr *)&address,
			      (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length)) != 0);
	if (waitid(P_PID, (id_t)child, &ended, WEXITED | WNOWAIT) == 0 && ended.si_status == 0)
		return fd;
	close(fd);
	return -1;
}

/* Rank 1 of 3 has come, waited for rank 2, said so, and ended, before rank 0 has looked. */
static int hears_the_dead(const struct member *member)
{
	static const struct failure expected = {LSHARD_ERR_TIMEOUT, "rank 1 waited 77 ms for rank 2 of job 'test-", ""};
	const struct {
		struct lshard__hello hello;
		uint32_t waited_ms;
	} said = {hello_of(1, 3), 77};
	char name[128];
	int fd = -1;

	if (member->rank == 0)
		return opens_badly(member, 0, 3, LONG_MS, &expected);
	EXPECT(member, find_listener(member->job, name, sizeof name), "rank 0 does not listen");
	fd = connection_of_the_dead(name);
	EXPECT(member, fd >= 0, "connecting");
	EXPECT(member, send(fd, &said, sizeof said.hello + sizeof said.waited_ms, 0) > 0, "sending");
	EXPECT(member, lshard__socket_wait(fd, -1, POLLIN, lshard__deadline_ns(LONG_MS)) == LSHARD_OK, "no answer");
	close(fd);
	return 0;
failed:
	if (fd >= 0)
		close(fd);
	return 1;
}

static void what_a_dead_rank_has_said_is_heard(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, hears_the_dead, NULL), 0);
}

/* Connections of this user that are no ranks: each has said something else before the ranks come. */
static int comes_among_garbage(const struct member *member)
{
	static const char request[] = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
	const struct lshard__hello real = hello_of(1, 3);
	struct lshard__hello strange = real;
	int fds[3] = {-1, -1, -1};
	char name[128];

	strange.greeting.magic ^= 1;
	if (member->rank == 1) {
		EXPECT(member, find_listener(member->job, name, sizeof name), "rank 0 does not listen");
		for (int i = 0; i < 3; i++) {
			fds[i] = connect_to(name);
			EXPECT(member, fds[i] >= 0, "connecting");
		}
		EXPECT(member,
		       send(fds[0], request, sizeof request, 0) == sizeof request &&
			       send(fds[1], &strange, sizeof strange, 0) == sizeof strange &&
			       send(fds[2], &real, sizeof real - 1, 0) == sizeof real - 1,
		       "sending");
		for (int i = 0; i < 2; i++) /* sent away; the third is waited for, like any that is silent */
			EXPECT(member,
			       lshard__socket_wait(fds[i], -1, POLLIN, lshard__deadline_ns(LONG_MS)) == LSHARD_OK &&
				       recv(fds[i], name, sizeof name, 0) <= 0,
			       "connection %d was answered", i);
	}
	EXPECT(member, come_and_gather(member) == 0, "garbage ended the rendezvous");
	for (int i = 0; i < 3 && fds[i] >= 0; i++)
		close(fds[i]);
	return 0;
failed:
	for (int i = 0; i < 3 && fds[i] >= 0; i++)
		close(fds[i]);
	return 1;
}

static void garbage_ends_no_rendezvous(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, comes_among_garbage, NULL), 0);
}

static int lines;
static char last_line[200];

static void count_lines(const lshard_context *context, lshard_log_level level, const char *format, ...)
{
	va_list arguments;

	(void)context;
	(void)level;
	lines++;
	va_start(arguments, format);
	vsnprintf(last_line, sizeof last_line, format, arguments);
	va_end(arguments);
}

/* Nine connections that make no sense, one after the other. */
static int is_pestered(const struct member *member)
{
	lshard_context context = context_for_member(member, "", LONG_MS);
	lshard__rendezvous *rendezvous = NULL;
	lshard_bootstrap bootstrap;
	lshard_error error = {""};
	char name[128];
	int fd = -1;

	if (member->rank == 1)
		EXPECT(member, find_listener(member->job, name, sizeof name), "rank 0 does not listen");
	for (int i = 0; i < 9 && member->rank == 1; i++) {
		fd = connect_to(name);
		EXPECT(member, fd >= 0 && send(fd, "GET / HTTP/1.1\r\n\r\n", 18, 0) == 18, "connecting");
		EXPECT(member, lshard__socket_wait(fd, -1, POLLIN, lshard__deadline_ns(LONG_MS)) == LSHARD_OK, "%d", i);
		close(fd);
	}
	context.log = count_lines;
	EXPECT(member, lshard__rendezvous_open(&context, member->job, &rendezvous, &bootstrap, &error) == LSHARD_OK,
	       "%s", error.text);
	EXPECT(member, lines == (member->rank == 0 ? 2 : 0), "%d lines in the log, the last: %s", lines, last_line);
	EXPECT(member, member->rank || strstr(last_line, "8 more"), "%s", last_line);
	lshard__rendezvous_close(rendezvous);
	return 0;
failed:
	lshard__rendezvous_close(rendezvous);
	return 1;
}

static void garbage_does_not_fill_the_log(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, is_pestered, NULL), 0);
}

/* Rank 1 is of another version, whose hello goes on in a way that nobody here knows: both hear of both versions. */
static int comes_with_another_version(const struct member *member)
{
	static const struct failure expected = {LSHARD_ERR_MISMATCH, "rank 0 runs version ", ""};
	struct lshard__greeting greeting = lshard__hello_greeting(16);
	char heard[1024] = "";
	char name[128];
	ssize_t got = 0;
	int fd = -1;

	if (member->rank == 0)
		return opens_badly(member, 0, 2, LONG_MS, &expected);
	greeting.version = 99u << 8 | 7u;
	EXPECT(member, find_listener(member->job, name, sizeof name), "rank 0 does not listen");
	fd = connect_to(name);
	EXPECT(member, fd >= 0 && send(fd, &greeting, sizeof greeting, 0) == sizeof greeting, "connecting");
	EXPECT(member, lshard__socket_wait(fd, -1, POLLIN, lshard__deadline_ns(LONG_MS)) == LSHARD_OK, "no answer");
	got = recv(fd, heard, sizeof heard - 1, 0);
	EXPECT(member, got > 16, "%zd bytes of answer", got);
	EXPECT(member, strstr(heard + 16, "runs version 0.99.7 (messages of 32 and 16 bytes)"), "%s", heard + 16);
	close(fd);
	return 0;
failed:
	if (fd >= 0)
		close(fd);
	return 1;
}

static void another_version_is_named(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, comes_with_another_version, NULL), 0);
}

/* A process of another user that does as rank 1 would, or listens as rank 0 would, until it is killed. */
static pid_t other_user(const char *name, bool listens)
{
	int ready[2];
	pid_t child;
	char byte = 0;

	if (pipe(ready) != 0)
		return -1;
	child = fork();
	if (child == 0) {
		const struct lshard__hello hello = hello_of(1, 2);
		int fd = setuid(NOBODY) != 0 ? -1
			 : listens           ? lshard__socket_listen(name, SOCK_STREAM)
					     : connect_to(name);

		if (fd >= 0 && !listens) /* it may have been sent away already */
			(void)send(fd, &hello, sizeof hello, MSG_NOSIGNAL);
		byte = fd >= 0;
		if (write(ready[1], &byte, 1) == 1)
			pause();
		_exit(1);
	}
	close(ready[1]);
	if (child > 0 && (read(ready[0], &byte, 1) != 1 || !byte)) {
		kill(child, SIGKILL);
		waitpid(child, NULL, 0);
		child = -1;
	}
	close(ready[0]);
	return child;
}

/* Another user says it is rank 1 before rank 1 comes, and afterwards takes rank 0's name. */
static int comes_among_users(const struct member *member)
{
	lshard_context context = context_for_member(member, "", LONG_MS);
	lshard__rendezvous *rendezvous = NULL;
	lshard_bootstrap bootstrap;
	lshard_error error = {""};
	char name[128];
	pid_t child = -1;
	lshard_status status;

	if (member->rank == 1) {
		EXPECT(member, find_listener(member->job, name, sizeof name), "rank 0 does not listen");
		child = other_user(name, false);
		EXPECT(member, child > 0, "no process of user %u could connect", NOBODY);
	}
	EXPECT(member, come_and_gather(member) == 0, "the stranger was taken for rank 1");
	end_child(child);
	child = -1;
	if (member->rank == 1) {
		child = other_user(name, true);
		EXPECT(member, child > 0, "no process of user %u could listen", NOBODY);
		status = lshard__rendezvous_open(&context, member->job, &rendezvous, &bootstrap, &error);
		EXPECT(member, status == LSHARD_ERR_SYSTEM, "status %d: %s", (int)status, error.text);
		EXPECT(member, strstr(error.text, "belongs to user 65534") && strstr(error.text, "another job name"),
		       "%s", error.text);
		end_child(child);
	}
	return 0;
failed:
	end_child(child);
	return 1;
}

static void other_users_are_kept_out(void **state)
{
	(void)state;
	if (geteuid() != 0) {
		printf("skipped: only root can start a process of another user\n");
		skip();
	}
	assert_int_equal(team_of_processes(2, comes_among_users, NULL), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(silent_connections_stop_nobody),
		cmocka_unit_test(a_slow_rank_is_not_crowded_out),
		cmocka_unit_test(a_rank_that_connects_and_says_nothing_is_named),
		cmocka_unit_test(what_a_dead_rank_has_said_is_heard),
		cmocka_unit_test(garbage_ends_no_rendezvous),
		cmocka_unit_test(garbage_does_not_fill_the_log),
		cmocka_unit_test(another_version_is_named),
		cmocka_unit_test(other_users_are_kept_out),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
