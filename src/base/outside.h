/* SPDX-License-Identifier: Apache-2.0
 *
 * outside.h - everything the core asks of the world outside it, in one place: src/host and src/transport implement it.
 * The core names no transport and no system call; these few functions are the only way out.
 */
#ifndef LAYERSHARD_OUTSIDE_H
#define LAYERSHARD_OUTSIDE_H

#include <layershard/transport.h>

#include <stdbool.h>

/* ---- src/host/environment.c ---- */

/* Value of an environment variable of the table behind lshard_variable_info, or NULL when unset or empty. */
const char *lshard__variable(const char *name);

/* ---- src/host/large_pages.c ---- */

/* Bytes of a page that the system calls huge, a power of two; 0: it has none. */
uint64_t lshard__large_page_bytes(void);

/* ---- src/host/process.c ---- */

/* The process that created a group; a child that it forks has a copy of the group. */
struct lshard__process {
	const volatile unsigned char *mark; /* not 0: this is that process; 0: ask */
	unsigned char *page;                /* the mark is in it; NULL: the kernel has none that it wipes in a child */
	int32_t number;
};

void lshard__process_open(struct lshard__process *process);
void lshard__process_close(struct lshard__process *process);
bool lshard__process_asked(const struct lshard__process *process);

/* False in a child by fork. Makes no system call, unless in a child or on a kernel before Linux 4.14. */
static inline bool lshard__process_is_ours(const struct lshard__process *process)
{
	return *process->mark || lshard__process_asked(process);
}

/* ---- src/host/rendezvous.c ---- */

/*
 * A bootstrap among separately started ranks of this host and user that give the same job name. Collective; blocks at
 * most timeout_ms. An allgather over it fails once a rank is gone or late. Closed after the transport is open.
 */
typedef struct lshard__rendezvous lshard__rendezvous;

lshard_status lshard__rendezvous_open(const lshard_context *context, const char *job, lshard__rendezvous **rendezvous,
				      lshard_bootstrap *bootstrap, lshard_error *error);
/* How the last all-gather went: OK, TIMEOUT, PEER_FAILED, ... */
lshard_status lshard__rendezvous_failure(const lshard__rendezvous *rendezvous);
/* The cause of the last failed allgather, "" if none: who is missing, what the system said. */
const lshard_error *lshard__rendezvous_error(const lshard__rendezvous *rendezvous);
void lshard__rendezvous_close(lshard__rendezvous *rendezvous); /* NULL is allowed */

/* ---- src/host/living.c ---- */

/*
 * The group of context->job in which this rank has ended and others live. Blocks at most timeout_ms. OK: *living, or
 * NULL where nobody lives. TIMEOUT: somebody does not answer; MISMATCH: it is of another kind. Closed after the
 * transport is open.
 */
lshard_status lshard__living_find(const lshard_context *context, struct lshard__living **living, lshard_error *error);
void lshard__living_close(struct lshard__living *living); /* NULL is allowed */

/* ---- src/transport/registry.c ---- */

/* A transport with the wrappers in front of it. */
typedef struct lshard__stack lshard__stack;

/*
 * Agree on a transport by base->bootstrap and open it: "auto", a name with options after ':', wrappers with their
 * options after '=' in front, separated by commas, outermost first. custom: a table of the caller's instead of the last
 * name (spec then holds wrappers only, or is NULL). Collective. On failure nothing is left open.
 */
lshard_status lshard__stack_open(const lshard_context *base, const char *spec, const lshard_transport_ops *custom,
				 lshard__stack **stack, lshard_error *error);
lshard_transport *lshard__stack_top(lshard__stack *stack);
/* The transport itself, behind all wrappers: whose ops->rejoin is meant. */
lshard_transport *lshard__stack_bottom(lshard__stack *stack);
/* "shm (auto: all ranks on one host)" */
const char *lshard__stack_description(const lshard__stack *stack);
void lshard__stack_close(lshard__stack *stack); /* NULL is allowed */

#endif
