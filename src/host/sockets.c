/* SPDX-License-Identifier: Apache-2.0
 *
 * sockets.c - see sockets.h. The only file that speaks of sockaddr_un.
 */
#include "sockets.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_MS 1000000u
#define RETRY_MS  5 /* between two tries to connect to somebody who is not there yet */

uint64_t lshard__deadline_ns(uint32_t timeout_ms)
{
	return lshard__now_ns() + (uint64_t)timeout_ms * NS_PER_MS;
}

int lshard__left_ms(uint64_t deadline_ns)
{
	uint64_t now = lshard__now_ns();
	uint64_t left = deadline_ns > now ? (deadline_ns - now + NS_PER_MS - 1) / NS_PER_MS : 0;

	return left > INT32_MAX ? INT32_MAX : (int)left;
}

/* An abstract name lives in the network namespace, not in a file system, and goes with the last descriptor. */
static socklen_t address_of(const char *name, struct sockaddr_un *address)
{
	const int is_path = name[0] == '/';
	const size_t length = strnlen(name, sizeof address->sun_path - 1);

	memset(address, 0, sizeof *address);
	address->sun_family = AF_UNIX;
	memcpy(address->sun_path + !is_path, name, length);
	return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length);
}

static int new_socket(int type)
{
	return socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
}

static int close_keeping_errno(int fd)
{
	int saved = errno;

	close(fd);
	errno = saved;
	return -1;
}

int lshard__socket_listen(const char *name, int type)
{
	struct sockaddr_un address;
	socklen_t length = address_of(name, &address);
	int fd = new_socket(type);

	if (fd < 0)
		return -1;
	if (bind(fd, (struct sockaddr *)&address, length) || listen(fd, SOMAXCONN))
		return close_keeping_errno(fd);
	return fd;
}

lshard_status lshard__socket_connect(const char *name, int type, uint64_t deadline_ns, int *fd)
{
	struct sockaddr_un address;
	socklen_t length = address_of(name, &address);
	int tried = new_socket(type);

	if (tried < 0)
		return LSHARD_ERR_SYSTEM;
	while (connect(tried, (struct sockaddr *)&address, length)) {
		int left = lshard__left_ms(deadline_ns);

		/* EAGAIN: the listener's queue is full. ENOENT: a path that is not there yet. */
		if ((errno != ECONNREFUSED && errno != EAGAIN && errno != EINTR && errno != ENOENT) || !left) {
			lshard_status status = left ? LSHARD_ERR_SYSTEM : LSHARD_ERR_TIMEOUT;

			close_keeping_errno(tried);
			return status;
		}
		poll(NULL, 0, left < RETRY_MS ? left : RETRY_MS);
	}
	*fd = tried;
	return LSHARD_OK;
}

int lshard__socket_accept(int listener)
{
	return accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
}

int lshard__socket_peer(int fd, pid_t *pid, uid_t *uid)
{
	struct ucred credentials;
	socklen_t length = sizeof credentials;

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length))
		return -1;
	*pid = credentials.pid;
	*uid = credentials.uid;
	return 0;
}

/* Not in the headers of every system that has it; some architectures have numbers of their own. */
#if !defined(SO_PEERPIDFD) && (defined(__x86_64__) || defined(__aarch64__) || defined(__riscv))
#define SO_PEERPIDFD 77
#endif

/*
 * By number where the kernel cannot say it of the socket. The number may be another process's by now, but then the peer
 * has ended: its end is seen late, by the connection alone, and never where there was none.
 */
static int process_by_number(int fd)
{
	pid_t pid;
	uid_t uid;

	if (lshard__socket_peer(fd, &pid, &uid))
		return -1;
	errno = EINVAL; /* 0: it has no number in this process namespace */
	return pid > 0 ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
}

int lshard__socket_peer_process(int fd)
{
#ifdef SO_PEERPIDFD
	int process = -1;
	socklen_t length = sizeof process;

	if (!getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &process, &length))
		return process;
	if (errno == ESRCH || errno == EMFILE || errno == ENFILE)
		return -1;
#endif
	return process_by_number(fd);
}

bool lshard__socket_peer_ended(int process)
{
	if (process < 0)
		return errno == ESRCH;
	return lshard__socket_wait(-1, process, POLLIN, lshard__now_ns()) == LSHARD_ERR_PEER_FAILED;
}

enum lshard__listening lshard__socket_look(const char *name, int type)
{
	int fd;
	int process;
	bool ended;

	if (lshard__socket_connect(name, type, lshard__now_ns(), &fd) != LSHARD_OK)
		return errno == ECONNREFUSED || errno == ENOENT ? LSHARD__NOBODY : LSHARD__SOMEBODY;
	process = lshard__socket_peer_process(fd);
	ended = lshard__socket_peer_ended(process);
	if (process >= 0)
		close(process);
	close(fd);
	return ended ? LSHARD__LEFT_BEHIND : LSHARD__SOMEBODY;
}

lshard_status lshard__socket_wait(int fd, int process, short events, uint64_t deadline_ns)
{
	struct pollfd polled[2] = {{.fd = fd, .events = events}, {.fd = process, .events = POLLIN}};
	int ready;

	do
		ready = poll(polled, 2, lshard__left_ms(deadline_ns));
	while (ready < 0 && errno == EINTR);
	if (ready < 0)
		return LSHARD_ERR_SYSTEM;
	if (ready && !polled[0].revents)
		return LSHARD_ERR_PEER_FAILED;
	return ready ? LSHARD_OK : LSHARD_ERR_TIMEOUT;
}

/* What a failed send or receive means; OK: try again. */
static lshard_status after_failure(int fd, int process, short events, uint64_t deadline_ns)
{
	if (errno == EINTR)
		return LSHARD_OK;
	if (errno == EAGAIN || errno == EWOULDBLOCK)
		return lshard__socket_wait(fd, process, events, deadline_ns);
	return errno == EPIPE || errno == ECONNRESET ? LSHARD_ERR_PEER_FAILED : LSHARD_ERR_SYSTEM;
}

lshard_status lshard__socket_send(int fd, const void *bytes, size_t count, uint64_t deadline_ns)
{
	const char *next = bytes;

	while (count) {
		ssize_t sent = send(fd, next, count, MSG_NOSIGNAL);

		if (sent < 0) {
			lshard_status status = after_failure(fd, -1, POLLOUT, deadline_ns);

			if (status != LSHARD_OK)
				return status;
			continue;
		}
		next += sent;
		count -= (size_t)sent;
	}
	return LSHARD_OK;
}

lshard_status lshard__socket_receive(int fd, int process, void *bytes, size_t count, uint64_t deadline_ns)
{
	char *next = bytes;

	while (count) {
		ssize_t got = recv(fd, next, count, 0);

		if (got == 0)
			return LSHARD_ERR_PEER_FAILED;
		if (got < 0) {
			lshard_status status = after_failure(fd, process, POLLIN, deadline_ns);

			if (status != LSHARD_OK)
				return status;
			continue;
		}
		next += got;
		count -= (size_t)got;
	}
	return LSHARD_OK;
}

bool lshard__socket_give(int fd, const void *bytes, size_t count, int descriptor)
{
	_Alignas(struct cmsghdr) char room[CMSG_SPACE(sizeof descriptor)] = {0};
	struct iovec part = {(void *)(uintptr_t)bytes, count};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

	if (descriptor >= 0) {
		struct cmsghdr *header = (struct cmsghdr *)room;

		message.msg_control = room;
		message.msg_controllen = sizeof room;
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof descriptor);
		memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
	}
	return sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0;
}

/* Keep the one descriptor there is; close them all where there are more, @p count. */
static int keep_one(struct msghdr *message, int *count)
{
	int kept = -1;

	for (struct cmsghdr *header = CMSG_FIRSTHDR(message); header; header = CMSG_NXTHDR(message, header)) {
		if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t at = 0; CMSG_LEN(at + sizeof kept) <= header->cmsg_len; at += sizeof kept) {
			if (kept >= 0)
				close(kept);
			memcpy(&kept, CMSG_DATA(header) + at, sizeof kept);
			++*count;
		}
	}
	if (*count > 1) {
		close(kept);
		kept = -1;
	}
	return kept;
}

/* The kernel tells no more than that it dropped a descriptor: is there room for one? */
static int why_dropped(int fd)
{
	const int tried = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	const int cause = tried < 0 ? errno : EACCES;

	if (tried >= 0)
		close(tried);
	return cause;
}

ssize_t lshard__socket_take(int fd, void *bytes, size_t room, struct lshard__attached *attached)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))];
	struct iovec part = {bytes, room};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	int count = 0;

	*attached = (struct lshard__attached){-1, 0};
	if (got < 0)
		return got;
	attached->descriptor = keep_one(&message, &count);
	attached->lost = (message.msg_flags & MSG_CTRUNC) && count == 0 ? why_dropped(fd) : 0;
	if (got > 0 && !(message.msg_flags & MSG_TRUNC))
		return got;
	if (attached->descriptor >= 0)
		close(attached->descriptor);
	*attached = (struct lshard__attached){-1, 0};
	return got > 0 ? (ssize_t)room + 1 : 0;
}
