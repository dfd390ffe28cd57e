/* SPDX-License-Identifier: Apache-2.0
 *
 * engine.h - a small Llama runner over layershard's public header; what a program needs to run a model.
 *
 * All linears of a block are one layer of one series. A rank reads from the file the layers it is source of and what is
 * not sharded (norms, embeddings), nothing else. Without a group every layer is read and kept: the replicated mode,
 * with the same arithmetic and the same tokens, bit for bit.
 *
 * Every function returns an lshard_status and, on failure, a sentence in @p error (which may be NULL). Out-parameters
 * are written on success only. One thread at a time per engine. Nothing prints, nothing exits, nothing waits for ever:
 * waits for other ranks end after the group's timeout.
 */
#ifndef ENGINE_H
#define ENGINE_H

#include <stddef.h>
#include <stdint.h>

#include "engine_error.h"
#include "layershard/layershard.h"

typedef struct engine engine;

typedef struct engine_options {
	const char *model;   /* path of a GGUF file of the llama architecture */
	lshard_group *group; /* NULL: replicated, no series. Must outlive the engine */
	uint32_t prefetch;   /* as lshard_series_options; ignored when replicated, like the next two */
	lshard_placement placement;
	uint64_t resident_bytes;
	int threads; /* threads of the BLAS in this process; 0: OPENBLAS_NUM_THREADS if set, else 1 */
} engine_options;

#define ENGINE_OPTIONS_INIT {NULL, NULL, 1, LSHARD_WHOLE, 0, 0}

/** What a model is, from its header alone. */
typedef struct engine_model {
	uint32_t layers;
	uint64_t layer_bytes;          /* one block's linears as F32, packed as the series packs them */
	uint64_t sharded_file_bytes;   /* all blocks' linears in the file; a rank reads those it is source of */
	uint64_t unsharded_file_bytes; /* the other tensors; every rank reads them */
	uint64_t file_bytes;
	uint32_t hidden;
	uint32_t heads;
	uint32_t kv_heads;
	uint32_t vocabulary;
	uint32_t context; /* most tokens, prompt and answer together */
} engine_model;

typedef struct engine_stats {
	uint32_t layers;
	uint64_t layer_bytes;
	uint64_t read_bytes;          /* everything this rank read from the file */
	uint64_t metadata_read_bytes; /* of these: header, vocabulary, tensor descriptions; the same on every rank */
	uint64_t prompt_tokens;       /* of all engine_generate calls so far */
	uint64_t generated_tokens;
	uint64_t prompt_ns; /* time in processing prompts, waits included */
	uint64_t decode_ns; /* time in all further tokens, waits included */
} engine_stats;

/**
 * The model that scripts/fetch_model.sh stores: $LAYERSHARD_CACHE, else $XDG_CACHE_HOME/layershard, else
 * $HOME/.cache/layershard, and the file's name. The file need not exist.
 * @return OK; ERR_STATE when none of the variables is set; ERR_INVALID when @p bytes are too few.
 */
lshard_status engine_default_model(char *path, size_t bytes, engine_error *error);

/**
 * Look at a model's header, its vocabulary included: a model that passes can be loaded. Reads no tensor.
 * @return OK; ERR_SYSTEM (no such file, not readable); ERR_INVALID (damaged); ERR_NOT_SUPPORTED (another architecture,
 * tokenizer or type, a part of a model, ...); ERR_NO_MEMORY.
 */
lshard_status engine_model_info(const char *path, engine_model *model, engine_error *error);

/**
 * Load a model. Collective when options->group is set: all ranks call it with equal options; the group's timeout must
 * be longer than the load. Ranks with different models get ERR_MISMATCH: files that differ in
 * size, time of change, head or norms.
 * @return as engine_model_info, and as lshard_series_create and lshard_series_commit.
 */
lshard_status engine_open(const engine_options *options, engine **opened, engine_error *error);

/** Destroys the series too; before lshard_group_destroy. NULL is allowed. Never waits for a peer. */
void engine_close(engine *engine);

/** For lshard_series_stats and lshard_series_verify. NULL when replicated. */
lshard_series *engine_series(engine *engine);

void engine_get_stats(const engine *engine, engine_stats *stats);

/**
 * Text to token ids, special tokens recognised, BOS first if the file asks for it. No chat template is applied.
 * @param tokens  set to memory the caller frees with free(); never NULL on success, even for no tokens.
 * @return OK; ERR_INVALID when @p text is not UTF-8; ERR_NO_MEMORY.
 */
lshard_status engine_encode(engine *engine, const char *text, int32_t **tokens, size_t *count, engine_error *error);

/** Called for each generated token as it comes. Anything but 0 ends the generation, which then returns OK. */
typedef int (*engine_on_token)(void *user, int32_t token, const char *text, size_t bytes);

/**
 * Continue the prompt, greedily, until @p max_tokens tokens, the end-of-text token (given to @p on_token too, with no
 * text), or @p on_token asks to stop. Each call starts afresh.
 * Local: other ranks need not make the same calls.
 * @return OK; ERR_INVALID for an empty prompt, ids out of range, or more tokens than the model's context;
 *         ERR_NO_MEMORY; as lshard_reach and lshard_wait. After a failure the next call may work again.
 */
lshard_status engine_generate(engine *engine, const int32_t *prompt, size_t count, uint32_t max_tokens,
			      engine_on_token on_token, void *user, engine_error *error);

/** The logits from which the last token was chosen, one for each id. Lives until the next engine_generate. */
const float *engine_logits(const engine *engine, size_t *count);

/** The clock by which engine_generate takes its times. */
uint64_t engine_now_ns(void);

#endif
