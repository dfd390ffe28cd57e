/* SPDX-License-Identifier: Apache-2.0
 *
 * living.h - a group that lives and to which this rank comes back, as one of its ranks has told of it. Knows doors and
 * what all ranks have alike; does not know what they store.
 */
#ifndef LAYERSHARD_LIVING_H
#define LAYERSHARD_LIVING_H

#include "door.h"

/* What is asked at a rank's door. */
enum {
	ASK_GROUP = 1, /* struct living_words, and the control page */
	ASK_JOIN,      /* which: this rank's incarnation. The connection becomes that of the mesh. */
	ASK_SERIES     /* which: the index of a series; only transports know the answer */
};

/* What the ranks have agreed on. */
struct living_words {
	int32_t memory;
	int32_t large_pages;
	int32_t numa;
	int32_t unused;
	uint64_t large_page_bytes;
	char transport[32];
	char options[64];
};

/* Made by lshard__living_find (outside.h). */
struct lshard__living {
	const lshard_context *context;
	struct living_words words;
	int page; /* descriptor of the control page */
	int32_t rank;
};

/* What a rank's door says of its group. */
struct living_words living_words_of(const lshard_context *context, const char *transport);

#endif
