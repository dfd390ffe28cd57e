/* SPDX-License-Identifier: Apache-2.0
 *
 * seer.h - a rank whose layers live on a fake device, where kernels look at them: the streams run late, so that a
 * window that is read too early or overwritten too soon shows.
 */
#ifndef LAYERSHARD_TEST_SEER_H
#define LAYERSHARD_TEST_SEER_H

#include "conformance.h"

#include <stdatomic.h>

/* A rank whose layers live on its fake device. */
struct seer {
	struct rank rank;
	struct fake *fake;
	atomic_int wrong; /* layers that a kernel saw */
	atomic_int seen;
};

/* The group alone. */
lshard_status seer_open_group(struct seer *seer, const struct member *member, const lshard_callbacks *callbacks,
			      uint32_t timeout_ms, char *error, size_t error_bytes);
/* Device, group, and the series, committed. */
bool seer_open(struct seer *seer, const struct member *member, const struct setting *setting);
/* Whatever there is. False also where something is left on the device. */
bool seer_close(struct seer *seer);

/*
 * A kernel: looks at a layer twice, some time apart, while its window must not change. @p value: its position, and
 * above 16 bits the generation of its bytes.
 */
void seer_see(void *user, uint64_t value);
/* Reach, wait, and let the kernel look. */
lshard_status seer_go_to(struct seer *seer, uint32_t position, void *stream);
/* To every layer, on a stream of that number. Nothing is compared before the device is synchronized. */
bool seer_pass(struct seer *seer, int stream);
/* Synchronize: all that kernels saw until now was right. */
bool seer_saw_right(struct seer *seer);

#endif
