/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_link_gpu.h - what `bench link` does on a GPU without the library: one device, memory that other processes map,
 * copies, and how long they took. By the cuda transport's table of the driver's entry points, so that a bare copy and a
 * fetch ask the same driver. Knows: that table. Does not know: ranks, layers, what is measured.
 *
 * Functions return false after a failure, whose text is then in gpu->error, in the driver's own words. What is opened
 * is closed by its counterpart, in reverse order; closing what was never opened does nothing.
 */
#ifndef BENCH_LINK_GPU_H
#define BENCH_LINK_GPU_H

#include "cuda_driver.h"

#include <stdbool.h>

struct link_gpu {
	struct cuda_driver driver;
	int ordinal;
	cuda_device device;
	cuda_context context; /* NULL: not open */
	char name[96];
	char bus[32]; /* "0000:1b:00.0" */
	lshard_error error;
};

/**
 * The driver, and device @p ordinal with its primary context, which is current in this thread until the end. @p gpu
 * needs no initialisation; after a failure nothing is left open. A process that will fork ranks must not call it
 * before: the driver does not survive a fork.
 */
bool link_gpu_open(struct link_gpu *gpu, int ordinal);
void link_gpu_close(struct link_gpu *gpu);

bool link_gpu_allocate(struct link_gpu *gpu, uint64_t bytes, cuda_address *address);
void link_gpu_free(struct link_gpu *gpu, cuda_address address);
/** In stream order; either address may be host memory (then give (cuda_address)(uintptr_t)pointer). */
bool link_gpu_copy(struct link_gpu *gpu, cuda_address to, cuda_address from, uint64_t bytes, cuda_stream stream);
/** The same, and done when it returns. */
bool link_gpu_copy_now(struct link_gpu *gpu, cuda_address to, cuda_address from, uint64_t bytes, cuda_stream stream);

/** A non-blocking stream; @p urgent: of the device's highest priority, else of the lowest. */
bool link_gpu_stream_open(struct link_gpu *gpu, bool urgent, cuda_stream *stream);
void link_gpu_stream_close(struct link_gpu *gpu, cuda_stream stream);
/** Returns when all work on @p stream is done; fails after a minute. */
bool link_gpu_stream_finish(struct link_gpu *gpu, cuda_stream stream);

bool link_gpu_event_open(struct link_gpu *gpu, cuda_event *event);
void link_gpu_event_close(struct link_gpu *gpu, cuda_event event);
bool link_gpu_event_record(struct link_gpu *gpu, cuda_event event, cuda_stream stream);
/** Returns when @p event has happened; fails after a minute. Spins: the time of return is exact. */
bool link_gpu_event_finish(struct link_gpu *gpu, cuda_event event);
/** Between two events that have happened, to about half a microsecond. */
bool link_gpu_event_elapsed(struct link_gpu *gpu, cuda_event from, cuda_event to, double *nanoseconds);

/* Device memory that another process reads, on its own device. All zeros: nothing open. */
struct link_gpu_shard {
	cuda_address address;
	uint64_t bytes; /* whole granules */
	cuda_handle handle;
	bool mapped;
};

/** New memory on this device; *descriptor is the caller's to close. */
bool link_gpu_shard_make(struct link_gpu *gpu, uint64_t bytes, struct link_gpu_shard *shard, int *descriptor);
/** The memory behind @p descriptor, which stays the caller's, as @p bytes were asked of link_gpu_shard_make. */
bool link_gpu_shard_open(struct link_gpu *gpu, uint64_t bytes, int descriptor, struct link_gpu_shard *shard);
void link_gpu_shard_close(struct link_gpu *gpu, struct link_gpu_shard *shard);

#endif
