/* SPDX-License-Identifier: Apache-2.0
 *
 * sized.c - see sized.h.
 */
#include "sized.h"

#include <string.h>

/* No struct is larger: what says so was never set. */
#define MOST_BYTES 4096u

static int is_size(size_t bytes)
{
	return bytes >= sizeof(size_t) && bytes <= MOST_BYTES && bytes % sizeof(size_t) == 0;
}

static size_t size_of(const void *theirs)
{
	size_t given;

	memcpy(&given, theirs, sizeof given);
	return given;
}

lshard_status lshard__sized_check(const void *theirs, size_t given, size_t known, const char *type, lshard_error *error)
{
	const unsigned char *bytes = theirs;

	if (!is_size(given))
		return lshard_fail(error, LSHARD_ERR_INVALID,
				   "struct_size %zu is the size of no known %s: initialise it by its INIT macro", given,
				   type);
	for (size_t i = known; i < given; i++)
		if (bytes[i])
			return lshard_fail(error, LSHARD_ERR_INVALID,
					   "struct_size %zu of %s: a member is set behind the %zu bytes that this "
					   "library knows, which is older than the program's header",
					   given, type, known);
	return LSHARD_OK;
}

void lshard__sized_copy(void *ours, size_t known, const void *theirs, size_t given)
{
	memcpy(ours, theirs, given < known ? given : known);
}

lshard_status lshard__sized_take(void *ours, size_t known, const void *theirs, const char *type, lshard_error *error)
{
	const size_t given = size_of(theirs);

	if (is_size(given))
		lshard__sized_copy(ours, known, theirs, given);
	memcpy(ours, &known, sizeof known);
	return lshard__sized_check(theirs, given, known, type, error);
}

lshard_status lshard__sized_give(void *theirs, const void *ours, size_t known, const char *type, lshard_error *error)
{
	const size_t given = size_of(theirs);

	if (!is_size(given)) /* and nothing else can be wrong with what is only written */
		return lshard__sized_check(theirs, given, known, type, error);
	memset(theirs, 0, given);
	lshard__sized_copy(theirs, given, ours, known);
	memcpy(theirs, &given, sizeof given);
	return LSHARD_OK;
}
