/* SPDX-License-Identifier: Apache-2.0
 *
 * vocabulary.c - builds a tokenizer's tables from a GGUF file.
 * Knows: GPT-2's alphabet, in which every byte is written as a printable character. Does not know: how text is split.
 *
 * Everything is kept as raw bytes and ids: after loading, encoding needs no look-up by text any more.
 */
#include "vocabulary.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define TOKENS_MAX (1u << 24)
/* Characters of the alphabet: bytes that stand for themselves, and 256.. for the 68 that do not. */
#define ALPHABET 324

/* A token's bytes and its id; sorted, to find ids by bytes while loading. */
struct entry {
	gguf_text text;
	int32_t token;
};

struct loading {
	struct vocabulary *vocabulary;
	const gguf *file;
	engine_error *error;
	const gguf_value *tokens;
	const gguf_value *types;
	int16_t byte_of[ALPHABET]; /* -1: not in the alphabet */
	struct entry *entries;     /* tokens that BPE can make */
	uint32_t entry_count;
	char *pair;     /* bytes of a merge's two sides */
	size_t longest; /* token, in bytes */
};

static void fill_alphabet(int16_t byte_of[ALPHABET])
{
	int16_t next = 256;
	int16_t byte;

	memset(byte_of, -1, ALPHABET * sizeof *byte_of);
	for (byte = 0; byte < 256; byte++) {
		const int itself = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;

		byte_of[itself ? byte : next++] = byte;
	}
}

/* From the alphabet to bytes. @p to has room for text.bytes. Returns 0 when a character is none of the alphabet's. */
static int decode(const struct loading *loading, gguf_text text, char *to, size_t *bytes)
{
	size_t i = 0;
	size_t used = 0;

	while (i < text.bytes) {
		const uint8_t first = (uint8_t)text.at[i++];
		unsigned character = first;

		if (first >= 0x80) {
			if ((first & 0xe0) != 0xc0 || i == text.bytes || ((uint8_t)text.at[i] & 0xc0) != 0x80)
				return 0;
			character = (first & 0x1fu) << 6 | ((uint8_t)text.at[i++] & 0x3fu);
		}
		if (character >= ALPHABET || loading->byte_of[character] < 0)
			return 0;
		to[used++] = (char)(uint8_t)loading->byte_of[character];
	}
	*bytes = used;
	return 1;
}

static lshard_status refuse(const struct loading *loading, const char *problem, uint64_t index)
{
	return engine_fail(loading->error, LSHARD_ERR_INVALID, "%s: tokenizer: %s %" PRIu64, gguf_name(loading->file),
			   problem, index);
}

static lshard_status no_memory(const struct loading *loading)
{
	return engine_fail(loading->error, LSHARD_ERR_NO_MEMORY, "%s: tokenizer: no memory for its tables",
			   gguf_name(loading->file));
}

/* ---- Tokens ---------------------------------------------------------------------------------------------------- */

static lshard_status find_tokens(struct loading *loading)
{
	lshard_status status =
		gguf_get_array(loading->file, "tokenizer.ggml.tokens", GGUF_STRING, &loading->tokens, loading->error);

	if (status >= 0)
		status = gguf_get_array(loading->file, "tokenizer.ggml.token_type", GGUF_I32, &loading->types,
					loading->error);
	if (status < 0)
		return status;
	if (loading->tokens->count == 0 || loading->tokens->count > TOKENS_MAX)
		return refuse(loading, "the number of tokens cannot be", loading->tokens->count);
	if (loading->types->count != loading->tokens->count)
		return refuse(loading, "the number of token types is not that of the tokens but",
			      loading->types->count);
	loading->vocabulary->count = (uint32_t)loading->tokens->count;
	return LSHARD_OK;
}

/* Room for every token's bytes: decoding only shortens a text. */
static lshard_status allocate_tokens(struct loading *loading)
{
	struct vocabulary *const vocabulary = loading->vocabulary;
	const uint8_t *at = loading->tokens->bytes;
	size_t bytes = 1;
	uint32_t i;

	for (i = 0; i < vocabulary->count; i++)
		bytes += gguf_next_string(&at).bytes;
	vocabulary->starts = calloc((size_t)vocabulary->count + 1, sizeof *vocabulary->starts);
	vocabulary->bytes = malloc(bytes);
	vocabulary->special = calloc(vocabulary->count, 1);
	vocabulary->specials = calloc(vocabulary->count, sizeof *vocabulary->specials);
	loading->entries = calloc(vocabulary->count, sizeof *loading->entries);
	if (!vocabulary->starts || !vocabulary->bytes || !vocabulary->special || !vocabulary->specials ||
	    !loading->entries)
		return no_memory(loading);
	return LSHARD_OK;
}

/* Special tokens are written as they are, the others in the alphabet. */
static lshard_status store_token(struct loading *loading, uint32_t token, gguf_text text)
{
	struct vocabulary *const vocabulary = loading->vocabulary;
	const uint64_t type = gguf_little_endian(loading->types->bytes + (size_t)4 * token, 4);
	char *const to = vocabulary->bytes + vocabulary->starts[token];
	size_t bytes = text.bytes;

	if (bytes == 0)
		return refuse(loading, "no text for token", token);
	if (type == TOKEN_CONTROL || type == TOKEN_USER_DEFINED) {
		memcpy(to, text.at, bytes);
		vocabulary->special[token] = (uint8_t)type;
		vocabulary->specials[vocabulary->special_count++] = (int32_t)token;
	} else {
		if (!decode(loading, text, to, &bytes))
			return refuse(loading, "a character outside the byte alphabet in token", token);
		loading->entries[loading->entry_count++] = (struct entry){{to, bytes}, (int32_t)token};
		if (bytes > loading->longest)
			loading->longest = bytes;
	}
	vocabulary->starts[token + 1] = vocabulary->starts[token] + bytes;
	return LSHARD_OK;
}

static int compare_entries(const void *left, const void *right)
{
	return gguf_compare_text(((const struct entry *)left)->text, ((const struct entry *)right)->text);
}

static int32_t find_entry(const struct loading *loading, const char *at, size_t bytes)
{
	const struct entry wanted = {{at, bytes}, 0};
	const struct entry *const found =
		bsearch(&wanted, loading->entries, loading->entry_count, sizeof wanted, compare_entries);

	return found ? found->token : -1;
}

static lshard_status sort_entries(struct loading *loading)
{
	uint32_t i;

	qsort(loading->entries, loading->entry_count, sizeof *loading->entries, compare_entries);
	for (i = 1; i < loading->entry_count; i++)
		if (compare_entries(&loading->entries[i - 1], &loading->entries[i]) == 0)
			return refuse(loading, "another token has the text of token",
				      (uint64_t)loading->entries[i].token);
	return LSHARD_OK;
}

static void find_bytes(struct loading *loading)
{
	int byte;

	for (byte = 0; byte < 256; byte++) {
		const char at = (char)(uint8_t)byte;

		loading->vocabulary->byte_token[byte] = find_entry(loading, &at, 1);
	}
}

static lshard_status load_tokens(struct loading *loading)
{
	lshard_status status = find_tokens(loading);
	const uint8_t *at = NULL;
	uint32_t i;

	if (status >= 0)
		status = allocate_tokens(loading);
	if (status < 0)
		return status;
	at = loading->tokens->bytes;
	for (i = 0; i < loading->vocabulary->count && status >= 0; i++)
		status = store_token(loading, i, gguf_next_string(&at));
	if (status >= 0)
		status = sort_entries(loading);
	if (status >= 0)
		find_bytes(loading);
	return status;
}

/* Longest first, so that the first that fits a prompt is the one to take. */
static int compare_specials(const void *left, const void *right)
{
	const size_t *const a = left;
	const size_t *const b = right;

	return a[0] != b[0] ? (a[0] < b[0]) - (a[0] > b[0]) : (a[1] > b[1]) - (a[1] < b[1]);
}

static lshard_status sort_specials(struct loading *loading)
{
	struct vocabulary *const vocabulary = loading->vocabulary;
	size_t (*const keys)[2] = calloc((size_t)vocabulary->special_count + 1, sizeof *keys);
	uint32_t i;

	if (!keys)
		return no_memory(loading);
	for (i = 0; i < vocabulary->special_count; i++) {
		keys[i][1] = (size_t)vocabulary->specials[i];
		(void)vocabulary_text(vocabulary, vocabulary->specials[i], &keys[i][0]);
	}
	qsort(keys, vocabulary->special_count, sizeof *keys, compare_specials);
	for (i = 0; i < vocabulary->special_count; i++)
		vocabulary->specials[i] = (int32_t)keys[i][1];
	free(keys);
	return LSHARD_OK;
}

/* ---- Merges ---------------------------------------------------------------------------------------------------- */

static struct merge *find_slot(const struct vocabulary *vocabulary, int32_t left, int32_t right)
{
	const uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
	size_t slot = (size_t)(pair * 0x9e3779b97f4a7c15u >> 32) & (vocabulary->merge_slots - 1);

	while (vocabulary->merges[slot].left >= 0 &&
	       (vocabulary->merges[slot].left != left || vocabulary->merges[slot].right != right))
		slot = (slot + 1) & (vocabulary->merge_slots - 1);
	return &vocabulary->merges[slot];
}

const struct merge *vocabulary_merge(const struct vocabulary *vocabulary, int32_t left, int32_t right)
{
	const struct merge *const slot = find_slot(vocabulary, left, right);

	return slot->left < 0 ? NULL : slot;
}

/* At most half of the slots are taken, so searches are short and end. */
static lshard_status allocate_merges(struct loading *loading, uint64_t count)
{
	struct vocabulary *const vocabulary = loading->vocabulary;
	size_t slots = 16;
	size_t i;

	while (slots < 2 * count)
		slots *= 2;
	vocabulary->merges = calloc(slots, sizeof *vocabulary->merges);
	loading->pair = malloc(2 * loading->longest + 1);
	if (!vocabulary->merges || !loading->pair)
		return no_memory(loading);
	vocabulary->merge_slots = slots;
	for (i = 0; i < slots; i++)
		vocabulary->merges[i].left = -1;
	return LSHARD_OK;
}

/* "left right", both in the alphabet, which has no space. */
static lshard_status store_merge(struct loading *loading, uint32_t rank, gguf_text text)
{
	const char *const space = text.bytes > 0 ? memchr(text.at, ' ', text.bytes) : NULL;
	struct merge merge = {-1, -1, -1, rank};
	struct merge *slot;
	gguf_text left, right;
	size_t left_bytes, right_bytes;

	if (!space)
		return refuse(loading, "no space in merge", rank);
	left = (gguf_text){text.at, (size_t)(space - text.at)};
	right = (gguf_text){space + 1, text.bytes - left.bytes - 1};
	/* a character of the alphabet is at most two bytes long: what is longer than any token needs no look */
	if (left.bytes + right.bytes > 2 * loading->longest)
		return refuse(loading, "longer than any token is merge", rank);
	if (!decode(loading, left, loading->pair, &left_bytes) ||
	    !decode(loading, right, loading->pair + left_bytes, &right_bytes))
		return refuse(loading, "a character outside the byte alphabet in merge", rank);
	merge.left = find_entry(loading, loading->pair, left_bytes);
	merge.right = find_entry(loading, loading->pair + left_bytes, right_bytes);
	merge.merged = find_entry(loading, loading->pair, left_bytes + right_bytes);
	if (merge.left < 0 || merge.right < 0 || merge.merged < 0)
		return refuse(loading, "a part or the result is no token in merge", rank);
	slot = find_slot(loading->vocabulary, merge.left, merge.right);
	if (slot->left < 0)
		*slot = merge;
	return LSHARD_OK;
}

static lshard_status load_merges(struct loading *loading)
{
	const gguf_value *merges = NULL;
	const uint8_t *at = NULL;
	lshard_status status =
		gguf_get_array(loading->file, "tokenizer.ggml.merges", GGUF_STRING, &merges, loading->error);
	uint32_t rank;

	if (status < 0)
		return status;
	if (merges->count > TOKENS_MAX)
		return refuse(loading, "the number of merges cannot be", merges->count);
	status = allocate_merges(loading, merges->count);
	at = merges->bytes;
	for (rank = 0; rank < merges->count && status >= 0; rank++)
		status = store_merge(loading, rank, gguf_next_string(&at));
	return status;
}

lshard_status vocabulary_init(struct vocabulary *vocabulary, const gguf *file, engine_error *error)
{
	struct loading loading = {0};
	lshard_status status;

	memset(vocabulary, 0, sizeof *vocabulary);
	loading.vocabulary = vocabulary;
	loading.file = file;
	loading.error = error;
	fill_alphabet(loading.byte_of);
	status = load_tokens(&loading);
	if (status >= 0)
		status = sort_specials(&loading);
	if (status >= 0)
		status = load_merges(&loading);
	free(loading.pair);
	free(loading.entries);
	return status;
}

void vocabulary_fini(struct vocabulary *vocabulary)
{
	free(vocabulary->merges);
	free(vocabulary->specials);
	free(vocabulary->special);
	free(vocabulary->bytes);
	free(vocabulary->starts);
	memset(vocabulary, 0, sizeof *vocabulary);
}

const char *vocabulary_text(const struct vocabulary *vocabulary, int32_t token, size_t *bytes)
{
	if (token < 0 || (uint32_t)token >= vocabulary->count) {
		*bytes = 0;
		return "";
	}
	*bytes = vocabulary->starts[token + 1] - vocabulary->starts[token];
	return vocabulary->bytes + vocabulary->starts[token];
}
