/* SPDX-License-Identifier: Apache-2.0
 *
 * gguf_head.h - the parts of the GGUF reader that gguf.c and gguf_head.c share.
 */
#ifndef GGUF_HEAD_H
#define GGUF_HEAD_H

#include "gguf.h"

struct gguf {
	gguf_source source;
	char *name;     /* owned copy; source.name points to it */
	int descriptor; /* -1 when the source is the caller's */
	uint64_t modified_ns;
	uint64_t read_bytes;

	uint8_t *head; /* the file's first head_have bytes */
	size_t head_have;
	size_t head_capacity;
	size_t head_bytes; /* where the descriptions end */

	gguf_value *values; /* sorted by key */
	uint32_t value_count;
	gguf_tensor *tensors; /* sorted by name */
	uint32_t tensor_count;
};

/** Read from the source and count it; checks the range. */
lshard_status gguf_read(gguf *file, uint64_t offset, void *to, size_t bytes, engine_error *error);
/** Fill in head, values and tensors. On failure gguf_close frees what is there. */
lshard_status gguf_parse_head(gguf *file, engine_error *error);
/** Bytes of one value of a type with a fixed size; 0 for strings, arrays and unknown types. */
size_t gguf_type_bytes(uint32_t type);
/** Values and bytes of one block of an encoding; 0 when it is not known here. */
size_t gguf_block_values(uint32_t encoding);
size_t gguf_block_bytes(uint32_t encoding);

#endif
