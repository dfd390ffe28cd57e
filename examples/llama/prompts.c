/* SPDX-License-Identifier: Apache-2.0
 *
 * prompts.c - see prompts.h.
 */
#include "prompts.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"

bool prompts_add(struct prompts *prompts, const char *text, size_t bytes)
{
	struct prompt *items = realloc(prompts->items, (prompts->count + 1) * sizeof *items);
	struct prompt prompt = {0};

	if (!items)
		return false;
	prompts->items = items;
	prompt.text = strndup(text, bytes);
	if (!prompt.text)
		return false;
	items[prompts->count++] = prompt;
	return true;
}

bool prompts_add_default(struct prompts *prompts)
{
	static const char *const texts[] = {
		"The capital of France is",
		"Water boils at",
		"The first person to walk on the Moon was",
		"The opposite of hot is",
	};

	for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
		if (!prompts_add(prompts, texts[i], strlen(texts[i])))
			return false;
	}
	return true;
}

static bool read_lines(struct prompts *prompts, FILE *file, const char *path)
{
	char *line = NULL;
	size_t room = 0;
	ssize_t length;
	bool done = true;

	while (done && (length = getline(&line, &room, file)) >= 0) {
		size_t bytes = (size_t)length;

		while (bytes > 0 && (line[bytes - 1] == '\n' || line[bytes - 1] == '\r'))
			bytes--;
		if (memchr(line, '\0', bytes)) {
			cli_message("'%s' holds a zero byte; it must be text, one prompt per line", path);
			done = false;
		} else if (bytes > 0 && !prompts_add(prompts, line, bytes)) {
			cli_message("out of memory while reading '%s'", path);
			done = false;
		}
	}
	if (done && ferror(file)) {
		cli_message("'%s' could not be read: %s", path, strerror(errno));
		done = false;
	}
	free(line);
	return done;
}

bool prompts_read(struct prompts *prompts, const char *path)
{
	const bool is_stdin = strcmp(path, "-") == 0;
	FILE *file = is_stdin ? stdin : fopen(path, "re");
	const size_t before = prompts->count;
	bool done;

	if (!file) {
		cli_message("the prompts '%s' could not be opened: %s", path, strerror(errno));
		return false;
	}
	done = read_lines(prompts, file, is_stdin ? "standard input" : path);
	if (!is_stdin)
		(void)fclose(file);
	if (done && prompts->count == before) {
		cli_message("'%s' holds no prompt; write one per line", is_stdin ? "standard input" : path);
		return false;
	}
	return done;
}

bool prompt_set_tokens(struct prompt *prompt, const void *tokens, size_t count)
{
	int32_t *copy = malloc(count ? count * sizeof *copy : 1);

	if (!copy)
		return false;
	if (count)
		memcpy(copy, tokens, count * sizeof *copy);
	free(prompt->prompt_tokens);
	prompt->prompt_tokens = copy;
	prompt->prompt_token_count = count;
	return true;
}

/* Room for @p more elements behind @p count in an array that doubles; NULL: no memory, the old array stands. */
static void *with_room(void *array, size_t *room, size_t count, size_t more, size_t element)
{
	size_t wanted = *room ? *room : 64;
	void *grown;

	if (count + more <= *room)
		return array;
	while (wanted < count + more)
		wanted *= 2;
	grown = realloc(array, wanted * element);
	if (grown)
		*room = wanted;
	return grown;
}

bool prompt_append(struct prompt *prompt, int32_t token, const char *text, size_t bytes)
{
	int32_t *tokens = with_room(prompt->tokens, &prompt->token_room, prompt->token_count, 1, sizeof *tokens);
	char *output;

	if (!tokens)
		return false;
	prompt->tokens = tokens;
	if (bytes > 0) { /* an end-of-text token has no text */
		output = with_room(prompt->output, &prompt->output_room, prompt->output_bytes, bytes, 1);
		if (!output)
			return false;
		prompt->output = output;
		memcpy(output + prompt->output_bytes, text, bytes);
		prompt->output_bytes += bytes;
	}
	tokens[prompt->token_count++] = token;
	return true;
}

void prompt_fail(struct prompt *prompt, const char *error, size_t bytes)
{
	(void)snprintf(prompt->error, sizeof prompt->error, "%.*s", (int)bytes, error);
	prompt->finished = true;
}

void prompts_free(struct prompts *prompts)
{
	for (size_t i = 0; i < prompts->count; i++) {
		free(prompts->items[i].text);
		free(prompts->items[i].prompt_tokens);
		free(prompts->items[i].tokens);
		free(prompts->items[i].output);
	}
	free(prompts->items);
	*prompts = (struct prompts){NULL, 0};
}
