/* SPDX-License-Identifier: Apache-2.0
 *
 * cli_paragraph.c - prose within CLI_COLUMNS columns, broken between words.
 */
#include "cli.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* Characters, not bytes: what continues a UTF-8 character takes no column. */
size_t cli_width(const char *text, size_t bytes)
{
	size_t width = 0;

	for (size_t i = 0; i < bytes; i++)
		width += ((unsigned char)text[i] & 0xC0) != 0x80;
	return width;
}

/* A word longer than a line stands on one of its own, whole: a path that is cut cannot be copied. */
static void print_words(FILE *stream, unsigned indent, const char *text)
{
	size_t column = 0;
	bool begun = false; /* a word stands on this line */

	while (*text) {
		const size_t blanks = strspn(text, " ");
		const size_t bytes = strcspn(text + blanks, " ");
		const size_t width = cli_width(text + blanks, bytes);

		if (begun && column + blanks + width > CLI_COLUMNS) {
			fprintf(stream, "\n%*s", (int)indent, "");
			column = indent;
		} else {
			fprintf(stream, "%*s", (int)blanks, "");
			column += blanks;
		}
		(void)fwrite(text + blanks, 1, bytes, stream);
		column += width;
		begun = true;
		text += blanks + bytes;
	}
	fputc('\n', stream);
}

void cli_paragraph(FILE *stream, unsigned indent, const char *format, ...)
{
	va_list arguments;
	char *text;
	int length;

	va_start(arguments, format);
	length = vasprintf(&text, format, arguments);
	va_end(arguments);
	if (length < 0) { /* in one line, then: nothing is lost for want of memory */
		va_start(arguments, format);
		(void)vfprintf(stream, format, arguments);
		va_end(arguments);
		fputc('\n', stream);
		return;
	}
	print_words(stream, indent, text);
	free(text);
}
