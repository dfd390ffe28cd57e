/* SPDX-License-Identifier: Apache-2.0
 *
 * conformance_failures.c - the part of the conformance suite in which something goes wrong: misuse, ranks that
 * disagree, callbacks that fail, aborts, ranks that are gone. Each gets its status, a text that names the cause, and
 * leaves the rest usable.
 */
#include "conformance.h"
#include "patience.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

/* ---- Misuse ---------------------------------------------------------------------------------------------------- */

static bool ranges_are_checked(struct rank *rank)
{
	uint32_t below = rank->setting->first_layer - 1, past = rank->setting->first_layer + rank->setting->layers;
	lshard_series *series = rank->series;
	void *address = rank;

	EXPECT(rank->member, lshard_reach(series, below, rank->stream) == LSHARD_ERR_RANGE, "reach below");
	SAYS(rank->member, lshard_series_error(series), "'s'");
	EXPECT(rank->member, lshard_reach(series, past, rank->stream) == LSHARD_ERR_RANGE, "reach past");
	EXPECT(rank->member, lshard_wait(series, past, rank->stream) == LSHARD_ERR_RANGE, "wait");
	EXPECT(rank->member, lshard_release(series, past, rank->stream) == LSHARD_ERR_RANGE, "release");
	EXPECT(rank->member, lshard_series_address(series, past, 0, &address) == LSHARD_ERR_RANGE, "address");
	EXPECT(rank->member, lshard_series_address(series, below + 1, 2, &address) == LSHARD_ERR_RANGE, "tensor");
	EXPECT(rank->member, address == rank, "an address was written on failure");
	EXPECT(rank->member, lshard_series_is_source(series, past) == 0, "source of no layer");
	return true;
failed:
	return false;
}

/* A window with a live view is not taken away; both layers are named. */
static bool views_are_kept(struct rank *rank)
{
	const struct setting *setting = rank->setting;
	lshard_stats stats = LSHARD_STATS_INIT;
	uint32_t seen[2], n_seen = 0;
	char number[16];

	OK_SERIES(rank, lshard_series_stats(rank->series, &stats));
	if (stats.windows != 1 || subject.collective)
		return true;
	for (uint32_t layer = setting->first_layer; n_seen < 2; layer++)
		if (!lshard_series_is_source(rank->series, layer))
			seen[n_seen++] = layer;
	OK_SERIES(rank, lshard_reach(rank->series, seen[0], rank->stream));
	OK_SERIES(rank, lshard_wait(rank->series, seen[0], rank->stream));
	EXPECT(rank->member, lshard_wait(rank->series, seen[1], rank->stream) == LSHARD_ERR_BUSY,
	       "a viewed window was taken");
	for (int i = 0; i < 2; i++) {
		snprintf(number, sizeof number, "%u", seen[i]);
		SAYS(rank->member, lshard_series_error(rank->series), number);
	}
	EXPECT(rank->member, layer_is_right(rank, seen[0] - setting->first_layer), "the view");
	OK_SERIES(rank, lshard_release(rank->series, seen[0], rank->stream));
	OK_SERIES(rank, lshard_wait(rank->series, seen[1], rank->stream));
	return layer_is_right(rank, seen[1] - setting->first_layer);
failed:
	return false;
}

static int misuse_body(const struct member *member)
{
	struct setting setting = plain_setting(member);
	lshard_series_options options;
	struct rank rank;
	void *address;
	bool right = false;

	setting.prefetch = 0;
	options = rank_series_options(&setting);
	if (!rank_group(&rank, member, &setting))
		return 1;
	EXPECT(member, lshard_series_create(rank.group, &options, &rank.series) == LSHARD_OK, "%s",
	       lshard_group_error(rank.group));
	if (!rank_note_addresses(&rank))
		goto failed;
	EXPECT(member, lshard_reach(rank.series, 3, rank.stream) == LSHARD_ERR_STATE, "reach before commit");
	EXPECT(member, lshard_wait(rank.series, 3, rank.stream) == LSHARD_ERR_STATE, "wait before commit");
	EXPECT(member, lshard_series_update_begin(rank.series) == LSHARD_ERR_STATE, "update before commit");
	EXPECT(member, lshard_series_update_end(rank.series, fill_layer, &rank) == LSHARD_ERR_STATE, "update_end");
	EXPECT(member, lshard_group_destroy(rank.group) == LSHARD_ERR_BUSY, "a group with a series was destroyed");
	SAYS(member, lshard_group_error(rank.group), "series");
	OK_SERIES(&rank, lshard_series_commit(rank.series, fill_layer, &rank));
	EXPECT(member, lshard_series_commit(rank.series, fill_layer, &rank) == LSHARD_ERR_STATE, "commit twice");
	EXPECT(member, lshard_series_storage(rank.series, 3, 0, &address) == LSHARD_ERR_STATE, "storage after commit");
	EXPECT(member, lshard_series_update_end(rank.series, fill_layer, &rank) == LSHARD_ERR_STATE,
	       "update_end without update_begin");
	right = ranges_are_checked(&rank) && views_are_kept(&rank);
	EXPECT(member, team_barrier(member), "a rank failed");
	right = right && lshard_series_rewind(rank.series) == LSHARD_OK && one_pass(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

void misuse_has_a_status_and_a_text(void **state)
{
	(void)state;
	assert_int_equal(team_run(subject.kind, 2, misuse_body, NULL), 0);
}

/* ---- Ranks that disagree --------------------------------------------------------------------------------------- */

#define DIFFERENCES 9

/* One field of the last rank is another one; returns what the text must say. */
static const char *change(int difference, lshard_series_options *options, lshard_tensor *tensors)
{
	options->tensors = tensors;
	switch (difference) {
	case 0:
		options->first_layer++;
		return "first_layer";
	case 1:
		options->layer_count++;
		return "layer_count";
	case 2:
		options->placement = LSHARD_STRIPED;
		return "placement";
	case 3:
		options->tensor_count = 1;
		return "tensor_count";
	case 4:
		tensors[1].bytes++;
		return "bytes";
	case 5:
		tensors[1].name = "biases";
		return "biases";
	case 6:
		tensors[0].alignment = 2048;
		return "alignment";
	case 7:
		options->name = "t";
		return "'t'";
	default:
		tensors[0].stripe = LSHARD_STRIPE_ROWS;
		tensors[0].rows = 1;
		return "stripe";
	}
}

static int differing_body(const struct member *member)
{
	struct setting setting = plain_setting(member);
	int32_t odd = member->size - 1;
	struct rank rank;
	bool right = false;

	if (!rank_group(&rank, member, &setting))
		return 1;
	for (int difference = 0; difference < DIFFERENCES; difference++) {
		lshard_series_options options = rank_series_options(&setting), changed = options;
		lshard_tensor tensors[MAX_TENSORS];
		const char *word;
		char name[24];
		lshard_status status;

		memcpy(tensors, setting.tensors, sizeof tensors);
		word = change(difference, &changed, tensors);
		status = lshard_series_create(rank.group, member->rank == odd ? &changed : &options, &rank.series);
		EXPECT(member, status == LSHARD_ERR_MISMATCH, "%s: %s: %s", word, lshard_status_name(status),
		       lshard_group_error(rank.group));
		EXPECT(member, rank.series == NULL, "a series was made");
		SAYS(member, lshard_group_error(rank.group), word);
		snprintf(name, sizeof name, "rank %d", (int)odd);
		SAYS(member, lshard_group_error(rank.group), name);
	}
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

/* The prefetch step is each rank's own business, unless transfers go in step. */
static int own_prefetch_body(const struct member *member)
{
	struct setting setting = plain_setting(member);
	lshard_series_options options;
	struct rank rank;
	lshard_status status;
	bool right = false;

	setting.prefetch = (uint32_t)member->rank;
	options = rank_series_options(&setting);
	if (!subject.collective) {
		if (!rank_open(&rank, member, &setting))
			return 1;
		right = one_pass(&rank) && one_pass(&rank);
		return rank_close(&rank) && right ? 0 : 1;
	}
	if (!rank_group(&rank, member, &setting))
		return 1;
	status = lshard_series_create(rank.group, &options, &rank.series);
	EXPECT(member, status == LSHARD_ERR_MISMATCH, "%s", lshard_status_name(status));
	SAYS(member, lshard_group_error(rank.group), "prefetch");
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

void differing_options_are_named(void **state)
{
	(void)state;
	assert_int_equal(team_run(subject.kind, 3, differing_body, NULL), 0);
	assert_int_equal(team_run(subject.kind, 3, own_prefetch_body, NULL), 0);
}

/* ---- Callbacks that fail --------------------------------------------------------------------------------------- */

static int callback_body(const struct member *member)
{
	struct setting setting = plain_setting(member);
	lshard_series_options options;
	struct rank rank;
	lshard_status status;
	bool right = false;

	setting.placement = *(const lshard_placement *)member->user;
	options = rank_series_options(&setting);
	if (!rank_group(&rank, member, &setting))
		return 1;
	EXPECT(member, lshard_series_create(rank.group, &options, &rank.series) == LSHARD_OK, "%s",
	       lshard_group_error(rank.group));
	if (!rank_note_addresses(&rank))
		goto failed;
	rank.fail_at = 7; /* on its source, rank 1 of 3 */
	status = lshard_series_commit(rank.series, fill_layer, &rank);
	EXPECT(member, status == LSHARD_ERR_CALLBACK, "%s: %s", lshard_status_name(status),
	       lshard_series_error(rank.series));
	SAYS(member, lshard_series_error(rank.series), "rank 1");
	EXPECT(member, lshard_reach(rank.series, 3, rank.stream) == LSHARD_ERR_STATE, "committed after all");
	rank.fail_at = -1;
	OK_SERIES(&rank, lshard_series_commit(rank.series, fill_layer, &rank));
	right = one_pass(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

void a_failing_callback_is_seen_by_all(void **state)
{
	lshard_placement placements[] = {LSHARD_WHOLE, LSHARD_STRIPED};

	(void)state;
	for (int i = 0; i < 2; i++)
		assert_int_equal(team_run(subject.kind, 3, callback_body, &placements[i]), 0);
}

/* ---- Abort ----------------------------------------------------------------------------------------------------- */

static void *abort_soon(void *group)
{
	nanosleep(&(struct timespec){0, 100000000}, NULL);
	lshard_group_abort(group);
	return NULL;
}

static uint64_t seconds_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec;
}

/* Rank 0 waits for ranks that do not come, until it is aborted; they see it as gone. */
static int abort_body(const struct member *member)
{
	struct setting setting = plain_setting(member);
	struct rank rank;
	pthread_t aborter;
	lshard_status status;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	if (member->rank == 0) {
		uint64_t began = seconds_now();

		if (pthread_create(&aborter, NULL, abort_soon, rank.group) != 0)
			goto failed;
		status = lshard_series_update_begin(rank.series);
		pthread_join(aborter, NULL);
		EXPECT(member, status == LSHARD_ERR_ABORTED, "%s", lshard_status_name(status));
		EXPECT(member, seconds_now() - began < LONG_MS / 2000, "it took until the deadline");
		EXPECT(member, lshard_reach(rank.series, 3, rank.stream) == LSHARD_ERR_ABORTED, "reach after abort");
		EXPECT(member, lshard_wait(rank.series, 3, rank.stream) == LSHARD_ERR_ABORTED, "wait after abort");
	}
	EXPECT(member, team_barrier(member), "a rank failed");
	if (member->rank != 0) {
		status = lshard_series_update_begin(rank.series);
		EXPECT(member, status == LSHARD_ERR_PEER_FAILED, "%s", lshard_status_name(status));
		SAYS(member, lshard_series_error(rank.series), "rank 0");
	}
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

void abort_ends_a_blocked_call(void **state)
{
	(void)state;
	assert_int_equal(team_run(subject.kind, 3, abort_body, NULL), 0);
}

/* ---- A rank that is gone --------------------------------------------------------------------------------------- */

/* One-sided: nothing is missing in a pass. In step: the pass ends with PEER_FAILED or TIMEOUT, not with a hang. */
static bool passes_without_a_rank(struct rank *rank)
{
	lshard_status status = LSHARD_OK;

	if (!subject.collective)
		return one_pass(rank) && one_pass(rank);
	for (uint32_t step = 0; status == LSHARD_OK && step < 2 * rank->setting->layers; step++) {
		uint32_t layer = rank->setting->first_layer + step % rank->setting->layers;

		status = lshard_reach(rank->series, layer, rank->stream);
		if (status == LSHARD_OK)
			status = lshard_wait(rank->series, layer, rank->stream);
	}
	EXPECT(rank->member, status == LSHARD_ERR_PEER_FAILED || status == LSHARD_ERR_TIMEOUT, "%s",
	       lshard_status_name(status));
	return true;
failed:
	return false;
}

/* Rank 1 is killed, or where ranks are threads leaves without a word. */
static void leave(struct rank *rank)
{
	if (strcmp(subject.kind, "forks") == 0) {
		team_dies(rank->member);
		raise(SIGKILL);
	}
	rank_close(rank);
}

static int gone_body(const struct member *member)
{
	struct setting setting = plain_setting(member);
	struct rank rank;
	lshard_status status;
	bool right = false;

	setting.placement = *(const lshard_placement *)member->user;
	setting.timeout_ms = subject.collective ? patience(3000) : LONG_MS;
	if (!rank_open(&rank, member, &setting))
		return 1;
	right = one_pass(&rank);
	if (!team_barrier(member))
		right = false;
	if (member->rank == 1) {
		leave(&rank);
		return !right;
	}
	nanosleep(&(struct timespec){0, 50000000}, NULL);
	right = passes_without_a_rank(&rank) && right;
	status = lshard_series_update_begin(rank.series);
	EXPECT(member, status == LSHARD_ERR_PEER_FAILED, "%s: %s", lshard_status_name(status),
	       lshard_series_error(rank.series));
	SAYS(member, lshard_series_error(rank.series), "rank 1");
	if (!subject.callbacks)
		SAYS(member, lshard_series_error(rank.series), "4"); /* a layer of its */
	right = right && (subject.collective || one_pass(&rank));
	return rank_close(&rank) && right ? 0 : 1;
failed:
	rank_close(&rank);
	return 1;
}

void the_others_go_on_without_a_rank(void **state)
{
	lshard_placement placements[] = {LSHARD_WHOLE, LSHARD_STRIPED};

	(void)state;
	for (int i = 0; i < 2; i++)
		assert_int_equal(team_run(subject.kind, 3, gone_body, &placements[i]), 0);
}
