/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_nccl.c - see bench_gemm_nccl.h.
 */
#include "bench_gemm_nccl.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LIBRARY  "libnccl.so.2"
#define VARIABLE "LAYERSHARD_NCCL_SO_PATH"

#define MAGIC 0xcafebeefu

enum { CONFIG_VERSION = 22800, POLICY_WITHOUT_SMS = 2, UNSET = INT_MIN };

static const struct {
	const char *symbol;
	size_t member;
	bool needed;
} entries[] = {
#define NCCL_NEEDED(member, symbol, parameters) {#symbol, offsetof(struct nccl, member), true},
#define NCCL_LATE(member, symbol, parameters)   {#symbol, offsetof(struct nccl, member), false},
	NCCL_FUNCTIONS(NCCL_NEEDED) NCCL_LATE_FUNCTIONS(NCCL_LATE)
#undef NCCL_NEEDED
#undef NCCL_LATE
		{"ncclGetErrorString", offsetof(struct nccl, text), true},
	{"ncclGetLastError", offsetof(struct nccl, last_error), false},
};

static bool find_entries(struct nccl *nccl, char *why, size_t bytes)
{
	for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++) {
		void *found = dlsym(nccl->library, entries[i].symbol);

		if (!found && entries[i].needed) {
			snprintf(why, bytes, "NCCL has no %s", entries[i].symbol);
			return false;
		}
		memcpy((char *)nccl + entries[i].member, &found, sizeof found);
	}
	return nccl_checked(nccl, nccl->version(&nccl->number), "ncclGetVersion", why, bytes);
}

bool nccl_load(struct nccl *nccl, char *why, size_t bytes)
{
	const char *path = getenv(VARIABLE);

	memset(nccl, 0, sizeof *nccl);
	setenv("NCCL_NVLS_ENABLE", "0", 0); /* multicast of a shared host is not ours to take */
	nccl->library = dlopen(path && *path ? path : LIBRARY, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
	if (!nccl->library) {
		snprintf(why, bytes, "NCCL cannot be loaded: %s; " VARIABLE " can name its file", dlerror());
		return false;
	}
	if (find_entries(nccl, why, bytes))
		return true;
	nccl_unload(nccl);
	return false;
}

void nccl_unload(struct nccl *nccl)
{
	if (nccl->library)
		dlclose(nccl->library);
	nccl->library = NULL;
}

struct nccl_config nccl_copy_engine_config(void)
{
	return (struct nccl_config){.size = sizeof(struct nccl_config),
				    .magic = MAGIC,
				    .version = CONFIG_VERSION,
				    .blocking = UNSET,
				    .cga_cluster_size = UNSET,
				    .min_ctas = UNSET,
				    .max_ctas = UNSET,
				    .split_share = UNSET,
				    .traffic_class = UNSET,
				    .collnet_enable = UNSET,
				    .cta_policy = POLICY_WITHOUT_SMS,
				    .shrink_share = UNSET,
				    .nvls_ctas = UNSET,
				    .channels_per_net_peer = UNSET,
				    .nvlink_centric_sched = UNSET};
}

bool nccl_checked(const struct nccl *nccl, int result, const char *what, char *why, size_t bytes)
{
	const char *last = "";

	if (result == NCCL_OK)
		return true;
	if (nccl->last_error)
		last = nccl->last_error(NULL);
	snprintf(why, bytes, "%s: %s%s%s", what, nccl->text(result), *last ? ": " : "", last);
	return false;
}
