/* SPDX-License-Identifier: Apache-2.0
 *
 * cli_commands.c - programs that have commands: finds the one that is meant and hands over.
 */
#include "cli.h"

#include <string.h>

static int print_help(const struct cli_commands *program)
{
	printf("Usage: %s COMMAND [OPTION]...\n"
	       "       %s help [COMMAND]\n"
	       "       %s --version\n\n"
	       "%s\n"
	       "Commands ('%s help COMMAND' tells more)\n",
	       cli_program, cli_program, cli_program, program->about, cli_program);
	for (size_t i = 0; i < program->count; i++)
		printf("  %-8s %s\n", program->commands[i].name, program->commands[i].summary);
	printf("\n%s", program->exit_help);
	return cli_flush_output() ? CLI_DONE : CLI_FAILED;
}

static int unknown_command(const struct cli_commands *program, const char *name)
{
	char known[128] = "";

	for (size_t i = 0; i < program->count; i++) {
		strncat(known, i ? ", " : "", sizeof known - strlen(known) - 1);
		strncat(known, program->commands[i].name, sizeof known - strlen(known) - 1);
	}
	if (!name)
		return cli_usage("", "no command given; there are: %s, help", known);
	return cli_usage("", "no command '%s'; there are: %s, help", name, known);
}

/* "help info" is "info --help", "help" alone "--help". */
static void turn_help_into_option(int argc, char **argv)
{
	static char option[] = "--help";

	memmove(&argv[1], &argv[2], (size_t)(argc - 2) * sizeof *argv);
	argv[argc - 1] = option;
}

int cli_run_command(const struct cli_commands *program, int argc, char **argv)
{
	if (argc < 2)
		return unknown_command(program, NULL);
	if (strcmp(argv[1], "help") == 0)
		turn_help_into_option(argc, argv);
	if (strcmp(argv[1], "help") == 0)
		return print_help(program); /* "help help" */
	if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)
		return print_help(program);
	if (strcmp(argv[1], "--version") == 0)
		return cli_print_version();
	for (size_t i = 0; i < program->count; i++) {
		if (strcmp(argv[1], program->commands[i].name) == 0)
			return program->commands[i].run(argc - 1, argv + 1);
	}
	return unknown_command(program, argv[1]);
}
