/* SPDX-License-Identifier: Apache-2.0
 *
 * user.h - can this process tell its own user from others at all?
 *
 * A user namespace shows every user that it does not map as one and the same number, the overflow user, also where it
 * maps a user of its own to that number. Where this process has it itself, one that has it too may be anybody.
 */
#ifndef LAYERSHARD_USER_H
#define LAYERSHARD_USER_H

#include <stdbool.h>
#include <sys/types.h>

/* False: every number of a user that equals this process's own proves nothing. */
bool lshard__user_is_told(void);
/* Is @p user the number that stands for all users that are not mapped here? One that is mapped may have it as well. */
bool lshard__user_is_overflow(uid_t user);

#endif
