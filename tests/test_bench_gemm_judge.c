/* SPDX-License-Identifier: Apache-2.0
 *
 * test_bench_gemm_judge.c - what `bench step --devices` makes of samples: of two ranks, in 31 rounds, foretold by hand.
 */
#include "bench_gemm_result.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#define ROUNDS 31u
#define RANKS  2u

enum { FIRST, LAST, COPIES, OVERLAPPED, DELAYED, PEER, RIVAL, ARMS };

static struct gemm_sample samples[ARMS][RANKS][ROUNDS];
static struct gemm_bench bench;
static struct gemm_result result;

/* In place of bench_gemm.c's, whose samples lie in shared memory. */
struct gemm_sample *gemm_sample_at(const struct gemm_bench *of, uint32_t tokens, uint32_t arm, uint32_t rank,
				   uint32_t round)
{
	(void)of;
	(void)tokens;
	return &samples[arm][rank][round];
}

bool gemm_is_run(const struct gemm_bench *of, const struct gemm_arm *arm)
{
	(void)of;
	return arm->kind != GEMM_RIVAL || arm->rival != GEMM_BROADCAST;
}

static void set_arm(uint32_t arm, uint32_t rank, double pass_ns, double per_round)
{
	for (uint32_t round = 0; round < ROUNDS; round++)
		samples[arm][rank][round].pass_ns = pass_ns + per_round * round;
}

static int set_up(void **state)
{
	static const struct gemm_arm arms[ARMS] = {
		{.kind = GEMM_RESIDENT, .copies = GEMM_NO_ARM, .eager = GEMM_NO_ARM, .ours = GEMM_NO_ARM},
		{.kind = GEMM_RESIDENT, .copies = GEMM_NO_ARM, .eager = GEMM_NO_ARM, .ours = GEMM_NO_ARM},
		{.kind = GEMM_COPIES, .copies = GEMM_NO_ARM, .eager = GEMM_NO_ARM, .ours = GEMM_NO_ARM},
		{.kind = GEMM_OVERLAPPED, .copies = COPIES, .eager = GEMM_NO_ARM, .ours = GEMM_NO_ARM},
		{.kind = GEMM_OVERLAPPED,
		 .delayed = true,
		 .baseline = OVERLAPPED,
		 .copies = GEMM_NO_ARM,
		 .eager = GEMM_NO_ARM,
		 .ours = GEMM_NO_ARM},
		{.kind = GEMM_RIVAL,
		 .rival = GEMM_PEER_COPY,
		 .copies = GEMM_NO_ARM,
		 .eager = GEMM_NO_ARM,
		 .ours = OVERLAPPED},
		{.kind = GEMM_RIVAL, .copies = GEMM_NO_ARM, .eager = GEMM_NO_ARM, .ours = OVERLAPPED},
	};

	(void)state;
	memset(samples, 0, sizeof samples);
	memcpy(bench.arms, arms, sizeof arms);
	bench.arm_count = ARMS;
	bench.options.ranks = RANKS;
	bench.options.rounds = ROUNDS;
	bench.options.tokens[0] = 512;
	bench.options.token_count = 1;
	bench.options.margin_percent = 0.5;
	for (uint32_t rank = 0; rank < RANKS; rank++) {
		set_arm(FIRST, rank, 1000, 0);
		set_arm(LAST, rank, 1000, 0);
		set_arm(COPIES, rank, 500, 0);
		set_arm(OVERLAPPED, rank, 1000, 0);
		set_arm(DELAYED, rank, 1000, 0);
		set_arm(PEER, rank, 1000, 0);
	}
	return 0;
}

static int tear_down(void **state)
{
	(void)state;
	gemm_result_free(&result);
	return 0;
}

static const struct gemm_row *judged(uint32_t arm)
{
	gemm_result_free(&result);
	assert_true(gemm_judge(&result, &bench));
	return &result.tables[0].rows[arm];
}

static void assert_near(double found, double expected)
{
	assert_true(found > expected - 1e-9 && found < expected + 1e-9);
}

static void the_slowest_rank_counts(void **state)
{
	(void)state;
	set_arm(OVERLAPPED, 1, 1100, 0);
	assert_near(judged(OVERLAPPED)->to_baseline.median, 1.1);
	assert_near(judged(OVERLAPPED)->pass_ns.median, 1100);
}

static void ratios_are_to_half_way_between_the_resident_arms(void **state)
{
	(void)state;
	set_arm(LAST, 0, 1004, 0);
	set_arm(OVERLAPPED, 0, 1002, 0);
	assert_near(judged(OVERLAPPED)->to_baseline.median, 1);
}

/* A machine that gets slower from round to round, all arms alike, changes no ratio. */
static void ratios_are_of_each_round(void **state)
{
	(void)state;
	for (uint32_t rank = 0; rank < RANKS; rank++) {
		set_arm(FIRST, rank, 1000, 100);
		set_arm(LAST, rank, 1000, 100);
		set_arm(OVERLAPPED, rank, 1200, 120);
	}
	assert_near(judged(OVERLAPPED)->to_baseline.median, 1.2);
	assert_near(result.tables[0].rows[OVERLAPPED].to_baseline.low, 1.2);
	assert_near(result.tables[0].rows[OVERLAPPED].to_baseline.high, 1.2);
}

/* Of 31 ratios the median lies between the 10th and the 22nd with 97 % probability, and with 93 % one further in. */
static void the_interval_is_by_ranks(void **state)
{
	(void)state;
	set_arm(OVERLAPPED, 0, 1000, 10);
	assert_near(judged(OVERLAPPED)->to_baseline.median, 1.15);
	assert_near(result.tables[0].rows[OVERLAPPED].to_baseline.low, 1.09);
	assert_near(result.tables[0].rows[OVERLAPPED].to_baseline.high, 1.21);
}

static void the_bound_is_the_longer_of_compute_and_copies(void **state)
{
	(void)state;
	set_arm(OVERLAPPED, 0, 2100, 0);
	assert_near(judged(OVERLAPPED)->to_bound.median, 2.1);
	set_arm(COPIES, 1, 2000, 0);
	assert_near(judged(OVERLAPPED)->to_bound.median, 1.05);
	assert_true(judged(COPIES)->to_bound.median < 0);
}

static void a_delayed_arm_is_about_the_rank_that_is_not_delayed(void **state)
{
	(void)state;
	set_arm(DELAYED, 0, 1010, 0);
	set_arm(DELAYED, 1, 1500, 0);
	assert_near(judged(DELAYED)->to_baseline.median, 1.01);
}

/* Both get slower from round to round: medians of each would hide what the ratios of the rounds tell. */
static void a_rival_is_compared_with_the_overlapped_arm_of_its_round(void **state)
{
	(void)state;
	for (uint32_t rank = 0; rank < RANKS; rank++) {
		set_arm(OVERLAPPED, rank, 1000, 100);
		set_arm(PEER, rank, 1100, 110);
	}
	assert_near(judged(PEER)->to_ours.median, 1.1);
	assert_near(result.tables[0].rows[PEER].to_ours.low, 1.1);
	assert_true(result.tables[0].rows[OVERLAPPED].to_ours.median < 0);
}

static void drift_makes_a_table_void(void **state)
{
	(void)state;
	set_arm(LAST, 0, 1004, 0);
	judged(FIRST);
	assert_true(result.conclusive);
	set_arm(LAST, 1, 1006, 0);
	judged(FIRST);
	assert_false(result.conclusive);
	assert_near(result.tables[0].drift_percent, 0.6);
}

static void rivals_that_were_not_run_have_no_row(void **state)
{
	(void)state;
	judged(FIRST);
	assert_int_equal(result.tables[0].row_count, ARMS - 1);
}

static void exposed_time_is_taken_apart_for_the_rank_that_lost_most(void **state)
{
	(void)state;
	for (uint32_t round = 0; round < GEMM_SPLIT_ROUNDS; round++)
		for (uint32_t rank = 0; rank < RANKS; rank++) {
			samples[FIRST][rank][round].stalled_ns = 10;
			samples[FIRST][rank][round].computed_ns = 900;
			samples[OVERLAPPED][rank][round].stalled_ns = rank == 0 ? 60 : 20;
			samples[OVERLAPPED][rank][round].computed_ns = rank == 0 ? 930 : 905;
		}
	assert_true(judged(OVERLAPPED)->is_split);
	assert_near(result.tables[0].rows[OVERLAPPED].stalled_ns, 50);
	assert_near(result.tables[0].rows[OVERLAPPED].slowed_ns, 30);
	assert_false(judged(COPIES)->is_split);
}

static void clocks_are_the_mean_of_ranks_that_tell_them(void **state)
{
	(void)state;
	assert_true(judged(OVERLAPPED)->sm_mhz < 0);
	samples[OVERLAPPED][0][0].sm_mhz = 1700;
	samples[OVERLAPPED][1][0].sm_mhz = -1;
	assert_near(judged(OVERLAPPED)->sm_mhz, 1700);
	samples[OVERLAPPED][1][0].sm_mhz = 1500;
	assert_near(judged(OVERLAPPED)->sm_mhz, 1600);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(the_slowest_rank_counts, set_up, tear_down),
		cmocka_unit_test_setup_teardown(ratios_are_to_half_way_between_the_resident_arms, set_up, tear_down),
		cmocka_unit_test_setup_teardown(ratios_are_of_each_round, set_up, tear_down),
		cmocka_unit_test_setup_teardown(the_interval_is_by_ranks, set_up, tear_down),
		cmocka_unit_test_setup_teardown(the_bound_is_the_longer_of_compute_and_copies, set_up, tear_down),
		cmocka_unit_test_setup_teardown(a_delayed_arm_is_about_the_rank_that_is_not_delayed, set_up, tear_down),
		cmocka_unit_test_setup_teardown(a_rival_is_compared_with_the_overlapped_arm_of_its_round, set_up,
						tear_down),
		cmocka_unit_test_setup_teardown(drift_makes_a_table_void, set_up, tear_down),
		cmocka_unit_test_setup_teardown(rivals_that_were_not_run_have_no_row, set_up, tear_down),
		cmocka_unit_test_setup_teardown(exposed_time_is_taken_apart_for_the_rank_that_lost_most, set_up,
						tear_down),
		cmocka_unit_test_setup_teardown(clocks_are_the_mean_of_ranks_that_tell_them, set_up, tear_down),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
