/* SPDX-License-Identifier: Apache-2.0
 *
 * test_mesh.c - the sockets between the ranks of a host: who is let in, who is named when one does not come, and
 * descriptors that nobody asked for any more.
 */
#include "contexts.h"
#include "hello.h"
#include "mesh.h"
#include "outside.h"
#include "patience.h"
#include "sockets.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#define SHORT_MS 1000u
#define NOBODY   65534u
#define SILENT   24

struct rank {
	const struct member *member;
	lshard_context context;
	lshard_bootstrap inner; /* what the context's own goes through to */
	lshard_bootstrap spied;
	lshard__rendezvous *rendezvous;
	struct mesh mesh;
	lshard_error error;
	bool open;
	int silent[SILENT]; /* connections to rank 0 that say nothing */
};

/* Where rank @p rank listens, as the ranks tell each other. */
static const char *address_of(const void *records, size_t bytes, int32_t rank)
{
	static const char begins[] = "layershard/";

	return memmem((const char *)records + (size_t)rank * bytes, bytes, begins, sizeof begins - 1);
}

static lshard_status rank_open(struct rank *rank, const struct member *member, uint32_t timeout_ms,
			       int (*allgather)(void *user, const void *send, void *receive, size_t bytes))
{
	lshard_status status;

	*rank = (struct rank){.member = member, .context = context_for_member(member, "", LONG_MS)};
	for (int i = 0; i < SILENT; i++)
		rank->silent[i] = -1;
	status = lshard__rendezvous_open(&rank->context, member->job, &rank->rendezvous, &rank->inner, &rank->error);
	if (status != LSHARD_OK)
		return status;
	rank->spied = (lshard_bootstrap){sizeof rank->spied, allgather, rank};
	rank->context.bootstrap = allgather ? &rank->spied : &rank->inner;
	rank->context.timeout_ms = timeout_ms;
	status = mesh_open(&rank->mesh, &rank->context, &rank->error, lshard__deadline_ns(timeout_ms));
	rank->open = status == LSHARD_OK;
	return status;
}

static void rank_close(struct rank *rank)
{
	if (rank->open)
		mesh_close(&rank->mesh);
	rank->open = false;
	lshard__rendezvous_close(rank->rendezvous);
	rank->rendezvous = NULL;
	for (int i = 0; i < SILENT; i++)
		if (rank->silent[i] >= 0)
			close(rank->silent[i]);
}

/* ---- Coming ---------------------------------------------------------------------------------------------------- */

static bool say_nothing(struct rank *rank, const char *address, int count)
{
	for (int i = 0; i < count; i++)
		if (lshard__socket_connect(address, SOCK_SEQPACKET, lshard__deadline_ns(LONG_MS), &rank->silent[i]) !=
		    LSHARD_OK)
			return false;
	return true;
}

/* The addresses are known: before rank 1 says hello to rank 0, it connects many times and says nothing. */
static int crowd_first(void *user, const void *send, void *receive, size_t bytes)
{
	struct rank *rank = user;
	int failed = rank->inner.allgather(rank->inner.user, send, receive, bytes);

	if (failed || rank->member->rank != 1)
		return failed;
	return say_nothing(rank, address_of(receive, bytes, 0), SILENT) ? 0 : 1;
}

static int comes_in_a_crowd(const struct member *member)
{
	uint64_t began_ns = lshard__now_ns();
	struct rank rank;

	EXPECT(member, rank_open(&rank, member, LONG_MS, crowd_first) == LSHARD_OK, "%s", rank.error.text);
	EXPECT(member, lshard__now_ns() - began_ns < LONG_MS * UINT64_C(1000000), "the silent ones were waited for");
	EXPECT(member, team_barrier(member), "another rank failed"); /* until then the silent ones stay */
	rank_close(&rank);
	return 0;
failed:
	rank_close(&rank);
	return 1;
}

static void silent_connections_stop_nobody(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, comes_in_a_crowd, NULL), 0);
}

/* Rank 2 connects first, and stops before it says who it is. */
static int stop_before_hello(void *user, const void *send, void *receive, size_t bytes)
{
	struct rank *rank = user;
	int failed = rank->inner.allgather(rank->inner.user, send, receive, bytes);

	if (!failed && rank->member->rank == 2)
		failed = !say_nothing(rank, address_of(receive, bytes, 0), 1);
	if (!team_barrier(rank->member) || failed)
		return 1;
	return rank->member->rank == 2;
}

static int one_stops(const struct member *member)
{
	struct rank rank;
	lshard_status status = rank_open(&rank, member, SHORT_MS, stop_before_hello);

	if (member->rank < 2) {
		EXPECT(member, status == LSHARD_ERR_TIMEOUT, "status %d: %s", (int)status, rank.error.text);
		EXPECT(member, strstr(rank.error.text, "1000 ms for rank 2 (process "), "%s", rank.error.text);
	}
	EXPECT(member, team_barrier(member), "another rank failed");
	rank_close(&rank);
	return 0;
failed:
	rank_close(&rank);
	return 1;
}

static void only_a_rank_that_does_not_come_is_named(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, one_stops, NULL), 0);
}

/* Rank 1 is of a build whose packets are longer: both know it before they connect. */
static int exchange_with_another_build(void *user, const void *send, void *receive, size_t bytes)
{
	struct rank *rank = user;
	int failed = rank->inner.allgather(rank->inner.user, send, receive, bytes);

	((uint32_t *)receive)[bytes / sizeof(uint32_t) + 3] += 8;
	return failed;
}

static int is_of_another_build(const struct member *member)
{
	struct rank rank;
	lshard_status status = rank_open(&rank, member, LONG_MS, exchange_with_another_build);

	EXPECT(member, status == LSHARD_ERR_MISMATCH, "status %d: %s", (int)status, rank.error.text);
	EXPECT(member, strstr(rank.error.text, "and 16 bytes)") && strstr(rank.error.text, "and 24 bytes)"), "%s",
	       rank.error.text);
	rank_close(&rank);
	return 0;
failed:
	rank_close(&rank);
	return 1;
}

static void another_build_is_named(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, is_of_another_build, NULL), 0);
}

/* ---- Another user ---------------------------------------------------------------------------------------------- */

/* Answers as a rank would that was given no records. */
static void greet_all(int listener)
{
	const struct lshard__hello hello = {lshard__hello_greeting(16), 0, 0, 2};

	for (;;) {
		const int fd = lshard__socket_wait(listener, -1, POLLIN, lshard__deadline_ns(LONG_MS)) == LSHARD_OK
				       ? lshard__socket_accept(listener)
				       : -1;

		if (fd >= 0)
			(void)send(fd, &hello, sizeof hello, MSG_NOSIGNAL);
	}
}

/* Listens at an address of its own until it is killed. */
static pid_t stranger(const char *address, uid_t user)
{
	int ready[2];
	pid_t child;
	char byte = 0;

	if (pipe(ready) != 0)
		return -1;
	child = fork();
	if (child == 0) {
		const int fd = setuid(user) == 0 ? lshard__socket_listen(address, SOCK_SEQPACKET) : -1;

		byte = fd >= 0;
		if (write(ready[1], &byte, 1) == 1)
			greet_all(fd);
		_exit(1);
	}
	close(ready[1]);
	if (read(ready[0], &byte, 1) != 1)
		byte = 0;
	close(ready[0]);
	if (byte || child <= 0)
		return child;
	waitpid(child, NULL, 0);
	return -1;
}

/* Tell rank 1 that rank 0 listens where the other user does. */
static int given_falsely(void *user, const void *send, void *receive, size_t bytes)
{
	memcpy(receive, send, bytes);
	memcpy((char *)receive + bytes, send, bytes);
	strcpy((char *)(uintptr_t)address_of(receive, bytes, 0), user);
	return 0;
}

/* Rank 1, given a stranger's address as rank 0's. */
static void refuses_a_stranger(uid_t user, const char *says)
{
	struct member second = {.rank = 1, .size = 2};
	char address[32];
	const lshard_bootstrap bootstrap = {sizeof bootstrap, given_falsely, address};
	lshard_context context = context_for_member(&second, "", LONG_MS);
	lshard_error error = {""};
	struct mesh mesh;
	lshard_status status;
	pid_t child;

	snprintf(address, sizeof address, "layershard/test/%d", (int)getpid());
	child = stranger(address, user);
	assert_true(child > 0);
	context.bootstrap = &bootstrap;
	status = mesh_open(&mesh, &context, &error, lshard__deadline_ns(LONG_MS));
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	assert_int_equal(status, LSHARD_ERR_SYSTEM);
	if (!strstr(error.text, says))
		fail_msg("'%s' lacks '%s'", error.text, says);
	assert_int_equal(contexts_outstanding(), 0);
}

static void another_user_is_no_rank(void **state)
{
	(void)state;
	if (geteuid() != 0) {
		printf("skipped: only root can start a process of another user\n");
		skip();
	}
	refuses_a_stranger(NOBODY, "belongs to user 65534");
}

/* In a user namespace every stranger may look like this user: who listens must know this rank's token too. */
static void the_same_user_is_no_rank_without_the_secret(void **state)
{
	(void)state;
	refuses_a_stranger(geteuid(), "does not know the group's secret");
}

/* ---- Leaving --------------------------------------------------------------------------------------------------- */

/* Rank 1 closes while a child that it forked has its descriptors: it is gone all the same. */
static int leaves_a_child(const struct member *member)
{
	struct rank rank;
	pid_t child = -1;

	EXPECT(member, rank_open(&rank, member, LONG_MS, NULL) == LSHARD_OK, "%s", rank.error.text);
	if (member->rank == 1) {
		child = fork();
		if (child == 0) {
			pause();
			_exit(0);
		}
		rank_close(&rank);
	} else {
		EXPECT(member, mesh_wait(&rank.mesh, lshard__deadline_ns(LONG_MS)) == LSHARD_OK, "%s", rank.error.text);
		EXPECT(member, rank.mesh.peers[1].gone, "rank 1 seems to be there");
	}
	EXPECT(member, team_barrier(member), "another rank failed");
	if (child > 0) {
		kill(child, SIGKILL);
		waitpid(child, NULL, 0);
	}
	rank_close(&rank);
	return 0;
failed:
	if (child > 0)
		kill(child, SIGKILL);
	rank_close(&rank);
	return 1;
}

static void a_child_does_not_keep_its_parent_in_the_group(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, leaves_a_child, NULL), 0);
}

/* ---- Descriptors ----------------------------------------------------------------------------------------------- */

/* Rank 0 gives up two rounds in which it had sent a descriptor; in the third both have one, and only that. */
static int gives_up_rounds(const struct member *member)
{
	struct rank rank;
	int fds[2] = {-1, -1};
	int before;

	EXPECT(member, rank_open(&rank, member, LONG_MS, NULL) == LSHARD_OK, "%s", rank.error.text);
	before = count_fds();
	for (uint64_t tag = 1; tag <= 2 && member->rank == 0; tag++)
		EXPECT(member,
		       mesh_swap(&rank.mesh, tag, STDERR_FILENO, fds, lshard__deadline_ns(20)) == LSHARD_ERR_TIMEOUT,
		       "%s", rank.error.text);
	EXPECT(member, team_barrier(member), "another rank failed");
	EXPECT(member, mesh_swap(&rank.mesh, 3, STDERR_FILENO, fds, lshard__deadline_ns(LONG_MS)) == LSHARD_OK, "%s",
	       rank.error.text);
	EXPECT(member, fds[member->rank] == -1 && fds[1 - member->rank] >= 0, "%d and %d", fds[0], fds[1]);
	close(fds[1 - member->rank]);
	EXPECT(member, count_fds() == before, "%d descriptors left", count_fds() - before);
	rank_close(&rank);
	return 0;
failed:
	rank_close(&rank);
	return 1;
}

static void a_round_that_was_given_up_leaves_no_descriptor(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, gives_up_rounds, NULL), 0);
}

/* A packet as ranks send them, so long or longer, with @p count descriptors. */
static bool send_packet(int socket, size_t bytes, uint64_t has_fd, size_t count)
{
	const uint64_t packet[4] = {1, has_fd, 0, 0}; /* the tag, then what it says of its descriptor */
	const int fds[3] = {STDERR_FILENO, STDERR_FILENO, STDERR_FILENO};
	_Alignas(struct cmsghdr) char room[CMSG_SPACE(sizeof fds)] = {0};
	struct cmsghdr *header = (struct cmsghdr *)room;
	struct iovec part = {(void *)(uintptr_t)packet, bytes};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

	if (count) {
		message.msg_control = room;
		message.msg_controllen = CMSG_SPACE(count * sizeof fds[0]);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(count * sizeof fds[0]);
		memcpy(CMSG_DATA(header), fds, count * sizeof fds[0]);
	}
	return sendmsg(socket, &message, MSG_NOSIGNAL) == (ssize_t)bytes;
}

/* What a packet of rank 1 may be that no rank sends, each with descriptors; then a swap as it should be. */
static int sends_too_much(const struct member *member)
{
	static const struct {
		size_t bytes;
		uint64_t has_fd;
		size_t count;
	} packets[] = {{1, 0, 1}, {7, 1, 2}, {32, 1, 1}, {32, 1, 3}, {16, 0, 1}, {16, 0, 2}, {16, 1, 2}, {16, 1, 3}};
	struct rank rank;
	int fds[2] = {-1, -1};
	int before;

	EXPECT(member, rank_open(&rank, member, LONG_MS, NULL) == LSHARD_OK, "%s", rank.error.text);
	before = count_fds();
	for (size_t i = 0; member->rank == 1 && i < sizeof packets / sizeof packets[0]; i++)
		EXPECT(member,
		       send_packet(rank.mesh.peers[0].fd, packets[i].bytes, packets[i].has_fd, packets[i].count),
		       "packet %zu", i);
	EXPECT(member, team_barrier(member), "another rank failed");
	if (member->rank == 0)
		EXPECT(member, mesh_wait(&rank.mesh, lshard__deadline_ns(LONG_MS)) == LSHARD_OK, "%s", rank.error.text);
	EXPECT(member, count_fds() == before, "%d descriptors left", count_fds() - before);
	EXPECT(member, !rank.mesh.peers[1 - member->rank].gone, "a packet ended the connection");
	EXPECT(member, team_barrier(member), "another rank failed");
	EXPECT(member, mesh_swap(&rank.mesh, 3, STDERR_FILENO, fds, lshard__deadline_ns(LONG_MS)) == LSHARD_OK, "%s",
	       rank.error.text);
	EXPECT(member, fds[1 - member->rank] >= 0, "no descriptor came");
	close(fds[1 - member->rank]);
	EXPECT(member, count_fds() == before, "%d descriptors left", count_fds() - before);
	rank_close(&rank);
	return 0;
failed:
	rank_close(&rank);
	return 1;
}

/* Rank 0 has given the round up before rank 1 comes to it: what that sends is not kept, as a shard lives as long. */
static int comes_too_late(const struct member *member)
{
	struct rank rank;
	int fds[2] = {-1, -1};
	int before;

	EXPECT(member, rank_open(&rank, member, LONG_MS, NULL) == LSHARD_OK, "%s", rank.error.text);
	before = count_fds();
	for (int32_t turn = 0; turn < 2; turn++) {
		if (turn == member->rank)
			EXPECT(member,
			       mesh_swap(&rank.mesh, 1, turn ? STDERR_FILENO : -1, fds, lshard__deadline_ns(20)) ==
				       (turn ? LSHARD_OK : LSHARD_ERR_TIMEOUT),
			       "%s", rank.error.text);
		EXPECT(member, team_barrier(member), "another rank failed");
	}
	if (member->rank == 0)
		EXPECT(member, mesh_wait(&rank.mesh, lshard__deadline_ns(LONG_MS)) == LSHARD_OK, "%s", rank.error.text);
	EXPECT(member, count_fds() == before, "%d descriptors left", count_fds() - before);
	EXPECT(member, team_barrier(member), "another rank failed");
	rank_close(&rank);
	return 0;
failed:
	rank_close(&rank);
	return 1;
}

static void what_comes_after_a_round_is_not_kept(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, comes_too_late, NULL), 0);
}

static void descriptors_that_nobody_asked_for_are_closed(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, sends_too_much, NULL), 0);
}

/* What the kernel delivers of a packet's descriptors: the linker leads the library's calls here. */
static bool withheld;

ssize_t __real_recvmsg(int fd, struct msghdr *message, int flags);
ssize_t __wrap_recvmsg(int fd, struct msghdr *message, int flags);

ssize_t __wrap_recvmsg(int fd, struct msghdr *message, int flags)
{
	if (withheld)
		message->msg_controllen = 0;
	return __real_recvmsg(fd, message, flags);
}

/* A packet with @p count descriptors arrives: why is there none here? */
static int lost_of(const int ends[2], size_t count)
{
	struct lshard__attached attached;
	char bytes[16];

	assert_true(send_packet(ends[0], sizeof bytes, 1, count));
	assert_int_equal(lshard__socket_take(ends[1], bytes, sizeof bytes, &attached), sizeof bytes);
	assert_int_equal(attached.descriptor, -1);
	return attached.lost;
}

static void why_no_descriptor_came_is_known(void **state)
{
	struct rlimit before, full;
	int ends[2];
	int next;

	(void)state;
	assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends), 0);
	assert_int_equal(lost_of(ends, 0), 0);
	assert_int_equal(lost_of(ends, 3), 0); /* they came, and are none of ours */
	assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
	next = dup(ends[0]);
	close(next);
	full = (struct rlimit){(rlim_t)next, before.rlim_max};
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &full), 0);
	assert_int_equal(lost_of(ends, 1), EMFILE);
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
	withheld = true;
	assert_int_equal(lost_of(ends, 1), EACCES);
	withheld = false;
	close(ends[0]);
	close(ends[1]);
}

/* Rank 1's descriptor does not come to rank 0, whose limits are not reached. */
static int misses_a_descriptor(const struct member *member)
{
	struct rank rank;
	int fds[2] = {-1, -1};
	lshard_status status;

	EXPECT(member, rank_open(&rank, member, LONG_MS, NULL) == LSHARD_OK, "%s", rank.error.text);
	withheld = member->rank == 0;
	status = mesh_swap(&rank.mesh, 1, member->rank ? STDERR_FILENO : -1, fds, lshard__deadline_ns(LONG_MS));
	EXPECT(member, status == (member->rank ? LSHARD_OK : LSHARD_ERR_SYSTEM), "%s", rank.error.text);
	EXPECT(member, member->rank || strstr(rank.error.text, "withheld the descriptor that rank 1 shares"), "%s",
	       rank.error.text);
	EXPECT(member, !strstr(rank.error.text, "RLIMIT"), "%s", rank.error.text);
	EXPECT(member, team_barrier(member), "another rank failed");
	rank_close(&rank);
	return 0;
failed:
	rank_close(&rank);
	return 1;
}

static void no_limit_is_blamed_that_is_not_reached(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, misses_a_descriptor, NULL), 0);
}

/* Nothing but the swaps themselves keeps the ranks together: the faster one is a round ahead now and then. */
static int swaps_on(const struct member *member)
{
	struct rank rank;
	int fds[3] = {-1, -1, -1};
	const int before = count_fds();

	EXPECT(member, rank_open(&rank, member, LONG_MS, NULL) == LSHARD_OK, "%s", rank.error.text);
	for (uint64_t tag = 1; tag <= 3000; tag++) {
		const int mine = (tag + (uint64_t)member->rank) % 3 ? -1 : STDERR_FILENO;

		EXPECT(member, mesh_swap(&rank.mesh, tag, mine, fds, lshard__deadline_ns(LONG_MS)) == LSHARD_OK, "%s",
		       rank.error.text);
		for (int32_t other = 0; other < member->size; other++) {
			const int wanted = other != member->rank && (tag + (uint64_t)other) % 3 == 0;

			EXPECT(member, (fds[other] >= 0) == wanted, "round %d, rank %d: descriptor %d", (int)tag,
			       (int)other, fds[other]);
			if (fds[other] >= 0)
				close(fds[other]);
		}
	}
	EXPECT(member, team_barrier(member), "another rank failed");
	rank_close(&rank);
	EXPECT(member, count_fds() == before, "%d descriptors left", count_fds() - before);
	return 0;
failed:
	rank_close(&rank);
	return 1;
}

static void a_peer_may_be_a_round_ahead(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, swaps_on, NULL), 0);
}

/* A rank that has come back waits for what this one has just decided, and this one has not looked for it since. */
static void who_has_come_back_is_nudged(void **state)
{
	const struct member member = {.rank = 0, .size = 2, .job = "comes back"};
	lshard_context context = context_for_member(&member, "", LONG_MS);
	lshard_error error = {""};
	struct mesh mesh;
	int ends[2];
	char nudge;

	(void)state;
	context.rejoin = 1;
	assert_int_equal(mesh_open_alone(&mesh, &context, &error), LSHARD_OK);
	assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
	mesh_admit(&mesh, 1, (struct arrival){.fd = ends[0], .process = -1, .incarnation = 1});
	mesh_nudge(&mesh);
	assert_int_equal(recv(ends[1], &nudge, 1, MSG_DONTWAIT), 1);
	mesh_close(&mesh);
	assert_int_equal(recv(ends[1], &nudge, 1, MSG_DONTWAIT), 0);
	close(ends[1]);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(silent_connections_stop_nobody),
		cmocka_unit_test(only_a_rank_that_does_not_come_is_named),
		cmocka_unit_test(another_build_is_named),
		cmocka_unit_test(another_user_is_no_rank),
		cmocka_unit_test(the_same_user_is_no_rank_without_the_secret),
		cmocka_unit_test(a_child_does_not_keep_its_parent_in_the_group),
		cmocka_unit_test(a_round_that_was_given_up_leaves_no_descriptor),
		cmocka_unit_test(what_comes_after_a_round_is_not_kept),
		cmocka_unit_test(descriptors_that_nobody_asked_for_are_closed),
		cmocka_unit_test(why_no_descriptor_came_is_known),
		cmocka_unit_test(no_limit_is_blamed_that_is_not_reached),
		cmocka_unit_test(a_peer_may_be_a_round_ahead),
		cmocka_unit_test(who_has_come_back_is_nudged),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
