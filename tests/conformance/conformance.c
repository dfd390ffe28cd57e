/* SPDX-License-Identifier: Apache-2.0
 *
 * conformance.c - what every transport must do, tried through the public interface: which transport that is, and all
 * tests of it. See layershard/transport_conformance.h. Arguments:
 *   configurations=N  of walks, where a group of ranks takes long to make
 *   only=PATTERN      run by hand: the tests whose names match
 *   neighbours=N      devices: the first N ranks are on the first device, the others each on one of their own
 *   poison=1          windows are poisoned outside of views
 *   late=SEED         devices that are the tests' stub: work runs late, in an order that follows from the seed
 */
#include "conformance.h"
#include "patience.h"

#include <layershard/plan.h>
#include <layershard/transport_conformance.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

/* Nothing may hang: the whole program ends after this, loudly. */
#define WATCHDOG_S patience(500)

/* What the specification's transport is, from the library itself as far as it says so. */
static bool describe_subject(const char *spec)
{
	const char *last = strrchr(spec, ',') ? strrchr(spec, ',') + 1 : spec;
	size_t length = strcspn(last, ":");
	lshard_transport_information information = LSHARD_TRANSPORT_INFORMATION_INIT;

	for (uint32_t index = 0; lshard_transport_info(index, &information) == LSHARD_OK; index++) {
		if (strlen(information.name) != length || memcmp(information.name, last, length) != 0)
			continue;
		if (!information.available) {
			printf("skipped: %s: %s\n", information.name, information.reason);
			exit(77);
		}
		subject.spec = spec;
		subject.collective = information.collective || strstr(last, "lockstep") != NULL;
		subject.caller_memory = information.caller_memory;
		subject.callbacks = strcmp(last, "callback") == 0 || strncmp(last, "fabric", length) == 0;
		subject.memory = information.memory;
		subject.direct = strcmp(last, "shm") == 0 || strcmp(last, "cuda") == 0 || strcmp(last, "fabric") == 0;
		return true;
	}
	return false;
}

/* One of somebody else's says less. */
static void describe_custom(const lshard_transport_ops *ops)
{
	lshard_error reason = {""};

	if (ops->available && !ops->available(&reason)) {
		printf("skipped: %s: %s\n", ops->name, reason.text);
		exit(77);
	}
	subject.custom = ops;
	subject.spec = ops->name;
	subject.collective = ops->capabilities & LSHARD_CAP_COLLECTIVE;
	subject.caller_memory = ops->capabilities & LSHARD_CAP_CALLER_MEMORY;
	subject.direct = ops->capabilities & LSHARD_CAP_DIRECT;
	subject.memory = ops->capabilities & LSHARD_CAP_STREAMS ? LSHARD_MEMORY_CUDA : LSHARD_MEMORY_HOST;
}

static bool take_number(const char *argument)
{
	const char *number = strchr(argument, '=');
	char *end = NULL;
	long value;

	if (!number)
		return false;
	value = strtol(++number, &end, 10);
	if (end == number || *end || value < 0)
		return false;
	if (strncmp(argument, "configurations=", 15) == 0)
		subject.configurations = (uint32_t)value;
	else if (strncmp(argument, "neighbours=", 11) == 0)
		subject.neighbours = (int32_t)value;
	else if (strncmp(argument, "late=", 5) == 0)
		subject.late = value;
	else if (strncmp(argument, "poison=", 7) == 0)
		subject.poison = value != 0;
	else
		return false;
	return true;
}

static bool take_arguments(int count, char **arguments)
{
	if (count < 1 || (strcmp(arguments[0], "threads") != 0 && strcmp(arguments[0], "forks") != 0))
		return false;
	subject = (struct subject){.kind = arguments[0], .configurations = 160};
	for (int i = 1; i < count; i++)
		if (strncmp(arguments[i], "only=", 5) == 0)
			cmocka_set_test_filter(arguments[i] + 5);
		else if (!take_number(arguments[i]))
			return false;
	return true;
}

int lshard_conformance(const lshard_transport_ops *ops, int count, char **arguments)
{
	const int first = ops ? 1 : 2; /* of the arguments that both take */
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(walks_give_the_right_bytes),
		cmocka_unit_test(rough_walks_give_the_right_bytes_or_a_status),
		cmocka_unit_test(two_series_do_not_disturb_each_other),
		cmocka_unit_test(ranks_need_no_lockstep),
		cmocka_unit_test(out_of_step_is_found_and_cured),
		cmocka_unit_test(sources_may_write_in_place),
		cmocka_unit_test(stripes_are_shards),
		cmocka_unit_test(layers_of_many_pages_are_right),
		cmocka_unit_test(callers_memory_is_used_and_given_back),
		cmocka_unit_test(misuse_has_a_status_and_a_text),
		cmocka_unit_test(differing_options_are_named),
		cmocka_unit_test(a_failing_callback_is_seen_by_all),
		cmocka_unit_test(abort_ends_a_blocked_call),
		cmocka_unit_test(the_others_go_on_without_a_rank),
		cmocka_unit_test(updates_begin_in_the_middle_of_a_pass),
		cmocka_unit_test(a_changed_byte_is_found),
		cmocka_unit_test(captured_passes_are_replayed),
		cmocka_unit_test(nothing_stays_on_the_device),
		cmocka_unit_test(children_by_fork_are_no_ranks),
		cmocka_unit_test(a_dead_rank_is_gone_although_its_child_lives),
		cmocka_unit_test(poison_is_all_that_is_seen_outside_of_views),
		cmocka_unit_test(poison_is_all_that_is_seen_around_a_load),
		cmocka_unit_test(poison_is_switched_between_passes),
		cmocka_unit_test(a_layer_that_is_late_stays_poison),
		cmocka_unit_test(poison_belongs_to_captured_passes),
	};

	int failed;

	if (!take_arguments(count - first, arguments + first)) {
		fprintf(stderr,
			"usage: %s %sthreads|forks [configurations=N] [neighbours=N] [poison=1] [late=SEED] "
			"[only=PATTERN]\n",
			count > 0 ? arguments[0] : "conformance", ops ? "" : "SPEC ");
		return 2;
	}
	if (ops)
		describe_custom(ops);
	else if (!describe_subject(arguments[1])) {
		fprintf(stderr, "conformance: there is no transport '%s'\n", arguments[1]);
		return 2;
	}
	alarm(WATCHDOG_S);
	failed = cmocka_run_group_tests(tests, NULL, NULL);
	tell_how_many_do_not_apply();
	return failed;
}
