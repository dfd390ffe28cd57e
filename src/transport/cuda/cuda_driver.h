/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_driver.h - the few entry points of NVIDIA's driver that the cuda transport uses, loaded at run time. `bench
 * link` uses this table too.
 * Knows the driver's binary interface (CUDA 11.4 and later); knows no rank and no layer.
 *
 * The declarations are this project's own, so that it builds on machines without CUDA. The symbols' names carry their
 * version, so a later driver still means the same by them.
 */
#ifndef LAYERSHARD_CUDA_DRIVER_H
#define LAYERSHARD_CUDA_DRIVER_H

#include <layershard/transport.h>

typedef int cuda_result;
typedef int cuda_device;
typedef uint64_t cuda_address;
typedef uint64_t cuda_handle; /* of physical memory */
typedef struct CUctx_st *cuda_context;
typedef struct CUstream_st *cuda_stream;
typedef struct CUevent_st *cuda_event;
typedef struct CUgraph_st *cuda_graph;
typedef struct CUgraphExec_st *cuda_graph_exec; /* a graph that can be launched */

enum {
	CUDA_OK = 0,
	CUDA_NO_MEMORY = 2,
	CUDA_NOT_INITIALISED = 3,
	CUDA_NO_DEVICE = 100,
	CUDA_INVALID_DEVICE = 101,
	CUDA_NOT_READY = 600,
	CUDA_PEER_ACCESS_UNSUPPORTED = 217,
	CUDA_NOT_PERMITTED = 800,
	CUDA_UNSUPPORTED = 801,
};

enum { CUDA_OLDEST_DRIVER = 11040, CUDA_OLDEST_WITH_FABRIC = 12030 };

#define CUDA_LIBRARY_VARIABLE "LAYERSHARD_CUDA_SO_PATH" /* of the environment: the driver's library */

enum {
	CUDA_HAS_VIRTUAL_MEMORY = 102, /* device attributes */
	CUDA_HAS_FILE_DESCRIPTORS = 103,
	CUDA_HAS_FABRIC_HANDLES = 128,
	CUDA_STREAM_NON_BLOCKING = 1,
	CUDA_EVENT_PLAIN = 0,
	CUDA_EVENT_WITHOUT_TIME = 2,
	CUDA_IPC_ENABLE_PEER = 1,
	CUDA_HANDLE_FD = 1,
	CUDA_HANDLE_FABRIC = 8,
	CUDA_PINNED = 1,
	CUDA_ON_DEVICE = 1,
	CUDA_GRANULARITY_MINIMUM = 0,
	CUDA_CAN_READ = 1,
	CUDA_CAN_WRITE = 3,
	CUDA_KIND_UNIFIED = 4,
	CUDA_KIND_DEVICE = 2,
	CUDA_MEMORY_KIND = 2, /* attributes of a pointer */
	CUDA_MEMORY_DEVICE = 9,
	CUDA_CAPTURE_NONE = 0,
	CUDA_CAPTURE_ACTIVE = 1,
	CUDA_CAPTURE_RELAXED = 2,
};

struct cuda_uuid {
	unsigned char bytes[16];
};

struct cuda_location {
	int32_t type;
	int32_t id;
};

struct cuda_memory_properties {
	int32_t type;
	int32_t handle_types;
	struct cuda_location location;
	void *unused;
	unsigned char flags[8];
};

struct cuda_access {
	struct cuda_location location;
	int32_t flags;
};

struct cuda_ipc {
	char bytes[64];
};

struct cuda_fabric_handle {
	unsigned char bytes[64];
};

struct cuda_copy_2d {
	size_t from_x, from_y;
	int32_t from_kind;
	const void *from_host;
	cuda_address from;
	void *from_array;
	size_t from_pitch;
	size_t to_x, to_y;
	int32_t to_kind;
	void *to_host;
	cuda_address to;
	void *to_array;
	size_t to_pitch;
	size_t width;
	size_t rows;
};

/* X(member, symbol, parameters) */
#define CUDA_FUNCTIONS(X)                                                                                              \
	X(init, cuInit, (unsigned flags))                                                                              \
	X(driver_version, cuDriverGetVersion, (int *version))                                                          \
	X(error_name, cuGetErrorName, (cuda_result result, const char **name))                                         \
	X(error_text, cuGetErrorString, (cuda_result result, const char **text))                                       \
	X(device_count, cuDeviceGetCount, (int *count))                                                                \
	X(device_get, cuDeviceGet, (cuda_device * device, int ordinal))                                                \
	X(device_name, cuDeviceGetName, (char *name, int bytes, cuda_device device))                                   \
	X(device_uuid, cuDeviceGetUuid_v2, (struct cuda_uuid * uuid, cuda_device device))                              \
	X(device_bus, cuDeviceGetPCIBusId, (char *text, int bytes, cuda_device device))                                \
	X(device_attribute, cuDeviceGetAttribute, (int *value, int attribute, cuda_device device))                     \
	X(context_retain, cuDevicePrimaryCtxRetain, (cuda_context * context, cuda_device device))                      \
	X(context_release, cuDevicePrimaryCtxRelease_v2, (cuda_device device))                                         \
	X(context_current, cuCtxGetCurrent, (cuda_context * context))                                                  \
	X(context_push, cuCtxPushCurrent_v2, (cuda_context context))                                                   \
	X(context_pop, cuCtxPopCurrent_v2, (cuda_context * context))                                                   \
	X(priorities, cuCtxGetStreamPriorityRange, (int *least, int *greatest))                                        \
	X(capture_mode, cuThreadExchangeStreamCaptureMode, (int *mode))                                                \
	X(stream_create, cuStreamCreateWithPriority, (cuda_stream * stream, unsigned flags, int priority))             \
	X(stream_destroy, cuStreamDestroy_v2, (cuda_stream stream))                                                    \
	X(stream_wait, cuStreamWaitEvent, (cuda_stream stream, cuda_event event, unsigned flags))                      \
	X(stream_capture, cuStreamGetCaptureInfo_v2,                                                                   \
	  (cuda_stream stream, int *state, uint64_t *number, void **graph, const void ***nodes, size_t *count))        \
	X(stream_is_capturing, cuStreamIsCapturing, (cuda_stream stream, int *state))                                  \
	X(event_create, cuEventCreate, (cuda_event * event, unsigned flags))                                           \
	X(event_destroy, cuEventDestroy_v2, (cuda_event event))                                                        \
	X(event_record, cuEventRecord, (cuda_event event, cuda_stream stream))                                         \
	X(event_query, cuEventQuery, (cuda_event event))                                                               \
	X(event_elapsed, cuEventElapsedTime, (float *milliseconds, cuda_event from, cuda_event to))                    \
	X(copy, cuMemcpyAsync, (cuda_address to, cuda_address from, size_t bytes, cuda_stream stream))                 \
	X(copy_2d, cuMemcpy2DAsync_v2, (const struct cuda_copy_2d *copy, cuda_stream stream))                          \
	X(host_function, cuLaunchHostFunc, (cuda_stream stream, void (*function)(void *), void *argument))             \
	X(capture_begin, cuStreamBeginCapture_v2, (cuda_stream stream, int mode))                                      \
	X(capture_end, cuStreamEndCapture, (cuda_stream stream, cuda_graph * graph))                                   \
	X(graph_instantiate, cuGraphInstantiateWithFlags, (cuda_graph_exec * exec, cuda_graph graph, uint64_t flags))  \
	X(graph_upload, cuGraphUpload, (cuda_graph_exec exec, cuda_stream stream))                                     \
	X(graph_launch, cuGraphLaunch, (cuda_graph_exec exec, cuda_stream stream))                                     \
	X(graph_exec_destroy, cuGraphExecDestroy, (cuda_graph_exec exec))                                              \
	X(graph_destroy, cuGraphDestroy, (cuda_graph graph))                                                           \
	X(granularity, cuMemGetAllocationGranularity,                                                                  \
	  (size_t *bytes, const struct cuda_memory_properties *properties, int option))                                \
	X(memory_create, cuMemCreate,                                                                                  \
	  (cuda_handle * handle, size_t bytes, const struct cuda_memory_properties *properties, uint64_t flags))       \
	X(memory_release, cuMemRelease, (cuda_handle handle))                                                          \
	X(memory_export, cuMemExportToShareableHandle, (void *out, cuda_handle handle, int type, uint64_t flags))      \
	X(memory_import, cuMemImportFromShareableHandle, (cuda_handle * handle, void *in, int type))                   \
	X(reserve, cuMemAddressReserve,                                                                                \
	  (cuda_address * address, size_t bytes, size_t alignment, cuda_address wish, uint64_t flags))                 \
	X(unreserve, cuMemAddressFree, (cuda_address address, size_t bytes))                                           \
	X(map, cuMemMap, (cuda_address address, size_t bytes, size_t offset, cuda_handle handle, uint64_t flags))      \
	X(unmap, cuMemUnmap, (cuda_address address, size_t bytes))                                                     \
	X(set_access, cuMemSetAccess,                                                                                  \
	  (cuda_address address, size_t bytes, const struct cuda_access *access, size_t count))                        \
	X(allocate, cuMemAlloc_v2, (cuda_address * address, size_t bytes))                                             \
	X(free, cuMemFree_v2, (cuda_address address))                                                                  \
	X(address_range, cuMemGetAddressRange_v2, (cuda_address * base, size_t *bytes, cuda_address address))          \
	X(pointer_attribute, cuPointerGetAttribute, (void *value, int attribute, cuda_address address))                \
	X(ipc_export, cuIpcGetMemHandle, (struct cuda_ipc * handle, cuda_address address))                             \
	X(ipc_open, cuIpcOpenMemHandle_v2, (cuda_address * address, struct cuda_ipc handle, unsigned flags))           \
	X(ipc_close, cuIpcCloseMemHandle, (cuda_address address))

struct cuda_driver {
	void *library;
	int version; /* 13000 is CUDA 13.0 */
#define CUDA_MEMBER(member, symbol, parameters) cuda_result(*member) parameters;
	CUDA_FUNCTIONS(CUDA_MEMBER)
#undef CUDA_MEMBER
};

/*
 * Load the library at @p path (what LAYERSHARD_CUDA_SO_PATH names), or libcuda.so.1 where it is NULL or empty; does not
 * touch a device. On failure the reason is in @p error.
 */
lshard_status cuda_driver_open(struct cuda_driver *driver, const char *path, lshard_error *error);
/* Initialise it and count the devices it shows. */
lshard_status cuda_driver_start(struct cuda_driver *driver, int *devices, lshard_error *error);
void cuda_driver_close(struct cuda_driver *driver);

/*
 * Put "WHAT: CUDA_ERROR_NAME: the driver's words" into @p error and return the status that belongs to @p result, which
 * is not CUDA_OK. @p format: WHAT.
 */
lshard_status cuda_failed(const struct cuda_driver *driver, lshard_error *error, cuda_result result, const char *format,
			  ...) __attribute__((format(printf, 4, 5)));

#endif
