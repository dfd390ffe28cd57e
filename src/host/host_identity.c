/* SPDX-License-Identifier: Apache-2.0
 *
 * host_identity.c - see host_identity.h. Where /proc does not say, a field stays zero on all ranks alike.
 */
#include "host_identity.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static size_t read_text(const char *path, char *text, size_t bytes)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got = fd >= 0 ? read(fd, text, bytes - 1) : -1;

	if (fd >= 0)
		close(fd);
	text[got > 0 ? got : 0] = 0;
	return got > 0 ? (size_t)got : 0;
}

static uint64_t inode(const char *path)
{
	struct stat found;

	return stat(path, &found) ? 0 : (uint64_t)found.st_ino;
}

/* Field 22 of /proc/self/stat; the second one is the program's name in parentheses and may hold anything. */
static uint64_t start_time(void)
{
	char text[1024];
	const char *field;

	read_text("/proc/self/stat", text, sizeof text);
	field = strrchr(text, ')');
	for (int i = 2; field && i < 22; i++)
		field = strchr(field + 1, ' ');
	return field ? strtoull(field, NULL, 10) : 0;
}

void lshard__host_identify(struct host_identity *identity)
{
	memset(identity, 0, sizeof *identity); /* it is sent and hashed whole */
	read_text("/proc/sys/kernel/random/boot_id", identity->boot, sizeof identity->boot);
	identity->network = inode("/proc/self/ns/net");
	identity->users = inode("/proc/self/ns/user");
	identity->user = geteuid();
	identity->pids = inode("/proc/self/ns/pid");
	identity->pid = (uint64_t)getpid();
	identity->started = start_time();
}

int lshard__same_host(const struct host_identity *a, const struct host_identity *b)
{
	return !memcmp(a->boot, b->boot, sizeof a->boot);
}

int lshard__same_process(const struct host_identity *a, const struct host_identity *b)
{
	return !memcmp(a, b, sizeof *a);
}
