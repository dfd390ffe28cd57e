/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_link_gpu.c - see bench_link_gpu.h.
 */
#include "bench_link_gpu.h"
#include "bench.h"

#include <stdlib.h>
#include <string.h>

#define LONGEST_S UINT64_C(60)

static bool is_good(struct link_gpu *gpu, cuda_result result, const char *what)
{
	if (result != CUDA_OK)
		cuda_failed(&gpu->driver, &gpu->error, result, "GPU %d: %s", gpu->ordinal, what);
	return result == CUDA_OK;
}

/* ---- The device ---------------------------------------------------------------------------------------------- */

static bool is_there(struct link_gpu *gpu, int devices)
{
	const char *visible = getenv("CUDA_VISIBLE_DEVICES");

	if (gpu->ordinal < devices)
		return true;
	lshard_fail(&gpu->error, LSHARD_ERR_NOT_SUPPORTED,
		    "there is no GPU %d: the driver shows %d, counted from 0%s%s%s", gpu->ordinal, devices,
		    visible ? " (CUDA_VISIBLE_DEVICES=" : "", visible ? visible : "", visible ? ")" : "");
	return false;
}

static bool find_device(struct link_gpu *gpu)
{
	struct cuda_driver *driver = &gpu->driver;
	int devices = 0;

	return cuda_driver_start(driver, &devices, &gpu->error) == LSHARD_OK && is_there(gpu, devices) &&
	       is_good(gpu, driver->device_get(&gpu->device, gpu->ordinal), "cuDeviceGet") &&
	       is_good(gpu, driver->device_name(gpu->name, sizeof gpu->name, gpu->device), "cuDeviceGetName") &&
	       is_good(gpu, driver->device_bus(gpu->bus, sizeof gpu->bus, gpu->device), "cuDeviceGetPCIBusId");
}

static bool enter(struct link_gpu *gpu)
{
	cuda_context context = NULL;

	if (!is_good(gpu, gpu->driver.context_retain(&context, gpu->device), "cuDevicePrimaryCtxRetain"))
		return false;
	if (!is_good(gpu, gpu->driver.context_push(context), "cuCtxPushCurrent")) {
		gpu->driver.context_release(gpu->device);
		return false;
	}
	gpu->context = context;
	return true;
}

bool link_gpu_open(struct link_gpu *gpu, int ordinal)
{
	memset(gpu, 0, sizeof *gpu);
	gpu->ordinal = ordinal;
	if (cuda_driver_open(&gpu->driver, getenv(CUDA_LIBRARY_VARIABLE), &gpu->error) != LSHARD_OK)
		return false;
	if (find_device(gpu) && enter(gpu))
		return true;
	cuda_driver_close(&gpu->driver);
	return false;
}

void link_gpu_close(struct link_gpu *gpu)
{
	if (!gpu->context)
		return;
	gpu->driver.context_pop(&gpu->context);
	gpu->driver.context_release(gpu->device);
	cuda_driver_close(&gpu->driver);
	gpu->context = NULL;
}

/* ---- Memory -------------------------------------------------------------------------------------------------- */

bool link_gpu_allocate(struct link_gpu *gpu, uint64_t bytes, cuda_address *address)
{
	char what[64];

	snprintf(what, sizeof what, "cuMemAlloc of %llu bytes", (unsigned long long)bytes);
	return is_good(gpu, gpu->driver.allocate(address, (size_t)bytes), what);
}

void link_gpu_free(struct link_gpu *gpu, cuda_address address)
{
	if (address)
		gpu->driver.free(address);
}

bool link_gpu_copy(struct link_gpu *gpu, cuda_address to, cuda_address from, uint64_t bytes, cuda_stream stream)
{
	return is_good(gpu, gpu->driver.copy(to, from, (size_t)bytes, stream), "cuMemcpyAsync");
}

bool link_gpu_copy_now(struct link_gpu *gpu, cuda_address to, cuda_address from, uint64_t bytes, cuda_stream stream)
{
	return link_gpu_copy(gpu, to, from, bytes, stream) && link_gpu_stream_finish(gpu, stream);
}

/* ---- Streams and events -------------------------------------------------------------------------------------- */

bool link_gpu_stream_open(struct link_gpu *gpu, bool urgent, cuda_stream *stream)
{
	int least, greatest;

	return is_good(gpu, gpu->driver.priorities(&least, &greatest), "cuCtxGetStreamPriorityRange") &&
	       is_good(gpu, gpu->driver.stream_create(stream, CUDA_STREAM_NON_BLOCKING, urgent ? greatest : least),
		       "cuStreamCreateWithPriority");
}

void link_gpu_stream_close(struct link_gpu *gpu, cuda_stream stream)
{
	if (stream)
		gpu->driver.stream_destroy(stream);
}

bool link_gpu_stream_finish(struct link_gpu *gpu, cuda_stream stream)
{
	cuda_event event;
	bool good;

	if (!link_gpu_event_open(gpu, &event))
		return false;
	good = link_gpu_event_record(gpu, event, stream) && link_gpu_event_finish(gpu, event);
	link_gpu_event_close(gpu, event);
	return good;
}

bool link_gpu_event_open(struct link_gpu *gpu, cuda_event *event)
{
	return is_good(gpu, gpu->driver.event_create(event, CUDA_EVENT_PLAIN), "cuEventCreate");
}

void link_gpu_event_close(struct link_gpu *gpu, cuda_event event)
{
	if (event)
		gpu->driver.event_destroy(event);
}

bool link_gpu_event_record(struct link_gpu *gpu, cuda_event event, cuda_stream stream)
{
	return is_good(gpu, gpu->driver.event_record(event, stream), "cuEventRecord");
}

/* Polled, for a call that blocks in the driver has no deadline. */
bool link_gpu_event_finish(struct link_gpu *gpu, cuda_event event)
{
	const uint64_t deadline_ns = bench_now_ns() + LONGEST_S * 1000000000u;
	cuda_result result;

	while ((result = gpu->driver.event_query(event)) == CUDA_NOT_READY)
		if (bench_now_ns() > deadline_ns) {
			lshard_fail(&gpu->error, LSHARD_ERR_TIMEOUT, "GPU %d: work on a stream has not ended for %d s",
				    gpu->ordinal, (int)LONGEST_S);
			return false;
		}
	return is_good(gpu, result, "cuEventQuery");
}

bool link_gpu_event_elapsed(struct link_gpu *gpu, cuda_event from, cuda_event to, double *nanoseconds)
{
	float milliseconds;

	if (!is_good(gpu, gpu->driver.event_elapsed(&milliseconds, from, to), "cuEventElapsedTime"))
		return false;
	*nanoseconds = (double)milliseconds * 1e6;
	return true;
}

/* ---- Memory that others map ---------------------------------------------------------------------------------- */

static struct cuda_memory_properties properties_of(const struct link_gpu *gpu)
{
	return (struct cuda_memory_properties){
		.type = CUDA_PINNED, .handle_types = CUDA_HANDLE_FD, .location = {CUDA_ON_DEVICE, gpu->device}};
}

static bool begin_shard(struct link_gpu *gpu, uint64_t bytes, struct link_gpu_shard *shard)
{
	const struct cuda_memory_properties properties = properties_of(gpu);
	size_t granule = 0;

	memset(shard, 0, sizeof *shard);
	if (!is_good(gpu, gpu->driver.granularity(&granule, &properties, CUDA_GRANULARITY_MINIMUM),
		     "cuMemGetAllocationGranularity"))
		return false;
	shard->bytes = (bytes + granule - 1) / granule * granule;
	return true;
}

/* A handle becomes an address that this device reads and writes. */
static bool map(struct link_gpu *gpu, struct link_gpu_shard *shard)
{
	const struct cuda_driver *driver = &gpu->driver;
	const struct cuda_access access = {{CUDA_ON_DEVICE, gpu->device}, CUDA_CAN_WRITE};
	const size_t bytes = (size_t)shard->bytes;

	if (!is_good(gpu, driver->reserve(&shard->address, bytes, 0, 0, 0), "cuMemAddressReserve"))
		return false;
	shard->mapped = is_good(gpu, driver->map(shard->address, bytes, 0, shard->handle, 0), "cuMemMap");
	return shard->mapped && is_good(gpu, driver->set_access(shard->address, bytes, &access, 1), "cuMemSetAccess");
}

bool link_gpu_shard_make(struct link_gpu *gpu, uint64_t bytes, struct link_gpu_shard *shard, int *descriptor)
{
	const struct cuda_memory_properties properties = properties_of(gpu);
	const struct cuda_driver *driver = &gpu->driver;

	if (begin_shard(gpu, bytes, shard) &&
	    is_good(gpu, driver->memory_create(&shard->handle, (size_t)shard->bytes, &properties, 0), "cuMemCreate") &&
	    map(gpu, shard) &&
	    is_good(gpu, driver->memory_export(descriptor, shard->handle, CUDA_HANDLE_FD, 0),
		    "cuMemExportToShareableHandle"))
		return true;
	link_gpu_shard_close(gpu, shard);
	return false;
}

bool link_gpu_shard_open(struct link_gpu *gpu, uint64_t bytes, int descriptor, struct link_gpu_shard *shard)
{
	void *const from = (void *)(intptr_t)descriptor;

	if (begin_shard(gpu, bytes, shard) &&
	    is_good(gpu, gpu->driver.memory_import(&shard->handle, from, CUDA_HANDLE_FD),
		    "cuMemImportFromShareableHandle") &&
	    map(gpu, shard))
		return true;
	link_gpu_shard_close(gpu, shard);
	return false;
}

void link_gpu_shard_close(struct link_gpu *gpu, struct link_gpu_shard *shard)
{
	if (shard->mapped)
		gpu->driver.unmap(shard->address, (size_t)shard->bytes);
	if (shard->address)
		gpu->driver.unreserve(shard->address, (size_t)shard->bytes);
	if (shard->handle)
		gpu->driver.memory_release(shard->handle);
	memset(shard, 0, sizeof *shard);
}
