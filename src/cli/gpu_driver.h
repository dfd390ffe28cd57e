/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_driver.h - the entry points of NVIDIA's driver that the program uses. For gpu*.c alone.
 * The declarations are this project's own, so that it builds on machines without CUDA; a symbol's name carries the
 * version of what it means.
 */
#ifndef GPU_DRIVER_H
#define GPU_DRIVER_H

#include "gpu.h"

struct gpu_place {
	int32_t type;
	int32_t id;
};

/* Of physical memory to be made: CUmemAllocationProp. */
struct gpu_properties {
	int32_t type;
	int32_t handle_types;
	struct gpu_place place;
	void *unused;
	unsigned char flags[8];
};

struct gpu_access {
	struct gpu_place place;
	int32_t flags;
};

enum {
	GPU_OK = 0,
	GPU_NO_MEMORY = 2,
	GPU_NO_DEVICE = 100,
	GPU_INVALID_DEVICE = 101,
	GPU_NOT_READY = 600,
	GPU_NOT_PERMITTED = 800,
	GPU_UNSUPPORTED = 801,

	GPU_NON_BLOCKING = 1, /* of streams */
	GPU_CAPTURE_OF_THREAD = 1,
	GPU_PINNED = 1,
	GPU_ON_DEVICE = 1,
	GPU_DESCRIPTOR = 1,
	GPU_CAN_WRITE = 3
};

/* X(member, symbol, parameters); every one returns a CUresult */
#define GPU_FUNCTIONS(X)                                                                                               \
	X(init, cuInit, (unsigned flags))                                                                              \
	X(version, cuDriverGetVersion, (int *version))                                                                 \
	X(error_name, cuGetErrorName, (int result, const char **name))                                                 \
	X(error_text, cuGetErrorString, (int result, const char **text))                                               \
	X(device_count, cuDeviceGetCount, (int *count))                                                                \
	X(device_get, cuDeviceGet, (int *device, int ordinal))                                                         \
	X(device_name, cuDeviceGetName, (char *name, int bytes, int device))                                           \
	X(device_bus, cuDeviceGetPCIBusId, (char *text, int bytes, int device))                                        \
	X(context_retain, cuDevicePrimaryCtxRetain, (void **context, int device))                                      \
	X(context_release, cuDevicePrimaryCtxRelease_v2, (int device))                                                 \
	X(context_set, cuCtxSetCurrent, (void *context))                                                               \
	X(priorities, cuCtxGetStreamPriorityRange, (int *least, int *greatest))                                        \
	X(memory_info, cuMemGetInfo_v2, (size_t * free_bytes, size_t * total))                                         \
	X(allocate, cuMemAlloc_v2, (gpu_address * address, size_t bytes))                                              \
	X(free, cuMemFree_v2, (gpu_address address))                                                                   \
	X(copy, cuMemcpyAsync, (gpu_address to, gpu_address from, size_t bytes, gpu_stream stream))                    \
	X(stream_create, cuStreamCreateWithPriority, (gpu_stream * stream, unsigned flags, int priority))              \
	X(stream_destroy, cuStreamDestroy_v2, (gpu_stream stream))                                                     \
	X(stream_wait, cuStreamWaitEvent, (gpu_stream stream, gpu_event event, unsigned flags))                        \
	X(event_create, cuEventCreate, (gpu_event * event, unsigned flags))                                            \
	X(event_destroy, cuEventDestroy_v2, (gpu_event event))                                                         \
	X(event_record, cuEventRecord, (gpu_event event, gpu_stream stream))                                           \
	X(event_query, cuEventQuery, (gpu_event event))                                                                \
	X(event_elapsed, cuEventElapsedTime, (float *milliseconds, gpu_event from, gpu_event to))                      \
	X(capture_begin, cuStreamBeginCapture_v2, (gpu_stream stream, int mode))                                       \
	X(capture_end, cuStreamEndCapture, (gpu_stream stream, void **captured))                                       \
	X(captured_destroy, cuGraphDestroy, (void *captured))                                                          \
	X(graph_create, cuGraphInstantiateWithFlags, (gpu_graph * graph, void *captured, uint64_t flags))              \
	X(graph_launch, cuGraphLaunch, (gpu_graph graph, gpu_stream stream))                                           \
	X(graph_destroy, cuGraphExecDestroy, (gpu_graph graph))                                                        \
	X(granularity, cuMemGetAllocationGranularity,                                                                  \
	  (size_t * bytes, const struct gpu_properties *properties, int option))                                       \
	X(memory_create, cuMemCreate,                                                                                  \
	  (uint64_t * handle, size_t bytes, const struct gpu_properties *properties, uint64_t flags))                  \
	X(memory_release, cuMemRelease, (uint64_t handle))                                                             \
	X(memory_export, cuMemExportToShareableHandle, (void *out, uint64_t handle, int type, uint64_t flags))         \
	X(memory_import, cuMemImportFromShareableHandle, (uint64_t * handle, void *in, int type))                      \
	X(reserve, cuMemAddressReserve,                                                                                \
	  (gpu_address * address, size_t bytes, size_t alignment, gpu_address wish, uint64_t flags))                   \
	X(unreserve, cuMemAddressFree, (gpu_address address, size_t bytes))                                            \
	X(map, cuMemMap, (gpu_address address, size_t bytes, size_t offset, uint64_t handle, uint64_t flags))          \
	X(unmap, cuMemUnmap, (gpu_address address, size_t bytes))                                                      \
	X(set_access, cuMemSetAccess,                                                                                  \
	  (gpu_address address, size_t bytes, const struct gpu_access *access, size_t count))

struct gpu_driver {
	void *library;
#define GPU_MEMBER(member, symbol, parameters) int(*member) parameters;
	GPU_FUNCTIONS(GPU_MEMBER)
#undef GPU_MEMBER
};

/** OK for GPU_OK; else writes "WHAT: CUDA_ERROR_NAME: the driver's words" to gpu->error and returns what it means. */
lshard_status gpu_checked(struct gpu *gpu, int result, const char *what);

#endif
