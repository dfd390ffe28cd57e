/* SPDX-License-Identifier: Apache-2.0
 *
 * test_case.c - LAYERSHARD_TEST_CASE=PATTERN runs the cases of a test program whose names match it (* and ?), and no
 * others. Linked to every test program: cmocka itself reads no variable for it.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

__attribute__((constructor)) static void take_case(void)
{
	const char *pattern = getenv("LAYERSHARD_TEST_CASE");

	if (pattern)
		cmocka_set_test_filter(pattern);
}
