/* SPDX-License-Identifier: Apache-2.0
 *
 * conformance_changes.c - the part of the conformance suite in which bytes change or go: updates that begin anywhere in
 * a pass, bytes that are not what their source stores, captured passes that are replayed before and after an update,
 * and memory that is given back however a series ends.
 */
#include "conformance.h"
#include "patience.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

/* ---- Updates --------------------------------------------------------------------------------------------------- */

/* The first layers of a pass, the last one of them still viewed. */
static bool begin_pass(struct rank *rank, uint32_t layers)
{
	for (uint32_t position = 0; position < layers; position++)
		if (!visit(rank, position % rank->setting->layers))
			return false;
	return true;
}

static bool update(struct rank *rank)
{
	OK_SERIES(rank, lshard_series_update_begin(rank->series));
	rank->generation++;
	OK_SERIES(rank, lshard_series_update_end(rank->series, fill_layer, rank));
	return true;
failed:
	return false;
}

/* Each rank is somewhere else, unless transfers go in step. */
static int updates_body(const struct member *member)
{
	struct setting setting = {.prefetch = 2, .layers = 9, .first_layer = 4};
	const uint32_t place = subject.collective ? 0 : (uint32_t)member->rank;
	struct rank rank;
	bool right = true;

	setting.placement = *(const lshard_placement *)member->user;
	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	if (!rank_open(&rank, member, &setting))
		return 1;
	for (uint32_t round = 1; right && round <= 4; round++)
		right = begin_pass(&rank, 2 * place + 3 * round) && update(&rank);
	right = right && one_pass(&rank) && team_barrier(member);
	return rank_close(&rank) && right ? 0 : 1;
}

void updates_begin_in_the_middle_of_a_pass(void **state)
{
	lshard_placement placements[] = {LSHARD_WHOLE, LSHARD_STRIPED};

	(void)state;
	for (int i = 0; i < 2; i++)
		assert_int_equal(team_run(subject.kind, 3, updates_body, &placements[i]), 0);
}

/* ---- Bytes that are not right ---------------------------------------------------------------------------------- */

/* The other bytes of the tensor stay as they are. */
static bool flip_a_bit(struct rank *rank, uint32_t layer)
{
	unsigned char byte;
	void *address = NULL;

	OK_SERIES(rank, lshard_series_prepare(rank->series, rank->stream));
	EXPECT(rank->member, rank_looked(rank), "the bytes were wrong before");
	OK_SERIES(rank, lshard_series_address(rank->series, layer, 0, &address));
	address = (unsigned char *)address + 1234;
	EXPECT(rank->member, rank_read(rank, &byte, address, 1), "reading a byte");
	byte ^= 16;
	EXPECT(rank->member, rank_write(rank, address, &byte, 1), "writing a byte");
	return true;
failed:
	return false;
}

/* @p spoiled: of this rank, and all it sees of it; -1: none. */
static bool verify_finds(struct rank *rank, int spoiled)
{
	const uint64_t untouched = 4711;
	uint64_t hash = untouched;
	lshard_status status = lshard_series_verify(rank->series, &hash);
	char words[64];

	EXPECT(rank->member, status == (spoiled < 0 ? LSHARD_OK : LSHARD_ERR_CORRUPT), "%s: %s",
	       lshard_status_name(status), lshard_series_error(rank->series));
	if (spoiled < 0)
		return true;
	snprintf(words, sizeof words, "layer %d is not what rank %d stores", spoiled, spoiled % rank->member->size);
	EXPECT(rank->member, strstr(lshard_series_error(rank->series), words), "not '%s': %s", words,
	       lshard_series_error(rank->series));
	EXPECT(rank->member, hash == untouched, "a hash was written on failure");
	return true;
failed:
	return false;
}

/* The last rank spoils the first layer that it keeps a copy of: a resident one, or the one in its window. */
static int changed_byte_body(const struct member *member)
{
	struct setting setting = {.prefetch = 0, .layers = 7, .first_layer = 3};
	struct rank rank;
	int spoiled = -1;
	bool right = false;

	setting.resident_bytes = *(const uint64_t *)member->user;
	setting_tensors(&setting, 1, LSHARD_STRIPE_BYTES);
	if (!rank_open(&rank, member, &setting))
		return 1;
	if (member->rank == member->size - 1 && rank_reaches(&rank) == 1)
		spoiled = (int)setting.first_layer + lshard_series_is_source(rank.series, setting.first_layer);
	if (!verify_finds(&rank, -1) || (spoiled >= 0 && !flip_a_bit(&rank, (uint32_t)spoiled)))
		goto failed;
	if (!verify_finds(&rank, spoiled) ||
	    (spoiled >= 0 && setting.resident_bytes && !flip_a_bit(&rank, (uint32_t)spoiled)))
		goto failed;
	right = verify_finds(&rank, -1) && one_pass(&rank) && team_barrier(member);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

/* Where transfers go in step, verify brings the windows anew; what is poisoned does not come from the windows. */
void a_changed_byte_is_found(void **state)
{
	uint64_t residents[] = {UINT64_MAX, 0};

	(void)state;
	for (int i = 0; i < (subject.collective || subject.poison ? 1 : 2); i++)
		assert_int_equal(team_run(subject.kind, 3, changed_byte_body, &residents[i]), 0);
}

/* ---- Captured passes ------------------------------------------------------------------------------------------- */

#define REPLAYS 100

static bool capture_pass(struct rank *rank, void **graph)
{
	return device_capture_begin(rank) && one_pass(rank) && device_capture_end(rank, graph);
}

/* A capture that is given up in the middle of a pass. */
static bool spoil_capture(struct rank *rank)
{
	return device_capture_begin(rank) && begin_pass(rank, 4) && device_capture_drop(rank);
}

/* What is between two replays: nothing, a part of a pass as usual, a capture that fails, an update. */
static bool interrupt(struct rank *rank, uint32_t replay)
{
	if (replay % 5 == 4 && !rank_looked(rank))
		return false;
	if (replay % 10 == 3) {
		OK_SERIES(rank, lshard_series_prepare(rank->series, device_stream(rank->device, 1)));
		if (!begin_pass(rank, replay % 7))
			return false;
	}
	if (replay % 25 == 11 && !spoil_capture(rank))
		return false;
	return replay != REPLAYS / 2 || update(rank);
failed:
	return false;
}

static int captured_body(const struct member *member)
{
	struct setting setting = {.prefetch = 1, .layers = 7, .first_layer = 40};
	struct rank rank;
	void *graph = NULL;
	bool right = false;

	setting.placement = *(const lshard_placement *)member->user;
	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	if (!rank_open(&rank, member, &setting))
		return 1;
	if (!one_pass(&rank) || !capture_pass(&rank, &graph))
		goto failed;
	for (uint32_t replay = 0; replay < REPLAYS; replay++)
		if (!device_replay(&rank, graph) || !interrupt(&rank, replay))
			goto failed;
	right = rank_looked(&rank) && team_barrier(member);
failed:
	device_forget(&rank, graph);
	return rank_close(&rank) && right ? 0 : 1;
}

void captured_passes_are_replayed(void **state)
{
	lshard_placement placements[] = {LSHARD_WHOLE, LSHARD_STRIPED};

	(void)state;
	if (subject.memory != LSHARD_MEMORY_CUDA) {
		does_not_apply(__func__, "no streams");
		return;
	}
	for (int i = 0; i < 2; i++)
		assert_int_equal(team_run(subject.kind, 3, captured_body, &placements[i]), 0);
}

/* ---- What stays ------------------------------------------------------------------------------------------------ */

enum ending { DESTROY, ABORT, KILL, ENDINGS };

/* In the middle of a pass, with work on its way. */
static bool end_in(struct rank *rank, enum ending ending)
{
	bool right = begin_pass(rank, 10);

	if (rank->member->rank == 1 && ending == KILL) {
		team_dies(rank->member);
		raise(SIGKILL);
	}
	if (rank->member->rank == 1 && ending == ABORT)
		lshard_group_abort(rank->group);
	return rank_close(rank) && right;
}

/* Other ranks, or what is left of one that was killed, may still be about to go. */
static bool comes_back(const struct member *member, struct device *device, uint64_t before)
{
	const struct timespec nap = {0, 10000000};
	uint64_t now = 0;

	for (int turn = 0; turn < (int)LONG_MS / 10; turn++) {
		if (!device_free_bytes(device, &now))
			return false;
		if (now >= before)
			return true;
		nanosleep(&nap, NULL);
	}
	EXPECT(member, false, "%llu bytes stay on the device", (unsigned long long)(before - now));
failed:
	return false;
}

/* The first time is not counted: the driver keeps what it loads for the first copies. */
static int ending_body(const struct member *member)
{
	const enum ending last = *(const enum ending *)member->user;
	struct setting setting = {.prefetch = 1, .layers = 8};
	struct device *device = device_open(member);
	uint64_t before = 0;
	bool right = device != NULL;

	setting.placement = last == ABORT ? LSHARD_STRIPED : LSHARD_WHOLE;
	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	for (int turn = 0; right && turn < 3; turn++) {
		const enum ending ending = turn < 2 ? DESTROY : last;
		struct rank rank;

		right = rank_open(&rank, member, &setting) && end_in(&rank, ending);
		if (right && ending != KILL)
			right = team_barrier(member);
		if (right && turn == 0)
			right = device_free_bytes(device, &before) && team_barrier(member);
		if (right && turn > 0)
			right = comes_back(member, device, before) && (turn == 2 || team_barrier(member));
	}
	device_close(device);
	return !right;
}

void nothing_stays_on_the_device(void **state)
{
	(void)state;
	if (subject.memory != LSHARD_MEMORY_CUDA) {
		does_not_apply(__func__, "host memory");
		return;
	}
	for (enum ending ending = DESTROY; ending < ENDINGS; ending++)
		if (ending != KILL || strcmp(subject.kind, "forks") == 0)
			assert_int_equal(team_run(subject.kind, 3, ending_body, &ending), 0);
}
