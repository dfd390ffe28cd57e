/* SPDX-License-Identifier: Apache-2.0
 *
 * threads.c - ranks for tests as threads or forked processes. The team lies in memory that forked processes share; a
 * body that returns breaks the barrier for those who would wait for it, so no test hangs on another rank's failure.
 */
#include "threads.h"

#include "patience.h"

#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct team {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	int32_t size;
	int32_t present; /* in the barrier now */
	int32_t here;    /* have not left */
	unsigned round;
	char job[48];
	const void **offers; /* [size], threads only */
	bool dying[];
};

struct launch {
	struct member member;
	lshard_bootstrap bootstrap;
	member_body body;
	int failed;
};

static size_t team_bytes(int32_t size)
{
	return sizeof(struct team) + (size_t)size * sizeof(bool);
}

static struct team *team_open(int32_t size)
{
	struct team *team = mmap(NULL, team_bytes(size), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pthread_mutexattr_t lock;
	pthread_condattr_t changed;

	if (team == MAP_FAILED)
		abort();
	pthread_mutexattr_init(&lock);
	pthread_mutexattr_setpshared(&lock, PTHREAD_PROCESS_SHARED);
	pthread_mutex_init(&team->lock, &lock);
	pthread_mutexattr_destroy(&lock);
	pthread_condattr_init(&changed);
	pthread_condattr_setpshared(&changed, PTHREAD_PROCESS_SHARED);
	pthread_condattr_setclock(&changed, CLOCK_MONOTONIC);
	pthread_cond_init(&team->changed, &changed);
	pthread_condattr_destroy(&changed);
	team->size = team->here = size;
	return team;
}

static void team_close(struct team *team)
{
	pthread_cond_destroy(&team->changed);
	pthread_mutex_destroy(&team->lock);
	munmap(team, team_bytes(team->size));
}

lshard_group_options member_options(const struct member *member, const char *transport, uint32_t timeout_ms)
{
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;

	options.rank = member->rank;
	options.size = member->size;
	options.transport = transport;
	options.job = member->job;
	options.bootstrap = member->bootstrap;
	options.timeout_ms = timeout_ms;
	return options;
}

bool team_barrier(const struct member *member)
{
	struct team *team = member->team;
	struct timespec deadline;
	unsigned round;
	bool met;
	int waited = 0;

	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_sec += LONG_MS / 1000;
	pthread_mutex_lock(&team->lock);
	round = team->round;
	if (++team->present == team->size) {
		team->present = 0;
		team->round++;
		pthread_cond_broadcast(&team->changed);
	}
	while (team->round == round && team->here == team->size && waited == 0)
		waited = pthread_cond_timedwait(&team->changed, &team->lock, &deadline);
	met = team->round != round;
	if (!met)
		team->present--;
	pthread_mutex_unlock(&team->lock);
	return met;
}

static void member_leaves(const struct member *member)
{
	pthread_mutex_lock(&member->team->lock);
	member->team->here--;
	pthread_cond_broadcast(&member->team->changed);
	pthread_mutex_unlock(&member->team->lock);
}

void team_dies(const struct member *member)
{
	member->team->dying[member->rank] = true;
	member_leaves(member);
}

/* Two barriers: offers stay in place until all have copied them. */
static int allgather(void *user, const void *send, void *receive, size_t bytes)
{
	const struct member *member = user;
	struct team *team = member->team;

	team->offers[member->rank] = send;
	if (!team_barrier(member))
		return 1;
	for (int32_t rank = 0; rank < team->size; rank++)
		memcpy((char *)receive + (size_t)rank * bytes, team->offers[rank], bytes);
	return team_barrier(member) ? 0 : 1;
}

static void *thread_main(void *argument)
{
	struct launch *launch = argument;

	launch->failed = launch->body(&launch->member) != 0;
	member_leaves(&launch->member);
	return NULL;
}

int team_of_threads(int32_t size, member_body body, void *user)
{
	struct team *team = team_open(size);
	struct launch *launches = calloc((size_t)size, sizeof *launches);
	pthread_t *threads = calloc((size_t)size, sizeof *threads);
	int failures = 0;

	team->offers = calloc((size_t)size, sizeof *team->offers);
	if (!launches || !threads || !team->offers)
		abort();
	for (int32_t rank = 0; rank < size; rank++) {
		struct launch *launch = &launches[rank];

		launch->bootstrap = (lshard_bootstrap){sizeof launch->bootstrap, allgather, &launch->member};
		launch->member = (struct member){team, rank, size, &launch->bootstrap, NULL, user};
		launch->body = body;
		if (pthread_create(&threads[rank], NULL, thread_main, launch) != 0)
			abort();
	}
	for (int32_t rank = 0; rank < size; rank++) {
		pthread_join(threads[rank], NULL);
		failures += launches[rank].failed;
	}
	free(team->offers);
	free(threads);
	free(launches);
	team_close(team);
	return failures;
}

static _Noreturn void process_main(struct team *team, int32_t rank, member_body body, void *user)
{
	struct member member = {team, rank, team->size, NULL, team->job, user};
	int failed = body(&member) != 0;

	member_leaves(&member);
	fflush(NULL);
	exit(failed);
}

static bool process_failed(const struct team *team, int32_t rank, pid_t process)
{
	int status = 0;

	if (waitpid(process, &status, 0) != process)
		return true;
	if (WIFSIGNALED(status) && !team->dying[rank])
		fprintf(stderr, "rank %d of %d died by signal %d\n", (int)rank, (int)team->size, WTERMSIG(status));
	return !team->dying[rank] && !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int team_of_processes(int32_t size, member_body body, void *user)
{
	struct team *team = team_open(size);
	pid_t *processes = calloc((size_t)size, sizeof *processes);
	struct timespec now;
	int failures = 0;

	if (!processes)
		abort();
	clock_gettime(CLOCK_MONOTONIC, &now);
	snprintf(team->job, sizeof team->job, "test-%ld-%lld-%ld", (long)getpid(), (long long)now.tv_sec, now.tv_nsec);
	fflush(NULL);
	for (int32_t rank = 0; rank < size; rank++) {
		processes[rank] = fork();
		if (processes[rank] < 0)
			abort();
		if (processes[rank] == 0) {
			free(processes);
			process_main(team, rank, body, user);
		}
	}
	for (int32_t rank = 0; rank < size; rank++)
		failures += process_failed(team, rank, processes[rank]);
	free(processes);
	team_close(team);
	return failures;
}

int team_run(const char *kind, int32_t size, member_body body, void *user)
{
	return strcmp(kind, "forks") == 0 ? team_of_processes(size, body, user) : team_of_threads(size, body, user);
}

/* ---- What threads there are ---- */

/* A line of a thread's file in /proc that begins with @p key; false where there is none. */
static bool task_line(const char *task, const char *file, const char *key, char *line, int bytes)
{
	char path[320];
	FILE *opened;
	bool found = false;

	snprintf(path, sizeof path, "/proc/self/task/%s/%s", task, file);
	opened = fopen(path, "r");
	while (opened && !found && fgets(line, bytes, opened))
		found = strncmp(line, key, strlen(key)) == 0;
	if (opened)
		fclose(opened);
	return found;
}

/* Signals that a program handles; a thread of the library's blocks them all. */
static bool lets_signals_in(const char *task)
{
	static const int signals[] = {SIGHUP, SIGINT, SIGUSR1, SIGUSR2, SIGALRM, SIGTERM, SIGCHLD, SIGPROF};
	char line[128];
	unsigned long long blocked;

	if (!task_line(task, "status", "SigBlk:", line, sizeof line))
		return true;
	blocked = strtoull(line + strlen("SigBlk:"), NULL, 16);
	for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++)
		if (!(blocked >> (signals[i] - 1) & 1))
			return true;
	return false;
}

int threads_named(const char *name, int *open)
{
	DIR *tasks = opendir("/proc/self/task");
	const struct dirent *task;
	char line[64];
	int count = 0;

	*open = 0;
	while (tasks && (task = readdir(tasks))) {
		if (task->d_name[0] == '.' || !task_line(task->d_name, "comm", name, line, sizeof line))
			continue;
		count++;
		*open += lets_signals_in(task->d_name);
	}
	if (tasks)
		closedir(tasks);
	return count;
}

int count_fds(void)
{
	DIR *directory = opendir("/proc/self/fd");
	int count = 0;

	while (directory && readdir(directory))
		count++;
	if (directory)
		closedir(directory);
	return count;
}
