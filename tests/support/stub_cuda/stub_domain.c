/* SPDX-License-Identifier: Apache-2.0
 *
 * stub_domain.c - of NVIDIA's management library what tells in which NVLink domain a device is. See stub_cuda.h.
 */
#include "stub_world.h"

#include <string.h>

/* As the library's own, in its second version. */
struct information {
	uint32_t version;
	unsigned char cluster[16];
	int32_t status;
	uint32_t clique;
	unsigned char state;
	uint32_t health;
};

_Static_assert(sizeof(struct information) == 36, "as the library has it");

int nvmlInit_v2(void);
int nvmlShutdown(void);
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device);
int nvmlDeviceGetGpuFabricInfoV(void *device, struct information *information);

int nvmlInit_v2(void)
{
	STUB_ENTER();
	stub_count(1);
	return stub_leave(CUDA_OK);
}

int nvmlShutdown(void)
{
	STUB_ENTER();
	stub_count(-1);
	return stub_leave(CUDA_OK);
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device)
{
	static char here;

	STUB_ENTER();
	*device = &here;
	return stub_leave(strncmp(bus, "0000:", 5) ? STUB_INVALID_VALUE : CUDA_OK);
}

int nvmlDeviceGetGpuFabricInfoV(void *device, struct information *information)
{
	STUB_ENTER();
	(void)device;
	if (information->version != (sizeof *information | 2u << 24))
		return stub_leave(STUB_INVALID_VALUE);
	memset(information->cluster, 0, sizeof information->cluster);
	information->cluster[15] = (unsigned char)stub_setting(STUB_CLUSTER);
	information->status = 0;
	information->clique = (uint32_t)stub_setting(STUB_CLIQUE);
	information->state = 3;
	information->health = 0;
	return stub_leave(CUDA_OK);
}
