/* SPDX-License-Identifier: Apache-2.0
 *
 * test_rejoin.c - a rank that was killed, or left, comes back under its number while the others go on: by itself, one
 * after the other, several at once, around updates; and who cannot come back is told why. Bytes are compared with what
 * the test knows, from processes that nobody else speaks with.
 */
#include "patience.h"
#include "told_ranks.h"

#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define MOST 4

struct group {
	struct told_rank of[MOST];
	int size;
	int series;
	struct told_options options;
	char job[64];
	uint64_t generation;
};

static const struct told_options usual = {.transport = "shm",
					  .layers = 6,
					  .tensor_bytes = 9000,
					  .timeout_ms = 10000,
					  .prefetch = 1,
					  .rejoin = LSHARD_REJOIN_ALLOW};

#define EXPECT_OK(reply)                                                                                               \
	do {                                                                                                           \
		const struct told_reply told_reply_ = (reply);                                                         \
		if (told_reply_.status != LSHARD_OK)                                                                   \
			fail_msg("%s: %s", lshard_status_name(told_reply_.status), told_reply_.text);                  \
	} while (0)

#define EXPECT_REFUSED(reply, expected, word)                                                                          \
	do {                                                                                                           \
		const struct told_reply told_reply_ = (reply);                                                         \
		if (told_reply_.status != (expected) || !strstr(told_reply_.text, word))                               \
			fail_msg("%s: %s; expected was %s with '%s'", lshard_status_name(told_reply_.status),          \
				 told_reply_.text, lshard_status_name(expected), word);                                \
	} while (0)

static struct told_reply all_do(const struct group *group, enum order order, uint32_t number, uint64_t value)
{
	const struct told_rank *told[MOST];
	int n = 0;

	for (int rank = 0; rank < group->size; rank++)
		if (group->of[rank].pid > 0)
			told[n++] = &group->of[rank];
	return told_all(told, n, order, number, value);
}

static void begin(struct group *group, int size, int series, const struct told_options *options)
{
	static int jobs;

	*group = (struct group){.size = size, .series = series, .options = *options};
	snprintf(group->job, sizeof group->job, "rejoin %d %d", (int)getpid(), jobs++);
	for (int rank = 0; rank < size; rank++)
		told_start(&group->of[rank], rank, size, group->job, options);
	EXPECT_OK(all_do(group, TOLD_GROUP, 0, 0));
	for (int number = 0; number < series; number++) {
		EXPECT_OK(all_do(group, TOLD_SERIES, (uint32_t)number, 0));
		EXPECT_OK(all_do(group, TOLD_COMMIT, (uint32_t)number, 0));
		EXPECT_OK(all_do(group, TOLD_PASS, (uint32_t)number, 0));
	}
}

static void end(struct group *group)
{
	for (int rank = 0; rank < group->size; rank++)
		told_kill(&group->of[rank]);
}

static void start_again(struct group *group, int rank)
{
	told_start(&group->of[rank], rank, group->size, group->job, &group->options);
}

/* It reads nothing, and sees what the others do. */
static void come_back(struct group *group, int rank)
{
	struct told_reply reply;

	start_again(group, rank);
	reply = told_do(&group->of[rank], TOLD_GROUP, 0, 0);
	EXPECT_OK(reply);
	assert_true(reply.returned);
	for (int number = 0; number < group->series; number++) {
		reply = told_do(&group->of[rank], TOLD_SERIES, (uint32_t)number, 0);
		EXPECT_OK(reply);
		assert_true(reply.filled);
		/* It is memory that this process cannot write. */
		assert_int_equal(reply.storage, LSHARD_ERR_STATE);
		reply = told_do(&group->of[rank], TOLD_COMMIT, (uint32_t)number, 0);
		EXPECT_OK(reply);
		assert_int_equal(reply.called, 0);
		EXPECT_OK(told_do(&group->of[rank], TOLD_PASS, (uint32_t)number, group->generation));
	}
}

static void restart(struct group *group, int rank)
{
	told_kill(&group->of[rank]);
	come_back(group, rank);
}

static void update(struct group *group, int number)
{
	group->generation++;
	EXPECT_OK(all_do(group, TOLD_BEGIN, (uint32_t)number, 0));
	EXPECT_OK(all_do(group, TOLD_END, (uint32_t)number, group->generation));
	EXPECT_OK(all_do(group, TOLD_PASS, (uint32_t)number, group->generation));
}

/* What only all together can do. */
static void verify(struct group *group)
{
	const struct told_rank *told[MOST] = {NULL};
	uint64_t hash = 0;

	for (int rank = 0; rank < group->size; rank++) {
		told[rank] = &group->of[rank];
		assert_true(told_tell(told[rank], TOLD_VERIFY, 0, 0));
	}
	for (int rank = 0; rank < group->size; rank++) {
		struct told_reply reply;

		assert_true(told_hear(told[rank], &reply));
		EXPECT_OK(reply);
		assert_int_equal(reply.generation, group->generation);
		if (rank > 0)
			assert_true(reply.hash == hash);
		hash = reply.hash;
	}
}

/* ---- one after the other ---- */

static void each_rank_comes_back(struct group *group)
{
	for (int rank = 0; rank < group->size; rank++)
		restart(group, rank);
	verify(group);
	update(group, 0);
	for (int rank = 0; rank < group->size; rank++)
		restart(group, rank); /* shards that were renewed are recalled as well */
	update(group, 0);
	verify(group);
	EXPECT_OK(all_do(group, TOLD_DESTROY, 0, 0));
	EXPECT_OK(all_do(group, TOLD_LEAVE, 0, 0));
}

static void each_rank_comes_back_in_place(void **state)
{
	struct group group;

	(void)state;
	begin(&group, 3, 1, &usual);
	each_rank_comes_back(&group);
	end(&group);
}

static void each_rank_comes_back_with_windows(void **state)
{
	struct told_options options = usual;
	struct group group;

	(void)state;
	options.transport = "shm:copy";
	begin(&group, 3, 1, &options);
	each_rank_comes_back(&group);
	end(&group);
}

static void each_rank_comes_back_with_stripes(void **state)
{
	struct told_options options = usual;
	struct group group;

	(void)state;
	options.placement = LSHARD_STRIPED;
	options.tensor_bytes = 4096 * 6;
	begin(&group, 3, 1, &options);
	each_rank_comes_back(&group);
	end(&group);
}

static void each_rank_comes_back_behind_wrappers(void **state)
{
	struct told_options options = usual;
	struct group group;

	(void)state;
	options.transport = "trace=/dev/null,throttle=1e10,shm:copy";
	begin(&group, 3, 1, &options);
	each_rank_comes_back(&group);
	end(&group);
}

/* Room for large pages: as many as the machine gives, reserved ones where there are some (make check-pages). */
static void each_rank_comes_back_with_large_layers(void **state)
{
	struct told_options options = usual;
	struct group group;

	(void)state;
	options.tensor_bytes = (uint64_t)3 << 20;
	options.layers = 3;
	begin(&group, 3, 1, &options);
	each_rank_comes_back(&group);
	end(&group);
	options.transport = "shm:copy";
	begin(&group, 2, 1, &options);
	each_rank_comes_back(&group);
	end(&group);
	options.transport = "shm";
	options.placement = LSHARD_STRIPED;
	begin(&group, 3, 1, &options);
	each_rank_comes_back(&group);
	end(&group);
}

/* Its windows are mapped from its old process's memory, which only this rank has now; then from nobody's. */
static void all_shards_outlive_their_makers(void **state)
{
	struct group group;

	(void)state;
	begin(&group, 2, 2, &usual);
	restart(&group, 0);
	restart(&group, 1); /* takes both from rank 0, which has made neither */
	restart(&group, 0);
	EXPECT_OK(all_do(&group, TOLD_PASS, 1, 0));
	verify(&group);
	end(&group);
}

/* ---- while the others pass ---- */

static bool is_done(const struct told_rank *told)
{
	struct pollfd polled = {.fd = told->from, .events = POLLIN};

	return poll(&polled, 1, 0) == 1;
}

/* Rank 2 comes back at least fifty times meanwhile. */
static void others_never_wait(void **state)
{
	const uint64_t passes = 100000;
	struct told_options options = usual;
	struct told_reply before[2], after, reply;
	struct group group;
	int times = 0;

	(void)state;
	options.tensor_bytes = 512;
	begin(&group, 3, 1, &options);
	restart(&group, 2);
	verify(&group);
	for (int rank = 0; rank < 2; rank++) {
		before[rank] = told_do(&group.of[rank], TOLD_COUNT, 0, 0);
		assert_true(told_tell(&group.of[rank], TOLD_PASSES, 0, passes));
	}
	while (times < 50 || !is_done(&group.of[0]) || !is_done(&group.of[1])) {
		restart(&group, 2);
		times++;
	}
	for (int rank = 0; rank < 2; rank++) {
		assert_true(told_hear(&group.of[rank], &reply));
		EXPECT_OK(reply);
		assert_true(reply.passes == passes);
		print_message("rank %d: %llu passes, the longest of %.1f ms, while rank 2 came back %d times\n", rank,
			      (unsigned long long)reply.passes, (double)reply.longest_ns * 1e-6, times);
	}
	verify(&group);
	for (int rank = 0; rank < 2; rank++) {
		after = told_do(&group.of[rank], TOLD_COUNT, 0, 0);
		assert_int_equal(after.descriptors, before[rank].descriptors);
		assert_int_equal(after.threads, before[rank].threads);
		assert_int_equal(after.mappings, before[rank].mappings);
	}
	update(&group, 0);
	end(&group);
}

/* ---- several at once ---- */

static void half_come_back_at_once(void **state)
{
	struct group group;
	const struct told_rank *told[2];
	struct told_reply reply;

	(void)state;
	begin(&group, 4, 1, &usual);
	for (int times = 0; times < 5; times++) {
		told_kill(&group.of[1]);
		told_kill(&group.of[2]);
		start_again(&group, 1);
		start_again(&group, 2);
		told[0] = &group.of[1];
		told[1] = &group.of[2];
		reply = told_all(told, 2, TOLD_GROUP, 0, 0);
		EXPECT_OK(reply);
		assert_true(reply.returned);
		EXPECT_OK(told_all(told, 2, TOLD_SERIES, 0, 0));
		EXPECT_OK(told_all(told, 2, TOLD_COMMIT, 0, 0));
		EXPECT_OK(all_do(&group, TOLD_PASS, 0, group.generation));
		verify(&group);
		update(&group, 0);
	}
	end(&group);
}

/* The first two doors are of ranks that have no series yet: who has it is asked as well. */
static void the_first_half_comes_back_at_once(void **state)
{
	struct group group;
	const struct told_rank *told[2];
	struct told_reply reply;

	(void)state;
	begin(&group, 4, 1, &usual);
	told_kill(&group.of[0]);
	told_kill(&group.of[1]);
	start_again(&group, 0);
	start_again(&group, 1);
	told[0] = &group.of[0];
	told[1] = &group.of[1];
	EXPECT_OK(told_all(told, 2, TOLD_GROUP, 0, 0));
	for (int rank = 1; rank >= 0; rank--) {
		reply = told_do(&group.of[rank], TOLD_SERIES, 0, 0);
		EXPECT_OK(reply);
		assert_true(reply.filled);
	}
	EXPECT_OK(told_all(told, 2, TOLD_COMMIT, 0, 0));
	EXPECT_OK(all_do(&group, TOLD_PASS, 0, group.generation));
	verify(&group);
	update(&group, 0);
	end(&group);
}

/* All destroy a series and make another of that name; who came back is first, and the old one is still at the other. */
static void a_series_that_is_made_anew_is_not_recalled(void **state)
{
	struct group group;
	struct told_reply reply;

	(void)state;
	begin(&group, 2, 1, &usual);
	restart(&group, 1);
	EXPECT_OK(told_do(&group.of[1], TOLD_DESTROY, 0, 0));
	assert_true(told_tell(&group.of[1], TOLD_SERIES, 0, 0));
	usleep(200000);
	EXPECT_OK(told_do(&group.of[0], TOLD_DESTROY, 0, 0));
	EXPECT_OK(told_do(&group.of[0], TOLD_SERIES, 0, 0));
	assert_true(told_hear(&group.of[1], &reply));
	EXPECT_OK(reply);
	assert_false(reply.filled);
	EXPECT_OK(all_do(&group, TOLD_COMMIT, 0, 0));
	EXPECT_OK(all_do(&group, TOLD_PASS, 0, 0));
	end(&group);
}

/* ---- leaving ---- */

static void one_that_left_comes_back_in_its_own_process(void **state)
{
	struct group group;
	struct told_reply reply;

	(void)state;
	begin(&group, 2, 1, &usual);
	for (int times = 0; times < 3; times++) {
		EXPECT_OK(told_do(&group.of[0], TOLD_DESTROY, 0, 0));
		EXPECT_OK(told_do(&group.of[0], TOLD_LEAVE, 0, 0));
		EXPECT_OK(told_do(&group.of[1], TOLD_PASS, 0, group.generation));
		reply = told_do(&group.of[0], TOLD_GROUP, 0, 0);
		EXPECT_OK(reply);
		assert_true(reply.returned);
		EXPECT_OK(told_do(&group.of[0], TOLD_SERIES, 0, 0));
		EXPECT_OK(told_do(&group.of[0], TOLD_COMMIT, 0, 0));
		verify(&group);
		update(&group, 0);
	}
	end(&group);
}

/* Nobody has the weights any more: the ranks begin anew, and read them. */
static void where_nobody_lives_ranks_begin_anew(void **state)
{
	struct group group;
	struct told_reply reply;

	(void)state;
	begin(&group, 2, 1, &usual);
	told_kill(&group.of[0]);
	told_kill(&group.of[1]);
	start_again(&group, 0);
	start_again(&group, 1);
	reply = all_do(&group, TOLD_GROUP, 0, 0);
	EXPECT_OK(reply);
	assert_false(reply.returned);
	EXPECT_OK(all_do(&group, TOLD_SERIES, 0, 0));
	reply = all_do(&group, TOLD_COMMIT, 0, 0);
	EXPECT_OK(reply);
	assert_true(reply.called > 0);
	EXPECT_OK(all_do(&group, TOLD_PASS, 0, 0));
	end(&group);
}

/* ---- updates ---- */

static void an_update_without_it_is_refused_and_changes_nothing(void **state)
{
	struct group group;

	(void)state;
	begin(&group, 3, 1, &usual);
	told_kill(&group.of[1]);
	EXPECT_REFUSED(all_do(&group, TOLD_BEGIN, 0, 0), LSHARD_ERR_PEER_FAILED, "rank 1");
	EXPECT_OK(all_do(&group, TOLD_PASS, 0, 0));
	come_back(&group, 1);
	update(&group, 0);
	end(&group);
}

/* Between an update's two calls nobody is let in; afterwards the new bytes are there. */
static void who_comes_in_an_update_waits_for_its_end(void **state)
{
	struct told_options options = usual;
	struct group group;
	struct told_rank early;

	(void)state;
	options.timeout_ms = 1500;
	begin(&group, 3, 1, &options);
	told_kill(&group.of[2]);
	come_back(&group, 2);
	EXPECT_OK(all_do(&group, TOLD_BEGIN, 0, 0));
	told_kill(&group.of[2]);
	told_start(&early, 2, group.size, group.job, &options);
	EXPECT_REFUSED(told_do(&early, TOLD_GROUP, 0, 0), LSHARD_ERR_TIMEOUT, "is loading, updating or verifying");
	told_kill(&early);
	end(&group);
}

/* One counted again is awaited by the others' next call, and named. */
static void one_counted_again_is_awaited(void **state)
{
	struct told_options options = usual;
	struct group group;

	(void)state;
	options.timeout_ms = 700;
	begin(&group, 2, 1, &options);
	restart(&group, 1);
	EXPECT_REFUSED(told_do(&group.of[0], TOLD_BEGIN, 0, 0), LSHARD_ERR_TIMEOUT, "rank 1");
	EXPECT_OK(all_do(&group, TOLD_PASS, 0, 0));
	update(&group, 0);
	end(&group);
}

/* Whoever takes part in an update and dies before it can write: nothing has changed, and it comes back to the same. */
static void a_death_in_an_update_leaves_the_old_bytes(void **state)
{
	struct group group;

	(void)state;
	begin(&group, 3, 1, &usual);
	restart(&group, 1);
	told_kill(&group.of[1]);
	come_back(&group, 1);
	assert_true(told_tell(&group.of[0], TOLD_BEGIN, 0, 0));
	assert_true(told_tell(&group.of[2], TOLD_BEGIN, 0, 0));
	told_kill(&group.of[1]);
	for (int rank = 0; rank < 3; rank += 2) {
		struct told_reply reply;

		assert_true(told_hear(&group.of[rank], &reply));
		EXPECT_REFUSED(reply, LSHARD_ERR_PEER_FAILED, "rank 1");
	}
	EXPECT_OK(all_do(&group, TOLD_PASS, 0, 0));
	come_back(&group, 1);
	update(&group, 0);
	end(&group);
}

/* ---- who is refused ---- */

static void a_number_that_lives_is_not_taken(void **state)
{
	struct told_options options = usual;
	struct group group;
	struct told_rank second;

	(void)state;
	options.timeout_ms = 700;
	begin(&group, 2, 1, &options);
	told_start(&second, 1, 2, group.job, &options);
	EXPECT_REFUSED(told_do(&second, TOLD_GROUP, 0, 0), LSHARD_ERR_TIMEOUT, "its own number");
	told_kill(&second);
	told_start(&second, 1, 3, group.job, &options);
	EXPECT_REFUSED(told_do(&second, TOLD_GROUP, 0, 0), LSHARD_ERR_MISMATCH, "is one of 2 ranks");
	told_kill(&second);
	EXPECT_OK(all_do(&group, TOLD_PASS, 0, 0));
	verify(&group);
	end(&group);
}

static void another_series_is_refused_by_its_first_difference(void **state)
{
	struct told_options options = usual;
	struct group group;

	(void)state;
	begin(&group, 2, 1, &options);
	told_kill(&group.of[1]);
	options.tensor_bytes += 256;
	told_start(&group.of[1], 1, 2, group.job, &options);
	EXPECT_OK(told_do(&group.of[1], TOLD_GROUP, 0, 0));
	EXPECT_REFUSED(told_do(&group.of[1], TOLD_SERIES, 0, 0), LSHARD_ERR_MISMATCH,
		       "bytes of tensor 'weight' is 9000");
	told_kill(&group.of[1]);
	options = usual;
	options.layers++;
	told_start(&group.of[1], 1, 2, group.job, &options);
	EXPECT_OK(told_do(&group.of[1], TOLD_GROUP, 0, 0));
	EXPECT_REFUSED(told_do(&group.of[1], TOLD_SERIES, 0, 0), LSHARD_ERR_MISMATCH, "layer_count is 6 on the ranks");
	told_kill(&group.of[1]);
	options = usual;
	options.transport = "shm:copy";
	told_start(&group.of[1], 1, 2, group.job, &options);
	EXPECT_REFUSED(told_do(&group.of[1], TOLD_GROUP, 0, 0), LSHARD_ERR_MISMATCH, "its ranks that live have 'shm'");
	told_kill(&group.of[1]);
	come_back(&group, 1);
	end(&group);
}

/* A rank that is stopped has its number, and cannot let anybody in. */
static void a_stopped_rank_is_named(void **state)
{
	struct told_options options = usual;
	struct group group;

	(void)state;
	options.timeout_ms = 1500;
	begin(&group, 3, 1, &options);
	told_kill(&group.of[2]);
	kill(group.of[0].pid, SIGSTOP);
	start_again(&group, 2);
	EXPECT_REFUSED(told_do(&group.of[2], TOLD_GROUP, 0, 0), LSHARD_ERR_TIMEOUT, "rank 0");
	kill(group.of[0].pid, SIGCONT);
	told_kill(&group.of[2]);
	come_back(&group, 2);
	verify(&group);
	end(&group);
}

static void transports_that_cannot_say_so(void **state)
{
	struct told_options options = usual;
	struct told_rank only;

	(void)state;
	options.transport = "callback";
	told_start(&only, 0, 2, NULL, &options);
	EXPECT_REFUSED(told_do(&only, TOLD_GROUP, 0, 0), LSHARD_ERR_INVALID, "no way to find the others");
	told_kill(&only);
}

/* What others made after it came back is made with it. */
static void series_that_are_new_are_made_together(void **state)
{
	struct group group;

	(void)state;
	begin(&group, 3, 1, &usual);
	restart(&group, 0);
	restart(&group, 2);
	EXPECT_OK(all_do(&group, TOLD_SERIES, 1, 0));
	EXPECT_OK(all_do(&group, TOLD_COMMIT, 1, 0));
	group.series = 2;
	EXPECT_OK(all_do(&group, TOLD_PASS, 1, 0));
	restart(&group, 1);
	EXPECT_OK(all_do(&group, TOLD_DESTROY, 0, 0));
	EXPECT_OK(all_do(&group, TOLD_SERIES, 2, 0));
	EXPECT_OK(all_do(&group, TOLD_COMMIT, 2, 0));
	EXPECT_OK(all_do(&group, TOLD_PASS, 2, 0));
	end(&group);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(each_rank_comes_back_in_place),
		cmocka_unit_test(each_rank_comes_back_with_windows),
		cmocka_unit_test(each_rank_comes_back_with_stripes),
		cmocka_unit_test(each_rank_comes_back_behind_wrappers),
		cmocka_unit_test(each_rank_comes_back_with_large_layers),
		cmocka_unit_test(all_shards_outlive_their_makers),
		cmocka_unit_test(others_never_wait),
		cmocka_unit_test(half_come_back_at_once),
		cmocka_unit_test(the_first_half_comes_back_at_once),
		cmocka_unit_test(a_series_that_is_made_anew_is_not_recalled),
		cmocka_unit_test(one_that_left_comes_back_in_its_own_process),
		cmocka_unit_test(where_nobody_lives_ranks_begin_anew),
		cmocka_unit_test(an_update_without_it_is_refused_and_changes_nothing),
		cmocka_unit_test(who_comes_in_an_update_waits_for_its_end),
		cmocka_unit_test(one_counted_again_is_awaited),
		cmocka_unit_test(a_death_in_an_update_leaves_the_old_bytes),
		cmocka_unit_test(a_number_that_lives_is_not_taken),
		cmocka_unit_test(another_series_is_refused_by_its_first_difference),
		cmocka_unit_test(a_stopped_rank_is_named),
		cmocka_unit_test(transports_that_cannot_say_so),
		cmocka_unit_test(series_that_are_new_are_made_together),
	};

	return cmocka_run_group_tests_name("rejoin", tests, NULL, NULL);
}
