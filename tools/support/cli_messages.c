/* SPDX-License-Identifier: Apache-2.0
 *
 * cli_messages.c - what the program says on stderr besides its results: messages, the progress line, the library's log.
 */
#include "cli.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ERASE_LINE "\r\033[K"

/* The terminal's state: there is one. Without it, erasing would take what the model writes on the same line. */
static bool progress_is_shown;

bool cli_is_terminal(FILE *stream)
{
	const char *term = getenv("TERM");

	return isatty(fileno(stream)) && !(term && strcmp(term, "dumb") == 0);
}

void cli_progress(const char *format, ...)
{
	va_list arguments;

	if (!cli_is_terminal(stderr))
		return;
	fputs(ERASE_LINE, stderr);
	va_start(arguments, format);
	(void)vfprintf(stderr, format, arguments);
	va_end(arguments);
	progress_is_shown = true;
}

void cli_progress_erase(void)
{
	if (progress_is_shown)
		fputs(ERASE_LINE, stderr);
	progress_is_shown = false;
}

static void message(const char *format, va_list arguments)
{
	char *text;

	cli_progress_erase();
	if (vasprintf(&text, format, arguments) < 0) {
		fprintf(stderr, "%s: out of memory for a message\n", cli_program);
		return;
	}
	fprintf(stderr, "%s: %s\n", cli_program, text); /* one write: other ranks may write to the same place */
	free(text);
}

void cli_message(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	message(format, arguments);
	va_end(arguments);
}

int cli_usage(const char *command, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	message(format, arguments);
	va_end(arguments);
	fprintf(stderr, "See '%s %s%s--help'.\n", cli_program, command, *command ? " " : "");
	return CLI_USAGE;
}

bool cli_flush_output(void)
{
	if (fflush(stdout) == 0 && !ferror(stdout))
		return true;
	cli_message("the output could not be written: %s", errno ? strerror(errno) : "write error");
	return false;
}

/* ---- The library's log ------------------------------------------------------------------------------------------- */

static const char *const level_names[] = {"error", "warn", "info", "debug"};

bool cli_log_open(struct cli_log *log, int32_t rank)
{
	const char *value = getenv("LAYERSHARD_LOG");

	*log = (struct cli_log){false, LSHARD_LOG_ERROR, false, rank};
	if (!value || !*value)
		return true;
	for (size_t i = 0; i < sizeof level_names / sizeof *level_names; i++) {
		if (strcmp(value, level_names[i]) == 0) {
			log->wanted = true;
			log->level = (lshard_log_level)i;
			return true;
		}
	}
	cli_message("LAYERSHARD_LOG is '%s'; it may be error, warn, info or debug", value);
	return false;
}

void cli_log_default_to_warnings(struct cli_log *log)
{
	if (!log->wanted)
		*log = (struct cli_log){true, LSHARD_LOG_WARN, true, log->rank};
}

/* One write per line, so that the lines of several ranks do not run into one another. */
static void log_line(void *user, lshard_log_level level, const char *text)
{
	const struct cli_log *log = user;

	if (log->warnings_alone && level != LSHARD_LOG_WARN)
		return;
	fprintf(stderr, "[layershard r%d] %s: %s\n", log->rank, level_names[level], text);
}

void cli_log_attach(struct cli_log *log, lshard_group_options *options)
{
	if (!log->wanted)
		return;
	options->log = log_line;
	options->log_user = log;
	options->log_level = log->level;
}
