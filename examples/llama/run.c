/* SPDX-License-Identifier: Apache-2.0
 *
 * run.c - prompts continued on several ranks, and what failed of it. See run.h.
 */
#include "run.h"

#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "launcher.h"
#include "run_report.h"
#include "run_text.h"

/* True when some rank has loaded the model: then there is something to report. */
static bool any_worked(const struct launcher *launcher)
{
	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		if (launcher->ranks[i].phase != RANK_LOADING)
			return true;
	}
	return false;
}

/* The prompts that a rank has taken with it, in one line. */
static void tell_lost_prompts(const struct launcher *launcher, const struct own_rank *own)
{
	const size_t step = launcher->options->ranks;
	bool first = true;

	for (size_t i = (size_t)own->task.rank; i < launcher->prompts->count; i += step) {
		if (strcmp(launcher->prompts->items[i].error, own->error) != 0)
			continue;
		if (first)
			fprintf(stderr, "%s: not finished by rank %d: prompts", cli_program, own->task.rank);
		fprintf(stderr, "%s %zu", first ? "" : ",", i);
		first = false;
	}
	if (!first)
		fputc('\n', stderr);
}

/* A prompt's own error: of a rank that lives. */
static bool tell_failed_prompts(const struct launcher *launcher, const struct own_rank *own)
{
	const size_t step = launcher->options->ranks;
	bool failed = false;

	for (size_t i = (size_t)own->task.rank; i < launcher->prompts->count; i += step) {
		const char *error = launcher->prompts->items[i].error;

		if (*error && strcmp(error, own->error) != 0) {
			cli_message("prompt %zu was not finished: %s", i, error);
			failed = true;
		}
	}
	return failed;
}

/* After all else, where it is found. True when anything failed. */
static bool tell_failures(const struct launcher *launcher)
{
	bool failed = false;

	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		const struct own_rank *own = &launcher->ranks[i];

		if (*own->error) {
			if (!launcher_repeats_error(launcher, i))
				cli_message("%s", own->error);
			failed = true;
			if (any_worked(launcher))
				tell_lost_prompts(launcher, own);
		}
		failed = tell_failed_prompts(launcher, own) || failed;
	}
	return failed;
}

/* Ranks of a launcher mostly write to one terminal, or into one pipe, and none of them knows. */
static bool shares_output(const struct rank_options *options)
{
	return options->one_of_job && options->ranks > 1;
}

/* So that a text, or a table, is one write and whole among those of other ranks; the buffer outlives main. */
static char shared_output[1 << 16];

int run_prompts(struct run *run)
{
	const bool terminal = cli_is_terminal(stdout);
	struct run_text text = {.options = &run->options,
				.prompts = &run->prompts,
				.terminal = terminal,
				.streams = terminal && !shares_output(&run->options)};
	struct launcher launcher = {.options = &run->options,
				    .prompts = &run->prompts,
				    .max_tokens = run->max_tokens,
				    .prompt_changed = run->json ? NULL : run_text_update,
				    .user = &text};
	int reported = CLI_DONE;
	int code;

	if (shares_output(&run->options))
		(void)setvbuf(stdout, shared_output, _IOFBF, sizeof shared_output);
	(void)launcher_run(&launcher);
	code = launcher_code(&launcher);
	if (launcher.rank_count > 0 && run->json)
		reported = run_report_json(&launcher);
	else if (any_worked(&launcher))
		reported = run_report_table(&launcher);
	if (tell_failures(&launcher) && code == CLI_DONE)
		code = CLI_FAILED;
	if (code == CLI_DONE)
		code = reported;
	launcher_free(&launcher);
	return code;
}
