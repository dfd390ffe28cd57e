/* SPDX-License-Identifier: Apache-2.0
 *
 * conformance_memory.c - the part of the conformance suite about where bytes lie: written in place by their source,
 * stripes used as shards, and memory of the caller's.
 */
#include "conformance.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* ---- In place -------------------------------------------------------------------------------------------------- */

/* Write this rank's layers where they will stay. */
static bool write_in_place(struct rank *rank)
{
	const struct setting *setting = rank->setting;

	for (uint32_t position = 0; position < setting->layers; position++) {
		uint32_t layer = setting->first_layer + position;
		void *tensors[MAX_TENSORS] = {NULL};

		for (uint32_t tensor = 0; tensor < setting->n_tensors; tensor++) {
			lshard_status status = lshard_series_storage(rank->series, layer, tensor, &tensors[tensor]);
			lshard_status due =
				lshard_series_is_source(rank->series, layer) ? LSHARD_OK : LSHARD_ERR_NOT_SUPPORTED;

			EXPECT(rank->member, status == due, "storage of layer %u: %s", layer,
			       lshard_status_name(status));
		}
		if (lshard_series_is_source(rank->series, layer))
			fill_layer(rank, layer, tensors);
	}
	return true;
failed:
	return false;
}

static int in_place_body(const struct member *member)
{
	struct setting setting = {.prefetch = 1, .layers = 8, .first_layer = 3};
	lshard_series_options options;
	struct rank rank;
	bool right = false;

	setting_tensors(&setting, 3, LSHARD_STRIPE_BYTES);
	options = rank_series_options(&setting);
	if (!rank_group(&rank, member, &setting))
		return 1;
	EXPECT(member, lshard_series_create(rank.group, &options, &rank.series) == LSHARD_OK, "%s",
	       lshard_group_error(rank.group));
	if (!rank_note_addresses(&rank) || !write_in_place(&rank))
		goto failed;
	OK_SERIES(&rank, lshard_series_commit(rank.series, NULL, NULL));
	if (!one_pass(&rank))
		goto failed;
	OK_SERIES(&rank, lshard_series_update_begin(rank.series));
	rank.generation++;
	if (!write_in_place(&rank))
		goto failed;
	OK_SERIES(&rank, lshard_series_update_end(rank.series, NULL, NULL));
	right = one_pass(&rank) && one_pass(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

void sources_may_write_in_place(void **state)
{
	(void)state;
	assert_int_equal(team_run(subject.kind, 3, in_place_body, NULL), 0);
}

/* ---- Stripes --------------------------------------------------------------------------------------------------- */

/* The slice that lies at @p address is that of the whole tensor. */
static bool is_slice(struct rank *rank, uint32_t layer, uint32_t tensor, const unsigned char *address,
		     const lshard_range *range)
{
	const lshard_tensor *described = &rank->setting->tensors[tensor];
	uint64_t row_bytes = described->bytes / described->rows;
	bool by_rows = described->stripe == LSHARD_STRIPE_ROWS;
	uint64_t first = by_rows ? range->begin : 0, last = by_rows ? range->end : described->rows;
	uint64_t from = by_rows ? 0 : range->begin, to = by_rows ? row_bytes : range->end;
	uint64_t span = first < last && from < to ? (last - first - 1) * range->row_bytes + to - from : 0;
	unsigned char *whole = malloc(described->bytes), *slice = malloc(span + 1);
	bool same = whole && slice && (span == 0 || rank_read(rank, slice, address, span));

	if (whole)
		foretell(whole, described->bytes, rank->generation, layer, tensor);
	for (uint64_t row = first; same && span && row < last; row++)
		same = memcmp(slice + (row - first) * range->row_bytes, whole + row * row_bytes + from, to - from) == 0;
	free(slice);
	free(whole);
	return same;
}

static bool stripe_is_right(struct rank *rank, uint32_t layer, uint32_t tensor)
{
	const lshard_tensor *described = &rank->setting->tensors[tensor];
	uint64_t number = (uint64_t)rank->member->rank, size = (uint64_t)rank->member->size;
	uint64_t begin = described->rows * number / size, end = described->rows * (number + 1) / size;
	void *address = NULL;
	lshard_range range = LSHARD_RANGE_INIT;
	lshard_status status = lshard_series_stripe(rank->series, layer, tensor, &address, &range);

	if (described->stripe == LSHARD_STRIPE_BYTES) {
		EXPECT(rank->member, status == LSHARD_ERR_NOT_SUPPORTED, "%s", lshard_status_name(status));
		return true;
	}
	OK_SERIES(rank, status);
	if (described->stripe == LSHARD_STRIPE_ROWS)
		EXPECT(rank->member, range.end - range.begin == end - begin && (begin == end || range.begin == begin),
		       "rows [%llu, %llu)", (unsigned long long)range.begin, (unsigned long long)range.end);
	else
		EXPECT(rank->member,
		       range.begin % described->column_bytes == 0 && range.end % described->column_bytes == 0,
		       "bytes [%llu, %llu) cut a column", (unsigned long long)range.begin,
		       (unsigned long long)range.end);
	EXPECT(rank->member, is_slice(rank, layer, tensor, address, &range), "the stripe of layer %u has wrong bytes",
	       layer);
	return true;
failed:
	return false;
}

/* Whatever the windows do, the stripes stay. */
static bool stripes_stay(struct rank *rank)
{
	const struct setting *setting = rank->setting;
	bool right = rank_series(rank) && one_pass(rank) && one_pass(rank);

	for (uint32_t position = 0; right && position < setting->layers; position++)
		for (uint32_t tensor = 0; right && tensor < setting->n_tensors; tensor++)
			right = stripe_is_right(rank, setting->first_layer + position, tensor);
	right = lshard_series_destroy(rank->series) == LSHARD_OK && right;
	rank->series = NULL;
	return right;
}

static int stripes_body(const struct member *member)
{
	static const lshard_stripe stripes[] = {LSHARD_STRIPE_ROWS, LSHARD_STRIPE_COLUMNS, LSHARD_STRIPE_BYTES};
	struct setting setting = {.prefetch = 1, .layers = 5, .first_layer = 40, .placement = LSHARD_STRIPED};
	struct rank rank;
	bool right = true;

	if (!rank_group(&rank, member, &setting))
		return 1;
	for (int i = 0; right && i < 3; i++) {
		setting_tensors(&setting, 3, stripes[i]);
		right = stripes_stay(&rank) && rank_looked(&rank);
	}
	return rank_close(&rank) && right ? 0 : 1;
}

void stripes_are_shards(void **state)
{
	(void)state;
	for (int32_t size = 2; size <= MAX_RANKS; size++) /* 7: more ranks than rows */
		assert_int_equal(team_run(subject.kind, size, stripes_body, NULL), 0);
}

/* ---- Layers of many pages -------------------------------------------------------------------------------------- */

/* Large enough for stripes that are mapped rather than copied, and a multiple of nothing. */
static int large_body(const struct member *member)
{
	struct setting setting = {.prefetch = 1, .layers = 4, .first_layer = 5, .n_tensors = 1};
	struct rank rank;
	uint64_t hash = 0;
	bool right = false;

	setting.placement = *(const lshard_placement *)member->user;
	setting.tensors[0] = (lshard_tensor){"weight", 7339999, 0, LSHARD_STRIPE_BYTES, 0, 0};
	if (!rank_open(&rank, member, &setting))
		return 1;
	if (!one_pass(&rank) || !one_pass(&rank))
		goto failed;
	OK_SERIES(&rank, lshard_series_verify(rank.series, &hash));
	OK_SERIES(&rank, lshard_series_update_begin(rank.series));
	rank.generation++;
	OK_SERIES(&rank, lshard_series_update_end(rank.series, fill_layer, &rank));
	right = one_pass(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

void layers_of_many_pages_are_right(void **state)
{
	lshard_placement placements[] = {LSHARD_WHOLE, LSHARD_STRIPED};

	(void)state;
	for (int i = 0; i < 2; i++)
		assert_int_equal(team_run(subject.kind, 3, large_body, &placements[i]), 0);
}

/* ---- The caller's memory --------------------------------------------------------------------------------------- */

/* What one rank's source gave and got back; others may give shards back, from their threads. */
struct purse {
	struct rank *rank;
	void *blocks[3]; /* by purpose; what is given lies inside */
	atomic_int given[3];
	atomic_int returned[3];
};

static bool spoil_bytes(struct rank *rank, void *memory, size_t bytes)
{
	void *spoilt = malloc(bytes);
	bool right = spoilt && memset(spoilt, 0xa5, bytes) && rank_write(rank, memory, spoilt, bytes);

	free(spoilt);
	return right;
}

/* Not zeroed: nobody promised that. */
static void *purse_allocate(void *user, lshard_purpose purpose, size_t bytes, size_t alignment)
{
	struct purse *purse = user;
	struct device *device = purse->rank->device;
	void *block = device ? device_allocate(device, bytes + alignment) : malloc(bytes + alignment);
	char *memory;

	if (!block)
		return NULL;
	memory = (char *)block + (alignment - (uintptr_t)block % alignment) % alignment;
	purse->blocks[purpose] = block;
	atomic_fetch_add(&purse->given[purpose], 1);
	return spoil_bytes(purse->rank, memory, bytes) ? memory : NULL;
}

static void purse_release(void *user, lshard_purpose purpose, void *memory)
{
	struct purse *purse = user;

	(void)memory;
	if (purse->rank->device)
		device_release(purse->rank->device, purse->blocks[purpose]);
	else
		free(purse->blocks[purpose]);
	atomic_fetch_add(&purse->returned[purpose], 1);
}

static bool is_balanced(const struct member *member, struct purse *purse, bool has_windows)
{
	for (int purpose = LSHARD_FOR_SHARD; purpose <= LSHARD_FOR_WINDOWS; purpose++) {
		int given = atomic_load(&purse->given[purpose]), returned = atomic_load(&purse->returned[purpose]);
		int due = purpose == LSHARD_FOR_SHARD || has_windows;

		EXPECT(member, given == due && returned == due, "purpose %d: given %d times, returned %d times",
		       purpose, given, returned);
	}
	return true;
failed:
	return false;
}

/* Memory of the caller's on a device is opened by the driver's legacy handles, which need processes. */
static bool can_lend(void)
{
	return subject.caller_memory && (subject.memory == LSHARD_MEMORY_HOST || strcmp(subject.kind, "forks") == 0);
}

static int purse_body(const struct member *member)
{
	struct setting setting = {.prefetch = 1, .layers = 8};
	struct rank rank;
	struct purse purse = {.rank = &rank};
	const lshard_memory_source source = {sizeof source, purse_allocate, purse_release, &purse};
	lshard_stats stats = LSHARD_STATS_INIT;
	lshard_series_options options;
	lshard_status status;
	bool right = false;

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	options = rank_series_options(&setting);
	options.memory_source = &source;
	if (!rank_group(&rank, member, &setting))
		return 1;
	status = lshard_series_create(rank.group, &options, &rank.series);
	if (!can_lend()) {
		EXPECT(member, status == LSHARD_ERR_NOT_SUPPORTED, "%s", lshard_status_name(status));
		right = team_barrier(member); /* nobody has a hold of a share any more */
		right = rank_close(&rank) && right;
		return !right ||
		       atomic_load(&purse.given[LSHARD_FOR_SHARD]) != atomic_load(&purse.returned[LSHARD_FOR_SHARD]);
	}
	EXPECT(member, status == LSHARD_OK, "%s", lshard_group_error(rank.group));
	if (!rank_note_addresses(&rank))
		goto failed;
	OK_SERIES(&rank, lshard_series_commit(rank.series, fill_layer, &rank));
	OK_SERIES(&rank, lshard_series_stats(rank.series, &stats));
	right = one_pass(&rank) && one_pass(&rank);
	right = lshard_series_destroy(rank.series) == LSHARD_OK && right;
	rank.series = NULL;
	right = team_barrier(member) && right; /* nobody reads a share any more */
failed:
	right = rank_close(&rank) && right;
	return team_barrier(member) && right && is_balanced(member, &purse, stats.windows > 0) ? 0 : 1;
}

void callers_memory_is_used_and_given_back(void **state)
{
	(void)state;
	assert_int_equal(team_run(subject.kind, 3, purse_body, NULL), 0);
}
