/* SPDX-License-Identifier: Apache-2.0
 *
 * job_ranks.c - see job_ranks.h.
 */
#include "job_ranks.h"
#include "outside.h"
#include "patience.h"
#include "sockets.h"
#include "text_hash.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <dirent.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

const char *job_of(const struct member *member)
{
	return member->job ? member->job : member->user;
}

bool job_rank_open(struct job_rank *rank, const struct member *member)
{
	lshard_error error = {""};

	*rank = (struct job_rank){.context = context_for_member(member, "", LONG_MS)};
	EXPECT(member,
	       lshard__rendezvous_open(&rank->context, job_of(member), &rank->rendezvous, &rank->bootstrap, &error) ==
		       LSHARD_OK,
	       "%s", error.text);
	return true;
failed:
	return false;
}

int come_and_gather(const struct member *member)
{
	struct job_rank self;
	uint32_t mine[5];
	uint32_t all[8][5];

	EXPECT(member, job_rank_open(&self, member), "open");
	for (uint32_t round = 0; round < 200; round++) {
		for (uint32_t i = 0; i < 5; i++)
			mine[i] = round * 1000 + (uint32_t)member->rank * 10 + i;
		EXPECT(member, self.bootstrap.allgather(self.bootstrap.user, mine, all, sizeof mine) == 0, "%s",
		       lshard__rendezvous_error(self.rendezvous)->text);
		for (uint32_t i = 0; i < (uint32_t)member->size * 5; i++)
			EXPECT(member, all[i / 5][i % 5] == round * 1000 + i / 5 * 10 + i % 5, "round %u: %u", round,
			       all[i / 5][i % 5]);
	}
	lshard__rendezvous_close(self.rendezvous);
	return 0;
failed:
	lshard__rendezvous_close(self.rendezvous);
	return 1;
}

int gather_once(const struct member *member)
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

int gather_as_left(const struct member *member)
{
	struct member named = *member;

	named.job = member->user;
	return gather_once(&named);
}

int opens_badly(const struct member *member, int32_t rank, int32_t size, uint32_t timeout_ms,
		const struct failure *expected)
{
	lshard_context context = context_for_member(member, "", timeout_ms);
	lshard__rendezvous *rendezvous = NULL;
	lshard_bootstrap bootstrap = LSHARD_BOOTSTRAP_INIT;
	lshard_error error = {""};
	const char *says = rank ? expected->member_says : expected->root_says;
	int before = count_fds();
	lshard_status status;

	context.rank = rank;
	context.size = size;
	status = lshard__rendezvous_open(&context, member->job, &rendezvous, &bootstrap, &error);
	EXPECT(member, status == expected->status, "status %d: %s", (int)status, error.text);
	EXPECT(member, strstr(error.text, says) != NULL, "'%s' lacks '%s'", error.text, says);
	EXPECT(member, !rendezvous && !bootstrap.allgather, "an out-parameter was written");
	EXPECT(member, count_fds() == before, "%d descriptors left", count_fds() - before);
	return 0;
failed:
	lshard__rendezvous_close(rendezvous);
	return 1;
}

bool find_listener(const char *job, char *name, size_t bytes)
{
	char line[512];

	for (int tries = 0; tries < 10000; tries++) {
		FILE *sockets = fopen("/proc/net/unix", "re");
		bool found = false;

		while (sockets && !found && fgets(line, sizeof line, sockets)) {
			const char *at = strstr(line, "@layershard/");

			line[strcspn(line, "\n")] = '\0';
			found = at && strstr(at, job) && strstr(line, " 00010000 "); /* in the flags: it listens */
			if (found)
				snprintf(name, bytes, "%s", at + 1);
		}
		if (sockets)
			fclose(sockets);
		if (found)
			return true;
		usleep(1000);
	}
	return false;
}

int connect_to(const char *name)
{
	int fd = -1;

	return lshard__socket_connect(name, SOCK_STREAM, lshard__deadline_ns(LONG_MS), &fd) == LSHARD_OK ? fd : -1;
}

void end_child(pid_t child)
{
	if (child <= 0)
		return;
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
}

const char *own_job(void)
{
	static char job[32];

	if (!*job)
		snprintf(job, sizeof job, "own-%ld", (long)getpid());
	return job;
}

void name_of(const char *job, char *name, size_t bytes)
{
	snprintf(name, bytes, "layershard/%lu/%016llx/%.40s", (unsigned long)geteuid(),
		 (unsigned long long)lshard__text_hash(job), job);
}

int make_folder(void **state)
{
	static struct folder folder;

	snprintf(folder.path, sizeof folder.path, "/tmp/layershard-job-XXXXXX");
	*state = &folder;
	if (!mkdtemp(folder.path) || setenv(VARIABLE, folder.path, 1))
		return -1;
	return 0;
}

int remove_folder(void **state)
{
	const struct folder *folder = *state;
	char command[300];

	unsetenv(VARIABLE);
	snprintf(command, sizeof command, "rm -rf '%s'", folder->path);
	return system(command);
}

int count_files(const char *path)
{
	DIR *directory = opendir(path);
	int count = -2; /* "." and ".." */

	while (directory && readdir(directory))
		count++;
	if (directory)
		closedir(directory);
	return count;
}

void open_place(struct lshard__place *place, bool killed)
{
	lshard_error error = {""};

	if (lshard__place_open(place, "listens", &error) != LSHARD_OK)
		fail_msg("%s", error.text);
	if (killed)
		assert_int_equal(close(lshard__socket_listen(place->name, SOCK_STREAM)), 0);
}
