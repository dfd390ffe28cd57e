/* SPDX-License-Identifier: Apache-2.0
 *
 * test_cuda.c - the cuda transport over a stand-in for the driver: right bytes whatever order the device works in, what
 * is refused and how it is said, and nothing left behind whichever call of the driver fails.
 */
#include "cuda_ranks.h"
#include "transports.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

static const char *stub_path;

static int walk(struct rank *rank)
{
	uint32_t state = 5u + (uint32_t)rank->member->rank;

	for (int step = 0; step < 40; step++) {
		state = state * 1103515245u + 12345u;
		if (!cuda_visit(rank, FIRST + (state >> 16) % LAYERS, rank->streams[state >> 8 & 1]))
			return 0;
	}
	return cuda_all_right(rank, "a walk");
}

static int replay(struct rank *rank, cuda_graph_exec exec)
{
	OK(rank, lshard_series_prepare(rank->series, rank->streams[0]));
	EXPECT(rank->member, !cuGraphLaunch(exec, rank->streams[0]), "launch");
	return 1;
failed:
	return 0;
}

/* @p other also computes in the capture: forked off and led back. */
static int capture_pass(struct rank *rank, cuda_graph_exec *exec, cuda_event event)
{
	cuda_graph graph = NULL;

	OK(rank, lshard_series_prepare(rank->series, rank->streams[0]));
	EXPECT(rank->member, !cuStreamBeginCapture_v2(rank->streams[0], 0), "begin");
	EXPECT(rank->member, !cuEventRecord(event, rank->streams[0]) && !cuStreamWaitEvent(rank->streams[1], event, 0),
	       "fork");
	for (uint32_t layer = FIRST; layer < FIRST + LAYERS; layer++)
		if (!cuda_visit(rank, layer, rank->streams[layer & 1]))
			goto failed;
	EXPECT(rank->member, !cuEventRecord(event, rank->streams[1]) && !cuStreamWaitEvent(rank->streams[0], event, 0),
	       "join");
	OK(rank, lshard_series_join(rank->series, rank->streams[0]));
	EXPECT(rank->member, !cuStreamEndCapture(rank->streams[0], &graph), "end");
	EXPECT(rank->member, !cuGraphInstantiateWithFlags(exec, graph, 0) && !cuGraphDestroy(graph), "instantiate");
	return 1;
failed:
	return 0;
}

/* A capture thrown away in the middle, by a call that cannot be captured. */
static int spoil_capture(struct rank *rank)
{
	cuda_graph graph = NULL;

	EXPECT(rank->member, !cuStreamBeginCapture_v2(rank->streams[0], 0), "begin");
	if (!cuda_one_pass(rank, 3, rank->streams[0]))
		goto failed;
	EXPECT(rank->member, lshard_series_prepare(rank->series, rank->streams[0]) == LSHARD_ERR_STATE, "captured");
	cuStreamEndCapture(rank->streams[0], &graph);
	if (graph)
		cuGraphDestroy(graph);
	return 1;
failed:
	return 0;
}

static int graphs(struct rank *rank, cuda_graph_exec *exec, cuda_event event)
{
	if (!capture_pass(rank, exec, event))
		return 0;
	for (uint32_t round = 0; round < 12; round++) {
		if (!replay(rank, *exec) || (round % 3 == 0 && !replay(rank, *exec)))
			return 0;
		if (round & 1 && lshard_series_prepare(rank->series, rank->streams[1]) != LSHARD_OK)
			return 0;
		if (!cuda_one_pass(rank, round % LAYERS, rank->streams[round & 1]) ||
		    (round % 4 == 0 && !spoil_capture(rank)))
			return 0;
	}
	return cuda_all_right(rank, "graphs and eager passes mixed");
}

static int update(struct rank *rank, cuda_graph_exec exec, uint32_t generation)
{
	if (!cuda_one_pass(rank, 1 + (generation + (uint32_t)rank->member->rank) % LAYERS, rank->streams[0]))
		return 0;
	OK(rank, lshard_series_update_begin(rank->series));
	if (!cuda_all_right(rank, "before an update"))
		return 0;
	cuda_foretell(rank, generation);
	OK(rank, lshard_series_update_end(rank->series, cuda_fill_layer, rank));
	return cuda_one_pass(rank, LAYERS, rank->streams[0]) && replay(rank, exec) &&
	       cuda_all_right(rank, "after an update");
failed:
	return 0;
}

static int lives(const struct member *member)
{
	struct rank rank;
	cuda_graph_exec exec = NULL;
	cuda_event event = NULL;
	cuda_context current;

	if (!cuda_open_rank(&rank, member))
		return 1;
	cuEventCreate(&event, CUDA_EVENT_WITHOUT_TIME);
	if (!walk(&rank) || !graphs(&rank, &exec, event) || !update(&rank, exec, 1) || !update(&rank, exec, 2))
		goto failed;
	EXPECT(member, !cuCtxGetCurrent(&current) && current == rank.context, "the caller's context was changed");
	cuGraphExecDestroy(exec);
	cuEventDestroy_v2(event);
	cuda_close_rank(&rank);
	EXPECT(member, stub_cuda_outstanding() == 0 && stub_cuda_bytes() == 0, "%d objects are left",
	       stub_cuda_outstanding());
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void every_mode_gives_the_right_bytes(void **state)
{
	const struct setting modes[] = {
		{.spec = "cuda", .prefetch = 1},
		{.spec = "cuda", .prefetch = 0, .placement = LSHARD_STRIPED},
		{.spec = "cuda", .prefetch = 1, .neighbours = 8},
		{.spec = "cuda", .prefetch = 1, .neighbours = 8, .placement = LSHARD_STRIPED},
		{.spec = "cuda", .prefetch = 2, .neighbours = 2},
		{.spec = "cuda", .prefetch = 1, .neighbours = 2, .placement = LSHARD_STRIPED},
		{.spec = "cuda:copy", .prefetch = 1, .neighbours = 8},
		{.spec = "cuda:ipc", .prefetch = 1},
		{.spec = "cuda", .prefetch = 1, .lacks_memory = 1},
	};

	(void)state;
	for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++)
		for (int32_t size = 1; size <= 3; size++)
			for (int64_t late = 0; late <= 20; late += 10) {
				struct setting setting = modes[i];

				setting.late = late;
				assert_int_equal(team_of_processes(size, lives, &setting), 0);
			}
}

/* ---- where layers lie ---- */

static int tells_what_moves(const struct member *member)
{
	const struct setting *setting = member->user;
	lshard_stats stats = LSHARD_STATS_INIT;
	const int alone = member->rank >= setting->neighbours;
	struct rank rank;

	if (!cuda_open_rank(&rank, member))
		return 1;
	EXPECT(member, lshard_series_stats(rank.series, &stats) == LSHARD_OK, "stats");
	/* 5 layers from number 2 on: ranks 0, 1, 2 have 2 (3, 6), 1 (4), 2 (2, 5) of them, in some order */
	if (setting->placement == LSHARD_STRIPED)
		EXPECT(member, stats.windows == (setting->neighbours >= member->size ? 0 : 2), "%u windows",
		       stats.windows);
	else if (setting->neighbours >= member->size)
		EXPECT(member, stats.windows == 0, "%u windows on one device", stats.windows);
	else
		EXPECT(member, (stats.windows > 0) && (alone || stats.windows <= 2), "%u windows", stats.windows);
	cuda_close_rank(&rank);
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void ranks_on_one_device_need_no_windows(void **state)
{
	struct setting one = {.spec = "cuda", .prefetch = 1, .neighbours = 3};
	struct setting striped = {.spec = "cuda", .prefetch = 1, .neighbours = 3, .placement = LSHARD_STRIPED};
	struct setting mixed = {.spec = "cuda", .prefetch = 1, .neighbours = 2};
	struct setting mixed_stripes = {.spec = "cuda", .prefetch = 1, .neighbours = 2, .placement = LSHARD_STRIPED};

	(void)state;
	assert_int_equal(team_of_processes(3, tells_what_moves, &one), 0);
	assert_int_equal(team_of_processes(3, tells_what_moves, &striped), 0);
	assert_int_equal(team_of_processes(3, tells_what_moves, &mixed), 0);
	assert_int_equal(team_of_processes(3, tells_what_moves, &mixed_stripes), 0);
}

/* ---- death ---- */

static int outlives(const struct member *member)
{
	struct rank rank;

	if (!cuda_open_rank(&rank, member))
		return 1;
	if (!cuda_one_pass(&rank, 3, rank.streams[0]) || !team_barrier(member))
		goto failed;
	if (member->rank == 1) {
		team_dies(member);
		raise(SIGKILL);
	}
	for (int pass = 0; pass < 20; pass++)
		if (!cuda_one_pass(&rank, LAYERS, rank.streams[pass & 1]))
			goto failed;
	if (!cuda_all_right(&rank, "after a rank was killed"))
		goto failed;
	EXPECT(member, lshard_series_update_begin(rank.series) == LSHARD_ERR_PEER_FAILED, "an update without a source");
	cuda_close_rank(&rank);
	EXPECT(member, stub_cuda_outstanding() == 0, "%d objects are left", stub_cuda_outstanding());
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void bytes_outlive_their_owner(void **state)
{
	struct setting modes[] = {
		{.spec = "cuda", .prefetch = 1, .late = 3},
		{.spec = "cuda", .prefetch = 1, .neighbours = 3},
		{.spec = "cuda", .prefetch = 1, .neighbours = 3, .placement = LSHARD_STRIPED},
		{.spec = "cuda:ipc", .prefetch = 1},
	};

	(void)state;
	for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++)
		assert_int_equal(team_of_processes(3, outlives, &modes[i]), 0);
}

/* ---- what is refused, and the words for it ---- */

static int available(const char *path, char *reason, size_t bytes)
{
	lshard_error error = {{0}};
	int found;

	setenv("LAYERSHARD_CUDA_SO_PATH", path, 1);
	found = lshard__cuda.available(&error);
	setenv("LAYERSHARD_CUDA_SO_PATH", stub_path, 1);
	snprintf(reason, bytes, "%s", error.text);
	return found;
}

static void a_missing_or_old_driver_is_named(void **state)
{
	char reason[512];

	(void)state;
	stub_cuda_reset();
	assert_true(available(stub_path, reason, sizeof reason));
	assert_int_equal(stub_cuda_calls("cuInit"), 0); /* or ranks could not be forked afterwards */
	assert_false(available("/nowhere/libcuda.so.1", reason, sizeof reason));
	assert_non_null(strstr(reason, "/nowhere/libcuda.so.1"));
	assert_false(available("libc.so.6", reason, sizeof reason));
	assert_non_null(strstr(reason, "libc.so.6 has no cuInit"));
	stub_cuda_set(STUB_VERSION, 11030);
	assert_false(available(stub_path, reason, sizeof reason));
	assert_non_null(strstr(reason, "CUDA 11.3"));
	stub_cuda_reset();
}

/* What group creation says on every rank, when one of them has a stub set as the variant says. */
struct refusal {
	struct setting setting;
	enum stub_setting knob;
	int64_t value;
	int knob_rank; /* -1: all */
	lshard_status status;
	const char *words;
};

/* LeakSanitizer's, where there is one: what is allocated from here on is no leak. */
extern void __lsan_disable(void) __attribute__((weak));

static int is_refused(const struct member *member)
{
	const struct refusal *refusal = member->user;
	struct rank rank;
	lshard_status status;

	cuda_set_stub(member, &refusal->setting);
	if (refusal->knob_rank < 0 || refusal->knob_rank == member->rank)
		stub_cuda_set(refusal->knob, refusal->value);
	if (refusal->knob == STUB_STUCK && __lsan_disable) /* what copies still use must stay */
		__lsan_disable();
	status = cuda_open_group(&rank, member, &refusal->setting);
	EXPECT(member, status == refusal->status, "%d: %s", (int)status, rank.error);
	EXPECT(member, strstr(rank.error, refusal->words), "%s", rank.error);
	if (refusal->knob != STUB_STUCK)
		EXPECT(member, stub_cuda_outstanding() == 0, "%d objects are left", stub_cuda_outstanding());
	return 0;
failed:
	lshard_group_destroy(rank.group);
	return 1;
}

static void what_is_refused_is_told_to_all(void **state)
{
	struct refusal refusals[] = {
		{{.spec = "cuda"}, STUB_DEVICES, 0, 1, LSHARD_ERR_NOT_SUPPORTED, "rank 1: the driver shows no device"},
		{{.spec = "cuda"}, STUB_DEVICES, 1, 1, LSHARD_ERR_INVALID, "rank 1: device 1: the driver shows 1"},
		{{.spec = "cuda"}, STUB_GARBLE, 1, 1, LSHARD_ERR_TRANSPORT, "reads wrong bytes from rank"},
		{{.spec = "cuda"},
		 STUB_MEMORY_BYTES,
		 20 << 20,
		 0,
		 LSHARD_ERR_NO_MEMORY,
		 "rank 0: series 'link check': windows of 16777216 bytes on Stub 0 (0000:00:00.0): "
		 "CUDA_ERROR_OUT_OF_MEMORY: out of memory"},
		{{.spec = "cuda:slow"}, STUB_LATE, 0, -1, LSHARD_ERR_INVALID, "cuda has no option 'slow'"},
		{{.spec = "cuda:copy+floor=x"}, STUB_LATE, 0, -1, LSHARD_ERR_INVALID, "cuda has no option 'floor=x'"},
		{{.spec = "cuda", .timeout_ms = 1500},
		 STUB_STUCK,
		 1,
		 -1,
		 LSHARD_ERR_TIMEOUT,
		 "waited 1500 ms for work on the device"},
	};

	(void)state;
	for (size_t i = 0; i < sizeof refusals / sizeof refusals[0]; i++)
		assert_int_equal(team_of_processes(2, is_refused, &refusals[i]), 0);
}

static int warns(const struct member *member)
{
	const struct refusal *refusal = member->user;
	struct rank rank;

	cuda_set_stub(member, &refusal->setting);
	if (refusal->knob_rank < 0 || refusal->knob_rank == member->rank)
		stub_cuda_set(refusal->knob, refusal->value);
	EXPECT(member, cuda_open_group(&rank, member, &refusal->setting) == LSHARD_OK, "%s", rank.error);
	if (refusal->knob_rank != member->rank)
		EXPECT(member, strstr(rank.said, refusal->words), "said: %s", rank.said);
	lshard_group_destroy(rank.group);
	return 0;
failed:
	lshard_group_destroy(rank.group);
	return 1;
}

/* A rank that cannot give its shard says why, and all hear this rather than that they were given nothing. */
static int hears_the_cause(const struct member *member)
{
	struct rank rank;

	cuda_set_stub(member, member->user);
	if (member->rank == 1)
		stub_cuda_fail("cuMemExportToShareableHandle", 1, CUDA_NO_MEMORY);
	EXPECT(member, cuda_open_group(&rank, member, member->user) == LSHARD_ERR_NO_MEMORY, "%s", rank.error);
	EXPECT(member, strstr(rank.error, "rank 1: ") && strstr(rank.error, "descriptor for a shard"), "%s",
	       rank.error);
	EXPECT(member, stub_cuda_outstanding() == 0, "%d things left", stub_cuda_outstanding());
	return 0;
failed:
	return 1;
}

static void the_cause_is_heard_not_its_echo(void **state)
{
	struct setting setting = {.spec = "cuda", .prefetch = 1};

	(void)state;
	assert_int_equal(team_of_processes(3, hears_the_cause, &setting), 0);
}

/* Legacy handles do not work inside one process; what does, conformance tries. */
static int is_no_process(const struct member *member)
{
	const struct setting *setting = member->user;
	struct rank rank;

	EXPECT(member, cuda_open_group(&rank, member, setting) == LSHARD_ERR_NOT_SUPPORTED, "%s", rank.error);
	EXPECT(member, strstr(rank.error, "are threads of one process"), "%s", rank.error);
	return 0;
failed:
	lshard_group_destroy(rank.group);
	return 1;
}

static void legacy_handles_need_processes(void **state)
{
	struct setting setting = {.spec = "cuda:ipc", .prefetch = 1};

	(void)state;
	stub_cuda_reset();
	assert_int_equal(team_of_threads(2, is_no_process, &setting), 0);
	assert_int_equal(stub_cuda_outstanding(), 0);
	stub_cuda_reset();
}

static void slow_links_and_fallbacks_are_told(void **state)
{
	struct refusal slow = {{.spec = "cuda:ipc+floor=35"},  STUB_LEGACY_FETCH_NS, 500000, -1, LSHARD_OK,
			       "at 33.6 GB/s: the copies seem"};
	struct refusal legacy = {{.spec = "cuda"}, STUB_DESCRIPTORS, 0, 1, LSHARD_OK, "all use legacy handles"};

	(void)state;
	assert_int_equal(team_of_processes(2, warns, &slow), 0);
	assert_int_equal(team_of_processes(2, warns, &legacy), 0);
}

static int goes_without_read_only(const struct member *member)
{
	struct rank rank;

	cuda_set_stub(member, member->user);
	stub_cuda_set(STUB_READ_ONLY, 0);
	EXPECT(member, cuda_open_group(&rank, member, member->user) == LSHARD_OK, "%s", rank.error);
	lshard_group_destroy(rank.group);
	return 0;
failed:
	return 1;
}

static void a_driver_without_read_only_access_will_do(void **state)
{
	struct setting setting = {.spec = "cuda"};

	(void)state;
	assert_int_equal(team_of_processes(2, goes_without_read_only, &setting), 0);
}

/* ---- a device that does not answer, or answers badly ---- */

static int ends_though_stuck(const struct member *member)
{
	struct rank rank;

	if (!cuda_open_rank(&rank, member))
		return 1;
	stub_cuda_set(STUB_STUCK, 1);
	if (!cuda_one_pass(&rank, LAYERS, rank.streams[0]))
		goto failed;
	EXPECT(member, lshard_series_update_begin(rank.series) == LSHARD_ERR_TIMEOUT, "%s",
	       lshard_series_error(rank.series));
	EXPECT(member, strstr(lshard_series_error(rank.series), "does not end"), "%s",
	       lshard_series_error(rank.series));
	lshard_group_abort(rank.group);
	EXPECT(member, lshard_series_destroy(rank.series) == LSHARD_OK, "destroy");
	rank.series = NULL;
	EXPECT(member, strstr(rank.said, "left to the end of the process"), "said: %s", rank.said);
	EXPECT(member, stub_cuda_bytes() > 0, "memory was freed under a copy");
	lshard_group_destroy(rank.group);
	return 0;
failed:
	return 1;
}

static void work_that_does_not_end_keeps_its_memory(void **state)
{
	struct setting setting = {.spec = "cuda", .prefetch = 1, .timeout_ms = patience(1500)};

	(void)state;
	assert_int_equal(team_of_processes(2, ends_though_stuck, &setting), 0);
}

static int reports_errors_of_a_pass(const struct member *member)
{
	struct rank rank;
	cuda_graph graph = NULL;

	if (!cuda_open_rank(&rank, member))
		return 1;
	if (!cuda_one_pass(&rank, LAYERS, rank.streams[0]))
		goto failed;
	stub_cuda_fail("cuGraphLaunch", 1, 719);
	for (uint32_t layer = FIRST; layer < FIRST + LAYERS; layer++) {
		const lshard_status reached = lshard_reach(rank.series, layer, rank.streams[0]);
		const lshard_status status = lshard_wait(rank.series, layer, rank.streams[0]);

		EXPECT(member, reached == LSHARD_OK, "%s", lshard_series_error(rank.series));
		if (status == LSHARD_OK)
			continue;
		EXPECT(member,
		       status == LSHARD_ERR_TRANSPORT &&
			       strstr(lshard_series_error(rank.series), "CUDA_ERROR_LAUNCH_FAILED"),
		       "%s", lshard_series_error(rank.series));
		EXPECT(member, lshard_wait(rank.series, layer, rank.streams[0]) == LSHARD_OK, "%s",
		       lshard_series_error(rank.series));
	}
	if (!cuda_one_pass(&rank, LAYERS, rank.streams[0]) || !cuda_all_right(&rank, "after a failed copy"))
		goto failed;
	EXPECT(member, !cuStreamBeginCapture_v2(rank.streams[0], 0), "begin");
	EXPECT(member, cuEventQuery(NULL) == 900, "an unsafe call invalidates a capture");
	EXPECT(member, lshard_reach(rank.series, FIRST, rank.streams[0]) == LSHARD_ERR_TRANSPORT,
	       "in an invalidated capture");
	EXPECT(member, strstr(lshard_series_error(rank.series), "is the stream being captured"), "%s",
	       lshard_series_error(rank.series));
	EXPECT(member, cuStreamEndCapture(rank.streams[0], &graph) != 0 && !graph, "end");
	if (!cuda_one_pass(&rank, LAYERS, rank.streams[0]) || !cuda_all_right(&rank, "after an invalidated capture"))
		goto failed;
	cuda_close_rank(&rank);
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void errors_of_a_pass_are_reported_by_its_wait(void **state)
{
	struct setting setting = {.spec = "cuda", .prefetch = 0};

	(void)state;
	assert_int_equal(team_of_processes(2, reports_errors_of_a_pass, &setting), 0);
}

/* Creating, updating and destroying a series makes calls that a capture in the same thread would not survive. */
static int leaves_a_capture_alone(const struct member *member)
{
	struct rank rank;
	cuda_graph graph = NULL;

	if (!cuda_open_rank(&rank, member))
		return 1;
	EXPECT(member, !cuStreamBeginCapture_v2(rank.streams[1], 0), "begin");
	OK(&rank, lshard_series_update_begin(rank.series));
	OK(&rank, lshard_series_update_end(rank.series, cuda_fill_layer, &rank));
	OK(&rank, lshard_series_destroy(rank.series));
	rank.series = NULL;
	EXPECT(member, cuda_create_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	EXPECT(member, !cuStreamEndCapture(rank.streams[1], &graph) && graph, "the capture was invalidated");
	cuGraphDestroy(graph);
	cuda_close_rank(&rank);
	EXPECT(member, stub_cuda_outstanding() == 0, "%d objects are left", stub_cuda_outstanding());
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void a_capture_elsewhere_is_left_alone(void **state)
{
	struct setting setting = {.spec = "cuda", .prefetch = 1};
	struct setting legacy = {.spec = "cuda:ipc", .prefetch = 1};

	(void)state;
	assert_int_equal(team_of_processes(2, leaves_a_capture_alone, &setting), 0);
	assert_int_equal(team_of_processes(2, leaves_a_capture_alone, &legacy), 0);
}

/* ---- every call of the driver fails once ---- */

struct failure {
	struct setting setting;
	const char *symbol;
	unsigned nth;
	int gives_back; /* the function frees something: then it stays */
};

/* Only rank 1's driver fails. Whatever the others are told, all end, and nothing stays. */
static int ends_cleanly(const struct member *member)
{
	const struct failure *failure = member->user;
	struct rank rank;
	lshard_status status;

	cuda_set_stub(member, &failure->setting);
	if (member->rank == 1)
		stub_cuda_fail(failure->symbol, failure->nth, CUDA_NO_MEMORY);
	status = cuda_open_group(&rank, member, &failure->setting);
	if (status == LSHARD_OK) {
		status = cuda_create_series(&rank);
		snprintf(rank.error, sizeof rank.error, "%s", lshard_group_error(rank.group));
	}
	if (status == LSHARD_OK)
		status = lshard_series_commit(rank.series, cuda_fill_layer, &rank);
	for (uint32_t layer = FIRST; layer < FIRST + LAYERS && status == LSHARD_OK; layer++) {
		status = lshard_reach(rank.series, layer, NULL);
		if (status == LSHARD_OK)
			status = lshard_wait(rank.series, layer, NULL);
	}
	if (rank.series && status < 0)
		snprintf(rank.error, sizeof rank.error, "%s", lshard_series_error(rank.series));
	EXPECT(member, status == LSHARD_OK || rank.error[0], "%s, call %u: no words for status %d", failure->symbol,
	       failure->nth, (int)status);
	cuda_close_rank(&rank);
	EXPECT(member, failure->gives_back || stub_cuda_outstanding() == 0, "%s, call %u: %d objects are left",
	       failure->symbol, failure->nth, stub_cuda_outstanding());
	return 0;
failed:
	return 1;
}

static int gives_back(const char *symbol)
{
	static const char *const words[] = {"Release", "Destroy", "Free",    "Unmap",
					    "Close",   "CtxPop",  "CtxPush", "EventQuery"};

	for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
		if (strstr(symbol, words[i]))
			return 1;
	return 0;
}

static void any_call_may_fail(void **state)
{
	static const char *const symbols[] = {
#define CUDA_NAME(member, symbol, parameters) #symbol,
		CUDA_FUNCTIONS(CUDA_NAME)
#undef CUDA_NAME
	};
	const unsigned turns[] = {1, 4};

	(void)state;
	for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++)
		for (size_t j = 0; j < sizeof turns / sizeof turns[0]; j++) {
			struct failure failure = {{.spec = strstr(symbols[i], "Ipc") || strstr(symbols[i], "MemAlloc_")
								   ? "cuda:ipc"
								   : "cuda",
						   .prefetch = 1,
						   .timeout_ms = patience(2000),
						   .neighbours = j == 1 ? 2 : 0,
						   .placement = j == 1 ? LSHARD_STRIPED : LSHARD_WHOLE},
						  symbols[i],
						  turns[j],
						  gives_back(symbols[i])};

			assert_int_equal(team_of_processes(2, ends_cleanly, &failure), 0);
		}
}

int main(int count, char **arguments)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_missing_or_old_driver_is_named),
		cmocka_unit_test(every_mode_gives_the_right_bytes),
		cmocka_unit_test(ranks_on_one_device_need_no_windows),
		cmocka_unit_test(bytes_outlive_their_owner),
		cmocka_unit_test(what_is_refused_is_told_to_all),
		cmocka_unit_test(the_cause_is_heard_not_its_echo),
		cmocka_unit_test(legacy_handles_need_processes),
		cmocka_unit_test(slow_links_and_fallbacks_are_told),
		cmocka_unit_test(a_driver_without_read_only_access_will_do),
		cmocka_unit_test(work_that_does_not_end_keeps_its_memory),
		cmocka_unit_test(errors_of_a_pass_are_reported_by_its_wait),
		cmocka_unit_test(a_capture_elsewhere_is_left_alone),
		cmocka_unit_test(any_call_may_fail),
	};

	if (count != 2) {
		fprintf(stderr, "usage: test_cuda PATH-OF-THE-STUB\n");
		return 2;
	}
	stub_path = arguments[1];
	setenv("LAYERSHARD_CUDA_SO_PATH", stub_path, 1);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
