/* SPDX-License-Identifier: Apache-2.0
 *
 * conformance_walks.c - the part of the conformance suite in which nothing goes wrong: whatever way a program takes
 * through the layers, it sees the right bytes, at fixed addresses, in no more memory and with no more transfers than
 * was planned.
 */
#include "conformance.h"
#include "patience.h"

#include <layershard/plan.h>

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

/* What ranks tell the test. */
struct told {
	uint64_t hash;
	uint64_t shard_bytes;
	uint64_t layer_bytes;
};

struct walk {
	struct setting setting;
	struct told told[MAX_RANKS];
};

static uint32_t smaller(uint32_t one, uint32_t other)
{
	return one < other ? one : other;
}

/* ---- What was built is what was planned ------------------------------------------------------------------------ */

/* The plan for this rank. The granule is the transport's own affair: the one whose layers are as large as those built.
 */
static bool plan_of(const struct rank *rank, const lshard_stats *stats, lshard_plan_result *plan)
{
	static const uint64_t granules[] = {256, 4096, 65536, 2 << 20};
	lshard_series_options options = rank_series_options(rank->setting);
	lshard_plan_input input = LSHARD_PLAN_INPUT_INIT;

	input.rank = rank->member->rank;
	input.size = rank->member->size;
	input.collective = subject.collective;
	input.direct = rank_reaches(rank) > 1;
	for (size_t i = 0; i < sizeof granules / sizeof granules[0]; i++) {
		input.granule_bytes = granules[i];
		*plan = (lshard_plan_result)LSHARD_PLAN_RESULT_INIT;
		EXPECT(rank->member, lshard_plan(&options, &input, plan) == LSHARD_OK, "plan");
		if (plan->layer_bytes == stats->layer_bytes && plan->shard_bytes == stats->shard_bytes)
			return true;
	}
	EXPECT(rank->member, false, "built layer %llu share %llu, planned last %llu %llu",
	       (unsigned long long)stats->layer_bytes, (unsigned long long)stats->shard_bytes,
	       (unsigned long long)plan->layer_bytes, (unsigned long long)plan->shard_bytes);
failed:
	return false;
}

/* Beside each window another one, and the poison. */
static uint64_t most_buffers(uint32_t windows)
{
	return subject.poison ? windows * (uint64_t)2 + 1 : windows;
}

static uint32_t layers_elsewhere(const struct rank *rank)
{
	uint32_t elsewhere = 0;

	for (uint32_t position = 0; position < rank->setting->layers; position++)
		elsewhere += rank->setting->placement == LSHARD_STRIPED ||
			     !lshard_series_is_source(rank->series, rank->setting->first_layer + position);
	return elsewhere;
}

static bool is_built_as_planned(struct rank *rank, struct told *told)
{
	lshard_stats stats = LSHARD_STATS_INIT;
	lshard_plan_result plan;

	OK_SERIES(rank, lshard_series_stats(rank->series, &stats));
	told->shard_bytes = stats.shard_bytes;
	told->layer_bytes = stats.layer_bytes;
	EXPECT(rank->member, stats.windows <= smaller(rank->setting->prefetch + 1, layers_elsewhere(rank)),
	       "%u windows", stats.windows);
	if (ranks_are_mixed(rank))
		return true; /* the planner knows all or nothing */
	if (!plan_of(rank, &stats, &plan))
		goto failed;
	EXPECT(rank->member, stats.windows == plan.windows, "%u windows, planned %u", stats.windows, plan.windows);
	EXPECT(rank->member, stats.window_bytes == plan.window_bytes, "%llu bytes of windows",
	       (unsigned long long)stats.window_bytes);
	EXPECT(rank->member, stats.window_bytes <= most_buffers(stats.windows) * (stats.layer_bytes + 4096),
	       "%llu bytes of windows", (unsigned long long)stats.window_bytes);
	EXPECT(rank->member, stats.residents == plan.residents && stats.resident_bytes == plan.resident_bytes,
	       "%u residents, planned %u", stats.residents, plan.residents);
	EXPECT(rank->member, stats.fetched_layers == plan.fetched_layers && stats.below_k_count == plan.below_k_count,
	       "%u fetched (%u below k), planned %u (%u)", stats.fetched_layers, stats.below_k_count,
	       plan.fetched_layers, plan.below_k_count);
	EXPECT(rank->member,
	       rank->setting->resident_bytes != UINT64_MAX || rank_reaches(rank) > 1 || stats.fetched_layers == 0,
	       "all resident, yet %u are fetched", stats.fetched_layers);
	return true;
failed:
	return false;
}

static bool was_processed_once(struct rank *rank, uint32_t times)
{
	for (uint32_t position = 0; position < rank->setting->layers; position++) {
		uint32_t layer = rank->setting->first_layer + position;
		uint32_t due = lshard_series_is_source(rank->series, layer) ? times : 0;

		EXPECT(rank->member,
		       lshard_series_is_source(rank->series, layer) ==
			       (layer % (uint32_t)rank->member->size == (uint32_t)rank->member->rank),
		       "layer %u has another source", layer);
		EXPECT(rank->member, rank->calls[position] == due, "layer %u was processed %u times, due %u", layer,
		       rank->calls[position], due);
	}
	return true;
failed:
	return false;
}

/* ---- Ways through the layers ----------------------------------------------------------------------------------- */

static bool count(struct rank *rank, lshard_stats *stats)
{
	*stats = (lshard_stats)LSHARD_STATS_INIT;
	OK_SERIES(rank, lshard_series_stats(rank->series, stats));
	return true;
failed:
	return false;
}

/* After a pass to warm up, each pass costs the transfers of fetched_layers and no miss. */
static bool steady_passes(struct rank *rank, int passes)
{
	lshard_stats before, after;

	if (!one_pass(rank) || !visit(rank, 0) || !count(rank, &before))
		return false;
	for (int pass = 0; pass < passes; pass++) {
		for (uint32_t position = 1; position < rank->setting->layers; position++)
			if (!visit(rank, position))
				return false;
		if (!visit(rank, 0))
			return false;
	}
	if (!count(rank, &after))
		return false;
	EXPECT(rank->member, after.misses == before.misses, "%llu misses in steady passes",
	       (unsigned long long)(after.misses - before.misses));
	EXPECT(rank->member, after.fetches - before.fetches == (uint64_t)passes * after.fetched_layers,
	       "%llu transfers in %d passes of %u", (unsigned long long)(after.fetches - before.fetches), passes,
	       after.fetched_layers);
	EXPECT(rank->member, after.reaches - before.reaches == (uint64_t)passes * rank->setting->layers, "reaches");
	return true;
failed:
	return false;
}

/* Wait without reach; the window may be in use, which is said and changes nothing. */
static bool wait_only(struct rank *rank, uint32_t position)
{
	lshard_status status = lshard_wait(rank->series, rank->setting->first_layer + position, rank->stream);

	EXPECT(rank->member, status == LSHARD_OK || status == LSHARD_ERR_BUSY, "%s", lshard_series_error(rank->series));
	return status == LSHARD_ERR_BUSY || layer_is_right(rank, position);
failed:
	return false;
}

/* Jumps, repeats, skips, releases, waits alone. Where transfers go in step, all ranks draw the same way, and reach
 * first. */
static bool wander(struct rank *rank, uint32_t steps)
{
	const struct setting *setting = rank->setting;
	uint64_t state = setting->seed + (subject.collective ? 0 : (uint64_t)rank->member->rank * 977);

	for (uint32_t step = 0; step < steps; step++) {
		uint32_t position = (uint32_t)(random_next(&state) % setting->layers);
		uint32_t layer = setting->first_layer + position;
		uint32_t action = (uint32_t)(random_next(&state) % 8);

		if (action == 0)
			OK_SERIES(rank, lshard_reach(rank->series, layer, rank->stream));
		else if (action == 1)
			OK_SERIES(rank, lshard_release(rank->series, layer, rank->stream));
		else if (action == 2 && !subject.collective) {
			if (!wait_only(rank, position))
				return false;
		} else if (!visit(rank, position) || (action == 3 && !visit(rank, position)))
			return false;
		if (action == 4)
			OK_SERIES(rank, lshard_release(rank->series, layer, rank->stream));
	}
	return true;
failed:
	return false;
}

/* New bytes: nobody sees them before all are ready, everybody after. */
static bool renew(struct rank *rank)
{
	lshard_stats stats;

	OK_SERIES(rank, lshard_series_update_begin(rank->series));
	EXPECT(rank->member, lshard_reach(rank->series, rank->setting->first_layer, rank->stream) == LSHARD_ERR_STATE,
	       "reach during an update");
	rank->generation++;
	OK_SERIES(rank, lshard_series_update_end(rank->series, fill_layer, rank));
	if (!one_pass(rank) || !count(rank, &stats))
		return false;
	EXPECT(rank->member, stats.generation == rank->generation, "generation %llu",
	       (unsigned long long)stats.generation);
	return was_processed_once(rank, 1 + (uint32_t)rank->generation);
failed:
	return false;
}

static bool walk(struct rank *rank, struct told *told)
{
	if (!is_built_as_planned(rank, told) || !was_processed_once(rank, 1))
		return false;
	if (!steady_passes(rank, 2) || !wander(rank, 2 * rank->setting->layers + 8))
		return false;
	OK_SERIES(rank, lshard_series_prepare(rank->series, rank->stream));
	if (!one_pass(rank))
		return false;
	OK_SERIES(rank, lshard_series_join(rank->series, rank->stream));
	OK_SERIES(rank, lshard_series_rewind(rank->series));
	if (!steady_passes(rank, 1))
		return false;
	OK_SERIES(rank, lshard_series_verify(rank->series, &told->hash));
	return renew(rank) && wander(rank, rank->setting->layers) && steady_passes(rank, 1);
failed:
	return false;
}

static int walk_body(const struct member *member)
{
	struct walk *shared = member->user;
	struct rank rank;
	bool right;

	if (!rank_open(&rank, member, &shared->setting))
		return 1;
	right = walk(&rank, &shared->told[member->rank]);
	return rank_close(&rank) && right ? 0 : 1;
}

/* ---- The configurations ---------------------------------------------------------------------------------------- */

/* Number @p index of the sample: sizes in turn, the rest drawn from a fixed seed. */
static void draw_setting(struct setting *setting, uint32_t index)
{
	static const int32_t sizes[] = {1, 2, 3, 4, 7};
	static const uint32_t prefetches[] = {0, 1, 2, 5, 29};
	static const uint32_t layers[] = {1, 2, 3, 7, 19, 31};
	static const uint32_t firsts[] = {0, 3, 40};
	static const lshard_stripe stripes[] = {LSHARD_STRIPE_BYTES, LSHARD_STRIPE_ROWS, LSHARD_STRIPE_COLUMNS};
	uint64_t state =
		4711 + index / 4; /* four in a row see the same layers, by different numbers of ranks and windows */

	memset(setting, 0, sizeof *setting);
	setting->layers = layers[random_next(&state) % 6];
	setting->first_layer = firsts[random_next(&state) % 3];
	setting_tensors(setting, 1 + (uint32_t)(random_next(&state) % MAX_TENSORS), stripes[random_next(&state) % 3]);
	state = 815 + index;
	setting->size = sizes[index % 5];
	setting->prefetch = prefetches[random_next(&state) % 5];
	setting->placement = index % 2 ? LSHARD_STRIPED : LSHARD_WHOLE;
	setting->resident_bytes = index % 3 == 0 ? 0 : index % 7 == 0 ? UINT64_MAX : random_next(&state) % 4 * 8192;
	setting->seed = state;
}

static uint64_t stored_bytes(const struct setting *setting)
{
	uint64_t bytes = 0;

	for (uint32_t tensor = 0; tensor < setting->n_tensors; tensor++)
		bytes += setting->tensors[tensor].bytes;
	return bytes * setting->layers;
}

/* The ranks' shards together are the series once, and all ranks saw the same. */
static void check_told(const struct walk *walk)
{
	uint64_t shards = 0;

	for (int32_t rank = 0; rank < walk->setting.size; rank++) {
		assert_int_equal(walk->told[rank].hash, walk->told[0].hash);
		assert_int_equal(walk->told[rank].layer_bytes, walk->told[0].layer_bytes);
		shards += walk->told[rank].shard_bytes;
	}
	assert_true(shards >= stored_bytes(&walk->setting));
	/* granules: at most one per rank and layer stripe or share */
	assert_true(shards <= walk->setting.layers *
				      (walk->told[0].layer_bytes + (uint64_t)walk->setting.size * MAX_TENSORS * 4096));
}

void walks_give_the_right_bytes(void **state)
{
	struct walk *walk = shared_new(sizeof *walk);
	uint64_t hash = 0;

	(void)state;
	for (uint32_t index = 0; index < subject.configurations; index++) {
		int failures;

		draw_setting(&walk->setting, index);
		failures = team_run(subject.kind, walk->setting.size, walk_body, walk);
		if (failures)
			fail_msg("configuration %u: %d of %d ranks failed", index, failures, (int)walk->setting.size);
		check_told(walk);
		if (index % 4 == 0)
			hash = walk->told[0].hash;
		assert_int_equal(walk->told[0].hash, hash); /* whatever the ranks, windows and placement */
	}
	shared_free(walk, sizeof *walk);
	printf("%s, %s: %u configurations\n", subject.spec, subject.kind, subject.configurations);
}

/* ---- Two series ------------------------------------------------------------------------------------------------ */

static bool interleave(struct rank *one, struct rank *other)
{
	for (uint32_t pass = 0; pass < 3; pass++)
		for (uint32_t position = 0; position < one->setting->layers; position++) {
			if (!visit(one, position))
				return false;
			if (position < other->setting->layers && !visit(other, position))
				return false;
			if (!layer_is_right(one, position)) /* its view still holds */
				return false;
		}
	return true;
}

/* Another series in the group of @p rank. */
static bool second_series(struct rank *second, const struct rank *rank, const struct setting *setting)
{
	lshard_series_options options = rank_series_options(setting);

	*second = (struct rank){
		.member = rank->member, .setting = setting, .group = rank->group, .fail_at = -1, .generation = 9};
	second->device = rank->device;
	second->stream = rank->stream;
	options.name = "other";
	EXPECT(rank->member, lshard_series_create(rank->group, &options, &second->series) == LSHARD_OK, "%s",
	       lshard_group_error(rank->group));
	if (!rank_note_addresses(second))
		goto failed;
	OK_SERIES(second, lshard_series_commit(second->series, fill_layer, second));
	return true;
failed:
	lshard_series_destroy(second->series);
	return false;
}

static int two_series_body(const struct member *member)
{
	struct setting first = {.size = member->size, .prefetch = 1, .layers = 7, .first_layer = 40};
	struct setting other = {.size = member->size, .prefetch = 2, .layers = 5, .placement = LSHARD_STRIPED};
	struct rank one, two;
	bool right = false;

	setting_tensors(&first, 2, LSHARD_STRIPE_BYTES);
	setting_tensors(&other, 3, LSHARD_STRIPE_ROWS);
	if (!rank_open(&one, member, &first))
		return 1;
	if (second_series(&two, &one, &other)) {
		right = interleave(&one, &two);
		EXPECT(member, lshard_group_destroy(one.group) == LSHARD_ERR_BUSY, "a group with series was destroyed");
		right = right && lshard_series_destroy(two.series) == LSHARD_OK && one_pass(&one);
	}
failed:
	return rank_close(&one) && right ? 0 : 1;
}

void two_series_do_not_disturb_each_other(void **state)
{
	(void)state;
	assert_int_equal(team_run(subject.kind, 3, two_series_body, NULL), 0);
}

/* ---- At everyone's own speed ----------------------------------------------------------------------------------- */

/* Rank r makes 2r passes, the first none; those still reading see the old bytes while others wait for the update. */
static int own_speed_body(const struct member *member)
{
	struct setting setting = {.size = member->size, .prefetch = 1, .layers = 19, .first_layer = 3};
	struct rank rank;
	bool right = true;

	setting_tensors(&setting, 3, LSHARD_STRIPE_BYTES);
	setting.placement = *(const lshard_placement *)member->user;
	if (!rank_open(&rank, member, &setting))
		return 1;
	for (int32_t pass = 0; right && pass < 2 * member->rank; pass++)
		right = one_pass(&rank);
	right = right && renew(&rank) && team_barrier(member);
	return rank_close(&rank) && right ? 0 : 1;
}

void ranks_need_no_lockstep(void **state)
{
	lshard_placement placements[] = {LSHARD_WHOLE, LSHARD_STRIPED};

	(void)state;
	if (subject.collective) {
		does_not_apply(__func__, "collective");
		return;
	}
	for (int i = 0; i < 2; i++)
		assert_int_equal(team_run(subject.kind, 4, own_speed_body, &placements[i]), 0);
}

/* On a collective transport a rank that goes another way is found out, and rewind brings all together again. */
static int out_of_step_body(const struct member *member)
{
	struct setting setting = {.size = member->size, .prefetch = 1, .layers = 9, .timeout_ms = patience(1500)};
	struct rank rank;
	lshard_status status = LSHARD_OK;
	bool right = false;

	setting_tensors(&setting, 1, LSHARD_STRIPE_BYTES);
	setting.placement = LSHARD_STRIPED;
	if (!rank_open(&rank, member, &setting))
		return 1;
	if (!one_pass(&rank))
		goto failed;
	for (uint32_t step = 0; status == LSHARD_OK && step < 9; step++) {
		uint32_t layer = (member->rank == 1 ? 9 - step : step) % 9;

		status = lshard_reach(rank.series, layer, rank.stream);
		if (status == LSHARD_OK)
			status = lshard_wait(rank.series, layer, rank.stream);
	}
	EXPECT(member, status == LSHARD_ERR_OUT_OF_STEP || status == LSHARD_ERR_TIMEOUT, "%s",
	       lshard_status_name(status));
	EXPECT(member, team_barrier(member), "a rank failed");
	OK_SERIES(&rank, lshard_series_rewind(rank.series));
	right = one_pass(&rank) && one_pass(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

void out_of_step_is_found_and_cured(void **state)
{
	(void)state;
	if (!subject.collective) {
		does_not_apply(__func__, "one-sided");
		return;
	}
	assert_int_equal(team_run(subject.kind, 3, out_of_step_body, NULL), 0);
}
