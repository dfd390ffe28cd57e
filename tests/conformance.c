/* SPDX-License-Identifier: Apache-2.0
 *
 * conformance.c - `conformance SPEC threads|forks`: what every transport must do, tried through the public interface.
 */
#include "conformance.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

/* Nothing may hang: the whole program ends after this, loudly. */
#define WATCHDOG_S 600u

/* What the specification's transport is, from the library itself as far as it says so. */
static bool describe_subject(const char *spec)
{
	const char *last = strrchr(spec, ',') ? strrchr(spec, ',') + 1 : spec;
	size_t length = strcspn(last, ":");
	lshard_transport_information information;

	for (uint32_t index = 0; lshard_transport_info(index, &information) == LSHARD_OK; index++) {
		if (strlen(information.name) != length || memcmp(information.name, last, length) != 0)
			continue;
		if (!information.available) {
			printf("skipped: %s: %s\n", information.name, information.reason);
			exit(77);
		}
		subject.collective = information.collective || strstr(last, "lockstep") != NULL;
		subject.caller_memory = information.caller_memory;
		subject.direct = strcmp(last, "shm") == 0;
		return true;
	}
	return false;
}

int main(int count, char **arguments)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(walks_give_the_right_bytes),
		cmocka_unit_test(two_series_do_not_disturb_each_other),
		cmocka_unit_test(ranks_need_no_lockstep),
		cmocka_unit_test(out_of_step_is_found_and_cured),
		cmocka_unit_test(sources_may_write_in_place),
		cmocka_unit_test(stripes_are_shards),
		cmocka_unit_test(callers_memory_is_used_and_given_back),
		cmocka_unit_test(misuse_has_a_status_and_a_text),
		cmocka_unit_test(differing_options_are_named),
		cmocka_unit_test(a_failing_callback_is_seen_by_all),
		cmocka_unit_test(abort_ends_a_blocked_call),
		cmocka_unit_test(the_others_go_on_without_a_rank),
	};

	if (count != 3 || (strcmp(arguments[2], "threads") != 0 && strcmp(arguments[2], "forks") != 0)) {
		fprintf(stderr, "usage: conformance SPEC threads|forks\n");
		return 2;
	}
	subject.spec = arguments[1];
	subject.kind = arguments[2];
	if (!describe_subject(arguments[1])) {
		fprintf(stderr, "conformance: there is no transport '%s'\n", arguments[1]);
		return 2;
	}
	alarm(WATCHDOG_S);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
