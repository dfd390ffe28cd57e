/* SPDX-License-Identifier: Apache-2.0
 *
 * test_gguf.c - the GGUF reader and what the engine makes of a model's head: good files are read whole, damaged and
 * hostile ones get a message that names what is wrong, whatever byte it is. The tiny model of scripts/make_tiny_gguf.py
 * is the first argument, or in LAYERSHARD_TEST_MODEL_TINY.
 */
#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "dequant.h"
#include "engine.h"
#include "gguf_bytes.h"
#include "llama_config.h"
#include "tokenizer.h"

static struct gguf_bytes tiny;
static const char *tiny_path;

/* Everything the engine does with a head: parse, shape, tokenizer. */
static lshard_status read_head(const struct gguf_bytes *bytes, engine_error *error)
{
	struct llama_config config;
	struct tokenizer *tokenizer = NULL;
	gguf *file;
	lshard_status status = gguf_bytes_open(bytes, &file, error);

	if (status < 0)
		return status;
	status = llama_config_read(file, &config, error);
	if (status >= 0)
		status = tokenizer_create(file, &tokenizer, error);
	tokenizer_destroy(tokenizer);
	gguf_close(file);
	return status;
}

/* The damaged copy is refused with this status, by a message that holds the file's name and all of the words. */
static void assert_refused(struct gguf_bytes damaged, lshard_status wanted, const char *const *words)
{
	engine_error error = {""};
	const lshard_status status = read_head(&damaged, &error);

	if (status != wanted || !strstr(error.text, "memory"))
		fail_msg("status %d instead of %d: %s", status, wanted, error.text);
	for (; *words; words++)
		if (!strstr(error.text, *words))
			fail_msg("'%s' is not in the message: %s", *words, error.text);
	free(damaged.at);
}

static void assert_accepted(struct gguf_bytes changed)
{
	engine_error error = {""};

	if (read_head(&changed, &error) != LSHARD_OK)
		fail_msg("refused: %s", error.text);
	free(changed.at);
}

#define REFUSED(damaged, wanted, ...) assert_refused((damaged), (wanted), (const char *const[]){__VA_ARGS__, NULL})

/* The descriptions of a matrix behind its name: dimensions, two sizes, type, offset. */
enum { DIMENSIONS = 0, SIZE_0 = 4, SIZE_1 = 12, TYPE = 20, OFFSET = 24 };

static struct gguf_bytes with_tensor_field(const char *tensor, size_t field, uint64_t value, size_t bytes)
{
	const struct gguf_bytes copy = gguf_bytes_copy(tiny);

	gguf_bytes_put(gguf_bytes_after(copy, tensor) + field, value, bytes);
	return copy;
}

/* Change what follows a key: its type is at 0, a scalar at 4, an array's element type at 4 and its count at 8. */
static struct gguf_bytes with_key_field(const char *key, size_t field, uint64_t value, size_t bytes)
{
	return with_tensor_field(key, field, value, bytes);
}

static struct gguf_bytes with_text(const char *text, const char *other)
{
	const struct gguf_bytes copy = gguf_bytes_copy(tiny);

	assert_int_equal(strlen(text), strlen(other));
	memcpy(gguf_bytes_after(copy, text) - strlen(other), other, strlen(other));
	return copy;
}

static struct gguf_bytes with_bytes(size_t at, uint64_t value, size_t count)
{
	const struct gguf_bytes copy = gguf_bytes_copy(tiny);

	gguf_bytes_put(copy.at + at, value, count);
	return copy;
}

static void a_good_file_is_read_whole(void **state)
{
	engine_error error = {""};
	uint64_t stored = 0;
	uint64_t before;
	gguf *file = NULL;
	uint32_t i;

	(void)state;
	assert_int_equal(gguf_open_file(tiny_path, &file, &error), LSHARD_OK);
	before = gguf_read_bytes(file);
	assert_in_range(before, gguf_head(file).bytes, gguf_head(file).bytes + 4096);
	for (i = 0; i < gguf_tensor_count(file); i++) {
		const gguf_tensor *const tensor = gguf_tensor_at(file, i);
		void *const bytes = malloc((size_t)tensor->bytes);

		assert_int_equal(gguf_read_tensor(file, tensor, 0, bytes, (size_t)tensor->bytes, &error), LSHARD_OK);
		assert_memory_equal(bytes, tiny.at + tensor->offset, (size_t)tensor->bytes);
		assert_int_equal(gguf_read_tensor(file, tensor, 1, bytes, (size_t)tensor->bytes, &error),
				 LSHARD_ERR_RANGE);
		stored += tensor->bytes;
		free(bytes);
	}
	assert_int_equal(gguf_read_bytes(file), before + stored);
	gguf_close(file);
}

static void a_model_is_described_without_loading_it(void **state)
{
	engine_model model = {0};
	engine_error error = {""};

	(void)state;
	assert_int_equal(engine_model_info(tiny_path, &model, &error), LSHARD_OK);
	assert_int_equal(model.layers, 8);
	assert_int_equal(model.layer_bytes, 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64));
	assert_int_equal(model.vocabulary, 275);
	assert_int_equal(model.file_bytes, tiny.count);
	assert_in_range(model.sharded_file_bytes + model.unsharded_file_bytes, tiny.count * 9 / 10, tiny.count);
}

static void every_length_short_of_the_whole_is_refused(void **state)
{
	engine_error error;
	struct gguf_bytes cut = tiny;
	size_t step;

	(void)state;
	for (cut.count = 0; cut.count < tiny.count; cut.count += step) {
		/* an exact allocation: a sanitizer sees a read beyond it */
		const struct gguf_bytes exact = gguf_bytes_copy(cut);

		step = cut.count < 12000 ? 7 : tiny.count / 100;
		error.text[0] = '\0';
		assert_int_equal(read_head(&exact, &error), LSHARD_ERR_INVALID);
		assert_non_null(strstr(error.text, "memory: "));
		assert_true(strstr(error.text, "file ends at") || strstr(error.text, "file's end at") ||
			    strstr(error.text, "bytes follow"));
		free(exact.at);
	}
}

static void absurd_counts_are_refused(void **state)
{
	(void)state;
	REFUSED(with_bytes(8, UINT64_MAX, 8), LSHARD_ERR_INVALID, "18446744073709551615 tensors");
	REFUSED(with_bytes(8, 60000, 8), LSHARD_ERR_INVALID, "60000 tensors");
	REFUSED(with_bytes(16, (uint64_t)1 << 40, 8), LSHARD_ERR_INVALID, "1099511627776 keys");
	REFUSED(with_bytes(24, UINT64_MAX - 7, 8), LSHARD_ERR_INVALID, "key number 0", "18446744073709551608 bytes");
	REFUSED(with_bytes(24, 0, 8), LSHARD_ERR_INVALID, "key number 0", "0 bytes");
	REFUSED(with_key_field("tokenizer.ggml.tokens", 8, (uint64_t)1 << 61, 8), LSHARD_ERR_INVALID,
		"'tokenizer.ggml.tokens'", "2305843009213693952 elements");
	REFUSED(with_key_field("tokenizer.ggml.token_type", 8, 274, 8), LSHARD_ERR_INVALID, "key number 14");
	REFUSED(with_key_field("general.name", 4, UINT64_MAX, 8), LSHARD_ERR_INVALID, "'general.name'",
		"18446744073709551615");
	REFUSED(with_key_field("llama.block_count", 4, 5000, 4), LSHARD_ERR_INVALID, "'llama.block_count'", "5000");
	REFUSED(with_key_field("llama.block_count", 4, 0, 4), LSHARD_ERR_INVALID, "'llama.block_count'", "is 0");
	REFUSED(with_key_field("llama.embedding_length", 4, UINT32_MAX, 4), LSHARD_ERR_INVALID,
		"'llama.embedding_length'", "4294967295");
}

static void unsound_values_are_refused(void **state)
{
	(void)state;
	REFUSED(with_bytes(0, 0, 1), LSHARD_ERR_INVALID, "not a GGUF file");
	REFUSED(with_bytes(4, 1, 4), LSHARD_ERR_NOT_SUPPORTED, "version 1 ");
	REFUSED(with_bytes(4, 0x03000000, 4), LSHARD_ERR_NOT_SUPPORTED, "big-endian");
	REFUSED(with_bytes(4, 0x04000000, 4), LSHARD_ERR_NOT_SUPPORTED, "version 67108864");
	REFUSED(with_key_field("general.name", 0, 13, 4), LSHARD_ERR_INVALID, "'general.name'", "type 13");
	REFUSED(with_key_field("tokenizer.ggml.merges", 4, 9, 4), LSHARD_ERR_NOT_SUPPORTED, "'tokenizer.ggml.merges'",
		"arrays of arrays");
	REFUSED(with_key_field("llama.block_count", 0, 6, 4), LSHARD_ERR_INVALID, "'llama.block_count'",
		"a whole number");
	REFUSED(with_key_field("llama.rope.freq_base", 4, 0x7f800000, 4), LSHARD_ERR_INVALID, "'llama.rope.freq_base'",
		"finite");
	REFUSED(with_text("llama.context_length", "general.architecture"), LSHARD_ERR_INVALID, "'general.architecture'",
		"twice");
	REFUSED(with_text("llama.embedding_length", "llama.embedding_lengtX"), LSHARD_ERR_INVALID,
		"'llama.embedding_length'", "missing");
	assert_accepted(with_key_field("llama.block_count", 0, GGUF_I32, 4));
}

static void unsound_tensors_are_refused(void **state)
{
	static const char q[] = "blk.0.attn_q.weight";

	(void)state;
	REFUSED(with_tensor_field(q, TYPE, 14, 4), LSHARD_ERR_NOT_SUPPORTED, q, "type 14 Q6_K");
	REFUSED(with_tensor_field(q, TYPE, 30, 4), LSHARD_ERR_NOT_SUPPORTED, q, "type 30 BF16");
	REFUSED(with_tensor_field(q, TYPE, 39, 4), LSHARD_ERR_NOT_SUPPORTED, q, "type 39 MXFP4");
	REFUSED(with_tensor_field(q, TYPE, 77, 4), LSHARD_ERR_NOT_SUPPORTED, q, "type 77 is");
	REFUSED(with_tensor_field(q, TYPE, UINT32_MAX, 4), LSHARD_ERR_NOT_SUPPORTED, q, "type 4294967295");
	REFUSED(with_tensor_field(q, DIMENSIONS, 5, 4), LSHARD_ERR_INVALID, q, "5 dimensions");
	REFUSED(with_tensor_field(q, DIMENSIONS, 0, 4), LSHARD_ERR_INVALID, q, "0 dimensions");
	REFUSED(with_tensor_field(q, SIZE_0, 0, 8), LSHARD_ERR_INVALID, q, "dimension 0 is 0");
	REFUSED(with_tensor_field(q, SIZE_1, (uint64_t)1 << 58, 8), LSHARD_ERR_INVALID, q, "2^56");
	REFUSED(with_tensor_field(q, SIZE_1, UINT64_MAX, 8), LSHARD_ERR_INVALID, q, "18446744073709551615");
	REFUSED(with_tensor_field(q, SIZE_1, 4096, 8), LSHARD_ERR_INVALID, "'blk.0.attn_q.weight'");
	REFUSED(with_tensor_field(q, SIZE_1, 63, 8), LSHARD_ERR_INVALID, q, "64 x 63");
	REFUSED(with_tensor_field("token_embd.weight", SIZE_0, 48, 8), LSHARD_ERR_INVALID, "'token_embd.weight'",
		"whole blocks of 32");
	REFUSED(with_tensor_field(q, OFFSET, 33, 8), LSHARD_ERR_INVALID, q, "33", "alignment 32");
	REFUSED(with_tensor_field(q, OFFSET, UINT64_MAX - 31, 8), LSHARD_ERR_INVALID, q, "18446744073709551584", "end");
	REFUSED(with_tensor_field(q, OFFSET, tiny.count / 32 * 32, 8), LSHARD_ERR_INVALID, q, "end");
	REFUSED(with_tensor_field(q, OFFSET, 32, 8), LSHARD_ERR_INVALID, q, "inside", "'token_embd.weight'");
	REFUSED(with_text(q, "blk.1.attn_q.weight"), LSHARD_ERR_INVALID, "'blk.1.attn_q.weight'", "twice");
	REFUSED(with_text(q, "blk.0.attn_\033.weight"), LSHARD_ERR_INVALID, "'blk.0.attn_q.weight'", "missing");
}

static void other_models_are_refused_by_name(void **state)
{
	(void)state;
	REFUSED(with_text("llama", "qwen3"), LSHARD_ERR_NOT_SUPPORTED, "'qwen3'", "'llama'");
	REFUSED(with_text("llama", "\033[31m"), LSHARD_ERR_NOT_SUPPORTED, "'?[31m'"); /* a terminal is safe from it */
	REFUSED(with_text("smollm", "llama3"), LSHARD_ERR_NOT_SUPPORTED, "'tokenizer.ggml.pre'", "'llama3'");
	REFUSED(with_text("tokenizer.ggml.pre", "tokenizer.ggml.prx"), LSHARD_ERR_NOT_SUPPORTED, "'tokenizer.ggml.pre'",
		"'default'");
	REFUSED(with_text("gpt2", "bert"), LSHARD_ERR_NOT_SUPPORTED, "'tokenizer.ggml.model'", "'bert'");
	REFUSED(with_key_field("llama.block_count", 4, 7, 4), LSHARD_ERR_NOT_SUPPORTED, "'blk.7.attn_k.weight'",
		"not understood");
	REFUSED(with_key_field("llama.block_count", 4, 9, 4), LSHARD_ERR_INVALID, "'blk.8.attn_norm.weight'",
		"missing");
	REFUSED(with_key_field("llama.attention.head_count_kv", 4, 3, 4), LSHARD_ERR_NOT_SUPPORTED,
		"3 key/value heads");
}

static void unsound_vocabularies_are_refused(void **state)
{
	(void)state;
	REFUSED(with_text("the", "thx"), LSHARD_ERR_INVALID, "no token in merge 1");
	REFUSED(with_text("the", "and"), LSHARD_ERR_INVALID, "another token has the text");
	REFUSED(with_text("the", "t e"), LSHARD_ERR_INVALID, "outside the byte alphabet in token");
	REFUSED(with_text("th e", "thxe"), LSHARD_ERR_INVALID, "no space in merge 1");
	REFUSED(with_key_field("tokenizer.ggml.eos_token_id", 4, 275, 4), LSHARD_ERR_INVALID,
		"'tokenizer.ggml.eos_token_id'", "275");
	REFUSED(with_key_field("tokenizer.ggml.add_bos_token", 4, 2, 1), LSHARD_ERR_INVALID,
		"'tokenizer.ggml.add_bos_token'", "is 2");
	REFUSED(with_key_field("tokenizer.ggml.add_bos_token", 4, 1, 1), LSHARD_ERR_INVALID,
		"'tokenizer.ggml.add_bos_token'", "no such token");
}

static void files_that_cannot_be_read_are_named(void **state)
{
	engine_model model;
	engine_error error = {""};

	(void)state;
	assert_int_equal(engine_model_info("/nonexistent/model.gguf", &model, &error), LSHARD_ERR_SYSTEM);
	assert_string_equal(error.text, "/nonexistent/model.gguf: cannot open the model: No such file or directory");
	assert_int_equal(engine_model_info("/tmp", &model, &error), LSHARD_ERR_INVALID);
	assert_string_equal(error.text, "/tmp: the model is not a regular file");
	assert_int_equal(engine_model_info("/dev/zero", &model, NULL), LSHARD_ERR_INVALID);
}

/* A file that is cut while it is open: bytes that were there are gone. */
static void a_file_that_shrinks_gives_an_error(void **state)
{
	engine_error error = {""};
	char path[256];
	uint8_t bytes[4096];
	gguf *file = NULL;
	const gguf_tensor *last;

	(void)state;
	gguf_bytes_store(tiny, path);
	assert_int_equal(gguf_open_file(path, &file, &error), LSHARD_OK);
	assert_int_equal(truncate(path, (off_t)(tiny.count - 300)), 0);
	last = gguf_find_tensor(file, "output_norm.weight");
	assert_int_equal(gguf_read_tensor(file, last, 0, bytes, (size_t)last->bytes, &error), LSHARD_ERR_SYSTEM);
	assert_non_null(strstr(error.text, path));
	gguf_close(file);
	(void)unlink(path);
}

static void stored_values_become_the_floats_they_stand_for(void **state)
{
	static const uint8_t halves[] = {0, 0x3c, 0, 0xc0, 0xff, 0x7b, 1, 0, 0, 0x80, 0, 0x7c, 0, 0x7e};
	static const float floats[] = {1, -2, 65504, 0x1p-24f, -0.0f, INFINITY};
	uint8_t block[36] = {0, 0x38}; /* a scale of 0.5 */
	float values[32];
	size_t i;

	(void)state;
	dequantise(GGUF_ENCODING_F16, halves, values, 7);
	assert_memory_equal(values, floats, sizeof floats);
	assert_true(isnan(values[6]));
	for (i = 0; i < 32; i++)
		block[2 + i] = (uint8_t)(i * 8);
	dequantise(GGUF_ENCODING_Q8_0, block, values, 32);
	for (i = 0; i < 32; i++)
		assert_true(values[i] == 0.5f * (float)(int8_t)(uint8_t)(i * 8));
	block[2] = 0; /* a minimum of -1 */
	block[3] = 0xbc;
	for (i = 0; i < 16; i++)
		block[4 + i] = (uint8_t)(i | (15 - i) << 4);
	dequantise(GGUF_ENCODING_Q4_1, block, values, 32);
	for (i = 0; i < 16; i++) {
		assert_true(values[i] == 0.5f * (float)i - 1.0f);
		assert_true(values[i + 16] == 0.5f * (float)(15 - i) - 1.0f);
	}
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_good_file_is_read_whole),
		cmocka_unit_test(a_model_is_described_without_loading_it),
		cmocka_unit_test(every_length_short_of_the_whole_is_refused),
		cmocka_unit_test(absurd_counts_are_refused),
		cmocka_unit_test(unsound_values_are_refused),
		cmocka_unit_test(unsound_tensors_are_refused),
		cmocka_unit_test(other_models_are_refused_by_name),
		cmocka_unit_test(unsound_vocabularies_are_refused),
		cmocka_unit_test(files_that_cannot_be_read_are_named),
		cmocka_unit_test(a_file_that_shrinks_gives_an_error),
		cmocka_unit_test(stored_values_become_the_floats_they_stand_for),
	};
	int failed;

	tiny_path = argc > 1 ? argv[1] : getenv("LAYERSHARD_TEST_MODEL_TINY");
	if (!tiny_path) {
		(void)puts("skipped: neither an argument nor LAYERSHARD_TEST_MODEL_TINY names the file of "
			   "scripts/make_tiny_gguf.py");
		return 77;
	}
	tiny = gguf_bytes_load(tiny_path);
	failed = cmocka_run_group_tests(tests, NULL, NULL);
	free(tiny.at);
	return failed;
}
