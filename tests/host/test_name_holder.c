/* SPDX-License-Identifier: Apache-2.0
 *
 * test_name_holder.c - names that somebody sits on: who is told to the ranks that find nobody, whether it only has the
 * name, lets nobody in, or has it from a rank 0 that has ended.
 */
#include "job_ranks.h"
#include "outside.h"
#include "patience.h"
#include "sockets.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#define SHORT_MS 700u

/* ---- Names that somebody sits on --------------------------------------------------------------------------------- */

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

/* Ranks 0 and 1 of two do not find each other, and each says so. */
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
		end_child(child);
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
	end_child(child);
}

/* ---- What a rank 0 leaves to a child ----------------------------------------------------------------------------- */

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
	assert_int_equal(team_of_processes(3, gather_as_left, job), 0);
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

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(who_sits_on_a_name_is_named),
		cmocka_unit_test(who_has_a_name_of_another_type_is_not_to_blame),
		cmocka_unit_test(a_child_that_has_a_dead_ranks_name_is_named),
		in_a_folder(what_a_dead_rank_left_to_a_child_is_replaced),
		cmocka_unit_test(ranks_that_have_met_sit_on_no_name),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
