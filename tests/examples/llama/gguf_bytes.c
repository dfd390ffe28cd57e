/* SPDX-License-Identifier: Apache-2.0
 *
 * gguf_bytes.c - see gguf_bytes.h.
 */
#include "gguf_bytes.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void give_up(const char *what, const char *path)
{
	(void)fprintf(stderr, "%s %s: %s\n", what, path, strerror(errno));
	exit(1);
}

struct gguf_bytes gguf_bytes_load(const char *path)
{
	FILE *const file = fopen(path, "rb");
	struct gguf_bytes bytes = {NULL, 0};
	long size = -1;

	if (!file || fseek(file, 0, SEEK_END) != 0 || (size = ftell(file)) < 0)
		give_up("cannot open", path);
	rewind(file);
	bytes.count = (size_t)size;
	bytes.at = malloc(bytes.count + 1);
	if (!bytes.at || fread(bytes.at, 1, bytes.count, file) != bytes.count)
		give_up("cannot read", path);
	(void)fclose(file);
	return bytes;
}

struct gguf_bytes gguf_bytes_copy(struct gguf_bytes bytes)
{
	struct gguf_bytes copy = {malloc(bytes.count ? bytes.count : 1), bytes.count};

	if (!copy.at)
		give_up("no memory for", "a copy");
	memcpy(copy.at, bytes.at, bytes.count);
	return copy;
}

static int read_bytes(void *user, uint64_t offset, void *to, size_t count)
{
	const struct gguf_bytes *const bytes = user;

	if (offset > bytes->count || count > bytes->count - offset)
		return EIO; /* the reader asked for what is not there: tests see it as a failure */
	if (count > 0)
		memcpy(to, bytes->at + offset, count);
	return 0;
}

lshard_status gguf_bytes_open(const struct gguf_bytes *bytes, gguf **opened, engine_error *error)
{
	struct gguf_bytes *const user = (struct gguf_bytes *)(uintptr_t)bytes; /* read_bytes writes nothing */
	const gguf_source source = {read_bytes, user, bytes->count, "memory"};

	return gguf_open_source(&source, opened, error);
}

uint8_t *gguf_bytes_after(struct gguf_bytes bytes, const char *text)
{
	const size_t length = strlen(text);
	uint8_t *at;

	for (at = bytes.at; at + 8 + length <= bytes.at + bytes.count; at++)
		if (gguf_little_endian(at, 8) == length && memcmp(at + 8, text, length) == 0)
			return at + 8 + length;
	errno = ENOENT;
	give_up("not in the file:", text);
	return NULL;
}

void gguf_bytes_put(uint8_t *at, uint64_t number, size_t count)
{
	size_t i;

	for (i = 0; i < count; i++)
		at[i] = (uint8_t)(number >> 8 * i);
}

void gguf_bytes_store(struct gguf_bytes bytes, char *path)
{
	const char *const directory = getenv("TMPDIR");
	int descriptor;

	(void)snprintf(path, 256, "%s/gguf-test-XXXXXX", directory && *directory ? directory : "/tmp");
	descriptor = mkstemp(path);
	if (descriptor < 0 || write(descriptor, bytes.at, bytes.count) != (ssize_t)bytes.count ||
	    close(descriptor) != 0)
		give_up("cannot write", path);
}
