/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_nccl.h - the few calls of NCCL that rivals need, loaded when they are asked for: libnccl.so.2, or what
 * LAYERSHARD_NCCL_SO_PATH names. Knows: NCCL's binary interface. Does not know: what is moved.
 */
#ifndef BENCH_GEMM_NCCL_H
#define BENCH_GEMM_NCCL_H

#include "gpu.h"

struct nccl_id {
	char bytes[128];
};

typedef struct ncclComm *nccl_comm;
typedef struct ncclWindow_vidmem *nccl_window;

/* ncclConfig_t as of 2.28; later versions take its size for what is set. */
struct nccl_config {
	size_t size;
	unsigned magic;
	unsigned version;
	int blocking;
	int cga_cluster_size;
	int min_ctas;
	int max_ctas;
	const char *net_name;
	int split_share;
	int traffic_class;
	const char *comm_name;
	int collnet_enable;
	int cta_policy;
	int shrink_share;
	int nvls_ctas;
	int channels_per_net_peer;
	int nvlink_centric_sched;
};

enum {
	NCCL_OK = 0,
	NCCL_BYTES = 1, /* ncclUint8 */
	NCCL_SYMMETRIC = 1,
	NCCL_FIRST_WITH_COPY_ENGINES = 22803
};

/* X(member, symbol, parameters); every one returns an ncclResult_t */
#define NCCL_FUNCTIONS(X)                                                                                              \
	X(version, ncclGetVersion, (int *version))                                                                     \
	X(make_id, ncclGetUniqueId, (struct nccl_id * id))                                                             \
	X(open, ncclCommInitRank, (nccl_comm * comm, int ranks, struct nccl_id id, int rank))                          \
	X(close, ncclCommDestroy, (nccl_comm comm))                                                                    \
	X(broadcast, ncclBroadcast,                                                                                    \
	  (const void *from, void *to, size_t count, int type, int root, nccl_comm comm, gpu_stream stream))           \
	X(gather, ncclAllGather,                                                                                       \
	  (const void *from, void *to, size_t count, int type, nccl_comm comm, gpu_stream stream))

/* What came with 2.28; NULL where there is none. */
#define NCCL_LATE_FUNCTIONS(X)                                                                                         \
	X(open_configured, ncclCommInitRankConfig,                                                                     \
	  (nccl_comm * comm, int ranks, struct nccl_id id, int rank, struct nccl_config *config))                      \
	X(allocate, ncclMemAlloc, (void **memory, size_t bytes))                                                       \
	X(free, ncclMemFree, (void *memory))                                                                           \
	X(window_open, ncclCommWindowRegister,                                                                         \
	  (nccl_comm comm, void *memory, size_t bytes, nccl_window *window, int flags))                                \
	X(window_close, ncclCommWindowDeregister, (nccl_comm comm, nccl_window window))

struct nccl {
	void *library;
	int number; /* 22809 is 2.28.9 */
#define NCCL_MEMBER(member, symbol, parameters) int(*member) parameters;
	NCCL_FUNCTIONS(NCCL_MEMBER)
	NCCL_LATE_FUNCTIONS(NCCL_MEMBER)
#undef NCCL_MEMBER
	const char *(*text)(int result);
	const char *(*last_error)(nccl_comm comm);
};

/** False, with the reason in @p why, where it cannot be had; nothing is open then. */
bool nccl_load(struct nccl *nccl, char *why, size_t bytes);
void nccl_unload(struct nccl *nccl);
/** For one whose collectives, where they can, need no SM. */
struct nccl_config nccl_copy_engine_config(void);
/** True for NCCL_OK; else @p why says what failed, in NCCL's words. */
bool nccl_checked(const struct nccl *nccl, int result, const char *what, char *why, size_t bytes);

#endif
