/* SPDX-License-Identifier: Apache-2.0
 *
 * limit_reason.h - limits of a process and of the system: which one refused something, in words that say what to raise,
 * and files that grow without the signal of one.
 */
#ifndef LAYERSHARD_LIMIT_REASON_H
#define LAYERSHARD_LIMIT_REASON_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct lshard__reason {
	char text[256];
};

/*
 * What the system says to @p error and, where a limit may be the cause, which, what it allows and how it is raised.
 * @p bytes: of memory or of a file that were asked for; 0: none were.
 */
struct lshard__reason lshard__reason(int error, uint64_t bytes);
/* The same for a thread that could not be made. */
struct lshard__reason lshard__reason_thread(int error);

/*
 * ftruncate and write, where RLIMIT_FSIZE is an error (EFBIG) and not SIGXFSZ, which ends a program, and a pipe that
 * nobody reads (EPIPE) no SIGPIPE.
 */
int lshard__resize(int fd, uint64_t bytes);
ssize_t lshard__write(int fd, const void *bytes, size_t count);

#endif
