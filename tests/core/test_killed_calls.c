/* SPDX-License-Identifier: Apache-2.0
 *
 * test_killed_calls.c - a rank is killed in each of the calls that all ranks make together, before its first collective
 * or between any two, where callbacks over sockets carry the layers, bare and behind each wrapper. The others are told
 * who is gone; what a wait says is OK afterwards is right; and nothing is OK any more that needs the one that is gone.
 */
#include "conformance.h"
#include "patience.h"
#include "socket_circle.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define LAYERS 7

enum call { COMMIT, JOIN, PREPARE, REWIND, VERIFY, UPDATE_BEGIN, UPDATE_END, CALLS };

static const char *const call_names[CALLS] = {"commit", "join",         "prepare",   "rewind",
					      "verify", "update_begin", "update_end"};

struct trial {
	const char *way;
	enum call call;
	long die_at; /* callbacks of the last rank after its call has begun */
	lshard_placement placement;
	struct socket_circle circle;
};

static bool open_group(struct rank *rank, const struct member *member, const struct setting *setting,
		       struct socket_circle *circle)
{
	lshard_group_options options = member_options(member, setting->spec, LONG_MS);
	char error[512] = "";

	*rank = (struct rank){.member = member, .setting = setting, .fail_at = -1};
	options.error = error;
	options.error_bytes = sizeof error;
	EXPECT(member, socket_circle_join(circle, member), "no circle");
	options.callbacks = &circle->callbacks;
	EXPECT(member, lshard_group_create(&options, &rank->group) == LSHARD_OK, "%s", error);
	return true;
failed:
	rank->group = NULL;
	return false;
}

static lshard_status make(struct rank *rank, enum call call)
{
	switch (call) {
	case COMMIT:
		return lshard_series_commit(rank->series, fill_layer, rank);
	case JOIN:
		return lshard_series_join(rank->series, NULL);
	case PREPARE:
		return lshard_series_prepare(rank->series, NULL);
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

static bool wary_steps(struct rank *rank, uint32_t first, uint32_t steps)
{
	for (uint32_t step = first; step < first + steps; step++) {
		lshard_reach(rank->series, step % LAYERS, NULL);
		if (lshard_wait(rank->series, step % LAYERS, NULL) == LSHARD_OK && !layer_is_right(rank, step % LAYERS))
			return false;
	}
	return true;
}

/* Up to the call all is well; then transfers are on their way that the last rank has not asked for. */
static bool come_to(struct rank *rank, enum call call)
{
	lshard_series_options options = rank_series_options(rank->setting);

	EXPECT(rank->member, lshard_series_create(rank->group, &options, &rank->series) == LSHARD_OK, "%s",
	       lshard_group_error(rank->group));
	if (!rank_note_addresses(rank))
		return false;
	if (call > COMMIT)
		OK_SERIES(rank, make(rank, COMMIT));
	for (uint32_t position = 0; call > COMMIT && position < LAYERS / 2; position++)
		if (!visit(rank, position))
			return false;
	if (call > COMMIT && call < UPDATE_END && rank->member->rank < CIRCLE_RANKS - 1)
		OK_SERIES(rank, lshard_reach(rank->series, LAYERS / 2 + 1, NULL));
	if (call == UPDATE_END) {
		OK_SERIES(rank, make(rank, UPDATE_BEGIN));
		rank->generation++;
	}
	return true;
failed:
	return false;
}

/* What needs the rank that is gone, after a call that was OK or was not. */
static enum call next_after(enum call call, lshard_status status)
{
	if (status >= 0)
		return call == UPDATE_BEGIN ? UPDATE_END : REWIND;
	return call == COMMIT || call == UPDATE_END ? call : REWIND;
}

static bool names_the_dead(const struct rank *rank, enum call call, lshard_status status)
{
	const char *text = lshard_series_error(rank->series);

	EXPECT(rank->member, strstr(text, "rank 2") || strstr(text, "ranks 2"), "%s: %s does not name rank 2: %s",
	       call_names[call], lshard_status_name(status), text);
	return true;
failed:
	return false;
}

static int killed_body(const struct member *member)
{
	struct trial *trial = member->user;
	struct setting setting = {.layers = LAYERS, .prefetch = 1, .placement = trial->placement, .spec = trial->way};
	struct rank rank;
	lshard_status status;
	enum call next;
	bool right = false;

	setting.resident_bytes = 1 << 14;
	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	if (!open_group(&rank, member, &setting, &trial->circle) || !come_to(&rank, trial->call))
		goto failed;
	EXPECT(member, team_barrier(member), "a rank failed");
	if (member->rank == CIRCLE_RANKS - 1)
		trial->circle.die_at = trial->die_at;
	status = make(&rank, trial->call);
	if (member->rank == CIRCLE_RANKS - 1)
		socket_circle_die(&trial->circle); /* at the latest */
	next = next_after(trial->call, status);
	if ((status < 0 && !names_the_dead(&rank, trial->call, status)) || !wary_steps(&rank, LAYERS / 2, 2 * LAYERS))
		goto failed;
	status = make(&rank, next);
	EXPECT(member, status < 0, "%s was OK without a rank", call_names[next]);
	right = names_the_dead(&rank, next, status) && wary_steps(&rank, 0, LAYERS);
failed:
	if (!right)
		fprintf(stderr, "in %s, killed in %s at %ld\n", trial->way, call_names[trial->call], trial->die_at);
	right = rank_close(&rank) && right;
	socket_circle_leave(&trial->circle);
	return !right;
}

static void a_killed_rank_leaves_nothing_wrong(void **state)
{
	static const char *const ways[] = {"callback", "throttle=1e9,callback", "trace=killed_calls.json,callback",
					   "faults=drain@999=fail,callback"};
	static const long deaths[] = {0, 1, 2, 3, 5, 8, 13};
	const size_t n_ways = sizeof ways / sizeof ways[0], n_deaths = sizeof deaths / sizeof deaths[0];

	(void)state;
	subject = (struct subject){.spec = "callback", .kind = "forks", .collective = true};
	for (int call = COMMIT; call < CALLS; call++)
		for (size_t buffer = 0; buffer < n_deaths * n_ways; buffer++) {
			const size_t death = buffer % n_deaths;
			struct trial trial = {.way = ways[buffer / n_deaths],
					      .call = (enum call)call,
					      .die_at = deaths[death],
					      .placement = death % 2 ? LSHARD_STRIPED : LSHARD_WHOLE};

			assert_int_equal(team_of_processes(CIRCLE_RANKS, killed_body, &trial), 0);
		}
	for (int rank = 0; rank < CIRCLE_RANKS; rank++) {
		char path[64];

		snprintf(path, sizeof path, "killed_calls.%d.json", rank);
		unlink(path);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_killed_rank_leaves_nothing_wrong),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
