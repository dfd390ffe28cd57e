/* SPDX-License-Identifier: Apache-2.0
 *
 * test_cuda_fetch.c - how the cuda transport's copies are made, over a stand-in for the driver: how many calls they
 * take, how they are cut and paced, and which way of sharing memory is taken where one is slow.
 */
#include "cuda_ranks.h"
#include "transports.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* ---- calls of the driver ---- */

static uint64_t fetches(struct rank *rank)
{
	lshard_stats stats = LSHARD_STATS_INIT;

	return lshard_series_stats(rank->series, &stats) == LSHARD_OK ? stats.fetches : 0;
}

static int counts_calls(const struct member *member)
{
	static const char *const enqueues[] = {"cuGraphLaunch",      "cuMemcpyAsync",     "cuMemcpy2DAsync_v2",
					       "cuEventRecord",      "cuStreamWaitEvent", "cuLaunchHostFunc",
					       "cuCtxPushCurrent_v2"};
	struct rank rank;
	unsigned all;
	unsigned enqueued = 0;
	uint64_t before;
	double moved;

	if (!cuda_open_rank(&rank, member))
		return 1;
	if (!cuda_one_pass(&rank, LAYERS, rank.streams[0]) || !cuda_all_right(&rank, "the first pass"))
		goto failed;
	before = fetches(&rank);
	all = stub_cuda_calls(NULL);
	for (size_t i = 0; i < sizeof enqueues / sizeof enqueues[0]; i++)
		enqueued -= stub_cuda_calls(enqueues[i]);
	for (int pass = 0; pass < 10; pass++)
		for (uint32_t layer = FIRST; layer < FIRST + LAYERS; layer++) {
			OK(&rank, lshard_reach(rank.series, layer, rank.streams[0]));
			OK(&rank, lshard_wait(rank.series, layer, rank.streams[0]));
		}
	all = stub_cuda_calls(NULL) - all;
	for (size_t i = 0; i < sizeof enqueues / sizeof enqueues[0]; i++)
		enqueued += stub_cuda_calls(enqueues[i]);
	moved = (double)(fetches(&rank) - before);
	EXPECT(member, moved >= 20, "%.0f transfers", moved);
	/* the reader's event, the wait for it, the copy, its event, the wait for that */
	EXPECT(member, enqueued <= 5 * moved, "%.2f enqueued for a transfer", enqueued / moved);
	/* besides, which context and whether there is a capture: in each of the transport's calls, two of a visit */
	EXPECT(member, all <= 11 * moved + 4 * 10 * LAYERS, "%u calls of the driver for %.0f transfers", all, moved);
	cuda_close_rank(&rank);
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void a_transfer_takes_few_calls(void **state)
{
	struct setting setting = {.spec = "cuda", .prefetch = 0};

	(void)state;
	assert_int_equal(team_of_processes(2, counts_calls, &setting), 0);
}

/* ---- recorded copies that the driver refuses ---- */

struct refused {
	struct setting setting;
	const char *symbol;
	unsigned nth;
};

static int copies_without_graphs(const struct member *member)
{
	const struct refused *refused = member->user;
	struct rank rank;

	cuda_set_stub(member, &refused->setting);
	EXPECT(member, cuda_open_group(&rank, member, &refused->setting) == LSHARD_OK, "%s", rank.error);
	stub_cuda_fail(refused->symbol, refused->nth, CUDA_UNSUPPORTED);
	EXPECT(member, cuda_create_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	cuda_foretell(&rank, 0);
	OK(&rank, lshard_series_commit(rank.series, cuda_fill_layer, &rank));
	for (int pass = 0; pass < 3; pass++)
		for (uint32_t layer = FIRST; layer < FIRST + LAYERS; layer++) {
			void *address = NULL;

			OK(&rank, lshard_reach(rank.series, layer, NULL));
			OK(&rank, lshard_wait(rank.series, layer, NULL));
			OK(&rank, lshard_series_address(rank.series, layer, 0, &address));
			cuCtxSetCurrent(rank.context);
			cuStreamSynchronize(NULL);
			EXPECT(member, !memcmp(address, rank.reference[layer - FIRST], BYTES), "layer %u", layer);
		}
	cuda_close_rank(&rank);
	EXPECT(member, stub_cuda_outstanding() == 0, "%d objects are left", stub_cuda_outstanding());
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void copies_are_enqueued_where_graphs_are_refused(void **state)
{
	static const char *const symbols[] = {"cuStreamBeginCapture_v2", "cuStreamEndCapture",
					      "cuGraphInstantiateWithFlags", "cuGraphUpload"};

	(void)state;
	for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++)
		for (unsigned nth = 1; nth <= 2; nth++) {
			struct refused refused = {{.spec = "cuda", .prefetch = 1}, symbols[i], nth};

			assert_int_equal(team_of_processes(2, copies_without_graphs, &refused), 0);
		}
}

/* ---- a layer into another window than the ring's ---- */

/* The store of this process's series, as the transport made it. */
static lshard_store *tapped_store;
static lshard_transport_ops tapped_ops;
static lshard_status (*true_store_open)(lshard_transport *, const lshard_store_plan *, lshard_store **);

static lshard_status tap_store(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **opened)
{
	const lshard_status status = true_store_open(transport, plan, opened);

	if (status == LSHARD_OK)
		tapped_store = *opened;
	return status;
}

static lshard_status open_tapped(const lshard_context *context, lshard_transport *inner, lshard_transport **transport,
				 lshard_error *error)
{
	const lshard_status status = lshard__cuda.open(context, inner, transport, error);

	if (status != LSHARD_OK)
		return status;
	tapped_ops = *(*transport)->ops;
	true_store_open = tapped_ops.store_open;
	tapped_ops.store_open = tap_store;
	(*transport)->ops = &tapped_ops;
	return status;
}

static int brings_into(struct rank *rank, uint32_t position, uint32_t buffer)
{
	const lshard_transport_ops *ops = tapped_store->transport->ops;
	lshard_arrival arrival;

	EXPECT(rank->member,
	       ops->fetch(tapped_store, position, buffer, rank->streams[0], 0) == LSHARD_OK &&
		       ops->wait(tapped_store, buffer, rank->streams[0], &arrival) == LSHARD_OK,
	       "%s", tapped_store->error.text);
	cuStreamSynchronize(rank->streams[0]);
	EXPECT(rank->member, !memcmp(ops->buffer(tapped_store, buffer, position), rank->reference[position], BYTES),
	       "position %u in window %u", position, buffer);
	return 1;
failed:
	return 0;
}

static int brings_into_any_window(const struct member *member)
{
	lshard_transport_ops ops = lshard__cuda;
	struct rank rank;
	int moved = 0;

	ops.open = open_tapped;
	cuda_set_stub(member, member->user);
	EXPECT(member, cuda_open_group_by(&rank, member, member->user, &ops) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, cuda_create_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	cuda_foretell(&rank, 0);
	OK(&rank, lshard_series_commit(rank.series, cuda_fill_layer, &rank));
	EXPECT(member, cuda_open_streams(&rank), "streams");
	for (uint32_t position = 0; position < LAYERS; position++)
		for (uint32_t buffer = 0; buffer < tapped_store->plan->windows; buffer++) {
			if (tapped_store->plan->buffer_of[position] >= tapped_store->plan->windows)
				continue;
			if (!brings_into(&rank, position, buffer))
				goto failed;
			moved += buffer != tapped_store->plan->buffer_of[position];
		}
	EXPECT(member, moved >= 2, "every layer came into its own window");
	cuda_close_rank(&rank);
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void a_layer_comes_into_any_window(void **state)
{
	struct setting setting = {.prefetch = 1};

	(void)state;
	assert_int_equal(team_of_processes(2, brings_into_any_window, &setting), 0);
}

/* ---- what cannot be captured ---- */

static lshard_status update(struct rank *rank)
{
	const lshard_status status = lshard_series_update_begin(rank->series);

	return status == LSHARD_OK ? lshard_series_update_end(rank->series, cuda_fill_layer, rank) : status;
}

static lshard_status verify(struct rank *rank)
{
	return lshard_series_verify(rank->series, NULL);
}

static lshard_status rewind_series(struct rank *rank)
{
	return lshard_series_rewind(rank->series);
}

/* They do not happen in a replay: the capture they come into says so to the end. */
static int cannot_be_captured(struct rank *rank, lshard_status (*call)(struct rank *), const char *name)
{
	cuda_graph graph = NULL;

	OK(rank, lshard_series_prepare(rank->series, rank->streams[0]));
	EXPECT(rank->member, !cuStreamBeginCapture_v2(rank->streams[0], 0), "begin");
	if (!cuda_one_pass(rank, 2, rank->streams[0]))
		goto failed;
	EXPECT(rank->member, call(rank) == LSHARD_OK, "%s: %s", name, lshard_series_error(rank->series));
	EXPECT(rank->member, lshard_reach(rank->series, FIRST, rank->streams[0]) == LSHARD_ERR_STATE, "%s", name);
	EXPECT(rank->member, strstr(lshard_series_error(rank->series), "capture again"), "%s",
	       lshard_series_error(rank->series));
	EXPECT(rank->member, lshard_series_join(rank->series, rank->streams[0]) == LSHARD_ERR_STATE, "%s", name);
	cuStreamEndCapture(rank->streams[0], &graph);
	if (graph)
		cuGraphDestroy(graph);
	OK(rank, lshard_series_prepare(rank->series, rank->streams[0]));
	return cuda_one_pass(rank, LAYERS, rank->streams[0]) && cuda_all_right(rank, name);
failed:
	return 0;
}

static int says_what_cannot_be_captured(const struct member *member)
{
	struct rank rank;

	if (!cuda_open_rank(&rank, member))
		return 1;
	if (!cannot_be_captured(&rank, update, "an update") || !cannot_be_captured(&rank, verify, "a verification") ||
	    !cannot_be_captured(&rank, rewind_series, "a rewind"))
		goto failed;
	cuda_close_rank(&rank);
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void what_cannot_be_captured_is_said(void **state)
{
	struct setting setting = {.spec = "cuda", .prefetch = 0};
	struct setting striped = {.spec = "cuda", .prefetch = 0, .placement = LSHARD_STRIPED};

	(void)state;
	assert_int_equal(team_of_processes(2, says_what_cannot_be_captured, &setting), 0);
	assert_int_equal(team_of_processes(2, says_what_cannot_be_captured, &striped), 0);
}

/* The first call of a capture is for a layer whose window nobody has read: the copy is in the capture all the same. */
static int begins_with_a_copy(const struct member *member)
{
	const uint32_t layer = member->rank == 0 ? FIRST + 3 : FIRST + 4; /* the last of those that come here */
	cuda_graph graph = NULL;
	struct rank rank;

	if (!cuda_open_rank(&rank, member))
		return 1;
	EXPECT(member, !cuStreamBeginCapture_v2(rank.streams[0], 0), "begin");
	OK(&rank, lshard_reach(rank.series, layer, rank.streams[0]));
	OK(&rank, lshard_wait(rank.series, layer, rank.streams[0]));
	OK(&rank, lshard_series_join(rank.series, rank.streams[0]));
	EXPECT(member, !cuStreamEndCapture(rank.streams[0], &graph) && !cuGraphDestroy(graph), "end");
	if (!cuda_one_pass(&rank, LAYERS, rank.streams[0]) || !cuda_all_right(&rank, "after the capture"))
		goto failed;
	cuda_close_rank(&rank);
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void a_capture_may_begin_with_a_copy(void **state)
{
	struct setting setting = {.spec = "cuda", .prefetch = 0};

	(void)state;
	assert_int_equal(team_of_processes(2, begins_with_a_copy, &setting), 0);
}

/* ---- devices that a rank is not shown ---- */

static int names_what_hides_devices(const struct member *member)
{
	struct rank rank;

	cuda_set_stub(member, member->user);
	if (member->rank == 1)
		stub_cuda_fail("cuMemImportFromShareableHandle", 1, CUDA_INVALID_DEVICE);
	EXPECT(member, cuda_open_group(&rank, member, member->user) != LSHARD_OK, "a device that cannot be read");
	EXPECT(member, strstr(rank.error, "rank 1: ") && strstr(rank.error, "CUDA_VISIBLE_DEVICES"), "%s", rank.error);
	EXPECT(member, stub_cuda_outstanding() == 0, "%d objects are left", stub_cuda_outstanding());
	return 0;
failed:
	return 1;
}

static void hidden_devices_are_named(void **state)
{
	struct setting setting = {.spec = "cuda"};

	(void)state;
	assert_int_equal(team_of_processes(2, names_what_hides_devices, &setting), 0);
}

/* ---- slices and pace ---- */

#define ROWS     1024u
#define WIDTH    6144u
#define MATRICES 4u

struct cut {
	const char *spec;
	lshard_placement placement;
	lshard_stripe stripe;
	int late;
	double bytes_per_s; /* 0: not paced */
	uint32_t rows;      /* of one layer; 0: as many layers of ROWS as MATRICES says */
};

struct matrix {
	const struct member *member;
	lshard_group *group;
	lshard_series *series;
	cuda_context context;
	cuda_stream stream;
	uint32_t layers;
	size_t bytes; /* of a layer */
	unsigned char *expected[MATRICES];
};

static int fill_matrix(void *user, uint32_t layer, void *const *tensors)
{
	const struct matrix *matrix = user;

	memcpy(tensors[0], matrix->expected[layer], matrix->bytes);
	return 0;
}

static int open_matrix(struct matrix *matrix, const struct cut *cut)
{
	const uint32_t rows = cut->rows ? cut->rows : ROWS;
	const lshard_tensor tensor = {.name = "matrix",
				      .bytes = (size_t)rows * WIDTH,
				      .stripe = cut->stripe,
				      .rows = cut->stripe == LSHARD_STRIPE_BYTES ? 0 : rows,
				      .column_bytes = cut->stripe == LSHARD_STRIPE_COLUMNS ? 2 : 0};
	lshard_group_options group = LSHARD_GROUP_OPTIONS_INIT;
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;
	char error[512] = "";
	uint32_t state = 17;

	matrix->layers = cut->rows ? 1 : MATRICES;
	matrix->bytes = tensor.bytes;
	for (uint32_t layer = 0; layer < matrix->layers; layer++) {
		matrix->expected[layer] = malloc(matrix->bytes);
		for (size_t i = 0; i < matrix->bytes; i++)
			matrix->expected[layer][i] = (unsigned char)((state = state * 1664525u + 1013904223u) >> 24);
	}
	stub_cuda_reset();
	stub_cuda_set(STUB_LATE, cut->late ? cut->late + matrix->member->rank : 0);
	group.rank = group.device = matrix->member->rank;
	group.size = matrix->member->size;
	group.transport = cut->spec;
	group.job = matrix->member->job;
	group.bootstrap = matrix->member->bootstrap;
	group.memory = LSHARD_MEMORY_CUDA;
	group.timeout_ms = LONG_MS;
	group.error = error;
	group.error_bytes = sizeof error;
	EXPECT(matrix->member, lshard_group_create(&group, &matrix->group) == LSHARD_OK, "%s", error);
	options.name = "matrices";
	options.layer_count = matrix->layers;
	options.prefetch = 0;
	options.tensors = &tensor;
	options.tensor_count = 1;
	options.placement = cut->placement;
	EXPECT(matrix->member, lshard_series_create(matrix->group, &options, &matrix->series) == LSHARD_OK, "%s",
	       lshard_group_error(matrix->group));
	OK(matrix, lshard_series_commit(matrix->series, fill_matrix, matrix));
	EXPECT(matrix->member,
	       !cuDevicePrimaryCtxRetain(&matrix->context, matrix->member->rank) && !cuCtxSetCurrent(matrix->context) &&
		       !cuStreamCreateWithPriority(&matrix->stream, CUDA_STREAM_NON_BLOCKING, 0),
	       "a stream");
	return 1;
failed:
	return 0;
}

static void close_matrix(struct matrix *matrix)
{
	lshard_series_destroy(matrix->series);
	lshard_group_destroy(matrix->group);
	if (matrix->stream)
		cuStreamDestroy_v2(matrix->stream);
	if (matrix->context)
		cuDevicePrimaryCtxRelease_v2(matrix->member->rank);
	cuCtxSetCurrent(NULL);
	for (uint32_t layer = 0; layer < matrix->layers; layer++)
		free(matrix->expected[layer]);
}

/* Every layer, compared as soon as it is there. */
static int look_at_all(struct matrix *matrix)
{
	for (uint32_t layer = 0; layer < matrix->layers; layer++) {
		void *address = NULL;

		OK(matrix, lshard_reach(matrix->series, layer, matrix->stream));
		OK(matrix, lshard_wait(matrix->series, layer, matrix->stream));
		OK(matrix, lshard_series_address(matrix->series, layer, 0, &address));
		cuStreamSynchronize(matrix->stream);
		EXPECT(matrix->member, !memcmp(address, matrix->expected[layer], matrix->bytes), "layer %u", layer);
	}
	return 1;
failed:
	return 0;
}

static int capture_all(struct matrix *matrix, cuda_graph_exec *exec)
{
	cuda_graph graph = NULL;

	OK(matrix, lshard_series_prepare(matrix->series, matrix->stream));
	EXPECT(matrix->member, !cuStreamBeginCapture_v2(matrix->stream, 0), "begin");
	for (uint32_t layer = 0; layer < matrix->layers; layer++) {
		OK(matrix, lshard_reach(matrix->series, layer, matrix->stream));
		OK(matrix, lshard_wait(matrix->series, layer, matrix->stream));
	}
	OK(matrix, lshard_series_join(matrix->series, matrix->stream));
	EXPECT(matrix->member, !cuStreamEndCapture(matrix->stream, &graph), "end");
	EXPECT(matrix->member, !cuGraphInstantiateWithFlags(exec, graph, 0) && !cuGraphDestroy(graph), "instantiate");
	return 1;
failed:
	return 0;
}

static uint64_t fetched(struct matrix *matrix)
{
	lshard_stats stats = LSHARD_STATS_INIT;

	return lshard_series_stats(matrix->series, &stats) == LSHARD_OK ? stats.fetched_bytes : 0;
}

/* What has begun and may not have been paid for: the last slice of each transfer, at most. */
static int took_its_time(const struct matrix *matrix, const struct cut *cut, double began_s, double bytes)
{
	const double least = cut->bytes_per_s > 0 ? (bytes - 2.0 * 1024 * 1024) / cut->bytes_per_s : 0;

	EXPECT(matrix->member, cuda_now_s() - began_s >= least, "%.0f bytes in %.3f s, %s", bytes,
	       cuda_now_s() - began_s, cut->spec);
	return 1;
failed:
	return 0;
}

static int cuts_right(const struct member *member)
{
	const struct cut *cut = member->user;
	struct matrix matrix = {.member = member};
	cuda_graph_exec exec = NULL;
	double began_s;
	uint64_t bytes;

	if (!open_matrix(&matrix, cut))
		goto failed;
	began_s = cuda_now_s();
	bytes = fetched(&matrix);
	for (int pass = 0; pass < 3; pass++)
		if (!look_at_all(&matrix))
			goto failed;
	bytes = fetched(&matrix) - bytes;
	if (!took_its_time(&matrix, cut, began_s, (double)bytes) || !capture_all(&matrix, &exec))
		goto failed;
	EXPECT(member, bytes > 0, "nothing was moved");
	cuStreamSynchronize(matrix.stream);
	began_s = cuda_now_s();
	for (int pass = 0; pass < 3; pass++) {
		OK(&matrix, lshard_series_prepare(matrix.series, matrix.stream));
		EXPECT(member, !cuGraphLaunch(exec, matrix.stream), "launch");
	}
	cuStreamSynchronize(matrix.stream);
	if (!took_its_time(&matrix, cut, began_s, (double)bytes / 3) || !look_at_all(&matrix))
		goto failed;
	cuGraphExecDestroy(exec);
	close_matrix(&matrix);
	EXPECT(member, stub_cuda_outstanding() == 0, "%d objects are left", stub_cuda_outstanding());
	return 0;
failed:
	close_matrix(&matrix);
	return 1;
}

static void slices_make_up_the_layer_at_the_pace_asked_for(void **state)
{
	struct cut cuts[] = {
		{"cuda", LSHARD_WHOLE, LSHARD_STRIPE_BYTES, 0, 0, 0},
		{"cuda:pace=1", LSHARD_WHOLE, LSHARD_STRIPE_BYTES, 0, 1e9, 0},
		{"cuda:pace=1+ipc", LSHARD_STRIPED, LSHARD_STRIPE_BYTES, 0, 1e9, 0},
		{"cuda:pace=1", LSHARD_STRIPED, LSHARD_STRIPE_ROWS, 5, 1e9, 0},
		{"cuda:pace=1", LSHARD_STRIPED, LSHARD_STRIPE_COLUMNS, 0, 1e9, 0},
		{"cuda:pace=1", LSHARD_STRIPED, LSHARD_STRIPE_COLUMNS, 5, 1e9, 0},
	};

	(void)state;
	for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++)
		for (int32_t size = 2; size <= 3; size++)
			assert_int_equal(team_of_processes(size, cuts_right, &cuts[i]), 0);
}

/* Each source has 20 MiB of the layer and is asked for 16 MiB at a time, in turn, by each reader in another order. */
static int takes_of_its_sources_in_turn(const struct member *member)
{
	static const uint64_t mib = 1 << 20;
	static const uint64_t begins[] = {0, 16};
	struct matrix matrix = {.member = member};
	void *address = NULL;
	unsigned ago = 4;

	if (!open_matrix(&matrix, member->user) || !look_at_all(&matrix))
		goto failed;
	OK(&matrix, lshard_series_address(matrix.series, 0, 0, &address));
	for (size_t i = 0; i < sizeof begins / sizeof begins[0]; i++)
		for (int32_t next = 1; next <= 2; next++) {
			const struct stub_copy copy = stub_cuda_copy(--ago);
			const uint64_t source = (uint64_t)((member->rank + next) % member->size);
			const uint64_t begin = (copy.to - (cuda_address)(uintptr_t)address) / mib;

			EXPECT(member, begin == 20 * source + begins[i] && copy.bytes == (i ? 4 : 16) * mib,
			       "%u copies ago: %llu bytes from MiB %llu of the layer on", ago,
			       (unsigned long long)copy.bytes, (unsigned long long)begin);
		}
	close_matrix(&matrix);
	return 0;
failed:
	close_matrix(&matrix);
	return 1;
}

static void sources_are_asked_in_turn(void **state)
{
	struct cut cut = {"cuda", LSHARD_STRIPED, LSHARD_STRIPE_BYTES, 0, 0, 10240};

	(void)state;
	assert_int_equal(team_of_processes(3, takes_of_its_sources_in_turn, &cut), 0);
}

/* At this pace the layers would take ten minutes. */
static int does_not_wait_for_its_pace(const struct member *member)
{
	struct matrix matrix = {.member = member};
	const double began_s = cuda_now_s();

	if (!open_matrix(&matrix, member->user))
		goto failed;
	OK(&matrix, lshard_reach(matrix.series, 0, matrix.stream));
	OK(&matrix, lshard_reach(matrix.series, 1, matrix.stream));
	OK(&matrix, lshard_series_update_begin(matrix.series));
	OK(&matrix, lshard_series_update_end(matrix.series, fill_matrix, &matrix));
	OK(&matrix, lshard_reach(matrix.series, 0, matrix.stream));
	OK(&matrix, lshard_reach(matrix.series, 1, matrix.stream));
	EXPECT(member, lshard_series_destroy(matrix.series) == LSHARD_OK, "destroy");
	matrix.series = NULL;
	EXPECT(member, cuda_now_s() - began_s < patience(300), "%.1f s", cuda_now_s() - began_s);
	close_matrix(&matrix);
	return 0;
failed:
	close_matrix(&matrix);
	return 1;
}

static void updates_and_destroy_do_not_wait_for_the_pace(void **state)
{
	struct cut cut = {"cuda:pace=1e-5", LSHARD_STRIPED, LSHARD_STRIPE_BYTES, 3, 0, 0};

	(void)state;
	assert_int_equal(team_of_processes(2, does_not_wait_for_its_pace, &cut), 0);
}

/* ---- the way of sharing ---- */

struct ways {
	struct setting setting;
	int64_t descriptors_ns;
	int64_t legacy_ns;
	int slow_rank;         /* whose fetches are; -1: all ranks' */
	const char *refused;   /* a call of rank 1 that fails when the other way is tried, or NULL */
	const char *said;      /* by rank 0 */
	const char *transport; /* in the group's description */
	int by_legacy;
};

static int takes_the_faster_way(const struct member *member)
{
	const struct ways *ways = member->user;
	struct rank rank;

	cuda_set_stub(member, &ways->setting);
	if (ways->slow_rank < 0 || ways->slow_rank == member->rank) {
		stub_cuda_set(STUB_FETCH_NS, ways->descriptors_ns);
		stub_cuda_set(STUB_LEGACY_FETCH_NS, ways->legacy_ns);
	}
	if (ways->refused && member->rank == 1)
		stub_cuda_fail(ways->refused, 1, CUDA_UNSUPPORTED);
	EXPECT(member, cuda_open_group(&rank, member, &ways->setting) == LSHARD_OK, "%s", rank.error);
	if (member->rank == 0)
		EXPECT(member, ways->said ? !!strstr(rank.said, ways->said) : !rank.said[0], "said: %s", rank.said);
	EXPECT(member, strstr(lshard_group_transport(rank.group), ways->transport), "%s",
	       lshard_group_transport(rank.group));
	stub_cuda_fail(ways->by_legacy ? "cuMemCreate" : "cuMemAlloc_v2", 1, CUDA_UNSUPPORTED);
	EXPECT(member, cuda_create_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	cuda_foretell(&rank, 0);
	OK(&rank, lshard_series_commit(rank.series, cuda_fill_layer, &rank));
	cuda_close_rank(&rank);
	EXPECT(member, stub_cuda_outstanding() == 0, "%d objects are left", stub_cuda_outstanding());
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void the_faster_way_of_sharing_is_taken_by_all(void **state)
{
	static const char warning[] = "at 3.4 GB/s: the copies seem to go through the host";
	static const char slow[] = "cuda (as asked; slow: a fetch goes at 3.4 GB/s)";
	struct ways ways[] = {
		{{.spec = "cuda"}, 50000, 5000, -1, NULL, NULL, "cuda (as asked)", 0},
		{{.spec = "cuda"}, 5000000, 50000, -1, NULL, "all use legacy handles", "cuda (as asked)", 1},
		{{.spec = "cuda"}, 5000000, 50000, 1, NULL, "3.4 GB/s by descriptors and 335.5", "cuda (as asked)", 1},
		{{.spec = "cuda"}, 5000000, 50000000, -1, NULL, warning, slow, 0},
		{{.spec = "cuda"}, 50000000, 5000000, -1, NULL, warning, slow, 1},
		{{.spec = "cuda"}, 5000000, 5000, -1, "cuIpcGetMemHandle", warning, slow, 0},
		{{.spec = "cuda"}, 5000000, 5000, -1, "cuIpcOpenMemHandle_v2", warning, slow, 0},
		{{.spec = "cuda:floor=3"}, 5000000, 5000, -1, NULL, NULL, "cuda:floor=3 (as asked)", 0},
		{{.spec = "cuda", .neighbours = 2}, 5000000, 50000000, -1, NULL, warning, slow, 0},
	};

	(void)state;
	for (size_t i = 0; i < sizeof ways / sizeof ways[0]; i++)
		assert_int_equal(team_of_processes(2, takes_the_faster_way, &ways[i]), 0);
}

int main(int count, char **arguments)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_transfer_takes_few_calls),
		cmocka_unit_test(copies_are_enqueued_where_graphs_are_refused),
		cmocka_unit_test(a_layer_comes_into_any_window),
		cmocka_unit_test(what_cannot_be_captured_is_said),
		cmocka_unit_test(a_capture_may_begin_with_a_copy),
		cmocka_unit_test(hidden_devices_are_named),
		cmocka_unit_test(slices_make_up_the_layer_at_the_pace_asked_for),
		cmocka_unit_test(sources_are_asked_in_turn),
		cmocka_unit_test(updates_and_destroy_do_not_wait_for_the_pace),
		cmocka_unit_test(the_faster_way_of_sharing_is_taken_by_all),
	};

	if (count != 2) {
		fprintf(stderr, "usage: test_cuda_fetch PATH-OF-THE-STUB\n");
		return 2;
	}
	setenv("LAYERSHARD_CUDA_SO_PATH", arguments[1], 1);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
