/* SPDX-License-Identifier: Apache-2.0
 *
 * walk_together.c - the calls of a random walk that all ranks make together, as they succeed and as they fail. See
 * test_walk.c. A call fails because one of its exchanges times out, which is any of them. Where something is lost by
 * that, every rank is told so until a rewind; where nothing is, the walk goes on as if nothing had happened.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include "walk.h"
#include <cmocka.h>
#include <limits.h>

static void begin_update(void *user, int32_t rank)
{
	struct walk *walk = user;

	walk->walkers[rank].status = lshard_series_update_begin(walk->walkers[rank].series);
}

static void end_update(void *user, int32_t rank)
{
	struct walk *walk = user;

	walk->walkers[rank].status = lshard_series_update_end(walk->walkers[rank].series, walk_write_layer, walk);
}

static void rewind_rank(void *user, int32_t rank)
{
	struct walk *walk = user;

	walk->walkers[rank].status = lshard_series_rewind(walk->walkers[rank].series);
}

static void verify_rank(void *user, int32_t rank)
{
	struct walk *walk = user;
	struct walker *walker = &walk->walkers[rank];

	walker->status = lshard_series_verify(walker->series, NULL);
	if (walker->status == LSHARD_ERR_PEER_FAILED && walker->may_fail)
		walker->status = LSHARD_OK; /* of a fetch that failed before */
}

/* One of its exchanges fails, on every rank; what verify tells is what it met first. */
static void break_verify(void *user, int32_t rank)
{
	struct walk *walk = user;
	struct walker *walker = &walk->walkers[rank];

	walker->status = lshard_series_verify(walker->series, NULL);
	if (walker->status == LSHARD_ERR_PEER_FAILED && walker->may_fail)
		walker->status = LSHARD_ERR_TIMEOUT; /* a fetch had failed before the exchange did */
}

void walk_together(struct walk *walk, const char *what, void (*call)(void *user, int32_t rank))
{
	walk_note(walk, "all ranks: %s", what);
	sim_collective(walk->world, call, walk);
	for (int32_t r = 0; r < walk->n; r++) {
		const struct walker *walker = &walk->walkers[r];

		if (walker->status != LSHARD_OK)
			walk_give_up(walk, "rank %d: %s returned %s: %s", r, what, lshard_status_name(walker->status),
				     walker->series  ? lshard_series_error(walker->series)
				     : walker->group ? lshard_group_error(walker->group)
						     : "");
	}
	walk_look_for_violations(walk);
}

static void forget_views(struct walk *walk)
{
	for (int32_t r = 0; r < walk->n; r++)
		walk->walkers[r].views = (struct views){0};
}

/* ---- Calls that fail ---- */

/* Returns whether it did; one with fewer exchanges than @p skip does not. */
static bool fail_together(struct walk *walk, const char *what, void (*call)(void *user, int32_t rank), unsigned skip)
{
	walk_note(walk, "all ranks: %s, whose exchange %u fails", what, skip);
	sim_fail_exchange(walk->world, skip);
	sim_collective(walk->world, call, walk);
	sim_fail_exchange(walk->world, UINT_MAX);
	for (int32_t r = 0; r < walk->n; r++)
		if (walk->walkers[r].status != walk->walkers[0].status ||
		    (walk->walkers[r].status != LSHARD_OK && walk->walkers[r].status != LSHARD_ERR_TIMEOUT))
			walk_give_up(walk, "rank %d: %s that fails returned %s", r, what,
				     lshard_status_name(walk->walkers[r].status));
	walk_look_for_violations(walk);
	return walk->walkers[0].status != LSHARD_OK;
}

static void must_be_refused(struct walk *walk, const struct walker *walker, const char *call, lshard_status status)
{
	if (status != LSHARD_ERR_OUT_OF_STEP)
		walk_give_up(walk, "rank %d: %s after a call that failed returned %s", walk_rank_of(walk, walker), call,
			     lshard_status_name(status));
}

/* Nothing is used and nothing is started before the ranks have met again. */
static void find_all_lost(struct walk *walk, struct walker *walker)
{
	const uint32_t layer =
		walk->options.first_layer + (uint32_t)walk_draw(&walk->random, walk->options.layer_count);
	void *stream = walk->host ? NULL : walker->streams[0];
	lshard_stats before, after;

	walk_get_stats(walk, walker, &before);
	walk_must_be_ok(walk, walker, "reach", lshard_reach(walker->series, layer, stream));
	must_be_refused(walk, walker, "wait", lshard_wait(walker->series, layer, stream));
	must_be_refused(walk, walker, "prepare", lshard_series_prepare(walker->series, stream));
	must_be_refused(walk, walker, "join", lshard_series_join(walker->series, stream));
	walk_must_be_ok(walk, walker, "release", lshard_release(walker->series, layer, stream));
	walk_get_stats(walk, walker, &after);
	if (after.fetches != before.fetches)
		walk_give_up(walk, "rank %d: a transfer was started alone", walk_rank_of(walk, walker));
}

static void come_back(struct walk *walk)
{
	forget_views(walk);
	if (!walk->collective)
		return;
	for (int32_t r = 0; r < walk->n; r++)
		find_all_lost(walk, &walk->walkers[r]);
	walk_together(walk, "rewind", rewind_rank);
}

/* ---- What happens between epochs ---- */

/* Kernels and graphs that are still queued must be over before anyone may write. */
static void update(struct walk *walk, bool failing)
{
	/* before its first exchange nothing has changed, and views live on */
	if (failing && walk_draw(&walk->random, 2) && !fail_together(walk, "update_begin", begin_update, 0))
		walk_give_up(walk, "an update began alone");
	if (failing && walk_draw(&walk->random, 2)) {
		if (!fail_together(walk, "update_begin", begin_update, 1))
			walk_give_up(walk, "an update began alone");
		come_back(walk);
		return;
	}
	walk_together(walk, "update_begin", begin_update);
	walk_make_truth(walk);
	if (!failing || fail_together(walk, "update_end", end_update, (unsigned)walk_draw(&walk->random, 4)))
		walk_together(walk, "update_end", end_update);
	forget_views(walk);
}

/*
 * Hosts only: there is no way to copy from the simulated devices. And not in lockstep: a wait there waits for nobody,
 * so that a rank leaves the verification, and the others wait for it until their deadline.
 */
static void verify(struct walk *walk, bool failing)
{
	const unsigned skip = (unsigned)walk_draw(&walk->random, walk->options.layer_count);

	if (!failing)
		walk_together(walk, "verify", verify_rank);
	else if (fail_together(walk, "verify", break_verify, skip))
		come_back(walk);
	forget_views(walk);
}

static void rewind_all(struct walk *walk, bool failing)
{
	if (failing && walk->collective && fail_together(walk, "rewind", rewind_rank, 0))
		come_back(walk);
	else
		walk_together(walk, "rewind", rewind_rank);
	forget_views(walk);
}

void walk_between_epochs(struct walk *walk)
{
	const bool failing = walk_draw(&walk->random, 2);

	switch (walk_draw(&walk->random, 4)) {
	case 0:
		update(walk, failing);
		break;
	case 1:
		rewind_all(walk, failing);
		break;
	case 2:
		if (walk->host && !walk->collective)
			verify(walk, failing);
		break;
	default:
		break;
	}
}
