/* SPDX-License-Identifier: Apache-2.0
 *
 * main.c - the layershard program: its commands.
 */
#include "cli.h"
#include "commands.h"

const char cli_program[] = "layershard";

static int run(int argc, char **argv)
{
	static const struct cli_command commands[] = {
		{"run", command_run, "a language model on several ranks that hold its layers once"},
		{"info", command_info, "version, build, transports and environment variables"},
		{"bench", command_bench, "what calls and steps cost on this machine"},
		{"verify", command_verify, "hash every layer as every rank sees it"},
	};
	static const struct cli_commands program = {
		"n ranks run the same model on different data and store its layers once between\nthem.\n", commands,
		sizeof commands / sizeof *commands, CLI_EXIT_HELP};

	return cli_run_command(&program, argc, argv);
}

int main(int argc, char **argv)
{
	return cli_main(argc, argv, run);
}
