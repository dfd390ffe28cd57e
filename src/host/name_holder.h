/* SPDX-License-Identifier: Apache-2.0
 *
 * name_holder.h - who has an abstract name: any user can take any, and no rank can find another there then. Seen from
 * outside it looks as if nobody had come yet where the name is only bound, or its queue is full.
 */
#ifndef LAYERSHARD_NAME_HOLDER_H
#define LAYERSHARD_NAME_HOLDER_H

#include <stdbool.h>
#include <sys/types.h>

struct lshard__name_holder {
	bool listens;
	bool is_stranger; /* of another user than this process, as far as the system tells */
	pid_t process;    /* 0: not known: of another user, or in another process namespace */
	char text[144];   /* "process 1234 (python3) of user 1000", as far as the system tells */
};

/* False: nobody has it. Looks only: to try the name would take it from the rank that is awaited. */
bool lshard__name_find_holder(const char *name, struct lshard__name_holder *holder);

#endif
