/* SPDX-License-Identifier: Apache-2.0
 *
 * test_engine.c - the runner on the tiny model, replicated: a text's logits do not depend on how it was cut into
 * batches, a prompt leaves nothing behind, what is asked wrongly is refused. The tiny model of
 * scripts/make_tiny_gguf.py is the first argument, or in LAYERSHARD_TEST_MODEL_TINY.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine.h"
#include "gguf_bytes.h"
#include "llama.h"
#include "unsharded.h"

#define LONG 300 /* more than the rows of attention kept at once */

static const char *tiny_path;

struct answer {
	int32_t tokens[64];
	size_t count;
	size_t stop_after;
};

static int collect(void *user, int32_t token, const char *text, size_t bytes)
{
	struct answer *const answer = user;

	(void)text;
	(void)bytes;
	answer->tokens[answer->count++] = token;
	return answer->count == answer->stop_after;
}

static engine *open_tiny(const char *path)
{
	engine_options options = ENGINE_OPTIONS_INIT;
	engine_error error = {""};
	engine *runner = NULL;

	options.model = path;
	if (engine_open(&options, &runner, &error) < 0)
		fail_msg("%s", error.text);
	return runner;
}

static struct answer generate(engine *runner, const char *prompt, uint32_t most, size_t stop_after)
{
	struct answer answer = {{0}, 0, stop_after};
	engine_error error = {""};
	int32_t *tokens = NULL;
	size_t count = 0;

	if (engine_encode(runner, prompt, &tokens, &count, &error) < 0 ||
	    engine_generate(runner, tokens, count, most, collect, &answer, &error) < 0)
		fail_msg("%s", error.text);
	free(tokens);
	return answer;
}

/* ---- Below the interface: one text, cut differently ------------------------------------------------------------ */

struct parts {
	struct llama_config config;
	struct unsharded unsharded;
	struct blocks blocks;
	struct llama_model model;
};

static void open_parts(struct parts *parts)
{
	const engine_options options = ENGINE_OPTIONS_INIT;
	engine_error error = {""};
	gguf *file = NULL;

	if (gguf_open_file(tiny_path, &file, &error) < 0 || llama_config_read(file, &parts->config, &error) < 0 ||
	    unsharded_init(&parts->unsharded, &parts->config, file, &error) < 0 ||
	    blocks_open(&parts->blocks, &parts->config, file, &options, 0, &error) < 0)
		fail_msg("%s", error.text);
	gguf_close(file);
	parts->model = (struct llama_model){&parts->config, &parts->unsharded, &parts->blocks};
}

static void close_parts(struct parts *parts)
{
	blocks_close(&parts->blocks);
	unsharded_fini(&parts->unsharded);
}

/* The logits after the whole text, given in batches of @p batch tokens. */
static void logits_in_batches(const struct parts *parts, const int32_t *tokens, uint32_t count, uint32_t batch,
			      float *logits)
{
	engine_error error = {""};
	struct llama_text *text = NULL;
	uint32_t given;

	assert_int_equal(llama_text_create(&parts->config, batch, count, &text, &error), LSHARD_OK);
	for (given = 0; given < count; given += batch) {
		const uint32_t left = count - given;

		assert_int_equal(
			llama_append(&parts->model, text, tokens + given, left < batch ? left : batch, logits, &error),
			LSHARD_OK);
	}
	llama_text_destroy(text);
}

static void batches_do_not_change_the_logits(void **state)
{
	static const uint32_t batches[] = {1, 7, 256, 257};
	struct parts parts;
	int32_t tokens[LONG];
	float *whole, *cut;
	uint32_t i, k;

	(void)state;
	open_parts(&parts);
	for (i = 0; i < LONG; i++)
		tokens[i] = (int32_t)(3 + i * 37 % 250);
	whole = calloc(parts.config.vocabulary, sizeof *whole);
	cut = calloc(parts.config.vocabulary, sizeof *cut);
	logits_in_batches(&parts, tokens, LONG, LONG, whole);
	for (k = 0; k < sizeof batches / sizeof *batches; k++) {
		logits_in_batches(&parts, tokens, LONG, batches[k], cut);
		for (i = 0; i < parts.config.vocabulary; i++)
			if (!(fabsf(whole[i] - cut[i]) < 1e-3f))
				fail_msg("batches of %u: logit %u is %g instead of %g", batches[k], i, (double)cut[i],
					 (double)whole[i]);
	}
	/* and they do depend on the text: on its first token, and on the order */
	tokens[0]++;
	logits_in_batches(&parts, tokens, LONG, LONG, cut);
	assert_memory_not_equal(whole, cut, parts.config.vocabulary * sizeof *cut);
	free(cut);
	free(whole);
	close_parts(&parts);
}

/* ---- The interface --------------------------------------------------------------------------------------------- */

static void the_same_prompt_gives_the_same_tokens_again(void **state)
{
	engine *const runner = open_tiny(tiny_path);
	engine_stats stats;
	struct answer first, second;

	(void)state;
	first = generate(runner, "the Grüße and 12", 20, 0);
	(void)generate(runner, "other words in between", 5, 0);
	second = generate(runner, "the Grüße and 12", 20, 0);
	assert_in_range(first.count, 1, 20);
	assert_int_equal(first.count, second.count);
	assert_memory_equal(first.tokens, second.tokens, first.count * sizeof *first.tokens);
	engine_get_stats(runner, &stats);
	assert_in_range(stats.generated_tokens, 2 * first.count + 1, 2 * first.count + 5);
	assert_null(engine_series(runner));
	engine_close(runner);
}

static void the_callback_ends_the_text(void **state)
{
	engine *const runner = open_tiny(tiny_path);

	(void)state;
	assert_int_equal(generate(runner, "the", 20, 3).count, 3);
	assert_int_equal(generate(runner, "the", 1, 0).count, 1);
	assert_int_equal(generate(runner, "the", 0, 0).count, 0);
	engine_close(runner);
}

/* Name the first token of the answer as the end of the text: it is given, with no more after it. */
static void the_end_token_ends_the_text(void **state)
{
	engine *runner = open_tiny(tiny_path);
	const int32_t first = generate(runner, "the", 1, 0).tokens[0];
	struct gguf_bytes bytes = gguf_bytes_load(tiny_path);
	char path[256];
	struct answer answer;

	(void)state;
	engine_close(runner);
	gguf_bytes_put(gguf_bytes_after(bytes, "tokenizer.ggml.eos_token_id") + 4, (uint64_t)first, 4);
	gguf_bytes_store(bytes, path);
	runner = open_tiny(path);
	answer = generate(runner, "the", 20, 0);
	assert_int_equal(answer.count, 1);
	assert_int_equal(answer.tokens[0], first);
	engine_close(runner);
	(void)remove(path);
	free(bytes.at);
}

static void prompts_that_make_no_sense_are_refused(void **state)
{
	engine *const runner = open_tiny(tiny_path);
	struct answer answer = {{0}, 0, 0};
	const int32_t tokens[2] = {3, 275};
	engine_error error = {""};

	(void)state;
	assert_int_equal(engine_generate(runner, tokens, 0, 1, collect, &answer, &error), LSHARD_ERR_INVALID);
	assert_non_null(strstr(error.text, "empty"));
	assert_int_equal(engine_generate(runner, tokens, 2, 1, collect, &answer, &error), LSHARD_ERR_INVALID);
	assert_non_null(strstr(error.text, "prompt token 1 is 275"));
	assert_int_equal(engine_generate(runner, tokens, 1, 512, collect, &answer, &error), LSHARD_ERR_INVALID);
	assert_non_null(strstr(error.text, "512"));
	assert_int_equal(engine_generate(runner, tokens, 1, UINT32_MAX, collect, &answer, &error), LSHARD_ERR_INVALID);
	assert_int_equal(answer.count, 0);
	engine_close(runner);
}

/* The context holds prompt and answer together: one token more than fits is refused. */
static void the_context_is_used_to_its_end(void **state)
{
	engine *const runner = open_tiny(tiny_path);
	struct answer answer = {{0}, 0, 0};
	engine_error error = {""};
	int32_t tokens[512];
	int i;

	(void)state;
	for (i = 0; i < 512; i++)
		tokens[i] = 3 + i % 250;
	if (engine_generate(runner, tokens, 510, 2, collect, &answer, &error) < 0)
		fail_msg("%s", error.text);
	assert_int_equal(answer.count, 2);
	assert_int_equal(engine_generate(runner, tokens, 511, 2, collect, &answer, &error), LSHARD_ERR_INVALID);
	assert_non_null(strstr(error.text, "context of 512"));
	assert_int_equal(answer.count, 2);
	engine_close(runner);
}

/* A NaN is neither more nor less than anything; taken for a number it would make every token the first one. */
static void a_logit_that_is_no_number_is_an_error(void **state)
{
	struct gguf_bytes bytes = gguf_bytes_load(tiny_path);
	struct answer answer = {{0}, 0, 0};
	engine_error error = {""};
	const int32_t tokens[3] = {3, 4, 5};
	engine *runner;
	char path[256];

	(void)state;
	gguf_bytes_put(bytes.at + bytes.count - 4, 0x7fc00000u, 4); /* the last norm is the file's last tensor */
	gguf_bytes_store(bytes, path);
	runner = open_tiny(path);
	assert_int_equal(engine_generate(runner, tokens, 3, 2, collect, &answer, &error), LSHARD_ERR_INVALID);
	assert_non_null(strstr(error.text, "after 3 tokens"));
	assert_int_equal(answer.count, 0);
	engine_close(runner);
	(void)remove(path);
	free(bytes.at);
}

static void the_default_model_follows_the_environment(void **state)
{
	engine_error error = {""};
	char path[256] = "";

	(void)state;
	(void)unsetenv("LAYERSHARD_CACHE");
	(void)unsetenv("XDG_CACHE_HOME");
	(void)unsetenv("HOME");
	assert_int_equal(engine_default_model(path, sizeof path, &error), LSHARD_ERR_STATE);
	(void)setenv("HOME", "/h", 1);
	assert_int_equal(engine_default_model(path, sizeof path, &error), LSHARD_OK);
	assert_string_equal(path, "/h/.cache/layershard/SmolLM2-135M-Instruct.Q4_1.gguf");
	(void)setenv("XDG_CACHE_HOME", "/x", 1);
	assert_int_equal(engine_default_model(path, sizeof path, &error), LSHARD_OK);
	assert_string_equal(path, "/x/layershard/SmolLM2-135M-Instruct.Q4_1.gguf");
	(void)setenv("LAYERSHARD_CACHE", "/c", 1);
	assert_int_equal(engine_default_model(path, strlen("/c/SmolLM2-135M-Instruct.Q4_1.gguf"), &error),
			 LSHARD_ERR_INVALID);
	assert_int_equal(engine_default_model(path, strlen("/c/SmolLM2-135M-Instruct.Q4_1.gguf") + 1, &error),
			 LSHARD_OK);
	assert_string_equal(path, "/c/SmolLM2-135M-Instruct.Q4_1.gguf");
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(batches_do_not_change_the_logits),
		cmocka_unit_test(the_same_prompt_gives_the_same_tokens_again),
		cmocka_unit_test(the_callback_ends_the_text),
		cmocka_unit_test(the_end_token_ends_the_text),
		cmocka_unit_test(prompts_that_make_no_sense_are_refused),
		cmocka_unit_test(the_context_is_used_to_its_end),
		cmocka_unit_test(a_logit_that_is_no_number_is_an_error),
		cmocka_unit_test(the_default_model_follows_the_environment),
	};

	tiny_path = argc > 1 ? argv[1] : getenv("LAYERSHARD_TEST_MODEL_TINY");
	if (!tiny_path) {
		(void)puts("skipped: neither an argument nor LAYERSHARD_TEST_MODEL_TINY names the file of "
			   "scripts/make_tiny_gguf.py");
		return 77;
	}
	return cmocka_run_group_tests(tests, NULL, NULL);
}
