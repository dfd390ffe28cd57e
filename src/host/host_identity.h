/* SPDX-License-Identifier: Apache-2.0
 *
 * host_identity.h - which process on which host this is, in a form that ranks can compare.
 */
#ifndef LAYERSHARD_HOST_IDENTITY_H
#define LAYERSHARD_HOST_IDENTITY_H

#include <stdint.h>

struct host_identity {
	char boot[40];    /* of the running kernel: the same in all its containers */
	uint64_t network; /* network namespace: abstract sockets do not cross it */
	uint64_t users;   /* user namespace: a user's number means something inside it only */
	uint64_t user;    /* effective user */
	uint64_t pids;    /* process namespace: a process number means something inside it only */
	uint64_t pid;
	uint64_t started; /* process numbers are used again, but not with the same start */
};

void lshard__host_identify(struct host_identity *identity);

int lshard__same_host(const struct host_identity *a, const struct host_identity *b);
int lshard__same_process(const struct host_identity *a, const struct host_identity *b);

#endif
