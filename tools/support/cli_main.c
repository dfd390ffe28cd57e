/* SPDX-License-Identifier: Apache-2.0
 *
 * cli_main.c - what every program's main does round its own work.
 */
#include "cli.h"

#include <fcntl.h>
#include <unistd.h>

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

int cli_main(int argc, char **argv, int (*run)(int argc, char **argv))
{
	const bool has_output = open_standard_descriptors();
	const int code = run(argc, argv);

	if (has_output || code != CLI_DONE)
		return code;
	cli_message("the output could not be written: standard output is closed");
	return CLI_FAILED;
}

int cli_print_version(void)
{
	printf("%s %s\n", cli_program, lshard_version());
	return cli_flush_output() ? CLI_DONE : CLI_FAILED;
}
