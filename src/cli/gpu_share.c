/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_share.c - see gpu_share.h.
 */
#include "gpu_share.h"
#include "gpu_driver.h"

#include <string.h>

static struct gpu_properties properties_of(const struct gpu *gpu)
{
	return (struct gpu_properties){
		.type = GPU_PINNED, .handle_types = GPU_DESCRIPTOR, .place = {GPU_ON_DEVICE, gpu->device}};
}

static lshard_status round_up(struct gpu *gpu, uint64_t bytes, struct gpu_share *share)
{
	const struct gpu_properties properties = properties_of(gpu);
	size_t granule = 0;
	const lshard_status status =
		gpu_checked(gpu, gpu->driver->granularity(&granule, &properties, 0), "cuMemGetAllocationGranularity");

	memset(share, 0, sizeof *share);
	if (status == LSHARD_OK)
		share->bytes = (bytes + granule - 1) / granule * granule;
	return status;
}

/* A handle becomes an address that this device reads and writes. */
static lshard_status map(struct gpu *gpu, struct gpu_share *share)
{
	const struct gpu_driver *driver = gpu->driver;
	const struct gpu_access access = {{GPU_ON_DEVICE, gpu->device}, GPU_CAN_WRITE};
	const size_t bytes = (size_t)share->bytes;
	lshard_status status;

	status = gpu_checked(gpu, driver->reserve(&share->address, bytes, 0, 0, 0), "cuMemAddressReserve");
	share->reserved = status == LSHARD_OK;
	if (status == LSHARD_OK)
		status = gpu_checked(gpu, driver->map(share->address, bytes, 0, share->handle, 0), "cuMemMap");
	share->mapped = status == LSHARD_OK;
	if (status == LSHARD_OK)
		status = gpu_checked(gpu, driver->set_access(share->address, bytes, &access, 1), "cuMemSetAccess");
	return status;
}

lshard_status gpu_share_make(struct gpu *gpu, uint64_t bytes, struct gpu_share *share, int *descriptor)
{
	const struct gpu_properties properties = properties_of(gpu);
	int exported = -1;
	lshard_status status = round_up(gpu, bytes, share);

	if (status == LSHARD_OK)
		status = gpu_checked(gpu,
				     gpu->driver->memory_create(&share->handle, (size_t)share->bytes, &properties, 0),
				     "cuMemCreate");
	share->has_handle = status == LSHARD_OK;
	if (status == LSHARD_OK)
		status = map(gpu, share);
	if (status == LSHARD_OK)
		status = gpu_checked(gpu, gpu->driver->memory_export(&exported, share->handle, GPU_DESCRIPTOR, 0),
				     "cuMemExportToShareableHandle");
	if (status == LSHARD_OK)
		*descriptor = exported;
	else
		gpu_share_close(gpu, share);
	return status;
}

lshard_status gpu_share_open(struct gpu *gpu, uint64_t bytes, int descriptor, struct gpu_share *share)
{
	lshard_status status = round_up(gpu, bytes, share);

	if (status == LSHARD_OK)
		status = gpu_checked(
			gpu, gpu->driver->memory_import(&share->handle, (void *)(intptr_t)descriptor, GPU_DESCRIPTOR),
			"cuMemImportFromShareableHandle");
	share->has_handle = status == LSHARD_OK;
	if (status == LSHARD_OK)
		status = map(gpu, share);
	if (status != LSHARD_OK)
		gpu_share_close(gpu, share);
	return status;
}

void gpu_share_close(struct gpu *gpu, struct gpu_share *share)
{
	if (share->mapped)
		gpu->driver->unmap(share->address, (size_t)share->bytes);
	if (share->reserved)
		gpu->driver->unreserve(share->address, (size_t)share->bytes);
	if (share->has_handle)
		gpu->driver->memory_release(share->handle);
	memset(share, 0, sizeof *share);
}
