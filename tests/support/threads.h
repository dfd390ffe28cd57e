/* SPDX-License-Identifier: Apache-2.0
 *
 * threads.h - ranks for tests: n threads, or n forked processes, that run one body. Knows nothing of the library but
 * its bootstrap.
 */
#ifndef TESTS_THREADS_H
#define TESTS_THREADS_H

#include <layershard/layershard.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

struct team;

/* What a rank's body is given. */
struct member {
	struct team *team;
	int32_t rank;
	int32_t size;
	const lshard_bootstrap *bootstrap; /* threads only; processes find each other by the job's name: NULL */
	const char *job;                   /* processes only; NULL for threads */
	void *user;
};

/* Returns 0 if all is well. It may return early: who waits for it in a barrier or the bootstrap then fails too. */
typedef int (*member_body)(const struct member *member);

/* Run @p body on @p size ranks; returns how many failed. With processes, @p user is each one's own copy. */
int team_of_threads(int32_t size, member_body body, void *user);
int team_of_processes(int32_t size, member_body body, void *user);
/* The same for either, by name: "threads" or "forks". */
int team_run(const char *kind, int32_t size, member_body body, void *user);

/* Of a group of these ranks; everything else is as LSHARD_GROUP_OPTIONS_INIT has it. */
lshard_group_options member_options(const struct member *member, const char *transport, uint32_t timeout_ms);

/* Wait for the others. False when one of them has left or does not come. */
bool team_barrier(const struct member *member);
/* A process that is about to die by a signal: nobody waits for it from now on, and its death is no failure. */
void team_dies(const struct member *member);

/* Threads of this process called @p name; in @p open how many of them a signal of the program's could run on. */
int threads_named(const char *name, int *open);
/* The descriptors of this process, those with which they are counted among them. */
int count_fds(void);

/* Say where and what, and make the body fail. */
#define EXPECT(member, condition, ...)                                                                                 \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			fprintf(stderr, "%s:%d: rank %d of %d: %s: ", __FILE__, __LINE__, (int)(member)->rank,         \
				(int)(member)->size, #condition);                                                      \
			fprintf(stderr, __VA_ARGS__);                                                                  \
			fputc('\n', stderr);                                                                           \
			goto failed;                                                                                   \
		}                                                                                                      \
	} while (0)

/* The same of a text that lacks a word. */
#define SAYS(member, text, word) EXPECT(member, strstr(text, word) != NULL, "the text lacks '%s': %s", word, text)

#endif
