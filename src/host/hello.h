/* SPDX-License-Identifier: Apache-2.0
 *
 * hello.h - what a rank says first on a connection to another, and how what was said is taken.
 */
#ifndef LAYERSHARD_HELLO_H
#define LAYERSHARD_HELLO_H

#include "greeting.h"

#define LSHARD__HELLO_MAGIC 0x6c73686du

struct lshard__hello {
	struct lshard__greeting greeting;
	uint64_t token; /* a secret of the rank that is connected to, where it has one */
	int32_t rank;
	int32_t size;
};

/* @p bytes: of the messages that follow on this connection. */
static inline struct lshard__greeting lshard__hello_greeting(size_t bytes)
{
	return lshard__greeting_make(LSHARD__HELLO_MAGIC, sizeof(struct lshard__hello), bytes);
}

#endif
