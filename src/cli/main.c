/* SPDX-License-Identifier: Apache-2.0
 *
 * main.c - the layershard program: finds the command and hands over.
 */
#include "cli.h"
#include "commands.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

static const struct command {
	const char *name;
	int (*run)(int argc, char **argv);
	const char *summary;
} commands[] = {
	{"run", command_run, "a language model on several ranks that hold its layers once"},
	{"info", command_info, "version, build, transports and environment variables"},
	{"bench", command_bench, "what calls and steps cost on this machine"},
	{"verify", command_verify, "hash every layer as every rank sees it"},
};

#define COMMAND_COUNT (sizeof commands / sizeof *commands)

static int print_help(void)
{
	printf("Usage: layershard COMMAND [OPTION]...\n"
	       "       layershard help [COMMAND]\n"
	       "       layershard --version\n\n"
	       "n ranks run the same model on different data and store its layers once between\n"
	       "them.\n\n"
	       "Commands ('layershard help COMMAND' tells more)\n");
	for (size_t i = 0; i < COMMAND_COUNT; i++)
		printf("  %-8s %s\n", commands[i].name, commands[i].summary);
	printf("\n" CLI_EXIT_HELP);
	return cli_flush_output() ? CLI_DONE : CLI_FAILED;
}

static int unknown_command(const char *name)
{
	char known[128] = "";

	for (size_t i = 0; i < COMMAND_COUNT; i++) {
		strncat(known, i ? ", " : "", sizeof known - strlen(known) - 1);
		strncat(known, commands[i].name, sizeof known - strlen(known) - 1);
	}
	if (!name)
		return cli_usage("", "no command given; there are: %s, help", known);
	return cli_usage("", "no command '%s'; there are: %s, help", name, known);
}

/*
 * A closed descriptor is what the next socket or file gets, and messages would be written into that. True when standard
 * output was open.
 */
static bool open_standard_descriptors(void)
{
	bool has_output = true;

	for (int descriptor = STDIN_FILENO; descriptor <= STDERR_FILENO; descriptor++) {
		if (fcntl(descriptor, F_GETFD) >= 0)
			continue;
		has_output = has_output && descriptor != STDOUT_FILENO;
		if (open("/dev/null", descriptor == STDIN_FILENO ? O_RDONLY : O_WRONLY) != descriptor)
			_exit(CLI_FAILED); /* without a word: there may be nowhere to write it */
	}
	return has_output;
}

/* "help bench step" is "bench step --help", "help" alone "--help". */
static void turn_help_into_option(int argc, char **argv)
{
	static char option[] = "--help";

	memmove(&argv[1], &argv[2], (size_t)(argc - 2) * sizeof *argv);
	argv[argc - 1] = option;
}

static int run_command(int argc, char **argv)
{
	if (argc < 2)
		return unknown_command(NULL);
	if (strcmp(argv[1], "help") == 0)
		turn_help_into_option(argc, argv);
	if (strcmp(argv[1], "help") == 0)
		return print_help(); /* "help help" */
	if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)
		return print_help();
	if (strcmp(argv[1], "--version") == 0) {
		printf("layershard %s\n", lshard_version());
		return cli_flush_output() ? CLI_DONE : CLI_FAILED;
	}
	for (size_t i = 0; i < COMMAND_COUNT; i++) {
		if (strcmp(argv[1], commands[i].name) == 0)
			return commands[i].run(argc - 1, argv + 1);
	}
	return unknown_command(argv[1]);
}

int main(int argc, char **argv)
{
	const bool has_output = open_standard_descriptors();
	const int code = run_command(argc, argv);

	if (has_output || code != CLI_DONE)
		return code;
	cli_message("the output could not be written: standard output is closed");
	return CLI_FAILED;
}
