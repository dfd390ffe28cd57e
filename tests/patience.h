/* SPDX-License-Identifier: Apache-2.0
 *
 * patience.h - how long tests wait for what comes at once unless something hangs. Nobody's verdict: on a machine that
 * is busy enough even these are too short, and LAYERSHARD_TEST_PATIENCE, a whole number from 1 to 99, multiplies them.
 * A deadline that a test waits for to pass is none of these: it is short, and on no machine different.
 */
#ifndef TESTS_PATIENCE_H
#define TESTS_PATIENCE_H

#include <stdint.h>
#include <stdlib.h>

/* @p amount of any unit, more where the environment says so. */
static inline uint32_t patience(uint32_t amount)
{
	const char *text = getenv("LAYERSHARD_TEST_PATIENCE");
	const unsigned long factor = text ? strtoul(text, NULL, 10) : 1;

	return amount * (factor >= 1 && factor <= 99 ? (uint32_t)factor : 1);
}

/* The deadline of a group whose ranks all come, and of whatever else is due at once. */
#define LONG_MS patience(60000)

#endif
