/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_driver.c - see cuda_driver.h.
 */
#include "cuda_driver.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define LIBRARY "libcuda.so.1"

static const struct {
	const char *symbol;
	size_t member;
} entries[] = {
#define CUDA_ENTRY(member, symbol, parameters) {#symbol, offsetof(struct cuda_driver, member)},
	CUDA_FUNCTIONS(CUDA_ENTRY)
#undef CUDA_ENTRY
};

static lshard_status find_entries(struct cuda_driver *driver, const char *path, lshard_error *error)
{
	for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++) {
		void *found = dlsym(driver->library, entries[i].symbol);

		if (!found)
			return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED,
					   "%s has no %s: driver 470 (CUDA 11.4) or later is needed", path,
					   entries[i].symbol);
		memcpy((char *)driver + entries[i].member, &found, sizeof found);
	}
	return LSHARD_OK;
}

/* Asked without cuInit: a process that has called it cannot fork ranks that use the device. */
static lshard_status check_version(struct cuda_driver *driver, const char *path, lshard_error *error)
{
	const cuda_result result = driver->driver_version(&driver->version);

	if (result != CUDA_OK)
		return cuda_failed(driver, error, result, "%s: cuDriverGetVersion", path);
	if (driver->version < CUDA_OLDEST_DRIVER)
		return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED, "%s is for CUDA %d.%d; 11.4 or later is needed",
				   path, driver->version / 1000, driver->version % 1000 / 10);
	return LSHARD_OK;
}

/* libcuda is often installed where there is no device, in container images above all. */
static lshard_status check_device_nodes(lshard_error *error)
{
	if (!access("/dev/nvidiactl", F_OK) || !access("/dev/dxg", F_OK))
		return LSHARD_OK;
	return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED,
			   "this machine, or this container, shows no NVIDIA device: /dev/nvidiactl: %s",
			   strerror(errno));
}

lshard_status cuda_driver_open(struct cuda_driver *driver, const char *path, lshard_error *error)
{
	const int named = path && *path;
	lshard_status status;

	path = named ? path : LIBRARY;
	memset(driver, 0, sizeof *driver);
	driver->library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
	if (!driver->library)
		return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED, "NVIDIA's driver cannot be loaded: %s", dlerror());
	status = find_entries(driver, path, error);
	if (status == LSHARD_OK)
		status = check_version(driver, path, error);
	if (status == LSHARD_OK && !named)
		status = check_device_nodes(error);
	if (status != LSHARD_OK)
		cuda_driver_close(driver);
	return status;
}

lshard_status cuda_driver_start(struct cuda_driver *driver, int *devices, lshard_error *error)
{
	cuda_result result = driver->init(0);

	if (result == CUDA_NOT_INITIALISED)
		return cuda_failed(driver, error, result,
				   "cuInit (it fails in a process forked from one that used the device)");
	if (result != CUDA_OK)
		return cuda_failed(driver, error, result, "cuInit");
	result = driver->device_count(devices);
	if (result != CUDA_OK)
		return cuda_failed(driver, error, result, "cuDeviceGetCount");
	return LSHARD_OK;
}

/* The library stays in the process: the driver does not survive being unloaded. */
void cuda_driver_close(struct cuda_driver *driver)
{
	if (driver->library)
		dlclose(driver->library);
	driver->library = NULL;
}

static lshard_status status_of(cuda_result result)
{
	switch (result) {
	case CUDA_NO_MEMORY:
		return LSHARD_ERR_NO_MEMORY;
	case CUDA_NO_DEVICE:
	case CUDA_NOT_PERMITTED:
	case CUDA_PEER_ACCESS_UNSUPPORTED:
	case CUDA_UNSUPPORTED:
		return LSHARD_ERR_NOT_SUPPORTED;
	default:
		return LSHARD_ERR_TRANSPORT;
	}
}

lshard_status cuda_failed(const struct cuda_driver *driver, lshard_error *error, cuda_result result, const char *format,
			  ...)
{
	const char *name = NULL;
	const char *text = NULL;
	char what[256];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(what, sizeof what, format, arguments);
	va_end(arguments);
	driver->error_name(result, &name);
	driver->error_text(result, &text);
	if (!name)
		return lshard_fail(error, status_of(result), "%s: error %d of the driver", what, result);
	return lshard_fail(error, status_of(result), "%s: %s: %s", what, name, text ? text : "");
}
