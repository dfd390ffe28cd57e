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
static bool is_slice(const struct rank *rank, uint32_t layer, uint32_t tensor, const unsigned char *address,
		     const lshard_range *range)
{
	const lshard_tensor *described = &rank->setting->tensors[tensor];
	uint64_t row_bytes = described->bytes / described->rows;
	bool by_rows = described->stripe == LSHARD_STRIPE_ROWS;
	uint64_t first = by_rows ? range->begin : 0, last = by_rows ? range->end : described->rows;
	uint64_t from = by_rows ? 0 : range->begin, to = by_rows ? row_bytes : range->end;
	unsigned char *whole = malloc(described->bytes);
	bool same = whole != NULL;

	if (whole)
		foretell(whole, described->bytes, rank->generation, layer, tensor);
	for (uint64_t row = first; same && row < last; row++)
		same = to == from || memcmp(address + (row - first) * range->row_bytes, whole + row * row_bytes + from,
					    to - from) == 0;
	free(whole);
	return same;
}

static bool stripe_is_right(struct rank *rank, uint32_t layer, uint32_t tensor)
{
	const lshard_tensor *described = &rank->setting->tensors[tensor];
	uint64_t number = (uint64_t)rank->member->rank, size = (uint64_t)rank->member->size;
	uint64_t begin = described->rows * number / size, end = described->rows * (number + 1) / size;
	void *address = NULL;
	lshard_range range;
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
static int stripes_body(const struct member *member)
{
	struct setting setting = {.prefetch = 1, .layers = 5, .first_layer = 40, .placement = LSHARD_STRIPED};
	struct rank rank;
	bool right;

	setting_tensors(&setting, 3, *(const lshard_stripe *)member->user);
	if (!rank_open(&rank, member, &setting))
		return 1;
	right = one_pass(&rank) && one_pass(&rank);
	for (uint32_t position = 0; right && position < setting.layers; position++)
		for (uint32_t tensor = 0; right && tensor < setting.n_tensors; tensor++)
			right = stripe_is_right(&rank, setting.first_layer + position, tensor);
	return rank_close(&rank) && right ? 0 : 1;
}

void stripes_are_shards(void **state)
{
	lshard_stripe stripes[] = {LSHARD_STRIPE_ROWS, LSHARD_STRIPE_COLUMNS, LSHARD_STRIPE_BYTES};

	(void)state;
	for (int i = 0; i < 3; i++)
		for (int32_t size = 2; size <= MAX_RANKS; size++) /* 7: more ranks than rows */
			assert_int_equal(team_run(subject.kind, size, stripes_body, &stripes[i]), 0);
}

/* ---- The caller's memory --------------------------------------------------------------------------------------- */

/* What one rank's source gave and got back; others may give shares back, from their threads. */
struct purse {
	atomic_int given[3]; /* by purpose */
	atomic_int returned[3];
};

static void *purse_allocate(void *user, lshard_purpose purpose, size_t bytes, size_t alignment)
{
	struct purse *purse = user;
	void *memory = NULL;

	if (posix_memalign(&memory, alignment, bytes) != 0)
		return NULL;
	memset(memory, 0xa5, bytes); /* not zeroed: nobody promised that */
	atomic_fetch_add(&purse->given[purpose], 1);
	return memory;
}

static void purse_release(void *user, lshard_purpose purpose, void *memory)
{
	struct purse *purse = user;

	atomic_fetch_add(&purse->returned[purpose], 1);
	free(memory);
}

static bool is_balanced(const struct member *member, struct purse *purse)
{
	for (int purpose = LSHARD_FOR_SHARE; purpose <= LSHARD_FOR_WINDOWS; purpose++) {
		int given = atomic_load(&purse->given[purpose]), returned = atomic_load(&purse->returned[purpose]);

		EXPECT(member, given == 1 && returned == 1, "purpose %d: given %d times, returned %d times", purpose,
		       given, returned);
	}
	return true;
failed:
	return false;
}

static int purse_body(const struct member *member)
{
	struct setting setting = {.prefetch = 1, .layers = 8};
	struct purse purse = {{0}, {0}};
	lshard_series_options options;
	struct rank rank;
	lshard_status status;
	bool right = false;

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	options = rank_series_options(&setting);
	options.memory_source = (lshard_memory_source){purse_allocate, purse_release, &purse};
	if (!rank_group(&rank, member, &setting))
		return 1;
	status = lshard_series_create(rank.group, &options, &rank.series);
	if (!subject.caller_memory) {
		EXPECT(member, status == LSHARD_ERR_NOT_SUPPORTED, "%s", lshard_status_name(status));
		return rank_close(&rank) ? 0 : 1;
	}
	EXPECT(member, status == LSHARD_OK, "%s", lshard_group_error(rank.group));
	if (!rank_note_addresses(&rank))
		goto failed;
	OK_SERIES(&rank, lshard_series_commit(rank.series, fill_layer, &rank));
	right = one_pass(&rank) && one_pass(&rank);
failed:
	right = rank_close(&rank) && right;
	return team_barrier(member) && right && is_balanced(member, &purse) ? 0 : 1;
}

void callers_memory_is_used_and_given_back(void **state)
{
	(void)state;
	assert_int_equal(team_run(subject.kind, 3, purse_body, NULL), 0);
}
