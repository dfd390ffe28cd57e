/* SPDX-License-Identifier: Apache-2.0
 *
 * main.c - layershard-bench: what the library costs on this machine. Its commands.
 */
#include "bench_calls.h"
#include "bench_link.h"
#include "bench_read.h"
#include "bench_step.h"
#include "cli.h"

const char cli_program[] = "layershard-bench";

static int run(int argc, char **argv)
{
	static const struct cli_command commands[] = {
		{"calls", bench_calls, "reach and wait with nothing to transfer, in nanoseconds"},
		{"link", bench_link, "how fast a layer is fetched from another rank, beside bare copies"},
		{"read", bench_read, "how fast weights are read: private and shared, small pages and large"},
		{"step", bench_step,
		 "passes over a stack of layers behind a link of limited speed, beside\n"
		 "           what the planner predicts"},
	};
	static const struct cli_commands program = {"What the library costs on this machine.\n", commands,
						    sizeof commands / sizeof *commands,
						    CLI_EXIT_HELP CLI_EXIT_HELP_INCONCLUSIVE};

	return cli_run_command(&program, argc, argv);
}

int main(int argc, char **argv)
{
	return cli_main(argc, argv, run);
}
