/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_ranks.c - see bench_ranks.h.
 */
#include "bench_ranks.h"
#include "workers.h"

#include <errno.h>
#include <linux/futex.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LONGEST_S 120 /* that a rank may take until a barrier: loading, or a sample */
#define GRACE_S   10  /* for a rank to end after another's failure */

void *bench_shared_allocate(uint64_t bytes)
{
	void *memory = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	return memory == MAP_FAILED ? NULL : memory;
}

void bench_shared_free(void *memory, uint64_t bytes)
{
	if (memory)
		munmap(memory, (size_t)bytes);
}

/* ---- The barrier --------------------------------------------------------------------------------------------- */

static double now_s(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* Sleeps while *word is @p value, at most a tenth of a second. */
static void sleep_while(atomic_uint *word, unsigned value)
{
	const struct timespec most = {0, 100000000};

	syscall(SYS_futex, word, FUTEX_WAIT, value, &most, NULL, 0);
}

static void wake_all(atomic_uint *word)
{
	syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

bool bench_ranks_broken(struct bench_ranks *ranks)
{
	return atomic_load(&ranks->broken) != 0;
}

bool bench_ranks_fail(struct bench_ranks *ranks, const char *format, ...)
{
	va_list arguments;

	if (atomic_exchange(&ranks->claimed, 1) != 0)
		return false;
	va_start(arguments, format);
	vsnprintf(ranks->failure, sizeof ranks->failure, format, arguments);
	va_end(arguments);
	atomic_store(&ranks->broken, 1);
	wake_all(&ranks->barriers);
	return false;
}

bool bench_ranks_barrier(struct bench_ranks *ranks, int32_t rank)
{
	const unsigned barrier = atomic_load(&ranks->barriers);
	const double deadline = now_s() + LONGEST_S;

	if (atomic_fetch_add(&ranks->arrived, 1) + 1 == (unsigned)ranks->size) {
		atomic_store(&ranks->arrived, 0);
		atomic_fetch_add(&ranks->barriers, 1);
		wake_all(&ranks->barriers);
	}
	while (atomic_load(&ranks->barriers) == barrier && !bench_ranks_broken(ranks)) {
		sleep_while(&ranks->barriers, barrier);
		if (now_s() > deadline)
			return bench_ranks_fail(ranks, "rank %d has waited %d s for the others", (int)rank, LONGEST_S);
	}
	return !bench_ranks_broken(ranks);
}

/* ---- Processes ----------------------------------------------------------------------------------------------- */

/* Does not return. What the parent has not printed yet is not printed here. */
static void be_rank(void (*body)(void *user, int32_t rank), void *user, int32_t rank, pid_t parent)
{
	if (process_dies_with(parent))
		body(user, rank);
	_exit(0);
}

static int32_t start(struct bench_ranks *ranks, void (*body)(void *user, int32_t rank), void *user, pid_t *pids)
{
	const pid_t parent = getpid();
	int32_t started = 0;

	fflush(NULL);
	for (; started < ranks->size; started++) {
		pids[started] = fork();
		if (pids[started] == 0)
			be_rank(body, user, started, parent);
		if (pids[started] < 0) {
			bench_ranks_fail(ranks, "no process for rank %d: %s", (int)started, strerror(errno));
			break;
		}
	}
	return started;
}

/* True once it has ended; how, if badly, breaks the barrier. */
static bool has_ended(struct bench_ranks *ranks, int32_t rank, pid_t pid)
{
	int status = 0;

	if (waitpid(pid, &status, WNOHANG) != pid)
		return false;
	if (WIFSIGNALED(status))
		bench_ranks_fail(ranks, "rank %d was ended by signal %d (%s)", (int)rank, WTERMSIG(status),
				 strsignal(WTERMSIG(status)));
	else if (WEXITSTATUS(status) != 0)
		bench_ranks_fail(ranks, "rank %d ended with status %d", (int)rank, WEXITSTATUS(status));
	if (status != 0)
		atomic_store(&ranks->broken, 1); /* also if it died while it wrote why */
	return true;
}

static void await_all(struct bench_ranks *ranks, pid_t *pids, int32_t count)
{
	double broken_since = 0;
	int32_t left = count;

	while (left > 0) {
		const unsigned barrier = atomic_load(&ranks->barriers);

		for (int32_t rank = 0; rank < count; rank++)
			if (pids[rank] > 0 && has_ended(ranks, rank, pids[rank])) {
				pids[rank] = 0;
				left--;
			}
		if (bench_ranks_broken(ranks) && broken_since <= 0)
			broken_since = now_s();
		for (int32_t rank = 0; broken_since > 0 && now_s() > broken_since + GRACE_S && rank < count; rank++)
			if (pids[rank] > 0)
				kill(pids[rank], SIGKILL);
		if (left > 0)
			sleep_while(&ranks->barriers, barrier);
	}
}

bool bench_ranks_run(struct bench_ranks *ranks, int32_t size, void (*body)(void *user, int32_t rank), void *user)
{
	pid_t *pids = calloc((size_t)size, sizeof *pids);

	ranks->size = size;
	if (!pids)
		return bench_ranks_fail(ranks, "no memory for %d ranks", (int)size);
	await_all(ranks, pids, start(ranks, body, user, pids));
	free(pids);
	return !bench_ranks_broken(ranks);
}
