/* SPDX-License-Identifier: Apache-2.0
 *
 * prompts.h - the prompts of a run, in the order given, and what became of each.
 */
#ifndef PROMPTS_H
#define PROMPTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct prompt {
	char *text;
	int32_t *prompt_tokens; /* once its rank has begun it */
	size_t prompt_token_count;
	int32_t *tokens; /* generated so far */
	size_t token_count;
	size_t token_room;
	char *output; /* their text; not terminated by a zero */
	size_t output_bytes;
	size_t output_room;
	bool finished;   /* nothing more will come: all generated, or error is set */
	char error[768]; /* "": none */
};

struct prompts {
	struct prompt *items;
	size_t count;
};

/* All of these return false when memory ran out; nothing has changed then. */
bool prompts_add(struct prompts *prompts, const char *text, size_t bytes);
/** The built-in ones, for a run without any. */
bool prompts_add_default(struct prompts *prompts);
/** One prompt per line, blank lines skipped; "-" is stdin. False after a message. */
bool prompts_read(struct prompts *prompts, const char *path);

/** @p tokens need not be aligned. */
bool prompt_set_tokens(struct prompt *prompt, const void *tokens, size_t count);
bool prompt_append(struct prompt *prompt, int32_t token, const char *text, size_t bytes);
/** Finishes the prompt with an error. */
void prompt_fail(struct prompt *prompt, const char *error, size_t bytes);

void prompts_free(struct prompts *prompts);

#endif
