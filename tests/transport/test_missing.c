/* SPDX-License-Identifier: Apache-2.0
 *
 * test_missing.c - every collective call, on one transport, without rank 1: late, gone, aborted, in another call, or
 * with it and then late or gone in the middle. The others get a status of the header's list that names it, and no later
 * than one deadline after they called.
 *
 *     test_missing SPEC threads|forks [device|neighbours]
 *
 * device: `callback` with layers in the memory of a fake device. neighbours: the first two ranks are on one device.
 *
 * Behind a wrapper only the calls are made that go through what is the wrapper's own: transfers and reads.
 *
 * A cell of the table is a program of its own with three ranks, and several run at a time. The deadline is long enough
 * that a busy machine does not make two of one.
 */
#include "conformance.h"
#include "patience.h"
#include "test_clock.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define RANKS       3
#define MISSING     1
#define DEADLINE_MS patience(is_driven() ? 3000 : 1500)
#define AT_A_TIME   (is_driven() ? 4 : 8)

enum call {
	GROUP_CREATE,
	SERIES_CREATE,
	COMMIT,
	COMMIT_STRIPES,
	UPDATE_END,
	UPDATE_BEGIN,
	VERIFY,
	REWIND,
	WAIT,
	PREPARE,
	JOIN,
	DESTROY,
	CALLS
};

/*
 * CROSSED: in rewind while the others verify, or the other way round. SILENT: alive, and takes no part in the caller's
 * collectives. BUSY, DYING: late and gone in post_process.
 */
enum way { LATE, GONE, ABORTED, ELSEWHERE, CROSSED, SILENT, BUSY, DYING, WAYS };

static const char *const call_names[CALLS] = {"group_create", "series_create", "commit", "commit of stripes",
					      "update_end",   "update_begin",  "verify", "rewind",
					      "wait",         "prepare",       "join",   "destroy"};
static const char *const way_names[WAYS] = {"late",   "gone", "aborted", "in another call", "in a call like it",
					    "silent", "busy", "dying"};

struct cell {
	enum call call;
	enum way way;
	char job[64];
	bool begun; /* the call itself, by some rank */
};

/* By a driver, or its stub: what a group needs to come about then takes a good part of a short deadline. */
static bool is_driven(void)
{
	return subject.memory == LSHARD_MEMORY_CUDA && !subject.fake;
}

struct ranks_series {
	struct rank rank;
	const struct cell *cell;
	lshard_series *other; /* "t", where the call is about a series that is not committed */
};

static struct setting setting_of(enum call call)
{
	struct setting setting = {.size = RANKS, .layers = 6, .prefetch = 1, .timeout_ms = DEADLINE_MS};

	if (call == COMMIT_STRIPES)
		setting.placement = LSHARD_STRIPED;
	setting_tensors(&setting, 2, LSHARD_STRIPE_ROWS);
	return setting;
}

/* ---- The call -------------------------------------------------------------------------------------------------- */

static lshard_status create_other(struct ranks_series *of, const struct setting *setting)
{
	lshard_series_options options = rank_series_options(setting);

	options.name = "t";
	return lshard_series_create(of->rank.group, &options, &of->other);
}

static int fill_or_fail(void *user, uint32_t layer, void *const *tensors)
{
	struct ranks_series *of = user;
	const struct member *member = of->rank.member;

	if (member->rank == MISSING && of->cell->way == BUSY)
		team_barrier(member); /* where the others come when they have been told */
	if (member->rank == MISSING && of->cell->way == DYING) {
		if (strcmp(subject.kind, "forks") == 0) {
			team_dies(member);
			raise(SIGKILL);
		}
		lshard_group_abort(of->rank.group);
	}
	return fill_layer(&of->rank, layer, tensors);
}

/* What comes before the call, on all ranks. */
static bool get_ready(struct ranks_series *of, const struct setting *setting, enum call call)
{
	struct rank *rank = &of->rank;

	if (!rank_series(rank))
		return false;
	if (call == COMMIT || call == COMMIT_STRIPES)
		EXPECT(rank->member, create_other(of, setting) == LSHARD_OK, "%s", lshard_group_error(rank->group));
	if (call == UPDATE_END)
		OK_SERIES(rank, lshard_series_update_begin(rank->series));
	return true;
failed:
	return false;
}

static void reach_on(struct rank *rank)
{
	for (uint32_t layer = 0; layer < 4; layer++)
		lshard_reach(rank->series, layer, rank->stream);
}

/* Where the others are known to be gone before it reaches, nothing is under way: the wait for a layer tells. */
static lshard_status join_all(struct rank *rank)
{
	lshard_status status;

	reach_on(rank);
	status = lshard_series_join(rank->series, rank->stream);
	return status == LSHARD_OK ? lshard_wait(rank->series, 4, rank->stream) : status;
}

static lshard_status pass_on(struct rank *rank)
{
	lshard_status status = LSHARD_OK;

	for (uint32_t step = 0; step < 2 * rank->setting->layers && status == LSHARD_OK; step++) {
		status = lshard_reach(rank->series, step % rank->setting->layers, rank->stream);
		if (status == LSHARD_OK)
			status = lshard_wait(rank->series, step % rank->setting->layers, rank->stream);
	}
	return status;
}

static lshard_status make_call(struct ranks_series *of, const struct setting *setting, enum call call)
{
	struct rank *rank = &of->rank;

	if (of->cell->way == LATE &&
	    call >= UPDATE_BEGIN) /* with transfers on their way that rank 1 does not ask for */
		reach_on(rank);
	switch (call) {
	case SERIES_CREATE:
		return create_other(of, setting);
	case COMMIT:
	case COMMIT_STRIPES:
		return lshard_series_commit(of->other, fill_or_fail, of);
	case UPDATE_BEGIN:
		return lshard_series_update_begin(rank->series);
	case UPDATE_END:
		return lshard_series_update_end(rank->series, fill_or_fail, of);
	case VERIFY:
		return lshard_series_verify(rank->series, NULL);
	case REWIND:
		return lshard_series_rewind(rank->series);
	case WAIT:
		return pass_on(rank);
	case PREPARE:
		reach_on(rank);
		return lshard_series_prepare(rank->series, rank->stream);
	case JOIN:
		return join_all(rank);
	case DESTROY:
		return lshard_series_destroy(rank->series);
	case GROUP_CREATE:
	case CALLS:
		break;
	}
	return LSHARD_ERR_INVALID;
}

static const char *text_of(const struct ranks_series *of, enum call call)
{
	if (call == SERIES_CREATE)
		return lshard_group_error(of->rank.group);
	return lshard_series_error(of->other ? of->other : of->rank.series);
}

/* ---- The table ------------------------------------------------------------------------------------------------- */

static bool is_collective(enum call call)
{
	return call <= VERIFY || subject.collective;
}

static bool applies(enum call call, enum way way)
{
	if (strchr(subject.spec, ',') && call != COMMIT && call < VERIFY)
		return false;
	if (call == GROUP_CREATE) /* a rank that never comes; one whose options differ is another test's */
		return way == LATE;
	if (call == DESTROY) /* local, but for the collectives that are on their way */
		return subject.callbacks && subject.collective && way == LATE;
	if (way == SILENT)
		return subject.callbacks && is_collective(call);
	if (way == CROSSED) /* on one-sided transports nobody agrees in rewind */
		return subject.collective && (call == VERIFY || call == REWIND);
	if (way >= BUSY)
		return call == COMMIT || call == COMMIT_STRIPES || call == UPDATE_END;
	return is_collective(call);
}

/* Where all ranks are in calls in which they agree they know it at once; who waits for a layer may wait in vain. */
static bool is_of_elsewhere(enum call call, lshard_status status)
{
	return status == LSHARD_ERR_MISMATCH || status == LSHARD_ERR_OUT_OF_STEP ||
	       (call > REWIND && status == LSHARD_ERR_TIMEOUT);
}

static bool is_allowed(const struct cell *cell, lshard_status status)
{
	switch (cell->way) {
	case LATE:
	case SILENT:
	case BUSY:
		return status == LSHARD_ERR_TIMEOUT;
	case GONE:
	case ABORTED:
	case DYING:
		return status == LSHARD_ERR_PEER_FAILED;
	case ELSEWHERE:
	case CROSSED:
	case WAYS:
		break;
	}
	return is_of_elsewhere(cell->call, status);
}

/* A layer's source is no rank that is missing: what is told of it is cut out. */
static void cut_source(char *text)
{
	char *source = strstr(text, "(source: ");
	char *end = source ? strchr(source, ')') : NULL;

	if (end)
		memmove(source, end + 1, strlen(end + 1) + 1);
}

/* Of a silent rank nobody can know more than that it is one of the others, unless it has answered once. */
static bool names_it(const struct member *member, const struct cell *cell, const char *told)
{
	char text[1024];

	snprintf(text, sizeof text, "%s", told);
	cut_source(text);
	if (cell->way == SILENT && strstr(text, member->rank == 0 ? "one of ranks 1, 2" : "one of ranks 0, 1"))
		return true;
	return strstr(text, "rank 1") && !strstr(text, "ranks 0") && !strstr(text, "ranks 1");
}

/* Of a rank that calls: the status, the name and no other, and that not two deadlines have passed. */
static bool is_told(const struct member *member, const struct cell *cell, lshard_status status, const char *text,
		    uint64_t took_ms)
{
	const char *call = call_names[cell->call], *way = way_names[cell->way];

	EXPECT(member, is_allowed(cell, status), "%s without a rank that is %s: %s: %s", call, way,
	       lshard_status_name(status), text);
	EXPECT(member, names_it(member, cell, text), "%s without a rank that is %s does not name it alone: %s", call,
	       way, text);
	EXPECT(member, took_ms < DEADLINE_MS * 19 / 10, "%s without a rank that is %s: told after %u ms: %s", call, way,
	       (unsigned)took_ms, text);
	return true;
failed:
	return false;
}

/* ---- The ranks ------------------------------------------------------------------------------------------------- */

/* Rank 1's own call, which is not that of the others. */
static lshard_status call_elsewhere(struct ranks_series *of, const struct setting *setting, const struct cell *cell)
{
	if (cell->way == CROSSED)
		return make_call(of, setting, cell->call == VERIFY ? REWIND : VERIFY);
	if (cell->call == UPDATE_END)
		return create_other(of, setting);
	if (cell->call >= VERIFY)
		return lshard_series_update_begin(of->rank.series);
	return lshard_series_verify(of->rank.series, NULL);
}

/* False: this rank is no more. */
static bool go_missing(struct ranks_series *of, const struct setting *setting, const struct cell *cell)
{
	const struct member *member = of->rank.member;
	lshard_status status;

	if (cell->way == GONE) {
		if (strcmp(subject.kind, "forks") == 0) {
			team_dies(member);
			raise(SIGKILL);
		}
		lshard_series_destroy(of->other);
		of->other = NULL;
		return false;
	}
	if (cell->way == SILENT)
		seat_fall_asleep(of->rank.seat);
	if (cell->way >= BUSY)
		EXPECT(member, make_call(of, setting, cell->call) < 0, "%s on one rank", call_names[cell->call]);
	if (cell->way == ABORTED)
		lshard_group_abort(of->rank.group);
	if (cell->way == ELSEWHERE || cell->way == CROSSED) {
		status = call_elsewhere(of, setting, cell);
		EXPECT(member, is_of_elsewhere(cell->call, status), "in another call than %s: %s",
		       call_names[cell->call], lshard_status_name(status));
	}
	return true;
failed:
	return false;
}

static int series_body(const struct member *member)
{
	struct cell *cell = member->user;
	const struct setting setting = setting_of(cell->call);
	struct ranks_series of = {.cell = cell};
	bool right = false;

	if (!rank_group(&of.rank, member, &setting))
		return 1;
	if (!get_ready(&of, &setting, cell->call) || !team_barrier(member))
		goto failed;
	if (member->rank == MISSING) {
		cell->begun = true;
		right = go_missing(&of, &setting, cell) || cell->way == GONE;
	} else {
		const uint64_t began = now_ms();
		const lshard_status status = make_call(&of, &setting, cell->call);

		right = is_told(member, cell, status, text_of(&of, cell->call), now_ms() - began);
	}
	if (cell->way == SILENT && member->rank == MISSING) {
		right = team_barrier(member) && right;
		seat_wake(of.rank.seat);
		lshard_group_abort(of.rank.group);
	} else if (cell->way != GONE && !(cell->way == DYING && strcmp(subject.kind, "forks") == 0)) {
		if (cell->way != BUSY || member->rank != MISSING) /* it has been there */
			right = team_barrier(member) && right;
		lshard_group_abort(of.rank.group);
	}
failed:
	lshard_series_destroy(of.other);
	return rank_close(&of.rank) && right ? 0 : 1;
}

/* Also ranks that are threads find each other by the job's name. */
static int group_body(const struct member *member)
{
	const struct cell *cell = member->user;
	struct rank rank = {.member = member};
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;
	lshard_group *group = NULL;
	char error[512] = "";
	bool right;

	if (!rank_equip(&rank, &options))
		return 1;
	options.rank = member->rank;
	options.size = member->size;
	options.transport = subject.spec;
	options.job = cell->job;
	options.timeout_ms = DEADLINE_MS;
	options.error = error;
	options.error_bytes = sizeof error;
	right = team_barrier(member);
	if (member->rank != MISSING) {
		const uint64_t began = now_ms();
		const lshard_status status = lshard_group_create(&options, &group);

		right = right && is_told(member, cell, status, error, now_ms() - began);
	}
	right = team_barrier(member) && right;
	return rank_strip(&rank) && right ? 0 : 1;
}

/* ---- All cells ------------------------------------------------------------------------------------------------- */

/*
 * Before a group's deadline rank 0 has a tenth of a second to tell the others, and what comes before the other calls is
 * done within the deadlines that are for them: a busy machine may not give it that.
 */
#define TRIES 5

static int try_cell(struct cell *cell, int number)
{
	if (cell->call != GROUP_CREATE)
		return team_run(subject.kind, RANKS, series_body, cell);
	snprintf(cell->job, sizeof cell->job, "missing-%ld-%d", (long)getpid(), number);
	return team_run(subject.kind, RANKS, group_body, cell);
}

static pid_t begin_cell(enum call call, enum way way)
{
	const pid_t process = fork();
	struct cell *cell;
	int failed = 1;

	if (process != 0)
		return process;
	cell = shared_new(sizeof *cell);
	*cell = (struct cell){.call = call, .way = way};
	for (int i = 0; failed && !cell->begun && i < TRIES; i++)
		failed = try_cell(cell, i);
	_exit(failed != 0);
}

static void end_cell(int *running, int *failed)
{
	int status = 0;

	assert_true(wait(&status) > 0);
	--*running;
	*failed += !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void every_call_names_who_is_missing(void **state)
{
	int running = 0, failed = 0;

	(void)state;
	for (enum call call = 0; call < CALLS; call++) {
		for (enum way way = 0; way < WAYS; way++) {
			if (!applies(call, way))
				continue;
			if (running == AT_A_TIME)
				end_cell(&running, &failed);
			assert_true(begin_cell(call, way) > 0);
			running++;
		}
	}
	while (running > 0)
		end_cell(&running, &failed);
	assert_int_equal(failed, 0);
}

/* Rank 1 goes between the comparison of the fields of a series and that of its tensors. */
static int comparing_body(const struct member *member)
{
	struct setting setting = setting_of(SERIES_CREATE);
	const struct cell cell = {.call = SERIES_CREATE, .way = GONE};
	struct ranks_series of = {.cell = &cell};
	lshard_status status;
	bool right = false;

	setting.timeout_ms = 0;
	if (!rank_group(&of.rank, member, &setting))
		return 1;
	status = create_other(&of, &setting);
	if (member->rank == MISSING) {
		EXPECT(member, status == LSHARD_ERR_TRANSPORT, "%s", lshard_status_name(status));
		lshard_group_abort(of.rank.group);
	} else {
		EXPECT(member, status == LSHARD_ERR_PEER_FAILED, "%s", lshard_status_name(status));
		EXPECT(member, strstr(lshard_group_error(of.rank.group), "rank 1 is gone"), "%s",
		       lshard_group_error(of.rank.group));
	}
	right = true;
failed:
	return rank_close(&of.rank) && right ? 0 : 1;
}

static void a_rank_that_goes_while_tensors_are_compared_is_named(void **state)
{
	static char spec[80];
	const struct subject before = subject;

	(void)state;
	if (subject.callbacks) {
		does_not_apply(__func__, "who is gone, only the caller's collectives know");
		return;
	}
	snprintf(spec, sizeof spec, "faults=r1.exchange@2=fail,%s", subject.spec);
	subject.spec = spec;
	assert_int_equal(team_run(subject.kind, RANKS, comparing_body, NULL), 0);
	subject = before;
}

/* ---- Deadlines and farewells ----------------------------------------------------------------------------------- */

/*
 * Rank 1 asks for one layer after the other, each well within the deadline of a wait, while the others join them all,
 * or wait for the last one.
 */
struct trickle {
	bool joins;
	uint32_t deadline_ms;
};

static int trickling_body(const struct member *member)
{
	const struct cell late = {.call = JOIN, .way = LATE};
	const struct trickle *trickle = member->user;
	struct setting setting = {.layers = 12, .prefetch = 3, .timeout_ms = trickle->deadline_ms};
	struct rank rank;
	bool right = false;

	setting_tensors(&setting, 1, LSHARD_STRIPE_BYTES);
	if (!rank_group(&rank, member, &setting))
		return 1;
	if (!rank_series(&rank) || !team_barrier(member))
		goto failed;
	if (member->rank == MISSING) {
		for (uint32_t layer = 1; layer < 5; layer++) {
			pause_ms(trickle->deadline_ms * 33 / 100);
			lshard_reach(rank.series, layer, rank.stream);
		}
	} else {
		const uint64_t began = now_ms();
		lshard_status status;

		for (uint32_t layer = 1; layer < 5; layer++)
			OK_SERIES(&rank, lshard_reach(rank.series, layer, rank.stream));
		status = trickle->joins ? lshard_series_join(rank.series, rank.stream)
					: lshard_wait(rank.series, 7, rank.stream);
		EXPECT(member, status == LSHARD_ERR_TIMEOUT, "%s after %u ms", lshard_status_name(status),
		       (unsigned)(now_ms() - began));
		EXPECT(member, names_it(member, &late, lshard_series_error(rank.series)), "%s",
		       lshard_series_error(rank.series));
		EXPECT(member, now_ms() - began < trickle->deadline_ms * 18 / 10, "told after %u ms",
		       (unsigned)(now_ms() - began));
	}
	right = team_barrier(member);
	lshard_group_abort(rank.group);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

/* On a machine too slow for a deadline the last transfer may be on its way when it passes: twice as much, then. */
static bool trickles(bool joins)
{
	for (uint32_t deadline_ms = DEADLINE_MS; deadline_ms <= 4 * DEADLINE_MS; deadline_ms *= 2) {
		struct trickle trickle = {joins, deadline_ms};

		if (team_run(subject.kind, RANKS, trickling_body, &trickle) == 0)
			return true;
	}
	return false;
}

static void many_layers_have_one_deadline(void **state)
{
	(void)state;
	if (!subject.collective) {
		does_not_apply(__func__, "no rank waits for another in join");
		return;
	}
	assert_true(trickles(true));
	assert_true(trickles(false));
}

struct farewell {
	uint64_t after_ms;
	bool heard[RANKS];
};

static int farewell_body(const struct member *member)
{
	struct farewell *farewell = member->user;
	const struct setting setting = {.layers = 0};
	lshard_series_options options = rank_series_options(&setting);
	struct rank rank;
	lshard_series *series = NULL;
	lshard_status status;
	bool right = false;

	options.tensors = &(lshard_tensor){"weight", 100, 0, LSHARD_STRIPE_BYTES, 0, 0};
	options.tensor_count = 1;
	options.layer_count = 4;
	if (!rank_group(&rank, member, &setting))
		return 1;
	if (!team_barrier(member))
		goto failed;
	if (member->rank == MISSING) {
		pause_ms((long)farewell->after_ms);
		lshard_group_abort(rank.group);
	} else {
		status = lshard_series_create(rank.group, &options, &series);
		EXPECT(member, status == LSHARD_ERR_PEER_FAILED, "%s: %s", lshard_status_name(status),
		       lshard_group_error(rank.group));
		farewell->heard[member->rank] = strstr(lshard_group_error(rank.group), "rank 1 was aborted");
	}
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

/* Where the others are in the call already it is their own library that tells, whatever the caller's functions say. On
 * a busy machine they may not be: then once more. */
static void an_aborted_rank_says_so(void **state)
{
	bool heard = false;

	(void)state;
	if (!subject.callbacks) {
		does_not_apply(__func__, "the transport sees it itself");
		return;
	}
	for (uint64_t after_ms = 100; after_ms <= 3200 && !heard; after_ms *= 2) {
		struct farewell farewell = {.after_ms = after_ms};

		assert_int_equal(team_run(subject.kind, RANKS, farewell_body, &farewell), 0);
		heard = farewell.heard[0] && farewell.heard[2];
	}
	assert_true(heard);
}

static void describe_subject(const char *spec, const char *kind, const char *where)
{
	const char *last = strrchr(spec, ',') ? strrchr(spec, ',') + 1 : spec;
	const bool fabric = strcmp(last, "fabric") == 0;
	const bool device = strcmp(where, "device") == 0 || strncmp(last, "cuda", 4) == 0 || fabric;

	subject = (struct subject){.spec = spec, .kind = kind};
	subject.callbacks = strcmp(last, "callback") == 0 || fabric;
	subject.fake = strcmp(last, "callback") == 0 && device;
	subject.collective = strcmp(last, "callback") == 0 || strcmp(last, "local:lockstep") == 0;
	subject.memory = device ? LSHARD_MEMORY_CUDA : LSHARD_MEMORY_HOST;
	subject.neighbours = strcmp(where, "neighbours") == 0 ? 2 : 0;
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_call_names_who_is_missing),
		cmocka_unit_test(a_rank_that_goes_while_tensors_are_compared_is_named),
		cmocka_unit_test(many_layers_have_one_deadline),
		cmocka_unit_test(an_aborted_rank_says_so),
	};

	int failed;

	if (argc < 3 || argc > 4) {
		fprintf(stderr, "usage: %s SPEC threads|forks [device|neighbours]\n", argv[0]);
		return 2;
	}
	describe_subject(argv[1], argv[2], argc > 3 ? argv[3] : "");
	failed = cmocka_run_group_tests_name("missing", tests, NULL, NULL);
	tell_how_many_do_not_apply();
	return failed;
}
