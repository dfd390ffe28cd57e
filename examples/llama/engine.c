/* SPDX-License-Identifier: Apache-2.0
 *
 * engine.c - opens a model, generates text, counts. See engine.h.
 * Knows: the order in which the parts are built and torn down. The parts do the work.
 */
#include "engine.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "blas.h"
#include "blocks.h"
#include "gguf.h"
#include "llama.h"
#include "llama_config.h"
#include "tokenizer.h"
#include "unsharded.h"

#define MODEL_FILE "SmolLM2-135M-Instruct.Q4_1.gguf" /* as scripts/fetch_model.sh names it */

struct engine {
	struct llama_config config;
	struct tokenizer *tokenizer;
	struct unsharded unsharded;
	struct blocks blocks;
	float *logits;
	engine_stats stats;
};

/* ---- Without loading ------------------------------------------------------------------------------------------- */

lshard_status engine_default_model(char *path, size_t bytes, engine_error *error)
{
	static const struct {
		const char *variable;
		const char *below;
	} places[] = {{"LAYERSHARD_CACHE", ""}, {"XDG_CACHE_HOME", "/layershard"}, {"HOME", "/.cache/layershard"}};
	size_t i;

	for (i = 0; i < sizeof places / sizeof *places; i++) {
		const char *const set = getenv(places[i].variable);
		const size_t needed = set ? strlen(set) + strlen(places[i].below) + sizeof "/" MODEL_FILE : 0;

		if (!set || !*set)
			continue;
		if (needed > bytes)
			return engine_fail(error, LSHARD_ERR_INVALID,
					   "%s: the model's path takes %zu bytes, %zu are there", places[i].variable,
					   needed, bytes);
		(void)snprintf(path, bytes, "%s%s/" MODEL_FILE, set, places[i].below);
		return LSHARD_OK;
	}
	return engine_fail(error, LSHARD_ERR_STATE,
			   "no model is named, and none of LAYERSHARD_CACHE, XDG_CACHE_HOME and HOME is set");
}

static void describe(const gguf *file, const struct llama_config *config, engine_model *model)
{
	char name[TENSOR_NAME_BYTES];
	uint64_t all = 0;
	uint64_t sharded = 0;
	uint32_t i, layer;

	for (i = 0; i < gguf_tensor_count(file); i++)
		all += gguf_tensor_at(file, i)->bytes;
	for (layer = 0; layer < config->layers; layer++)
		for (i = 0; i < LINEARS; i++) {
			llama_block_tensor_name(layer, llama_linear_name(i), name);
			sharded += gguf_find_tensor(file, name)->bytes;
		}
	model->layers = config->layers;
	model->layer_bytes = blocks_layer_bytes(config);
	model->sharded_file_bytes = sharded;
	model->unsharded_file_bytes = all - sharded;
	model->file_bytes = gguf_file_bytes(file);
	model->hidden = config->hidden;
	model->heads = config->heads;
	model->kv_heads = config->kv_heads;
	model->vocabulary = config->vocabulary;
	model->context = config->context;
}

static lshard_status check_vocabulary(const struct tokenizer *tokenizer, const struct llama_config *config,
				      const gguf *file, engine_error *error)
{
	const uint32_t tokens = tokenizer_size(tokenizer);

	if (tokens != config->vocabulary)
		return engine_fail(error, LSHARD_ERR_INVALID,
				   "%s: %" PRIu32 " tokens, but 'token_embd.weight' has %" PRIu32 " rows",
				   gguf_name(file), tokens, config->vocabulary);
	return LSHARD_OK;
}

/* All that a file's head says, and all that can be wrong with a model before its tensors are read. */
static lshard_status read_head(const gguf *file, struct llama_config *config, struct tokenizer **tokenizer,
			       engine_error *error)
{
	lshard_status status = llama_config_read(file, config, error);

	if (status >= 0)
		status = tokenizer_create(file, tokenizer, error);
	return status < 0 ? status : check_vocabulary(*tokenizer, config, file, error);
}

lshard_status engine_model_info(const char *path, engine_model *model, engine_error *error)
{
	struct llama_config config;
	struct tokenizer *tokenizer = NULL;
	gguf *file;
	lshard_status status = gguf_open_file(path, &file, error);

	if (status < 0)
		return status;
	status = read_head(file, &config, &tokenizer, error);
	if (status >= 0)
		describe(file, &config, model);
	tokenizer_destroy(tokenizer);
	gguf_close(file);
	return status;
}

/* ---- Opening --------------------------------------------------------------------------------------------------- */

static uint64_t hash(uint64_t so_far, const void *bytes, size_t count)
{
	const uint8_t *const at = bytes;
	size_t i;

	for (i = 0; i < count; i++)
		so_far = (so_far ^ at[i]) * 0x100000001b3u; /* FNV-1a */
	return so_far;
}

/*
 * Of what every rank knows anyway: the file's size and time of change, its head and its norms. A copy made without its
 * time stamps is taken for another model; two files of the same time, size, head and norms are taken for one, whatever
 * their other weights are.
 */
static uint64_t fingerprint(const struct engine *self, const gguf *file)
{
	const gguf_text head = gguf_head(file);
	const uint64_t about[] = {gguf_file_bytes(file), gguf_modified_ns(file)};
	uint64_t print = hash(0xcbf29ce484222325u, head.at, head.bytes);

	print = hash(print, about, sizeof about);
	return hash(print, self->unsharded.norms, self->unsharded.norm_count * self->config.hidden * sizeof(float));
}

static lshard_status load(struct engine *self, gguf *file, const engine_options *options, engine_error *error)
{
	lshard_status status = read_head(file, &self->config, &self->tokenizer, error);

	self->stats.metadata_read_bytes = gguf_read_bytes(file);
	if (status >= 0)
		status = unsharded_init(&self->unsharded, &self->config, file, error);
	if (status < 0)
		return status;
	self->logits = calloc(self->config.vocabulary, sizeof *self->logits);
	if (!self->logits)
		return engine_fail(error, LSHARD_ERR_NO_MEMORY, "%s: no memory for logits", options->model);
	status = blocks_open(&self->blocks, &self->config, file, options, fingerprint(self, file), error);
	self->stats.layers = self->config.layers;
	self->stats.layer_bytes = blocks_layer_bytes(&self->config);
	self->stats.read_bytes = gguf_read_bytes(file);
	return status;
}

lshard_status engine_open(const engine_options *options, engine **opened, engine_error *error)
{
	struct engine *const self = calloc(1, sizeof *self);
	gguf *file = NULL;
	lshard_status status;

	if (!self)
		return engine_fail(error, LSHARD_ERR_NO_MEMORY, "%s: no memory", options->model);
	status = gguf_open_file(options->model, &file, error);
	if (status >= 0) {
		blas_use_threads(options->threads);
		status = load(self, file, options, error);
		gguf_close(file);
	}
	if (status < 0)
		engine_close(self);
	else
		*opened = self;
	return status;
}

void engine_close(engine *self)
{
	if (!self)
		return;
	blocks_close(&self->blocks);
	free(self->logits);
	unsharded_fini(&self->unsharded);
	tokenizer_destroy(self->tokenizer);
	free(self);
}

lshard_series *engine_series(engine *self)
{
	return self->blocks.series;
}

void engine_get_stats(const engine *self, engine_stats *stats)
{
	*stats = self->stats;
}

lshard_status engine_encode(engine *self, const char *text, int32_t **tokens, size_t *count, engine_error *error)
{
	return tokenizer_encode(self->tokenizer, text, tokens, count, error);
}

const float *engine_logits(const engine *self, size_t *count)
{
	*count = self->config.vocabulary;
	return self->logits;
}

/* ---- Generating ------------------------------------------------------------------------------------------------ */

uint64_t engine_now_ns(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static lshard_status check_prompt(const struct engine *self, const int32_t *prompt, size_t count, uint32_t max_tokens,
				  engine_error *error)
{
	size_t i;

	if (count == 0)
		return engine_fail(error, LSHARD_ERR_INVALID, "the prompt is empty");
	if (count > self->config.context || max_tokens > self->config.context - count)
		return engine_fail(error, LSHARD_ERR_INVALID,
				   "%zu prompt tokens and %" PRIu32 " more do not fit the model's context of %" PRIu32,
				   count, max_tokens, self->config.context);
	for (i = 0; i < count; i++)
		if (prompt[i] < 0 || (uint32_t)prompt[i] >= self->config.vocabulary)
			return engine_fail(error, LSHARD_ERR_INVALID,
					   "prompt token %zu is %" PRId32 ", but there are %" PRIu32 " tokens", i,
					   prompt[i], self->config.vocabulary);
	return LSHARD_OK;
}

/* The lowest of the best tokens after @p length tokens. A NaN is neither more nor less than anything, and would win. */
static lshard_status choose(const struct engine *self, size_t length, int32_t *token, engine_error *error)
{
	int32_t best = 0;
	uint32_t i;

	for (i = 0; i < self->config.vocabulary; i++) {
		if (!isfinite(self->logits[i]))
			return engine_fail(error, LSHARD_ERR_INVALID,
					   "after %zu tokens (prompt and answer) the model gives token %" PRIu32
					   " the value %g, which is no finite number; its file is damaged",
					   length, i, (double)self->logits[i]);
		if (self->logits[i] > self->logits[best])
			best = (int32_t)i;
	}
	*token = best;
	return LSHARD_OK;
}

static lshard_status append(struct engine *self, struct llama_text *text, const int32_t *tokens, size_t count,
			    uint64_t *spent_ns, engine_error *error)
{
	const struct llama_model model = {&self->config, &self->unsharded, &self->blocks};
	const uint64_t start = engine_now_ns();
	const lshard_status status = llama_append(&model, text, tokens, (uint32_t)count, self->logits, error);

	*spent_ns += engine_now_ns() - start;
	return status;
}

/* Returns 0 when the text ends here. */
static int emit(struct engine *self, int32_t token, engine_on_token on_token, void *user)
{
	size_t bytes;
	const char *const text = tokenizer_text(self->tokenizer, token, &bytes);

	self->stats.generated_tokens++;
	return on_token(user, token, text, bytes) == 0 && token != tokenizer_end(self->tokenizer);
}

static lshard_status continue_text(struct engine *self, struct llama_text *text, size_t length, uint32_t max_tokens,
				   engine_on_token on_token, void *user, engine_error *error)
{
	lshard_status status;
	uint32_t made;

	for (made = 1; made <= max_tokens; made++) {
		int32_t token;

		status = choose(self, length + made - 1, &token, error);
		if (status < 0)
			return status;
		if (!emit(self, token, on_token, user) || made == max_tokens)
			break;
		status = append(self, text, &token, 1, &self->stats.decode_ns, error);
		if (status < 0)
			return status;
	}
	return LSHARD_OK;
}

lshard_status engine_generate(engine *self, const int32_t *prompt, size_t count, uint32_t max_tokens,
			      engine_on_token on_token, void *user, engine_error *error)
{
	struct llama_text *text;
	lshard_status status = check_prompt(self, prompt, count, max_tokens, error);

	if (status < 0)
		return status;
	status = llama_text_create(&self->config, (uint32_t)count, (uint32_t)count + max_tokens, &text, error);
	if (status < 0)
		return status;
	status = append(self, text, prompt, count, &self->stats.prompt_ns, error);
	if (status >= 0) {
		self->stats.prompt_tokens += count;
		status = continue_text(self, text, count, max_tokens, on_token, user, error);
	}
	llama_text_destroy(text);
	return status;
}
