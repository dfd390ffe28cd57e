/* SPDX-License-Identifier: Apache-2.0
 *
 * job_ranks.h - what the tests share in which the ranks of a job find each other: ranks that do and gather, ranks that
 * must fail, whoever else comes to where rank 0 listens, and a directory for it.
 */
#ifndef LAYERSHARD_TEST_JOB_RANKS_H
#define LAYERSHARD_TEST_JOB_RANKS_H

#include "contexts.h"
#include "outside.h"
#include "rendezvous_place.h"

#define VARIABLE "LAYERSHARD_RENDEZVOUS_DIR"
/* Users that are not this one. */
#define NOBODY   65534u
#define STRANGER 54321u

/* ---- Ranks ---- */

/* Threads have no job of their own: one name for the process's test. */
const char *job_of(const struct member *member);
struct job_rank {
	lshard_context context;
	lshard__rendezvous *rendezvous;
	lshard_bootstrap bootstrap;
};

/* Wait for the others, for long; false with what the rendezvous says. It is closed by lshard__rendezvous_close, which
 * takes NULL. */
bool job_rank_open(struct job_rank *rank, const struct member *member);

/* A body: all ranks come, and gather two hundred times. */
int come_and_gather(const struct member *member);
/* The same once, where a directory may be; @p as_left: by the job in member->user, where something was left. */
int gather_once(const struct member *member);
int gather_as_left(const struct member *member);

/* Everybody must fail with this status; those for whom `says` is given, with that in the text. */
struct failure {
	lshard_status status;
	const char *root_says;
	const char *member_says;
};

/* Rank @p rank of @p size cannot join the member's job. */
int opens_badly(const struct member *member, int32_t rank, int32_t size, uint32_t timeout_ms,
		const struct failure *expected);

/* ---- Whoever else comes ---- */

/* The name under which rank 0 of @p job listens; waits until it does. */
bool find_listener(const char *job, char *name, size_t bytes);
int connect_to(const char *name);
/* Kill it; -1: there is none. */
void end_child(pid_t child);

/* ---- Names and directories ---- */

/* A job that another run of the tests at the same time does not have. */
const char *own_job(void);
/* The abstract name of @p job here. */
void name_of(const char *job, char *name, size_t bytes);

struct folder {
	char path[256];
};

/* The setup and teardown of a test whose ranks find each other in a directory; its state is a struct folder. */
int make_folder(void **state);
int remove_folder(void **state);
int count_files(const char *path);
/* A place of the job "listens", where the socket of a killed rank may lie. */
void open_place(struct lshard__place *place, bool killed);

#define in_a_folder(test) cmocka_unit_test_setup_teardown(test, make_folder, remove_folder)

#endif
