/* SPDX-License-Identifier: Apache-2.0
 *
 * blocks.h - the linears of all blocks, as one layershard series or, without a group, as private memory.
 * The only place where the engine calls layershard.
 */
#ifndef BLOCKS_H
#define BLOCKS_H

#include "engine.h"
#include "gguf.h"
#include "llama_config.h"

struct blocks {
	lshard_series *series; /* NULL: replicated */
	float **owned;         /* replicated: one allocation per layer */
	uint32_t layers;
	float **addresses; /* layers * LINEARS, fixed for life */
};

/**
 * Create and fill. Collective with a group. @p fingerprint of the model is compared between the ranks.
 * On failure nothing is left behind.
 */
lshard_status blocks_open(struct blocks *blocks, const struct llama_config *config, gguf *file,
			  const engine_options *options, uint64_t fingerprint, engine_error *error);
void blocks_close(struct blocks *blocks);

/** Arrive at a block and make its linears usable, until the next block is entered. */
lshard_status blocks_enter(struct blocks *blocks, uint32_t layer, engine_error *error);
/** A linear of the entered block: rows of outputs, 256-byte aligned. */
const float *blocks_linear(const struct blocks *blocks, uint32_t layer, uint32_t linear);

/** Bytes of one layer, packed as a series packs its tensors: each begins at a multiple of 256. */
uint64_t blocks_layer_bytes(const struct llama_config *config);

#endif
