/* SPDX-License-Identifier: Apache-2.0
 *
 * cli_arguments.c - texts of the command line to values: strict, the whole text must be used.
 */
#include "cli.h"

#include <layershard/plan.h>

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

int cli_bad_option(const char *command, int option, char **argv)
{
	const char *argument = argv[optind - 1];
	const char *whose = *command ? " of this command" : "";

	if (option == ':')
		return cli_usage(command, "'%s' needs a value", argument);
	if (optopt == 0)
		return cli_usage(command, "'%s' is no option%s", argument, whose);
	if (optopt == 'h' || optopt > UCHAR_MAX) /* long ones are known: this one came with '=' */
		return cli_usage(command, "'%s': this option takes no value", argument);
	return cli_usage(command, "'-%c' is no option%s", optopt, whose);
}

bool cli_parse_count(const char *text, uint64_t least, uint64_t most, uint64_t *value)
{
	unsigned long long number;
	char *end;

	if (!isdigit((unsigned char)*text)) /* strtoull would take blanks and a sign */
		return false;
	errno = 0;
	number = strtoull(text, &end, 10);
	if (errno != 0 || *end != '\0' || number < least || number > most)
		return false;
	*value = number;
	return true;
}

int cli_take_number(const char *command, const char *name, const char *text, uint64_t least, uint64_t most,
		    uint32_t *value)
{
	uint64_t number;

	if (!cli_parse_count(text, least, most, &number))
		return cli_usage(command, "--%s is '%s'; it must be a whole number from %llu to %llu", name, text,
				 (unsigned long long)least, (unsigned long long)most);
	*value = (uint32_t)number;
	return CLI_DONE;
}

/* A finite number at or above 0; *end is what follows it. Only digits and a point: no exponent-less "inf", no hex. */
static bool parse_decimal(const char *text, double *number, const char **end)
{
	char *stop;

	if (!isdigit((unsigned char)*text) || (text[0] == '0' && tolower((unsigned char)text[1]) == 'x'))
		return false;
	*number = strtod(text, &stop);
	*end = stop;
	return isfinite(*number);
}

bool cli_parse_positive(const char *text, double *value)
{
	const char *end;
	double number;

	if (!parse_decimal(text, &number, &end) || *end != '\0' || number <= 0)
		return false;
	*value = number;
	return true;
}

bool cli_parse_percent(const char *text, double *percent)
{
	const char *end;
	double number;

	if (!parse_decimal(text, &number, &end) || strcmp(end, "%") != 0 || number > 100)
		return false;
	*percent = number;
	return true;
}

/* "", "K", "KB", "KiB" and so on, in either case: the power of two it multiplies by; -1 for anything else. */
static int suffix_shift(const char *suffix)
{
	static const char letters[] = "KMGT";
	const char *letter;

	if (*suffix == '\0' || strcasecmp(suffix, "B") == 0)
		return 0;
	letter = strchr(letters, toupper((unsigned char)*suffix));
	if (!letter || (suffix[1] != '\0' && strcasecmp(suffix + 1, "B") != 0 && strcasecmp(suffix + 1, "iB") != 0))
		return -1;
	return 10 * (int)(letter - letters + 1);
}

bool cli_parse_bytes(const char *text, uint64_t *bytes)
{
	const char *end;
	double number;
	int shift;

	if (!parse_decimal(text, &number, &end))
		return false;
	shift = suffix_shift(end);
	if (shift < 0)
		return false;
	number = ldexp(number, shift);
	if (number >= 0x1p63)
		return false;
	*bytes = (uint64_t)number;
	return true;
}

bool cli_parse_placement(const char *text, lshard_placement *placement)
{
	if (strcmp(text, "whole") == 0)
		*placement = LSHARD_WHOLE;
	else if (strcmp(text, "striped") == 0)
		*placement = LSHARD_STRIPED;
	else
		return false;
	return true;
}

const char *cli_placement_name(lshard_placement placement)
{
	return placement == LSHARD_STRIPED ? "striped" : "whole";
}

/* The last element of a spec, without the mode after its colon. */
static const char *spec_transport(const char *spec, size_t *length)
{
	const char *comma = strrchr(spec, ',');
	const char *name = comma ? comma + 1 : spec;

	*length = strcspn(name, ":");
	return name;
}

static bool is_name(const char *text, size_t length, const char *name)
{
	return strlen(name) == length && strncmp(text, name, length) == 0;
}

bool cli_transport_is(const char *spec, const char *name)
{
	size_t length;
	const char *transport = spec_transport(spec, &length);

	return is_name(transport, length, name);
}

bool cli_transport_is_collective(const char *spec)
{
	static const char lockstep[] = "local:lockstep"; /* a mode, so lshard_transport_info does not tell of it */
	const char *comma = strrchr(spec, ',');
	lshard_transport_information information = LSHARD_TRANSPORT_INFORMATION_INIT;

	if (strcmp(comma ? comma + 1 : spec, lockstep) == 0)
		return true;
	for (uint32_t i = 0; lshard_transport_info(i, &information) == LSHARD_OK; i++) {
		if (information.collective && cli_transport_is(spec, information.name))
			return true;
	}
	return false;
}

bool cli_transport_is_usable(const char *spec, char *why, size_t why_bytes)
{
	lshard_transport_information found = LSHARD_TRANSPORT_INFORMATION_INIT;
	size_t length;
	size_t used = (size_t)snprintf(why, why_bytes, "for host memory this build has auto");
	const char *transport = spec_transport(spec, &length);

	if (is_name(transport, length, "auto"))
		return true;
	for (uint32_t i = 0; lshard_transport_info(i, &found) == LSHARD_OK; i++) {
		if (is_name(transport, length, found.name) && found.memory == LSHARD_MEMORY_HOST)
			return true;
		if (is_name(transport, length, found.name)) {
			(void)snprintf(
				why, why_bytes,
				"%s carries layers in a GPU's memory, and this command computes on the processor",
				found.name);
			return false;
		}
		if (used < why_bytes && found.memory == LSHARD_MEMORY_HOST)
			used += (size_t)snprintf(why + used, why_bytes - used, ", %s", found.name);
	}
	return false;
}
