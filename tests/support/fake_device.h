/* SPDX-License-Identifier: Apache-2.0
 *
 * fake_device.h - a device made of threads, for the callback transport: streams that run late, each in its own
 * order and in no order among each other but by events. Its collectives are those of a circle of its own.
 */
#ifndef TESTS_FAKE_DEVICE_H
#define TESTS_FAKE_DEVICE_H

#include "callback_circle.h"

/* Stream 0 is the collectives'; the others are the program's. */
#define FAKE_STREAMS 3

struct fake;

/* Collective over the team; NULL when a rank has left. */
struct fake *fake_open(const struct member *member);
/*
 * When the group has gone; NULL is allowed. False: memory or events are left, or memory went before what a stream had
 * to do with it.
 */
bool fake_close(struct fake *fake);

const lshard_callbacks *fake_callbacks(const struct fake *fake);
/* Of the collectives on the host. */
struct seat *fake_seat(struct fake *fake);
void *fake_stream(struct fake *fake, int number);

/* Enqueue a call of @p kernel. */
void fake_launch(struct fake *fake, void *stream, void (*kernel)(void *user, uint64_t value), void *user,
		 uint64_t value);
/* Until all streams have run what they were given. */
void fake_synchronize(struct fake *fake);
/* Streams from this number on do nothing from now on; FAKE_STREAMS: all go on. */
void fake_hold(struct fake *fake, int first);
/* From now on every collective takes so much longer. */
void fake_slow_down(struct fake *fake, long slow_ms);
void fake_capture(struct fake *fake, bool capturing);
/* From now on the calls of record, wait and copy fail, but the first @p calls; -1: none. */
void fake_fail_at(struct fake *fake, long calls);
void fake_fail_queries(struct fake *fake, bool unsure);
/* From now on there is memory for so many blocks; -1: for any. Called by the thread that makes the series. */
void fake_allow_blocks(struct fake *fake, long rest);
/* Collectives that were enqueued so far. */
long fake_collectives(struct fake *fake);

#endif
