/* SPDX-License-Identifier: Apache-2.0
 *
 * stub_nvml.c - a stand-in for NVIDIA's management library: one GPU of the stub driver has a clock, a power and a
 * reason to slow down; the others are not known. STUB_NVML_NO_POWER_NOW in the environment: an old driver, that tells
 * only the mean of the last second.
 */
#include <stdlib.h>
#include <string.h>

struct field {
	unsigned id;
	unsigned scope;
	long long times[2];
	int type;
	int result;
	unsigned long long value;
};

int nvmlInit_v2(void);
int nvmlShutdown(void);
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device);
int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *mhz);
int nvmlDeviceGetFieldValues(void *device, int count, struct field *fields);
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts);
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons);

enum { NOT_SUPPORTED = 3, NOT_FOUND = 6 };

static int opened;

int nvmlInit_v2(void)
{
	opened++;
	return 0;
}

int nvmlShutdown(void)
{
	opened--;
	return 0;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device)
{
	if (!opened || strcmp(bus, "0000:01:00.0") != 0)
		return NOT_FOUND;
	*device = &opened;
	return 0;
}

int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *mhz)
{
	(void)device;
	*mhz = kind == 1 ? 1755 : 2619;
	return 0;
}

int nvmlDeviceGetFieldValues(void *device, int count, struct field *fields)
{
	(void)device;
	for (int i = 0; i < count; i++) {
		fields[i].result = fields[i].id == 186 && !getenv("STUB_NVML_NO_POWER_NOW") ? 0 : NOT_SUPPORTED;
		fields[i].type = 1;
		fields[i].value = 654321;
	}
	return 0;
}

int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts)
{
	(void)device;
	*milliwatts = 500000;
	return 0;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons)
{
	(void)device;
	*reasons = 0x4 | 0x20;
	return 0;
}
