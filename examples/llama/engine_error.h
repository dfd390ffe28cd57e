/* SPDX-License-Identifier: Apache-2.0
 *
 * engine_error.h - how the engine says what went wrong: an lshard_status and a sentence in the caller's buffer.
 */
#ifndef ENGINE_ERROR_H
#define ENGINE_ERROR_H

#include "layershard/layershard.h"

typedef struct engine_error {
	char text[512];
} engine_error;

/** Write the sentence into @p error (NULL: nowhere); gives @p status back, so that a failing function can return it. */
lshard_status engine_fail(engine_error *error, lshard_status status, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

#endif
