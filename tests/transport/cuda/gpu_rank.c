/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_rank.c - see gpu_rank.h.
 */
#include "gpu_rank.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

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

/* ---- the device ---- */

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

int gpu_open(struct rank *rank)
{
	struct device *device = &rank->device;
	lshard_error error = {{0}};
	cuda_module module;

	EXPECT(rank->member, cuda_driver_open(&device->driver, getenv(CUDA_LIBRARY_VARIABLE), &error) == LSHARD_OK,
	       "%s", error.text);
	EXPECT(rank->member, cuda_driver_start(&device->driver, &device->devices, &error) == LSHARD_OK, "%s",
	       error.text);
	EXPECT(rank->member, find_calls(device), "the driver lacks a function");
	steer_stub(rank);
	CALL(rank, device->driver.device_get(&device->device, rank->member->rank % device->devices));
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

uint64_t gpu_free_memory(struct rank *rank)
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

int gpu_fill_layer(void *user, uint32_t layer, void *const *tensors)
{
	for (uint32_t tensor = 0; tensor < TENSORS; tensor++)
		if (!upload(user, (uintptr_t)tensors[tensor], layer, tensor))
			return 1;
	return 0;
}

int gpu_fill_references(struct rank *rank)
{
	for (uint32_t layer = 0; layer < LAYERS; layer++)
		for (uint32_t tensor = 0; tensor < TENSORS; tensor++)
			EXPECT(rank->member, upload(rank, rank->reference[layer][tensor], FIRST + layer, tensor),
			       "upload");
	return 1;
failed:
	return 0;
}

int gpu_make_references(struct rank *rank)
{
	rank->host = malloc(rank->bytes[0]);
	CALL(rank, rank->device.driver.allocate(&rank->counter, 8));
	for (int i = 0; i < 2; i++)
		CALL(rank, rank->device.driver.allocate(&rank->scratch[i], rank->bytes[0]));
	for (uint32_t layer = 0; layer < LAYERS; layer++)
		for (uint32_t tensor = 0; tensor < TENSORS; tensor++)
			CALL(rank, rank->device.driver.allocate(&rank->reference[layer][tensor], rank->bytes[tensor]));
	return 1;
failed:
	return 0;
}

int gpu_compare_bytes(struct rank *rank, cuda_address found, cuda_address expected, uint64_t bytes, cuda_stream stream)
{
	uint64_t arguments[5] = {found, expected, bytes / 4, rank->counter, rank->plan->turns};
	void *parameters[5];

	for (int i = 0; i < 5; i++)
		parameters[i] = &arguments[i];
	CALL(rank, rank->device.launch(rank->device.kernel, 64, 1, 1, 256, 1, 1, 0, stream, parameters, NULL));
	return 1;
failed:
	return 0;
}

int gpu_compare(struct rank *rank, uint32_t layer, uint32_t tensor, uint32_t with_layer, cuda_stream stream)
{
	void *address = NULL;

	OK(rank, lshard_series_address(rank->series, layer, tensor, &address));
	return gpu_compare_bytes(rank, (uintptr_t)address, rank->reference[with_layer - FIRST][tensor],
				 rank->bytes[tensor], stream);
failed:
	return 0;
}

/* Words that differed since the last call; ends all work first. */
uint64_t gpu_differences(struct rank *rank)
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
	if (level <= LSHARD_LOG_WARN || strstr(text, "fetches from") || strstr(text, "stored here"))
		printf("  %s\n", text);
}

int gpu_open_group(struct rank *rank)
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

uint64_t gpu_rows_of(const struct rank *rank, uint32_t tensor)
{
	return rank->bytes[tensor] % 4096 ? 50 : 4096;
}

#define INSIDE 4096 /* of a larger allocation, as allocators that cache give it */

static void *lend(void *user, lshard_purpose purpose, size_t bytes, size_t alignment)
{
	struct rank *rank = user;
	cuda_address address;

	(void)purpose;
	if (alignment > INSIDE || rank->device.driver.allocate(&address, bytes + INSIDE) != CUDA_OK)
		return NULL;
	return (void *)(uintptr_t)(address + INSIDE);
}

static void take_back(void *user, lshard_purpose purpose, void *pointer)
{
	struct rank *rank = user;

	(void)purpose;
	rank->device.driver.free((uintptr_t)pointer - INSIDE);
}

static int open_series(struct rank *rank)
{
	const lshard_memory_source source = {sizeof source, lend, take_back, rank};
	lshard_series_options series = LSHARD_SERIES_OPTIONS_INIT;
	lshard_tensor tensors[TENSORS] = {{"weight", rank->bytes[0], 0, rank->plan->stripe, 0, 0},
					  {"scales", rank->bytes[1], 0, rank->plan->stripe, 0, 0}};

	for (uint32_t tensor = 0; tensor < TENSORS && rank->plan->stripe != LSHARD_STRIPE_BYTES; tensor++) {
		tensors[tensor].rows = gpu_rows_of(rank, tensor);
		tensors[tensor].column_bytes = rank->plan->stripe == LSHARD_STRIPE_COLUMNS ? 4 : 0;
	}
	series.name = rank->n_series ? "others" : "layers";
	series.first_layer = FIRST;
	series.layer_count = LAYERS;
	series.tensors = tensors;
	series.tensor_count = TENSORS;
	series.prefetch = rank->plan->prefetch + rank->n_series;
	series.placement = rank->plan->placement;
	series.resident_bytes = rank->plan->resident_layers * (rank->bytes[0] + 2 * rank->bytes[1]);
	if (rank->plan->lent)
		series.memory_source = &source;
	EXPECT(rank->member, lshard_series_create(rank->group, &series, &rank->all[rank->n_series]) == LSHARD_OK, "%s",
	       lshard_group_error(rank->group));
	rank->series = rank->all[rank->n_series++];
	OK(rank, lshard_series_commit(rank->series, gpu_fill_layer, rank));
	return 1;
failed:
	return 0;
}

int gpu_open_all(struct rank *rank)
{
	if (!rank->group && !gpu_open_group(rank))
		return 0;
	while (rank->n_series < rank->plan->series)
		if (!open_series(rank))
			return 0;
	return 1;
}

int gpu_close_all(struct rank *rank)
{
	int right = 1;

	EACH_SERIES(rank)
	right &= lshard_series_destroy(rank->series) == LSHARD_OK;
	rank->series = NULL;
	right &= !rank->plan->lent || team_barrier(rank->member); /* nobody reads what is lent: it is given back */
	right &= lshard_group_destroy(rank->group) == LSHARD_OK;
	rank->group = NULL;
	return right;
}

int gpu_visit(struct rank *rank, uint32_t layer, cuda_stream stream)
{
	EACH_SERIES(rank)
	{
		OK(rank, lshard_reach(rank->series, layer, stream));
		OK(rank, lshard_wait(rank->series, layer, stream));
		for (uint32_t tensor = 0; tensor < TENSORS; tensor++)
			if (!gpu_compare(rank, layer, tensor, layer, stream))
				goto failed;
	}
	return 1;
failed:
	return 0;
}

int gpu_one_pass(struct rank *rank, uint32_t layers, cuda_stream stream)
{
	for (uint32_t layer = FIRST; layer < FIRST + layers; layer++)
		if (!gpu_visit(rank, layer, stream))
			return 0;
	return 1;
}

/* ---- graphs ---- */

int gpu_capture_pass(struct rank *rank, cuda_graph_exec *exec)
{
	const cuda_stream stream = rank->device.streams[0];
	cuda_graph graph = NULL;

	EACH_SERIES(rank)
	OK(rank, lshard_series_prepare(rank->series, stream));
	CALL(rank, rank->device.capture_begin(stream, 0));
	if (!gpu_one_pass(rank, LAYERS, stream))
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

int gpu_replay(struct rank *rank, cuda_graph_exec exec)
{
	const cuda_stream stream = rank->device.streams[0];

	EACH_SERIES(rank)
	OK(rank, lshard_series_prepare(rank->series, stream));
	CALL(rank, rank->device.graph_launch(exec, stream));
	return 1;
failed:
	return 0;
}
