/* SPDX-License-Identifier: Apache-2.0
 *
 * stub_cuda.c - see stub_cuda.h: devices, contexts, and how tests steer the stub.
 */
#include "stub_world.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#define SYMBOLS 96
#define DEVICES 16
#define DEPTH   8

struct call {
	char symbol[48];
	unsigned count;
	unsigned fail_at;
	cuda_result result;
};

static const int64_t defaults[STUB_SETTINGS] = {
	[STUB_VERSION] = 13000,
	[STUB_DEVICES] = 8,
	[STUB_VIRTUAL_MEMORY] = 1,
	[STUB_DESCRIPTORS] = 1,
	[STUB_FABRIC] = 1,
	[STUB_CHANNEL] = 1,
	[STUB_CLUSTER] = 1,
	[STUB_CLIQUE] = 0,
	[STUB_READ_ONLY] = 1,
	[STUB_FETCH_NS] = 50000,
	[STUB_LEGACY_FETCH_NS] = 50000,
	[STUB_MEMORY_BYTES] = 1024 << 20,
};

static struct world {
	pthread_mutex_t lock;
	int64_t settings[STUB_SETTINGS];
	int set; /* the settings are not the initial zeros */
	struct call calls[SYMBOLS];
	int objects;
	int initialised;
} world = {.lock = PTHREAD_MUTEX_INITIALIZER};

static char contexts[DEVICES]; /* their addresses are contexts */
static _Thread_local cuda_context current[DEPTH];
static _Thread_local int depth;
static _Thread_local int capture_mode; /* 0: global, as every thread begins */

static void set_defaults(void)
{
	if (!world.set)
		memcpy(world.settings, defaults, sizeof defaults);
	world.set = 1;
}

static struct call *call_of(const char *symbol)
{
	for (int i = 0; i < SYMBOLS; i++) {
		if (!world.calls[i].symbol[0])
			snprintf(world.calls[i].symbol, sizeof world.calls[i].symbol, "%s", symbol);
		if (!strcmp(world.calls[i].symbol, symbol))
			return &world.calls[i];
	}
	return NULL;
}

cuda_result stub_enter(const char *symbol)
{
	struct call *call;

	pthread_mutex_lock(&world.lock);
	set_defaults();
	call = call_of(symbol);
	if (++call->count != call->fail_at)
		return CUDA_OK;
	if (call->result == STUB_KILLED)
		raise(SIGKILL);
	return call->result;
}

cuda_result stub_leave(cuda_result result)
{
	pthread_mutex_unlock(&world.lock);
	return result;
}

int64_t stub_setting(enum stub_setting setting)
{
	return world.settings[setting];
}

void stub_count(int objects)
{
	world.objects += objects;
}

/* ---- steering ---- */

void stub_cuda_set(enum stub_setting setting, int64_t value)
{
	pthread_mutex_lock(&world.lock);
	set_defaults();
	world.settings[setting] = value;
	pthread_mutex_unlock(&world.lock);
}

void stub_cuda_fail(const char *symbol, unsigned nth, cuda_result result)
{
	struct call *call;

	pthread_mutex_lock(&world.lock);
	call = call_of(symbol);
	call->fail_at = nth ? call->count + nth : 0;
	call->result = result;
	pthread_mutex_unlock(&world.lock);
}

unsigned stub_cuda_calls(const char *symbol)
{
	unsigned count = 0;

	pthread_mutex_lock(&world.lock);
	for (int i = 0; i < SYMBOLS && !symbol; i++)
		count += world.calls[i].count;
	if (symbol)
		count = call_of(symbol)->count;
	pthread_mutex_unlock(&world.lock);
	return count;
}

void stub_cuda_reset(void)
{
	pthread_mutex_lock(&world.lock);
	stub_streams_reset();
	stub_memory_reset();
	memset(world.calls, 0, sizeof world.calls);
	world.set = 0;
	world.objects = 0;
	set_defaults();
	pthread_mutex_unlock(&world.lock);
}

int stub_cuda_outstanding(void)
{
	int objects;

	pthread_mutex_lock(&world.lock);
	objects = world.objects;
	pthread_mutex_unlock(&world.lock);
	return objects;
}

/* ---- the driver ---- */

cuda_result cuInit(unsigned flags)
{
	STUB_ENTER();
	world.initialised = 1;
	return stub_leave(flags ? STUB_INVALID_VALUE : CUDA_OK);
}

cuda_result cuDriverGetVersion(int *version)
{
	STUB_ENTER();
	*version = (int)stub_setting(STUB_VERSION);
	return stub_leave(CUDA_OK);
}

cuda_result cuGetErrorName(cuda_result result, const char **name)
{
	*name = result == CUDA_NO_MEMORY       ? "CUDA_ERROR_OUT_OF_MEMORY"
		: result == CUDA_UNSUPPORTED   ? "CUDA_ERROR_NOT_SUPPORTED"
		: result == CUDA_NOT_PERMITTED ? "CUDA_ERROR_NOT_PERMITTED"
		: result == 719                ? "CUDA_ERROR_LAUNCH_FAILED"
					       : NULL;
	return *name ? CUDA_OK : STUB_INVALID_VALUE;
}

cuda_result cuGetErrorString(cuda_result result, const char **text)
{
	*text = result == CUDA_NO_MEMORY ? "out of memory" : "the stub's words";
	return CUDA_OK;
}

cuda_result cuDeviceGetCount(int *count)
{
	STUB_ENTER();
	*count = (int)stub_setting(STUB_DEVICES);
	return stub_leave(world.initialised ? CUDA_OK : CUDA_NOT_INITIALISED);
}

cuda_result cuDeviceGet(cuda_device *device, int ordinal)
{
	STUB_ENTER();
	*device = ordinal;
	return stub_leave(ordinal < stub_setting(STUB_DEVICES) ? CUDA_OK : CUDA_INVALID_DEVICE);
}

cuda_result cuDeviceGetName(char *name, int bytes, cuda_device device)
{
	STUB_ENTER();
	snprintf(name, (size_t)bytes, "Stub %d", device);
	return stub_leave(CUDA_OK);
}

cuda_result cuDeviceGetUuid_v2(struct cuda_uuid *uuid, cuda_device device)
{
	STUB_ENTER();
	memset(uuid, 0x5a, sizeof *uuid);
	uuid->bytes[15] = (unsigned char)(stub_setting(STUB_ONE_DEVICE) ? 0 : device);
	return stub_leave(CUDA_OK);
}

cuda_result cuDeviceGetPCIBusId(char *text, int bytes, cuda_device device)
{
	STUB_ENTER();
	snprintf(text, (size_t)bytes, "0000:%02x:00.0", device);
	return stub_leave(CUDA_OK);
}

cuda_result cuDeviceGetAttribute(int *value, int attribute, cuda_device device)
{
	STUB_ENTER();
	(void)device;
	*value = (int)stub_setting(attribute == CUDA_HAS_VIRTUAL_MEMORY   ? STUB_VIRTUAL_MEMORY
				   : attribute == CUDA_HAS_FABRIC_HANDLES ? STUB_FABRIC
									  : STUB_DESCRIPTORS);
	return stub_leave(CUDA_OK);
}

/* ---- contexts ---- */

cuda_result cuDevicePrimaryCtxRetain(cuda_context *context, cuda_device device)
{
	STUB_ENTER();
	*context = (cuda_context)(void *)&contexts[device];
	stub_count(1);
	return stub_leave(CUDA_OK);
}

cuda_result cuDevicePrimaryCtxRelease_v2(cuda_device device)
{
	STUB_ENTER();
	(void)device;
	stub_count(-1);
	return stub_leave(CUDA_OK);
}

int stub_has_context(void)
{
	return depth > 0 && current[depth - 1];
}

int stub_device(void)
{
	return (int)((char *)(void *)current[depth - 1] - contexts);
}

cuda_result cuCtxGetCurrent(cuda_context *context)
{
	STUB_ENTER();
	*context = depth > 0 ? current[depth - 1] : NULL;
	return stub_leave(CUDA_OK);
}

cuda_result cuCtxSetCurrent(cuda_context context)
{
	STUB_ENTER();
	depth = depth ? depth : 1;
	current[depth - 1] = context;
	return stub_leave(CUDA_OK);
}

cuda_result cuCtxPushCurrent_v2(cuda_context context)
{
	STUB_ENTER();
	if (depth == DEPTH)
		return stub_leave(STUB_INVALID_CONTEXT);
	current[depth++] = context;
	return stub_leave(CUDA_OK);
}

cuda_result cuCtxPopCurrent_v2(cuda_context *context)
{
	STUB_ENTER();
	if (depth == 0)
		return stub_leave(STUB_INVALID_CONTEXT);
	*context = current[--depth];
	return stub_leave(CUDA_OK);
}

cuda_result cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
	STUB_ENTER();
	*least = 0;
	*greatest = STUB_HIGHEST;
	return stub_leave(stub_has_context() ? CUDA_OK : STUB_INVALID_CONTEXT);
}

cuda_result cuThreadExchangeStreamCaptureMode(int *mode)
{
	const int before = capture_mode;

	STUB_ENTER();
	capture_mode = *mode;
	*mode = before;
	return stub_leave(CUDA_OK);
}

cuda_result stub_unsafe_call(void)
{
	if (!stub_has_context())
		return STUB_INVALID_CONTEXT;
	if (capture_mode == CUDA_CAPTURE_RELAXED || !stub_capture_in_progress())
		return CUDA_OK;
	stub_invalidate_captures();
	return STUB_CAPTURE_UNSUPPORTED;
}
