/* SPDX-License-Identifier: Apache-2.0
 *
 * gguf.c - opening GGUF files, finding and converting values, reading tensors. See gguf.h; the parser is gguf_head.c.
 */
#include "gguf_head.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

size_t gguf_type_bytes(uint32_t type)
{
	static const uint8_t bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

	return type < sizeof bytes ? bytes[type] : 0;
}

size_t gguf_block_values(uint32_t encoding)
{
	switch (encoding) {
	case GGUF_ENCODING_F32:
	case GGUF_ENCODING_F16:
		return 1;
	case GGUF_ENCODING_Q4_1:
	case GGUF_ENCODING_Q8_0:
		return 32;
	default:
		return 0;
	}
}

size_t gguf_block_bytes(uint32_t encoding)
{
	switch (encoding) {
	case GGUF_ENCODING_F32:
		return 4;
	case GGUF_ENCODING_F16:
		return 2;
	case GGUF_ENCODING_Q4_1:
		return 2 + 2 + 16; /* scale, minimum, 32 nibbles */
	case GGUF_ENCODING_Q8_0:
		return 2 + 32; /* scale, 32 bytes */
	default:
		return 0;
	}
}

size_t gguf_encoded_bytes(gguf_encoding encoding, size_t values)
{
	return values / gguf_block_values(encoding) * gguf_block_bytes(encoding);
}

uint64_t gguf_little_endian(const uint8_t *at, size_t bytes)
{
	uint64_t number = 0;

	while (bytes-- > 0)
		number = number << 8 | at[bytes];
	return number;
}

int gguf_compare_text(gguf_text left, gguf_text right)
{
	const size_t common = left.bytes < right.bytes ? left.bytes : right.bytes;
	const int order = common > 0 ? memcmp(left.at, right.at, common) : 0;

	return order != 0 ? order : (left.bytes > right.bytes) - (left.bytes < right.bytes);
}

/* ---- Opening and reading --------------------------------------------------------------------------------------- */

static int read_descriptor(void *user, uint64_t offset, void *to, size_t bytes)
{
	const int descriptor = *(const int *)user;
	char *at = to;

	while (bytes > 0) {
		const ssize_t got = pread(descriptor, at, bytes, (off_t)offset);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return errno;
		if (got == 0)
			return EIO; /* the file shrank since it was opened */
		at += got;
		offset += (uint64_t)got;
		bytes -= (size_t)got;
	}
	return 0;
}

lshard_status gguf_read(gguf *file, uint64_t offset, void *to, size_t bytes, engine_error *error)
{
	int cause;

	if (offset > file->source.bytes || bytes > file->source.bytes - offset)
		return engine_fail(error, LSHARD_ERR_RANGE,
				   "%s: bytes %" PRIu64 " to %" PRIu64 " are beyond its end at %" PRIu64,
				   file->source.name, offset, offset + bytes, file->source.bytes);
	cause = file->source.read(file->source.user, offset, to, bytes);
	if (cause != 0)
		return engine_fail(error, LSHARD_ERR_SYSTEM, "%s: cannot read %zu bytes at byte %" PRIu64 ": %s",
				   file->source.name, bytes, offset, strerror(cause));
	file->read_bytes += bytes;
	return LSHARD_OK;
}

static lshard_status parse_or_close(gguf *file, gguf **opened, engine_error *error)
{
	const lshard_status status = gguf_parse_head(file, error);

	if (status < 0)
		gguf_close(file);
	else
		*opened = file;
	return status;
}

static gguf *create(const char *name)
{
	gguf *const file = calloc(1, sizeof *file);

	if (!file)
		return NULL;
	file->descriptor = -1;
	file->name = strdup(name);
	if (!file->name) {
		free(file);
		return NULL;
	}
	file->source.name = file->name;
	return file;
}

lshard_status gguf_open_source(const gguf_source *source, gguf **opened, engine_error *error)
{
	gguf *const file = create(source->name);

	if (!file)
		return engine_fail(error, LSHARD_ERR_NO_MEMORY, "%s: no memory to open it", source->name);
	file->source = *source;
	file->source.name = file->name;
	return parse_or_close(file, opened, error);
}

static lshard_status open_regular(gguf *file, const char *path, engine_error *error)
{
	struct stat about;

	file->descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (file->descriptor < 0 || fstat(file->descriptor, &about) != 0)
		return engine_fail(error, LSHARD_ERR_SYSTEM, "%s: cannot open the model: %s", path, strerror(errno));
	if (!S_ISREG(about.st_mode))
		return engine_fail(error, LSHARD_ERR_INVALID, "%s: the model is not a regular file", path);
	file->source.read = read_descriptor;
	file->source.user = &file->descriptor;
	file->source.bytes = (uint64_t)about.st_size;
	file->modified_ns = (uint64_t)about.st_mtim.tv_sec * 1000000000u + (uint64_t)about.st_mtim.tv_nsec;
	return LSHARD_OK;
}

lshard_status gguf_open_file(const char *path, gguf **opened, engine_error *error)
{
	gguf *const file = create(path);
	lshard_status status;

	if (!file)
		return engine_fail(error, LSHARD_ERR_NO_MEMORY, "%s: no memory to open it", path);
	status = open_regular(file, path, error);
	if (status < 0) {
		gguf_close(file);
		return status;
	}
	return parse_or_close(file, opened, error);
}

void gguf_close(gguf *file)
{
	if (!file)
		return;
	free(file->tensors);
	free(file->values);
	free(file->head);
	if (file->descriptor >= 0)
		(void)close(file->descriptor);
	free(file->name);
	free(file);
}

lshard_status gguf_read_tensor(gguf *file, const gguf_tensor *tensor, uint64_t first, void *to, size_t bytes,
			       engine_error *error)
{
	if (first > tensor->bytes || bytes > tensor->bytes - first)
		return engine_fail(error, LSHARD_ERR_RANGE, "%s: tensor '%.*s' has no bytes %" PRIu64 " to %" PRIu64,
				   file->source.name, (int)tensor->name.bytes, tensor->name.at, first, first + bytes);
	return gguf_read(file, tensor->offset + first, to, bytes, error);
}

/* ---- Finding --------------------------------------------------------------------------------------------------- */

const char *gguf_name(const gguf *file)
{
	return file->source.name;
}

uint64_t gguf_file_bytes(const gguf *file)
{
	return file->source.bytes;
}

uint64_t gguf_modified_ns(const gguf *file)
{
	return file->modified_ns;
}

gguf_text gguf_head(const gguf *file)
{
	const gguf_text head = {(const char *)file->head, file->head_bytes};

	return head;
}

uint64_t gguf_read_bytes(const gguf *file)
{
	return file->read_bytes;
}

static int compare_key(const void *wanted, const void *value)
{
	return gguf_compare_text(*(const gguf_text *)wanted, ((const gguf_value *)value)->key);
}

static int compare_name(const void *wanted, const void *tensor)
{
	return gguf_compare_text(*(const gguf_text *)wanted, ((const gguf_tensor *)tensor)->name);
}

const gguf_value *gguf_find_value(const gguf *file, const char *key)
{
	const gguf_text wanted = {key, strlen(key)};

	return bsearch(&wanted, file->values, file->value_count, sizeof *file->values, compare_key);
}

const gguf_tensor *gguf_find_tensor(const gguf *file, const char *name)
{
	const gguf_text wanted = {name, strlen(name)};

	return bsearch(&wanted, file->tensors, file->tensor_count, sizeof *file->tensors, compare_name);
}

uint32_t gguf_value_count(const gguf *file)
{
	return file->value_count;
}

const gguf_value *gguf_value_at(const gguf *file, uint32_t index)
{
	return &file->values[index];
}

uint32_t gguf_tensor_count(const gguf *file)
{
	return file->tensor_count;
}

const gguf_tensor *gguf_tensor_at(const gguf *file, uint32_t index)
{
	return &file->tensors[index];
}

/* ---- Typed values ---------------------------------------------------------------------------------------------- */

static lshard_status wrong_type(const gguf *file, const gguf_value *value, const char *key, const char *wanted,
				engine_error *error)
{
	if (!value)
		return engine_fail(error, LSHARD_ERR_INVALID, "%s: key '%s' is missing", file->source.name, key);
	if (value->type == GGUF_ARRAY)
		return engine_fail(error, LSHARD_ERR_NOT_SUPPORTED,
				   "%s: key '%s' is an array of %" PRIu64
				   " values; one value for all layers is supported",
				   file->source.name, key, value->count);
	return engine_fail(error, LSHARD_ERR_INVALID, "%s: key '%s' has value type %d where %s is needed",
			   file->source.name, key, (int)value->type, wanted);
}

lshard_status gguf_get_unsigned(const gguf *file, const char *key, uint64_t *number, engine_error *error)
{
	const gguf_value *const value = gguf_find_value(file, key);
	size_t bytes;
	uint64_t raw;

	if (!value || value->type == GGUF_F32 || value->type == GGUF_F64 || value->type == GGUF_BOOL ||
	    gguf_type_bytes(value->type) == 0)
		return wrong_type(file, value, key, "a whole number", error);
	bytes = gguf_type_bytes(value->type);
	raw = gguf_little_endian(value->bytes, bytes);
	if ((value->type == GGUF_I8 || value->type == GGUF_I16 || value->type == GGUF_I32 || value->type == GGUF_I64) &&
	    raw >> (bytes * 8 - 1) != 0)
		return engine_fail(error, LSHARD_ERR_INVALID, "%s: key '%s' is negative", file->source.name, key);
	*number = raw;
	return LSHARD_OK;
}

lshard_status gguf_get_number(const gguf *file, const char *key, double *number, engine_error *error)
{
	const gguf_value *const value = gguf_find_value(file, key);
	double wide;
	float narrow;

	if (!value || (value->type != GGUF_F32 && value->type != GGUF_F64))
		return wrong_type(file, value, key, "a floating-point number", error);
	if (value->type == GGUF_F32) {
		memcpy(&narrow, value->bytes, sizeof narrow);
		wide = (double)narrow;
	} else {
		memcpy(&wide, value->bytes, sizeof wide);
	}
	if (!isfinite(wide))
		return engine_fail(error, LSHARD_ERR_INVALID, "%s: key '%s' is not a finite number", file->source.name,
				   key);
	*number = wide;
	return LSHARD_OK;
}

lshard_status gguf_get_bool(const gguf *file, const char *key, int *truth, engine_error *error)
{
	const gguf_value *const value = gguf_find_value(file, key);

	if (!value || value->type != GGUF_BOOL)
		return wrong_type(file, value, key, "true or false", error);
	if (*value->bytes > 1)
		return engine_fail(error, LSHARD_ERR_INVALID, "%s: key '%s' is %d where 0 or 1 is needed",
				   file->source.name, key, *value->bytes);
	*truth = *value->bytes;
	return LSHARD_OK;
}

gguf_text gguf_next_string(const uint8_t **at)
{
	const gguf_text text = {(const char *)*at + 8, (size_t)gguf_little_endian(*at, 8)};

	*at += 8 + text.bytes;
	return text;
}

lshard_status gguf_get_string(const gguf *file, const char *key, gguf_text *text, engine_error *error)
{
	const gguf_value *const value = gguf_find_value(file, key);
	const uint8_t *at;

	if (!value || value->type != GGUF_STRING)
		return wrong_type(file, value, key, "a text", error);
	at = value->bytes;
	*text = gguf_next_string(&at);
	return LSHARD_OK;
}

int gguf_is_text(const gguf *file, const char *key, const char *wanted)
{
	const gguf_value *const value = gguf_find_value(file, key);
	const gguf_text text = {wanted, strlen(wanted)};
	const uint8_t *at;

	if (!value || value->type != GGUF_STRING)
		return 0;
	at = value->bytes;
	return gguf_compare_text(gguf_next_string(&at), text) == 0;
}

lshard_status gguf_get_array(const gguf *file, const char *key, gguf_type element, const gguf_value **array,
			     engine_error *error)
{
	const gguf_value *const value = gguf_find_value(file, key);

	if (!value || value->type != GGUF_ARRAY)
		return wrong_type(file, value, key, "an array", error);
	if (value->element != element)
		return engine_fail(error, LSHARD_ERR_INVALID, "%s: key '%s' is an array of type %d where %d is needed",
				   file->source.name, key, (int)value->element, (int)element);
	*array = value;
	return LSHARD_OK;
}
