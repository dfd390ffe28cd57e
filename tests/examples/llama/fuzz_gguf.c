/* SPDX-License-Identifier: Apache-2.0
 *
 * fuzz_gguf.c - whatever the bytes are, the GGUF reader, the model's shape and the tokenizer end with a status: no
 * crash, no read outside the file, no memory beyond what the file's size allows. With clang:
 * -fsanitize=fuzzer,address,undefined. As an ordinary test: linked with fuzz_replay.c, over tests/corpus/gguf.
 */
#include <stdlib.h>

#include "dequant.h"
#include "gguf_bytes.h"
#include "llama_config.h"
#include "tokenizer.h"

#define PIECE_VALUES 64 /* whole blocks */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void read_ends(gguf *file, const gguf_tensor *tensor, engine_error *error)
{
	const size_t piece = gguf_encoded_bytes(tensor->encoding, PIECE_VALUES);
	const size_t bytes = tensor->bytes < piece ? (size_t)tensor->bytes : piece;
	const size_t values = bytes / gguf_encoded_bytes(tensor->encoding, 32) * 32;
	uint8_t stored[PIECE_VALUES * 4];
	float floats[PIECE_VALUES];

	if (gguf_read_tensor(file, tensor, 0, stored, bytes, error) < 0)
		abort(); /* it was checked against the file's size */
	dequantise(tensor->encoding, stored, floats, values);
	if (gguf_read_tensor(file, tensor, tensor->bytes - bytes, stored, bytes, error) < 0)
		abort();
}

static void encode(const gguf *file, engine_error *error)
{
	struct tokenizer *tokenizer;
	int32_t *tokens;
	size_t count, i, bytes;

	if (tokenizer_create(file, &tokenizer, error) < 0)
		return;
	if (tokenizer_encode(tokenizer, "the 12 <|im_start|>\xc3\xbc and", &tokens, &count, error) >= 0) {
		for (i = 0; i < count; i++)
			(void)tokenizer_text(tokenizer, tokens[i], &bytes);
		free(tokens);
	}
	tokenizer_destroy(tokenizer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const struct gguf_bytes bytes = {(uint8_t *)(uintptr_t)data, size}; /* only read */
	struct llama_config config;
	engine_error error;
	gguf *file;
	uint32_t i;

	if (gguf_bytes_open(&bytes, &file, &error) < 0)
		return 0;
	for (i = 0; i < gguf_tensor_count(file); i++)
		read_ends(file, gguf_tensor_at(file, i), &error);
	(void)llama_config_read(file, &config, &error);
	encode(file, &error);
	gguf_close(file);
	return 0;
}
