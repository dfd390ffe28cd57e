/* SPDX-License-Identifier: Apache-2.0
 *
 * test_faults.c - calls that go wrong because they are told to: each is told, and survived.
 */
#include "patience.h"
#include "test_clock.h"
#include "wrapped_ranks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static void rules_are_checked(void **state)
{
	static const char *const wrong[] = {"",
					    "fetch",
					    "fetch@0=fail",
					    "fetch@1",
					    "fetch@1=",
					    "fetch@1=flip",
					    "fetch@1=failing",
					    "jump@1=fail",
					    "fetch@1=delay",
					    "fetch@1=delay:",
					    "r.fetch@1=fail",
					    "fetch@1=fail+",
					    "fetch@x=fail"};

	(void)state;
	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
		char spec[64];

		snprintf(spec, sizeof spec, "faults=%s,local", wrong[i]);
		assert_refused(spec, LSHARD_ERR_INVALID, "faults");
	}
	assert_refused("faults=open@1=fail,local", LSHARD_ERR_TRANSPORT, "fault injected: open number 1 on rank 0");
	assert_refused("faults=open@1=timeout,local", LSHARD_ERR_TIMEOUT, "injected");
}

static void a_failing_control_channel_is_told(void **state)
{
	struct setting setting = small_setting();
	lshard_series_options options = rank_series_options(&setting);
	lshard_group *group = NULL;
	lshard_series *series = NULL;
	char error[512] = "";
	lshard_status status = create_alone("faults=exchange@*=peer,local", error, sizeof error, NULL, NULL, &group);

	(void)state;
	if (status == LSHARD_OK) { /* a group alone may have nothing to tell itself */
		status = lshard_series_create(group, &options, &series);
		snprintf(error, sizeof error, "%s", lshard_group_error(group));
	}
	assert_int_equal(status, LSHARD_ERR_PEER_FAILED);
	assert_non_null(strstr(error, "fault injected: exchange number"));
	assert_null(series);
	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
}

/* What goes wrong at first, and where; afterwards a whole pass is right. */
struct fault {
	const char *spec;
	enum { AT_CREATE, AT_COMMIT, AT_PASS, AT_JOIN, AT_UPDATE, AT_VERIFY } where;
	lshard_status status;
	const char *says; /* on the rank that meets it */
};

static lshard_status first_failure_of_passes(struct rank *rank)
{
	lshard_status status = LSHARD_OK;

	for (uint32_t step = 0; status == LSHARD_OK && step < 2 * rank->setting->layers; step++) {
		uint32_t layer = rank->setting->first_layer + step % rank->setting->layers;

		status = lshard_reach(rank->series, layer, NULL);
		if (status == LSHARD_OK)
			status = lshard_wait(rank->series, layer, NULL);
	}
	return status;
}

static bool create_series(struct rank *rank, const struct fault *fault)
{
	lshard_series_options options = rank_series_options(rank->setting);
	lshard_status status;

	if (fault->where == AT_CREATE) {
		status = lshard_series_create(rank->group, &options, &rank->series);
		EXPECT(rank->member, status == fault->status, "%s: %s", fault->spec, lshard_status_name(status));
		SAYS(rank->member, lshard_group_error(rank->group), fault->says);
		EXPECT(rank->member, team_barrier(rank->member), "a rank failed");
	}
	EXPECT(rank->member, lshard_series_create(rank->group, &options, &rank->series) == LSHARD_OK, "%s: %s",
	       fault->spec, lshard_group_error(rank->group));
	if (!rank_note_addresses(rank))
		goto failed;
	return true;
failed:
	return false;
}

static bool meets(struct rank *rank, const struct fault *fault, lshard_status status)
{
	EXPECT(rank->member, status == fault->status, "%s: %s: %s", fault->spec, lshard_status_name(status),
	       lshard_series_error(rank->series));
	SAYS(rank->member, lshard_series_error(rank->series), fault->says);
	return true;
failed:
	return false;
}

static int faulty_body(const struct member *member)
{
	const struct fault *fault = member->user;
	struct setting setting = small_setting();
	struct rank rank;
	bool right = true;

	setting.placement = fault->where == AT_COMMIT ? LSHARD_STRIPED : LSHARD_WHOLE;
	setting.timeout_ms = LONG_MS;
	if (!rank_group(&rank, member, &setting))
		return 1;
	if (!create_series(&rank, fault))
		goto failed;
	if (fault->where == AT_COMMIT)
		right = meets(&rank, fault, lshard_series_commit(rank.series, fill_layer, &rank));
	OK_SERIES(&rank, lshard_series_commit(rank.series, fill_layer, &rank));
	if (fault->where == AT_PASS)
		right = meets(&rank, fault, first_failure_of_passes(&rank));
	else if (fault->where == AT_JOIN)
		right = meets(&rank, fault, lshard_series_join(rank.series, NULL));
	else if (fault->where == AT_UPDATE)
		right = meets(&rank, fault, lshard_series_update_begin(rank.series));
	else if (fault->where == AT_VERIFY)
		right = meets(&rank, fault, lshard_series_verify(rank.series, NULL));
	right = right && one_pass(&rank) && one_pass(&rank);
	OK_SERIES(&rank, lshard_series_verify(rank.series, NULL));
	return rank_close(&rank) && right ? 0 : 1;
failed:
	rank_close(&rank);
	return 1;
}

static void every_fault_is_told_and_survived(void **state)
{
	static struct fault faults[] = {
		{"faults=store_open@1=fail,local", AT_CREATE, LSHARD_ERR_TRANSPORT, "injected"},
		{"faults=r1.store_open@1=fail,local", AT_CREATE, LSHARD_ERR_TRANSPORT, "rank 1"},
		{"faults=read@1=fail,local", AT_COMMIT, LSHARD_ERR_TRANSPORT, "injected"},
		{"faults=r0.read@2=fail,local", AT_COMMIT, LSHARD_ERR_TRANSPORT, "rank 0"},
		{"faults=fetch@4=fail,local", AT_PASS, LSHARD_ERR_TRANSPORT, "fetch number 4"},
		{"faults=fetch@1=peer,local:at=wait", AT_PASS, LSHARD_ERR_PEER_FAILED, "fetch number 1"},
		{"faults=wait@3=fail,local", AT_PASS, LSHARD_ERR_TRANSPORT, "wait number 3"},
		{"faults=wait@2=timeout,local:at=wait", AT_PASS, LSHARD_ERR_TIMEOUT, "wait number 2"},
		{"faults=wait@1=peer+fetch@2=delay:1,local:seed=5", AT_PASS, LSHARD_ERR_PEER_FAILED, "wait number 1"},
		{"faults=join@1=timeout,local", AT_JOIN, LSHARD_ERR_TIMEOUT, "join number 1"},
		{"faults=drain@1=fail,local", AT_UPDATE, LSHARD_ERR_TRANSPORT, "drain number 1"},
		{"faults=wait@2=flip,local", AT_VERIFY, LSHARD_ERR_CORRUPT, "layer"},
	};

	(void)state;
	for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++) {
		subject = (struct subject){.spec = faults[i].spec, .kind = "threads"};
		if (team_of_threads(2, faulty_body, &faults[i]) != 0)
			fail_msg("%s", faults[i].spec);
	}
}

/* Rank 1 alone is slowed down: three layers come to it in a pass, each 20 ms late. */
static int delayed_body(const struct member *member)
{
	struct setting setting = small_setting();
	struct rank rank;
	uint64_t began;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	began = now_ns();
	right = one_pass(&rank);
	EXPECT(member, member->rank == 0 || now_ns() - began >= 60000000u, "no delay");
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void calls_can_be_delayed(void **state)
{
	(void)state;
	subject = (struct subject){.spec = "faults=r1.wait@*=delay:20,local", .kind = "threads"};
	assert_int_equal(team_of_threads(2, delayed_body, NULL), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(rules_are_checked),
		cmocka_unit_test(a_failing_control_channel_is_told),
		cmocka_unit_test(every_fault_is_told_and_survived),
		cmocka_unit_test(calls_can_be_delayed),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
