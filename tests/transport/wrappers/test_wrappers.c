/* SPDX-License-Identifier: Apache-2.0
 *
 * test_wrappers.c - throttle, trace and faults round the `local` transport, through the public interface. Times are
 * only ever compared with what a link of that bandwidth could not have done faster, or with many times what it needs.
 */
#include "conformance.h"
#include "contexts.h"
#include "outside.h"
#include "patience.h"
#include "test_clock.h"
#include "transports.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>
#include <jansson.h>

/* One tensor of 1 MiB a layer; through a link of 200 MB/s it takes 5.24288 ms exactly. */
#define BIG_BYTES  1048576u
#define BIG_TAKES  5242880u
#define BIG_LAYERS 6u
#define BIG_PASSES 4

/* One window: every layer from elsewhere comes once in each pass, so what was waited for is known. */
static struct setting big_setting(lshard_placement placement)
{
	struct setting setting = {.layers = BIG_LAYERS, .placement = placement, .n_tensors = 1};

	setting.tensors[0] = (lshard_tensor){"weight", BIG_BYTES, 0, LSHARD_STRIPE_BYTES, 0, 0};
	return setting;
}

static struct setting small_setting(void)
{
	struct setting setting = {.prefetch = 1, .layers = 7, .first_layer = 3};

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	return setting;
}

/* Create a group alone; what it says if that fails. */
static lshard_status create_alone(const char *spec, char *error, size_t bytes, lshard_log_function log, void *log_user,
				  lshard_group **group)
{
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;

	options.rank = 0;
	options.size = 1;
	options.transport = spec;
	options.log = log;
	options.log_user = log_user;
	options.error = error;
	options.error_bytes = bytes;
	return lshard_group_create(&options, group);
}

static void assert_refused(const char *spec, lshard_status status, const char *word)
{
	lshard_group *group = NULL;
	char error[512] = "";
	lshard_status got = create_alone(spec, error, sizeof error, NULL, NULL, &group);

	if (got != status || !strstr(error, word))
		fail_msg("'%s': %s, not %s: %s (should say '%s')", spec, lshard_status_name(got),
			 lshard_status_name(status), error, word);
	assert_null(group);
}

/* ---- throttle -------------------------------------------------------------------------------------------------- */

/* Every waited transfer took the link its exact time, and they came one after the other. */
static int throttled_body(const struct member *member)
{
	const struct setting *setting = member->user;
	struct rank rank;
	lshard_stats stats = LSHARD_STATS_INIT;
	uint64_t began = now_ns(), transfers, takes;
	bool right = false;

	if (!rank_open(&rank, member, setting))
		return 1;
	for (int pass = 0; pass < BIG_PASSES; pass++) {
		if (member->rank == 1)
			pause_ms(10); /* on a collective transport, the others' transfers begin later */
		if (!one_pass(&rank))
			goto failed;
	}
	OK_SERIES(&rank, lshard_series_stats(rank.series, &stats));
	transfers = (uint64_t)BIG_PASSES * stats.fetched_layers;
	takes = setting->placement == LSHARD_STRIPED ? BIG_TAKES / 2 : BIG_TAKES; /* half of a stripe's layer is here */
	EXPECT(member, stats.fetched_layers == (setting->placement == LSHARD_STRIPED ? BIG_LAYERS : BIG_LAYERS / 2),
	       "%u", stats.fetched_layers);
	EXPECT(member, stats.link_busy_ns == transfers * takes, "%llu ns for %llu transfers",
	       (unsigned long long)stats.link_busy_ns, (unsigned long long)transfers);
	EXPECT(member, now_ns() - began >= transfers * takes, "%llu transfers were faster than the link",
	       (unsigned long long)transfers);
	EXPECT(member, stats.blocked_ns > 0 && stats.stalls > 0, "nothing was waited for");
	EXPECT(member, team_barrier(member), "a rank failed");
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void a_throttled_link_takes_its_time(void **state)
{
	static const char *const specs[] = {"throttle=2e8,local", "throttle=200000000,local:at=wait",
					    "throttle=2e8,local:lockstep"};

	(void)state;
	for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++)
		for (int placement = LSHARD_WHOLE; placement <= LSHARD_STRIPED; placement++) {
			struct setting setting = big_setting((lshard_placement)placement);

			subject = (struct subject){.spec = specs[i], .kind = "threads"};
			assert_int_equal(team_of_threads(2, throttled_body, &setting), 0);
		}
}

/* Two thousand jumps over a link that takes 50 ms a layer: those that never began cost nothing. */
static int dropping_body(const struct member *member)
{
	struct setting setting = big_setting(LSHARD_STRIPED);
	struct rank rank;
	uint64_t began;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	began = now_ns();
	for (uint32_t jump = 0; jump < 2000; jump++)
		OK_SERIES(&rank, lshard_reach(rank.series, jump * 2 % BIG_LAYERS, NULL));
	if (!visit(&rank, 3))
		goto failed;
	EXPECT(member, now_ns() - began < 50000000000u, "dropped transfers kept the link busy");
	EXPECT(member, team_barrier(member), "a rank failed");
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void what_never_began_costs_no_link_time(void **state)
{
	(void)state;
	subject = (struct subject){.spec = "throttle=10485760,local", .kind = "threads"};
	assert_int_equal(team_of_threads(2, dropping_body, NULL), 0);
}

static void *abort_soon(void *group)
{
	pause_ms(200);
	lshard_group_abort(group);
	return NULL;
}

/* A link that would take a quarter of an hour: the deadline holds, and so does an abort. */
static int hopeless_body(const struct member *member)
{
	struct setting setting = big_setting(LSHARD_WHOLE);
	struct rank rank;
	pthread_t aborter;
	uint32_t other = member->rank == 0 ? 1 : 0;
	uint64_t began;
	bool aborts = member->rank == 0, right = false;
	char words[24];

	setting.timeout_ms = aborts ? LONG_MS : patience(500);
	if (!rank_open(&rank, member, &setting))
		return 1;
	OK_SERIES(&rank, lshard_reach(rank.series, other, NULL));
	began = now_ns();
	if (aborts) {
		if (pthread_create(&aborter, NULL, abort_soon, rank.group) != 0)
			goto failed;
		EXPECT(member, lshard_wait(rank.series, other, NULL) == LSHARD_ERR_ABORTED, "%s",
		       lshard_series_error(rank.series));
		pthread_join(aborter, NULL);
		EXPECT(member, now_ns() - began < LONG_MS * UINT64_C(500000), "the abort was not heard");
	} else {
		EXPECT(member, lshard_wait(rank.series, other, NULL) == LSHARD_ERR_TIMEOUT, "%s",
		       lshard_series_error(rank.series));
		EXPECT(member, now_ns() - began >= setting.timeout_ms * UINT64_C(1000000), "too early");
		snprintf(words, sizeof words, " %u ms", setting.timeout_ms);
		SAYS(member, lshard_series_error(rank.series), words);
	}
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void a_hopeless_link_does_not_hang(void **state)
{
	(void)state;
	subject = (struct subject){.spec = "throttle=1000,local", .kind = "threads"};
	assert_int_equal(team_of_threads(2, hopeless_body, NULL), 0);
}

/* One layer of 300 bytes on rank 0, which rank 1 has a window for. */
struct narrow {
	lshard_piece piece;
	uint32_t first_piece[2];
	uint64_t shard_bytes[2];
	lshard_store_plan plan;
	lshard_context contexts[2]; /* local's and the wrapper's */
	lshard_transport *transport;
	lshard_store *store;
};

static bool narrow_open(struct narrow *narrow, const struct member *member, const char *local,
			const lshard_transport_ops *wrapper, const char *options)
{
	lshard_transport *inner = NULL;
	lshard_error error = {""};

	*narrow = (struct narrow){.piece = {.width = 300, .rows = 1}, .first_piece = {0, 1}, .shard_bytes = {300, 0}};
	narrow->plan = (lshard_store_plan){.name = "narrow",
					   .layers = 1,
					   .layer_bytes = 300,
					   .shard_bytes = narrow->shard_bytes[member->rank],
					   .shard_bytes_of = narrow->shard_bytes,
					   .buffers = 1,
					   .windows = 1,
					   .pieces = &narrow->piece,
					   .first_piece = narrow->first_piece};
	narrow->contexts[0] = context_for_member(member, local, LONG_MS);
	narrow->contexts[1] = context_for_member(member, options, LONG_MS);
	EXPECT(member, lshard__local.open(&narrow->contexts[0], NULL, &inner, &error) == LSHARD_OK, "%s", error.text);
	EXPECT(member, wrapper->open(&narrow->contexts[1], inner, &narrow->transport, &error) == LSHARD_OK, "%s",
	       error.text);
	EXPECT(member,
	       narrow->transport->ops->store_open(narrow->transport, &narrow->plan, &narrow->store) == LSHARD_OK, "%s",
	       narrow->transport->error.text);
	return true;
failed:
	return false;
}

static void narrow_close(struct narrow *narrow)
{
	if (narrow->store)
		narrow->transport->ops->store_close(narrow->store);
	if (narrow->transport)
		narrow->transport->ops->close(narrow->transport);
}

/* A wait whose time is up says how long it blocked and changes nothing: the next one goes on. The link takes 3 s. */
static int waits_twice(const struct member *member)
{
	struct narrow narrow;
	lshard_arrival arrival = {0, 1, 1, 1};

	if (!narrow_open(&narrow, member, member->user, &lshard__throttle, "100"))
		goto failed;
	if (member->rank == 0)
		memset(narrow.transport->ops->shard(narrow.store), 77, 300);
	EXPECT(member, team_barrier(member), "a rank failed");
	EXPECT(member, narrow.transport->ops->fetch(narrow.store, 0, 0, NULL, 0) == LSHARD_OK, "fetch");
	narrow.contexts[1].timeout_ms = 50;
	for (int i = 0; i < 2 && member->rank == 1; i++) {
		EXPECT(member, narrow.transport->ops->wait(narrow.store, 0, NULL, &arrival) == LSHARD_ERR_TIMEOUT, "%s",
		       narrow.store->error.text);
		EXPECT(member, arrival.blocked_ns >= 50000000u && arrival.busy_ns == 0, "%llu ns",
		       (unsigned long long)arrival.blocked_ns);
	}
	narrow.contexts[1].timeout_ms = LONG_MS;
	EXPECT(member, narrow.transport->ops->wait(narrow.store, 0, NULL, &arrival) == LSHARD_OK, "%s",
	       narrow.store->error.text);
	EXPECT(member, member->rank == 0 || arrival.busy_ns == 3000000000u, "%llu ns on the link",
	       (unsigned long long)arrival.busy_ns);
	EXPECT(member, *(char *)narrow.transport->ops->buffer(narrow.store, 0, 0) == 77, "the bytes");
	EXPECT(member, team_barrier(member), "a rank failed");
	narrow_close(&narrow);
	return 0;
failed:
	narrow_close(&narrow);
	return 1;
}

static void a_wait_in_vain_can_be_repeated(void **state)
{
	(void)state;
	assert_int_equal(team_of_threads(2, waits_twice, (void *)(uintptr_t)"at=wait"), 0);
	assert_int_equal(team_of_threads(2, waits_twice, (void *)(uintptr_t)"lockstep"), 0);
}

/* In step, a layer takes the link when the last rank has asked for it, not when the first has. */
static int asks_last(const struct member *member)
{
	atomic_uint_least64_t *asked_ns = member->user;
	struct narrow narrow;
	lshard_arrival arrival;

	if (!narrow_open(&narrow, member, "lockstep", &lshard__throttle, "30000"))
		goto failed;
	if (member->rank == 1)
		EXPECT(member, narrow.transport->ops->fetch(narrow.store, 0, 0, NULL, 0) == LSHARD_OK, "fetch");
	EXPECT(member, team_barrier(member), "a rank failed");
	if (member->rank == 0) {
		atomic_store(asked_ns, now_ns());
		EXPECT(member, narrow.transport->ops->fetch(narrow.store, 0, 0, NULL, 0) == LSHARD_OK, "fetch");
	}
	EXPECT(member, narrow.transport->ops->wait(narrow.store, 0, NULL, &arrival) == LSHARD_OK, "%s",
	       narrow.store->error.text);
	if (member->rank == 1) {
		EXPECT(member, arrival.started_ns >= atomic_load(asked_ns), "it began before rank 0 had asked for it");
		EXPECT(member, arrival.finished_ns - arrival.started_ns == 10000000u, "300 bytes took %llu ns",
		       (unsigned long long)(arrival.finished_ns - arrival.started_ns));
	}
	EXPECT(member, team_barrier(member), "a rank failed");
	narrow_close(&narrow);
	return 0;
failed:
	narrow_close(&narrow);
	return 1;
}

static void a_transfer_in_step_begins_when_all_have_asked(void **state)
{
	atomic_uint_least64_t asked_ns = 0;

	(void)state;
	assert_int_equal(team_of_threads(2, asks_last, &asked_ns), 0);
}

static void bandwidths_are_checked(void **state)
{
	static const char *const wrong[] = {"", "fast", "-1", "0", "nan", "inf", "1e9x", "1e-3"};

	(void)state;
	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
		char spec[48];

		snprintf(spec, sizeof spec, "throttle=%s,local", wrong[i]);
		assert_refused(spec, LSHARD_ERR_INVALID, "throttle");
	}
	assert_refused("throttle=1e9,shm", LSHARD_ERR_NOT_SUPPORTED, "in place");
}

/* ---- trace ----------------------------------------------------------------------------------------------------- */

struct traced {
	char folder[64];
	char spec[160];
	uint64_t transfers[2]; /* waited for, per rank */
};

/* As exit does it: whatever stdio holds of the program's files is written out. None of it is the child's to write. */
static bool a_child_ends(const struct member *member)
{
	pid_t child;
	int status = -1;

	fflush(NULL);
	child = fork();
	if (child == 0) {
		fflush(NULL);
		execl("/bin/true", "true", (char *)NULL); /* to valgrind, what a child leaves of its threads is lost */
		_exit(1);
	}
	EXPECT(member, child > 0 && waitpid(child, &status, 0) == child && status == 0, "a child");
	return true;
failed:
	return false;
}

static int traced_body(const struct member *member)
{
	struct traced *traced = member->user;
	struct setting setting = small_setting();
	lshard_series_options options;
	struct rank rank;
	lshard_stats stats = LSHARD_STATS_INIT;
	bool right = false;

	setting.prefetch = 0;
	options = rank_series_options(&setting);
	options.name = "a \"name\"\\\n";
	if (!rank_group(&rank, member, &setting))
		return 1;
	EXPECT(member, lshard_series_create(rank.group, &options, &rank.series) == LSHARD_OK, "%s",
	       lshard_group_error(rank.group));
	OK_SERIES(&rank, lshard_series_commit(rank.series, fill_layer, &rank));
	for (uint32_t step = 0; step < 3 * setting.layers; step++) {
		OK_SERIES(&rank, lshard_reach(rank.series, setting.first_layer + step % setting.layers, NULL));
		OK_SERIES(&rank, lshard_wait(rank.series, setting.first_layer + step % setting.layers, NULL));
	}
	OK_SERIES(&rank, lshard_series_stats(rank.series, &stats));
	traced->transfers[member->rank] = 3 * stats.fetched_layers;
	right = a_child_ends(member);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static double number_of(const json_t *event, const char *key)
{
	const json_t *value = json_object_get(event, key);

	assert_true(json_is_number(value));
	return json_number_value(value);
}

/* Transfers of a trace, each on the link's track, with sane times, none over another. */
static uint64_t count_transfers(const json_t *events, int rank)
{
	uint64_t transfers = 0;
	size_t index;
	json_t *event;

	json_array_foreach(events, index, event)
	{
		const char *category = json_string_value(json_object_get(event, "cat"));
		const json_t *arguments = json_object_get(event, "args");

		assert_int_equal(number_of(event, "pid"), rank);
		assert_non_null(json_string_value(json_object_get(event, "name")));
		if (!category || strcmp(category, "transfer") != 0)
			continue;
		assert_string_equal(json_string_value(json_object_get(event, "ph")), "X");
		assert_string_equal(json_string_value(json_object_get(arguments, "series")), "a \"name\"\\\n");
		assert_true(number_of(event, "ts") > 0 && number_of(event, "dur") >= 0);
		assert_true(number_of(arguments, "bytes") > 0);
		transfers++;
	}
	return transfers;
}

static void a_trace_has_every_transfer(void **state)
{
	struct traced traced = {.folder = "/tmp/layershard-trace-XXXXXX"};
	char path[128];

	(void)state;
	assert_non_null(mkdtemp(traced.folder));
	snprintf(traced.spec, sizeof traced.spec, "trace=%s/run.json,local:at=wait", traced.folder);
	subject = (struct subject){.spec = traced.spec, .kind = "threads"};
	assert_int_equal(team_of_threads(2, traced_body, &traced), 0);
	for (int rank = 0; rank < 2; rank++) {
		json_error_t error;
		json_t *trace;

		snprintf(path, sizeof path, "%s/run.%d.json", traced.folder, rank);
		trace = json_load_file(path, JSON_REJECT_DUPLICATES, &error);
		if (!trace)
			fail_msg("%s, line %d: %s", path, error.line, error.text);
		assert_true(traced.transfers[rank] > 0);
		assert_string_equal(json_string_value(json_object_get(trace, "schema")), "layershard-trace/1");
		assert_int_equal(count_transfers(json_object_get(trace, "traceEvents"), rank), traced.transfers[rank]);
		json_decref(trace);
		assert_int_equal(unlink(path), 0);
	}
	assert_int_equal(rmdir(traced.folder), 0);
}

/* Of a layer that was waited for already, or that a drain has dropped, a wait says that nothing moved. */
static int waits_for_nothing(const struct member *member)
{
	struct narrow narrow;
	lshard_arrival arrival;

	if (!narrow_open(&narrow, member, "", &lshard__trace, member->user))
		goto failed;
	EXPECT(member, narrow.transport->ops->fetch(narrow.store, 0, 0, NULL, 0) == LSHARD_OK, "fetch");
	for (int i = 0; i < 2; i++)
		EXPECT(member, narrow.transport->ops->wait(narrow.store, 0, NULL, &arrival) == LSHARD_OK, "%s",
		       narrow.store->error.text);
	EXPECT(member, narrow.transport->ops->fetch(narrow.store, 0, 0, NULL, 0) == LSHARD_OK, "fetch");
	EXPECT(member, narrow.transport->ops->drain(narrow.store) == LSHARD_OK, "%s", narrow.store->error.text);
	EXPECT(member, narrow.transport->ops->wait(narrow.store, 0, NULL, &arrival) == LSHARD_OK, "%s",
	       narrow.store->error.text);
	EXPECT(member, team_barrier(member), "a rank failed");
	narrow_close(&narrow);
	return 0;
failed:
	narrow_close(&narrow);
	return 1;
}

static void a_transfer_is_traced_once(void **state)
{
	char folder[64] = "/tmp/layershard-trace-XXXXXX";
	char path[128];

	(void)state;
	assert_non_null(mkdtemp(folder));
	snprintf(path, sizeof path, "%s/run", folder);
	assert_int_equal(team_of_threads(2, waits_for_nothing, path), 0);
	for (int rank = 0; rank < 2; rank++) {
		json_t *trace, *event;
		size_t index;
		int transfers = 0;

		snprintf(path, sizeof path, "%s/run.%d", folder, rank);
		trace = json_load_file(path, 0, NULL);
		json_array_foreach(json_object_get(trace, "traceEvents"), index, event)
		{
			const char *category = json_string_value(json_object_get(event, "cat"));

			transfers += category && strcmp(category, "transfer") == 0;
		}
		json_decref(trace);
		assert_int_equal(transfers, 1);
		assert_int_equal(unlink(path), 0);
	}
	assert_int_equal(rmdir(folder), 0);
}

static void count_warnings(void *user, lshard_log_level level, const char *text)
{
	if (level == LSHARD_LOG_WARN && strstr(text, "trace"))
		++*(int *)user;
}

/* A full disk is told once and costs the trace, not the run; but nobody ends without knowing. */
static void traces_that_cannot_be_written(void **state)
{
	lshard_group *group = NULL;
	char error[512] = "";
	int warnings = 0;

	(void)state;
	if (access("/dev/full", W_OK) != 0) {
		printf("skipped: there is no /dev/full\n");
		skip();
	}
	assert_int_equal(create_alone("throttle=1e9,trace=/dev/full,local", error, sizeof error, count_warnings,
				      &warnings, &group),
			 LSHARD_OK);
	for (int i = 0; i < 2; i++) {
		assert_int_equal(lshard_group_flush(group), LSHARD_ERR_SYSTEM);
		assert_non_null(strstr(lshard_group_error(group), "could not write all of '/dev/full'"));
		assert_non_null(strstr(lshard_group_error(group), "No space left on device"));
	}
	assert_int_equal(lshard_group_destroy(group), LSHARD_ERR_SYSTEM);
	assert_int_equal(warnings, 1);
	group = NULL;
	assert_int_equal(create_alone("trace=/dev/full,local", error, sizeof error, NULL, NULL, &group), LSHARD_OK);
	assert_int_equal(lshard_group_destroy(group), LSHARD_ERR_SYSTEM);
}

/* The limit of a file's size is a failure like any other, not the end of the program by a signal. */
static void a_trace_may_reach_the_limit_of_a_file(void **state)
{
	char path[64] = "/tmp/layershard-trace-XXXXXX";
	char spec[128];
	const int fd = mkstemp(path);
	struct rlimit before, small;
	lshard_group *group = NULL;
	char error[512] = "";
	lshard_status flushed, destroyed;
	char text[512];

	(void)state;
	assert_true(fd >= 0);
	close(fd);
	snprintf(spec, sizeof spec, "trace=%s,local", path);
	assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
	small = (struct rlimit){.rlim_cur = 100, .rlim_max = before.rlim_max};
	assert_int_equal(create_alone(spec, error, sizeof error, NULL, NULL, &group), LSHARD_OK);
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
	flushed = lshard_group_flush(group);
	snprintf(text, sizeof text, "%s", lshard_group_error(group));
	destroyed = lshard_group_destroy(group);
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
	assert_int_equal(unlink(path), 0);
	assert_int_equal(flushed, LSHARD_ERR_SYSTEM);
	assert_non_null(strstr(text, "File too large"));
	assert_int_equal(destroyed, LSHARD_ERR_SYSTEM);
}

/* The disk has room for what was traced, and for its end no more: whoever flushes hears of it. */
static void the_end_of_a_trace_is_told_of(void **state)
{
	char path[64] = "/tmp/layershard-trace-XXXXXX";
	char spec[128], error[512] = "";
	const int fd = mkstemp(path);
	struct rlimit before, small;
	lshard_group *group = NULL;
	lshard_status flushed, destroyed;
	struct stat found;
	json_t *trace;

	(void)state;
	assert_true(fd >= 0);
	snprintf(spec, sizeof spec, "trace=%s,local", path);
	assert_int_equal(create_alone(spec, error, sizeof error, NULL, NULL, &group), LSHARD_OK);
	for (int i = 0; i < 2; i++) {
		assert_int_equal(lshard_group_flush(group), LSHARD_OK);
		assert_int_equal(fstat(fd, &found), 0);
		trace = json_load_file(path, JSON_REJECT_DUPLICATES, NULL);
		assert_non_null(trace); /* whole so far */
		json_decref(trace);
	}
	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
	assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
	small = (struct rlimit){.rlim_cur = (rlim_t)found.st_size - 1, .rlim_max = before.rlim_max};
	assert_int_equal(create_alone(spec, error, sizeof error, NULL, NULL, &group), LSHARD_OK);
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
	flushed = lshard_group_flush(group);
	destroyed = lshard_group_destroy(group);
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
	assert_int_equal(flushed, LSHARD_ERR_SYSTEM);
	assert_int_equal(destroyed, LSHARD_ERR_SYSTEM);
	close(fd);
	assert_int_equal(unlink(path), 0);
}

/* What is traced is for its user alone, goes into no file that somebody else has pointed to, waits for no reader. */
static void a_trace_is_its_users_own(void **state)
{
	char folder[64] = "/tmp/layershard-trace-XXXXXX";
	char path[128], other[128], spec[160], error[512] = "";
	lshard_group *group = NULL;
	const mode_t mask = umask(0);
	struct stat found;

	(void)state;
	assert_non_null(mkdtemp(folder));
	snprintf(path, sizeof path, "%s/run.json", folder);
	snprintf(other, sizeof other, "%s/link", folder);
	snprintf(spec, sizeof spec, "trace=%s,local", path);
	assert_int_equal(create_alone(spec, error, sizeof error, NULL, NULL, &group), LSHARD_OK);
	assert_int_equal(lshard_group_flush(group), LSHARD_OK);
	assert_int_equal(stat(path, &found), 0);
	assert_int_equal(found.st_mode & 07777, 0600);
	assert_true(found.st_size > 0);
	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
	assert_int_equal(chmod(path, 0666), 0); /* one that is there already becomes its user's too, */
	assert_int_equal(create_alone(spec, error, sizeof error, NULL, NULL, &group), LSHARD_OK);
	assert_int_equal(stat(path, &found), 0);
	assert_int_equal(found.st_mode & 07777, 0600);
	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
	umask(mask);
	assert_int_equal(link(path, other), 0); /* and one that is not this user's alone keeps what it has */
	assert_refused(spec, LSHARD_ERR_SYSTEM, "hard links");
	assert_int_equal(unlink(other), 0);
	if (geteuid() == 0) {
		assert_int_equal(chown(path, 54321, 54321), 0);
		assert_refused(spec, LSHARD_ERR_SYSTEM, "another user");
	}
	assert_int_equal(stat(path, &found), 0);
	assert_true(found.st_size > 0);
	snprintf(spec, sizeof spec, "trace=%s,local", other);
	assert_int_equal(symlink(path, other), 0);
	assert_refused(spec, LSHARD_ERR_SYSTEM, "symbolic link");
	assert_int_equal(unlink(other), 0);
	assert_int_equal(mkfifo(other, 0600), 0);
	assert_refused(spec, LSHARD_ERR_SYSTEM, "No such device");
	assert_int_equal(unlink(other), 0);
	assert_int_equal(unlink(path), 0);
	assert_int_equal(rmdir(folder), 0);
	assert_refused("trace=/no/such/folder/run.json,local", LSHARD_ERR_SYSTEM, "/no/such/folder/run.json");
	assert_refused("trace=,local", LSHARD_ERR_INVALID, "trace");
}

/* ---- faults ---------------------------------------------------------------------------------------------------- */

static void rules_are_checked(void **state)
{
	static const char *const wrong[] = {"",
					    "fetch",
					    "fetch@0=fail",
					    "fetch@1",
					    "fetch@1=",
					    "fetch@1=flip",
					    "fetch@1=failing",
					    "jump@1=fail",
					    "fetch@1=delay",
					    "fetch@1=delay:",
					    "r.fetch@1=fail",
					    "fetch@1=fail+",
					    "fetch@x=fail"};

	(void)state;
	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
		char spec[64];

		snprintf(spec, sizeof spec, "faults=%s,local", wrong[i]);
		assert_refused(spec, LSHARD_ERR_INVALID, "faults");
	}
	assert_refused("faults=open@1=fail,local", LSHARD_ERR_TRANSPORT, "fault injected: open number 1 on rank 0");
	assert_refused("faults=open@1=timeout,local", LSHARD_ERR_TIMEOUT, "injected");
}

static void a_failing_control_channel_is_told(void **state)
{
	struct setting setting = small_setting();
	lshard_series_options options = rank_series_options(&setting);
	lshard_group *group = NULL;
	lshard_series *series = NULL;
	char error[512] = "";
	lshard_status status = create_alone("faults=exchange@*=peer,local", error, sizeof error, NULL, NULL, &group);

	(void)state;
	if (status == LSHARD_OK) { /* a group alone may have nothing to tell itself */
		status = lshard_series_create(group, &options, &series);
		snprintf(error, sizeof error, "%s", lshard_group_error(group));
	}
	assert_int_equal(status, LSHARD_ERR_PEER_FAILED);
	assert_non_null(strstr(error, "fault injected: exchange number"));
	assert_null(series);
	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
}

/* What goes wrong at first, and where; afterwards a whole pass is right. */
struct fault {
	const char *spec;
	enum { AT_CREATE, AT_COMMIT, AT_PASS, AT_JOIN, AT_UPDATE, AT_VERIFY } where;
	lshard_status status;
	const char *says; /* on the rank that meets it */
};

static lshard_status first_failure_of_passes(struct rank *rank)
{
	lshard_status status = LSHARD_OK;

	for (uint32_t step = 0; status == LSHARD_OK && step < 2 * rank->setting->layers; step++) {
		uint32_t layer = rank->setting->first_layer + step % rank->setting->layers;

		status = lshard_reach(rank->series, layer, NULL);
		if (status == LSHARD_OK)
			status = lshard_wait(rank->series, layer, NULL);
	}
	return status;
}

static bool create_series(struct rank *rank, const struct fault *fault)
{
	lshard_series_options options = rank_series_options(rank->setting);
	lshard_status status;

	if (fault->where == AT_CREATE) {
		status = lshard_series_create(rank->group, &options, &rank->series);
		EXPECT(rank->member, status == fault->status, "%s: %s", fault->spec, lshard_status_name(status));
		SAYS(rank->member, lshard_group_error(rank->group), fault->says);
		EXPECT(rank->member, team_barrier(rank->member), "a rank failed");
	}
	EXPECT(rank->member, lshard_series_create(rank->group, &options, &rank->series) == LSHARD_OK, "%s: %s",
	       fault->spec, lshard_group_error(rank->group));
	if (!rank_note_addresses(rank))
		goto failed;
	return true;
failed:
	return false;
}

static bool meets(struct rank *rank, const struct fault *fault, lshard_status status)
{
	EXPECT(rank->member, status == fault->status, "%s: %s: %s", fault->spec, lshard_status_name(status),
	       lshard_series_error(rank->series));
	SAYS(rank->member, lshard_series_error(rank->series), fault->says);
	return true;
failed:
	return false;
}

static int faulty_body(const struct member *member)
{
	const struct fault *fault = member->user;
	struct setting setting = small_setting();
	struct rank rank;
	bool right = true;

	setting.placement = fault->where == AT_COMMIT ? LSHARD_STRIPED : LSHARD_WHOLE;
	setting.timeout_ms = LONG_MS;
	if (!rank_group(&rank, member, &setting))
		return 1;
	if (!create_series(&rank, fault))
		goto failed;
	if (fault->where == AT_COMMIT)
		right = meets(&rank, fault, lshard_series_commit(rank.series, fill_layer, &rank));
	OK_SERIES(&rank, lshard_series_commit(rank.series, fill_layer, &rank));
	if (fault->where == AT_PASS)
		right = meets(&rank, fault, first_failure_of_passes(&rank));
	else if (fault->where == AT_JOIN)
		right = meets(&rank, fault, lshard_series_join(rank.series, NULL));
	else if (fault->where == AT_UPDATE)
		right = meets(&rank, fault, lshard_series_update_begin(rank.series));
	else if (fault->where == AT_VERIFY)
		right = meets(&rank, fault, lshard_series_verify(rank.series, NULL));
	right = right && one_pass(&rank) && one_pass(&rank);
	OK_SERIES(&rank, lshard_series_verify(rank.series, NULL));
	return rank_close(&rank) && right ? 0 : 1;
failed:
	rank_close(&rank);
	return 1;
}

static void every_fault_is_told_and_survived(void **state)
{
	static struct fault faults[] = {
		{"faults=store_open@1=fail,local", AT_CREATE, LSHARD_ERR_TRANSPORT, "injected"},
		{"faults=r1.store_open@1=fail,local", AT_CREATE, LSHARD_ERR_TRANSPORT, "rank 1"},
		{"faults=read@1=fail,local", AT_COMMIT, LSHARD_ERR_TRANSPORT, "injected"},
		{"faults=r0.read@2=fail,local", AT_COMMIT, LSHARD_ERR_TRANSPORT, "rank 0"},
		{"faults=fetch@4=fail,local", AT_PASS, LSHARD_ERR_TRANSPORT, "fetch number 4"},
		{"faults=fetch@1=peer,local:at=wait", AT_PASS, LSHARD_ERR_PEER_FAILED, "fetch number 1"},
		{"faults=wait@3=fail,local", AT_PASS, LSHARD_ERR_TRANSPORT, "wait number 3"},
		{"faults=wait@2=timeout,local:at=wait", AT_PASS, LSHARD_ERR_TIMEOUT, "wait number 2"},
		{"faults=wait@1=peer+fetch@2=delay:1,local:seed=5", AT_PASS, LSHARD_ERR_PEER_FAILED, "wait number 1"},
		{"faults=join@1=timeout,local", AT_JOIN, LSHARD_ERR_TIMEOUT, "join number 1"},
		{"faults=drain@1=fail,local", AT_UPDATE, LSHARD_ERR_TRANSPORT, "drain number 1"},
		{"faults=wait@2=flip,local", AT_VERIFY, LSHARD_ERR_CORRUPT, "layer"},
	};

	(void)state;
	for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++) {
		subject = (struct subject){.spec = faults[i].spec, .kind = "threads"};
		if (team_of_threads(2, faulty_body, &faults[i]) != 0)
			fail_msg("%s", faults[i].spec);
	}
}

/* Of two layers that come wrong the first is named: what comes after it may follow from it. */
static int verify_twice_wrong_body(const struct member *member)
{
	struct setting setting = small_setting();
	struct rank rank;
	lshard_status status;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	status = lshard_series_verify(rank.series, NULL);
	if (member->rank == 0) {
		EXPECT(member, status == LSHARD_OK, "%s", lshard_series_error(rank.series));
	} else {
		EXPECT(member, status == LSHARD_ERR_CORRUPT, "%s", lshard_status_name(status));
		SAYS(member, lshard_series_error(rank.series), "layer 6 is not what rank 0 stores");
	}
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void verify_tells_the_first_layer_that_is_wrong(void **state)
{
	(void)state;
	subject = (struct subject){.spec = "faults=r1.wait@2=flip+r1.wait@3=flip,local", .kind = "threads"};
	assert_int_equal(team_of_threads(2, verify_twice_wrong_body, NULL), 0);
}

/* Rank 1 alone is slowed down: three layers come to it in a pass, each 20 ms late. */
static int delayed_body(const struct member *member)
{
	struct setting setting = small_setting();
	struct rank rank;
	uint64_t began;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	began = now_ns();
	right = one_pass(&rank);
	EXPECT(member, member->rank == 0 || now_ns() - began >= 60000000u, "no delay");
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void calls_can_be_delayed(void **state)
{
	(void)state;
	subject = (struct subject){.spec = "faults=r1.wait@*=delay:20,local", .kind = "threads"};
	assert_int_equal(team_of_threads(2, delayed_body, NULL), 0);
}

/* ---- What join has told ---------------------------------------------------------------------------------------- */

#define PAIR_BYTES 512u

/* Two layers, one of each of two ranks, without the core. */
struct pair {
	lshard_context context;
	lshard_store_plan plan;
	lshard_piece pieces[2];
	uint32_t first_piece[3];
	uint64_t shard_bytes[2];
	struct seat *seat;
	lshard__stack *stack;
	lshard_transport *transport;
	lshard_store *store;
};

static bool pair_open(struct pair *pair, const struct member *member)
{
	lshard_error error = {""};

	*pair = (struct pair){.context = context_for_member(member, "", 20000), .first_piece = {0, 1, 2}};
	for (int32_t rank = 0; rank < 2; rank++) {
		pair->pieces[rank] = (lshard_piece){.rank = rank, .width = PAIR_BYTES, .rows = 1};
		pair->shard_bytes[rank] = PAIR_BYTES;
	}
	pair->plan = (lshard_store_plan){.name = "s",
					 .layers = 2,
					 .layer_bytes = PAIR_BYTES,
					 .shard_bytes = PAIR_BYTES,
					 .shard_bytes_of = pair->shard_bytes,
					 .buffers = 2,
					 .windows = 2,
					 .pieces = pair->pieces,
					 .first_piece = pair->first_piece};
	pair->seat = circle_join(member);
	EXPECT(member, pair->seat, "a rank failed");
	pair->context.callbacks = seat_callbacks(pair->seat);
	EXPECT(member, lshard__stack_open(&pair->context, member->user, NULL, &pair->stack, &error) == LSHARD_OK, "%s",
	       error.text);
	pair->transport = lshard__stack_top(pair->stack);
	EXPECT(member, pair->transport->ops->store_open(pair->transport, &pair->plan, &pair->store) == LSHARD_OK, "%s",
	       pair->transport->error.text);
	memset(pair->transport->ops->shard(pair->store), member->rank + 1, PAIR_BYTES);
	return true;
failed:
	return false;
}

static void pair_close(struct pair *pair)
{
	if (pair->store)
		pair->transport->ops->store_close(pair->store);
	lshard__stack_close(pair->stack);
	circle_leave(pair->seat);
}

/* Each asks for the other's layer: never the same. Later both ask for that of rank 1. */
static int join_body(const struct member *member)
{
	const lshard_transport_ops *ops;
	const uint32_t other = 1 - (uint32_t)member->rank;
	struct pair pair;
	lshard_arrival arrival;
	const uint64_t mine = 0;
	uint64_t all[2];
	uint8_t alive[2];
	int failed = 1;

	if (!pair_open(&pair, member))
		goto failed;
	ops = pair.transport->ops;
	EXPECT(member, ops->fetch(pair.store, other, 0, NULL, 0) == LSHARD_OK, "fetch");
	EXPECT(member, ops->join(pair.store, NULL) == LSHARD_ERR_OUT_OF_STEP, "join: %s", pair.store->error.text);
	pair.store->error = (lshard_error){""};
	EXPECT(member, ops->wait(pair.store, 0, NULL, &arrival) == LSHARD_ERR_OUT_OF_STEP,
	       "%s: what join has told is forgotten", (const char *)member->user);
	SAYS(member, pair.store->error.text, "'s'");
	EXPECT(member, ops->join(pair.store, NULL) == LSHARD_OK, "join again: %s", pair.store->error.text);
	EXPECT(member, ops->wait(pair.store, 0, NULL, &arrival) == LSHARD_ERR_OUT_OF_STEP,
	       "%s: what a wait has told is forgotten", (const char *)member->user);
	EXPECT(member, ops->drain(pair.store) == LSHARD_OK, "drain: %s", pair.store->error.text);
	EXPECT(member, ops->wait(pair.store, 0, NULL, &arrival) == LSHARD_OK, "%s: what drain has dropped is told",
	       (const char *)member->user);
	EXPECT(member, ops->exchange(pair.transport, &mine, all, sizeof mine, alive) == LSHARD_OK, "exchange");
	EXPECT(member, ops->fetch(pair.store, 1, member->rank ? LSHARD_NO_BUFFER : 0, NULL, 1) == LSHARD_OK, "fetch");
	EXPECT(member, ops->join(pair.store, NULL) == LSHARD_OK, "join: %s", pair.store->error.text);
	EXPECT(member, ops->wait(pair.store, 0, NULL, &arrival) == LSHARD_OK, "wait: %s", pair.store->error.text);
	EXPECT(member, member->rank || *(char *)ops->buffer(pair.store, 0, 1) == 2, "other bytes");
	EXPECT(member, team_barrier(member), "a rank failed");
	failed = 0;
failed:
	pair_close(&pair);
	return failed;
}

static void what_join_has_told_is_told_by_every_wait_too(void **state)
{
	static const char *const specs[] = {"local:lockstep",
					    "callback",
					    "throttle=1e9,local:lockstep",
					    "throttle=1e9,callback",
					    "faults=wait@9=fail,local:lockstep",
					    "throttle=1e9,faults=wait@9=fail,callback"};

	(void)state;
	for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++)
		assert_int_equal(team_of_threads(2, join_body, (void *)(uintptr_t)specs[i]), 0);
}

/* Rank 1 fetches twice and waits for the second; that the first one failed, its throttled link has seen on the way. */
static int overtaken_body(const struct member *member)
{
	const lshard_transport_ops *ops;
	const bool looks = member->rank == 1;
	struct pair pair;
	lshard_arrival arrival;
	int failed = 1;

	if (!pair_open(&pair, member))
		goto failed;
	ops = pair.transport->ops;
	for (uint32_t buffer = 0; buffer < 2; buffer++)
		EXPECT(member, ops->fetch(pair.store, 0, looks ? buffer : LSHARD_NO_BUFFER, NULL, buffer) == LSHARD_OK,
		       "fetch");
	if (looks) {
		EXPECT(member, ops->wait(pair.store, 1, NULL, &arrival) == LSHARD_OK, "%s", pair.store->error.text);
		EXPECT(member, ops->join(pair.store, NULL) == LSHARD_ERR_TRANSPORT, "join forgets a failure");
		EXPECT(member, ops->drain(pair.store) == LSHARD_OK, "%s", pair.store->error.text);
		EXPECT(member, ops->wait(pair.store, 0, NULL, &arrival) == LSHARD_OK, "what drain has dropped is told");
	}
	EXPECT(member, team_barrier(member), "a rank failed");
	failed = 0;
failed:
	pair_close(&pair);
	return failed;
}

static void join_tells_what_a_wait_for_another_layer_has_seen(void **state)
{
	static const char spec[] = "throttle=1e9,faults=r1.wait@2=fail,local:lockstep";

	(void)state;
	assert_int_equal(team_of_threads(2, overtaken_body, (void *)(uintptr_t)spec), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_throttled_link_takes_its_time),
		cmocka_unit_test(what_never_began_costs_no_link_time),
		cmocka_unit_test(a_hopeless_link_does_not_hang),
		cmocka_unit_test(a_wait_in_vain_can_be_repeated),
		cmocka_unit_test(a_transfer_in_step_begins_when_all_have_asked),
		cmocka_unit_test(bandwidths_are_checked),
		cmocka_unit_test(a_trace_has_every_transfer),
		cmocka_unit_test(a_transfer_is_traced_once),
		cmocka_unit_test(traces_that_cannot_be_written),
		cmocka_unit_test(a_trace_may_reach_the_limit_of_a_file),
		cmocka_unit_test(the_end_of_a_trace_is_told_of),
		cmocka_unit_test(a_trace_is_its_users_own),
		cmocka_unit_test(rules_are_checked),
		cmocka_unit_test(a_failing_control_channel_is_told),
		cmocka_unit_test(every_fault_is_told_and_survived),
		cmocka_unit_test(verify_tells_the_first_layer_that_is_wrong),
		cmocka_unit_test(calls_can_be_delayed),
		cmocka_unit_test(what_join_has_told_is_told_by_every_wait_too),
		cmocka_unit_test(join_tells_what_a_wait_for_another_layer_has_seen),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
