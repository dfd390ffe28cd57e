/* SPDX-License-Identifier: Apache-2.0
 *
 * cli_json.c - results as one JSON object on stdout.
 */
#include "cli.h"

#include <stdlib.h>
#include <string.h>

int cli_json_print(json_t *root)
{
	int failed;

	if (!root) {
		cli_message("out of memory while making the JSON output");
		return CLI_FAILED;
	}
	failed = json_dumpf(root, stdout, JSON_INDENT(1));
	json_decref(root);
	putchar('\n');
	if (!cli_flush_output())
		return CLI_FAILED;
	if (failed)
		cli_message("no memory to print the result");
	return failed ? CLI_FAILED : CLI_DONE;
}

/* Bytes of a character that begins so; 0: none does. */
static size_t announced_bytes(unsigned char first)
{
	if (first < 0x80)
		return 1;
	if (first < 0xC2 || first > 0xF4)
		return 0;
	return first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
}

/* Bytes of the well-formed UTF-8 character at @p text, by the table of the Unicode standard; 0 if there is none. */
static size_t character_bytes(const unsigned char *text, size_t bytes)
{
	const unsigned char first = text[0];
	const size_t length = announced_bytes(first);
	unsigned char least = 0x80;
	unsigned char most = 0xBF;

	if (length < 2 || length > bytes)
		return length > bytes ? 0 : length;
	if (first == 0xE0 || first == 0xF0)
		least = first == 0xE0 ? 0xA0 : 0x90; /* no longer form than needed */
	if (first == 0xED || first == 0xF4)
		most = first == 0xED ? 0x9F : 0x8F; /* no surrogates, nothing above U+10FFFF */
	if (text[1] < least || text[1] > most)
		return 0;
	for (size_t i = 2; i < length; i++) {
		if ((text[i] & 0xC0) != 0x80)
			return 0;
	}
	return length;
}

json_t *cli_json_text(const char *text, size_t bytes)
{
	static const char replacement[] = "\xEF\xBF\xBD";
	char *clean = malloc(3 * bytes + 1);
	size_t used = 0;
	json_t *string;

	if (!clean)
		return NULL;
	for (size_t i = 0; i < bytes;) {
		const size_t length = character_bytes((const unsigned char *)text + i, bytes - i);

		memcpy(clean + used, length ? text + i : replacement, length ? length : 3);
		used += length ? length : 3;
		i += length ? length : 1;
	}
	string = json_stringn(clean, used);
	free(clean);
	return string;
}
