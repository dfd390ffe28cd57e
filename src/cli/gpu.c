/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu.c - see gpu.h.
 */
#include "gpu.h"
#include "gpu_driver.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LIBRARY    "libcuda.so.1"
#define VARIABLE   "LAYERSHARD_CUDA_SO_PATH"
#define LONGEST_NS 60000000000u

static const struct {
	const char *symbol;
	size_t member;
} entries[] = {
#define GPU_ENTRY(member, symbol, parameters) {#symbol, offsetof(struct gpu_driver, member)},
	GPU_FUNCTIONS(GPU_ENTRY)
#undef GPU_ENTRY
};

static lshard_status status_of(int result)
{
	switch (result) {
	case GPU_NO_MEMORY:
		return LSHARD_ERR_NO_MEMORY;
	case GPU_NO_DEVICE:
	case GPU_INVALID_DEVICE:
	case GPU_NOT_PERMITTED:
	case GPU_UNSUPPORTED:
		return LSHARD_ERR_NOT_SUPPORTED;
	default:
		return LSHARD_ERR_TRANSPORT;
	}
}

lshard_status gpu_checked(struct gpu *gpu, int result, const char *what)
{
	const char *name = NULL;
	const char *text = NULL;

	if (result == GPU_OK)
		return LSHARD_OK;
	gpu->driver->error_name(result, &name);
	gpu->driver->error_text(result, &text);
	snprintf(gpu->error, sizeof gpu->error, "GPU %d: %s: %s (%d): %s", gpu->ordinal, what, name ? name : "error",
		 result, text ? text : "the driver has no words for it");
	return status_of(result);
}

/* ---- The device ---------------------------------------------------------------------------------------------- */

static lshard_status load_driver(struct gpu *gpu)
{
	const char *path = getenv(VARIABLE);

	path = path && *path ? path : LIBRARY;
	gpu->driver->library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
	if (!gpu->driver->library) {
		snprintf(gpu->error, sizeof gpu->error, "NVIDIA's driver cannot be loaded: %s", dlerror());
		return LSHARD_ERR_NOT_SUPPORTED;
	}
	for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++) {
		void *found = dlsym(gpu->driver->library, entries[i].symbol);

		if (!found) {
			snprintf(gpu->error, sizeof gpu->error, "%s has no %s: a later driver is needed", path,
				 entries[i].symbol);
			return LSHARD_ERR_NOT_SUPPORTED;
		}
		memcpy((char *)gpu->driver + entries[i].member, &found, sizeof found);
	}
	return LSHARD_OK;
}

static lshard_status find_device(struct gpu *gpu)
{
	const struct gpu_driver *driver = gpu->driver;
	int count = 0;
	lshard_status status = gpu_checked(gpu, driver->init(0), "cuInit");

	if (status == LSHARD_OK)
		status = gpu_checked(gpu, driver->version(&gpu->driver_version), "cuDriverGetVersion");
	if (status == LSHARD_OK)
		status = gpu_checked(gpu, driver->device_count(&count), "cuDeviceGetCount");
	if (status != LSHARD_OK)
		return status;
	if (gpu->ordinal < 0 || gpu->ordinal >= count) {
		const char *visible = getenv("CUDA_VISIBLE_DEVICES");

		snprintf(gpu->error, sizeof gpu->error, "there is no GPU %d: the driver shows %d, counted from 0%s%s%s",
			 gpu->ordinal, count, visible ? " (CUDA_VISIBLE_DEVICES=" : "", visible ? visible : "",
			 visible ? ")" : "");
		return LSHARD_ERR_NOT_SUPPORTED;
	}
	status = gpu_checked(gpu, driver->device_get(&gpu->device, gpu->ordinal), "cuDeviceGet");
	if (status == LSHARD_OK)
		status = gpu_checked(gpu, driver->device_name(gpu->name, sizeof gpu->name, gpu->device),
				     "cuDeviceGetName");
	if (status == LSHARD_OK)
		status = gpu_checked(gpu, driver->device_bus(gpu->bus, sizeof gpu->bus, gpu->device),
				     "cuDeviceGetPCIBusId");
	return status;
}

static lshard_status open_context(struct gpu *gpu)
{
	size_t free_bytes, total;
	lshard_status status;

	status = gpu_checked(gpu, gpu->driver->context_retain(&gpu->context, gpu->device), "cuDevicePrimaryCtxRetain");
	if (status == LSHARD_OK)
		status = gpu_enter(gpu);
	if (status == LSHARD_OK)
		status = gpu_checked(gpu, gpu->driver->memory_info(&free_bytes, &total), "cuMemGetInfo");
	if (status == LSHARD_OK)
		gpu->total_bytes = total;
	return status;
}

lshard_status gpu_open(struct gpu *gpu, int ordinal)
{
	lshard_status status;

	memset(gpu, 0, sizeof *gpu);
	gpu->ordinal = ordinal;
	gpu->driver = calloc(1, sizeof *gpu->driver);
	if (!gpu->driver) {
		snprintf(gpu->error, sizeof gpu->error, "GPU %d: no memory for the driver's entry points", ordinal);
		return LSHARD_ERR_NO_MEMORY;
	}
	status = load_driver(gpu);
	if (status == LSHARD_OK)
		status = find_device(gpu);
	if (status == LSHARD_OK)
		status = open_context(gpu);
	if (status != LSHARD_OK)
		gpu_close(gpu);
	return status;
}

/* The library stays in the process: the driver does not survive being unloaded. */
void gpu_close(struct gpu *gpu)
{
	if (!gpu->driver)
		return;
	if (gpu->context) {
		gpu->driver->context_set(NULL);
		gpu->driver->context_release(gpu->device);
	}
	if (gpu->driver->library)
		dlclose(gpu->driver->library);
	free(gpu->driver);
	gpu->driver = NULL;
	gpu->context = NULL;
}

lshard_status gpu_enter(struct gpu *gpu)
{
	return gpu_checked(gpu, gpu->driver->context_set(gpu->context), "cuCtxSetCurrent");
}

lshard_status gpu_free_bytes(struct gpu *gpu, uint64_t *bytes)
{
	size_t free_bytes, total;
	const lshard_status status = gpu_checked(gpu, gpu->driver->memory_info(&free_bytes, &total), "cuMemGetInfo");

	if (status == LSHARD_OK)
		*bytes = free_bytes;
	return status;
}

/* ---- Memory -------------------------------------------------------------------------------------------------- */

lshard_status gpu_allocate(struct gpu *gpu, uint64_t bytes, gpu_address *address)
{
	char what[64];

	snprintf(what, sizeof what, "cuMemAlloc of %llu bytes", (unsigned long long)bytes);
	return gpu_checked(gpu, gpu->driver->allocate(address, (size_t)bytes), what);
}

void gpu_free(struct gpu *gpu, gpu_address address)
{
	if (address)
		gpu->driver->free(address);
}

lshard_status gpu_copy(struct gpu *gpu, gpu_address to, gpu_address from, uint64_t bytes, gpu_stream stream)
{
	const int result = gpu->driver->copy(to, from, (size_t)bytes, stream);
	char what[64];

	if (result == GPU_OK)
		return LSHARD_OK;
	snprintf(what, sizeof what, "cuMemcpyAsync of %llu bytes", (unsigned long long)bytes);
	return gpu_checked(gpu, result, what);
}

lshard_status gpu_copy_now(struct gpu *gpu, gpu_address to, gpu_address from, uint64_t bytes, gpu_stream stream)
{
	const lshard_status status = gpu_copy(gpu, to, from, bytes, stream);

	return status == LSHARD_OK ? gpu_stream_finish(gpu, stream) : status;
}

/* ---- Streams and events -------------------------------------------------------------------------------------- */

lshard_status gpu_stream_open(struct gpu *gpu, bool urgent, gpu_stream *stream)
{
	int least, greatest;
	const lshard_status status =
		gpu_checked(gpu, gpu->driver->priorities(&least, &greatest), "cuCtxGetStreamPriorityRange");

	if (status != LSHARD_OK)
		return status;
	return gpu_checked(gpu, gpu->driver->stream_create(stream, GPU_NON_BLOCKING, urgent ? greatest : least),
			   "cuStreamCreateWithPriority");
}

void gpu_stream_close(struct gpu *gpu, gpu_stream stream)
{
	if (stream)
		gpu->driver->stream_destroy(stream);
}

lshard_status gpu_stream_finish(struct gpu *gpu, gpu_stream stream)
{
	gpu_event event;
	lshard_status status = gpu_event_open(gpu, &event);

	if (status != LSHARD_OK)
		return status;
	status = gpu_event_record(gpu, event, stream);
	if (status == LSHARD_OK)
		status = gpu_event_finish(gpu, event);
	gpu_event_close(gpu, event);
	return status;
}

lshard_status gpu_stream_wait(struct gpu *gpu, gpu_stream stream, gpu_event event)
{
	return gpu_checked(gpu, gpu->driver->stream_wait(stream, event, 0), "cuStreamWaitEvent");
}

lshard_status gpu_event_open(struct gpu *gpu, gpu_event *event)
{
	return gpu_checked(gpu, gpu->driver->event_create(event, 0), "cuEventCreate");
}

void gpu_event_close(struct gpu *gpu, gpu_event event)
{
	if (event)
		gpu->driver->event_destroy(event);
}

lshard_status gpu_event_record(struct gpu *gpu, gpu_event event, gpu_stream stream)
{
	return gpu_checked(gpu, gpu->driver->event_record(event, stream), "cuEventRecord");
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Polled, for a call that blocks in the driver has no deadline. */
lshard_status gpu_event_finish(struct gpu *gpu, gpu_event event)
{
	const uint64_t deadline = now_ns() + LONGEST_NS;
	int result;

	while ((result = gpu->driver->event_query(event)) == GPU_NOT_READY)
		if (now_ns() > deadline) {
			snprintf(gpu->error, sizeof gpu->error, "GPU %d: work on a stream has not ended for %llu s",
				 gpu->ordinal, (unsigned long long)(LONGEST_NS / 1000000000u));
			return LSHARD_ERR_TIMEOUT;
		}
	return gpu_checked(gpu, result, "cuEventQuery");
}

lshard_status gpu_event_elapsed(struct gpu *gpu, gpu_event from, gpu_event to, double *nanoseconds)
{
	float milliseconds;
	const lshard_status status =
		gpu_checked(gpu, gpu->driver->event_elapsed(&milliseconds, from, to), "cuEventElapsedTime");

	if (status == LSHARD_OK)
		*nanoseconds = (double)milliseconds * 1e6;
	return status;
}

/* ---- Graphs -------------------------------------------------------------------------------------------------- */

lshard_status gpu_capture_begin(struct gpu *gpu, gpu_stream stream)
{
	return gpu_checked(gpu, gpu->driver->capture_begin(stream, GPU_CAPTURE_OF_THREAD), "cuStreamBeginCapture");
}

lshard_status gpu_capture_end(struct gpu *gpu, gpu_stream stream, gpu_graph *graph)
{
	void *captured = NULL;
	lshard_status status = gpu_checked(gpu, gpu->driver->capture_end(stream, &captured), "cuStreamEndCapture");

	if (status != LSHARD_OK)
		return status;
	status = gpu_checked(gpu, gpu->driver->graph_create(graph, captured, 0), "cuGraphInstantiate");
	gpu->driver->captured_destroy(captured);
	return status;
}

lshard_status gpu_graph_launch(struct gpu *gpu, gpu_graph graph, gpu_stream stream)
{
	return gpu_checked(gpu, gpu->driver->graph_launch(graph, stream), "cuGraphLaunch");
}

void gpu_graph_close(struct gpu *gpu, gpu_graph graph)
{
	if (graph)
		gpu->driver->graph_destroy(graph);
}
