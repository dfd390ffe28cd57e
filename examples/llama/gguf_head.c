/* SPDX-License-Identifier: Apache-2.0
 *
 * gguf_head.c - parses the head of a GGUF file: keys, values, tensor descriptions.
 * Knows: the format. Trusts: nothing; every number is compared with the bytes that are left before it is used.
 *
 * The head is walked twice. The first walk checks it and reads it piece by piece, so that memory grows only with bytes
 * that exist; the second fills the tables, whose sizes are then known to be honest, with pointers into a head that no
 * longer moves.
 */
#include "gguf_head.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define HEAD_CHUNK            ((size_t)4 << 10) /* little is read of what follows the head */
#define VALUES_MAX            65536u
#define TENSORS_MAX           65536u
#define KEY_BYTES_MAX         65535u
#define TENSOR_NAME_BYTES_MAX 64u
#define ALIGNMENT_MAX         ((uint64_t)1 << 20)
/* The shortest descriptions the format allows: a one-byte key with a one-byte value, a one-byte name with one
 * dimension. */
#define VALUE_BYTES_MIN  (8u + 1u + 4u + 1u)
#define TENSOR_BYTES_MIN (8u + 1u + 4u + 8u + 4u + 8u)

/* Where a walk is. The subject names what is being read, for messages. */
struct cursor {
	gguf *file;
	engine_error *error;
	uint64_t at;
	char subject[96];
};

struct counts {
	uint32_t version;
	uint64_t tensors;
	uint64_t values;
};

static void describe(struct cursor *cursor, const char *kind, gguf_text name)
{
	size_t used = strlen(kind);
	size_t i;

	memcpy(cursor->subject, kind, used);
	cursor->subject[used++] = ' ';
	cursor->subject[used++] = '\'';
	for (i = 0; i < name.bytes && i < TENSOR_NAME_BYTES_MAX; i++) /* a zero would end the message */
		cursor->subject[used++] = (char)(name.at[i] >= ' ' && name.at[i] <= '~' ? name.at[i] : '?');
	cursor->subject[used++] = '\'';
	cursor->subject[used] = '\0';
}

static void describe_number(struct cursor *cursor, const char *kind, uint64_t number)
{
	char digits[21];
	size_t first = sizeof digits;
	const size_t used = strlen(kind);

	digits[--first] = '\0';
	do
		digits[--first] = (char)('0' + number % 10);
	while ((number /= 10) > 0);
	memcpy(cursor->subject, kind, used);
	cursor->subject[used] = ' ';
	memcpy(cursor->subject + used + 1, digits + first, sizeof digits - first);
}

#define REFUSE(cursor, status, format, ...)                                                                            \
	engine_fail((cursor)->error, (status), "%s: %s: " format, (cursor)->file->source.name, (cursor)->subject,      \
		    __VA_ARGS__)

/* Make the head hold at least @p bytes bytes, known to exist. Reads ahead, to make few reads. */
static lshard_status extend_head(gguf *file, uint64_t bytes, engine_error *error)
{
	uint64_t wanted = (bytes + HEAD_CHUNK - 1) / HEAD_CHUNK * HEAD_CHUNK;
	lshard_status status;

	if (wanted > file->source.bytes)
		wanted = file->source.bytes;
	if (wanted > file->head_capacity) {
		const size_t capacity = (size_t)wanted + file->head_capacity;
		uint8_t *const head = realloc(file->head, capacity);

		if (!head)
			return engine_fail(error, LSHARD_ERR_NO_MEMORY, "%s: no memory for its head (%zu bytes)",
					   file->source.name, capacity);
		file->head = head;
		file->head_capacity = capacity;
	}
	status =
		gguf_read(file, file->head_have, file->head + file->head_have, (size_t)wanted - file->head_have, error);
	if (status < 0)
		return status;
	file->head_have = (size_t)wanted;
	return LSHARD_OK;
}

/* Step over @p bytes bytes, which are then in the head. */
static lshard_status take(struct cursor *cursor, uint64_t bytes, const uint8_t **taken)
{
	gguf *const file = cursor->file;
	lshard_status status;

	if (bytes > file->source.bytes - cursor->at)
		return REFUSE(cursor, LSHARD_ERR_INVALID,
			      "%" PRIu64 " bytes are needed at byte %" PRIu64 ", but the file ends at %" PRIu64, bytes,
			      cursor->at, file->source.bytes);
	if (cursor->at + bytes > file->head_have) {
		status = extend_head(file, cursor->at + bytes, cursor->error);
		if (status < 0)
			return status;
	}
	*taken = file->head + cursor->at;
	cursor->at += bytes;
	return LSHARD_OK;
}

static lshard_status take_number(struct cursor *cursor, size_t bytes, uint64_t *number)
{
	const uint8_t *at = NULL;
	const lshard_status status = take(cursor, bytes, &at);

	if (status >= 0)
		*number = gguf_little_endian(at, bytes);
	return status;
}

static lshard_status take_text(struct cursor *cursor, gguf_text *text)
{
	const uint8_t *at = NULL;
	uint64_t bytes = 0;
	lshard_status status = take_number(cursor, 8, &bytes);

	if (status < 0)
		return status;
	status = take(cursor, bytes, &at);
	if (status < 0)
		return status;
	text->at = (const char *)at;
	text->bytes = (size_t)bytes;
	return LSHARD_OK;
}

/* A key or a name: as take_text, with a length a name may have, and named in messages from here on. */
static lshard_status take_name(struct cursor *cursor, const char *kind, uint64_t bytes_max, gguf_text *name)
{
	lshard_status status = take_text(cursor, name);

	if (status < 0)
		return status;
	if (name->bytes == 0 || name->bytes > bytes_max)
		return REFUSE(cursor, LSHARD_ERR_INVALID, "its name has %zu bytes, allowed are 1 to %" PRIu64,
			      name->bytes, bytes_max);
	describe(cursor, kind, *name);
	return LSHARD_OK;
}

/* Skip @p count elements after a check that so many can be there at all. */
static lshard_status take_elements(struct cursor *cursor, gguf_type type, uint64_t count)
{
	const size_t fixed = gguf_type_bytes(type);
	const size_t least = fixed ? fixed : 8;
	const uint64_t left = cursor->file->source.bytes - cursor->at;
	lshard_status status = LSHARD_OK;
	const uint8_t *at = NULL;
	gguf_text text;
	uint64_t i;

	if (count > left / least)
		return REFUSE(cursor, LSHARD_ERR_INVALID,
			      "%" PRIu64 " elements are announced, but only %" PRIu64 " bytes follow", count, left);
	if (fixed)
		return take(cursor, count * fixed, &at);
	for (i = 0; i < count && status >= 0; i++)
		status = take_text(cursor, &text);
	return status;
}

static lshard_status take_type(struct cursor *cursor, int in_array, gguf_type *type)
{
	uint64_t number = 0;
	const lshard_status status = take_number(cursor, 4, &number);

	if (status < 0)
		return status;
	if (number > GGUF_F64)
		return REFUSE(cursor, LSHARD_ERR_INVALID, "value type %" PRIu64 " does not exist", number);
	if (in_array && number == GGUF_ARRAY)
		return REFUSE(cursor, LSHARD_ERR_NOT_SUPPORTED, "%s", "arrays of arrays are not supported");
	*type = (gguf_type)number;
	return LSHARD_OK;
}

static lshard_status take_value(struct cursor *cursor, gguf_value *value)
{
	uint64_t start;
	lshard_status status = take_name(cursor, "key", KEY_BYTES_MAX, &value->key);

	if (status < 0)
		return status;
	status = take_type(cursor, 0, &value->type);
	if (status < 0)
		return status;
	value->element = value->type;
	value->count = 1;
	if (value->type == GGUF_ARRAY) {
		status = take_type(cursor, 1, &value->element);
		if (status >= 0)
			status = take_number(cursor, 8, &value->count);
		if (status < 0)
			return status;
	}
	start = cursor->at;
	status = take_elements(cursor, value->element, value->count);
	value->bytes = cursor->file->head + start;
	return status;
}

static const char *encoding_name(uint64_t encoding)
{
	static const char *const names[] = {
		"F32",    "F16",   "Q4_0",  "Q4_1",   "",      "",      "Q5_0",    "Q5_1",   "Q8_0",    "Q8_1",
		"Q2_K",   "Q3_K",  "Q4_K",  "Q5_K",   "Q6_K",  "Q8_K",  "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S",
		"IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8",    "I16",   "I32",     "I64",    "F64",     "IQ1_M",
		"BF16",   "",      "",      "",       "TQ1_0", "TQ2_0", "",        "",       "",        "MXFP4"};

	return encoding < sizeof names / sizeof *names ? names[encoding] : "";
}

/* Sizes to values and bytes, without overflow and in whole blocks. */
static lshard_status measure_tensor(struct cursor *cursor, gguf_tensor *tensor)
{
	const size_t block = gguf_block_values(tensor->encoding);
	uint32_t i;

	tensor->values = 1;
	for (i = 0; i < tensor->dimensions; i++) {
		if (tensor->size[i] == 0)
			return REFUSE(cursor, LSHARD_ERR_INVALID, "dimension %" PRIu32 " is 0", i);
		/* 2^56 values of at most 4 bytes leave room for every sum that follows */
		if (tensor->size[i] > ((uint64_t)1 << 56) / tensor->values)
			return REFUSE(cursor, LSHARD_ERR_INVALID,
				      "its dimensions multiply to more than 2^56 values (dimension %" PRIu32
				      " is %" PRIu64 ")",
				      i, tensor->size[i]);
		tensor->values *= tensor->size[i];
	}
	if (tensor->size[0] % block != 0)
		return REFUSE(cursor, LSHARD_ERR_INVALID, "rows of %" PRIu64 " values are not whole blocks of %zu (%s)",
			      tensor->size[0], block, encoding_name(tensor->encoding));
	tensor->bytes = tensor->values / block * gguf_block_bytes(tensor->encoding);
	return LSHARD_OK;
}

static lshard_status take_sizes(struct cursor *cursor, gguf_tensor *tensor)
{
	uint64_t dimensions = 0;
	lshard_status status = take_number(cursor, 4, &dimensions);
	uint32_t i;

	if (status < 0)
		return status;
	if (dimensions < 1 || dimensions > 4)
		return REFUSE(cursor, LSHARD_ERR_INVALID, "it has %" PRIu64 " dimensions, allowed are 1 to 4",
			      dimensions);
	tensor->dimensions = (uint32_t)dimensions;
	for (i = 0; i < 4; i++)
		tensor->size[i] = 1;
	for (i = 0; i < tensor->dimensions && status >= 0; i++)
		status = take_number(cursor, 8, &tensor->size[i]);
	return status;
}

static lshard_status take_tensor(struct cursor *cursor, gguf_tensor *tensor)
{
	uint64_t encoding = 0;
	lshard_status status = take_name(cursor, "tensor", TENSOR_NAME_BYTES_MAX, &tensor->name);

	if (status >= 0)
		status = take_sizes(cursor, tensor);
	if (status >= 0)
		status = take_number(cursor, 4, &encoding);
	if (status < 0)
		return status;
	if (gguf_block_values((uint32_t)encoding) == 0)
		return REFUSE(cursor, LSHARD_ERR_NOT_SUPPORTED,
			      "type %" PRIu64 "%s%s is not supported; F32, F16, Q8_0 and Q4_1 are", encoding,
			      *encoding_name(encoding) ? " " : "", encoding_name(encoding));
	tensor->encoding = (gguf_encoding)encoding;
	status = measure_tensor(cursor, tensor);
	return status < 0 ? status : take_number(cursor, 8, &tensor->offset);
}

static lshard_status check_count(struct cursor *cursor, const char *what, uint64_t count, uint64_t most,
				 unsigned least_bytes)
{
	const uint64_t left = cursor->file->source.bytes - cursor->at;

	if (count > most || count > left / least_bytes)
		return REFUSE(cursor, LSHARD_ERR_INVALID,
			      "%" PRIu64 " %s are announced; %" PRIu64 " bytes follow, and %" PRIu64 " are allowed",
			      count, what, left, most);
	return LSHARD_OK;
}

static lshard_status take_counts(struct cursor *cursor, struct counts *counts)
{
	const uint8_t *magic = NULL;
	uint64_t version = 0;
	lshard_status status = take(cursor, 4, &magic);

	if (status < 0)
		return status;
	if (memcmp(magic, "GGUF", 4) != 0)
		return REFUSE(cursor, LSHARD_ERR_INVALID, "%s",
			      "not a GGUF file: it does not begin with the letters GGUF");
	status = take_number(cursor, 4, &version);
	if (status < 0)
		return status;
	if (version == (uint64_t)2 << 24 || version == (uint64_t)3 << 24)
		return REFUSE(cursor, LSHARD_ERR_NOT_SUPPORTED, "%s",
			      "GGUF with the highest byte first (big-endian) is not supported");
	if (version != 2 && version != 3)
		return REFUSE(cursor, LSHARD_ERR_NOT_SUPPORTED,
			      "GGUF version %" PRIu64 " is not supported; 2 and 3 are", version);
	counts->version = (uint32_t)version;
	status = take_number(cursor, 8, &counts->tensors);
	if (status >= 0)
		status = take_number(cursor, 8, &counts->values);
	if (status >= 0)
		status = check_count(cursor, "tensors", counts->tensors, TENSORS_MAX, TENSOR_BYTES_MIN);
	if (status >= 0)
		status = check_count(cursor, "keys", counts->values, VALUES_MAX, VALUE_BYTES_MIN);
	return status;
}

/* One walk over the head. The tables are NULL in the first. */
static lshard_status walk(struct cursor *cursor, struct counts *counts, gguf_value *values, gguf_tensor *tensors)
{
	gguf_tensor tensor;
	gguf_value value;
	lshard_status status;
	uint64_t i;

	cursor->at = 0;
	memcpy(cursor->subject, "header", sizeof "header");
	status = take_counts(cursor, counts);
	for (i = 0; i < counts->values && status >= 0; i++) {
		describe_number(cursor, "key number", i);
		status = take_value(cursor, values ? &values[i] : &value);
	}
	for (i = 0; i < counts->tensors && status >= 0; i++) {
		describe_number(cursor, "tensor number", i);
		status = take_tensor(cursor, tensors ? &tensors[i] : &tensor);
	}
	return status;
}

static int compare_keys(const void *left, const void *right)
{
	return gguf_compare_text(((const gguf_value *)left)->key, ((const gguf_value *)right)->key);
}

static int compare_names(const void *left, const void *right)
{
	return gguf_compare_text(((const gguf_tensor *)left)->name, ((const gguf_tensor *)right)->name);
}

static int compare_offsets(const void *left, const void *right)
{
	const uint64_t a = ((const gguf_tensor *)left)->offset;
	const uint64_t b = ((const gguf_tensor *)right)->offset;

	return (a > b) - (a < b);
}

static lshard_status sort_names(struct cursor *cursor)
{
	gguf *const file = cursor->file;
	uint32_t i;

	qsort(file->values, file->value_count, sizeof *file->values, compare_keys);
	qsort(file->tensors, file->tensor_count, sizeof *file->tensors, compare_names);
	for (i = 1; i < file->value_count; i++)
		if (compare_keys(&file->values[i - 1], &file->values[i]) == 0) {
			describe(cursor, "key", file->values[i].key);
			return REFUSE(cursor, LSHARD_ERR_INVALID, "%s", "it occurs twice");
		}
	for (i = 1; i < file->tensor_count; i++)
		if (compare_names(&file->tensors[i - 1], &file->tensors[i]) == 0) {
			describe(cursor, "tensor", file->tensors[i].name);
			return REFUSE(cursor, LSHARD_ERR_INVALID, "%s", "it occurs twice");
		}
	return LSHARD_OK;
}

static lshard_status find_alignment(struct cursor *cursor, uint64_t *alignment)
{
	static const char key[] = "general.alignment";
	lshard_status status;

	*alignment = 32;
	if (!gguf_find_value(cursor->file, key))
		return LSHARD_OK;
	status = gguf_get_unsigned(cursor->file, key, alignment, cursor->error);
	if (status < 0)
		return status;
	if (*alignment == 0 || (*alignment & (*alignment - 1)) != 0 || *alignment > ALIGNMENT_MAX)
		return engine_fail(cursor->error, LSHARD_ERR_INVALID,
				   "%s: key '%s': %" PRIu64 " is not a power of two up to %" PRIu64,
				   cursor->file->source.name, key, *alignment, ALIGNMENT_MAX);
	return LSHARD_OK;
}

/* Offsets count from the first aligned byte after the head; make them count from the file's first. */
static lshard_status place_tensor(struct cursor *cursor, gguf_tensor *tensor, uint64_t data, uint64_t alignment)
{
	const uint64_t file_bytes = cursor->file->source.bytes;

	describe(cursor, "tensor", tensor->name);
	if (tensor->offset % alignment != 0)
		return REFUSE(cursor, LSHARD_ERR_INVALID,
			      "its offset %" PRIu64 " is no multiple of the alignment %" PRIu64, tensor->offset,
			      alignment);
	if (data > file_bytes || tensor->offset > file_bytes - data ||
	    tensor->bytes > file_bytes - data - tensor->offset)
		return REFUSE(cursor, LSHARD_ERR_INVALID,
			      "its %" PRIu64 " bytes at offset %" PRIu64 " (data begin at byte %" PRIu64
			      ") reach beyond the file's end at %" PRIu64,
			      tensor->bytes, tensor->offset, data, file_bytes);
	tensor->offset += data;
	return LSHARD_OK;
}

static lshard_status place_tensors(struct cursor *cursor, uint64_t alignment)
{
	gguf *const file = cursor->file;
	const uint64_t data = (file->head_bytes + alignment - 1) / alignment * alignment;
	lshard_status status = LSHARD_OK;
	uint32_t i;

	for (i = 0; i < file->tensor_count && status >= 0; i++)
		status = place_tensor(cursor, &file->tensors[i], data, alignment);
	return status;
}

static lshard_status check_overlaps(struct cursor *cursor)
{
	gguf *const file = cursor->file;
	uint32_t i;

	qsort(file->tensors, file->tensor_count, sizeof *file->tensors, compare_offsets);
	for (i = 1; i < file->tensor_count; i++) {
		const gguf_tensor *const before = &file->tensors[i - 1];

		if (file->tensors[i].offset - before->offset >= before->bytes)
			continue;
		describe(cursor, "tensor", file->tensors[i].name);
		return REFUSE(cursor, LSHARD_ERR_INVALID,
			      "it begins at byte %" PRIu64 ", inside tensor '%.*s' (%" PRIu64 " bytes from %" PRIu64
			      ")",
			      file->tensors[i].offset, (int)before->name.bytes, before->name.at, before->bytes,
			      before->offset);
	}
	return LSHARD_OK;
}

static lshard_status allocate_tables(gguf *file, const struct counts *counts, engine_error *error)
{
	file->values = calloc((size_t)counts->values + 1, sizeof *file->values);
	file->tensors = calloc((size_t)counts->tensors + 1, sizeof *file->tensors);
	if (!file->values || !file->tensors)
		return engine_fail(error, LSHARD_ERR_NO_MEMORY, "%s: no memory for its tables", file->source.name);
	return LSHARD_OK;
}

lshard_status gguf_parse_head(gguf *file, engine_error *error)
{
	struct cursor cursor = {file, error, 0, ""};
	struct counts counts = {0, 0, 0};
	uint64_t alignment = 0;
	lshard_status status = walk(&cursor, &counts, NULL, NULL);

	if (status >= 0)
		status = allocate_tables(file, &counts, error);
	if (status >= 0)
		status = walk(&cursor, &counts, file->values, file->tensors);
	if (status < 0)
		return status;
	file->head_bytes = (size_t)cursor.at;
	file->value_count = (uint32_t)counts.values;
	file->tensor_count = (uint32_t)counts.tensors;
	status = sort_names(&cursor);
	if (status >= 0)
		status = find_alignment(&cursor, &alignment);
	if (status >= 0)
		status = place_tensors(&cursor, alignment);
	if (status >= 0)
		status = check_overlaps(&cursor);
	if (status >= 0)
		qsort(file->tensors, file->tensor_count, sizeof *file->tensors, compare_names);
	return status;
}
