/* SPDX-License-Identifier: Apache-2.0
 *
 * name_holder.c - see name_holder.h. The list of sockets tells who listens, and the socket's own entry its user, where
 * the kernel knows it (5.3). Looking is all it does: to try the name would take it from the rank that is awaited.
 */
#include "name_holder.h"

#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <linux/unix_diag.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef UDIAG_SHOW_UID
#define UDIAG_SHOW_UID 0x00000040
#endif

#define ATTRIBUTE_UID 7        /* UNIX_DIAG_UID, which older headers lack */
#define LISTENS       0x10000u /* in the flags of /proc/net/unix */
#define UNCONNECTED   1u       /* its state, SS_UNCONNECTED */

/*
 * "Num RefCount Protocol Flags Type St Inode Path", an abstract path behind an '@'. What a listener has accepted has its
 * name too, and is connected.
 */
static int is_blocker(const char *line, const char *name, unsigned *inode)
{
	unsigned flags = 0, state = 0;
	int at = 0;

	if (sscanf(line, "%*s %*s %*s %x %*s %x %u %n", &flags, &state, inode, &at) < 3 || at == 0)
		return 0;
	return line[at] == '@' && !strcmp(line + at + 1, name) && !(flags & LISTENS) && state == UNCONNECTED;
}

static int find_blocker(const char *name, unsigned *inode)
{
	FILE *sockets = fopen("/proc/net/unix", "re");
	char line[512];
	int found = 0;

	while (sockets && !found && fgets(line, sizeof line, sockets)) {
		line[strcspn(line, "\n")] = 0;
		found = is_blocker(line, name, inode);
	}
	if (sockets)
		fclose(sockets);
	return found;
}

/* ---- its user ---- */

struct question {
	struct nlmsghdr head;
	struct unix_diag_req body;
};

static int ask(unsigned inode, void *answer, size_t room)
{
	struct question question = {
		.head = {.nlmsg_len = sizeof question, .nlmsg_type = SOCK_DIAG_BY_FAMILY, .nlmsg_flags = NLM_F_REQUEST},
		.body = {.sdiag_family = AF_UNIX,
			 .udiag_states = UINT32_MAX,
			 .udiag_ino = inode,
			 .udiag_show = UDIAG_SHOW_UID,
			 .udiag_cookie = {UINT32_MAX, UINT32_MAX}}};
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
	ssize_t got = -1;

	if (fd < 0)
		return -1;
	if (send(fd, &question, sizeof question, 0) == (ssize_t)sizeof question)
		got = recv(fd, answer, room, MSG_DONTWAIT); /* the kernel has answered by then */
	close(fd);
	return (int)got;
}

/* As netlink does; its own macros mix signs. */
static size_t aligned(size_t bytes)
{
	return (bytes + 3) & ~(size_t)3;
}

/* The attribute of the user in the answer, or 0 for none. */
static int find_user(const char *answer, size_t bytes, uint32_t *user)
{
	size_t at = aligned(sizeof(struct nlmsghdr)) + aligned(sizeof(struct unix_diag_msg));
	struct nlmsghdr head;
	struct nlattr attribute;

	if (bytes < sizeof head)
		return 0;
	memcpy(&head, answer, sizeof head);
	if (head.nlmsg_type != SOCK_DIAG_BY_FAMILY || head.nlmsg_len > bytes)
		return 0;
	for (; at + sizeof attribute + sizeof *user <= head.nlmsg_len; at += aligned(attribute.nla_len)) {
		memcpy(&attribute, answer + at, sizeof attribute);
		if (attribute.nla_len < sizeof attribute)
			return 0;
		if (attribute.nla_type != ATTRIBUTE_UID)
			continue;
		memcpy(user, answer + at + aligned(sizeof attribute), sizeof *user);
		return 1;
	}
	return 0;
}

int lshard__name_is_blocked(const char *name, char *text, size_t bytes)
{
	unsigned inode = 0;
	uint32_t user = 0;
	char answer[1024];
	int got;

	if (!find_blocker(name, &inode))
		return 0;
	got = ask(inode, answer, sizeof answer);
	if (got > 0 && find_user(answer, (size_t)got, &user))
		snprintf(text, bytes, "a process of user %lu", (unsigned long)user);
	else
		snprintf(text, bytes, "a process of a user that this system does not tell");
	return 1;
}
