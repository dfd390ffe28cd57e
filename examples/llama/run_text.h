/* SPDX-License-Identifier: Apache-2.0
 *
 * run_text.h - prompts and their answers as text on stdout, in the order of the prompts.
 */
#ifndef RUN_TEXT_H
#define RUN_TEXT_H

#include <stdbool.h>
#include <stddef.h>

#include "prompts.h"
#include "rank_options.h"

/* Several ranks write at once, but a reader reads one text: that of the earliest prompt that is not finished. */
struct run_text {
	const struct rank_options *options;
	const struct prompts *prompts;
	bool terminal;  /* colours, and no control characters of the model's */
	bool streams;   /* show an answer while it grows; else once it is whole, in one piece */
	size_t current; /* the prompt shown now */
	size_t shown_bytes;
	bool is_begun;
};

/** Prints what has come since the last call. @p user is a struct run_text. */
void run_text_update(void *user);

#endif
