/* SPDX-License-Identifier: Apache-2.0
 *
 * name_holder.c - see name_holder.h. The list of sockets tells which one has the name, that socket's own entry its
 * user, where the kernel knows it (5.3), and the open files of processes that this one may look at which process.
 */
#include "name_holder.h"

#include <dirent.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <linux/unix_diag.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef UDIAG_SHOW_UID
#define UDIAG_SHOW_UID 0x00000040
#endif

#define ATTRIBUTE_UID 7        /* UNIX_DIAG_UID, which older headers lack */
#define LISTENS       0x10000u /* in the flags of /proc/net/unix */
#define STREAM        1u       /* its type: other types have names of their own */
#define UNCONNECTED   1u       /* its state, SS_UNCONNECTED */

/*
 * "Num RefCount Protocol Flags Type St Inode Path", an abstract path behind an '@'. What a listener has accepted has
 * its name too, and is connected or about to be.
 */
static bool is_holder(const char *line, const char *name, bool *listens, unsigned *inode)
{
	unsigned flags = 0, type = 0, state = 0;
	int at = 0;

	if (sscanf(line, "%*s %*s %*s %x %x %x %u %n", &flags, &type, &state, inode, &at) < 4 || at == 0)
		return false;
	*listens = (flags & LISTENS) != 0;
	return line[at] == '@' && !strcmp(line + at + 1, name) && type == STREAM && state == UNCONNECTED && *inode;
}

static bool find_socket(const char *name, bool *listens, unsigned *inode)
{
	FILE *sockets = fopen("/proc/net/unix", "re");
	char line[512];
	bool found = false;

	while (sockets && !found && fgets(line, sizeof line, sockets)) {
		line[strcspn(line, "\n")] = 0;
		found = is_holder(line, name, listens, inode);
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

/* ---- its process ---- */

/* Calls @p visit with every entry of @p path that is a number, until it returns true. */
static bool any_number(const char *path, bool (*visit)(const char *path, long number, void *user), void *user)
{
	DIR *directory = opendir(path);
	const struct dirent *entry;
	bool found = false;

	while (directory && !found && (entry = readdir(directory)))
		if (entry->d_name[0] >= '0' && entry->d_name[0] <= '9')
			found = visit(path, strtol(entry->d_name, NULL, 10), user);
	if (directory)
		closedir(directory);
	return found;
}

struct search {
	char wanted[32]; /* "socket:[INODE]" */
	pid_t process;
};

static bool is_socket(const char *path, long number, void *user)
{
	const struct search *search = user;
	char link[96], target[40];
	ssize_t bytes;

	snprintf(link, sizeof link, "%s/%ld", path, number);
	bytes = readlink(link, target, sizeof target - 1);
	target[bytes > 0 ? bytes : 0] = 0;
	return !strcmp(target, search->wanted);
}

static bool has_socket(const char *path, long number, void *user)
{
	struct search *search = user;
	char files[64];

	snprintf(files, sizeof files, "%s/%ld/fd", path, number);
	if (any_number(files, is_socket, search))
		search->process = (pid_t)number;
	return search->process != 0;
}

static pid_t find_process(unsigned inode)
{
	struct search search = {.process = 0};

	snprintf(search.wanted, sizeof search.wanted, "socket:[%u]", inode);
	(void)any_number("/proc", has_socket, &search);
	return search.process;
}

/* " (python3)", or nothing. */
static void name_program(pid_t process, char *text, size_t bytes)
{
	char path[48], name[32] = "";
	FILE *file;

	snprintf(path, sizeof path, "/proc/%d/comm", (int)process);
	file = fopen(path, "re");
	if (file && fgets(name, sizeof name, file))
		name[strcspn(name, "\n")] = 0;
	if (file)
		fclose(file);
	snprintf(text, bytes, *name ? " (%s)" : "%s", name);
}

bool lshard__name_find_holder(const char *name, struct lshard__name_holder *holder)
{
	char whose[64] = "an unknown user";
	char who[64] = "a process";
	char program[40];
	char answer[1024];
	unsigned inode = 0;
	uint32_t user = 0;
	int got;

	*holder = (struct lshard__name_holder){.listens = false};
	if (!find_socket(name, &holder->listens, &inode))
		return false;
	got = ask(inode, answer, sizeof answer);
	if (got > 0 && find_user(answer, (size_t)got, &user)) {
		snprintf(whose, sizeof whose, "user %lu", (unsigned long)user);
		holder->is_stranger = user != geteuid();
	}
	holder->process = find_process(inode);
	if (holder->process) {
		name_program(holder->process, program, sizeof program);
		snprintf(who, sizeof who, "process %d%s", (int)holder->process, program);
	}
	snprintf(holder->text, sizeof holder->text, "%s of %s", who, whose);
	return true;
}
