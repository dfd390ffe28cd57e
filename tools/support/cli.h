/* SPDX-License-Identifier: Apache-2.0
 *
 * cli.h - what programs share: exit codes, messages, reading of arguments, tables, JSON.
 * Knows: the public header and jansson. Does not know: what any program does.
 */
#ifndef CLI_H
#define CLI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <jansson.h>

#include "layershard/layershard.h"

/* Documented in --help of the program; scripts depend on them. */
enum cli_exit {
	CLI_DONE = 0,
	CLI_FAILED = 1,       /* something failed at run time; a rank that died included */
	CLI_USAGE = 2,        /* wrong command, option or environment */
	CLI_INCONCLUSIVE = 3, /* measurements only: the machine drifted more than the margin */
	CLI_BAD_MODEL = 4     /* the model file is missing, unreadable, damaged or of another kind */
};

#define CLI_EXIT_HELP                                                                                                  \
	"Exit status\n"                                                                                                \
	"  0  done\n"                                                                                                  \
	"  1  something failed at run time, or a rank died\n"                                                          \
	"  2  wrong command, option or environment\n"
#define CLI_EXIT_HELP_INCONCLUSIVE "  3  inconclusive measurement\n"
#define CLI_EXIT_HELP_BAD_MODEL    "  4  the model file is missing, unreadable, damaged or not supported\n"

/* ---- Programs (cli_main.c, cli_commands.c) ----------------------------------------------------------------------- */

/** Its name, as messages begin and help is asked for: each program defines it. */
extern const char cli_program[];

/** Run @p run, which returns a cli_exit, with standard descriptors that are open. Returns what main should. */
int cli_main(int argc, char **argv, int (*run)(int argc, char **argv));
/** "PROGRAM VERSION" on stdout. Returns a cli_exit. */
int cli_print_version(void);

struct cli_command {
	const char *name;
	int (*run)(int argc, char **argv); /* argv[0] is the command's name; returns a cli_exit */
	const char *summary;
};

struct cli_commands {
	const char *about; /* lines */
	const struct cli_command *commands;
	size_t count;
	const char *exit_help;
};

/** The command that argv[1] names; also help, --help and --version. Returns a cli_exit. */
int cli_run_command(const struct cli_commands *program, int argc, char **argv);

/* ---- Messages (cli_messages.c): all on stderr -------------------------------------------------------------------- */

/** "PROGRAM: TEXT" on a line of its own; an unfinished progress line is erased first. */
void cli_message(const char *format, ...) __attribute__((format(printf, 1, 2)));
/**
 * The message, then where help is found: of @p command, or of the program (""). Returns CLI_USAGE, so that a command
 * can `return cli_usage(...)`.
 */
int cli_usage(const char *command, const char *format, ...) __attribute__((format(printf, 2, 3)));
/** Replaces the progress line; nothing unless stderr is a terminal. */
void cli_progress(const char *format, ...) __attribute__((format(printf, 1, 2)));
void cli_progress_erase(void);
/** True where colours and progress are welcome: a terminal, and TERM is not "dumb". */
bool cli_is_terminal(FILE *stream);
/** True when stdout took everything that was printed; else says so in a message. Call it last. */
bool cli_flush_output(void);

/* LAYERSHARD_LOG=error|warn|info|debug sends the library's log lines to stderr. */
struct cli_log {
	bool wanted;
	lshard_log_level level;
	bool warnings_alone;
	int32_t rank;
};
/** Reads the variable. False, after a message, when its value is none of the four. */
bool cli_log_open(struct cli_log *log, int32_t rank);
/** Where the variable is not set: warnings alone; errors are returned as well, and told by whom they fail. */
void cli_log_default_to_warnings(struct cli_log *log);
/** Sets log, log_user and log_level of @p options; @p log outlives the group. */
void cli_log_attach(struct cli_log *log, lshard_group_options *options);

/* ---- Groups (cli_group.c) --------------------------------------------------------------------------------------- */

/**
 * Flush, then destroy @p group (NULL is allowed), whose series are destroyed. A status below 0, with its text in
 * @p error: what this rank writes to files, a trace, is not whole. That is a failure also where all else is done.
 */
lshard_status cli_group_leave(lshard_group *group, char *error, size_t bytes);

/* ---- Arguments (cli_arguments.c): the whole text must be used; *value is written on success only ----------------- */

/**
 * What getopt_long could not take: @p option is what it returned, ':' or '?'. The option string is CLI_OPTSTRING, and
 * long options have values above UCHAR_MAX, but --help 'h'.
 * Returns CLI_USAGE after a message that names it.
 */
int cli_bad_option(const char *command, int option, char **argv);
#define CLI_OPTSTRING "+:h" /* one short option, no message of getopt's own, a missing value is ':' */

bool cli_parse_count(const char *text, uint64_t least, uint64_t most, uint64_t *value);
/** The same for the option --NAME of a command: CLI_DONE, or CLI_USAGE after a message. */
int cli_take_number(const char *command, const char *name, const char *text, uint64_t least, uint64_t most,
		    uint32_t *value);
/** A finite number above 0. */
bool cli_parse_positive(const char *text, double *value);
/** "1500", "12K", "1.5M", "2G", "2GiB": powers of 1024. */
bool cli_parse_bytes(const char *text, uint64_t *bytes);
/** "33%", "12.5%": 0 to 100. */
bool cli_parse_percent(const char *text, double *percent);
bool cli_parse_placement(const char *text, lshard_placement *placement);
const char *cli_placement_name(lshard_placement placement);
/**
 * True when the transport at the end of @p spec ("trace=run.json,shm:copy": shm) is "auto" or one of this build for
 * host memory, where all commands compute. Else false, and @p why says what is wrong with it.
 */
bool cli_transport_is_usable(const char *spec, char *why, size_t why_bytes);
/** True when @p spec names the transport @p name, whatever wrappers and modes surround it. */
bool cli_transport_is(const char *spec, const char *name);
/** True when all ranks must step together on the transport of @p spec. */
bool cli_transport_is_collective(const char *spec);

/* ---- Prose (cli_paragraph.c) ------------------------------------------------------------------------------------- */

#define CLI_COLUMNS 80 /* wide; what is printed fits, or is broken by design */

/** One paragraph and the end of its line; the lines after its first begin with @p indent blanks. */
void cli_paragraph(FILE *stream, unsigned indent, const char *format, ...) __attribute__((format(printf, 3, 4)));
/** Columns that @p bytes bytes of @p text take. */
size_t cli_width(const char *text, size_t bytes);

/* ---- Tables (cli_table.c) ---------------------------------------------------------------------------------------- */

struct cli_table;
/** @p headings separated by '|'; a heading that begins with '<' is of a left-aligned column. NULL: no memory. */
struct cli_table *cli_table_create(const char *headings);
/**
 * A table wider than CLI_COLUMNS is printed in parts, one below the other; each begins with the first @p columns
 * columns, which tell its rows apart. 1 unless called.
 */
void cli_table_keys(struct cli_table *table, size_t columns);
/** Appends the next cell, row by row; a failed allocation is remembered and reported by cli_table_print. */
void cli_table_cell(struct cli_table *table, const char *format, ...) __attribute__((format(printf, 2, 3)));
/** Fills the present row with "-" up to its end. */
void cli_table_end_row(struct cli_table *table);
/** @return false when memory ran out on the way. */
bool cli_table_print(const struct cli_table *table, FILE *stream);
void cli_table_destroy(struct cli_table *table);

/* ---- JSON (cli_json.c) ------------------------------------------------------------------------------------------- */

/*
 * What is printed or saved is one object, and its first key is "schema": "PROGRAM[-KIND]/NUMBER". New keys may come
 * under the same number; a key that goes or changes its meaning makes the next one.
 */

/** Prints @p root on stdout, indented, keys in the order they were set, and drops the reference. NULL: no memory. */
int cli_json_print(json_t *root);
/** Any bytes as a JSON string; what is not UTF-8 becomes U+FFFD. */
json_t *cli_json_text(const char *text, size_t bytes);

#endif
