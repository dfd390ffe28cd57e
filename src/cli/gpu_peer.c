/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_peer.c - see gpu_peer.h.
 */
#include "gpu_peer.h"
#include "gpu_driver.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

enum { ENABLE_PEER = 1, ALREADY_ENABLED = 704 };

static lshard_status find(struct gpu *gpu, const char *symbol, void *entry, size_t bytes)
{
	void *found = dlsym(gpu->driver->library, symbol);

	if (!found) {
		snprintf(gpu->error, sizeof gpu->error, "GPU %d: the driver has no %s", gpu->ordinal, symbol);
		return LSHARD_ERR_NOT_SUPPORTED;
	}
	memcpy(entry, &found, bytes);
	return LSHARD_OK;
}

lshard_status gpu_ipc_export(struct gpu *gpu, gpu_address address, struct gpu_ipc *handle)
{
	int (*get)(struct gpu_ipc *, gpu_address);
	const lshard_status status = find(gpu, "cuIpcGetMemHandle", &get, sizeof get);

	return status == LSHARD_OK ? gpu_checked(gpu, get(handle, address), "cuIpcGetMemHandle") : status;
}

lshard_status gpu_ipc_open(struct gpu *gpu, const struct gpu_ipc *handle, gpu_address *address)
{
	int (*open)(gpu_address *, struct gpu_ipc, unsigned);
	const lshard_status status = find(gpu, "cuIpcOpenMemHandle_v2", &open, sizeof open);

	return status == LSHARD_OK ? gpu_checked(gpu, open(address, *handle, ENABLE_PEER), "cuIpcOpenMemHandle")
				   : status;
}

void gpu_ipc_close(struct gpu *gpu, gpu_address address)
{
	int (*close)(gpu_address);

	if (address && find(gpu, "cuIpcCloseMemHandle", &close, sizeof close) == LSHARD_OK)
		close(address);
}

lshard_status gpu_peer_allow(struct gpu *gpu, const struct gpu *other)
{
	int (*enable)(void *, unsigned);
	lshard_status status;
	int result;

	if (gpu->device == other->device)
		return LSHARD_OK;
	status = find(gpu, "cuCtxEnablePeerAccess", &enable, sizeof enable);
	if (status != LSHARD_OK)
		return status;
	result = enable(other->context, 0);
	return result == ALREADY_ENABLED ? LSHARD_OK : gpu_checked(gpu, result, "cuCtxEnablePeerAccess");
}
