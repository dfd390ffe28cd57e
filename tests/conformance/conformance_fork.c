/* SPDX-License-Identifier: Apache-2.0
 *
 * conformance_fork.c - the part of the conformance suite in which a rank forks: a child has a copy of the group, is
 * told so by every call, and whatever it does there is nothing to its parent's group. Nor is a rank that has died kept
 * alive by it.
 */
#include "conformance.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define CHILD_MS 20000 /* a child that takes longer hangs */

/* ---- In the child: its steps return 0, or the line that went wrong --------------------------------------------- */

#define REFUSED(rank, call)                                                                                            \
	do {                                                                                                           \
		if ((call) != LSHARD_ERR_STATE || !strstr(lshard_series_error((rank)->series), "fork"))                \
			return __LINE__;                                                                               \
	} while (0)

static int a_pass_is_refused(struct rank *rank)
{
	const uint32_t layer = rank->setting->first_layer;

	REFUSED(rank, lshard_reach(rank->series, layer, rank->stream));
	REFUSED(rank, lshard_wait(rank->series, layer, rank->stream));
	REFUSED(rank, lshard_release(rank->series, layer, rank->stream));
	REFUSED(rank, lshard_series_prepare(rank->series, rank->stream));
	REFUSED(rank, lshard_series_join(rank->series, rank->stream));
	return 0;
}

static int collective_calls_are_refused(struct rank *rank)
{
	lshard_series_options options = rank_series_options(rank->setting);
	lshard_series *other = NULL;
	uint64_t hash;

	REFUSED(rank, lshard_series_commit(rank->series, fill_layer, rank));
	REFUSED(rank, lshard_series_rewind(rank->series));
	REFUSED(rank, lshard_series_update_begin(rank->series));
	REFUSED(rank, lshard_series_update_end(rank->series, fill_layer, rank));
	REFUSED(rank, lshard_series_verify(rank->series, &hash));
	if (lshard_series_create(rank->group, &options, &other) != LSHARD_ERR_STATE ||
	    !strstr(lshard_group_error(rank->group), "fork"))
		return __LINE__;
	return 0;
}

static int questions_are_refused(struct rank *rank)
{
	const uint32_t layer = rank->setting->first_layer;
	lshard_stats stats = LSHARD_STATS_INIT;
	lshard_range range = LSHARD_RANGE_INIT;
	void *address;

	REFUSED(rank, lshard_series_address(rank->series, layer, 0, &address));
	REFUSED(rank, lshard_series_storage(rank->series, layer, 0, &address));
	REFUSED(rank, lshard_series_stripe(rank->series, layer, 0, &address, &range));
	if (lshard_series_stats(rank->series, &stats) != LSHARD_ERR_STATE)
		return __LINE__;
	if (lshard_group_rank(rank->group) != rank->member->rank || !lshard_group_transport(rank->group)[0])
		return __LINE__;
	return 0;
}

static int copies_are_freed(struct rank *rank)
{
	lshard_group_abort(rank->group); /* the child's own is nothing to the rank */
	if (rank->series && lshard_group_destroy(rank->group) != LSHARD_ERR_BUSY)
		return __LINE__;
	if (lshard_series_destroy(rank->series) != LSHARD_OK)
		return __LINE__;
	if (lshard_group_destroy(rank->group) != LSHARD_OK)
		return __LINE__;
	return 0;
}

/* What the parent has mapped stays to be read. */
static int memory_is_readable(struct rank *rank, uint32_t position)
{
	const struct setting *setting = rank->setting;

	for (uint32_t tensor = 0; tensor < setting->n_tensors && subject.memory == LSHARD_MEMORY_HOST; tensor++)
		if (!is_foretold(rank->addresses[position][tensor], setting->tensors[tensor].bytes, rank->generation,
				 setting->first_layer + position, tensor))
			return __LINE__;
	return 0;
}

static int only_destroy_is_left(struct rank *rank)
{
	int line = memory_is_readable(rank, 0);

	if (!line)
		line = a_pass_is_refused(rank);
	if (!line)
		line = collective_calls_are_refused(rank);
	if (!line)
		line = questions_are_refused(rank);
	return line ? line : copies_are_freed(rank);
}

/* As a child does that knows nothing of the group. */
static int just_ends(struct rank *rank)
{
	(void)rank;
	return 0;
}

/* ---- In the parent --------------------------------------------------------------------------------------------- */

/* Kills it when it hangs; -1 then. */
static int wait_for(pid_t child)
{
	const struct timespec nap = {0, 1000000};
	int status;

	for (int waited = 0; waited < CHILD_MS; waited++) {
		if (waitpid(child, &status, WNOHANG) == child)
			return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
		nanosleep(&nap, NULL);
	}
	kill(child, SIGKILL);
	waitpid(child, &status, 0);
	return -1;
}

/* A child writes out what stdio holds, as exit does, but runs no handlers of the test's own. */
static bool fork_and(struct rank *rank, int (*step)(struct rank *rank))
{
	pid_t child;
	int line;

	fflush(NULL);
	child = fork();
	if (child == 0) {
		line = step(rank);
		if (line)
			fprintf(stderr, "conformance_fork.c:%d: in a child of rank %d\n", line,
				(int)rank->member->rank);
		fflush(NULL);
		_exit(line != 0);
	}
	EXPECT(rank->member, child > 0, "fork");
	line = wait_for(child);
	EXPECT(rank->member, line == 0, "a child of it: %d (-1: it hung or crashed)", line);
	return true;
failed:
	return false;
}

/* A pass in which children come and go while layers are on their way. */
static bool pass_among_children(struct rank *rank)
{
	for (uint32_t position = 0; position < rank->setting->layers; position++) {
		const uint32_t layer = rank->setting->first_layer + position;

		OK_SERIES(rank, lshard_reach(rank->series, layer, rank->stream));
		if (!fork_and(rank, position % 2 ? copies_are_freed : just_ends))
			return false;
		OK_SERIES(rank, lshard_wait(rank->series, layer, rank->stream));
		if (!layer_is_right(rank, position))
			return false;
	}
	return rank_looked(rank);
failed:
	return false;
}

static int forking_body(const struct member *member)
{
	struct setting setting = plain_setting(member);
	struct rank rank = {0};
	bool right = false;
	uint64_t hash;

	setting.placement = *(const lshard_placement *)member->user;
	if (!rank_group(&rank, member, &setting))
		goto failed;
	if (!fork_and(&rank, copies_are_freed) || !fork_and(&rank, just_ends))
		goto failed;
	if (!rank_series(&rank) || !rank_note_addresses(&rank) || !one_pass(&rank))
		goto failed;
	OK_SERIES(&rank, lshard_reach(rank.series, setting.first_layer, rank.stream));
	OK_SERIES(&rank, lshard_wait(rank.series, setting.first_layer, rank.stream));
	if (!fork_and(&rank, only_destroy_is_left) || !pass_among_children(&rank))
		goto failed;
	OK_SERIES(&rank, lshard_series_verify(rank.series, &hash)); /* all ranks are there for each other */
	right = one_pass(&rank);
failed:
	return !rank_close(&rank) || !right;
}

void children_by_fork_are_no_ranks(void **state)
{
	lshard_placement placement = LSHARD_WHOLE;

	(void)state;
	assert_int_equal(team_run(subject.kind, 3, forking_body, &placement), 0);
	placement = LSHARD_STRIPED;
	assert_int_equal(team_run(subject.kind, 2, forking_body, &placement), 0);
}

/* ---- A rank dies and its child lives on ------------------------------------------------------------------------ */

/* It has all that its parent had open, for longer than anybody waits; the test ends it. */
static void outlive_the_rank(volatile pid_t *child)
{
	pid_t forked;

	fflush(NULL);
	forked = fork();
	if (forked == 0) {
		alarm(60);
		pause();
		_exit(0);
	}
	*child = forked;
}

static bool is_seen_dead(struct rank *rank)
{
	lshard_status status;

	do /* as a group does that goes on; the rank may still be dying */
		status = lshard_series_verify(rank->series, NULL);
	while (status == LSHARD_OK);
	EXPECT(rank->member, status == LSHARD_ERR_PEER_FAILED, "%s: %s", lshard_status_name(status),
	       lshard_series_error(rank->series));
	EXPECT(rank->member, strstr(lshard_series_error(rank->series), "rank 1"), "%s",
	       lshard_series_error(rank->series));
	return true;
failed:
	return false;
}

static int dying_body(const struct member *member)
{
	volatile pid_t *child = member->user;
	struct setting setting = plain_setting(member);
	struct rank rank = {0};
	bool right;

	if (!rank_open(&rank, member, &setting))
		return 1;
	if (member->rank == 1) {
		outlive_the_rank(child);
		team_dies(member);
		raise(SIGKILL);
	}
	right = is_seen_dead(&rank) && one_pass(&rank);
	return !rank_close(&rank) || !right;
}

void a_dead_rank_is_gone_although_its_child_lives(void **state)
{
	pid_t *child = shared_new(sizeof *child);

	(void)state;
	if (strcmp(subject.kind, "forks") != 0 || subject.callbacks) {
		does_not_apply(__func__,
			       subject.callbacks ? "the transport cannot know who is gone" : "ranks are threads");
	} else {
		const int failures = team_run(subject.kind, 3, dying_body, child);
		const bool lived = *child > 0 && kill(*child, SIGKILL) == 0;

		assert_int_equal(failures, 0);
		assert_true(lived); /* all the time */
	}
	shared_free(child, sizeof *child);
}
