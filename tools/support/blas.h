/* SPDX-License-Identifier: Apache-2.0
 *
 * blas.h - how many threads a CBLAS computes with. Knows: OpenBLAS's own call. Does not know: products.
 */
#ifndef BLAS_H
#define BLAS_H

/** In this process; 0: one, unless OPENBLAS_NUM_THREADS says how many. Without effect on other implementations. */
void blas_use_threads(int threads);

#endif
