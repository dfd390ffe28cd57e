/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_weights.h - random bfloat16 numbers that can be made again: weights, activations. Knows: arithmetic.
 */
#ifndef BENCH_GEMM_WEIGHTS_H
#define BENCH_GEMM_WEIGHTS_H

#include <stdint.h>

/* What numbers are of: no two layers and no two uses have the same. */
enum gemm_use { GEMM_UP, GEMM_DOWN, GEMM_INPUT };

/**
 * Fills @p bytes (a multiple of 8) with signed numbers of four magnitudes, like weights of a model and unlike zeros,
 * which compute faster. A sum of @p terms products with numbers of size 1 is of size 1.
 */
void gemm_fill(void *to, uint64_t bytes, enum gemm_use use, uint32_t layer, uint32_t terms);

#endif
