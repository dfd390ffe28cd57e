/* SPDX-License-Identifier: Apache-2.0
 *
 * tokenizer.h - byte-level BPE from a GGUF file's vocabulary and merges ("gpt2" model, "smollm" splitting).
 */
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

#include "engine_error.h"
#include "gguf.h"

struct tokenizer;

/**
 * Build it; @p file may be closed afterwards.
 * @return OK; ERR_INVALID when the vocabulary is not sound; ERR_NOT_SUPPORTED for other kinds of tokenizers; NO_MEMORY.
 */
lshard_status tokenizer_create(const gguf *file, struct tokenizer **created, engine_error *error);
void tokenizer_destroy(struct tokenizer *tokenizer);

uint32_t tokenizer_size(const struct tokenizer *tokenizer);
/** The end-of-text token; -1 when the file names none. */
int32_t tokenizer_end(const struct tokenizer *tokenizer);
/** Special tokens in the text become their ids; BOS comes first where the file says so. Free @p tokens with free(). */
lshard_status tokenizer_encode(struct tokenizer *tokenizer, const char *text, int32_t **tokens, size_t *count,
			       engine_error *error);
/** The bytes of one token; none for special ones and for ids out of range. */
const char *tokenizer_text(const struct tokenizer *tokenizer, int32_t token, size_t *bytes);

#endif
