/* SPDX-License-Identifier: Apache-2.0
 *
 * test_trace.c - the file that a trace writes: every transfer once, its user's alone, and what is said where it cannot
 * be written.
 */
#include "transports.h"
#include "wrapped_ranks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>
#include <jansson.h>

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

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_trace_has_every_transfer),
		cmocka_unit_test(a_transfer_is_traced_once),
		cmocka_unit_test(traces_that_cannot_be_written),
		cmocka_unit_test(a_trace_may_reach_the_limit_of_a_file),
		cmocka_unit_test(the_end_of_a_trace_is_told_of),
		cmocka_unit_test(a_trace_is_its_users_own),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
