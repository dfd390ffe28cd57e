/* SPDX-License-Identifier: Apache-2.0
 *
 * workers.c - see workers.h.
 */
#include "workers.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- Signals ----------------------------------------------------------------------------------------------------- */

static const int ending_signals[WORKERS_SIGNALS] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE};

/* A signal has no argument to carry it. Set while there are workers to end. */
static struct workers *volatile signalled;

static void block_signals(sigset_t *before)
{
	sigset_t signals;

	(void)sigemptyset(&signals);
	for (size_t i = 0; i < WORKERS_SIGNALS; i++)
		(void)sigaddset(&signals, ending_signals[i]);
	(void)pthread_sigmask(SIG_BLOCK, &signals, before);
}

/*
 * Ends this process as the signal would have, once its processes are ended and reaped; threads end with it. A
 * handler, not a part of a loop that listens: that may be held up by a reader of stdout who does not read.
 */
static void obey_signal(int number)
{
	const struct workers *workers = signalled;

	for (uint32_t i = 0; workers && !workers->threads && i < workers->count; i++) {
		const struct worker *worker = &workers->items[i];

		if (worker->started && !worker->gone && kill(worker->pid, SIGKILL) == 0)
			(void)waitpid(worker->pid, NULL, 0);
	}
	(void)signal(number, SIG_DFL);
	(void)raise(number); /* comes when this handler returns */
}

/* What is ignored (nohup) stays ignored. */
static void watch_signals(struct workers *workers)
{
	struct sigaction action;

	memset(&action, 0, sizeof action);
	action.sa_handler = obey_signal;
	signalled = workers;
	for (size_t i = 0; i < WORKERS_SIGNALS; i++) {
		(void)sigaction(ending_signals[i], NULL, &workers->old_actions[i]);
		if (workers->old_actions[i].sa_handler != SIG_IGN)
			(void)sigaction(ending_signals[i], &action, NULL);
	}
}

void workers_unwatch(const struct workers *workers)
{
	for (size_t i = 0; i < WORKERS_SIGNALS; i++)
		(void)sigaction(ending_signals[i], &workers->old_actions[i], NULL);
	signalled = NULL;
}

/* ---- Starting ---------------------------------------------------------------------------------------------------- */

bool process_dies_with(pid_t parent)
{
	return prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 && getppid() == parent;
}

/* The ends of the workers before it are open in a forked one too; left open, they would hide the end of those. */
static void close_inherited(const struct workers *workers)
{
	for (uint32_t i = 0; i < workers->count; i++) {
		if (workers->items[i].socket >= 0)
			(void)close(workers->items[i].socket);
	}
}

static void do_work(const struct worker *worker)
{
	const struct workers *workers = worker->all;

	workers->work(workers->user, (uint32_t)(worker - workers->items), worker->their_socket);
	(void)close(worker->their_socket);
}

static _Noreturn void be_process(const struct worker *worker, pid_t parent)
{
	if (!process_dies_with(parent))
		_exit(EXIT_FAILURE);
	workers_unwatch(worker->all);
	(void)pthread_sigmask(SIG_SETMASK, &worker->all->old_signals, NULL);
	close_inherited(worker->all);
	do_work(worker);
	exit(EXIT_SUCCESS); /* not _exit: leak checkers and profilers report at exit */
}

static void *be_thread(void *argument)
{
	do_work(argument);
	return NULL;
}

static int start_process(struct worker *worker)
{
	const pid_t parent = getpid();

	worker->pid = fork();
	if (worker->pid < 0)
		return errno;
	if (worker->pid == 0)
		be_process(worker, parent);
	(void)close(worker->their_socket);
	return 0;
}

static int start_thread(struct worker *worker)
{
	worker->pid = getpid();
	return pthread_create(&worker->thread, NULL, be_thread, worker);
}

static bool start(struct worker *worker, char *why, size_t why_bytes)
{
	int sockets[2];
	int error;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) != 0) {
		(void)snprintf(why, why_bytes, "no socket: %s", strerror(errno));
		return false;
	}
	worker->socket = sockets[0];
	worker->their_socket = sockets[1];
	error = worker->all->threads ? start_thread(worker) : start_process(worker);
	worker->started = error == 0;
	if (worker->started)
		return true;
	(void)snprintf(why, why_bytes, "%s", strerror(error));
	(void)close(sockets[1]);
	return false;
}

bool workers_create(struct workers *workers, uint32_t count, bool threads)
{
	*workers = (struct workers){.threads = threads, .items = calloc(count, sizeof *workers->items)};
	if (!workers->items)
		return false;
	workers->count = count;
	for (uint32_t i = 0; i < count; i++)
		workers->items[i] = (struct worker){.socket = -1, .all = workers};
	return true;
}

/* Signals wait until every worker that is started is noted down. */
uint32_t workers_start(struct workers *workers, void (*work)(void *user, uint32_t index, int socket), void *user,
		       char *why, size_t why_bytes)
{
	uint32_t started = 0;

	workers->work = work;
	workers->user = user;
	(void)fflush(NULL); /* or each forked process would print it again */
	block_signals(&workers->old_signals);
	watch_signals(workers);
	while (started < workers->count && start(&workers->items[started], why, why_bytes))
		started++;
	(void)pthread_sigmask(SIG_SETMASK, &workers->old_signals, NULL);
	return started;
}

/* ---- Ending ------------------------------------------------------------------------------------------------------ */

void worker_stop(const struct worker *worker)
{
	if (!worker->started || worker->gone)
		return;
	if (worker->all->threads)
		(void)shutdown(worker->socket, SHUT_RDWR);
	else
		(void)kill(worker->pid, SIGKILL);
}

int worker_end(struct worker *worker)
{
	int status = 0;
	sigset_t before;

	block_signals(&before); /* a process id that is reaped may soon be somebody else's */
	if (worker->all->threads)
		(void)pthread_join(worker->thread, NULL);
	else
		(void)waitpid(worker->pid, &status, 0);
	worker->gone = true;
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	(void)close(worker->socket);
	worker->socket = -1;
	return status;
}

void workers_free(struct workers *workers)
{
	close_inherited(workers);
	free(workers->items);
}
