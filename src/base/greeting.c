/* SPDX-License-Identifier: Apache-2.0
 *
 * greeting.c - see greeting.h.
 */
#include "greeting.h"

#include <stdio.h>

#define VERSION ((uint32_t)LSHARD_VERSION_MAJOR << 16 | LSHARD_VERSION_MINOR << 8 | LSHARD_VERSION_PATCH)

struct lshard__greeting lshard__greeting_make(uint32_t magic, size_t bytes, size_t other_bytes)
{
	return (struct lshard__greeting){magic, VERSION, {(uint32_t)bytes, (uint32_t)other_bytes}};
}

static void describe(const struct lshard__greeting *greeting, char *text, size_t bytes)
{
	snprintf(text, bytes, "version %u.%u.%u (messages of %u and %u bytes)", greeting->version >> 16,
		 greeting->version >> 8 & 255, greeting->version & 255, greeting->bytes[0], greeting->bytes[1]);
}

lshard_status lshard__greeting_compare(const struct lshard__greeting *of_one, const struct lshard__greeting *of_other,
				       const char *one, const char *other, lshard_error *error)
{
	char texts[2][96];

	if (of_other->magic != of_one->magic)
		return lshard_fail(error, LSHARD_ERR_MISMATCH, "%s does not speak as ranks of this library do", other);
	if (of_other->version == of_one->version && of_other->bytes[0] == of_one->bytes[0] &&
	    of_other->bytes[1] == of_one->bytes[1])
		return LSHARD_OK;
	describe(of_one, texts[0], sizeof texts[0]);
	describe(of_other, texts[1], sizeof texts[1]);
	return lshard_fail(error, LSHARD_ERR_MISMATCH, "%s runs %s, %s runs %s: give all ranks one build of layershard",
			   one, texts[0], other, texts[1]);
}
