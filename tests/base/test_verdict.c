/* SPDX-License-Identifier: Apache-2.0
 *
 * test_verdict.c - what the ranks' records say together, and how ranks are named: one rank and many, more than a
 * message has room for; and which of several findings counts.
 */
#include "verdict.h"

#include <layershard/layershard.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#define RANKS 5

struct record {
	struct lshard__outcome outcome;
	uint64_t call;
	uint64_t value;
};

static const struct record fine = {{LSHARD_OK, 0}, 7, 40};

/* All ranks fine. */
static struct lshard__record_set fill(struct record *records, uint8_t *alive, int32_t rank)
{
	for (int index = 0; index < RANKS; index++) {
		records[index] = fine;
		alive[index] = 1;
	}
	return (struct lshard__record_set){records, sizeof *records, sizeof fine.call, RANKS, rank, alive, 0};
}

/* ---- Names ----------------------------------------------------------------------------------------------------- */

static void ranks_are_named_in_a_line(void **state)
{
	struct lshard__ranks ranks = {0};

	(void)state;
	assert_string_equal(lshard__ranks_text(&ranks), "no rank");
	lshard__ranks_add(&ranks, 2);
	assert_string_equal(lshard__ranks_text(&ranks), "rank 2");
	assert_string_equal(lshard__ranks_are(&ranks), "is");
	lshard__ranks_add(&ranks, 5);
	assert_string_equal(lshard__ranks_text(&ranks), "ranks 2, 5");
	assert_string_equal(lshard__ranks_are(&ranks), "are");
}

static void of_many_ranks_the_first_are_named_and_the_rest_counted(void **state)
{
	struct lshard__ranks ranks = {0};

	(void)state;
	for (int32_t rank = 65500; rank < 65500 + LSHARD__RANKS_NAMED + 3; rank++)
		lshard__ranks_add(&ranks, rank);
	assert_non_null(strstr(lshard__ranks_text(&ranks), "ranks 65500, 65501, "));
	assert_non_null(strstr(lshard__ranks_text(&ranks), " 65515 and 3 more"));
}

static void those_that_are_not_alive_are_absent(void **state)
{
	struct lshard__ranks absent = lshard__ranks_absent((const uint8_t[]){1, 0, 1, 0}, 4);

	(void)state;
	assert_int_equal(absent.count, 2);
	assert_string_equal(lshard__ranks_text(&absent), "ranks 1, 3");
}

/* ---- Records --------------------------------------------------------------------------------------------------- */

static void ranks_that_are_all_well_agree(void **state)
{
	struct record records[RANKS];
	uint8_t alive[RANKS];
	struct lshard__record_set set = fill(records, alive, 1);
	struct lshard__verdict verdict = lshard__evaluate(&set);

	(void)state;
	assert_int_equal(verdict.finding, LSHARD__AGREED);
	records[4].value = 41; /* what is not the call may differ */
	verdict = lshard__evaluate(&set);
	assert_int_equal(verdict.finding, LSHARD__AGREED);
	assert_int_equal(lshard__first_differing(&set, offsetof(struct record, value), sizeof fine.value), 4);
	assert_int_equal(lshard__first_differing(&set, offsetof(struct record, call), sizeof fine.call), -1);
}

static void all_that_fared_badly_are_named(void **state)
{
	struct record records[RANKS];
	uint8_t alive[RANKS];
	struct lshard__record_set set = fill(records, alive, 0);
	struct lshard__verdict verdict;

	(void)state;
	records[2].outcome.status = LSHARD_ERR_NO_MEMORY;
	records[3].outcome.status = LSHARD_ERR_SYSTEM;
	verdict = lshard__evaluate(&set);
	assert_int_equal(verdict.finding, LSHARD__FAILED);
	assert_int_equal(verdict.status, LSHARD_ERR_NO_MEMORY);
	assert_int_equal(verdict.rank, 2);
	assert_string_equal(lshard__ranks_text(&verdict.ranks), "ranks 2, 3");
}

/* From the weakest finding to the strongest, each beside those before it. */
static void the_cause_that_tells_most_counts(void **state)
{
	struct record records[RANKS];
	uint8_t alive[RANKS];
	struct lshard__record_set set = fill(records, alive, 0);
	struct lshard__verdict verdict;

	(void)state;
	records[1].outcome = lshard__outcome_of(LSHARD_ERR_PEER_FAILED);
	verdict = lshard__evaluate(&set);
	assert_int_equal(verdict.finding, LSHARD__FAILED);
	assert_int_equal(verdict.rank, 1);
	assert_int_equal(verdict.echo, 1);

	records[2].outcome = lshard__outcome_of(LSHARD_ERR_CALLBACK);
	verdict = lshard__evaluate(&set);
	assert_int_equal(verdict.echo, 0);
	assert_int_equal(verdict.finding, LSHARD__FAILED);
	assert_int_equal(verdict.rank, 2);
	assert_int_equal(verdict.status, LSHARD_ERR_CALLBACK);

	alive[4] = 0;
	memset(&records[4], 0, sizeof records[4]); /* in no other call: it is not there */
	verdict = lshard__evaluate(&set);
	assert_int_equal(verdict.finding, LSHARD__MISSING);
	assert_int_equal(verdict.rank, 4);
	set.may_miss = 1;
	verdict = lshard__evaluate(&set);
	assert_int_equal(verdict.finding, LSHARD__FAILED);
	assert_int_equal(verdict.rank, 2);

	records[3].call = 8;
	verdict = lshard__evaluate(&set);
	assert_int_equal(verdict.finding, LSHARD__ELSEWHERE);
	assert_int_equal(verdict.rank, 3);
}

static void ranks_that_are_gone_are_not_compared(void **state)
{
	struct record records[RANKS];
	uint8_t alive[RANKS];
	struct lshard__record_set set = fill(records, alive, 0);

	(void)state;
	alive[1] = 0;
	records[1].value = 50;
	records[3].value = 60;
	assert_int_equal(lshard__first_differing(&set, offsetof(struct record, value), sizeof fine.value), 3);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(ranks_are_named_in_a_line),
		cmocka_unit_test(of_many_ranks_the_first_are_named_and_the_rest_counted),
		cmocka_unit_test(those_that_are_not_alive_are_absent),
		cmocka_unit_test(ranks_that_are_all_well_agree),
		cmocka_unit_test(all_that_fared_badly_are_named),
		cmocka_unit_test(the_cause_that_tells_most_counts),
		cmocka_unit_test(ranks_that_are_gone_are_not_compared),
	};

	return cmocka_run_group_tests_name("verdict", tests, NULL, NULL);
}
