/* SPDX-License-Identifier: Apache-2.0
 *
 * status.c - names and texts of statuses, and how an error's text is written. Knows nothing else.
 */
#include <layershard/transport.h>

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define STRING_OF(x)                      #x
#define VERSION_TEXT(major, minor, patch) STRING_OF(major) "." STRING_OF(minor) "." STRING_OF(patch)

const char *lshard_version(void)
{
	return VERSION_TEXT(LSHARD_VERSION_MAJOR, LSHARD_VERSION_MINOR, LSHARD_VERSION_PATCH);
}

const char *lshard_status_name(lshard_status status)
{
	switch (status) {
#define NAME(name, value, text, remedy)                                                                                \
	case LSHARD_##name:                                                                                            \
		return "LSHARD_" #name;
		LSHARD_STATUS_MAP(NAME)
	}
	return "LSHARD_UNKNOWN";
}

const char *lshard_status_text(lshard_status status)
{
	switch (status) {
#define TEXT(name, value, text, remedy)                                                                                \
	case LSHARD_##name:                                                                                            \
		return text;
		LSHARD_STATUS_MAP(TEXT)
	}
	return "unknown status";
}

const char *lshard_status_remedy(lshard_status status)
{
	switch (status) {
#define REMEDY(name, value, text, remedy)                                                                              \
	case LSHARD_##name:                                                                                            \
		return remedy;
		LSHARD_STATUS_MAP(REMEDY)
	}
	return "the library is newer than the program, or the number is no status";
}

/* The new text may be made of the old one. */
lshard_status lshard_fail(lshard_error *error, lshard_status status, const char *format, ...)
{
	lshard_error written = {""};
	va_list arguments;

	if (!error)
		return status;
	va_start(arguments, format);
	vsnprintf(written.text, sizeof written.text, format, arguments);
	va_end(arguments);
	memcpy(error->text, written.text, strlen(written.text) + 1);
	return status;
}
