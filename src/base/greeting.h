/* SPDX-License-Identifier: Apache-2.0
 *
 * greeting.h - what the first message of every connection begins with, and every page that ranks share: of which
 * version of the library its writer is, and how long its messages are. Ranks of two builds find out by it before they
 * read anything else of one another. Its own form never changes.
 */
#ifndef LAYERSHARD_GREETING_H
#define LAYERSHARD_GREETING_H

#include <layershard/transport.h>

#include <stddef.h>

struct lshard__greeting {
	uint32_t magic;    /* what kind of message follows */
	uint32_t version;  /* major << 16 | minor << 8 | patch */
	uint32_t bytes[2]; /* of what follows: each kind has two sizes that matter */
};

struct lshard__greeting lshard__greeting_make(uint32_t magic, size_t bytes, size_t other_bytes);

/*
 * MISMATCH unless both are of one build; the text names @p one ("rank 0"), @p other, and what both say. Two different
 * magics: @p other is no rank of this library at all, or its bytes are not what they should be.
 */
lshard_status lshard__greeting_compare(const struct lshard__greeting *of_one, const struct lshard__greeting *of_other,
				       const char *one, const char *other, lshard_error *error);

#endif
