/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_calls_pair.c - two processes on the `shm` transport: this one is rank 0, a forked one rank 1; they connect by
 * a job of their own. Rank 1 only keeps its shard until rank 0 closes the pipe. Knows: the public header, fork. Does
 * not know: how calls are timed.
 */
#include "bench_calls.h"
#include "cli.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static bool open_series(struct calls_pair *pair, unsigned count, char *failure, size_t failure_bytes)
{
	const lshard_tensor tensor = {"weight", CALLS_LAYER_BYTES, 0, LSHARD_STRIPE_BYTES, 0, 0};
	uint64_t bytes = CALLS_LAYER_BYTES;
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;
	char name[32];

	snprintf(name, sizeof name, "direct-%u", calls_counts[count]);
	options.name = name;
	options.layer_count = calls_counts[count];
	options.tensors = &tensor;
	options.tensor_count = 1;
	if (lshard_series_create(pair->group, &options, &pair->series[count]) != LSHARD_OK) {
		snprintf(failure, failure_bytes, "%s", lshard_group_error(pair->group));
		return false;
	}
	if (lshard_series_commit(pair->series[count], bench_post_process, &bytes) != LSHARD_OK) {
		snprintf(failure, failure_bytes, "%s", lshard_series_error(pair->series[count]));
		return false;
	}
	return true;
}

static bool open_rank(struct calls_pair *pair, int32_t rank, char *failure, size_t failure_bytes)
{
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;

	options.rank = rank;
	options.size = 2;
	options.transport = "shm";
	options.job = pair->job;
	options.error = failure;
	options.error_bytes = failure_bytes;
	if (lshard_group_create(&options, &pair->group) != LSHARD_OK)
		return false;
	for (unsigned count = 0; count < CALLS_COUNTS; count++)
		if (!open_series(pair, count, failure, failure_bytes))
			return false;
	return true;
}

static bool close_rank(struct calls_pair *pair, int32_t rank)
{
	char error[512];

	for (unsigned count = 0; count < CALLS_COUNTS; count++)
		lshard_series_destroy(pair->series[count]);
	if (cli_group_leave(pair->group, error, sizeof error) >= 0)
		return true;
	cli_message("calls: rank %d: %s", (int)rank, error);
	return false;
}

/* Rank 1, in the child: it ends with its parent, however that ends. */
static void child_main(struct calls_pair *pair, pid_t parent)
{
	char failure[512] = "";
	char nothing;
	bool good;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(CLI_FAILED);
	good = open_rank(pair, 1, failure, sizeof failure);
	if (good)
		while (read(pair->pipe, &nothing, 1) < 0 && errno == EINTR) {
		} /* until rank 0 closes its end */
	else
		cli_message("calls: rank 1: %s", failure);
	good = close_rank(pair, 1) && good;
	close(pair->pipe);
	_exit(good ? CLI_DONE : CLI_FAILED);
}

bool calls_pair_open(struct calls_pair *pair, char *failure, size_t failure_bytes)
{
	const pid_t parent = getpid();
	int ends[2];

	memset(pair, 0, sizeof *pair);
	snprintf(pair->job, sizeof pair->job, "bench-calls-%ld", (long)parent);
	if (pipe2(ends, O_CLOEXEC) != 0) {
		snprintf(failure, failure_bytes, "no pipe: %s", strerror(errno));
		return false;
	}
	pair->child = fork();
	if (pair->child < 0) {
		snprintf(failure, failure_bytes, "no second process: %s", strerror(errno));
		close(ends[0]);
		close(ends[1]);
		return false;
	}
	pair->pipe = ends[pair->child == 0 ? 0 : 1];
	close(ends[pair->child == 0 ? 1 : 0]);
	if (pair->child == 0)
		child_main(pair, parent);
	if (open_rank(pair, 0, failure, failure_bytes))
		return true;
	calls_pair_close(pair);
	return false;
}

bool calls_pair_close(struct calls_pair *pair)
{
	const bool good = close_rank(pair, 0);
	int state = 0;

	close(pair->pipe);
	while (waitpid(pair->child, &state, 0) < 0 && errno == EINTR) {
	}
	return good && WIFEXITED(state) && WEXITSTATUS(state) == 0;
}
