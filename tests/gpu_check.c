/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_check.c - `gpu_check [REPLAYS]`: the cuda transport on a real device, through the public interface, ranks as
 * processes. Runs on one device as on several; on the stub too.
 *
 * A kernel compares every layer, in stream order where a program would compute from it, with what its source wrote, and
 * counts the words that differ. Prints what it measured; exits 77 where there is no device.
 */
#include "stub_cuda/stub_cuda.h"
#include "threads.h"
#include "transports.h"

#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LAYERS  7u
#define FIRST   3u
#define TENSORS 2u

static const char kernel_text[] =
	".version 7.0\n.target sm_75\n.address_size 64\n"
	".visible .entry count_differences(.param .u64 p0, .param .u64 p1, .param .u64 p2, .param .u64 p3, .param .u64 "
	"p4)\n"
	"{\n"
	".reg .pred %p<4>;\n.reg .u32 %r<8>;\n.reg .u64 %d<20>;\n"
	"ld.param.u64 %d0, [p0];\nld.param.u64 %d1, [p1];\nld.param.u64 %d2, [p2];\nld.param.u64 %d3, [p3];\n"
	"ld.param.u64 %d4, [p4];\n"
	"mov.u32 %r0, %ctaid.x;\nmov.u32 %r1, %ntid.x;\nmov.u32 %r2, %tid.x;\nmov.u32 %r3, %nctaid.x;\n"
	"mul.wide.u32 %d5, %r0, %r1;\ncvt.u64.u32 %d6, %r2;\nadd.u64 %d5, %d5, %d6;\n"
	"mul.wide.u32 %d7, %r3, %r1;\n"
	"mov.u64 %d8, 0;\n"
	"TURN:\nsetp.eq.u64 %p0, %d4, 0;\n@%p0 bra END;\nsub.u64 %d4, %d4, 1;\nmov.u64 %d9, %d5;\n"
	"WORD:\nsetp.ge.u64 %p1, %d9, %d2;\n@%p1 bra TURN;\n"
	"shl.b64 %d10, %d9, 2;\nadd.u64 %d11, %d0, %d10;\nadd.u64 %d12, %d1, %d10;\n"
	"ld.volatile.global.u32 %r4, [%d11];\nld.volatile.global.u32 %r5, [%d12];\n"
	"setp.ne.u32 %p2, %r4, %r5;\n@%p2 add.u64 %d8, %d8, 1;\n"
	"add.u64 %d9, %d9, %d7;\nbra WORD;\n"
	"END:\nsetp.eq.u64 %p3, %d8, 0;\n@%p3 bra DONE;\natom.global.add.u64 %d13, [%d3], %d8;\n"
	"DONE:\nret;\n}\n";

/* The driver, with what tests need of it. */
struct device {
	struct cuda_driver driver;
#define CUDA_MEMBER(member, symbol, parameters) cuda_result(*member) parameters;
	CUDA_TEST_FUNCTIONS(CUDA_MEMBER)
#undef CUDA_MEMBER
	cuda_device device;
	cuda_context context;
	cuda_function kernel;
	cuda_stream streams[2];
};

struct plan {
	const char *spec;
	lshard_placement placement;
	uint32_t prefetch;
	uint64_t resident_layers;
	unsigned fewer; /* a part of the replays asked for */
	unsigned replays;
	uint64_t weight_bytes;
	uint64_t turns; /* of the comparing kernel: how long a layer "computes" */
	int kill;
	unsigned series;
	int late; /* on the stub: seed */
};

struct rank {
	const struct member *member;
	const struct plan *plan;
	struct device device;
	lshard_group *group;
	lshard_series *all[2];
	unsigned n_series;
	lshard_series *series; /* one of them */
	uint64_t bytes[TENSORS];
	cuda_address reference[LAYERS][TENSORS];
	cuda_address counter;
	uint32_t *host;
	uint64_t generation;
};

#define EACH_SERIES(rank) for (unsigned one = 0; one < (rank)->n_series && ((rank)->series = (rank)->all[one]); one++)

/* ---- the device ---- */

#define CALL(rank, call) EXPECT((rank)->member, (call) == CUDA_OK, "the driver refuses")
#define OK(rank, call)   EXPECT((rank)->member, (call) == LSHARD_OK, "%s", lshard_series_error((rank)->series))

static int find_calls(struct device *device)
{
	void *found;

#define CUDA_FIND(member, symbol, parameters)                                                                          \
	found = dlsym(device->driver.library, #symbol);                                                                \
	if (!found)                                                                                                    \
		return 0;                                                                                              \
	memcpy(&device->member, &found, sizeof found);
	CUDA_TEST_FUNCTIONS(CUDA_FIND)
#undef CUDA_FIND
	return 1;
}

/* Where the library is the stub of the tests: one device for all, and work that runs late, in any order. */
static void steer_stub(struct rank *rank)
{
	void (*set)(enum stub_setting, int64_t);
	void *found = dlsym(rank->device.driver.library, "stub_cuda_set");

	if (!found || !rank->plan->late)
		return;
	memcpy(&set, &found, sizeof set);
	set(STUB_ONE_DEVICE, 1);
	set(STUB_LATE, rank->plan->late + rank->member->rank);
}

static int open_device(struct rank *rank)
{
	struct device *device = &rank->device;
	lshard_error error = {{0}};
	cuda_module module;
	int devices = 0;

	EXPECT(rank->member, cuda_driver_open(&device->driver, &error) == LSHARD_OK, "%s", error.text);
	EXPECT(rank->member, cuda_driver_start(&device->driver, &devices, &error) == LSHARD_OK, "%s", error.text);
	EXPECT(rank->member, find_calls(device), "the driver lacks a function");
	steer_stub(rank);
	CALL(rank, device->driver.device_get(&device->device, rank->member->rank % devices));
	CALL(rank, device->driver.context_retain(&device->context, device->device));
	CALL(rank, device->context_set(device->context));
	CALL(rank, device->module_load(&module, kernel_text));
	CALL(rank, device->module_function(&device->kernel, module, CUDA_TEST_KERNEL));
	for (int i = 0; i < 2; i++)
		CALL(rank, device->driver.stream_create(&device->streams[i], CUDA_STREAM_NON_BLOCKING, 0));
	return 1;
failed:
	return 0;
}

static uint64_t free_memory(struct rank *rank)
{
	size_t available = 0;
	size_t total;

	rank->device.memory_info(&available, &total);
	return available;
}

/* ---- bytes that can be foretold ---- */

static void foretell(uint32_t *words, uint64_t count, uint64_t generation, uint32_t layer, uint32_t tensor)
{
	uint64_t state = generation << 40 ^ (uint64_t)layer << 20 ^ tensor;

	for (uint64_t i = 0; i < count; i++) {
		uint64_t mixed = state += 0x9e3779b97f4a7c15u;

		mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9u;
		mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebu;
		words[i] = (uint32_t)(mixed >> 32);
	}
}

static int upload(struct rank *rank, cuda_address to, uint32_t layer, uint32_t tensor)
{
	foretell(rank->host, rank->bytes[tensor] / 4, rank->generation, layer, tensor);
	return rank->device.driver.copy(to, (uintptr_t)rank->host, rank->bytes[tensor], rank->device.streams[0]) ==
		       CUDA_OK &&
	       rank->device.stream_synchronize(rank->device.streams[0]) == CUDA_OK;
}

static int fill_layer(void *user, uint32_t layer, void *const *tensors)
{
	for (uint32_t tensor = 0; tensor < TENSORS; tensor++)
		if (!upload(user, (uintptr_t)tensors[tensor], layer, tensor))
			return 1;
	return 0;
}

static int fill_references(struct rank *rank)
{
	for (uint32_t layer = 0; layer < LAYERS; layer++)
		for (uint32_t tensor = 0; tensor < TENSORS; tensor++)
			EXPECT(rank->member, upload(rank, rank->reference[layer][tensor], FIRST + layer, tensor),
			       "upload");
	return 1;
failed:
	return 0;
}

static int make_references(struct rank *rank)
{
	rank->host = malloc(rank->bytes[0]);
	CALL(rank, rank->device.driver.allocate(&rank->counter, 8));
	for (uint32_t layer = 0; layer < LAYERS; layer++)
		for (uint32_t tensor = 0; tensor < TENSORS; tensor++)
			CALL(rank, rank->device.driver.allocate(&rank->reference[layer][tensor], rank->bytes[tensor]));
	return 1;
failed:
	return 0;
}

static int compare(struct rank *rank, uint32_t layer, uint32_t tensor, uint32_t with_layer, cuda_stream stream)
{
	void *address = NULL;
	uint64_t arguments[5];
	void *parameters[5];

	OK(rank, lshard_series_address(rank->series, layer, tensor, &address));
	arguments[0] = (uintptr_t)address;
	arguments[1] = rank->reference[with_layer - FIRST][tensor];
	arguments[2] = rank->bytes[tensor] / 4;
	arguments[3] = rank->counter;
	arguments[4] = rank->plan->turns;
	for (int i = 0; i < 5; i++)
		parameters[i] = &arguments[i];
	CALL(rank, rank->device.launch(rank->device.kernel, 64, 1, 1, 256, 1, 1, 0, stream, parameters, NULL));
	return 1;
failed:
	return 0;
}

/* Words that differed since the last call; ends all work first. */
static uint64_t differences(struct rank *rank)
{
	uint64_t count = UINT64_MAX;
	const uint64_t zero = 0;

	rank->device.stream_synchronize(rank->device.streams[0]);
	rank->device.stream_synchronize(rank->device.streams[1]);
	rank->device.driver.copy((uintptr_t)&count, rank->counter, 8, rank->device.streams[0]);
	rank->device.stream_synchronize(rank->device.streams[0]);
	rank->device.driver.copy(rank->counter, (uintptr_t)&zero, 8, rank->device.streams[0]);
	rank->device.stream_synchronize(rank->device.streams[0]);
	return count;
}

/* ---- a rank ---- */

static void print_line(void *user, lshard_log_level level, const char *text)
{
	(void)user;
	if (level <= LSHARD_LOG_WARN || strstr(text, "pulls from") || strstr(text, "stored here"))
		printf("  %s\n", text);
}

static int open_group(struct rank *rank)
{
	lshard_group_options group = LSHARD_GROUP_OPTIONS_INIT;
	char error[512] = "";

	group.rank = rank->member->rank;
	group.size = rank->member->size;
	group.transport = rank->plan->spec;
	group.job = rank->member->job;
	group.memory = LSHARD_MEMORY_CUDA;
	group.device = rank->device.device;
	group.log = print_line;
	group.log_level = LSHARD_LOG_DEBUG;
	group.error = error;
	group.error_bytes = sizeof error;
	EXPECT(rank->member, lshard_group_create(&group, &rank->group) == LSHARD_OK, "%s", error);
	return 1;
failed:
	return 0;
}

static int open_series(struct rank *rank)
{
	lshard_series_options series = LSHARD_SERIES_OPTIONS_INIT;
	const lshard_tensor tensors[TENSORS] = {{"weight", rank->bytes[0], 0, LSHARD_STRIPE_BYTES, 0, 0},
						{"scales", rank->bytes[1], 0, LSHARD_STRIPE_BYTES, 0, 0}};

	series.name = rank->n_series ? "others" : "layers";
	series.first_layer = FIRST;
	series.layer_count = LAYERS;
	series.tensors = tensors;
	series.tensor_count = TENSORS;
	series.prefetch = rank->plan->prefetch + rank->n_series;
	series.placement = rank->plan->placement;
	series.resident_bytes = rank->plan->resident_layers * (rank->bytes[0] + 2 * rank->bytes[1]);
	EXPECT(rank->member, lshard_series_create(rank->group, &series, &rank->all[rank->n_series]) == LSHARD_OK, "%s",
	       lshard_group_error(rank->group));
	rank->series = rank->all[rank->n_series++];
	OK(rank, lshard_series_commit(rank->series, fill_layer, rank));
	return 1;
failed:
	return 0;
}

static int open_all(struct rank *rank)
{
	if (!open_group(rank))
		return 0;
	while (rank->n_series < rank->plan->series)
		if (!open_series(rank))
			return 0;
	return 1;
}

static int close_all(struct rank *rank)
{
	int right = 1;

	EACH_SERIES(rank)
	right &= lshard_series_destroy(rank->series) == LSHARD_OK;
	rank->series = NULL;
	return right && lshard_group_destroy(rank->group) == LSHARD_OK;
}

static int visit(struct rank *rank, uint32_t layer, cuda_stream stream)
{
	EACH_SERIES(rank)
	{
		OK(rank, lshard_reach(rank->series, layer, stream));
		OK(rank, lshard_wait(rank->series, layer, stream));
		for (uint32_t tensor = 0; tensor < TENSORS; tensor++)
			if (!compare(rank, layer, tensor, layer, stream))
				goto failed;
	}
	return 1;
failed:
	return 0;
}

static int one_pass(struct rank *rank, uint32_t layers, cuda_stream stream)
{
	for (uint32_t layer = FIRST; layer < FIRST + layers; layer++)
		if (!visit(rank, layer, stream))
			return 0;
	return 1;
}

/* ---- what is checked ---- */

static int walks(struct rank *rank)
{
	unsigned state = 7u + (unsigned)rank->member->rank;

	for (int pass = 0; pass < 10; pass++)
		if (!one_pass(rank, LAYERS, rank->device.streams[0]))
			goto failed;
	for (int step = 0; step < 100; step++) {
		state = state * 1103515245u + 12345u;
		if (!visit(rank, FIRST + (state >> 16) % LAYERS, rank->device.streams[state >> 8 & 1]))
			goto failed;
	}
	EXPECT(rank->member, differences(rank) == 0, "walks read wrong words");
	if (!visit(rank, FIRST, rank->device.streams[0]) ||
	    !compare(rank, FIRST, 0, FIRST + 1, rank->device.streams[0]))
		goto failed;
	EXPECT(rank->member, differences(rank) > 0, "the comparison finds nothing where all differs");
	return 1;
failed:
	return 0;
}

static int capture_pass(struct rank *rank, cuda_graph_exec *exec)
{
	const cuda_stream stream = rank->device.streams[0];
	cuda_graph graph = NULL;

	EACH_SERIES(rank)
	OK(rank, lshard_series_prepare(rank->series, stream));
	CALL(rank, rank->device.capture_begin(stream, 0));
	if (!one_pass(rank, LAYERS, stream))
		goto failed;
	EACH_SERIES(rank)
	OK(rank, lshard_series_join(rank->series, stream));
	CALL(rank, rank->device.capture_end(stream, &graph));
	CALL(rank, rank->device.graph_instantiate(exec, graph, 0));
	CALL(rank, rank->device.graph_destroy(graph));
	return 1;
failed:
	return 0;
}

static int replay(struct rank *rank, cuda_graph_exec exec)
{
	const cuda_stream stream = rank->device.streams[0];

	EACH_SERIES(rank)
	OK(rank, lshard_series_prepare(rank->series, stream));
	CALL(rank, rank->device.graph_launch(exec, stream));
	return 1;
failed:
	return 0;
}

/* A call that cannot be captured says so, and what is then thrown away harms nobody. */
static int spoils_a_capture(struct rank *rank)
{
	const cuda_stream stream = rank->device.streams[0];
	cuda_graph graph = NULL;

	CALL(rank, rank->device.capture_begin(stream, 0));
	if (!one_pass(rank, 3, stream))
		goto failed;
	EXPECT(rank->member, lshard_series_prepare(rank->series, stream) == LSHARD_ERR_STATE, "captured");
	rank->device.capture_end(stream, &graph);
	if (graph)
		rank->device.graph_destroy(graph);
	return 1;
failed:
	return 0;
}

static int replays(struct rank *rank, cuda_graph_exec *exec)
{
	if (!capture_pass(rank, exec))
		goto failed;
	for (unsigned i = 0; i < rank->plan->replays; i++)
		if (!replay(rank, *exec))
			goto failed;
	EXPECT(rank->member, differences(rank) == 0, "replays read wrong words");
	for (unsigned i = 0; i < 20; i++) {
		const cuda_stream other = rank->device.streams[i & 1];

		if (!replay(rank, *exec))
			goto failed;
		EACH_SERIES(rank) /* the program goes on elsewhere than where the graph ran */
		OK(rank, i & 1 ? lshard_series_prepare(rank->series, other) : LSHARD_OK);
		if (!one_pass(rank, LAYERS, other) || !one_pass(rank, i % LAYERS, rank->device.streams[0]))
			goto failed;
		if (i % 5 == 0 && !spoils_a_capture(rank))
			goto failed;
	}
	EXPECT(rank->member, differences(rank) == 0, "graph and eager passes mixed read wrong words");
	return 1;
failed:
	return 0;
}

static int updates(struct rank *rank, cuda_graph_exec exec)
{
	for (int round = 0; round < 3; round++) {
		if (!one_pass(rank, 1 + (uint32_t)(round + rank->member->rank) % LAYERS, rank->device.streams[0]))
			goto failed;
		EACH_SERIES(rank)
		OK(rank, lshard_series_update_begin(rank->series));
		EXPECT(rank->member, differences(rank) == 0, "before an update");
		rank->generation++;
		if (!fill_references(rank))
			goto failed;
		EACH_SERIES(rank)
		OK(rank, lshard_series_update_end(rank->series, fill_layer, rank));
		if (!one_pass(rank, LAYERS, rank->device.streams[1]) || !replay(rank, exec) || !replay(rank, exec))
			goto failed;
		EXPECT(rank->member, differences(rank) == 0, "after update %d", round + 1);
	}
	return 1;
failed:
	return 0;
}

static double now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

static int by_size(const void *a, const void *b)
{
	return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

/* Host time of reach + wait, per layer, while the device keeps up. */
static int tells_host_time(struct rank *rank)
{
	double times[16 * LAYERS];
	size_t count = 0;

	for (int pass = 0; pass < 16; pass++) {
		for (uint32_t layer = FIRST; layer < FIRST + LAYERS; layer++) {
			const double begin = now_us();

			OK(rank, lshard_reach(rank->series, layer, rank->device.streams[0]));
			OK(rank, lshard_wait(rank->series, layer, rank->device.streams[0]));
			times[count++] = now_us() - begin;
		}
		rank->device.stream_synchronize(rank->device.streams[0]);
	}
	qsort(times, count, sizeof times[0], by_size);
	printf("  rank %d: reach + wait on the host: median %.1f us, 90 %% %.1f us\n", (int)rank->member->rank,
	       times[count / 2], times[count * 9 / 10]);
	return 1;
failed:
	return 0;
}

/* What the driver's calls of a pass cost this processor. */
static int tells_call_times(struct rank *rank)
{
	const struct cuda_driver *driver = &rank->device.driver;
	const cuda_stream stream = rank->device.streams[0];
	enum { CURRENT, CAPTURING, RECORD, WAIT, COPY, KINDS };
	double spent[KINDS] = {0};
	cuda_context current;
	cuda_event event;
	int state;

	CALL(rank, driver->event_create(&event, CUDA_EVENT_WITHOUT_TIME));
	for (int turn = 0; turn < 100; turn++) {
		double times[KINDS + 1];

		times[0] = now_us();
		CALL(rank, driver->context_current(&current));
		times[1] = now_us();
		CALL(rank, driver->stream_is_capturing(stream, &state));
		times[2] = now_us();
		CALL(rank, driver->event_record(event, stream));
		times[3] = now_us();
		CALL(rank, driver->stream_wait(rank->device.streams[1], event, 0));
		times[4] = now_us();
		CALL(rank, driver->copy(rank->reference[0][1], rank->reference[1][1], 4096, stream));
		times[5] = now_us();
		for (int kind = 0; kind < KINDS && turn >= 10; kind++)
			spent[kind] += (times[kind + 1] - times[kind]) / 90;
		if (turn % 10 == 0)
			rank->device.stream_synchronize(stream);
	}
	rank->device.stream_synchronize(stream);
	driver->event_destroy(event);
	printf("  rank %d: us per call: cuCtxGetCurrent %.2f, cuStreamIsCapturing %.2f, cuEventRecord %.2f, "
	       "cuStreamWaitEvent %.2f, "
	       "cuMemcpyAsync %.2f\n",
	       (int)rank->member->rank, spent[CURRENT], spent[CAPTURING], spent[RECORD], spent[WAIT], spent[COPY]);
	return 1;
failed:
	return 0;
}

/* Of the device, all ranks together: what a series adds, and what its end leaves. */
static void tell_memory(const struct rank *rank, const char *what, uint64_t free_before, uint64_t free_now)
{
	const double mib = 1024.0 * 1024.0;
	lshard_stats stats = LSHARD_STATS_INIT;

	if (rank->series)
		lshard_series_stats(rank->series, &stats);
	if (rank->member->rank == 0)
		printf("  %s: %+.1f MiB of the device's free memory; rank 0: share %.1f, windows %.1f, residents %.1f "
		       "MiB, layer %.3f MiB\n",
		       what, ((double)free_now - (double)free_before) / mib, (double)stats.share_bytes / mib,
		       (double)stats.window_bytes / mib, (double)stats.resident_bytes / mib,
		       (double)stats.layer_bytes / mib);
}

static int survives(struct rank *rank, cuda_graph_exec exec)
{
	if (!one_pass(rank, 4, rank->device.streams[0]) || !team_barrier(rank->member))
		goto failed;
	if (rank->member->rank == 1) {
		team_dies(rank->member);
		raise(SIGKILL);
	}
	for (int pass = 0; pass < 100; pass++)
		if (!one_pass(rank, LAYERS, rank->device.streams[0]) || !replay(rank, exec))
			goto failed;
	EXPECT(rank->member, differences(rank) == 0, "passes after a rank was killed read wrong words");
	printf("  rank %d: 100 passes and 100 replays after rank 1 was killed: bit-exact\n", (int)rank->member->rank);
	return 1;
failed:
	return 0;
}

/*
 * Create, walk, replay, update, destroy. The driver keeps something at the first use of graphs: a second turn must add
 * nothing.
 */
static int live_once(struct rank *rank, int turn)
{
	const uint64_t free_before = free_memory(rank);
	cuda_graph_exec exec = NULL;
	uint64_t free_open;
	double begin;

	if (!team_barrier(rank->member) || !open_all(rank) || !team_barrier(rank->member))
		goto failed;
	free_open = free_memory(rank);
	tell_memory(rank, "series open", free_before, free_open);
	begin = now_us();
	if (!team_barrier(rank->member) || !walks(rank) || !replays(rank, &exec) || !updates(rank, exec) ||
	    !tells_host_time(rank))
		goto failed;
	EXPECT(rank->member, differences(rank) == 0, "the end");
	printf("  rank %d: walks, %u replays, mixtures, aborted captures, 3 updates: bit-exact, %.1f s\n",
	       (int)rank->member->rank, rank->plan->replays, (now_us() - begin) / 1e6);
	if (!team_barrier(rank->member) || (rank->plan->kill && !survives(rank, exec)))
		goto failed;
	CALL(rank, rank->device.graph_exec_destroy(exec));
	free_open = free_memory(rank);
	EXPECT(rank->member, close_all(rank), "destroy");
	if (rank->plan->kill) { /* the others may be in the middle of theirs */
		tell_memory(rank, "destroy by a survivor", free_open, free_memory(rank));
		return 1;
	}
	EXPECT(rank->member, team_barrier(rank->member), "the others");
	tell_memory(rank, turn ? "destroyed, second turn" : "destroyed", free_before, free_memory(rank));
	EXPECT(rank->member, turn == 0 || free_memory(rank) >= free_before,
	       "destroy leaves memory of the device behind");
	return team_barrier(rank->member);
failed:
	return 0;
}

static int run_rank(const struct member *member)
{
	struct rank rank = {.member = member, .plan = member->user};

	setvbuf(stdout, NULL, _IOLBF, 0);
	rank.bytes[0] = rank.plan->weight_bytes;
	rank.bytes[1] = 5000;
	if (!open_device(&rank) || !make_references(&rank) || !tells_call_times(&rank) || !fill_references(&rank))
		goto failed;
	differences(&rank);
	EXPECT(member, team_barrier(member), "the others");
	for (int turn = 0; turn < (rank.plan->kill ? 1 : 2); turn++) {
		rank.n_series = 0;
		if (!live_once(&rank, turn))
			goto failed;
	}
	free(rank.host);
	return 0;
failed:
	return 1;
}

int main(int count, char **arguments)
{
	const unsigned replays = count > 1 ? (unsigned)atoi(arguments[1]) : 1000;
	const uint64_t bytes = count > 2 ? strtoull(arguments[2], NULL, 10) : 24u << 20;
	const int32_t sizes[] = {2, 3};
	const struct plan plans[] = {
		{.spec = "cuda:copy", .prefetch = 1, .series = 1, .turns = 3},
		{.spec = "cuda:copy", .prefetch = 2, .series = 1, .turns = 1, .resident_layers = 1, .fewer = 10},
		{.spec = "cuda:copy", .prefetch = 0, .series = 2, .turns = 1, .fewer = 10},
		{.spec = "cuda:copy", .prefetch = 1, .series = 1, .turns = 2, .placement = LSHARD_STRIPED, .fewer = 10},
		{.spec = "cuda:copy+ipc", .prefetch = 1, .series = 1, .turns = 2, .fewer = 10},
		{.spec = "cuda", .prefetch = 1, .series = 1, .turns = 2, .fewer = 10},
		{.spec = "cuda", .prefetch = 1, .series = 1, .turns = 2, .placement = LSHARD_STRIPED, .fewer = 10},
		{.spec = "cuda:copy", .prefetch = 1, .series = 1, .turns = 2, .fewer = 100, .kill = 1},
		{.spec = "cuda:copy+ipc", .prefetch = 1, .series = 1, .turns = 2, .fewer = 100, .kill = 1},
		{.spec = "cuda", .prefetch = 1, .series = 1, .turns = 2, .fewer = 100, .kill = 1},
	};
	lshard_error error = {{0}};
	int failures = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!lshard__cuda.available(&error)) {
		printf("skipped: %s\n", error.text);
		return 77;
	}
	for (size_t i = 0; i < sizeof plans / sizeof plans[0]; i++)
		for (size_t j = 0; j < sizeof sizes / sizeof sizes[0]; j++) {
			struct plan plan = plans[i];
			int failed;

			plan.replays = replays / (plan.fewer ? plan.fewer : 1);
			plan.weight_bytes = bytes;
			plan.late = count > 3 ? atoi(arguments[3]) : 0;

			printf("%s, %s, %d ranks, k = %u, %u replays%s\n", plan.spec,
			       plan.placement == LSHARD_OWNER ? "OWNER" : "STRIPED", (int)sizes[j], plan.prefetch,
			       plan.replays, plan.kill ? ", rank 1 is killed" : "");
			failed = team_of_processes(sizes[j], run_rank, &plan);
			printf("%s\n", failed ? "FAILED" : "passed");
			failures += failed;
		}
	return failures != 0;
}
