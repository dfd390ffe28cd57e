/* SPDX-License-Identifier: Apache-2.0
 *
 * test_failed_calls.c - on collective transports, each call that all ranks make together fails once, for each reason
 * there is; then the ranks go on as if nothing were. What a wait says is OK must be right; and once a rewind (or the
 * call again, where the series is not in use) has been OK on all ranks, all is right again.
 *
 * Knows: the public header. The ranks tell each other how they fared through the tests' own all-gather, so nothing
 * depends on a clock: a rank that is late comes after the others have given up. Deadlines are short because most cases
 * wait for one; one that passes too early only means one more call.
 */
#include "conformance.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define RANKS       3
#define LAYERS      9
#define DEADLINE_MS 80
#define TRIES       40
#define DOUBLINGS   6

enum call { CREATE, COMMIT, JOIN, PREPARE, REWIND, VERIFY, UPDATE_BEGIN, UPDATE_END, CALLS };

static const char *const call_names[CALLS] = {"create", "commit", "join",         "prepare",
					      "rewind", "verify", "update_begin", "update_end"};

enum trouble {
	NONE,        /* or what the specification's faults make */
	LATE,        /* the last rank calls when the others have given up */
	OUT_OF_STEP, /* the last rank has reached another layer */
	BROKEN,      /* the last rank's collectives fail from now on */
	ABORTED, /* the last rank aborts its group, which tells the others; one that is killed: test_killed_calls.c */
	TROUBLES
};

static const char *const trouble_names[TROUBLES] = {"nothing", "late", "out of step", "broken", "aborted"};

struct trial {
	char spec[96];
	enum trouble trouble;
	enum call call; /* with it */
	lshard_placement placement;
	uint32_t deadline_ms;
	atomic_bool too_slow; /* the machine, for the deadline: tried again with twice as much */
	int failed;
};

/* One rank of a trial. */
struct player {
	struct rank rank;
	struct setting setting;
	struct trial *trial;
	uint32_t at;   /* the next layer */
	bool ends;     /* the trouble is one after which nothing is repaired */
	bool left;     /* this rank has */
	bool troubled; /* it has happened */
};

static bool is_last(const struct player *player)
{
	return player->rank.member->rank == RANKS - 1;
}

/* ---- All ranks ------------------------------------------------------------------------------------------------- */

/* How all ranks fared. */
struct fared {
	lshard_status status[RANKS];
	int ok;
};

static bool tell(const struct member *member, lshard_status mine, struct fared *fared)
{
	EXPECT(member, member->bootstrap->allgather(member->bootstrap->user, &mine, fared->status, sizeof mine) == 0,
	       "a rank failed");
	fared->ok = 0;
	for (int i = 0; i < RANKS; i++)
		fared->ok += fared->status[i] == LSHARD_OK;
	return true;
failed:
	return false;
}

static lshard_status make(struct player *player, enum call call)
{
	struct rank *rank = &player->rank;
	lshard_series_options options;

	if (player->left)
		return LSHARD_ERR_ABORTED;
	switch (call) {
	case CREATE:
		options = rank_series_options(&player->setting);
		return lshard_series_create(rank->group, &options, &rank->series);
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

static void go_out_of_step(struct player *player)
{
	if (is_last(player) && player->rank.series)
		lshard_reach(player->rank.series, LAYERS - 2, NULL);
}

/* The call on all ranks, with the trial's trouble if it is its turn. */
static bool together(struct player *player, enum call call, struct fared *fared)
{
	const struct member *member = player->rank.member;
	const bool now = !player->troubled && call == player->trial->call;
	const enum trouble trouble = now ? player->trial->trouble : NONE;
	lshard_status status = LSHARD_OK;

	player->troubled = player->troubled || now;
	player->ends = player->ends || trouble == BROKEN || trouble == ABORTED;
	if (trouble == OUT_OF_STEP)
		go_out_of_step(player);
	if (trouble == BROKEN && is_last(player))
		seat_fail_at(player->rank.seat, 0);
	if (trouble == ABORTED && is_last(player)) {
		lshard_group_abort(player->rank.group);
		player->left = true;
	}
	if (trouble != LATE || !is_last(player))
		status = make(player, call);
	if (!tell(member, status, fared))
		return false;
	if (trouble == LATE && is_last(player))
		status = make(player, call);
	return tell(member, status, fared);
}

/* ---- Passes ---------------------------------------------------------------------------------------------------- */

/* From where the program is, whatever the calls say: OK is said of right bytes. */
static bool wary_steps(struct player *player, uint32_t steps)
{
	struct rank *rank = &player->rank;

	for (uint32_t step = 0; step < steps && !player->left; step++, player->at = (player->at + 1) % LAYERS) {
		lshard_reach(rank->series, player->at, NULL);
		if (lshard_wait(rank->series, player->at, NULL) == LSHARD_OK && !layer_is_right(rank, player->at))
			return false;
	}
	return true;
}

static lshard_status wait_patiently(struct rank *rank, uint32_t layer)
{
	lshard_status status = LSHARD_ERR_TIMEOUT;

	for (int i = 0; i < TRIES && status == LSHARD_ERR_TIMEOUT; i++)
		status = lshard_wait(rank->series, layer, NULL);
	return status;
}

/* A whole pass in which only slowness is forgiven; how it ended. */
static bool sure_pass(struct player *player, lshard_status *status)
{
	struct rank *rank = &player->rank;

	*status = LSHARD_OK;
	player->at = 0;
	for (uint32_t position = 0; position < LAYERS && *status == LSHARD_OK; position++) {
		*status = lshard_reach(rank->series, position, NULL);
		if (*status == LSHARD_OK)
			*status = wait_patiently(rank, position);
		if (*status == LSHARD_OK && !layer_is_right(rank, position))
			return false;
	}
	return true;
}

/* ---- The script ------------------------------------------------------------------------------------------------ */

/* These happen on all ranks or on none. */
static bool is_of_all(enum call call)
{
	return call != JOIN && call != PREPARE && call != VERIFY;
}

/* Which call makes the series usable again. */
static enum call remedy(enum call call)
{
	return call == CREATE || call == COMMIT || call == UPDATE_END ? call : REWIND;
}

static void learn_addresses(struct player *player, enum call call)
{
	struct rank *rank = &player->rank;

	if (call == CREATE && rank->series)
		rank_note_addresses(rank);
	if (call == UPDATE_BEGIN)
		rank->generation++;
}

static const char *last_error(const struct player *player)
{
	return player->rank.series ? lshard_series_error(player->rank.series) : lshard_group_error(player->rank.group);
}

/*
 * By callbacks, a collective that all have begun and that does not end in time is the end of the group. Nothing else is
 * forgiven.
 */
static void note_slowness(struct player *player)
{
	const char *text = last_error(player);

	if (strstr(text, "have not ended: the link or a rank is slow") ||
	    strstr(text, "the caller's collective does not end"))
		player->trial->too_slow = true;
}

/*
 * Until all ranks have come through the remedy, and a pass after it: the one fault there is may hit these. Where a rank
 * is gone there is no remedy.
 */
static bool repair(struct player *player, enum call call)
{
	const struct member *member = player->rank.member;
	struct fared fared = {{LSHARD_OK}, 0};
	lshard_status status = LSHARD_OK;

	for (int i = 0; i < TRIES; i++) {
		if (!together(player, remedy(call), &fared))
			return false;
		EXPECT(member, !player->ends || fared.ok == 0, "%s is OK without a rank", call_names[remedy(call)]);
		if (player->ends)
			return true;
		if (fared.ok < RANKS)
			continue;
		if (remedy(call) == CREATE)
			return true;
		if (!sure_pass(player, &status) || !tell(member, status, &fared))
			return false;
		if (fared.ok == RANKS)
			return true;
		call = REWIND;
	}
	note_slowness(player);
	EXPECT(member, false, "%s: not repaired by %d tries: %s", player->trial->spec, TRIES, last_error(player));
failed:
	return false;
}

/* One call of the script, and what comes of it. Transfers are on their way when it is made. */
static bool act(struct player *player, enum call call)
{
	const struct member *member = player->rank.member;
	struct fared fared;

	if (call > COMMIT && call != UPDATE_END && !wary_steps(player, LAYERS / 2))
		return false;
	if (!together(player, call, &fared))
		return false;
	if (fared.ok > 0 && fared.ok < RANKS && is_of_all(call)) {
		note_slowness(player);
		EXPECT(member, false, "%s: %s was OK on some ranks only: %s", player->trial->spec, call_names[call],
		       last_error(player));
	}
	if (fared.ok == RANKS) {
		learn_addresses(player, call);
		return true;
	}
	if (call > CREATE && !wary_steps(player, 2 * LAYERS))
		return false;
	return repair(player, call);
failed:
	return false;
}

static bool play_script(struct player *player)
{
	for (int call = CREATE; call < CALLS; call++) {
		struct fared fared;
		enum call made = (enum call)call;

		if (!act(player, made))
			return false;
		if (player->ends)
			return true;
		if (made == CREATE)
			learn_addresses(player, made);
		/* an update that did not begin is not ended: it begins again, without the trouble */
		while (made == UPDATE_BEGIN && lshard_reach(player->rank.series, 0, NULL) != LSHARD_ERR_STATE) {
			if (!together(player, made, &fared))
				return false;
			if (fared.ok == RANKS)
				learn_addresses(player, made);
			else if (!repair(player, made))
				return false;
		}
	}
	return true;
}

/* What is still on its way may take longer than the deadline, and that is said. */
static bool close_patiently(struct player *player)
{
	lshard_status status = LSHARD_ERR_TIMEOUT;

	for (int i = 0; i < TRIES && status == LSHARD_ERR_TIMEOUT; i++)
		status = lshard_series_destroy(player->rank.series);
	player->rank.series = NULL;
	return rank_close(&player->rank) && status == LSHARD_OK;
}

static int trial_body(const struct member *member)
{
	struct trial *trial = member->user;
	struct player player = {.trial = trial};
	bool right = false;

	player.setting = (struct setting){.layers = LAYERS,
					  .prefetch = 1,
					  .placement = trial->placement,
					  .resident_bytes = 1 << 14,
					  .timeout_ms = trial->deadline_ms,
					  .spec = trial->spec};
	setting_tensors(&player.setting, 2, LSHARD_STRIPE_BYTES);
	if (rank_group(&player.rank, member, &player.setting))
		right = play_script(&player) && team_barrier(member);
	else
		trial->too_slow = true;
	if (!right)
		fprintf(stderr, "in %s, %s at %s\n", trial->spec, trouble_names[trial->trouble],
			call_names[trial->call]);
	return close_patiently(&player) && right ? 0 : 1;
}

/* ---- Trials ---------------------------------------------------------------------------------------------------- */

#define AT_ONCE 12 /* they mostly wait */

struct trials {
	struct trial *all;
	size_t count;
	atomic_size_t next;
};

static void remove_traces(const struct trial *trial)
{
	const char *trace = strstr(trial->spec, "trace=");
	char path[128];

	for (int rank = 0; trace && rank < RANKS; rank++) {
		const int stem = (int)(strstr(trace, ".json") - trace) - 6;

		snprintf(path, sizeof path, "%.*s.%d.json", stem, trace + 6, rank);
		unlink(path);
	}
}

static void *run_some(void *argument)
{
	struct trials *trials = argument;
	size_t index;

	while ((index = atomic_fetch_add(&trials->next, 1)) < trials->count) {
		struct trial *trial = &trials->all[index];

		for (int i = 0; i <= DOUBLINGS && (i == 0 || trial->too_slow); i++) {
			trial->deadline_ms = (uint32_t)DEADLINE_MS << i;
			trial->too_slow = false;
			trial->failed = team_of_threads(RANKS, trial_body, trial);
		}
		remove_traces(trial);
	}
	return NULL;
}

static void run_all(struct trial *all, size_t count)
{
	struct trials trials = {.all = all, .count = count};
	pthread_t threads[AT_ONCE];
	int failed = 0;

	for (int i = 0; i < AT_ONCE; i++)
		assert_int_equal(pthread_create(&threads[i], NULL, run_some, &trials), 0);
	for (int i = 0; i < AT_ONCE; i++)
		pthread_join(threads[i], NULL);
	for (size_t i = 0; i < count; i++)
		failed += all[i].failed != 0;
	print_message("%zu trials\n", count);
	assert_int_equal(failed, 0);
}

static void set_subject(bool callbacks)
{
	subject = (struct subject){.spec = "many", .kind = "threads", .collective = true, .callbacks = callbacks};
}

/* Each trouble at each call, by each of these ways to the transport. */
static void run_troubles(const char *transport)
{
	static const char *const ways[] = {"", "throttle=1e9,", "trace=failed_calls_%zu.json,",
					   "faults=drain@999999=fail,", "throttle=1e9,trace=failed_calls_%zu.json,"};
	struct trial all[sizeof ways / sizeof ways[0] * TROUBLES * CALLS];
	const bool callbacks = strcmp(transport, "callback") == 0;
	size_t count = 0;

	set_subject(callbacks);
	for (size_t way = 0; way < sizeof ways / sizeof ways[0]; way++)
		for (int trouble = LATE; trouble < TROUBLES; trouble++)
			for (int call = CREATE; call < CALLS; call++) {
				struct trial *trial = &all[count];

				if (trouble == BROKEN && !callbacks)
					continue;
				*trial = (struct trial){.trouble = (enum trouble)trouble, .call = (enum call)call};
				trial->placement = (call + trouble) % 2 ? LSHARD_WHOLE : LSHARD_STRIPED;
				snprintf(trial->spec, sizeof trial->spec, ways[way], count++);
				strcat(trial->spec, transport);
			}
	run_all(all, count);
}

static void a_failed_call_leaves_nothing_wrong(void **state)
{
	(void)state;
	run_troubles("local:lockstep");
	run_troubles("callback");
}

/* Each of the transport's own calls fails once on one rank, in each way, wherever in the script that is. */
static void run_faults(const char *transport)
{
	static const char *const ways[] = {"", "throttle=1e9,"};
	static const char *const actions[] = {"fail", "timeout", "peer"};
	static const struct {
		const char *name;
		int times;
	} calls[] = {{"exchange", 16}, {"fetch", 12}, {"wait", 24}, {"join", 2}, {"drain", 4}, {"read", 8}};
	struct trial all[2 * 72];
	size_t count = 0;

	set_subject(strcmp(transport, "callback") == 0);
	for (size_t way = 0; way < 2; way++)
		for (size_t call = 0; call < sizeof calls / sizeof calls[0]; call++)
			for (int time = 1; time <= calls[call].times; time++) {
				struct trial *trial = &all[count];

				*trial = (struct trial){.placement = count % 2 ? LSHARD_WHOLE : LSHARD_STRIPED};
				snprintf(trial->spec, sizeof trial->spec, "%sfaults=r1.%s@%d=%s,%s", ways[way],
					 calls[call].name, time, actions[count++ / 2 % 3], transport);
			}
	run_all(all, count);
}

static void a_fault_on_one_rank_leaves_nothing_wrong(void **state)
{
	(void)state;
	run_faults("local:lockstep");
	run_faults("callback");
}

/* ---- What the others are told ---------------------------------------------------------------------------------- */

/* A fault of one rank's own in the middle of a call. Nobody waits: a deadline would be longer than the test. */
struct told {
	lshard_status (*call)(lshard_series *series);
	const char *fault;
	lshard_status status;
	const char *text;
};

struct telling {
	const struct told *told;
	const char *transport;
};

static bool is_told(const struct rank *rank, const struct told *told, lshard_status status)
{
	const char *text = lshard_series_error(rank->series);

	EXPECT(rank->member, status == told->status, "%s: %s: %s", told->fault, lshard_status_name(status), text);
	EXPECT(rank->member, rank->member->rank == RANKS - 1 || strstr(text, told->text), "%s: no '%s' in: %s",
	       told->fault, told->text, text);
	return true;
failed:
	return false;
}

static bool open_with_fault(struct rank *rank, const struct member *member, struct setting *setting, const char *fault,
			    const char *transport, char *spec, size_t bytes)
{
	snprintf(spec, bytes, "faults=%s,%s", fault, transport);
	*setting = (struct setting){.layers = LAYERS, .prefetch = 1, .spec = spec};
	setting_tensors(setting, 2, LSHARD_STRIPE_BYTES);
	return rank_open(rank, member, setting);
}

static int told_body(const struct member *member)
{
	const struct telling *telling = member->user;
	struct setting setting;
	struct rank rank;
	char spec[96];
	bool right = false;

	if (!open_with_fault(&rank, member, &setting, telling->told->fault, telling->transport, spec, sizeof spec))
		return 1;
	if (!is_told(&rank, telling->told, telling->told->call(rank.series)))
		goto failed;
	OK_SERIES(&rank, telling->told->call(rank.series)); /* all come to the next call alike */
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static lshard_status verify(lshard_series *series)
{
	return lshard_series_verify(series, NULL);
}

static void a_failure_is_told_at_once_and_as_what_it_is(void **state)
{
	static const struct told all[] = {
		{lshard_series_update_begin, "r2.drain@1=peer", LSHARD_ERR_PEER_FAILED,
		 "rank 2 lost another rank in the second half of lshard_series_update_begin"},
		{lshard_series_update_begin, "r2.drain@1=fail", LSHARD_ERR_TRANSPORT,
		 "rank 2 failed in the second half of lshard_series_update_begin"},
		{lshard_series_update_begin, "r2.drain@1=timeout", LSHARD_ERR_TIMEOUT,
		 "rank 2 failed in the second half of lshard_series_update_begin"},
		{verify, "r2.wait@3=timeout", LSHARD_ERR_TIMEOUT,
		 "rank 2 failed in the second half of lshard_series_verify"},
	};
	static const char *const transports[] = {"local:lockstep", "callback"};

	(void)state;
	for (size_t i = 0; i < 2 * sizeof all / sizeof all[0]; i++) {
		struct telling telling = {&all[i / 2], transports[i % 2]};

		set_subject(i % 2 == 1);
		assert_int_equal(team_of_threads(RANKS, told_body, &telling), 0);
	}
}

/* ---- The cure -------------------------------------------------------------------------------------------------- */

struct cure {
	const char *fault;
	int rewinds; /* enough: all hear at once of what an agreement finds, or only when the next one goes wrong */
	const char *transport;
};

/* As a program does that knows of itself alone: verify, then rewind until that is OK. */
static int cured_body(const struct member *member)
{
	const struct cure *cure = member->user;
	struct player player = {.at = 0};
	struct rank *rank = &player.rank;
	lshard_status status = LSHARD_ERR_TIMEOUT;
	char spec[96];
	bool right = false;

	if (!open_with_fault(rank, member, &player.setting, cure->fault, cure->transport, spec, sizeof spec))
		return 1;
	(void)lshard_series_verify(rank->series, NULL);
	for (int i = 0; i < cure->rewinds && status != LSHARD_OK; i++)
		status = lshard_series_rewind(rank->series);
	EXPECT(member, status == LSHARD_OK, "%s: not cured by %d rewinds: %s", spec, cure->rewinds,
	       lshard_series_error(rank->series));
	right = sure_pass(&player, &status);
	EXPECT(member, status == LSHARD_OK, "%s: %s", spec, lshard_series_error(rank->series));
failed:
	if (!right)
		lshard_group_abort(rank->group);
	return rank_close(rank) && right ? 0 : 1;
}

static void rewinds_cure_what_one_rank_did_not_come_through(void **state)
{
	static const struct cure all[] = {
		{"r0.wait@3=timeout", 1, "local:lockstep"},      {"r0.wait@3=timeout", 1, "callback"},
		{"r1.wait@6=timeout", 1, "local:lockstep"},      {"r1.wait@6=timeout", 1, "callback"},
		{"r0.wait@3=peer", 1, "local:lockstep"},         {"r0.wait@3=peer", 1, "callback"},
		{"r2.drain@1=peer", 1, "local:lockstep"},        {"r2.drain@1=peer", 1, "callback"},
		{"r1.drain@1=timeout", 3, "local:lockstep"},     {"r1.drain@1=timeout", 3, "callback"},
		{"r2.drain@2=timeout", 3, "local:lockstep"},     {"r2.drain@2=timeout", 3, "callback"},
		{"r0.exchange@9=timeout", 3, "local:lockstep"},  {"r0.exchange@9=timeout", 3, "callback"},
		{"r2.exchange@14=timeout", 3, "local:lockstep"}, {"r2.exchange@14=timeout", 3, "callback"},
	};

	(void)state;
	for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
		struct cure cure = all[i];

		set_subject(strcmp(cure.transport, "callback") == 0);
		assert_int_equal(team_of_threads(RANKS, cured_body, &cure), 0);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_failed_call_leaves_nothing_wrong),
		cmocka_unit_test(a_fault_on_one_rank_leaves_nothing_wrong),
		cmocka_unit_test(a_failure_is_told_at_once_and_as_what_it_is),
		cmocka_unit_test(rewinds_cure_what_one_rank_did_not_come_through),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
