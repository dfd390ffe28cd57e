/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_peer.h - another process's memory by the driver's legacy handles, which are bytes and travel as such, and one
 * device's access to another's. For copies that are made as other programs make them. Knows: gpu.h.
 */
#ifndef GPU_PEER_H
#define GPU_PEER_H

#include "gpu.h"

struct gpu_ipc {
	char bytes[64];
};

/** @p address is one that gpu_allocate returned.  @return as gpu_open; gpu->error. */
lshard_status gpu_ipc_export(struct gpu *gpu, gpu_address address, struct gpu_ipc *handle);
/** The whole allocation of another process, opened on @p gpu, which is current. */
lshard_status gpu_ipc_open(struct gpu *gpu, const struct gpu_ipc *handle, gpu_address *address);
void gpu_ipc_close(struct gpu *gpu, gpu_address address);
/** Let copies of @p gpu, which is current, reach memory of @p other in this process; nothing to do for one device. */
lshard_status gpu_peer_allow(struct gpu *gpu, const struct gpu *other);

#endif
