/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu.h - the program's small window on an NVIDIA GPU: one device, its memory, streams, events and graphs, through the
 * driver's library, loaded when a command asks for a GPU. gpu_share.h exports memory to another process, gpu_blas.h
 * multiplies matrices, gpu_meter.h reads clocks and power.
 * Knows: the driver's binary interface. Does not know: what is measured, layers, ranks.
 *
 * Functions return an lshard_status; after a failure gpu->error says what failed, in the driver's own words. What is
 * opened is closed by its counterpart, in reverse order; closing what was never opened does nothing.
 *
 * The device's context is current in the thread that called gpu_open, and in others after gpu_enter. A process that
 * will fork ranks must not call gpu_open before: the driver does not survive a fork.
 */
#ifndef GPU_H
#define GPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "layershard/layershard.h"

typedef uint64_t gpu_address; /* of device memory; a cast to void * is what the library takes and gives */
typedef void *gpu_stream;     /* a CUstream, as lshard_reach and lshard_wait take it */
typedef void *gpu_event;      /* with a time */
typedef void *gpu_graph;      /* ready to be launched */

struct gpu_driver; /* the driver's entry points, see gpu_driver.h */

struct gpu {
	struct gpu_driver *driver;
	int ordinal;
	int device;
	void *context;
	char name[96];
	char bus[32];       /* "0000:1b:00.0" */
	int driver_version; /* of CUDA: 13000 is 13.0 */
	uint64_t total_bytes;
	char error[512];
};

/**
 * Loads libcuda.so.1 (LAYERSHARD_CUDA_SO_PATH: that file instead) and opens device @p ordinal with its primary context.
 * @p gpu needs no initialisation. On failure gpu->error is set and nothing is left open.
 * @return OK; NOT_SUPPORTED where there is no driver or no such device; NO_MEMORY; TRANSPORT.
 */
lshard_status gpu_open(struct gpu *gpu, int ordinal);
void gpu_close(struct gpu *gpu);
/** Makes the device's context current in the calling thread. */
lshard_status gpu_enter(struct gpu *gpu);
/** The driver's figure for the whole device, other processes included. */
lshard_status gpu_free_bytes(struct gpu *gpu, uint64_t *bytes);

lshard_status gpu_allocate(struct gpu *gpu, uint64_t bytes, gpu_address *address);
void gpu_free(struct gpu *gpu, gpu_address address);
/** In stream order; either address may be host memory (then give (gpu_address)(uintptr_t)pointer). */
lshard_status gpu_copy(struct gpu *gpu, gpu_address to, gpu_address from, uint64_t bytes, gpu_stream stream);
/** The same, and done when it returns. */
lshard_status gpu_copy_now(struct gpu *gpu, gpu_address to, gpu_address from, uint64_t bytes, gpu_stream stream);

/** A non-blocking stream; @p urgent: of the device's highest priority, else of the lowest. */
lshard_status gpu_stream_open(struct gpu *gpu, bool urgent, gpu_stream *stream);
void gpu_stream_close(struct gpu *gpu, gpu_stream stream);
/** Returns when all work on @p stream is done; TIMEOUT after a minute. */
lshard_status gpu_stream_finish(struct gpu *gpu, gpu_stream stream);
/** What follows on @p stream comes after @p event. */
lshard_status gpu_stream_wait(struct gpu *gpu, gpu_stream stream, gpu_event event);

lshard_status gpu_event_open(struct gpu *gpu, gpu_event *event);
void gpu_event_close(struct gpu *gpu, gpu_event event);
lshard_status gpu_event_record(struct gpu *gpu, gpu_event event, gpu_stream stream);
/** Returns when @p event has happened; TIMEOUT after a minute. Spins: the time of return is exact. */
lshard_status gpu_event_finish(struct gpu *gpu, gpu_event event);
/** Between two events that have happened, to about half a microsecond. */
lshard_status gpu_event_elapsed(struct gpu *gpu, gpu_event from, gpu_event to, double *nanoseconds);

/**
 * Everything this thread enqueues on @p stream until gpu_capture_end becomes a graph instead of running. A failed end
 * leaves no graph and ends the capture.
 */
lshard_status gpu_capture_begin(struct gpu *gpu, gpu_stream stream);
lshard_status gpu_capture_end(struct gpu *gpu, gpu_stream stream, gpu_graph *graph);
lshard_status gpu_graph_launch(struct gpu *gpu, gpu_graph graph, gpu_stream stream);
void gpu_graph_close(struct gpu *gpu, gpu_graph graph);

#endif
