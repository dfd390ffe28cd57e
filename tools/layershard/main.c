/* SPDX-License-Identifier: Apache-2.0
 *
 * main.c - the layershard program: its commands.
 */
#include "cli.h"
#include "commands.h"

#include <string.h>

const char cli_program[] = "layershard";

/* What was a command once, and is a program of its own. */
static const char *moved_to(const char *name)
{
	static const char *const moved[][2] = {
		{"run", "layershard-llama"}, {"verify", "layershard-llama --verify"}, {"bench", "layershard-bench"}};

	for (size_t i = 0; i < sizeof moved / sizeof *moved; i++) {
		if (strcmp(name, moved[i][0]) == 0)
			return moved[i][1];
	}
	return NULL;
}

static int run(int argc, char **argv)
{
	static const struct cli_command commands[] = {
		{"info", command_info, "version, build, transports and environment variables"},
	};
	static const struct cli_commands program = {
		"n ranks run the same model on different data and store its layers once between\nthem.\n", commands,
		sizeof commands / sizeof *commands, CLI_EXIT_HELP};
	const char *name = argc > 2 && strcmp(argv[1], "help") == 0 ? argv[2] : argc > 1 ? argv[1] : "";
	const char *moved = moved_to(name);

	if (!moved)
		return cli_run_command(&program, argc, argv);
	cli_message("'%s' is no command any more: it is '%s', built beside layershard in its source tree", name, moved);
	return CLI_USAGE;
}

int main(int argc, char **argv)
{
	return cli_main(argc, argv, run);
}
