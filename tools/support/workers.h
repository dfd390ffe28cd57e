/* SPDX-License-Identifier: Apache-2.0
 *
 * workers.h - processes or threads that work for a program, each at the other end of a stream socket: none of them
 * outlives it, whatever ends it. Knows: processes, threads, signals. Does not know: what they do, what is said.
 */
#ifndef WORKERS_H
#define WORKERS_H

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct worker {
	pid_t pid; /* this process's own for a thread */
	pthread_t thread;
	bool started;
	bool gone;
	int socket; /* our end; -1: none */
	/* own */
	const struct workers *all;
	int their_socket;
};

#define WORKERS_SIGNALS 4 /* that end a program */

struct workers {
	bool threads;
	struct worker *items;
	uint32_t count;
	/* own */
	void (*work)(void *user, uint32_t index, int socket);
	void *user;
	sigset_t old_signals;
	struct sigaction old_actions[WORKERS_SIGNALS];
};

/** Room for @p count workers, none of them started. False: no memory. */
bool workers_create(struct workers *workers, uint32_t count, bool threads);
/**
 * Start all of them: each runs @p work, which leaves its socket open, and ends. From here to workers_unwatch a SIGINT,
 * SIGTERM, SIGHUP or SIGPIPE ends the worker processes and then this one, as the signal would have. Return how many
 * were started; fewer than all: @p why has the reason.
 */
uint32_t workers_start(struct workers *workers, void (*work)(void *user, uint32_t index, int socket), void *user,
		       char *why, size_t why_bytes);
/** Kill a process; a thread sees the end of its stream. */
void worker_stop(const struct worker *worker);
/** Wait until one ends that has closed its end of the socket or was stopped. Return what waitpid tells; threads: 0. */
int worker_end(struct worker *worker);
/** Signals act again as they did before workers_start. */
void workers_unwatch(const struct workers *workers);
void workers_free(struct workers *workers);

/** For a forked process: true when it will end with @p parent; false when that has ended before. */
bool process_dies_with(pid_t parent);

#endif
