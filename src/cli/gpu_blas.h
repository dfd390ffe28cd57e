/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_blas.h - matrix products by cuBLAS, loaded when they are asked for. Knows: cuBLAS's binary interface. Does not
 * know: what the matrices are of.
 *
 * Found as LAYERSHARD_CUBLAS_SO_PATH names it; else libcublas.so.13, then .12, where the loader looks, then in
 * /usr/local/cuda/lib64.
 */
#ifndef GPU_BLAS_H
#define GPU_BLAS_H

#include "gpu.h"

struct gpu_blas_calls; /* cuBLAS's entry points */

struct gpu_blas {
	struct gpu *gpu; /* outlives it */
	struct gpu_blas_calls *calls;
	void *handle;
	gpu_address workspace; /* its own, so that products can be captured */
	int version;           /* 130000 is 13.0.0 */
};

/**
 * On failure gpu->error is set and nothing is left open.
 * @return OK; NOT_SUPPORTED without cuBLAS; NO_MEMORY; TRANSPORT.
 */
lshard_status gpu_blas_open(struct gpu_blas *blas, struct gpu *gpu);
void gpu_blas_close(struct gpu_blas *blas);

/**
 * out[tokens][outs] = in[tokens][ins] * transpose of weight[outs][ins], in stream order: a linear layer as PyTorch
 * stores it. Row by row without gaps, bfloat16, sums in float32.
 */
lshard_status gpu_blas_linear(struct gpu_blas *blas, gpu_stream stream, gpu_address out, gpu_address in,
			      gpu_address weight, int tokens, int outs, int ins);

#endif
