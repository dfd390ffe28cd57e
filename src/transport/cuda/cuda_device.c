/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_device.c - this rank's device: which one it is, what it can do, its primary context. Knows no other rank.
 */
#include "cuda_transport.h"
#include "outside.h"

#include <string.h>

static lshard_status choose_device(struct cuda *cuda, int devices, lshard_error *error)
{
	const int ordinal = cuda->base.context->device;
	cuda_result result;

	if (devices == 0)
		return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED,
				   "the driver shows no device: is CUDA_VISIBLE_DEVICES empty?");
	if (ordinal < 0 || ordinal >= devices)
		return lshard_fail(error, LSHARD_ERR_INVALID,
				   "device %d: the driver shows %d (CUDA_VISIBLE_DEVICES may hide others)", ordinal,
				   devices);
	result = cuda->driver.device_get(&cuda->device, ordinal);
	if (result != CUDA_OK)
		return cuda_failed(&cuda->driver, error, result, "device %d: cuDeviceGet", ordinal);
	return LSHARD_OK;
}

static cuda_result describe(struct cuda *cuda, struct cuda_record *record)
{
	const struct cuda_driver *driver = &cuda->driver;
	int has_memory = 0;
	int has_descriptors = 0;
	cuda_result result = driver->device_uuid(&record->uuid, cuda->device);

	if (result == CUDA_OK)
		result = driver->device_bus(record->bus, sizeof record->bus, cuda->device);
	if (result == CUDA_OK)
		result = driver->device_name(record->name, sizeof record->name, cuda->device);
	if (result == CUDA_OK)
		result = driver->device_attribute(&has_memory, CUDA_HAS_VIRTUAL_MEMORY, cuda->device);
	if (result == CUDA_OK)
		result = driver->device_attribute(&has_descriptors, CUDA_HAS_FILE_DESCRIPTORS, cuda->device);
	record->ordinal = cuda->base.context->device;
	record->virtual_memory = has_memory && (cuda->inner || has_descriptors) && !cuda->options.ipc;
	return result;
}

static cuda_result find_limits(struct cuda *cuda, const struct cuda_record *record)
{
	const struct cuda_memory_properties properties = {
		.type = CUDA_PINNED, .handle_types = cuda->handle_type, .location = {CUDA_ON_DEVICE, cuda->device}};
	const struct cuda_scope scope = cuda_enter(cuda);
	size_t granule = 1;
	int least;
	cuda_result result = cuda->driver.priorities(&least, &cuda->priority);

	if (result == CUDA_OK && record->virtual_memory)
		result = cuda->driver.granularity(&granule, &properties, CUDA_GRANULARITY_MINIMUM);
	cuda_leave(cuda, scope);
	cuda->granule = granule;
	return result;
}

lshard_status cuda_device_open(struct cuda *cuda, struct cuda_record *record, lshard_error *error)
{
	const int ordinal = cuda->base.context->device;
	lshard_status status = cuda_driver_open(&cuda->driver, lshard__variable(CUDA_LIBRARY_VARIABLE), error);
	cuda_result result;
	int devices = 0;

	if (status == LSHARD_OK)
		status = cuda_driver_start(&cuda->driver, &devices, error);
	if (status == LSHARD_OK)
		status = choose_device(cuda, devices, error);
	if (status != LSHARD_OK)
		return status;
	result = describe(cuda, record);
	if (result != CUDA_OK)
		return cuda_failed(&cuda->driver, error, result, "device %d: asking what it is", ordinal);
	result = cuda->driver.context_retain(&cuda->context, cuda->device);
	if (result != CUDA_OK)
		return cuda_failed(&cuda->driver, error, result, "device %d: cuDevicePrimaryCtxRetain", ordinal);
	cuda->retained = 1;
	result = find_limits(cuda, record);
	if (result != CUDA_OK)
		return cuda_failed(&cuda->driver, error, result, "device %d: asking for its limits", ordinal);
	return LSHARD_OK;
}

void cuda_device_close(struct cuda *cuda)
{
	if (cuda->retained)
		cuda->driver.context_release(cuda->device);
	cuda->retained = 0;
	cuda_driver_close(&cuda->driver);
}

/* ---- the current context ---- */

int cuda_step(struct cuda *cuda)
{
	cuda_context current = NULL;

	if (cuda->driver.context_current(&current) == CUDA_OK && current == cuda->context)
		return 0; /* as in most programs: nothing to undo */
	return cuda->driver.context_push(cuda->context) == CUDA_OK;
}

void cuda_stepped(struct cuda *cuda, int pushed)
{
	cuda_context popped;

	if (pushed)
		cuda->driver.context_pop(&popped);
}

struct cuda_scope cuda_enter(struct cuda *cuda)
{
	struct cuda_scope scope = {cuda_step(cuda), CUDA_CAPTURE_RELAXED};

	cuda->driver.capture_mode(&scope.mode); /* gives the thread's own mode in exchange */
	return scope;
}

void cuda_leave(struct cuda *cuda, struct cuda_scope scope)
{
	cuda->driver.capture_mode(&scope.mode);
	cuda_stepped(cuda, scope.pushed);
}
