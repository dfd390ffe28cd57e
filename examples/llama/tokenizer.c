/* SPDX-License-Identifier: Apache-2.0
 *
 * tokenizer.c - text to tokens: special tokens first, then pieces by a pattern, then merges inside each piece.
 * Knows: the order of these three. The tables are vocabulary.c's.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "tokenizer.h"

#include <inttypes.h>
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

#include "vocabulary.h"

/* Digits are split off one by one before GPT-2's pattern sees the rest: so for its look-ahead at the end of white space
 * a number is the end of the text. Every character matches one of the alternatives. */
static const char smollm_pattern[] =
	"\\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?![^\\s\\p{N}])|\\s+";

struct tokenizer {
	struct vocabulary vocabulary;
	pcre2_code *pattern;
	pcre2_match_data *match;
	int32_t begin; /* put in front of every text; -1: none */
	int32_t end;
};

/* ---- Building -------------------------------------------------------------------------------------------------- */

static lshard_status require_text(const gguf *file, const char *key, const char *wanted, engine_error *error)
{
	gguf_text text;
	const lshard_status status = gguf_get_string(file, key, &text, error);

	if (status < 0)
		return status;
	if (!gguf_is_text(file, key, wanted))
		return engine_fail(error, LSHARD_ERR_NOT_SUPPORTED, "%s: key '%s' is '%.*s'; only '%s' is supported",
				   gguf_name(file), key, (int)(text.bytes < 64 ? text.bytes : 64), text.at, wanted);
	return LSHARD_OK;
}

/* Files of before there were several name none: another way to split text than the one that is supported here. */
static lshard_status require_pre_tokenizer(const gguf *file, engine_error *error)
{
	static const char key[] = "tokenizer.ggml.pre";

	if (gguf_find_value(file, key))
		return require_text(file, key, "smollm", error);
	return engine_fail(
		error, LSHARD_ERR_NOT_SUPPORTED,
		"%s: key '%s' is missing, which llama.cpp takes for 'default'; only 'smollm' is supported. If the "
		"model is SmolLM's or SmolLM2's, its converter was too old: convert it again",
		gguf_name(file), key);
}

/* A token the file may name; -1 when it does not. */
static lshard_status optional_token(const gguf *file, const char *key, uint32_t count, int32_t *token,
				    engine_error *error)
{
	uint64_t value = 0;
	lshard_status status;

	*token = -1;
	if (!gguf_find_value(file, key))
		return LSHARD_OK;
	status = gguf_get_unsigned(file, key, &value, error);
	if (status < 0)
		return status;
	if (value >= count)
		return engine_fail(error, LSHARD_ERR_INVALID,
				   "%s: key '%s' is %" PRIu64 ", but there are %" PRIu32 " tokens", gguf_name(file),
				   key, value, count);
	*token = (int32_t)value;
	return LSHARD_OK;
}

static lshard_status read_begin(struct tokenizer *tokenizer, const gguf *file, engine_error *error)
{
	static const char key[] = "tokenizer.ggml.add_bos_token";
	int wanted = 0;
	lshard_status status = gguf_find_value(file, key) ? gguf_get_bool(file, key, &wanted, error) : LSHARD_OK;

	if (status >= 0)
		status = optional_token(file, "tokenizer.ggml.bos_token_id", tokenizer->vocabulary.count,
					&tokenizer->begin, error);
	if (status < 0)
		return status;
	if (wanted && tokenizer->begin < 0)
		return engine_fail(error, LSHARD_ERR_INVALID, "%s: key '%s' is true, but no such token is named",
				   gguf_name(file), key);
	if (!wanted)
		tokenizer->begin = -1;
	return LSHARD_OK;
}

/* It would stand behind every prompt. */
static lshard_status check_end(const gguf *file, engine_error *error)
{
	static const char key[] = "tokenizer.ggml.add_eos_token";
	int wanted = 0;
	const lshard_status status = gguf_find_value(file, key) ? gguf_get_bool(file, key, &wanted, error) : LSHARD_OK;

	if (status >= 0 && wanted)
		return engine_fail(error, LSHARD_ERR_NOT_SUPPORTED, "%s: key '%s' is true; only false is supported",
				   gguf_name(file), key);
	return status;
}

static lshard_status compile(struct tokenizer *tokenizer, engine_error *error)
{
	PCRE2_SIZE at;
	int cause;

	tokenizer->pattern = pcre2_compile((PCRE2_SPTR)smollm_pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP,
					   &cause, &at, NULL);
	if (!tokenizer->pattern)
		return engine_fail(error, LSHARD_ERR_NOT_SUPPORTED,
				   "tokenizer: this PCRE2 does not take the pattern (its error %d at character %zu); "
				   "it needs Unicode support",
				   cause, (size_t)at);
	tokenizer->match = pcre2_match_data_create(1, NULL);
	if (!tokenizer->match)
		return engine_fail(error, LSHARD_ERR_NO_MEMORY, "tokenizer: no memory for matches");
	return LSHARD_OK;
}

lshard_status tokenizer_create(const gguf *file, struct tokenizer **created, engine_error *error)
{
	struct tokenizer *const tokenizer = calloc(1, sizeof *tokenizer);
	lshard_status status;

	if (!tokenizer)
		return engine_fail(error, LSHARD_ERR_NO_MEMORY, "tokenizer: no memory");
	status = require_text(file, "tokenizer.ggml.model", "gpt2", error);
	if (status >= 0)
		status = require_pre_tokenizer(file, error);
	if (status >= 0)
		status = vocabulary_init(&tokenizer->vocabulary, file, error);
	if (status >= 0)
		status = optional_token(file, "tokenizer.ggml.eos_token_id", tokenizer->vocabulary.count,
					&tokenizer->end, error);
	if (status >= 0)
		status = read_begin(tokenizer, file, error);
	if (status >= 0)
		status = check_end(file, error);
	if (status >= 0)
		status = compile(tokenizer, error);
	if (status < 0)
		tokenizer_destroy(tokenizer);
	else
		*created = tokenizer;
	return status;
}

void tokenizer_destroy(struct tokenizer *tokenizer)
{
	if (!tokenizer)
		return;
	pcre2_match_data_free(tokenizer->match);
	pcre2_code_free(tokenizer->pattern);
	vocabulary_fini(&tokenizer->vocabulary);
	free(tokenizer);
}

uint32_t tokenizer_size(const struct tokenizer *tokenizer)
{
	return tokenizer->vocabulary.count;
}

int32_t tokenizer_end(const struct tokenizer *tokenizer)
{
	return tokenizer->end;
}

const char *tokenizer_text(const struct tokenizer *tokenizer, int32_t token, size_t *bytes)
{
	const struct vocabulary *const vocabulary = &tokenizer->vocabulary;
	const char *const text = vocabulary_text(vocabulary, token, bytes);

	if (*bytes > 0 && vocabulary->special[token] == TOKEN_CONTROL)
		*bytes = 0;
	return text;
}

/* ---- Encoding -------------------------------------------------------------------------------------------------- */

/* Room for a token per byte is there from the start, so nothing here can fail but the pattern. */
struct encoding {
	struct tokenizer *tokenizer;
	engine_error *error;
	int32_t *tokens;
	size_t count;
};

/* The merge with the lowest rank among neighbours; NULL when none is left. */
static const struct merge *best_merge(const struct vocabulary *vocabulary, const int32_t *tokens, size_t count)
{
	const struct merge *best = NULL;
	size_t i;

	for (i = 1; i < count; i++) {
		const struct merge *const merge = vocabulary_merge(vocabulary, tokens[i - 1], tokens[i]);

		if (merge && (!best || merge->rank < best->rank))
			best = merge;
	}
	return best;
}

/* Apply it everywhere, from the left. Returns how many tokens remain. */
static size_t apply_merge(const struct merge *merge, int32_t *tokens, size_t count)
{
	size_t from = 0;
	size_t to = 0;

	while (from < count) {
		const int here = from + 1 < count && tokens[from] == merge->left && tokens[from + 1] == merge->right;

		tokens[to++] = here ? merge->merged : tokens[from];
		from += here ? 2 : 1;
	}
	return to;
}

/* A byte without a token cannot be said to the model; leaving it out would change the prompt unnoticed. */
static lshard_status encode_piece(struct encoding *encoding, const char *piece, size_t bytes)
{
	const struct vocabulary *const vocabulary = &encoding->tokenizer->vocabulary;
	int32_t *const tokens = encoding->tokens + encoding->count;
	const struct merge *merge;
	size_t count;

	for (count = 0; count < bytes; count++) {
		tokens[count] = vocabulary->byte_token[(uint8_t)piece[count]];
		if (tokens[count] < 0)
			return engine_fail(encoding->error, LSHARD_ERR_INVALID,
					   "prompt: the model's vocabulary has no token for byte 0x%02x",
					   (uint8_t)piece[count]);
	}
	while ((merge = best_merge(vocabulary, tokens, count)) != NULL)
		count = apply_merge(merge, tokens, count);
	encoding->count += count;
	return LSHARD_OK;
}

static lshard_status pattern_failed(const struct encoding *encoding, int cause)
{
	char words[128] = "";

	(void)pcre2_get_error_message(cause, (PCRE2_UCHAR *)words, sizeof words);
	return engine_fail(encoding->error, LSHARD_ERR_INVALID, "prompt: at byte %zu: %s",
			   (size_t)pcre2_get_startchar(encoding->tokenizer->match), words);
}

/* Text without special tokens. */
static lshard_status encode_plain(struct encoding *encoding, const char *text, size_t bytes)
{
	const struct tokenizer *const tokenizer = encoding->tokenizer;
	lshard_status status = LSHARD_OK;
	size_t at = 0;

	while (at < bytes && status >= 0) {
		const int groups = pcre2_match(tokenizer->pattern, (PCRE2_SPTR)text, bytes, at,
					       PCRE2_ANCHORED | PCRE2_NO_UTF_CHECK, tokenizer->match, NULL);
		size_t end;

		if (groups < 0)
			return pattern_failed(encoding, groups);
		end = pcre2_get_ovector_pointer(tokenizer->match)[1];
		status = encode_piece(encoding, text + at, end - at);
		at = end;
	}
	return status;
}

/* The special token at the beginning of the text; -1 when there is none. */
static int32_t special_at(const struct vocabulary *vocabulary, const char *text, size_t bytes, size_t *special_bytes)
{
	uint32_t i;

	for (i = 0; i < vocabulary->special_count; i++) {
		const char *const special = vocabulary_text(vocabulary, vocabulary->specials[i], special_bytes);

		if (*special_bytes <= bytes && *special == *text && memcmp(special, text, *special_bytes) == 0)
			return vocabulary->specials[i];
	}
	return -1;
}

static lshard_status encode_text(struct encoding *encoding, const char *text, size_t bytes)
{
	const struct vocabulary *const vocabulary = &encoding->tokenizer->vocabulary;
	lshard_status status = LSHARD_OK;
	size_t plain = 0; /* begin of what is not encoded yet */
	size_t at = 0;

	while (at < bytes && status >= 0) {
		size_t special_bytes;
		const int32_t special = special_at(vocabulary, text + at, bytes - at, &special_bytes);

		if (special < 0) {
			at++;
			continue;
		}
		status = encode_plain(encoding, text + plain, at - plain);
		if (status >= 0)
			encoding->tokens[encoding->count++] = special;
		at += special_bytes;
		plain = at;
	}
	return status < 0 ? status : encode_plain(encoding, text + plain, bytes - plain);
}

/* One look at the whole text lets later matches skip the check for UTF-8. */
static lshard_status check_text(const struct encoding *encoding, const char *text, size_t bytes)
{
	const int groups = pcre2_match(encoding->tokenizer->pattern, (PCRE2_SPTR)text, bytes, 0, 0,
				       encoding->tokenizer->match, NULL);

	return groups < 0 && groups != PCRE2_ERROR_NOMATCH ? pattern_failed(encoding, groups) : LSHARD_OK;
}

lshard_status tokenizer_encode(struct tokenizer *tokenizer, const char *text, int32_t **tokens, size_t *count,
			       engine_error *error)
{
	const size_t bytes = strlen(text);
	struct encoding encoding = {tokenizer, error, NULL, 0};
	lshard_status status = check_text(&encoding, text, bytes);

	if (status < 0)
		return status;
	encoding.tokens = malloc((bytes + 1) * sizeof *encoding.tokens);
	if (!encoding.tokens)
		return engine_fail(error, LSHARD_ERR_NO_MEMORY, "prompt: no memory for the tokens of %zu bytes", bytes);
	if (tokenizer->begin >= 0)
		encoding.tokens[encoding.count++] = tokenizer->begin;
	status = encode_text(&encoding, text, bytes);
	if (status < 0) {
		free(encoding.tokens);
		return status;
	}
	*tokens = encoding.tokens;
	*count = encoding.count;
	return LSHARD_OK;
}
