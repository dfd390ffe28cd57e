/* SPDX-License-Identifier: Apache-2.0
 *
 * test_agree.c - what ranks compare of a series before anything is allocated.
 */
#include "local_ranks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static int residents_differ_body(const struct member *member)
{
	const bool *must_agree = member->user;
	struct setting setting = small_setting(6, 1);
	lshard_series_options options;
	struct rank rank;
	lshard_status status;
	bool right = false;

	setting.resident_bytes = member->rank ? UINT64_MAX : 0;
	options = rank_series_options(&setting);
	if (!*must_agree) {
		if (!rank_open(&rank, member, &setting))
			return 1;
		right = one_pass(&rank) && one_pass(&rank);
		return rank_close(&rank) && right ? 0 : 1;
	}
	if (!rank_group(&rank, member, &setting))
		return 1;
	status = lshard_series_create(rank.group, &options, &rank.series);
	EXPECT(member, status == LSHARD_ERR_MISMATCH, "%s", lshard_status_name(status));
	SAYS(member, lshard_group_error(rank.group), "resident_bytes");
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void residents_may_differ_only_where_ranks_are_not_in_step(void **state)
{
	bool must_agree[] = {false, true};

	(void)state;
	play("local", 2, residents_differ_body, &must_agree[0]);
	play("local:lockstep", 2, residents_differ_body, &must_agree[1]);
}

static int columns_differ_body(const struct member *member)
{
	struct setting setting = {.layers = 4, .placement = LSHARD_STRIPED, .n_tensors = 1};
	lshard_series_options options;
	struct rank rank;
	lshard_status status;
	bool right = false;

	setting.tensors[0] = (lshard_tensor){"weight", 8 * 64, 0, LSHARD_STRIPE_COLUMNS, 8, member->rank ? 4 : 2};
	options = rank_series_options(&setting);
	if (!rank_group(&rank, member, &setting))
		return 1;
	status = lshard_series_create(rank.group, &options, &rank.series);
	EXPECT(member, status == LSHARD_ERR_MISMATCH, "%s", lshard_status_name(status));
	SAYS(member, lshard_group_error(rank.group), "column_bytes of tensor 'weight'");
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void columns_of_other_widths_are_named(void **state)
{
	(void)state;
	play("local", 2, columns_differ_body, NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(residents_may_differ_only_where_ranks_are_not_in_step),
		cmocka_unit_test(columns_of_other_widths_are_named),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
