/* SPDX-License-Identifier: Apache-2.0
 *
 * unsharded.c - loads the tensors every rank keeps whole.
 */
#include "unsharded.h"

#include <stdlib.h>
#include <string.h>

#include "dequant.h"

static lshard_status load_matrix(struct stored_matrix *matrix, gguf *file, const char *name, engine_error *error)
{
	const gguf_tensor *const tensor = gguf_find_tensor(file, name);

	matrix->encoding = tensor->encoding;
	matrix->columns = (size_t)tensor->size[0];
	matrix->row_bytes = gguf_encoded_bytes(tensor->encoding, matrix->columns);
	matrix->bytes = malloc((size_t)tensor->bytes);
	if (!matrix->bytes)
		return engine_fail(error, LSHARD_ERR_NO_MEMORY, "%s: no memory for tensor '%s' (%zu bytes)",
				   gguf_name(file), name, (size_t)tensor->bytes);
	return gguf_read_tensor(file, tensor, 0, matrix->bytes, (size_t)tensor->bytes, error);
}

static lshard_status load_norm(float *to, gguf *file, const char *name, engine_error *error)
{
	const gguf_tensor *const tensor = gguf_find_tensor(file, name);
	void *const stored = malloc((size_t)tensor->bytes);
	lshard_status status;

	if (!stored)
		return engine_fail(error, LSHARD_ERR_NO_MEMORY, "%s: no memory for tensor '%s'", gguf_name(file), name);
	status = gguf_read_tensor(file, tensor, 0, stored, (size_t)tensor->bytes, error);
	if (status >= 0)
		dequantise(tensor->encoding, stored, to, (size_t)tensor->values);
	free(stored);
	return status;
}

static lshard_status load_norms(struct unsharded *unsharded, const struct llama_config *config, gguf *file,
				engine_error *error)
{
	static const char *const parts[] = {"attn_norm.weight", "ffn_norm.weight"};
	char name[TENSOR_NAME_BYTES];
	lshard_status status = LSHARD_OK;
	size_t i;

	unsharded->norm_count = 2 * (size_t)config->layers + 1;
	unsharded->norms = malloc(unsharded->norm_count * config->hidden * sizeof *unsharded->norms);
	if (!unsharded->norms)
		return engine_fail(error, LSHARD_ERR_NO_MEMORY, "%s: no memory for its norms", gguf_name(file));
	for (i = 0; i + 1 < unsharded->norm_count && status >= 0; i++) {
		llama_block_tensor_name((uint32_t)(i / 2), parts[i % 2], name);
		status = load_norm(unsharded->norms + i * config->hidden, file, name, error);
	}
	return status < 0 ? status
			  : load_norm(unsharded->norms + i * config->hidden, file, "output_norm.weight", error);
}

lshard_status unsharded_init(struct unsharded *unsharded, const struct llama_config *config, gguf *file,
			     engine_error *error)
{
	lshard_status status;

	memset(unsharded, 0, sizeof *unsharded);
	status = load_norms(unsharded, config, file, error);
	if (status >= 0)
		status = load_matrix(&unsharded->embedding, file, "token_embd.weight", error);
	unsharded->output = &unsharded->embedding;
	if (status >= 0 && !config->tied) {
		status = load_matrix(&unsharded->own_output, file, "output.weight", error);
		unsharded->output = &unsharded->own_output;
	}
	return status;
}

void unsharded_fini(struct unsharded *unsharded)
{
	free(unsharded->own_output.bytes);
	free(unsharded->embedding.bytes);
	free(unsharded->norms);
	memset(unsharded, 0, sizeof *unsharded);
}

void stored_rows(const struct stored_matrix *matrix, size_t first, size_t count, float *to)
{
	dequantise(matrix->encoding, matrix->bytes + first * matrix->row_bytes, to, count * matrix->columns);
}
