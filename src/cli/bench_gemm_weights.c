/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_weights.c - see bench_gemm_weights.h.
 */
#include "bench_gemm_weights.h"
#include "bench.h"

#include <math.h>

#define EACH(number)    ((number)*0x0001000100010001u) /* in all four numbers of a word */
#define SIGN_FRACTION   EACH(UINT64_C(0x807f))
#define EXPONENT_BITS   EACH(UINT64_C(0x0180)) /* the two lowest of the exponent */
#define EXPONENT_BIAS   127.0
#define SQUARE_OF_1     (7.0 / 3.0)                                         /* mean square of 1.fraction */
#define SQUARE_OF_SCALE ((1.0 + 1.0 / 4.0 + 1.0 / 16.0 + 1.0 / 64.0) / 4.0) /* of 1, 1/2, 1/4, 1/8 */

static uint64_t largest_exponent(uint32_t terms)
{
	const double exponent = -log2((double)terms * SQUARE_OF_1 * SQUARE_OF_SCALE) / 2;

	return (uint64_t)lround(exponent + EXPONENT_BIAS);
}

void gemm_fill(void *to, uint64_t bytes, enum gemm_use use, uint32_t layer, uint32_t terms)
{
	const uint64_t exponents = EACH(largest_exponent(terms) << 7);
	uint64_t state = ((uint64_t)layer * 3 + (uint64_t)use + 1) * 0xd1342543de82ef95u;
	uint64_t *words = to;

	for (uint64_t i = 0; i < bytes / sizeof *words; i++) {
		const uint64_t random = bench_random(&state);

		words[i] = (random & SIGN_FRACTION) | (exponents - (random & EXPONENT_BITS));
	}
}
