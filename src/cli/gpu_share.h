/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_share.h - device memory that another process reads: exported as a descriptor, opened on the reader's own device.
 * What bare copies are measured on, beside the library's. Knows: gpu.h. Does not know: how descriptors travel.
 */
#ifndef GPU_SHARE_H
#define GPU_SHARE_H

#include "gpu.h"

/* All zeros: nothing open. */
struct gpu_share {
	gpu_address address;
	uint64_t bytes; /* whole granules */
	uint64_t handle;
	bool reserved;
	bool mapped;
	bool has_handle;
};

/** New memory on this device; *descriptor is the caller's to close.  @return as gpu_open; gpu->error. */
lshard_status gpu_share_make(struct gpu *gpu, uint64_t bytes, struct gpu_share *share, int *descriptor);
/** The memory behind @p descriptor, which stays the caller's, as @p bytes were asked of gpu_share_make. */
lshard_status gpu_share_open(struct gpu *gpu, uint64_t bytes, int descriptor, struct gpu_share *share);
void gpu_share_close(struct gpu *gpu, struct gpu_share *share);

#endif
