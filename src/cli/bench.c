/* SPDX-License-Identifier: Apache-2.0
 *
 * bench.c - `layershard bench`: finds which of the measurements is meant and hands over.
 */
#include "bench.h"
#include "cli.h"
#include "commands.h"

#include <string.h>

static int print_help(void)
{
	printf("Usage: layershard bench calls [OPTION]...\n"
	       "       layershard bench link [OPTION]...\n"
	       "       layershard bench step [OPTION]...\n\n"
	       "What the library costs on this machine.\n\n"
	       "  calls  reach and wait with nothing to transfer, in nanoseconds\n"
	       "  link   how fast a layer comes from another rank, by size, beside bare copies\n"
	       "  step   passes over a synthetic stack of layers behind a link of limited speed:\n"
	       "         transfers hidden behind compute, beside what the planner predicts\n\n"
	       "'layershard bench calls --help', and so on, tells more.\n\n" CLI_EXIT_HELP CLI_EXIT_HELP_INCONCLUSIVE);
	return cli_flush_output() ? CLI_DONE : CLI_FAILED;
}

int command_bench(int argc, char **argv)
{
	if (argc < 2)
		return cli_usage("bench", "bench what? There are: calls, link, step");
	if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)
		return print_help();
	if (strcmp(argv[1], "calls") == 0)
		return bench_calls(argc - 1, argv + 1);
	if (strcmp(argv[1], "link") == 0)
		return bench_link(argc - 1, argv + 1);
	if (strcmp(argv[1], "step") == 0)
		return bench_step(argc - 1, argv + 1);
	return cli_usage("bench", "there is no bench '%s'; there are: calls, link, step", argv[1]);
}
