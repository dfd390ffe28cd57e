/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_blas.c - see gpu_blas.h.
 */
#include "gpu_blas.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define VARIABLE        "LAYERSHARD_CUBLAS_SO_PATH"
#define WORKSPACE_BYTES (32u << 20) /* what cuBLAS recommends for Hopper */

enum { BLAS_OK = 0, BLAS_PLAIN = 0, BLAS_TRANSPOSED = 1, BLAS_BFLOAT16 = 14, BLAS_SUMS_FLOAT32 = 68, BLAS_ANY = -1 };

/* X(member, symbol, parameters); every one returns a cublasStatus_t */
#define BLAS_FUNCTIONS(X)                                                                                              \
	X(create, cublasCreate_v2, (void **handle))                                                                    \
	X(destroy, cublasDestroy_v2, (void *handle))                                                                   \
	X(version, cublasGetVersion_v2, (void *handle, int *version))                                                  \
	X(set_stream, cublasSetStream_v2, (void *handle, gpu_stream stream))                                           \
	X(set_workspace, cublasSetWorkspace_v2, (void *handle, void *workspace, size_t bytes))                         \
	X(gemm, cublasGemmEx,                                                                                          \
	  (void *handle, int transpose_a, int transpose_b, int rows, int columns, int inner, const void *alpha,        \
	   const void *a, int a_type, int a_pitch, const void *b, int b_type, int b_pitch, const void *beta, void *c,  \
	   int c_type, int c_pitch, int compute, int algorithm))

struct gpu_blas_calls {
	void *light; /* libcublasLt, which cuBLAS needs */
	void *library;
#define BLAS_MEMBER(member, symbol, parameters) int(*member) parameters;
	BLAS_FUNCTIONS(BLAS_MEMBER)
#undef BLAS_MEMBER
};

static const struct {
	const char *symbol;
	size_t member;
} entries[] = {
#define BLAS_ENTRY(member, symbol, parameters) {#symbol, offsetof(struct gpu_blas_calls, member)},
	BLAS_FUNCTIONS(BLAS_ENTRY)
#undef BLAS_ENTRY
};

static lshard_status blas_failed(const struct gpu_blas *blas, int result, const char *what)
{
	snprintf(blas->gpu->error, sizeof blas->gpu->error, "GPU %d: %s: cuBLAS returned %d", blas->gpu->ordinal, what,
		 result);
	return LSHARD_ERR_TRANSPORT;
}

/* ---- The library --------------------------------------------------------------------------------------------- */

/* Beside a libcublas that is not where the loader looks lies the libcublasLt it needs; loaded before, it is found. */
static void load_light(struct gpu_blas_calls *calls, const char *path)
{
	const char *name = strstr(path, "libcublas.so");
	char beside[4096];

	if (!name || name == path)
		return;
	snprintf(beside, sizeof beside, "%.*slibcublasLt%s", (int)(name - path), path, name + strlen("libcublas"));
	calls->light = dlopen(beside, RTLD_NOW | RTLD_GLOBAL);
}

static bool load_from(struct gpu_blas_calls *calls, const char *path)
{
	load_light(calls, path);
	calls->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!calls->library && calls->light) {
		dlclose(calls->light);
		calls->light = NULL;
	}
	return calls->library != NULL;
}

static lshard_status load_library(struct gpu_blas *blas)
{
	static const char *const places[] = {"libcublas.so.13", "libcublas.so.12",
					     "/usr/local/cuda/lib64/libcublas.so.13",
					     "/usr/local/cuda/lib64/libcublas.so.12"};
	const char *path = getenv(VARIABLE);
	const bool given = path && *path;
	const size_t count = given ? 1 : sizeof places / sizeof places[0];

	for (size_t i = 0; i < count; i++)
		if (load_from(blas->calls, given ? path : places[i]))
			return LSHARD_OK;
	snprintf(blas->gpu->error, sizeof blas->gpu->error,
		 "cuBLAS cannot be loaded: %s; " VARIABLE " can name its file", dlerror());
	return LSHARD_ERR_NOT_SUPPORTED;
}

static lshard_status find_entries(struct gpu_blas *blas)
{
	for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++) {
		void *found = dlsym(blas->calls->library, entries[i].symbol);

		if (!found) {
			snprintf(blas->gpu->error, sizeof blas->gpu->error, "cuBLAS has no %s: 12.0 or later is needed",
				 entries[i].symbol);
			return LSHARD_ERR_NOT_SUPPORTED;
		}
		memcpy((char *)blas->calls + entries[i].member, &found, sizeof found);
	}
	return LSHARD_OK;
}

static lshard_status open_handle(struct gpu_blas *blas)
{
	lshard_status status;
	int result = blas->calls->create(&blas->handle);

	if (result != BLAS_OK)
		return blas_failed(blas, result, "cublasCreate");
	result = blas->calls->version(blas->handle, &blas->version);
	if (result != BLAS_OK)
		return blas_failed(blas, result, "cublasGetVersion");
	status = gpu_allocate(blas->gpu, WORKSPACE_BYTES, &blas->workspace);
	return status;
}

lshard_status gpu_blas_open(struct gpu_blas *blas, struct gpu *gpu)
{
	lshard_status status;

	memset(blas, 0, sizeof *blas);
	blas->gpu = gpu;
	blas->calls = calloc(1, sizeof *blas->calls);
	if (!blas->calls) {
		snprintf(gpu->error, sizeof gpu->error, "no memory for cuBLAS's entry points");
		return LSHARD_ERR_NO_MEMORY;
	}
	status = load_library(blas);
	if (status == LSHARD_OK)
		status = find_entries(blas);
	if (status == LSHARD_OK)
		status = open_handle(blas);
	if (status != LSHARD_OK)
		gpu_blas_close(blas);
	return status;
}

void gpu_blas_close(struct gpu_blas *blas)
{
	if (!blas->calls)
		return;
	if (blas->handle)
		blas->calls->destroy(blas->handle);
	gpu_free(blas->gpu, blas->workspace);
	if (blas->calls->library)
		dlclose(blas->calls->library);
	if (blas->calls->light)
		dlclose(blas->calls->light);
	free(blas->calls);
	memset(blas, 0, sizeof *blas);
}

/* ---- Products ------------------------------------------------------------------------------------------------ */

/* Setting a stream takes the workspace away again. */
static lshard_status use_stream(struct gpu_blas *blas, gpu_stream stream)
{
	int result = blas->calls->set_stream(blas->handle, stream);

	if (result != BLAS_OK)
		return blas_failed(blas, result, "cublasSetStream");
	result = blas->calls->set_workspace(blas->handle, (void *)(uintptr_t)blas->workspace, WORKSPACE_BYTES);
	return result == BLAS_OK ? LSHARD_OK : blas_failed(blas, result, "cublasSetWorkspace");
}

/*
 * cuBLAS counts by columns: our [tokens][outs] is its outs x tokens, our [outs][ins] its ins x outs, to be transposed.
 */
lshard_status gpu_blas_linear(struct gpu_blas *blas, gpu_stream stream, gpu_address out, gpu_address in,
			      gpu_address weight, int tokens, int outs, int ins)
{
	const float one = 1.0f;
	const float zero = 0.0f;
	const lshard_status status = use_stream(blas, stream);
	int result;

	if (status != LSHARD_OK)
		return status;
	result = blas->calls->gemm(blas->handle, BLAS_TRANSPOSED, BLAS_PLAIN, outs, tokens, ins, &one,
				   (const void *)(uintptr_t)weight, BLAS_BFLOAT16, ins, (const void *)(uintptr_t)in,
				   BLAS_BFLOAT16, ins, &zero, (void *)(uintptr_t)out, BLAS_BFLOAT16, outs,
				   BLAS_SUMS_FLOAT32, BLAS_ANY);
	return result == BLAS_OK ? LSHARD_OK : blas_failed(blas, result, "cublasGemmEx");
}
