/* SPDX-License-Identifier: Apache-2.0
 *
 * test_registry.c - how ranks come to one transport: what is asked for, what can be had, and what each refusal says.
 */
#include "contexts.h"
#include "host_identity.h"
#include "outside.h"
#include "patience.h"
#include "transports.h"

#include <layershard/plan.h>

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* What the ranks ask for (the last entry for all further ranks), and what comes of it for all of them. */
struct wish {
	const char *specs[3];
	lshard_status status;
	const char *says[3]; /* in the description, or in the error */
	const lshard_transport_ops *custom;
};

static lshard_status open_stack(const struct member *member, lshard_context *context, const struct wish *wish,
				lshard__stack **stack, lshard_error *error)
{
	const char *spec = wish->specs[0];
	lshard__rendezvous *rendezvous = NULL;
	lshard_bootstrap bootstrap;
	lshard_status status = LSHARD_OK;

	for (int i = 1; i <= member->rank && i < 3 && wish->specs[i]; i++)
		spec = wish->specs[i];
	*context = context_for_member(member, "", LONG_MS);
	if (member->job) {
		status = lshard__rendezvous_open(context, member->job, &rendezvous, &bootstrap, error);
		context->bootstrap = &bootstrap;
	}
	if (status == LSHARD_OK)
		status = lshard__stack_open(context, spec, wish->custom, stack, error);
	lshard__rendezvous_close(rendezvous);
	return status;
}

static int wishes(const struct member *member)
{
	const struct wish *wish = member->user;
	lshard__stack *stack = NULL;
	lshard_error error = {""};
	lshard_context context;
	lshard_status status = open_stack(member, &context, wish, &stack, &error);
	const char *said = stack ? lshard__stack_description(stack) : error.text;
	int32_t all[4];
	uint8_t alive[4];

	EXPECT(member, status == wish->status, "%s: status %d, '%s'", wish->specs[0] ? wish->specs[0] : "", (int)status,
	       said);
	for (int i = 0; i < 3 && wish->says[i]; i++)
		EXPECT(member, strstr(said, wish->says[i]), "'%s' lacks '%s'", said, wish->says[i]);
	EXPECT(member, !stack == (status != LSHARD_OK), "a stack with a failure, or none without");
	if (stack) {
		lshard_transport *top = lshard__stack_top(stack);

		EXPECT(member, top->ops->exchange(top, &member->rank, all, sizeof all[0], alive) == LSHARD_OK, "%s",
		       top->error.text);
		EXPECT(member, all[member->size - 1] == member->size - 1, "exchange");
	}
	lshard__stack_close(stack);
	EXPECT(member, !member->job || contexts_outstanding() == 0, "%d blocks left", contexts_outstanding());
	return 0;
failed:
	lshard__stack_close(stack);
	return 1;
}

static void check(const char *kind, int32_t size, struct wish *list, size_t count)
{
	for (size_t i = 0; i < count; i++)
		assert_int_equal(team_run(kind, size, wishes, &list[i]), 0);
	assert_int_equal(contexts_outstanding(), 0);
}

static void threads_come_to_one_transport(void **state)
{
	struct wish list[] = {
		{{"auto"}, LSHARD_OK, {"local (auto: threads of one process)"}, NULL},
		{{""}, LSHARD_OK, {"local (auto"}, NULL},
		{{"local"}, LSHARD_OK, {"local (as asked)"}, NULL},
		{{"shm"}, LSHARD_OK, {"shm (as asked)"}, NULL},
		{{"shm:copy"}, LSHARD_OK, {"shm:copy (as asked)"}, NULL},
		{{"throttle=1e9,auto"}, LSHARD_OK, {"throttle=1e9,local (auto"}, NULL},
		{{"throttle=1e9"}, LSHARD_OK, {"throttle=1e9,local (auto"}, NULL},
		{{"throttle=2e9,throttle=1e9,shm:copy"}, LSHARD_OK, {"throttle=2e9,throttle=1e9,shm:copy"}, NULL},
	};

	(void)state;
	check("threads", 2, list, sizeof list / sizeof list[0]);
	check("threads", 3, list, 1);
}

static void one_rank_gets_the_plain_transport(void **state)
{
	struct wish list[] = {{{"auto"}, LSHARD_OK, {"local (auto: one rank)"}, NULL}};

	(void)state;
	check("threads", 1, list, 1);
	check("forks", 1, list, 1);
}

static void processes_come_to_one_transport(void **state)
{
	struct wish list[] = {
		{{"auto"}, LSHARD_OK, {"shm (auto: all ranks on one host)"}, NULL},
		{{"throttle=1e9,shm:copy"}, LSHARD_OK, {"throttle=1e9,shm:copy (as asked)"}, NULL},
		{{"local"}, LSHARD_ERR_NOT_SUPPORTED, {"local connects threads of one process", "ranks 0 and 1"}, NULL},
		{{"cuda"}, LSHARD_ERR_NOT_SUPPORTED, {"cuda carries device memory only"}, NULL},
	};

	(void)state;
	check("forks", 3, list, sizeof list / sizeof list[0]);
}

static void what_is_not_there_is_named(void **state)
{
	struct wish list[] = {
		{{"cuda2"}, LSHARD_ERR_INVALID, {"no transport 'cuda2'", "auto, local, shm, cuda", "throttle="}, NULL},
		{{"shm:fast"}, LSHARD_ERR_INVALID, {"shm has no option 'fast'"}, NULL},
		{{"auto:copy"}, LSHARD_ERR_INVALID, {"auto takes no options"}, NULL},
		{{"shm,throttle=1"}, LSHARD_ERR_INVALID, {"'shm' is no wrapper"}, NULL},
		{{"throttle=1e9,,shm"}, LSHARD_ERR_INVALID, {"empty"}, NULL},
		{{"throttle=1e9,shm:"}, LSHARD_ERR_NOT_SUPPORTED, {"throttle", "in place"}, NULL},
		{{"throttle=nothing,shm"}, LSHARD_ERR_INVALID, {"nothing"}, NULL},
	};

	(void)state;
	check("threads", 2, list, sizeof list / sizeof list[0]);
}

/* All ranks hear it, also those that asked for something sensible, and nobody waits for a deadline. */
static void ranks_that_differ_are_told_how(void **state)
{
	struct wish list[] = {
		{{"shm", "shm", "shm:copy"},
		 LSHARD_ERR_MISMATCH,
		 {"rank 0 asks for transport 'shm', rank 2 for 'shm:copy'"},
		 NULL},
		{{"shm", "auto"}, LSHARD_ERR_MISMATCH, {"'shm', rank 1 for 'auto'"}, NULL},
		{{"shm", "sham"}, LSHARD_ERR_INVALID, {"no transport 'sham'"}, NULL},
	};

	(void)state;
	check("forks", 3, list, sizeof list / sizeof list[0]);
}

/* ---- Other builds ---------------------------------------------------------------------------------------------- */

/* What becomes of rank 1's bytes on their way; @p round counts from 0. */
struct spoiled {
	const struct member *member;
	void (*spoil)(unsigned char *bytes, size_t count, int round);
	int round;
};

static int gather_spoiled(void *user, const void *send, void *receive, size_t bytes)
{
	struct spoiled *spoiled = user;
	const lshard_bootstrap *inner = spoiled->member->bootstrap;
	int failed = inner->allgather(inner->user, send, receive, bytes);

	spoiled->spoil((unsigned char *)receive + bytes, bytes, spoiled->round++);
	return failed;
}

static void be_an_older_version(unsigned char *bytes, size_t count, int round)
{
	const uint32_t version = 0x000009;

	(void)count;
	if (round == 0)
		memcpy(bytes + sizeof version, &version, sizeof version);
}

static void have_longer_messages(unsigned char *bytes, size_t count, int round)
{
	const uint32_t length = 4096;

	(void)count;
	if (round == 0)
		memcpy(bytes + 3 * sizeof length, &length, sizeof length);
}

static void say_anything(unsigned char *bytes, size_t count, int round)
{
	(void)round;
	memset(bytes, 'x', count);
}

/* No text ends, no number is small. */
static void have_a_strange_record(unsigned char *bytes, size_t count, int round)
{
	if (round == 1)
		memset(bytes, 0x7f, count);
}

static const struct other_build {
	void (*spoil)(unsigned char *bytes, size_t count, int round);
	lshard_status status;
	const char *says[3];
} other_builds[] = {
	{be_an_older_version,
	 LSHARD_ERR_MISMATCH,
	 {"rank 0 runs version 0.", "rank 1 runs version 0.0.9 (messages of", "give all ranks one build"}},
	{have_longer_messages, LSHARD_ERR_MISMATCH, {"and 1024 bytes)", "and 4096 bytes)", "give all ranks one build"}},
	{say_anything, LSHARD_ERR_MISMATCH, {"rank 1 does not speak as ranks of this library do", "", ""}},
	{have_a_strange_record, LSHARD_ERR_TRANSPORT, {"rank 1: \x7f\x7f\x7f", "", ""}},
};

static int refuses_another_build(const struct member *member)
{
	const struct other_build *build = member->user;
	struct spoiled spoiled = {member, build->spoil, 0};
	const lshard_bootstrap bootstrap = {sizeof bootstrap, gather_spoiled, &spoiled};
	lshard_context context = context_for_member(member, "", LONG_MS);
	lshard__stack *stack = NULL;
	lshard_error error = {""};
	lshard_status status;

	context.bootstrap = &bootstrap;
	status = lshard__stack_open(&context, "local", NULL, &stack, &error);
	EXPECT(member, status == build->status && !stack, "status %d: %s", (int)status, error.text);
	for (int i = 0; i < 3; i++)
		EXPECT(member, strstr(error.text, build->says[i]), "'%s' lacks '%s'", error.text, build->says[i]);
	return 0;
failed:
	lshard__stack_close(stack);
	return 1;
}

static void other_builds_are_told_from_ours(void **state)
{
	(void)state;
	for (size_t i = 0; i < sizeof other_builds / sizeof other_builds[0]; i++) {
		struct other_build build = other_builds[i];

		assert_int_equal(team_of_threads(2, refuses_another_build, &build), 0);
	}
	assert_int_equal(contexts_outstanding(), 0);
}

/* ---- Other users ----------------------------------------------------------------------------------------------- */

/* Both ranks are this process, so rank 1's record says what is found out here. */
static void be_another_user(unsigned char *bytes, size_t count, int round)
{
	struct host_identity mine, other;
	unsigned char *place;

	(void)round;
	lshard__host_identify(&mine);
	other = mine;
	other.user++;
	place = memmem(bytes, count, &mine, sizeof mine);
	if (place)
		memcpy(place, &other, sizeof other);
}

static int refuses_another_user(const struct member *member)
{
	struct spoiled spoiled = {member, be_another_user, 0};
	const lshard_bootstrap bootstrap = {sizeof bootstrap, gather_spoiled, &spoiled};
	lshard_context context = context_for_member(member, "", LONG_MS);
	lshard__stack *stack = NULL;
	lshard_error error = {""};
	lshard_status status;

	context.bootstrap = &bootstrap;
	status = lshard__stack_open(&context, "shm", NULL, &stack, &error);
	EXPECT(member, status == LSHARD_ERR_NOT_SUPPORTED, "status %d: %s", (int)status, error.text);
	EXPECT(member, strstr(error.text, "ranks of one user, and ranks 0 and 1"), "%s", error.text);
	return 0;
failed:
	lshard__stack_close(stack);
	return 1;
}

static void ranks_of_two_users_are_told(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(2, refuses_another_user, NULL), 0);
	assert_int_equal(contexts_outstanding(), 0);
}

/* A wrapper that one rank cannot open, as all were connected already: all fail, and that rank's words are heard. */
static void a_wrapper_that_fails_on_one_rank_fails_all(void **state)
{
	struct wish list[] = {{{"trace=/nowhere/at/all/%d.json,shm"}, LSHARD_ERR_SYSTEM, {"/nowhere/at/all"}, NULL}};

	(void)state;
	check("forks", 2, list, 1);
}

/* ---- The caller's own ------------------------------------------------------------------------------------------ */

static void a_table_with_a_hole_is_refused(void **state)
{
	lshard_transport_ops old = lshard__shm;
	lshard_transport_ops hole = lshard__shm;
	lshard_transport_ops granule = lshard__shm;
	lshard_transport_ops whole = lshard__local;
	struct wish list[] = {
		{{NULL}, LSHARD_ERR_INVALID, {"ABI 7"}, &old},
		{{NULL}, LSHARD_ERR_INVALID, {"'mine' of the caller has no function drain"}, &hole},
		{{NULL}, LSHARD_ERR_INVALID, {"granule_bytes 3000"}, &granule},
		{{"shm"}, LSHARD_ERR_INVALID, {"only wrappers"}, &whole},
		{{"throttle=1e9"}, LSHARD_OK, {"throttle=1e9,mine (the caller's own)"}, &whole},
	};

	(void)state;
	old.abi = 7;
	hole.drain = NULL;
	granule.granule_bytes = 3000;
	hole.name = granule.name = whole.name = "mine";
	check("threads", 2, list, sizeof list / sizeof list[0]);
}

/* Each rank has a table of its own making. */
static int brings_another(const struct member *member)
{
	lshard_transport_ops mine = lshard__local;
	lshard_context context = context_for_member(member, "", LONG_MS);
	lshard__stack *stack = NULL;
	lshard_error error = {""};
	lshard_status status;

	mine.name = member->rank == 0 ? "fast" : "faster";
	status = lshard__stack_open(&context, NULL, &mine, &stack, &error);
	EXPECT(member, status == LSHARD_ERR_MISMATCH, "status %d: %s", (int)status, error.text);
	EXPECT(member, strstr(error.text, "rank 0 gives a transport 'fast'") && strstr(error.text, "rank 1 'faster'"),
	       "%s", error.text);
	return 0;
failed:
	lshard__stack_close(stack);
	return 1;
}

static void tables_of_two_names_are_told(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(2, brings_another, NULL), 0);
	assert_int_equal(contexts_outstanding(), 0);
}

/* ---- Large pages ---- */

/* What each of two ranks sees of its system and wants of it, and what all then have. */
struct sight {
	uint64_t page_bytes[2];
	lshard_large_pages wanted[2];
	uint64_t agreed;
	const char *refused; /* a part of the error's text */
};

static int sees_pages(const struct member *member)
{
	const struct sight *sight = member->user;
	lshard_context context = context_for_member(member, "", LONG_MS);
	lshard__stack *stack = NULL;
	lshard_error error = {""};
	lshard_status status;
	int failed = 1;

	context.large_page_bytes = sight->page_bytes[member->rank];
	context.large_pages = sight->wanted[member->rank];
	status = lshard__stack_open(&context, "local", NULL, &stack, &error);
	EXPECT(member, !stack == !!sight->refused, "%s: %s", lshard_status_name(status), error.text);
	EXPECT(member, strstr(error.text, sight->refused ? sight->refused : ""), "%s", error.text);
	if (stack)
		EXPECT(member, lshard__stack_top(stack)->context->large_page_bytes == sight->agreed, "pages of %llu",
		       (unsigned long long)lshard__stack_top(stack)->context->large_page_bytes);
	failed = 0;
failed:
	lshard__stack_close(stack);
	return failed;
}

static void large_pages_are_those_of_all_ranks(void **state)
{
	enum { MIB = 1 << 20 };
	const lshard_large_pages never = LSHARD_LARGE_PAGES_NEVER, require = LSHARD_LARGE_PAGES_REQUIRE;
	struct sight list[] = {
		{.page_bytes = {2 * MIB, 2 * MIB}, .agreed = (uint64_t)2 * MIB},
		{.page_bytes = {2 * MIB, 0}},
		{.page_bytes = {0, 2 * MIB}},
		{.page_bytes = {2 * MIB, 32 * MIB}},
		{.page_bytes = {2 * MIB, 0},
		 .wanted = {require, require},
		 .refused = "rank 1: large pages are required, and its system has none"},
		{.page_bytes = {0, 2 * MIB},
		 .wanted = {never, require},
		 .refused = "rank 0 has never for large_pages, rank 1 require"},
	};

	(void)state;
	for (size_t i = 0; i < sizeof list / sizeof list[0]; i++)
		assert_int_equal(team_of_threads(2, sees_pages, &list[i]), 0);
}

static void transports_are_listed(void **state)
{
	lshard_transport_information information = LSHARD_TRANSPORT_INFORMATION_INIT;

	(void)state;
	assert_int_equal(lshard_transport_info(0, NULL), LSHARD_ERR_INVALID);
	assert_int_equal(lshard_transport_info(0, &information), LSHARD_OK);
	assert_string_equal(information.name, "local");
	assert_null(lshard__local.available); /* a table without the function: always */
	assert_true(information.available);
	assert_int_equal(lshard_transport_info(1, &information), LSHARD_OK);
	assert_string_equal(information.name, "shm");
	assert_true(information.available || information.reason[0]);
	assert_int_equal(information.memory, LSHARD_MEMORY_HOST);
	assert_int_equal(lshard_transport_info(2, &information), LSHARD_OK);
	assert_string_equal(information.name, "cuda");
	assert_true(information.available || information.reason[0]);
	assert_int_equal(information.memory, LSHARD_MEMORY_CUDA);
	assert_int_equal(lshard_transport_info(3, &information), LSHARD_OK);
	assert_string_equal(information.name, "fabric");
	assert_true((information.available || information.reason[0]) && !information.collective);
	assert_int_equal(information.caller_memory, 0);
	assert_int_equal(lshard_transport_info(4, &information), LSHARD_OK);
	assert_string_equal(information.name, "callback");
	assert_true(information.available && information.collective);
	assert_int_equal(lshard_transport_info(LSHARD__N_TRANSPORTS, &information), LSHARD_ERR_RANGE);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(threads_come_to_one_transport),
		cmocka_unit_test(one_rank_gets_the_plain_transport),
		cmocka_unit_test(processes_come_to_one_transport),
		cmocka_unit_test(what_is_not_there_is_named),
		cmocka_unit_test(ranks_that_differ_are_told_how),
		cmocka_unit_test(other_builds_are_told_from_ours),
		cmocka_unit_test(ranks_of_two_users_are_told),
		cmocka_unit_test(a_wrapper_that_fails_on_one_rank_fails_all),
		cmocka_unit_test(a_table_with_a_hole_is_refused),
		cmocka_unit_test(tables_of_two_names_are_told),
		cmocka_unit_test(large_pages_are_those_of_all_ranks),
		cmocka_unit_test(transports_are_listed),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
