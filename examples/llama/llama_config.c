/* SPDX-License-Identifier: Apache-2.0
 *
 * llama_config.c - reads a Llama model's shape from a GGUF file.
 * Knows: the names GGUF gives to keys and tensors. Does not know: how the model computes, who keeps which layer.
 */
#include "llama_config.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Far above any model there is; low enough that products of three of them do not overflow 64 bits. */
#define SIZE_MAX_ALLOWED ((uint64_t)1 << 20)
#define LAYERS_MAX       4096

const char *llama_linear_name(uint32_t linear)
{
	static const char *const names[LINEARS] = {"attn_q.weight",      "attn_k.weight",   "attn_v.weight",
						   "attn_output.weight", "ffn_gate.weight", "ffn_up.weight",
						   "ffn_down.weight"};

	return names[linear];
}

void llama_linear_size(const struct llama_config *config, uint32_t linear, uint32_t *outputs, uint32_t *inputs)
{
	const uint32_t q = config->heads * config->head;
	const uint32_t kv = config->kv_heads * config->head;
	const uint32_t sizes[LINEARS][2] = {
		[ATTN_Q] = {q, config->hidden},
		[ATTN_K] = {kv, config->hidden},
		[ATTN_V] = {kv, config->hidden},
		[ATTN_OUTPUT] = {config->hidden, q},
		[FFN_GATE] = {config->feed_forward, config->hidden},
		[FFN_UP] = {config->feed_forward, config->hidden},
		[FFN_DOWN] = {config->hidden, config->feed_forward},
	};

	*outputs = sizes[linear][0];
	*inputs = sizes[linear][1];
}

size_t llama_linear_bytes(const struct llama_config *config, uint32_t linear)
{
	uint32_t outputs, inputs;

	llama_linear_size(config, linear, &outputs, &inputs);
	return (size_t)outputs * inputs * sizeof(float);
}

void llama_block_tensor_name(uint32_t layer, const char *part, char name[TENSOR_NAME_BYTES])
{
	(void)snprintf(name, TENSOR_NAME_BYTES, "blk.%" PRIu32 ".%s", layer, part);
}

/* ---- Keys ------------------------------------------------------------------------------------------------------ */

/* "key 'K' is 'V'; ONLY". */
static lshard_status refuse_text(const gguf *file, const char *key, gguf_text text, const char *only,
				 engine_error *error)
{
	return engine_fail(error, LSHARD_ERR_NOT_SUPPORTED, "%s: key '%s' is '%.*s'; %s", gguf_name(file), key,
			   (int)(text.bytes < 64 ? text.bytes : 64), text.at, only);
}

/* A part of a model, or something that is made for one: said before its tensors are found missing. */
static lshard_status check_whole(const gguf *file, engine_error *error)
{
	static const char kind[] = "general.type";
	static const char parts[] = "split.count";
	uint64_t count = 1;
	gguf_text text;
	lshard_status status = gguf_find_value(file, parts) ? gguf_get_unsigned(file, parts, &count, error) : LSHARD_OK;

	if (status < 0)
		return status;
	if (count > 1)
		return engine_fail(error, LSHARD_ERR_NOT_SUPPORTED,
				   "%s: key '%s' is %" PRIu64
				   ": this is one of so many files of a model; only models in "
				   "one file are supported ('llama-gguf-split --merge' joins them)",
				   gguf_name(file), parts, count);
	if (!gguf_find_value(file, kind) || gguf_is_text(file, kind, "model"))
		return LSHARD_OK;
	status = gguf_get_string(file, kind, &text, error);
	return status < 0 ? status : refuse_text(file, kind, text, "only 'model' is supported", error);
}

static lshard_status check_architecture(const gguf *file, engine_error *error)
{
	gguf_text text;
	const lshard_status status = gguf_get_string(file, "general.architecture", &text, error);

	if (status < 0)
		return status;
	if (text.bytes != 5 || memcmp(text.at, "llama", 5) != 0)
		return engine_fail(error, LSHARD_ERR_NOT_SUPPORTED,
				   "%s: architecture '%.*s' is not supported; only 'llama' is", gguf_name(file),
				   (int)(text.bytes < 64 ? text.bytes : 64), text.at);
	return LSHARD_OK;
}

/* By how much positions are scaled: 0 and 1 mean not at all. Older files have another key for it. */
static lshard_status read_scale(const gguf *file, const char **key, double *factor, engine_error *error)
{
	*key = "llama.rope.scaling.factor";
	*factor = 1;
	if (!gguf_find_value(file, *key))
		*key = "llama.rope.scale_linear";
	return gguf_find_value(file, *key) ? gguf_get_number(file, *key, factor, error) : LSHARD_OK;
}

/*
 * As llama.cpp takes these keys: without a type they are linear, a factor of 0 is one of 1, and the type 'none' makes
 * all others void. What then leaves positions as they are is accepted.
 */
static lshard_status check_rope(const gguf *file, engine_error *error)
{
	static const char type[] = "llama.rope.scaling.type";
	const char *key = NULL;
	double factor = 1;
	gguf_text text;
	lshard_status status;

	if (gguf_is_text(file, type, "none"))
		return LSHARD_OK;
	if (gguf_find_value(file, type) && !gguf_is_text(file, type, "linear")) {
		status = gguf_get_string(file, type, &text, error);
		return status < 0 ? status : refuse_text(file, type, text, "only 'none' is supported", error);
	}
	status = read_scale(file, &key, &factor, error);
	if (status >= 0 && factor != 0 && factor != 1) /* exact: these two are written for "not scaled" */
		return engine_fail(error, LSHARD_ERR_NOT_SUPPORTED,
				   "%s: key '%s' is %g, which scales positions; only 1 is supported", gguf_name(file),
				   key, factor);
	return status;
}

/* Keys that say what this runner does anyway when they have this value, or are not there. */
static lshard_status check_numbers(const gguf *file, engine_error *error)
{
	static const char *const zero[] = {"llama.expert_count", "llama.expert_used_count",
					   "llama.attention.sliding_window", "llama.pooling_type"};
	size_t i;

	for (i = 0; i < sizeof zero / sizeof *zero; i++) {
		uint64_t value = 0;
		const lshard_status status =
			gguf_find_value(file, zero[i]) ? gguf_get_unsigned(file, zero[i], &value, error) : LSHARD_OK;

		if (status < 0)
			return status;
		if (value != 0)
			return engine_fail(error, LSHARD_ERR_NOT_SUPPORTED,
					   "%s: key '%s' is %" PRIu64 "; only 0 is supported", gguf_name(file), zero[i],
					   value);
	}
	return LSHARD_OK;
}

static lshard_status check_causal(const gguf *file, engine_error *error)
{
	static const char key[] = "llama.attention.causal";
	int causal = 1;
	const lshard_status status = gguf_find_value(file, key) ? gguf_get_bool(file, key, &causal, error) : LSHARD_OK;

	if (status >= 0 && !causal)
		return engine_fail(error, LSHARD_ERR_NOT_SUPPORTED, "%s: key '%s' is false; only true is supported",
				   gguf_name(file), key);
	return status;
}

/* All keys of the architecture that are looked at here, or change nothing that is computed. */
static int is_known_key(gguf_text key)
{
	static const char *const known[] = {
		"llama.attention.causal",
		"llama.attention.head_count",
		"llama.attention.head_count_kv",
		"llama.attention.key_length",
		"llama.attention.layer_norm_rms_epsilon",
		"llama.attention.sliding_window",
		"llama.attention.value_length",
		"llama.block_count",
		"llama.context_length",
		"llama.embedding_length",
		"llama.expert_count",
		"llama.expert_used_count",
		"llama.feed_forward_length",
		"llama.pooling_type",
		"llama.rope.dimension_count",
		"llama.rope.freq_base",
		"llama.rope.scale_linear",
		"llama.rope.scaling.factor",
		"llama.rope.scaling.finetuned",               /* said of the model, not of how it computes */
		"llama.rope.scaling.original_context_length", /* used by scaled positions only */
		"llama.rope.scaling.type",
		"llama.tensor_data_layout", /* of files before the one layout there is now */
		"llama.vocab_size",         /* the vocabulary itself tells */
	};
	size_t i;

	for (i = 0; i < sizeof known / sizeof *known; i++)
		if (gguf_compare_text(key, (gguf_text){known[i], strlen(known[i])}) == 0)
			return 1;
	return 0;
}

/* What a key nobody here knows would change is not known either. */
static lshard_status check_keys(const gguf *file, engine_error *error)
{
	static const char prefix[] = "llama.";
	uint32_t i;

	for (i = 0; i < gguf_value_count(file); i++) {
		const gguf_text key = gguf_value_at(file, i)->key;

		if (key.bytes < sizeof prefix || memcmp(key.at, prefix, sizeof prefix - 1) != 0 || is_known_key(key))
			continue;
		return engine_fail(error, LSHARD_ERR_NOT_SUPPORTED,
				   "%s: key '%.*s' is not understood, so the model cannot be computed", gguf_name(file),
				   (int)(key.bytes < 96 ? key.bytes : 96), key.at);
	}
	return LSHARD_OK;
}

/* Variants of the architecture that compute something else. */
static lshard_status check_variants(const gguf *file, engine_error *error)
{
	lshard_status status = check_rope(file, error);

	if (status >= 0)
		status = check_numbers(file, error);
	return status < 0 ? status : check_causal(file, error);
}

/* A size from 1 to @p most; @p missing is taken when there is no such key, unless it is 0. */
static lshard_status read_size(const gguf *file, const char *key, uint64_t most, uint32_t missing, uint32_t *size,
			       engine_error *error)
{
	uint64_t value = missing;
	const lshard_status status =
		missing != 0 && !gguf_find_value(file, key) ? LSHARD_OK : gguf_get_unsigned(file, key, &value, error);

	if (status < 0)
		return status;
	if (value < 1 || value > most)
		return engine_fail(error, LSHARD_ERR_INVALID, "%s: key '%s' is %" PRIu64 ", allowed are 1 to %" PRIu64,
				   gguf_name(file), key, value, most);
	*size = (uint32_t)value;
	return LSHARD_OK;
}

static lshard_status read_sizes(const gguf *file, struct llama_config *config, engine_error *error)
{
	lshard_status status = read_size(file, "llama.block_count", LAYERS_MAX, 0, &config->layers, error);

	if (status >= 0)
		status = read_size(file, "llama.embedding_length", SIZE_MAX_ALLOWED, 0, &config->hidden, error);
	if (status >= 0)
		status =
			read_size(file, "llama.feed_forward_length", SIZE_MAX_ALLOWED, 0, &config->feed_forward, error);
	if (status >= 0)
		status = read_size(file, "llama.context_length", (uint64_t)1 << 30, 0, &config->context, error);
	if (status >= 0 && config->context > SIZE_MAX_ALLOWED)
		config->context = SIZE_MAX_ALLOWED;
	return status;
}

/* Heads of keys and values may be fewer than those of queries, each serving a group of them. */
static lshard_status read_heads(const gguf *file, struct llama_config *config, engine_error *error)
{
	uint32_t value_head = 0;
	lshard_status status = read_size(file, "llama.attention.head_count", config->hidden, 0, &config->heads, error);

	if (status >= 0)
		status = read_size(file, "llama.attention.head_count_kv", config->heads, config->heads,
				   &config->kv_heads, error);
	if (status >= 0)
		status = read_size(file, "llama.attention.key_length", SIZE_MAX_ALLOWED / config->heads,
				   config->hidden / config->heads, &config->head, error);
	if (status >= 0)
		status = read_size(file, "llama.attention.value_length", SIZE_MAX_ALLOWED, config->head, &value_head,
				   error);
	if (status >= 0)
		status =
			read_size(file, "llama.rope.dimension_count", config->head, config->head, &config->rope, error);
	if (status < 0)
		return status;
	if (config->heads % config->kv_heads != 0 || value_head != config->head || config->rope % 2 != 0)
		return engine_fail(
			error, LSHARD_ERR_NOT_SUPPORTED,
			"%s: %" PRIu32 " heads of %" PRIu32 " values over %" PRIu32 " key/value heads of %" PRIu32
			", %" PRIu32 " values rotated: heads must divide evenly, be of one size, and rotate in pairs",
			gguf_name(file), config->heads, config->head, config->kv_heads, value_head, config->rope);
	return LSHARD_OK;
}

static lshard_status read_numbers(const gguf *file, struct llama_config *config, engine_error *error)
{
	double epsilon = 0;
	lshard_status status = gguf_get_number(file, "llama.attention.layer_norm_rms_epsilon", &epsilon, error);

	config->rope_base = 10000;
	if (status >= 0 && gguf_find_value(file, "llama.rope.freq_base"))
		status = gguf_get_number(file, "llama.rope.freq_base", &config->rope_base, error);
	if (status < 0)
		return status;
	if (!(epsilon > 0 && epsilon < 1 && config->rope_base >= 1))
		return engine_fail(error, LSHARD_ERR_INVALID, "%s: RMS epsilon %g or rope base %g makes no sense",
				   gguf_name(file), epsilon, config->rope_base);
	config->epsilon = (float)epsilon;
	return LSHARD_OK;
}

/* ---- Tensors --------------------------------------------------------------------------------------------------- */

/* Marks the tensors that are understood. */
struct claims {
	const gguf *file;
	engine_error *error;
	uint8_t *claimed;
};

static lshard_status claim(struct claims *claims, const char *name, uint64_t inputs, uint64_t outputs)
{
	const gguf_tensor *const tensor = gguf_find_tensor(claims->file, name);

	if (!tensor)
		return engine_fail(claims->error, LSHARD_ERR_INVALID, "%s: tensor '%s' is missing",
				   gguf_name(claims->file), name);
	if (tensor->size[0] != inputs || tensor->size[1] != outputs || tensor->size[2] != 1 || tensor->size[3] != 1)
		return engine_fail(claims->error, LSHARD_ERR_INVALID,
				   "%s: tensor '%s' is %" PRIu64 " x %" PRIu64 " x %" PRIu64 " x %" PRIu64
				   "; the model's shape asks for %" PRIu64 " x %" PRIu64,
				   gguf_name(claims->file), name, tensor->size[0], tensor->size[1], tensor->size[2],
				   tensor->size[3], inputs, outputs);
	claims->claimed[tensor - gguf_tensor_at(claims->file, 0)] = 1;
	return LSHARD_OK;
}

static lshard_status claim_block(struct claims *claims, const struct llama_config *config, uint32_t layer)
{
	static const char *const norms[] = {"attn_norm.weight", "ffn_norm.weight"};
	char name[TENSOR_NAME_BYTES];
	lshard_status status = LSHARD_OK;
	uint32_t outputs, inputs, i;

	for (i = 0; i < 2 && status >= 0; i++) {
		llama_block_tensor_name(layer, norms[i], name);
		status = claim(claims, name, config->hidden, 1);
	}
	for (i = 0; i < LINEARS && status >= 0; i++) {
		llama_block_tensor_name(layer, llama_linear_name(i), name);
		llama_linear_size(config, i, &outputs, &inputs);
		status = claim(claims, name, inputs, outputs);
	}
	return status;
}

static lshard_status read_vocabulary(const gguf *file, struct llama_config *config, engine_error *error)
{
	const gguf_tensor *const embedding = gguf_find_tensor(file, "token_embd.weight");

	if (!embedding)
		return engine_fail(error, LSHARD_ERR_INVALID, "%s: tensor 'token_embd.weight' is missing",
				   gguf_name(file));
	if (embedding->size[1] > INT32_MAX / 2)
		return engine_fail(error, LSHARD_ERR_INVALID, "%s: tensor 'token_embd.weight' has %" PRIu64 " rows",
				   gguf_name(file), embedding->size[1]);
	config->vocabulary = (uint32_t)embedding->size[1];
	config->tied = gguf_find_tensor(file, "output.weight") == NULL;
	return LSHARD_OK;
}

static lshard_status claim_all(struct claims *claims, const struct llama_config *config)
{
	lshard_status status = claim(claims, "token_embd.weight", config->hidden, config->vocabulary);
	uint32_t i;

	if (status >= 0)
		status = claim(claims, "output_norm.weight", config->hidden, 1);
	if (status >= 0 && !config->tied)
		status = claim(claims, "output.weight", config->hidden, config->vocabulary);
	for (i = 0; i < config->layers && status >= 0; i++)
		status = claim_block(claims, config, i);
	for (i = 0; i < gguf_tensor_count(claims->file) && status >= 0; i++)
		if (!claims->claimed[i])
			status = engine_fail(claims->error, LSHARD_ERR_NOT_SUPPORTED,
					     "%s: tensor '%.*s' is not understood, so the model cannot be computed",
					     gguf_name(claims->file), (int)gguf_tensor_at(claims->file, i)->name.bytes,
					     gguf_tensor_at(claims->file, i)->name.at);
	return status;
}

static lshard_status check_tensors(const gguf *file, const struct llama_config *config, engine_error *error)
{
	struct claims claims = {file, error, calloc((size_t)gguf_tensor_count(file) + 1, 1)};
	lshard_status status;

	if (!claims.claimed)
		return engine_fail(error, LSHARD_ERR_NO_MEMORY, "%s: no memory to check its tensors", gguf_name(file));
	status = claim_all(&claims, config);
	free(claims.claimed);
	return status;
}

lshard_status llama_config_read(const gguf *file, struct llama_config *config, engine_error *error)
{
	struct llama_config read = {0};
	lshard_status status = check_whole(file, error);

	if (status >= 0)
		status = check_architecture(file, error);
	if (status >= 0)
		status = check_variants(file, error);
	if (status >= 0)
		status = read_sizes(file, &read, error);
	if (status >= 0)
		status = read_heads(file, &read, error);
	if (status >= 0)
		status = read_numbers(file, &read, error);
	if (status >= 0)
		status = check_keys(file, error);
	if (status >= 0)
		status = read_vocabulary(file, &read, error);
	if (status >= 0)
		status = check_tensors(file, &read, error);
	if (status >= 0)
		*config = read;
	return status;
}
