/* SPDX-License-Identifier: Apache-2.0
 *
 * gguf.h - reads GGUF files, versions 2 and 3.
 *
 * The head (keys, values, tensor descriptions) is read once and kept; tensors are read when asked for. Whatever the
 * file says is checked against the file's size before it is believed: a damaged or hostile file gives an error that
 * names the key or tensor, never a crash. Knows nothing of models.
 */
#ifndef GGUF_H
#define GGUF_H

#include <stddef.h>
#include <stdint.h>

#include "engine_error.h"

/* Where the bytes come from. @p read gives exactly @p bytes bytes at @p offset and returns 0, or an errno value. */
typedef struct gguf_source {
	int (*read)(void *user, uint64_t offset, void *to, size_t bytes);
	void *user;
	uint64_t bytes;   /* of the whole file */
	const char *name; /* for messages */
} gguf_source;

typedef enum gguf_type {
	GGUF_U8 = 0,
	GGUF_I8 = 1,
	GGUF_U16 = 2,
	GGUF_I16 = 3,
	GGUF_U32 = 4,
	GGUF_I32 = 5,
	GGUF_F32 = 6,
	GGUF_BOOL = 7,
	GGUF_STRING = 8,
	GGUF_ARRAY = 9,
	GGUF_U64 = 10,
	GGUF_I64 = 11,
	GGUF_F64 = 12
} gguf_type;

/* Bytes inside the head; not terminated by a zero. */
typedef struct gguf_text {
	const char *at;
	size_t bytes;
} gguf_text;

typedef struct gguf_value {
	gguf_text key;
	gguf_type type;
	gguf_type element;    /* of an array; else as type */
	uint64_t count;       /* elements of an array; else 1 */
	const uint8_t *bytes; /* the value, or the first element */
} gguf_value;

typedef enum gguf_encoding {
	GGUF_ENCODING_F32 = 0,
	GGUF_ENCODING_F16 = 1,
	GGUF_ENCODING_Q4_1 = 3,
	GGUF_ENCODING_Q8_0 = 8
} gguf_encoding;

typedef struct gguf_tensor {
	gguf_text name;
	gguf_encoding encoding;
	uint32_t dimensions;
	uint64_t size[4]; /* innermost first; 1 beyond dimensions */
	uint64_t values;  /* product of the sizes */
	uint64_t offset;  /* in the file */
	uint64_t bytes;
} gguf_tensor;

typedef struct gguf gguf;

/** @return OK; ERR_INVALID when damaged; ERR_NOT_SUPPORTED for versions and types not known here; ERR_SYSTEM;
 * NO_MEMORY. */
lshard_status gguf_open_file(const char *path, gguf **opened, engine_error *error);
/** As gguf_open_file; @p source is copied, its user and name must live until gguf_close. */
lshard_status gguf_open_source(const gguf_source *source, gguf **opened, engine_error *error);
void gguf_close(gguf *file);

const char *gguf_name(const gguf *file);
uint64_t gguf_file_bytes(const gguf *file);
/** When the file was last written; 0 for a source that is no file. */
uint64_t gguf_modified_ns(const gguf *file);
/** The head: everything before the tensors' bytes. */
gguf_text gguf_head(const gguf *file);
/** Bytes read so far, through this object. */
uint64_t gguf_read_bytes(const gguf *file);

/** NULL when there is no such key, or tensor. */
const gguf_value *gguf_find_value(const gguf *file, const char *key);
/** Values in order of their keys. */
uint32_t gguf_value_count(const gguf *file);
const gguf_value *gguf_value_at(const gguf *file, uint32_t index);
const gguf_tensor *gguf_find_tensor(const gguf *file, const char *name);
/** Tensors in order of their names. */
uint32_t gguf_tensor_count(const gguf *file);
const gguf_tensor *gguf_tensor_at(const gguf *file, uint32_t index);

/*
 * Typed values. A missing key and a value of another type are errors that name the key: ERR_INVALID, but NOT_SUPPORTED
 * for an array where one value is asked for, which is how files say that layers differ.
 */
lshard_status gguf_get_unsigned(const gguf *file, const char *key, uint64_t *value, engine_error *error);
lshard_status gguf_get_number(const gguf *file, const char *key, double *value, engine_error *error);
lshard_status gguf_get_bool(const gguf *file, const char *key, int *value, engine_error *error);
lshard_status gguf_get_string(const gguf *file, const char *key, gguf_text *value, engine_error *error);
/** Whether there is such a key and its value is exactly @p wanted. */
int gguf_is_text(const gguf *file, const char *key, const char *wanted);
lshard_status gguf_get_array(const gguf *file, const char *key, gguf_type element, const gguf_value **value,
			     engine_error *error);
/** Step through an array of strings: *at starts at value->bytes. Call it at most value->count times. */
gguf_text gguf_next_string(const uint8_t **at);

/** A number of 1 to 8 bytes as files hold it. */
uint64_t gguf_little_endian(const uint8_t *at, size_t bytes);
int gguf_compare_text(gguf_text left, gguf_text right);

/** Read @p bytes of @p tensor from its byte @p first on. */
lshard_status gguf_read_tensor(gguf *file, const gguf_tensor *tensor, uint64_t first, void *to, size_t bytes,
			       engine_error *error);

/** Bytes of @p values values: a multiple of the encoding's block. */
size_t gguf_encoded_bytes(gguf_encoding encoding, size_t values);

#endif
