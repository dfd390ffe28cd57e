/* SPDX-License-Identifier: Apache-2.0
 *
 * user.c - see user.h.
 */
#include "user.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

#define DEFAULT_OVERFLOW 65534u

static bool read_text(const char *path, char *text, size_t bytes)
{
	const int fd = open(path, O_RDONLY | O_CLOEXEC);
	const ssize_t got = fd >= 0 ? read(fd, text, bytes - 1) : -1;

	if (fd >= 0)
		close(fd);
	text[got > 0 ? got : 0] = 0;
	return got > 0;
}

static uid_t overflow_user(void)
{
	unsigned value = DEFAULT_OVERFLOW;
	char text[32];

	if (read_text("/proc/sys/kernel/overflowuid", text, sizeof text))
		(void)sscanf(text, "%u", &value);
	return value;
}

/* As outside all user namespaces, and in kernels that have none: there the overflow user is a user like any other. */
static bool all_users_are_mapped(void)
{
	unsigned inside = 1, outside = 1, count = 0;
	char text[256];

	errno = 0; /* the map of a namespace that maps nobody is empty */
	if (!read_text("/proc/self/uid_map", text, sizeof text))
		return errno == ENOENT && access("/proc/self/stat", F_OK) == 0;
	return sscanf(text, "%u %u %u", &inside, &outside, &count) == 3 && inside == 0 && outside == 0 &&
	       count == UINT32_MAX;
}

bool lshard__user_is_overflow(uid_t user)
{
	return user == overflow_user() && !all_users_are_mapped();
}

bool lshard__user_is_told(void)
{
	return !lshard__user_is_overflow(geteuid());
}
