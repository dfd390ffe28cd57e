/* SPDX-License-Identifier: Apache-2.0
 *
 * conformance_poison.c - the part of the conformance suite about poison: whatever the transport does with its buffers
 * and when, a program sees poison in a window before the wait and after the view, and the right bytes in between.
 */
#include "conformance.h"
#include "patience.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#define LAYERS    7
#define REPLAYS   6
#define SWITCHES  3
#define UNVIEWED  UINT32_MAX
#define ALL_RANKS 3

static struct setting poisoned_setting(lshard_poison poison, lshard_placement placement)
{
	struct setting setting = {.prefetch = 1, .layers = LAYERS, .first_layer = 40, .poison = poison};

	setting_tensors(&setting, MAX_TENSORS, LSHARD_STRIPE_BYTES);
	setting.placement = placement;
	return setting;
}

/* Where ranks read some of the others' layers in place, which ones come through windows is not said. */
static bool is_in_window(struct rank *rank, uint32_t position)
{
	lshard_stats stats = LSHARD_STATS_INIT;
	const uint32_t layer = rank->setting->first_layer + position;

	if (lshard_series_stats(rank->series, &stats) != LSHARD_OK || stats.windows == 0 || ranks_are_mixed(rank))
		return false;
	return rank->setting->placement == LSHARD_STRIPED || !lshard_series_is_source(rank->series, layer);
}

static bool is_poison(struct rank *rank, uint32_t position)
{
	const uint64_t generation = rank->generation;
	bool right;

	rank->generation = POISON;
	right = layer_is_right(rank, position);
	rank->generation = generation;
	return right;
}

static bool same_window(const struct rank *rank, uint32_t one, uint32_t other)
{
	return other != UNVIEWED && rank->addresses[one][0] == rank->addresses[other][0];
}

/* Every window but that of @p viewed, whose layer is seen there, holds poison. */
static bool only_sees(struct rank *rank, uint32_t viewed)
{
	for (uint32_t position = 0; position < LAYERS; position++)
		if (is_in_window(rank, position) && !same_window(rank, position, viewed) && !is_poison(rank, position))
			return false;
	return viewed == UNVIEWED || layer_is_right(rank, viewed);
}

static bool reach_then_wait(struct rank *rank, uint32_t position)
{
	const uint32_t layer = rank->setting->first_layer + position;

	OK_SERIES(rank, lshard_reach(rank->series, layer, rank->stream));
	if (!only_sees(rank, UNVIEWED))
		return false;
	OK_SERIES(rank, lshard_wait(rank->series, layer, rank->stream));
	if (!only_sees(rank, position))
		return false;
	OK_SERIES(rank, lshard_wait(rank->series, layer, rank->stream));
	return only_sees(rank, position);
failed:
	return false;
}

static bool pass_of_views(struct rank *rank)
{
	for (uint32_t position = 0; position < LAYERS; position++)
		if (!reach_then_wait(rank, position))
			return false;
	return true;
}

/* A layer that is in its window already is waited for on a second stream. */
static bool second_stream(struct rank *rank, uint32_t position)
{
	if (!rank->device)
		return true;
	rank->stream = device_stream(rank->device, 1);
	OK_SERIES(rank, lshard_wait(rank->series, rank->setting->first_layer + position, rank->stream));
	if (!layer_is_right(rank, position))
		return false;
	return rank_looked(rank);
failed:
	return false;
}

/* A release ends the view; where another layer needs the window in a view, nothing changes. */
static bool releases_and_refusals(struct rank *rank)
{
	const uint32_t first = rank->setting->first_layer;

	if (!reach_then_wait(rank, 2) || !second_stream(rank, 2))
		return false;
	for (uint32_t position = 0; position < LAYERS; position++) {
		if (position == 2 || !same_window(rank, position, 2))
			continue;
		EXPECT(rank->member, lshard_wait(rank->series, first + position, rank->stream) == LSHARD_ERR_BUSY,
		       "wait");
		if (!only_sees(rank, 2))
			return false;
	}
	OK_SERIES(rank, lshard_release(rank->series, first + 2, rank->stream));
	if (!only_sees(rank, UNVIEWED))
		return false;
	OK_SERIES(rank, lshard_reach(rank->series, first + 2, rank->stream));
	OK_SERIES(rank, lshard_wait(rank->series, first + 2, rank->stream)); /* again */
	return only_sees(rank, 2) && reach_then_wait(rank, 5) && reach_then_wait(rank, 1);
failed:
	return false;
}

/* Whatever else ends a view. */
static bool ends_of_views(struct rank *rank)
{
	OK_SERIES(rank, lshard_series_join(rank->series, rank->stream));
	if (!only_sees(rank, UNVIEWED) || !reach_then_wait(rank, 3))
		return false;
	OK_SERIES(rank, lshard_series_prepare(rank->series, rank->stream));
	if (!only_sees(rank, UNVIEWED) || !reach_then_wait(rank, 3))
		return false;
	OK_SERIES(rank, lshard_series_rewind(rank->series));
	if (!only_sees(rank, UNVIEWED) || !reach_then_wait(rank, 3))
		return false;
	OK_SERIES(rank, lshard_series_verify(rank->series, NULL));
	if (!only_sees(rank, UNVIEWED) || !reach_then_wait(rank, 3))
		return false;
	OK_SERIES(rank, lshard_series_update_begin(rank->series));
	if (!only_sees(rank, UNVIEWED) || !rank_looked(rank))
		return false;
	rank->generation++;
	OK_SERIES(rank, lshard_series_update_end(rank->series, fill_layer, rank));
	return only_sees(rank, UNVIEWED) && pass_of_views(rank);
failed:
	return false;
}

static int views_body(const struct member *member)
{
	const struct setting setting = poisoned_setting(LSHARD_POISON_ON, *(const lshard_placement *)member->user);
	struct rank rank;
	bool right;

	if (!rank_open(&rank, member, &setting))
		return 1;
	right = only_sees(&rank, UNVIEWED) && pass_of_views(&rank) && pass_of_views(&rank) &&
		releases_and_refusals(&rank) && ends_of_views(&rank);
	return rank_close(&rank) && right ? 0 : 1;
}

void poison_is_all_that_is_seen_outside_of_views(void **state)
{
	lshard_placement placements[] = {LSHARD_WHOLE, LSHARD_STRIPED};

	(void)state;
	for (int i = 0; i < 2; i++)
		assert_int_equal(team_run(subject.kind, ALL_RANKS, views_body, &placements[i]), 0);
}

/* ---- Loads that fail ------------------------------------------------------------------------------------------- */

/* Layers pass by on their way into the shards; none is seen in a window. Layer 4 comes when others were loaded. */
static int loading_body(const struct member *member)
{
	const struct setting setting = poisoned_setting(LSHARD_POISON_ON, *(const lshard_placement *)member->user);
	const int fails_at = (int)setting.first_layer + 4;
	lshard_series_options options = rank_series_options(&setting);
	struct rank rank;
	bool right = false;

	if (!rank_group(&rank, member, &setting))
		return 1;
	EXPECT(member, lshard_series_create(rank.group, &options, &rank.series) == LSHARD_OK, "%s",
	       lshard_group_error(rank.group));
	if (!rank_note_addresses(&rank) || !only_sees(&rank, UNVIEWED) || !rank_looked(&rank))
		goto failed;
	rank.fail_at = fails_at;
	EXPECT(member, lshard_series_commit(rank.series, fill_layer, &rank) == LSHARD_ERR_CALLBACK, "commit");
	if (!only_sees(&rank, UNVIEWED) || !rank_looked(&rank))
		goto failed;
	rank.fail_at = -1;
	OK_SERIES(&rank, lshard_series_commit(rank.series, fill_layer, &rank));
	if (!pass_of_views(&rank))
		goto failed;
	OK_SERIES(&rank, lshard_series_update_begin(rank.series));
	rank.fail_at = fails_at;
	EXPECT(member, lshard_series_update_end(rank.series, fill_layer, &rank) == LSHARD_ERR_CALLBACK, "update_end");
	if (!only_sees(&rank, UNVIEWED) || !rank_looked(&rank))
		goto failed;
	rank.fail_at = -1;
	OK_SERIES(&rank, lshard_series_update_end(rank.series, fill_layer, &rank));
	right = pass_of_views(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

void poison_is_all_that_is_seen_around_a_load(void **state)
{
	lshard_placement placements[] = {LSHARD_WHOLE, LSHARD_STRIPED};

	(void)state;
	for (int i = 0; i < 2; i++)
		assert_int_equal(team_run(subject.kind, ALL_RANKS, loading_body, &placements[i]), 0);
}

/* ---- On and off ------------------------------------------------------------------------------------------------ */

/* Some window still shows a layer after the last view, which would be poison. */
static bool shows_something(struct rank *rank)
{
	for (uint32_t position = 0; position < LAYERS; position++)
		if (is_in_window(rank, position) &&
		    is_foretold(rank->addresses[position][0], rank->setting->tensors[0].bytes, rank->generation,
				rank->setting->first_layer + position, 0))
			return true;
	return false;
}

static bool pass_as_usual(struct rank *rank)
{
	const bool any = is_in_window(rank, 0) || is_in_window(rank, 1);

	if (!one_pass(rank))
		return false;
	OK_SERIES(rank, lshard_series_join(rank->series, rank->stream));
	EXPECT(rank->member, rank->device || !any || shows_something(rank), "every window is poisoned");
	return rank_looked(rank);
failed:
	return false;
}

static int switching_body(const struct member *member)
{
	const struct setting setting = poisoned_setting(LSHARD_POISON_READY, *(const lshard_placement *)member->user);
	struct rank rank;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	for (int turn = 0; turn < SWITCHES; turn++) {
		if (!pass_as_usual(&rank))
			goto failed;
		OK_SERIES(&rank, lshard_series_poison(rank.series, 1, rank.stream));
		if (!only_sees(&rank, UNVIEWED) || !pass_of_views(&rank))
			goto failed;
		OK_SERIES(&rank, lshard_series_poison(rank.series, 1, rank.stream)); /* it is: the view goes on */
		if (!only_sees(&rank, LAYERS - 1))
			goto failed;
		OK_SERIES(&rank, lshard_series_poison(rank.series, 0, rank.stream));
	}
	right = pass_as_usual(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

void poison_is_switched_between_passes(void **state)
{
	lshard_placement placements[] = {LSHARD_WHOLE, LSHARD_STRIPED};

	(void)state;
	for (int i = 0; i < 2; i++)
		assert_int_equal(team_run(subject.kind, ALL_RANKS, switching_body, &placements[i]), 0);
}

/* ---- What did not come ----------------------------------------------------------------------------------------- */

/* Rank 1 asks late, in the first pass: the others' wait for the layer ends by the deadline, and the next one is OK. */
static int late_body(const struct member *member)
{
	struct setting setting = poisoned_setting(LSHARD_POISON_ON, LSHARD_STRIPED);
	const uint32_t first = setting.first_layer;
	struct rank rank;
	bool right = false;

	setting.timeout_ms = patience(500);
	if (!rank_open(&rank, member, &setting))
		return 1;
	if (!pass_of_views(&rank))
		goto failed;
	if (member->rank != 1) {
		OK_SERIES(&rank, lshard_reach(rank.series, first + 3, rank.stream));
		EXPECT(member, lshard_wait(rank.series, first + 3, rank.stream) == LSHARD_ERR_TIMEOUT, "wait");
		if (!only_sees(&rank, UNVIEWED))
			goto failed;
	}
	EXPECT(member, team_barrier(member), "a rank failed");
	if (member->rank == 1)
		OK_SERIES(&rank, lshard_reach(rank.series, first + 3, rank.stream));
	EXPECT(member, team_barrier(member), "a rank failed");
	OK_SERIES(&rank, lshard_wait(rank.series, first + 3, rank.stream));
	right = only_sees(&rank, 3);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

void a_layer_that_is_late_stays_poison(void **state)
{
	(void)state;
	if (!subject.collective) {
		does_not_apply(__func__, "one-sided");
		return;
	}
	assert_int_equal(team_run(subject.kind, ALL_RANKS, late_body, NULL), 0);
}

/* ---- Captures -------------------------------------------------------------------------------------------------- */

/* Of each layer its own window alone is looked at, or it would be too much. Each other one is read on both streams. */
static bool captured_pass(struct rank *rank)
{
	for (uint32_t position = 0; position < LAYERS; position++) {
		const uint32_t layer = rank->setting->first_layer + position;

		rank->stream = device_stream(rank->device, 0);
		OK_SERIES(rank, lshard_reach(rank->series, layer, rank->stream));
		if (is_in_window(rank, position) && !is_poison(rank, position))
			return false;
		for (uint32_t stream = 0; stream <= position % 2; stream++) {
			rank->stream = device_stream(rank->device, stream);
			OK_SERIES(rank, lshard_wait(rank->series, layer, rank->stream));
			if (!layer_is_right(rank, position))
				return false;
		}
	}
	return true;
failed:
	return false;
}

/* With the poison as it is now. */
static bool capture_and_replay(struct rank *rank, bool poisoned)
{
	void *graph = NULL;
	bool right = device_capture_begin(rank) && (poisoned ? captured_pass(rank) : one_pass(rank)) &&
		     device_capture_end(rank, &graph);

	for (int replay = 0; right && replay < REPLAYS; replay++)
		right = device_replay(rank, graph) && (replay % 2 || rank_looked(rank));
	right = right && rank_looked(rank);
	device_forget(rank, graph);
	rank->stream = device_stream(rank->device, 0);
	return right && (!poisoned || only_sees(rank, UNVIEWED));
}

static int captured_body(const struct member *member)
{
	const struct setting setting = poisoned_setting(LSHARD_POISON_ON, *(const lshard_placement *)member->user);
	struct rank rank;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	if (!capture_and_replay(&rank, true) || !pass_of_views(&rank))
		goto failed;
	OK_SERIES(&rank, lshard_series_poison(rank.series, 0, rank.stream));
	if (!capture_and_replay(&rank, false))
		goto failed;
	OK_SERIES(&rank, lshard_series_poison(rank.series, 1, rank.stream));
	right = capture_and_replay(&rank, true) && team_barrier(member);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

void poison_belongs_to_captured_passes(void **state)
{
	lshard_placement placements[] = {LSHARD_WHOLE, LSHARD_STRIPED};

	(void)state;
	if (subject.memory != LSHARD_MEMORY_CUDA) {
		does_not_apply(__func__, "no streams");
		return;
	}
	for (int i = 0; i < 2; i++)
		assert_int_equal(team_run(subject.kind, ALL_RANKS, captured_body, &placements[i]), 0);
}
