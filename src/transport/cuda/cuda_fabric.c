/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_fabric.c - NVLink domains, whose devices reach each other's memory though they are of several hosts: can this
 * rank's device name its memory to them, and are all ranks' devices in one domain? Knows records; knows no store.
 *
 * The driver says whether a device has fabric handles at all, and grants one where this process may open a channel of
 * NVIDIA's service for that (IMEX). Which domain a device is in only the management library knows. Where that is not
 * there nobody can say, and opening a peer's memory shows it.
 */
#include "cuda_transport.h"
#include "host_identity.h"
#include "outside.h"
#include "text_hash.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

/* ---- the management library, of which this is all that is used ---- */

#define LIBRARY  "libnvidia-ml.so.1"
#define VARIABLE "LAYERSHARD_NVML_SO_PATH"

#define DOMAIN_COMPLETED 3 /* the device has joined its domain */

struct fabric_information {
	uint32_t version;
	unsigned char cluster[16];
	int32_t status; /* of joining */
	uint32_t clique;
	unsigned char state;
	uint32_t health;
};

#define INFORMATION_VERSION ((uint32_t)sizeof(struct fabric_information) | 2u << 24)

/* X(member, symbol, parameters) */
#define MANAGEMENT_FUNCTIONS(X)                                                                                        \
	X(init, nvmlInit_v2, (void))                                                                                   \
	X(shutdown, nvmlShutdown, (void))                                                                              \
	X(device_by_bus, nvmlDeviceGetHandleByPciBusId_v2, (const char *bus, void **device))                           \
	X(information, nvmlDeviceGetGpuFabricInfoV, (void *device, struct fabric_information *information))

struct management {
	void *library;
#define MANAGEMENT_MEMBER(member, symbol, parameters) int(*member) parameters;
	MANAGEMENT_FUNCTIONS(MANAGEMENT_MEMBER)
#undef MANAGEMENT_MEMBER
};

static const struct {
	const char *symbol;
	size_t member;
} entries[] = {
#define MANAGEMENT_ENTRY(member, symbol, parameters) {#symbol, offsetof(struct management, member)},
	MANAGEMENT_FUNCTIONS(MANAGEMENT_ENTRY)
#undef MANAGEMENT_ENTRY
};

/* 0: it is not there, or older than domains; nothing is left open. */
static int load(struct management *management)
{
	const char *path = lshard__variable(VARIABLE);

	management->library = dlopen(path ? path : LIBRARY, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
	if (!management->library)
		return 0;
	for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++) {
		void *found = dlsym(management->library, entries[i].symbol);

		memcpy((char *)management + entries[i].member, &found, sizeof found);
		if (!found)
			goto unload;
	}
	if (management->init() == 0)
		return 1;
unload:
	dlclose(management->library);
	return 0;
}

static void unload(struct management *management)
{
	management->shutdown();
	dlclose(management->library);
}

static const char *cluster_text(const struct cuda_record *record, char *text, size_t bytes)
{
	for (size_t i = 0; i < sizeof record->cluster; i++)
		snprintf(text + 2 * i, bytes - 2 * i, "%02x", record->cluster[i]);
	return text;
}

static void look_up_domain(const lshard_context *context, struct cuda_record *record)
{
	struct fabric_information found = {.version = INFORMATION_VERSION};
	struct management management;
	char cluster[2 * sizeof found.cluster + 1];
	void *device = NULL;

	record->domain = -1;
	if (!load(&management))
		return;
	if (management.device_by_bus(record->bus, &device) == 0 && management.information(device, &found) == 0) {
		record->domain = found.state == DOMAIN_COMPLETED && found.status == 0;
		record->clique = found.clique;
		memcpy(record->cluster, found.cluster, sizeof record->cluster);
		context->log(context, LSHARD_LOG_DEBUG,
			     "rank %d: %s (%s) is at state %u, status %d, of joining an NVLink domain: clique %u of "
			     "cluster %s",
			     (int)context->rank, record->name, record->bus, found.state, (int)found.status,
			     found.clique, cluster_text(record, cluster, sizeof cluster));
	}
	unload(&management);
}

/* ---- a handle ---- */

/* Made and given back: whether it is granted only a try can tell. */
static lshard_status try_handle(struct cuda *cuda, const struct cuda_record *record, lshard_error *error)
{
	struct cuda_fabric_handle shown;
	cuda_handle memory = 0;
	cuda_result result = cuda_memory_make(cuda, cuda->granule, &memory);
	int made = result == CUDA_OK;

	if (made) {
		result = cuda->driver.memory_export(&shown, memory, CUDA_HANDLE_FABRIC, 0);
		cuda->driver.memory_release(memory);
	}
	if (result == CUDA_OK)
		return LSHARD_OK;
	return cuda_failed(
		&cuda->driver, error, result, "no fabric handle is granted on %s (%s)%s: %s", record->name, record->bus,
		result == CUDA_NOT_PERMITTED ? ": is nvidia-imex running, and may this process open a channel in "
					       "/dev/nvidia-caps-imex-channels?"
					     : "",
		made ? "cuMemExportToShareableHandle" : "cuMemCreate");
}

lshard_status cuda_fabric_ask(struct cuda *cuda, struct cuda_record *record, lshard_error *error)
{
	struct host_identity host;
	struct cuda_scope scope;
	lshard_status status;
	int has_handles = 0;

	lshard__host_identify(&host);
	record->host = lshard__text_hash(host.boot);
	if (cuda->driver.device_attribute(&has_handles, CUDA_HAS_FABRIC_HANDLES, cuda->device) != CUDA_OK ||
	    !has_handles || !record->virtual_memory)
		return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED,
				   "%s (%s) has no fabric handles (CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED)",
				   record->name, record->bus);
	look_up_domain(cuda->base.context, record);
	scope = cuda_enter(cuda);
	status = try_handle(cuda, record, error);
	cuda_leave(cuda, scope);
	return status;
}

/* ---- one domain ---- */

/* Of one host alone, or of none. */
static int is_alone(const struct cuda_record *record)
{
	static const unsigned char none[sizeof record->cluster];

	return record->domain == 0 || (record->domain > 0 && !memcmp(record->cluster, none, sizeof none));
}

static lshard_status compare(struct cuda *cuda, int32_t rank)
{
	const struct cuda_record *first = &cuda->records[0];
	const struct cuda_record *other = &cuda->records[rank];
	const int32_t lonely = is_alone(first) ? 0 : rank;
	char clusters[2][2 * sizeof first->cluster + 1];

	if (first->host != other->host && (is_alone(first) || is_alone(other)))
		return lshard_fail(
			&cuda->base.error, LSHARD_ERR_NOT_SUPPORTED,
			"ranks 0 and %d are on two hosts, and the device of rank %d (%s, %s) is in no NVLink "
			"domain of several hosts (nvidia-smi -q, under Fabric)",
			(int)rank, (int)lonely, cuda->records[lonely].name, cuda->records[lonely].bus);
	if (first->domain < 0 || other->domain < 0 ||
	    (first->clique == other->clique && !memcmp(first->cluster, other->cluster, sizeof first->cluster)))
		return LSHARD_OK;
	return lshard_fail(
		&cuda->base.error, LSHARD_ERR_NOT_SUPPORTED,
		"the devices of ranks 0 and %d are in two NVLink domains: clique %u of cluster %s, and clique "
		"%u of cluster %s",
		(int)rank, first->clique, cluster_text(first, clusters[0], sizeof clusters[0]), other->clique,
		cluster_text(other, clusters[1], sizeof clusters[1]));
}

lshard_status cuda_fabric_compare(struct cuda *cuda)
{
	lshard_status status = LSHARD_OK;

	for (int32_t rank = 1; rank < cuda->base.context->size && status == LSHARD_OK; rank++)
		status = compare(cuda, rank);
	return status;
}
