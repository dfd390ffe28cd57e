/* SPDX-License-Identifier: Apache-2.0
 *
 * local_options.c - what may stand after `local:`. Knows the words; knows no group.
 */
#include "local.h"

#include <stdlib.h>
#include <string.h>

static bool is_word(const char *text, size_t length, const char *word)
{
	return strlen(word) == length && memcmp(text, word, length) == 0;
}

static bool read_seed(const char *text, size_t length, uint64_t *seed)
{
	char digits[24];
	char *end;

	if (length <= 5 || length - 5 >= sizeof digits || memcmp(text, "seed=", 5) != 0)
		return false;
	memcpy(digits, text + 5, length - 5);
	digits[length - 5] = '\0';
	if (strspn(digits, "0123456789") != length - 5)
		return false;
	*seed = strtoull(digits, &end, 10);
	return true;
}

static bool read_moment(struct local *local, const char *word, size_t length)
{
	if (is_word(word, length, "at=reach"))
		local->moment = AT_REACH;
	else if (is_word(word, length, "at=wait"))
		local->moment = AT_WAIT;
	else if (is_word(word, length, "lockstep"))
		local->moment = IN_LOCKSTEP;
	else if (read_seed(word, length, &local->seed))
		local->moment = AT_DRAWN;
	else
		return false;
	return true;
}

lshard_status local_read_options(struct local *local, const char *options, lshard_error *error)
{
	if (options[0] == '\0')
		return LSHARD_OK;
	if (strlen(options) >= LSHARD__PROCESS_GROUP_TAG_BYTES)
		return lshard_fail(error, LSHARD_ERR_INVALID, "local: options of more than %u characters",
				   LSHARD__PROCESS_GROUP_TAG_BYTES - 1);
	for (const char *word = options; word;) {
		size_t length = strcspn(word, "+");

		if (!read_moment(local, word, length))
			return lshard_fail(error, LSHARD_ERR_INVALID,
					   "local: unknown option '%.*s'; known are at=reach, "
					   "at=wait, seed=NUMBER, lockstep",
					   (int)length, word);
		if (word != options)
			return lshard_fail(
				error, LSHARD_ERR_INVALID,
				"local: '%s' says twice when transfers copy; give one of at=, seed=, lockstep",
				options);
		word = word[length] == '+' ? word + length + 1 : NULL;
	}
	return LSHARD_OK;
}
