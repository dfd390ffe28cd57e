/* SPDX-License-Identifier: Apache-2.0
 *
 * matrix.h - the fault matrix: every transport, in every phase, with every fault on one rank of three. matrix.c goes
 * through the cells, cell.c runs one, rules.c says what each rank must see. All of it by the public calls, from
 * processes that the matrix can kill and stop.
 */
#ifndef TESTS_MATRIX_H
#define TESTS_MATRIX_H

#include "told_ranks.h"

#include <stdio.h>

#define RANKS 3

/* X(name, transport, rejoin, collective, on a device: that of the stub) */
#define MATRIX_TRANSPORTS(X)                                                                                           \
	X("shm", "shm", LSHARD_REJOIN_NEVER, 0, 0)                                                                     \
	X("shm:copy", "shm:copy", LSHARD_REJOIN_NEVER, 0, 0)                                                           \
	X("shm, rejoin", "shm", LSHARD_REJOIN_ALLOW, 0, 0)                                                             \
	X("shm:copy, rejoin", "shm:copy", LSHARD_REJOIN_ALLOW, 0, 0)                                                   \
	X("cuda (stub)", "cuda", LSHARD_REJOIN_NEVER, 0, 1)                                                            \
	X("callback", "callback", LSHARD_REJOIN_NEVER, 1, 0)

/* X(name in enum, name, order, setup steps before it, together on one-sided transports) */
#define MATRIX_PHASES(X)                                                                                               \
	X(GROUP, "create a group", TOLD_GROUP, 0, 1)                                                                   \
	X(SERIES, "create a series", TOLD_SERIES, 1, 1)                                                                \
	X(COMMIT, "commit", TOLD_COMMIT, 2, 1)                                                                         \
	X(PASS, "pass", TOLD_PASS, 3, 0)                                                                               \
	X(REWIND, "rewind", TOLD_REWIND, 3, 0)                                                                         \
	X(BEGIN, "begin an update", TOLD_BEGIN, 3, 1)                                                                  \
	X(END, "end an update", TOLD_END, 4, 1)                                                                        \
	X(VERIFY, "verify", TOLD_VERIFY, 3, 1)                                                                         \
	X(DESTROY, "destroy a series", TOLD_DESTROY, 3, 0)                                                             \
	X(LEAVE, "leave", TOLD_LEAVE, 1, 0)                                                                            \
	X(RETURN, "come back", TOLD_GROUP, 3, 0)

#define MATRIX_FAULTS(X)                                                                                               \
	X(KILLED_BEFORE, "killed before it")                                                                           \
	X(KILLED_WITHIN, "killed within it")                                                                           \
	X(STOPPED_SHORTLY, "stopped, continued in time")                                                               \
	X(STOPPED_LONG, "stopped past the deadline, continued")                                                        \
	X(CALLBACK_FAILS, "its callback fails")                                                                        \
	X(CALLBACK_BLOCKS, "its callback blocks past the deadline")                                                    \
	X(NO_MEMORY, "an allocation fails")                                                                            \
	X(DESCRIPTORS, "out of descriptors")                                                                           \
	X(FILES, "files limited")                                                                                      \
	X(SPACE, "address space limited")                                                                              \
	X(GARBAGE, "strangers connect and send garbage")                                                               \
	X(FORK, "it forks, the child calls")                                                                           \
	X(CLOCK, "its clock jumps by a day")

#define MATRIX_PHASE(name, text, order, steps, together) PHASE_##name,
#define MATRIX_FAULT(name, text)                         FAULT_##name,
enum matrix_phase { MATRIX_PHASES(MATRIX_PHASE) PHASES };
enum matrix_fault { MATRIX_FAULTS(MATRIX_FAULT) FAULTS };

struct matrix_transport {
	const char *name;
	const char *spec;
	lshard_rejoin rejoin;
	int collective;
	int on_device;
};

struct matrix_step {
	const char *name;
	enum order order;
	int steps;
	int together;
};

extern const struct matrix_transport matrix_transports[];
extern const int matrix_n_transports;
extern const struct matrix_step matrix_phases[PHASES];
extern const char *const matrix_faults[FAULTS];

struct cell {
	const struct matrix_transport *transport;
	enum matrix_phase phase;
	enum matrix_fault fault;
	int victim;
	uint64_t random;
};

/* ---- rules.c ---- */

/* What the ranks do after the phase's call. */
enum after {
	GO_ON,  /* passes, with the right bytes, and leaves */
	RETRY,  /* all call again once the fault is over, and that is OK; then as above */
	GIVE_UP /* destroys what it has, and leaves */
};

#define MOST_STATUSES 8

struct rule {
	lshard_status others[MOST_STATUSES]; /* any of these; what is not listed is a failure */
	lshard_status victims[MOST_STATUSES];
	int n_others;
	int n_victims;            /* 0: it does not live */
	int named;                /* a failure of the others names the victim */
	int or_rank_0;            /* or rank 0: it was told first, had failed, and is not there for who comes later */
	enum after after_failure; /* GO_ON where all are OK */
};

/* NULL, or why the cell means nothing. */
const char *matrix_not_applicable(const struct cell *cell);
struct rule matrix_rule(const struct cell *cell);
int rule_has(const lshard_status *statuses, int n, lshard_status status);

/* ---- cell.c ---- */

/* Milliseconds that a rank of the matrix waits for another. */
#define MATRIX_TIMEOUT_MS 500u

struct outcome {
	int failed;
	char why[900];        /* it failed */
	lshard_status others; /* what the first of the others saw */
	int named;
	enum after after;
};

struct outcome cell_run(const struct cell *cell);

#endif
