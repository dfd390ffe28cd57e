/* SPDX-License-Identifier: Apache-2.0
 *
 * blas.c - see blas.h.
 */
#include "blas.h"

#include <stdlib.h>

/* OpenBLAS's own call; absent in other implementations. Weak, so that any CBLAS will link. */
extern void openblas_set_num_threads(int threads) __attribute__((weak));

/* Ranks share a machine's cores, and OpenBLAS would take all of them in each: n ranks, n times too many threads. */
void blas_use_threads(int threads)
{
	const char *const set = getenv("OPENBLAS_NUM_THREADS");

	if (threads == 0 && set && *set)
		return; /* OpenBLAS has read it itself */
	if (openblas_set_num_threads)
		openblas_set_num_threads(threads > 0 ? threads : 1);
}
