/* SPDX-License-Identifier: Apache-2.0
 *
 * llama.h - one forward pass of a Llama model over a text that grows.
 */
#ifndef LLAMA_H
#define LLAMA_H

#include "blocks.h"
#include "llama_config.h"
#include "unsharded.h"

/* What a pass reads. None of it changes. */
struct llama_model {
	const struct llama_config *config;
	const struct unsharded *unsharded;
	struct blocks *blocks;
};

/* One text: the keys and values of its tokens, and room to work in. */
struct llama_text;

/**
 * Room for @p capacity tokens, of which at most @p batch are given at once.
 * @return OK; ERR_NO_MEMORY.
 */
lshard_status llama_text_create(const struct llama_config *config, uint32_t batch, uint32_t capacity,
				struct llama_text **created, engine_error *error);
void llama_text_destroy(struct llama_text *text);

/**
 * Append @p count tokens (ids in range, room left) and compute the logits of what follows: one for each id.
 * After a failure the text is as before.
 */
lshard_status llama_append(const struct llama_model *model, struct llama_text *text, const int32_t *tokens,
			   uint32_t count, float *logits, engine_error *error);

#endif
