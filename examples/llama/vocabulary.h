/* SPDX-License-Identifier: Apache-2.0
 *
 * vocabulary.h - the tables of a tokenizer: the bytes of each token, which tokens are special, which pairs merge.
 */
#ifndef VOCABULARY_H
#define VOCABULARY_H

#include <stddef.h>
#include <stdint.h>

#include "engine_error.h"
#include "gguf.h"

#define TOKEN_CONTROL      3
#define TOKEN_USER_DEFINED 4

/* Two neighbouring tokens that become one. Lower ranks merge first. */
struct merge {
	int32_t left; /* -1: an empty slot of the table */
	int32_t right;
	int32_t merged;
	uint32_t rank;
};

struct vocabulary {
	uint32_t count;
	size_t *starts; /* count + 1 positions in bytes */
	char *bytes;
	uint8_t *special;  /* TOKEN_CONTROL, TOKEN_USER_DEFINED: recognised whole in prompts; else 0 */
	int32_t *specials; /* their ids, longest first */
	uint32_t special_count;
	int32_t byte_token[256]; /* where BPE begins; -1: the vocabulary lacks this byte, as real ones do */
	struct merge *merges;    /* open addressing by the pair; a power of two of slots */
	size_t merge_slots;
};

lshard_status vocabulary_init(struct vocabulary *vocabulary, const gguf *file, engine_error *error);
/** Also after a failed init, and twice. */
void vocabulary_fini(struct vocabulary *vocabulary);

/** NULL when the two do not merge. */
const struct merge *vocabulary_merge(const struct vocabulary *vocabulary, int32_t left, int32_t right);
const char *vocabulary_text(const struct vocabulary *vocabulary, int32_t token, size_t *bytes);

#endif
