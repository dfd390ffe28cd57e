/* SPDX-License-Identifier: Apache-2.0
 *
 * llama_config.h - the shape of a Llama model, read from a GGUF file and checked against its tensors.
 */
#ifndef LLAMA_CONFIG_H
#define LLAMA_CONFIG_H

#include <stddef.h>
#include <stdint.h>

#include "engine_error.h"
#include "gguf.h"

/* The linears of a block, in the order of the series' tensors. */
enum { ATTN_Q, ATTN_K, ATTN_V, ATTN_OUTPUT, FFN_GATE, FFN_UP, FFN_DOWN, LINEARS };

struct llama_config {
	uint32_t layers;
	uint32_t hidden;
	uint32_t heads;
	uint32_t kv_heads;
	uint32_t head; /* values of one head */
	uint32_t rope; /* the first values of a head, which are rotated */
	uint32_t feed_forward;
	uint32_t vocabulary;
	uint32_t context;
	float epsilon;
	double rope_base;
	int tied; /* 1: the embeddings are the output matrix too */
};

#define TENSOR_NAME_BYTES 64

/**
 * Read the shape. After success every tensor the model needs is there in the right size, and there is none that is not
 * understood, so nothing can be left out of the computation unnoticed.
 * @return OK; ERR_NOT_SUPPORTED for other architectures and variants, ERR_INVALID for missing or misshapen parts.
 */
lshard_status llama_config_read(const gguf *file, struct llama_config *config, engine_error *error);

/** "attn_q.weight": the tensor's name in the series, and in the file after "blk.N.". */
const char *llama_linear_name(uint32_t linear);
void llama_linear_size(const struct llama_config *config, uint32_t linear, uint32_t *outputs, uint32_t *inputs);
/** As F32. */
size_t llama_linear_bytes(const struct llama_config *config, uint32_t linear);
/** Name in the file of a tensor of a block. */
void llama_block_tensor_name(uint32_t layer, const char *part, char name[TENSOR_NAME_BYTES]);

#endif
