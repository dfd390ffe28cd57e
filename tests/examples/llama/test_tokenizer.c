/* SPDX-License-Identifier: Apache-2.0
 *
 * test_tokenizer.c - the tokenizer against Hugging Face's ids for the same prompts, with the real model's vocabulary.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "fixture.h"
#include "gguf.h"
#include "tokenizer.h"

static struct fixture fixture;
static struct tokenizer *tokenizer;

static void prompts_become_the_ids_transformers_gives(void **state)
{
	const json_t *one;
	size_t number, i;

	(void)state;
	json_array_foreach(fixture.cases, number, one)
	{
		const size_t wanted = fixture_count(one, "prompt_tokens");
		engine_error error = {""};
		int32_t *tokens = NULL;
		size_t count = 0;

		assert_int_equal(tokenizer_encode(tokenizer, fixture_prompt(one), &tokens, &count, &error), LSHARD_OK);
		for (i = 0; i < count && i < wanted; i++)
			if (tokens[i] != fixture_id(one, "prompt_tokens", i))
				fail_msg("prompt %zu, token %zu: %d instead of %d", number, i, tokens[i],
					 fixture_id(one, "prompt_tokens", i));
		assert_int_equal(count, wanted);
		free(tokens);
	}
}

/* Special tokens have no text; all else comes back byte for byte. */
static void text_comes_back_from_its_ids(void **state)
{
	static const char text[] =
		"  Grüße,\t世界!\r\n\n 12345 x²³ \xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x92\xbb they'll \xc2\xa0 "
		"\xe3\x80\x80 end   ";
	engine_error error = {""};
	int32_t *tokens = NULL;
	char back[sizeof text] = "";
	size_t count = 0;
	size_t used = 0;
	size_t i;

	(void)state;
	assert_int_equal(tokenizer_encode(tokenizer, text, &tokens, &count, &error), LSHARD_OK);
	for (i = 0; i < count; i++) {
		size_t bytes;
		const char *const piece = tokenizer_text(tokenizer, tokens[i], &bytes);

		assert_true(used + bytes < sizeof back);
		memcpy(back + used, piece, bytes);
		used += bytes;
	}
	assert_string_equal(back, text);
	free(tokens);
}

static void special_tokens_are_recognised_inside_a_text(void **state)
{
	engine_error error = {""};
	int32_t *tokens = NULL;
	size_t count = 0;
	size_t bytes;

	(void)state;
	assert_int_equal(tokenizer_encode(tokenizer, "<|im_start|>p<|im_end|><|im_end|><|", &tokens, &count, &error),
			 LSHARD_OK);
	assert_in_range(count, 5, 6);
	assert_int_equal(tokens[0], 1);
	assert_int_equal(tokens[2], 2);
	assert_int_equal(tokens[3], 2);
	assert_true(tokens[4] > 16);
	(void)tokenizer_text(tokenizer, 1, &bytes);
	assert_int_equal(bytes, 0);
	(void)tokenizer_text(tokenizer, -1, &bytes);
	assert_int_equal(bytes, 0);
	(void)tokenizer_text(tokenizer, 49152, &bytes);
	assert_int_equal(bytes, 0);
	assert_int_equal(tokenizer_end(tokenizer), 2);
	free(tokens);
}

static void what_cannot_be_encoded_is_refused(void **state)
{
	engine_error error = {""};
	int32_t *tokens = NULL;
	size_t count = 0;

	(void)state;
	assert_int_equal(tokenizer_encode(tokenizer, "ab\xff", &tokens, &count, &error), LSHARD_ERR_INVALID);
	assert_non_null(strstr(error.text, "at byte 2"));
	assert_int_equal(tokenizer_encode(tokenizer, "a\x04", &tokens, &count, &error), LSHARD_ERR_INVALID);
	assert_non_null(strstr(error.text, "0x04"));
	assert_int_equal(tokenizer_encode(tokenizer, "", &tokens, &count, &error), LSHARD_OK);
	assert_int_equal(count, 0);
	free(tokens);
}

static int open_tokenizer(void **state)
{
	engine_error error = {""};
	gguf *file = NULL;
	lshard_status status = gguf_open_file(fixture.model, &file, &error);

	(void)state;
	if (status >= 0) {
		status = tokenizer_create(file, &tokenizer, &error);
		gguf_close(file);
	}
	if (status < 0)
		(void)fprintf(stderr, "%s\n", error.text);
	return status < 0;
}

static int close_tokenizer(void **state)
{
	(void)state;
	tokenizer_destroy(tokenizer);
	return 0;
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(prompts_become_the_ids_transformers_gives),
		cmocka_unit_test(text_comes_back_from_its_ids),
		cmocka_unit_test(special_tokens_are_recognised_inside_a_text),
		cmocka_unit_test(what_cannot_be_encoded_is_refused),
	};
	int status = fixture_open(&fixture, argc, argv);

	if (status != 0)
		return status;
	status = cmocka_run_group_tests(tests, open_tokenizer, close_tokenizer);
	fixture_close(&fixture);
	return status;
}
