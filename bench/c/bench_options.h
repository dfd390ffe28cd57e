/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_options.h - how the benches read their options. Each function returns CLI_DONE, or another cli_exit after a
 * message that names the command and the option. Knows: the command line. Does not know: what any option means.
 */
#ifndef BENCH_OPTIONS_H
#define BENCH_OPTIONS_H

#include <getopt.h>
#include <stdbool.h>
#include <stdint.h>

#include "layershard/layershard.h"

/** A number above 0 and at most @p most. */
int bench_take_positive(const char *command, const char *name, const char *text, double most, double *value);
int bench_take_placement(const char *command, const char *text, lshard_placement *placement);

/* Memory for further layers. */
struct bench_resident {
	bool is_percent; /* of the layers a rank does not store */
	double percent;
	uint64_t bytes;
	char text[24]; /* as it was given */
};
int bench_take_resident(const char *command, const char *text, struct bench_resident *resident);

/** Each of the at most @p most items between the commas of @p text, with its number; @p take keeps it. */
int bench_take_list(const char *command, const char *name, const char *text, uint32_t most,
		    int (*take)(void *options, uint32_t index, const char *item), void *options);

struct bench_syntax {
	const char *command;
	const struct option *options; /* as cli_bad_option wants them */
	const char *help;
	int (*take)(void *options, int option, const char *text);
};
/** Hand every option to @p syntax->take; nothing else may be given. *help: the help was asked for, and printed. */
int bench_options_read(const struct bench_syntax *syntax, int argc, char **argv, void *options, bool *help);

#endif
