/* SPDX-License-Identifier: Apache-2.0
 *
 * gguf_bytes.h - a GGUF file in memory, to be damaged by tests and read by the engine's reader.
 */
#ifndef GGUF_BYTES_H
#define GGUF_BYTES_H

#include "gguf.h"

struct gguf_bytes {
	uint8_t *at;
	size_t count;
};

/* Reads the whole file, or ends the program with a message. Free with free(bytes.at). */
struct gguf_bytes gguf_bytes_load(const char *path);
struct gguf_bytes gguf_bytes_copy(struct gguf_bytes bytes);
/* Opens them as if they were a file named "memory". @p bytes must live as long as what is opened. */
lshard_status gguf_bytes_open(const struct gguf_bytes *bytes, gguf **opened, engine_error *error);
/* The first byte behind the first place where @p text stands with its length before it. The text must be there. */
uint8_t *gguf_bytes_after(struct gguf_bytes bytes, const char *text);
/* Write a little-endian number. */
void gguf_bytes_put(uint8_t *at, uint64_t number, size_t count);
/* Write to a new file in the directory for temporary files. @p path has room for 256 bytes. */
void gguf_bytes_store(struct gguf_bytes bytes, char *path);

#endif
