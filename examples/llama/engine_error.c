/* SPDX-License-Identifier: Apache-2.0
 *
 * engine_error.c - see engine_error.h.
 */
#include "engine_error.h"

#include <stdarg.h>
#include <stdio.h>

lshard_status engine_fail(engine_error *error, lshard_status status, const char *format, ...)
{
	va_list arguments;
	char *at;

	if (!error)
		return status;
	va_start(arguments, format);
	(void)vsnprintf(error->text, sizeof error->text, format, arguments);
	va_end(arguments);
	for (at = error->text; *at; at++) /* a message may quote a file: no escapes for the reader's terminal */
		if ((unsigned char)*at < ' ' || *at == 0x7f)
			*at = '?';
	return status;
}
