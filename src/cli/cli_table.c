/* SPDX-License-Identifier: Apache-2.0
 *
 * cli_table.c - a table of aligned columns: two blanks between them, numbers to the right, a '<' column to the left.
 */
#include "cli.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#define COLUMNS_MOST 24

struct cli_table {
	char *headings; /* cut at the bars */
	const char *heading[COLUMNS_MOST];
	bool left[COLUMNS_MOST];
	size_t columns;
	char **cells; /* row by row */
	size_t count;
	size_t room;
	bool out_of_memory;
};

struct cli_table *cli_table_create(const char *headings)
{
	struct cli_table *table = calloc(1, sizeof *table);
	char *rest;
	char *heading;

	if (!table)
		return NULL;
	table->headings = strdup(headings);
	if (!table->headings) {
		free(table);
		return NULL;
	}
	rest = table->headings;
	while (table->columns < COLUMNS_MOST && (heading = strsep(&rest, "|")) != NULL) {
		table->left[table->columns] = *heading == '<';
		table->heading[table->columns++] = *heading == '<' ? heading + 1 : heading;
	}
	return table;
}

static bool make_room(struct cli_table *table)
{
	size_t room = table->room ? 2 * table->room : 64;
	char **cells;

	if (table->count < table->room)
		return true;
	cells = realloc(table->cells, room * sizeof *cells);
	if (!cells)
		return false;
	table->cells = cells;
	table->room = room;
	return true;
}

void cli_table_cell(struct cli_table *table, const char *format, ...)
{
	va_list arguments;
	char *text;
	int length;

	if (table->out_of_memory || !make_room(table)) {
		table->out_of_memory = true;
		return;
	}
	va_start(arguments, format);
	length = vasprintf(&text, format, arguments);
	va_end(arguments);
	if (length < 0) {
		table->out_of_memory = true;
		return;
	}
	table->cells[table->count++] = text;
}

void cli_table_end_row(struct cli_table *table)
{
	while (!table->out_of_memory && table->count % table->columns != 0)
		cli_table_cell(table, "-");
}

/* Characters, not bytes: what continues a UTF-8 character takes no column. */
static size_t width_of(const char *text)
{
	size_t width = 0;

	for (; *text; text++)
		width += ((unsigned char)*text & 0xC0) != 0x80;
	return width;
}

static void print_row(const struct cli_table *table, const char *const *cells, const size_t *widths, FILE *stream)
{
	for (size_t i = 0; i < table->columns; i++) {
		const int blanks = (int)(widths[i] - width_of(cells[i]));
		const bool last = i + 1 == table->columns;

		if (!table->left[i])
			fprintf(stream, "%*s%s", blanks, "", cells[i]);
		else
			fprintf(stream, "%s%*s", cells[i], last ? 0 : blanks, "");
		fputs(last ? "\n" : "  ", stream);
	}
}

bool cli_table_print(const struct cli_table *table, FILE *stream)
{
	size_t widths[COLUMNS_MOST];

	if (table->out_of_memory)
		return false;
	for (size_t i = 0; i < table->columns; i++)
		widths[i] = width_of(table->heading[i]);
	for (size_t i = 0; i < table->count; i++) {
		const size_t width = width_of(table->cells[i]);

		if (width > widths[i % table->columns])
			widths[i % table->columns] = width;
	}
	print_row(table, table->heading, widths, stream);
	for (size_t i = 0; i + table->columns <= table->count; i += table->columns)
		print_row(table, (const char *const *)&table->cells[i], widths, stream);
	return true;
}

void cli_table_destroy(struct cli_table *table)
{
	if (!table)
		return;
	for (size_t i = 0; i < table->count; i++)
		free(table->cells[i]);
	free(table->cells);
	free(table->headings);
	free(table);
}
