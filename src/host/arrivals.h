/* SPDX-License-Identifier: Apache-2.0
 *
 * arrivals.h - connections of ranks that came back, on their way from the door's thread to the mesh's. Knows ranks and
 * descriptors, and one lock; does not know who is told.
 */
#ifndef LAYERSHARD_ARRIVALS_H
#define LAYERSHARD_ARRIVALS_H

#include <layershard/transport.h>

#include <pthread.h>
#include <stdbool.h>
#include <sys/types.h>

struct arrival {
	int fd;      /* the connection; -1: none */
	int process; /* as that of a mesh's peer */
	pid_t pid;
	uint32_t incarnation; /* which of the processes that have had this number, counted from 0 */
};

struct arrivals {
	struct arrival *of; /* [size]; NULL: nobody can come back */
	int32_t size;
	pthread_mutex_t lock;
};

/* False: there is no memory. */
bool arrivals_open(struct arrivals *arrivals, const lshard_context *context);
/* Closes what nobody has taken. */
void arrivals_close(struct arrivals *arrivals, const lshard_context *context);

/* Any thread. What was left of an earlier process of that rank is closed. */
void arrivals_put(struct arrivals *arrivals, int32_t rank, struct arrival arrival);

/* Where nobody can come back there is no lock, and nothing to be taken. */
void arrivals_lock(struct arrivals *arrivals);
void arrivals_unlock(struct arrivals *arrivals);
/* With the lock: false: that rank has not come back since. Descriptors are the caller's then. */
bool arrivals_take(struct arrivals *arrivals, int32_t rank, struct arrival *arrival);

#endif
