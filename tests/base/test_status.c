/* SPDX-License-Identifier: Apache-2.0
 *
 * Status codes have names, texts and remedies of their own; any other number gets a text too. Compiled as C99, which is
 * all that the public header asks for.
 */
#include <layershard/transport.h>

#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

struct row {
	const char *name;
	lshard_status status;
	int value;
};

#define ROW(name, value, text, remedy) {"LSHARD_" #name, LSHARD_##name, value},
static const struct row rows[] = {LSHARD_STATUS_MAP(ROW)};
#define N_ROWS (sizeof rows / sizeof *rows)

static void names_are_those_of_the_header(void **state)
{
	(void)state;
	for (size_t i = 0; i < N_ROWS; i++) {
		assert_string_equal(lshard_status_name(rows[i].status), rows[i].name);
		assert_int_equal((int)rows[i].status, rows[i].value);
	}
}

static void errors_are_negative_and_the_rest_is_not(void **state)
{
	(void)state;
	for (size_t i = 0; i < N_ROWS; i++)
		assert_int_equal(strncmp(rows[i].name, "LSHARD_ERR_", 11) == 0, rows[i].value < 0);
	assert_int_equal(LSHARD_OK, 0);
}

static void no_two_are_alike(void **state)
{
	(void)state;
	for (size_t i = 0; i < N_ROWS; i++) {
		for (size_t j = 0; j < i; j++) {
			assert_int_not_equal(rows[i].value, rows[j].value);
			assert_string_not_equal(lshard_status_text(rows[i].status), lshard_status_text(rows[j].status));
		}
		assert_true(strlen(lshard_status_text(rows[i].status)) > 3);
		assert_true(strlen(lshard_status_remedy(rows[i].status)) > 3);
	}
}

static void unknown_numbers_have_a_text(void **state)
{
	static const int unknown[] = {1000, -1000, 4711, INT_MIN, INT_MAX}; /* no neighbours of those there are */

	(void)state;
	for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
		assert_string_equal(lshard_status_name((lshard_status)unknown[i]), "LSHARD_UNKNOWN");
		assert_true(strlen(lshard_status_text((lshard_status)unknown[i])) > 0);
		assert_true(strlen(lshard_status_remedy((lshard_status)unknown[i])) > 0);
	}
}

static void version_is_the_headers(void **state)
{
	char version[32];

	(void)state;
	snprintf(version, sizeof version, "%d.%d.%d", LSHARD_VERSION_MAJOR, LSHARD_VERSION_MINOR, LSHARD_VERSION_PATCH);
	assert_string_equal(lshard_version(), version);
}

static void a_text_may_hold_the_one_before(void **state)
{
	lshard_error error = {""};

	(void)state;
	assert_int_equal(lshard_fail(&error, LSHARD_ERR_TIMEOUT, "rank %d is late", 1), LSHARD_ERR_TIMEOUT);
	lshard_fail(&error, LSHARD_ERR_TIMEOUT, "%s", error.text);
	assert_string_equal(error.text, "rank 1 is late");
	lshard_fail(&error, LSHARD_ERR_TIMEOUT, "series 's': %s", error.text);
	assert_string_equal(error.text, "series 's': rank 1 is late");
	for (size_t i = 0; i < sizeof error.text; i++)
		lshard_fail(&error, LSHARD_ERR_TIMEOUT, "again: %s", error.text);
	assert_int_equal(strlen(error.text), sizeof error.text - 1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(names_are_those_of_the_header),
		cmocka_unit_test(errors_are_negative_and_the_rest_is_not),
		cmocka_unit_test(no_two_are_alike),
		cmocka_unit_test(unknown_numbers_have_a_text),
		cmocka_unit_test(version_is_the_headers),
		cmocka_unit_test(a_text_may_hold_the_one_before),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
