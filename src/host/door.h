/* SPDX-License-Identifier: Apache-2.0
 *
 * door.h - where those who come back to a group find each of its ranks, and what they are told there. Knows sockets,
 * the job's name and one thread; does not know what is asked or answered.
 *
 * Every rank has a door of its own, at a place named after the job and its number, so whoever has it is the rank. A
 * visitor connects, says its hello, of which the token is what it asks, and gets an answer: some words, bytes, and
 * descriptors, one a packet. Then the connection is closed, or the rank has kept a copy of it. Packets of one byte in
 * front of the answer say nothing.
 */
#ifndef LAYERSHARD_DOOR_H
#define LAYERSHARD_DOOR_H

#include "arrivals.h"
#include "hello.h"
#include "pending_connections.h"
#include "rendezvous_place.h"

#include <poll.h>
#include <stdatomic.h>

/* One question at a time is answered. */
struct door_visitor {
	struct lshard__hello hello;
	pid_t pid;
	int fd;
	int failed;
	uint64_t deadline_ns; /* a visitor that does not listen holds up the others no longer */
};

#define DOOR_WORDS_BYTES 400

struct door_reply {
	const void *words; /* NULL: none */
	size_t words_bytes;
	const void *bytes; /* NULL: none */
	size_t count;
	const int *descriptors; /* -1: one that is not there */
	int32_t n;
};

/* One of these for each visitor. */
void door_tell(struct door_visitor *visitor, const struct door_reply *reply);
void door_refuse(struct door_visitor *visitor, lshard_status status, const char *text);

struct door_host {
	/* On the door's thread: answer by door_tell or door_refuse. The visitor's descriptor is closed then. */
	void (*answer)(void *user, struct door_visitor *visitor);
	void *user;
};

struct door {
	const lshard_context *context;
	struct door_host host;
	struct lshard__place place;
	int listener; /* -1: it is not open */
	int stop;     /* eventfd */
	struct lshard__pending_connections pending;
	struct pollfd *polled;
	pthread_t thread;
	bool started;
};

/*
 * Take this rank's door; nobody is answered yet. Waits until @p deadline_ns for a process that still has it, then
 * TIMEOUT with its name. SYSTEM; NO_MEMORY. On failure nothing is left open.
 */
lshard_status door_open(struct door *door, const lshard_context *context, lshard_error *error, uint64_t deadline_ns);
/* Answer from now on. */
lshard_status door_start(struct door *door, const struct door_host *host, lshard_error *error);
/* Nobody is let in any more. Any thread. */
void door_stop(struct door *door);
/* Also where it is not open, and in a child by fork. */
void door_close(struct door *door);

/* ---- the visitor's side ---- */

/* What is asked, and which of several is meant. */
static inline uint64_t door_token(unsigned ask, uint64_t which)
{
	return (uint64_t)ask | which << 8;
}

static inline unsigned door_asked(const struct door_visitor *visitor)
{
	return (unsigned)(visitor->hello.token & 255);
}

static inline uint64_t door_which(const struct door_visitor *visitor)
{
	return visitor->hello.token >> 8;
}

struct door_answer {
	int fd;                                              /* the connection */
	pid_t pid;                                           /* who answers */
	size_t bytes;                                        /* that follow */
	int32_t n;                                           /* descriptors that follow after them */
	_Alignas(uint64_t) char words[DOOR_WORDS_BYTES + 1]; /* zeroed behind those that were said */
};

/*
 * Ask at the door of @p rank. PEER_FAILED: it is gone, TIMEOUT: it does not answer; else what it says. Both are left to
 * the caller to name where @p error is NULL. On success door_leave, or the connection is the caller's.
 */
lshard_status door_ask(const lshard_context *context, int32_t rank, uint64_t token, struct door_answer *answer,
		       lshard_error *error, uint64_t deadline_ns);
/* The answer's bytes, then its descriptors, each once. TIMEOUT, PEER_FAILED, MISMATCH, SYSTEM with errno. */
lshard_status door_hear(const struct door_answer *answer, void *bytes, uint64_t deadline_ns);
/* On failure there are none to close. */
lshard_status door_hear_descriptors(const struct door_answer *answer, int *descriptors, uint64_t deadline_ns);
void door_leave(struct door_answer *answer);

#endif
