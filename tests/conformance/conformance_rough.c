/* SPDX-License-Identifier: Apache-2.0
 *
 * conformance_rough.c - the part of the conformance suite in which everything goes wrong at once: ranks that are late
 * for the calls they make together, go different ways through the layers, and whose transport fails now and then, by
 * drawn rules. A layer of which wait says that it is there is right, whatever else was said; and when the ranks have
 * come together again, all layers are.
 */
#include "conformance.h"
#include "patience.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define DEADLINE_MS 60
#define EPOCHS      5
#define TRIES       60

enum call { COMMIT, JOIN, PREPARE, REWIND, VERIFY, UPDATE_BEGIN, UPDATE_END, CALLS };

/* In memory that all ranks see. */
struct rough {
	struct setting setting;
	char spec[256];
	atomic_int fared[MAX_RANKS];
	/*
	 * Perhaps the machine, for the deadline, to make a group or, by callbacks, for a collective that all had begun,
	 * which is the end of the group. The walk is tried again then.
	 */
	atomic_bool too_slow;
};

/* One rank of a walk. */
struct walker {
	struct rank rank;
	struct rough *rough;
	uint64_t together; /* draws that are the same on all ranks */
	uint64_t alone;
	uint32_t at;
};

static bool one_in(uint64_t *state, uint32_t n)
{
	return random_next(state) % n == 0;
}

/* ---- All ranks ------------------------------------------------------------------------------------------------- */

/* How many are OK; -1 when one has left. */
static int tell(struct walker *walker, lshard_status mine)
{
	const struct member *member = walker->rank.member;
	int ok = 0;

	walker->rough->fared[member->rank] = mine;
	if (!team_barrier(member))
		return -1;
	for (int32_t rank = 0; rank < member->size; rank++)
		ok += walker->rough->fared[rank] == LSHARD_OK;
	return team_barrier(member) ? ok : -1;
}

static lshard_status make(struct rank *rank, enum call call)
{
	switch (call) {
	case COMMIT:
		return lshard_series_commit(rank->series, fill_layer, rank);
	case JOIN:
		return lshard_series_join(rank->series, rank->stream);
	case PREPARE:
		return lshard_series_prepare(rank->series, rank->stream);
	case REWIND:
		return lshard_series_rewind(rank->series);
	case VERIFY:
		return lshard_series_verify(rank->series, NULL);
	case UPDATE_BEGIN:
		return lshard_series_update_begin(rank->series);
	default:
		return lshard_series_update_end(rank->series, fill_layer, rank);
	}
}

/* Some are late, a few later than the others wait. */
static lshard_status make_late(struct walker *walker, enum call call)
{
	const long ms = one_in(&walker->alone, 3) ? (long)(random_next(&walker->alone) % (DEADLINE_MS * 3 / 2)) : 0;

	nanosleep(&(struct timespec){0, ms * 1000000}, NULL);
	return make(&walker->rank, call);
}

/* ---- Ways through the layers ----------------------------------------------------------------------------------- */

/* A layer that is not there is not asked for again and again: each time may take a deadline. */
static bool wander(struct walker *walker, uint32_t steps)
{
	struct rank *rank = &walker->rank;
	const uint32_t layers = rank->setting->layers;
	uint64_t way = random_next(&walker->together);
	int in_vain = 0;

	for (uint32_t step = 0; step < steps && in_vain < 3; step++) {
		const uint64_t jump = random_next(&way);
		lshard_status status;

		walker->at = (jump % 8 == 0 ? (uint32_t)(jump >> 8) : walker->at + 1) % layers;
		if (one_in(&walker->alone, 24))
			walker->at = (uint32_t)(random_next(&walker->alone) % layers);
		if (!one_in(&walker->alone, 24))
			lshard_reach(rank->series, rank->setting->first_layer + walker->at, rank->stream);
		status = lshard_wait(rank->series, rank->setting->first_layer + walker->at, rank->stream);
		if (status == LSHARD_OK && !layer_is_right(rank, walker->at))
			return false;
		in_vain += status == LSHARD_ERR_TIMEOUT;
		if (one_in(&walker->alone, 8))
			lshard_release(rank->series, rank->setting->first_layer + walker->at, rank->stream);
	}
	return rank_looked(rank);
}

/* Of all layers, where only slowness is forgiven. */
static lshard_status pass(struct walker *walker, bool *right)
{
	struct rank *rank = &walker->rank;
	lshard_status status = LSHARD_OK;

	for (uint32_t position = 0; position < rank->setting->layers && status == LSHARD_OK; position++) {
		status = lshard_reach(rank->series, rank->setting->first_layer + position, rank->stream);
		if (status == LSHARD_OK)
			status = LSHARD_ERR_TIMEOUT;
		for (int i = 0; i < TRIES && status == LSHARD_ERR_TIMEOUT; i++)
			status = lshard_wait(rank->series, rank->setting->first_layer + position, rank->stream);
		*right = *right && (status != LSHARD_OK || layer_is_right(rank, position));
	}
	walker->at = 0;
	*right = rank_looked(rank) && *right;
	return status;
}

/* ---- A walk ---------------------------------------------------------------------------------------------------- */

/* The call until it was OK on all ranks; what each finds for itself does not count. */
static bool insist(struct walker *walker, enum call call)
{
	for (int i = 0; i < TRIES; i++) {
		const int ok = tell(walker, make(&walker->rank, call));

		if (ok < 0)
			return false;
		if (ok == walker->rank.member->size)
			return true;
	}
	walker->rough->too_slow = subject.callbacks;
	EXPECT(walker->rank.member, false, "call %d was never OK on all ranks: %s", (int)call,
	       lshard_series_error(walker->rank.series));
failed:
	return false;
}

/* Rewinds and passes until one pass is whole on all ranks. */
static bool come_together(struct walker *walker)
{
	bool right = true;

	for (int i = 0; i < TRIES && right; i++) {
		int ok;

		if (!insist(walker, REWIND))
			return false;
		ok = tell(walker, pass(walker, &right));
		if (ok < 0 || ok == walker->rank.member->size)
			return right && ok > 0;
	}
	walker->rough->too_slow = subject.callbacks;
	EXPECT(walker->rank.member, false, "no pass is whole: %s", lshard_series_error(walker->rank.series));
failed:
	return false;
}

static bool epoch(struct walker *walker)
{
	const enum call call = (enum call)(JOIN + random_next(&walker->together) % (UPDATE_BEGIN - JOIN + 1));
	const int32_t size = walker->rank.member->size;
	int ok;

	if (!wander(walker, walker->rank.setting->layers + 4))
		return false;
	ok = tell(walker, make_late(walker, call));
	if (ok < 0)
		return false;
	if (call == UPDATE_BEGIN) {
		walker->rough->too_slow = walker->rough->too_slow || (subject.callbacks && ok > 0 && ok < size);
		EXPECT(walker->rank.member, ok == 0 || ok == size, "an update began on %d of %d ranks", ok, (int)size);
		walker->rank.generation += ok == size;
		if (ok == size && tell(walker, make_late(walker, UPDATE_END)) != size && !insist(walker, UPDATE_END))
			return false;
	}
	if (!wander(walker, walker->rank.setting->layers))
		return false;
	return tell(walker, LSHARD_OK) == size && (!one_in(&walker->together, 2) || come_together(walker));
failed:
	return false;
}

static int rough_body(const struct member *member)
{
	struct rough *rough = member->user;
	struct walker walker = {.rough = rough, .together = rough->setting.seed};
	struct rank *rank = &walker.rank;
	lshard_series_options options = rank_series_options(&rough->setting);
	bool right = false;

	walker.alone = rough->setting.seed + 77 * (uint64_t)member->rank + 1;
	if (!rank_group(rank, member, &rough->setting)) {
		rough->too_slow = true;
		return 1;
	}
	for (int i = 0; i < TRIES && !rank->series; i++) {
		const lshard_status status = lshard_series_create(rank->group, &options, &rank->series);
		const int ok = tell(&walker, status);

		if (ok < 0)
			goto failed;
		rough->too_slow = rough->too_slow || (subject.callbacks && ok > 0 && ok < member->size);
		EXPECT(member, ok == 0 || ok == member->size, "a series was made on %d ranks", ok);
	}
	rough->too_slow = rough->too_slow || (subject.callbacks && !rank->series);
	EXPECT(member, rank->series, "no series was made: %s", lshard_group_error(rank->group));
	if (!rank_note_addresses(rank) || !insist(&walker, COMMIT))
		goto failed;
	right = true;
	for (int i = 0; i < EPOCHS && right; i++)
		right = epoch(&walker);
	right = right && come_together(&walker) && team_barrier(member);
failed:
	while (rank->series && lshard_series_destroy(rank->series) == LSHARD_ERR_TIMEOUT)
		; /* what is still on its way ends at last */
	rank->series = NULL;
	return rank_close(rank) && right ? 0 : 1;
}

/* Rules of faults, before the whole specification or before its last part. */
static void draw_faults(struct rough *rough, uint32_t index, uint64_t *state)
{
	static const char *const calls[] = {"exchange", "fetch", "wait", "join", "drain", "read"};
	static const char *const actions[] = {"fail", "timeout", "peer", "delay:70"};
	const char *comma = subject.custom ? NULL : strrchr(subject.spec, ',');
	const int before = index % 2 && comma ? (int)(comma + 1 - subject.spec) : 0;
	size_t used = (size_t)snprintf(rough->spec, sizeof rough->spec, "%.*sfaults=", before, subject.spec);

	for (int i = 0; i < 5; i++)
		used += (size_t)snprintf(rough->spec + used, sizeof rough->spec - used, "%sr%d.%s@%d=%s", i ? "+" : "",
					 (int)(random_next(state) % (uint64_t)rough->setting.size),
					 calls[random_next(state) % 6], 2 + (int)(random_next(state) % 30),
					 actions[random_next(state) % 4]);
	if (!subject.custom) /* which has no name in a specification */
		snprintf(rough->spec + used, sizeof rough->spec - used, ",%s", subject.spec + before);
	rough->setting.spec = rough->spec;
}

static void draw_rough(struct rough *rough, uint32_t index)
{
	uint64_t state = 31 + index;

	memset(rough, 0, sizeof *rough);
	rough->setting = (struct setting){.size = 2 + (int32_t)(index % 2),
					  .prefetch = (uint32_t)(random_next(&state) % 3),
					  .layers = 6 + (uint32_t)(random_next(&state) % 6),
					  .first_layer = 3,
					  .placement = index / 2 % 2 ? LSHARD_STRIPED : LSHARD_WHOLE,
					  .resident_bytes = index % 3 ? 0 : 1 << 14,
					  .timeout_ms = patience(DEADLINE_MS),
					  .seed = random_next(&state)};
	setting_tensors(&rough->setting, 2, LSHARD_STRIPE_BYTES);
	if (index > 0)
		draw_faults(rough, index, &state);
}

void rough_walks_give_the_right_bytes_or_a_status(void **state)
{
	struct rough *rough;
	const uint32_t walks = subject.collective ? 10 : 4; /* where one rank's trouble is everybody's */

	(void)state;
	if (subject.memory == LSHARD_MEMORY_CUDA) {
		does_not_apply(__func__, "on devices the random walks of the simulated machine do this");
		return;
	}
	rough = shared_new(sizeof *rough);
	for (uint32_t index = 0; index < walks; index++) {
		int failures = 1;

		for (int i = 0; i < TRIES && failures; i++) {
			draw_rough(rough, index);
			failures = team_run(subject.kind, rough->setting.size, rough_body, rough);
			if (failures && !rough->too_slow)
				fail_msg("%s: %d of %d ranks failed",
					 rough->setting.spec ? rough->setting.spec : subject.spec, failures,
					 (int)rough->setting.size);
		}
		assert_int_equal(failures, 0);
	}
	shared_free(rough, sizeof *rough);
}
