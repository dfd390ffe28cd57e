/* SPDX-License-Identifier: Apache-2.0
 *
 * run_text.c - see run_text.h.
 */
#include "run_text.h"

#include <stdio.h>

static bool is_own(const struct run_text *text)
{
	return !text->options->one_of_job || text->current % text->options->ranks == (size_t)text->options->first_rank;
}

static void begin(struct run_text *text, const struct prompt *prompt)
{
	const size_t rank = text->current % text->options->ranks;

	cli_progress_erase();
	if (text->terminal)
		printf("\033[2m[prompt %zu, rank %zu]\033[0m \033[1m%s\033[0m", text->current, rank, prompt->text);
	else
		printf("[prompt %zu, rank %zu] %s", text->current, rank, prompt->text);
	text->is_begun = true;
}

/* What a model writes must not move the cursor, or worse: on a terminal control characters become dots. */
static void print_answer(const struct run_text *text, const char *bytes, size_t count)
{
	if (!text->terminal) {
		(void)fwrite(bytes, 1, count, stdout);
		return;
	}
	for (size_t i = 0; i < count; i++) {
		const unsigned char byte = (unsigned char)bytes[i];
		const bool control = (byte < 0x20 && byte != '\n' && byte != '\t') || byte == 0x7F;

		(void)putchar(control ? '.' : byte);
	}
}

static void show(struct run_text *text, const struct prompt *prompt)
{
	if (!text->is_begun)
		begin(text, prompt);
	if (prompt->output_bytes > text->shown_bytes)
		print_answer(text, prompt->output + text->shown_bytes, prompt->output_bytes - text->shown_bytes);
	text->shown_bytes = prompt->output_bytes;
	if (!prompt->finished)
		return;
	printf("%s%s%s\n\n", *prompt->error ? " [not finished: " : "", prompt->error, *prompt->error ? "]" : "");
	text->current++;
	text->shown_bytes = 0;
	text->is_begun = false;
}

void run_text_update(void *user)
{
	struct run_text *text = user;

	while (text->current < text->prompts->count) {
		const size_t before = text->current;
		const struct prompt *prompt = &text->prompts->items[before];

		if (!is_own(text) || (prompt->finished && !prompt->prompt_tokens))
			text->current++; /* somebody else's, or failed before it was begun */
		else if (prompt->finished || (text->streams && prompt->prompt_tokens))
			show(text, prompt);
		if (text->current == before)
			break;
	}
	(void)fflush(stdout);
}
