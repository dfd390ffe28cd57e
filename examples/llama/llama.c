/* SPDX-License-Identifier: Apache-2.0
 *
 * llama.c - the forward pass: RMSNorm, rotary positions, grouped-query attention with a cache, SwiGLU.
 * Knows: the arithmetic. Does not know: where a linear's bytes come from, beyond entering its block first.
 *
 * Several tokens go through as one batch (a prompt), a single one through the matrix-vector product. Which path is
 * taken, and every buffer's alignment, depend on the text alone: so ranks, placements and modes all give the same bits.
 */
#include "llama.h"

#include <cblas.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ALIGNMENT      256u
#define ATTENTION_ROWS 256u /* rows of scores kept at once; their number is quadratic in the text otherwise */
#define OUTPUT_ROWS    128u /* rows of the output matrix turned into floats at once: they stay in a core's cache */

struct llama_text {
	uint32_t capacity;
	uint32_t length;
	size_t cache_stride;       /* of one layer, in floats */
	float *memory;             /* holds all that follows */
	float *keys, *values;      /* [layer][position][kv head] */
	float *cosines, *sines;    /* [position][pair] */
	float *state, *normed;     /* [batch][hidden] */
	float *queries, *attended; /* [batch][head] */
	float *gate, *up;          /* [batch][feed forward] */
	float *scores;             /* [row][position], of one head */
	float *output_rows;
};

/* ---- Memory ---------------------------------------------------------------------------------------------------- */

/* Hand out an aligned piece; with memory NULL, only count. */
static float *carve(float *memory, size_t *used, size_t floats)
{
	float *const piece = memory ? memory + *used : NULL;
	const size_t unit = ALIGNMENT / sizeof(float);

	*used += (floats + unit - 1) / unit * unit;
	return piece;
}

static size_t lay_out(struct llama_text *text, const struct llama_config *config, uint32_t batch)
{
	const size_t q = (size_t)config->heads * config->head;
	const size_t rows = batch < ATTENTION_ROWS ? batch : ATTENTION_ROWS;
	const size_t pairs = (size_t)text->capacity * (config->rope / 2);
	float *const memory = text->memory;
	size_t used = 0;

	text->keys = carve(memory, &used, text->cache_stride * config->layers);
	text->values = carve(memory, &used, text->cache_stride * config->layers);
	text->cosines = carve(memory, &used, pairs);
	text->sines = carve(memory, &used, pairs);
	text->state = carve(memory, &used, (size_t)batch * config->hidden);
	text->normed = carve(memory, &used, (size_t)batch * config->hidden);
	text->queries = carve(memory, &used, batch * q);
	text->attended = carve(memory, &used, batch * q);
	text->gate = carve(memory, &used, (size_t)batch * config->feed_forward);
	text->up = carve(memory, &used, (size_t)batch * config->feed_forward);
	text->scores = carve(memory, &used, rows * text->capacity);
	text->output_rows = carve(memory, &used, (size_t)OUTPUT_ROWS * config->hidden);
	return used;
}

static void fill_rotations(struct llama_text *text, const struct llama_config *config)
{
	const uint32_t pairs = config->rope / 2;
	uint32_t position, pair;

	for (pair = 0; pair < pairs; pair++) {
		const float frequency = (float)pow(config->rope_base, -2.0 * pair / config->rope);

		for (position = 0; position < text->capacity; position++) {
			const double angle = (double)((float)position * frequency);

			text->cosines[(size_t)position * pairs + pair] = (float)cos(angle);
			text->sines[(size_t)position * pairs + pair] = (float)sin(angle);
		}
	}
}

lshard_status llama_text_create(const struct llama_config *config, uint32_t batch, uint32_t capacity,
				struct llama_text **created, engine_error *error)
{
	const size_t unit = ALIGNMENT / sizeof(float);
	const size_t layer = (size_t)capacity * config->kv_heads * config->head;
	struct llama_text *const text = calloc(1, sizeof *text);
	size_t bytes = 0;

	if (text) {
		text->capacity = capacity;
		text->cache_stride = (layer + unit - 1) / unit * unit;
		bytes = lay_out(text, config, batch) * sizeof(float);
		text->memory = aligned_alloc(ALIGNMENT, bytes);
	}
	if (!text || !text->memory) {
		free(text);
		return engine_fail(error, LSHARD_ERR_NO_MEMORY, "no memory for a text of %u tokens (%zu bytes)",
				   (unsigned)capacity, bytes);
	}
	(void)lay_out(text, config, batch);
	fill_rotations(text, config);
	*created = text;
	return LSHARD_OK;
}

void llama_text_destroy(struct llama_text *text)
{
	if (!text)
		return;
	free(text->memory);
	free(text);
}

/* ---- Arithmetic ------------------------------------------------------------------------------------------------ */

/* to[row][output] = sum over inputs of from[row][input] * weight[output][input]; @p add 1: added to what is there. */
static void multiply(const float *weight, uint32_t outputs, uint32_t inputs, const float *from, uint32_t rows,
		     float add, float *to)
{
	const int m = (int)rows, n = (int)outputs, k = (int)inputs;

	if (rows == 1)
		cblas_sgemv(CblasRowMajor, CblasNoTrans, n, k, 1.0f, weight, k, from, 1, add, to, 1);
	else
		cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, n, k, 1.0f, from, k, weight, k, add, to, n);
}

static void normalise(const float *from, const float *weight, float epsilon, uint32_t size, uint32_t rows, float *to)
{
	uint32_t row, i;

	for (row = 0; row < rows; row++, from += size, to += size) {
		double sum = 0;
		float scale;

		for (i = 0; i < size; i++)
			sum += (double)from[i] * (double)from[i];
		scale = 1.0f / sqrtf((float)(sum / size) + epsilon);
		for (i = 0; i < size; i++)
			to[i] = from[i] * scale * weight[i];
	}
}

/* GGUF stores the rows of q and k so that the two values of a pair are neighbours. */
static void rotate_head(float *head, const float *cosines, const float *sines, uint32_t pairs)
{
	uint32_t pair;

	for (pair = 0; pair < pairs; pair++) {
		const float a = head[2 * pair];
		const float b = head[2 * pair + 1];

		head[2 * pair] = a * cosines[pair] - b * sines[pair];
		head[2 * pair + 1] = a * sines[pair] + b * cosines[pair];
	}
}

/* Rows of heads, of consecutive tokens from text->length on. */
static void rotate(const struct llama_text *text, const struct llama_config *config, float *rows, uint32_t heads,
		   uint32_t count)
{
	const uint32_t pairs = config->rope / 2;
	uint32_t row, head;

	for (row = 0; row < count; row++) {
		const size_t position = (size_t)(text->length + row) * pairs;

		for (head = 0; head < heads; head++, rows += config->head)
			rotate_head(rows, text->cosines + position, text->sines + position, pairs);
	}
}

/* The first @p seen scores become weights that sum to 1, the others 0. */
static void soften(float *scores, uint32_t seen, uint32_t all)
{
	float largest = scores[0];
	float sum = 0;
	uint32_t i;

	for (i = 1; i < seen; i++)
		largest = scores[i] > largest ? scores[i] : largest;
	for (i = 0; i < seen; i++) {
		scores[i] = expf(scores[i] - largest);
		sum += scores[i];
	}
	for (i = 0; i < seen; i++)
		scores[i] /= sum;
	memset(scores + seen, 0, (all - seen) * sizeof *scores);
}

/* gate = silu(gate) * up */
static void combine(float *gate, const float *up, size_t count)
{
	size_t i;

	for (i = 0; i < count; i++)
		gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

/* ---- The pass -------------------------------------------------------------------------------------------------- */

struct pass {
	const struct llama_config *config;
	const struct llama_model *model;
	struct llama_text *text;
	uint32_t count; /* tokens in this batch */
	uint32_t layer;
};

static void linear(const struct pass *pass, uint32_t which, const float *from, float add, float *to)
{
	uint32_t outputs, inputs;

	llama_linear_size(pass->config, which, &outputs, &inputs);
	multiply(blocks_linear(pass->model->blocks, pass->layer, which), outputs, inputs, from, pass->count, add, to);
}

static const float *norm(const struct pass *pass, size_t index)
{
	return pass->model->unsharded->norms + index * pass->config->hidden;
}

/* One head, rows [first, first + rows) of the batch: each sees the cache up to itself. */
static void attend_rows(const struct pass *pass, uint32_t head, uint32_t first, uint32_t rows)
{
	const struct llama_config *const config = pass->config;
	struct llama_text *const text = pass->text;
	const int q = (int)(config->heads * config->head);
	const int kv = (int)(config->kv_heads * config->head);
	const uint32_t kv_head = head / (config->heads / config->kv_heads);
	const size_t cache = pass->layer * text->cache_stride + (size_t)kv_head * config->head;
	const size_t at = (size_t)first * (size_t)q + (size_t)head * config->head;
	const uint32_t seen = text->length + first + rows; /* by the last of these rows */
	const float scale = 1.0f / sqrtf((float)config->head);
	uint32_t row;

	cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)rows, (int)seen, (int)config->head, scale,
		    text->queries + at, q, text->keys + cache, kv, 0.0f, text->scores, (int)seen);
	for (row = 0; row < rows; row++)
		soften(text->scores + (size_t)row * seen, text->length + first + row + 1, seen);
	cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)rows, (int)config->head, (int)seen, 1.0f,
		    text->scores, (int)seen, text->values + cache, kv, 0.0f, text->attended + at, q);
}

static void attention(const struct pass *pass)
{
	const struct llama_config *const config = pass->config;
	struct llama_text *const text = pass->text;
	const size_t kv = (size_t)config->kv_heads * config->head;
	const size_t cache = pass->layer * text->cache_stride + text->length * kv;
	uint32_t head, first;

	normalise(text->state, norm(pass, 2 * (size_t)pass->layer), config->epsilon, config->hidden, pass->count,
		  text->normed);
	linear(pass, ATTN_Q, text->normed, 0.0f, text->queries);
	linear(pass, ATTN_K, text->normed, 0.0f, text->keys + cache);
	linear(pass, ATTN_V, text->normed, 0.0f, text->values + cache);
	rotate(text, config, text->queries, config->heads, pass->count);
	rotate(text, config, text->keys + cache, config->kv_heads, pass->count);
	for (head = 0; head < config->heads; head++)
		for (first = 0; first < pass->count; first += ATTENTION_ROWS) {
			const uint32_t left = pass->count - first;

			attend_rows(pass, head, first, left < ATTENTION_ROWS ? left : ATTENTION_ROWS);
		}
	linear(pass, ATTN_OUTPUT, text->attended, 1.0f, text->state);
}

static void feed_forward(const struct pass *pass)
{
	const struct llama_config *const config = pass->config;
	struct llama_text *const text = pass->text;

	normalise(text->state, norm(pass, 2 * (size_t)pass->layer + 1), config->epsilon, config->hidden, pass->count,
		  text->normed);
	linear(pass, FFN_GATE, text->normed, 0.0f, text->gate);
	linear(pass, FFN_UP, text->normed, 0.0f, text->up);
	combine(text->gate, text->up, (size_t)pass->count * config->feed_forward);
	linear(pass, FFN_DOWN, text->gate, 1.0f, text->state);
}

/* Of the last token only: nobody asks what follows the others. */
static void output(const struct pass *pass, float *logits)
{
	const struct llama_config *const config = pass->config;
	const struct stored_matrix *const matrix = pass->model->unsharded->output;
	struct llama_text *const text = pass->text;
	const float *const last = text->state + (size_t)(pass->count - 1) * config->hidden;
	uint32_t first;

	normalise(last, norm(pass, 2 * (size_t)config->layers), config->epsilon, config->hidden, 1, text->normed);
	for (first = 0; first < config->vocabulary; first += OUTPUT_ROWS) {
		const uint32_t left = config->vocabulary - first;
		const uint32_t rows = left < OUTPUT_ROWS ? left : OUTPUT_ROWS;

		stored_rows(matrix, first, rows, text->output_rows);
		multiply(text->output_rows, rows, config->hidden, text->normed, 1, 0.0f, logits + first);
	}
}

lshard_status llama_append(const struct llama_model *model, struct llama_text *text, const int32_t *tokens,
			   uint32_t count, float *logits, engine_error *error)
{
	struct pass pass = {model->config, model, text, count, 0};
	lshard_status status;
	uint32_t i;

	for (i = 0; i < count; i++)
		stored_rows(&model->unsharded->embedding, (size_t)tokens[i], 1,
			    text->state + (size_t)i * model->config->hidden);
	for (; pass.layer < model->config->layers; pass.layer++) {
		status = blocks_enter(model->blocks, pass.layer, error);
		if (status < 0)
			return status;
		attention(&pass);
		feed_forward(&pass);
	}
	output(&pass, logits);
	text->length += count;
	return LSHARD_OK;
}
