/* SPDX-License-Identifier: Apache-2.0
 *
 * steady_syscalls.c - zero-copy `shm` in steady use: reach and wait make no system call and copy nothing.
 *
 * Two processes share a series. After a few passes the reading one forbids itself every system call by a seccomp filter
 * and goes on for 10000 layers: the kernel kills it at the first one. That the filter does kill is shown first. No
 * clock, no tracer.
 */
#include <layershard/layershard.h>

#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define LAYERS        30u
#define STEADY_LAYERS 10000u
#define LAYER_BYTES   65536u
#define SKIPPED       77

/* Exit codes of the processes. */
enum { GOOD = 0, BAD = 1, NO_FILTER = SKIPPED };

/* write and exit_group only, to tell the result and end. */
static int forbid_system_calls(void)
{
	struct sock_filter rules[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (unsigned)offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_write, 2, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof rules / sizeof *rules, rules};

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
		return -1;
	return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

static int tell(const char *text)
{
	const ssize_t written = write(STDERR_FILENO, text, strlen(text));

	(void)written; /* the exit code says it too */
	return BAD;
}

static unsigned char byte_of(uint32_t layer, size_t index)
{
	return (unsigned char)((layer * 31u + index * 7u + (index >> 8)) & 0xff);
}

static int fill_layer(void *user, uint32_t layer, void *const *tensors)
{
	unsigned char *bytes = tensors[0];

	(void)user;
	for (size_t index = 0; index < LAYER_BYTES; index++)
		bytes[index] = byte_of(layer, index);
	return 0;
}

/* ---- The rank that reads ------------------------------------------------------------------------------------- */

static int pass_over(lshard_series *series, uint32_t layers)
{
	for (uint32_t i = 0; i < layers; i++) {
		const uint32_t layer = i % LAYERS;
		const size_t index = (i * 257u) % LAYER_BYTES;
		void *address;

		if (lshard_reach(series, layer, NULL) != LSHARD_OK || lshard_wait(series, layer, NULL) != LSHARD_OK ||
		    lshard_series_address(series, layer, 0, &address) != LSHARD_OK)
			return tell("reach, wait or address failed\n");
		if (((const unsigned char *)address)[index] != byte_of(layer, index))
			return tell("wrong bits\n");
	}
	return GOOD;
}

static int read_without_calls(lshard_series *series)
{
	lshard_stats stats = LSHARD_STATS_INIT;

	if (pass_over(series, 3 * LAYERS) != GOOD)
		return BAD;
	if (forbid_system_calls() != 0)
		return NO_FILTER;
	if (pass_over(series, STEADY_LAYERS) != GOOD)
		return BAD;
	if (lshard_series_stats(series, &stats) != LSHARD_OK)
		return tell("no statistics\n");
	if (stats.waits < STEADY_LAYERS)
		return tell("waits were not counted\n");
	if (stats.fetches != 0 || stats.fetched_bytes != 0 || stats.window_bytes != 0)
		return tell("something was copied, or there is a window\n");
	return GOOD;
}

/* ---- Two ranks ----------------------------------------------------------------------------------------------- */

static int open_rank(int32_t rank, const char *job, lshard_placement placement, lshard_group **group,
		     lshard_series **series)
{
	const lshard_tensor tensor = {"weight", LAYER_BYTES, 0, LSHARD_STRIPE_BYTES, 0, 0};
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;
	lshard_group_options group_options = LSHARD_GROUP_OPTIONS_INIT;
	char error[512] = "";

	group_options.rank = rank;
	group_options.size = 2;
	group_options.transport = "shm";
	group_options.job = job;
	group_options.error = error;
	group_options.error_bytes = sizeof error;
	if (lshard_group_create(&group_options, group) != LSHARD_OK) {
		fprintf(stderr, "rank %d: %s\n", rank, error);
		return BAD;
	}
	options.name = "steady";
	options.layer_count = LAYERS;
	options.tensors = &tensor;
	options.tensor_count = 1;
	options.placement = placement;
	if (lshard_series_create(*group, &options, series) != LSHARD_OK) {
		fprintf(stderr, "rank %d: %s\n", rank, lshard_group_error(*group));
		return BAD;
	}
	if (lshard_series_commit(*series, fill_layer, NULL) != LSHARD_OK) {
		fprintf(stderr, "rank %d: %s\n", rank, lshard_series_error(*series));
		return BAD;
	}
	return GOOD;
}

/* _exit: the reader may do nothing else any more, and what it leaves open the kernel closes. */
static void reader_main(const char *job, lshard_placement placement)
{
	lshard_group *group = NULL;
	lshard_series *series = NULL;
	int code = open_rank(1, job, placement, &group, &series);

	_exit(code == GOOD ? read_without_calls(series) : code);
}

static int wait_for(pid_t child, int *state)
{
	pid_t ended;

	do
		ended = waitpid(child, state, 0);
	while (ended < 0 && errno == EINTR);
	return ended == child ? GOOD : BAD;
}

/* What the reader's end says. */
static int evaluate(int state, const char *what)
{
	if (WIFEXITED(state) && WEXITSTATUS(state) == NO_FILTER) {
		printf("skipped: seccomp filters are not allowed here\n");
		return SKIPPED;
	}
	if (WIFSIGNALED(state) && WTERMSIG(state) == SIGSYS)
		fprintf(stderr, "%s: reach or wait made a system call\n", what);
	else if (WIFSIGNALED(state))
		fprintf(stderr, "%s: killed by signal %d\n", what, WTERMSIG(state));
	return WIFEXITED(state) && WEXITSTATUS(state) == GOOD ? GOOD : BAD;
}

static int check_placement(lshard_placement placement, const char *what)
{
	lshard_group *group = NULL;
	lshard_series *series = NULL;
	char job[64];
	pid_t child;
	int state = 0;
	int code;

	snprintf(job, sizeof job, "steady-%ld-%s", (long)getpid(), what);
	fflush(NULL);
	child = fork();
	if (child == 0)
		reader_main(job, placement);
	if (child < 0)
		return BAD;
	code = open_rank(0, job, placement, &group, &series);
	if (wait_for(child, &state) != GOOD)
		code = BAD;
	if (code == GOOD)
		code = evaluate(state, what);
	lshard_series_destroy(series);
	lshard_group_destroy(group);
	if (code != SKIPPED)
		printf("%s: %s\n", what, code == GOOD ? "no system call, no copy, right bits" : "FAILED");
	return code;
}

/* A process that makes a system call behind the filter must die of it; else this test could not fail. */
static int check_filter(void)
{
	const pid_t child = fork();
	int state = 0;

	if (child == 0) {
		if (forbid_system_calls() != 0)
			_exit(NO_FILTER);
		syscall(SYS_getppid);
		_exit(GOOD);
	}
	if (child < 0 || wait_for(child, &state) != GOOD)
		return BAD;
	if (WIFSIGNALED(state) && WTERMSIG(state) == SIGSYS)
		return GOOD;
	return evaluate(state, "filter") == SKIPPED ? SKIPPED : BAD;
}

int main(void)
{
	int code = check_filter();

	if (code == BAD)
		fprintf(stderr, "the filter does not stop a system call\n");
	if (code == GOOD)
		code = check_placement(LSHARD_WHOLE, "whole");
	if (code == GOOD)
		code = check_placement(LSHARD_STRIPED, "striped");
	return code;
}
