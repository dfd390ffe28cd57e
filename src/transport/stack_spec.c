/* SPDX-License-Identifier: Apache-2.0
 *
 * stack_spec.c - see stack_spec.h. Knows the grammar; the names are its caller's.
 */
#include "stack_spec.h"

#include <stdio.h>
#include <string.h>

/* Cut "name:options" or "name=options" in two at the first of either. */
static const char *cut_options(char *part)
{
	char *mark = part + strcspn(part, ":=");

	if (!*mark)
		return mark;
	*mark = 0;
	return mark + 1;
}

static lshard_status take_transport(struct stack_spec *spec, const char *name, const char *options, int custom,
				    int last, lshard_error *error)
{
	if (custom)
		return lshard_fail(error, LSHARD_ERR_INVALID,
				   "transport '%s': only wrappers go in front of a transport of the caller's own",
				   name);
	if (!last)
		return lshard_fail(error, LSHARD_ERR_INVALID, "'%s' is no wrapper: it can only be the last name", name);
	spec->name = name;
	spec->options = options;
	return LSHARD_OK;
}

static lshard_status take_part(struct stack_spec *spec, char *part, int custom, int last,
			       int (*is_wrapper)(const char *name), lshard_error *error)
{
	const char *options = cut_options(part);

	if (!part[0])
		return lshard_fail(error, LSHARD_ERR_INVALID, "a transport's name is empty");
	if (!is_wrapper(part))
		return take_transport(spec, part, options, custom, last, error);
	if (spec->n_wrappers == SPEC_WRAPPERS)
		return lshard_fail(error, LSHARD_ERR_INVALID, "more than %d wrappers", SPEC_WRAPPERS);
	spec->wrappers[spec->n_wrappers].name = part;
	spec->wrappers[spec->n_wrappers].options = options;
	spec->n_wrappers++;
	return LSHARD_OK;
}

lshard_status lshard__stack_spec_parse(struct stack_spec *spec, const char *text, int custom,
				       int (*is_wrapper)(const char *name), lshard_error *error)
{
	char *part = spec->text;

	memset(spec, 0, sizeof *spec);
	spec->options = "";
	spec->name = custom ? NULL : "auto"; /* also where only wrappers are given */
	if (!text || !text[0])
		return LSHARD_OK;
	if (snprintf(spec->text, sizeof spec->text, "%s", text) >= (int)sizeof spec->text)
		return lshard_fail(error, LSHARD_ERR_INVALID,
				   "the transport's specification is longer than %zu characters",
				   sizeof spec->text - 1);
	while (part) {
		char *comma = strchr(part, ',');
		lshard_status status;

		if (comma)
			*comma = 0;
		status = take_part(spec, part, custom, !comma, is_wrapper, error);
		if (status != LSHARD_OK)
			return status;
		part = comma ? comma + 1 : NULL;
	}
	return LSHARD_OK;
}
