/* SPDX-License-Identifier: Apache-2.0
 *
 * sockets.h - local sockets with deadlines, never a signal. A name that begins with '/' is a path, any other is
 * abstract. Knows the operating system; knows no rank, no group.
 *
 * All sockets are non-blocking and closed on exec. Statuses: TIMEOUT when the deadline passed, PEER_FAILED when the
 * other end is gone, SYSTEM else; only those functions that take an error write a text.
 */
#ifndef LAYERSHARD_SOCKETS_H
#define LAYERSHARD_SOCKETS_H

#include "clock.h"

#include <layershard/transport.h>

#include <stdbool.h>
#include <sys/types.h>

uint64_t lshard__deadline_ns(uint32_t timeout_ms);
/* For poll(): milliseconds to the deadline, rounded up; 0 once it has passed. */
int lshard__left_ms(uint64_t deadline_ns);

/* @p type: SOCK_STREAM or SOCK_SEQPACKET. Returns the descriptor, or -1 and errno (EADDRINUSE: somebody has the name).
 */
int lshard__socket_listen(const char *name, int type);
/* Tries until the deadline: the listener may not be there yet. TIMEOUT leaves errno as the last try did. */
lshard_status lshard__socket_connect(const char *name, int type, uint64_t deadline_ns, int *fd);
/* Who listens at @p name, found out by connecting without a wait. */
enum lshard__listening {
	LSHARD__NOBODY,     /* the connection is refused, or the path is not there */
	LSHARD__SOMEBODY,   /* also where nothing can be found out */
	LSHARD__LEFT_BEHIND /* whoever began to has ended: a process that it forked has its socket still */
};

enum lshard__listening lshard__socket_look(const char *name, int type);
/* A connection that waits to be accepted, or -1 and errno. */
int lshard__socket_accept(int listener);
/* Who is at the other end. Returns 0, or -1 and errno. */
int lshard__socket_peer(int fd, pid_t *pid, uid_t *uid);

/*
 * A descriptor that is readable once the process at the other end has ended: the connection may outlive it in a child
 * that it forked. Or -1 and errno: ESRCH where it has ended, EMFILE and the like where there is no room; anything else
 * where the kernel has none for that process (before Linux 5.3, or in another process namespace before 6.5).
 */
int lshard__socket_peer_process(int fd);
/* Has it ended? @p process: what lshard__socket_peer_process has just returned, with its errno. */
bool lshard__socket_peer_ended(int process);

/*
 * Wait for one descriptor to be readable (POLLIN) or writable (POLLOUT). PEER_FAILED when nothing is there and @p
 * process, of lshard__socket_peer_process or -1, has ended.
 */
lshard_status lshard__socket_wait(int fd, int process, short events, uint64_t deadline_ns);
lshard_status lshard__socket_send(int fd, const void *bytes, size_t count, uint64_t deadline_ns);
lshard_status lshard__socket_receive(int fd, int process, void *bytes, size_t count, uint64_t deadline_ns);

/*
 * Send one packet of a SOCK_SEQPACKET socket, with @p descriptor unless that is -1. Does not wait: false, with errno,
 * where it could not be sent; EAGAIN: there is no room now.
 */
bool lshard__socket_give(int fd, const void *bytes, size_t count, int descriptor);

/* What came with a packet. */
struct lshard__attached {
	int descriptor; /* the caller's to close; -1: none */
	int lost;       /* there was one that could not be had: why, as an errno; 0: there was none, or it is here */
};

/*
 * Take one packet of a SOCK_SEQPACKET socket without waiting. Of what comes with it one descriptor is kept; several, or
 * one with a packet that is empty or longer than @p room, are closed: nobody sends those who belongs here. Returns the
 * packet's bytes (room + 1: it was longer); 0: the other end is closed; -1 and errno.
 */
ssize_t lshard__socket_take(int fd, void *bytes, size_t room, struct lshard__attached *attached);

#endif
