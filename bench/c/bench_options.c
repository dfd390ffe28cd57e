/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_options.c - see bench_options.h.
 */
#include "bench_options.h"
#include "cli.h"

#include <string.h>

int bench_take_positive(const char *command, const char *name, const char *text, double most, double *value)
{
	double number;

	if (!cli_parse_positive(text, &number) || number > most)
		return cli_usage(command, "--%s is '%s'; it must be a number above 0 and at most %g", name, text, most);
	*value = number;
	return CLI_DONE;
}

int bench_take_placement(const char *command, const char *text, lshard_placement *placement)
{
	if (!cli_parse_placement(text, placement))
		return cli_usage(command, "--placement is '%s'; it may be whole or striped", text);
	return CLI_DONE;
}

int bench_take_resident(const char *command, const char *text, struct bench_resident *resident)
{
	resident->is_percent = cli_parse_percent(text, &resident->percent);
	if (!resident->is_percent && !cli_parse_bytes(text, &resident->bytes))
		return cli_usage(command,
				 "--resident is '%s'; it may be bytes (500M, 2G) or a percentage (33%%, at most 100%%)",
				 text);
	snprintf(resident->text, sizeof resident->text, "%s", text);
	return CLI_DONE;
}

int bench_take_list(const char *command, const char *name, const char *text, uint32_t most,
		    int (*take)(void *options, uint32_t index, const char *item), void *options)
{
	char copy[256];
	char *rest = copy;
	char *item;
	int result = CLI_DONE;

	if (strlen(text) >= sizeof copy)
		return cli_usage(command, "--%s is too long (at most %zu characters)", name, sizeof copy - 1);
	memcpy(copy, text, strlen(text) + 1);
	for (uint32_t index = 0; result == CLI_DONE && (item = strsep(&rest, ",")) != NULL; index++) {
		if (!*item)
			return cli_usage(command, "--%s is '%s'; a value between commas is missing", name, text);
		if (index == most)
			return cli_usage(command, "--%s has more than %u values", name, most);
		result = take(options, index, item);
	}
	return result;
}

int bench_options_read(const struct bench_syntax *syntax, int argc, char **argv, void *options, bool *help)
{
	int result = CLI_DONE;
	int option;

	*help = false;
	while (result == CLI_DONE && (option = getopt_long(argc, argv, CLI_OPTSTRING, syntax->options, NULL)) != -1) {
		if (option == 'h') {
			*help = true;
			fputs(syntax->help, stdout);
			return cli_flush_output() ? CLI_DONE : CLI_FAILED;
		}
		result = option == '?' || option == ':' ? cli_bad_option(syntax->command, option, argv)
							: syntax->take(options, option, optarg);
	}
	if (result == CLI_DONE && optind < argc)
		return cli_usage(syntax->command, "'%s' is not expected here", argv[optind]);
	return result;
}
