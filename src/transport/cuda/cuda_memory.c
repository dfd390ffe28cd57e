/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_memory.c - ranges of addresses and the physical memory mapped onto them. Knows this rank's device; knows no
 * shard, no window, no peer. Called with the context current.
 */
#include "cuda_transport.h"

lshard_status cuda_refused(const struct cuda_store *store, cuda_result result, const char *what, uint64_t bytes)
{
	struct cuda *cuda = (struct cuda *)store->base.transport;
	const struct cuda_record *record = &cuda->records[cuda->base.context->rank];

	if (result == CUDA_OK)
		return LSHARD_OK;
	return cuda_failed(&cuda->driver, &cuda->base.error, result, "series '%s': %s of %llu bytes on %s (%s)",
			   store->base.plan->name, what, (unsigned long long)bytes, record->name, record->bus);
}

static uint64_t whole_granules(const struct cuda *cuda, uint64_t bytes)
{
	return (bytes + cuda->ops.granule_bytes - 1) & ~(cuda->ops.granule_bytes - 1);
}

cuda_result cuda_memory_make(struct cuda *cuda, uint64_t bytes, cuda_handle *handle)
{
	const struct cuda_memory_properties properties = {
		.type = CUDA_PINNED, .handle_types = cuda->handle_type, .location = {CUDA_ON_DEVICE, cuda->device}};

	return cuda->driver.memory_create(handle, (size_t)whole_granules(cuda, bytes), &properties, 0);
}

cuda_result cuda_range_reserve(struct cuda *cuda, uint64_t bytes, struct cuda_range *range)
{
	const uint64_t whole = whole_granules(cuda, bytes);
	cuda_address address = 0;
	cuda_result result = cuda->driver.reserve(&address, (size_t)whole, 0, 0, 0);

	if (result == CUDA_OK)
		*range = (struct cuda_range){CUDA_RESERVED, address, whole, 0};
	return result;
}

cuda_result cuda_range_map(struct cuda *cuda, const struct cuda_range *range, uint64_t offset, uint64_t bytes,
			   cuda_handle handle, int writable)
{
	const size_t whole = (size_t)whole_granules(cuda, bytes);
	const cuda_address at = range->address + offset;
	struct cuda_access access = {{CUDA_ON_DEVICE, cuda->device}, writable ? CUDA_CAN_WRITE : CUDA_CAN_READ};
	cuda_result result = cuda->driver.map(at, whole, 0, handle, 0);

	if (result != CUDA_OK)
		return result;
	result = cuda->driver.set_access(at, whole, &access, 1);
	if (result == CUDA_OK || writable)
		return result;
	access.flags = CUDA_CAN_WRITE;
	result = cuda->driver.set_access(at, whole, &access, 1);
	if (result == CUDA_OK && !cuda->said_writable)
		cuda->base.context->log(
			cuda->base.context, LSHARD_LOG_INFO,
			"rank %d: the driver has no read-only access to peers' memory: a stray write of this rank's "
			"kernels could change their shards",
			(int)cuda->base.context->rank);
	cuda->said_writable |= result == CUDA_OK;
	return result;
}

void cuda_range_unmap(struct cuda *cuda, const struct cuda_range *range, uint64_t offset, uint64_t bytes)
{
	if (range->kind == CUDA_RESERVED) /* fails where opening did not get so far as to map it */
		cuda->driver.unmap(range->address + offset, (size_t)whole_granules(cuda, bytes));
}

void cuda_range_free(struct cuda *cuda, struct cuda_range *range)
{
	if (range->kind == CUDA_RESERVED)
		cuda->driver.unreserve(range->address, (size_t)range->bytes);
	else if (range->kind == CUDA_ALLOCATED)
		cuda->driver.free(range->address);
	else if (range->kind == CUDA_OPENED)
		cuda->driver.ipc_close(range->address - range->offset);
	range->kind = CUDA_NOTHING;
}
