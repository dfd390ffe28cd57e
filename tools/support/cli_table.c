/* SPDX-License-Identifier: Apache-2.0
 *
 * cli_table.c - a table of aligned columns: two blanks between them, numbers to the right, a '<' column to the left.
 * Where it is wider than CLI_COLUMNS, it is cut into parts between columns.
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
	size_t keys;  /* columns that every part begins with */
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
	table->keys = 1;
	rest = table->headings;
	while (table->columns < COLUMNS_MOST && (heading = strsep(&rest, "|")) != NULL) {
		table->left[table->columns] = *heading == '<';
		table->heading[table->columns++] = *heading == '<' ? heading + 1 : heading;
	}
	return table;
}

void cli_table_keys(struct cli_table *table, size_t columns)
{
	table->keys = columns;
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

#define GAP 2u /* blanks between columns */

static void print_cell(const struct cli_table *table, size_t column, const char *cell, size_t width, bool last,
		       FILE *stream)
{
	const int blanks = (int)(width - cli_width(cell, strlen(cell)));

	if (!table->left[column])
		fprintf(stream, "%*s%s", blanks, "", cell);
	else
		fprintf(stream, "%s%*s", cell, last ? 0 : blanks, "");
	fputs(last ? "\n" : "  ", stream);
}

/* The key columns, then those of one part: [first, end). */
static void print_row(const struct cli_table *table, const char *const *cells, const size_t *widths, size_t first,
		      size_t end, FILE *stream)
{
	for (size_t i = 0; i < table->keys; i++)
		print_cell(table, i, cells[i], widths[i], false, stream);
	for (size_t i = first; i < end; i++)
		print_cell(table, i, cells[i], widths[i], i + 1 == end, stream);
}

static void measure(const struct cli_table *table, size_t *widths)
{
	for (size_t i = 0; i < table->columns; i++)
		widths[i] = cli_width(table->heading[i], strlen(table->heading[i]));
	for (size_t i = 0; i < table->count; i++) {
		const size_t width = cli_width(table->cells[i], strlen(table->cells[i]));

		if (width > widths[i % table->columns])
			widths[i % table->columns] = width;
	}
}

/* Where the part that begins with column @p first ends: it has one column at least, however wide. */
static size_t part_end(const struct cli_table *table, const size_t *widths, size_t first)
{
	size_t width = 0;
	size_t end = first + 1;

	for (size_t i = 0; i < table->keys; i++)
		width += widths[i] + GAP;
	for (width += widths[first]; end < table->columns; end++) {
		width += GAP + widths[end];
		if (width > CLI_COLUMNS)
			break;
	}
	return end;
}

bool cli_table_print(const struct cli_table *table, FILE *stream)
{
	size_t widths[COLUMNS_MOST];
	size_t end;

	if (table->out_of_memory)
		return false;
	measure(table, widths);
	for (size_t first = table->keys; first < table->columns; first = end) {
		end = part_end(table, widths, first);
		if (first > table->keys)
			fputc('\n', stream);
		print_row(table, table->heading, widths, first, end, stream);
		for (size_t i = 0; i + table->columns <= table->count; i += table->columns)
			print_row(table, (const char *const *)&table->cells[i], widths, first, end, stream);
	}
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
