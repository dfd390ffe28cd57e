/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_data.c - layers whose every byte follows from layer and offset, so that what arrives can be checked anywhere
 * without a second copy to compare with. They are floats of 0.5 to 1 with either sign: a product of them is a number,
 * and takes as long as any other. Knows: the public header. Does not know: ranks, variants, time.
 */
#include "bench.h"

#define LINE_WORDS (BENCH_LINE_BYTES / sizeof(uint64_t))

/* Of two floats: signs and fractions. */
#define RANDOM_BITS UINT64_C(0x807fffff807fffff)
#define ONE_HALF    UINT64_C(0x3f0000003f000000)

static uint64_t expected_word(uint32_t layer, uint64_t index)
{
	uint64_t state = ((uint64_t)layer + 1) * 0xd1342543de82ef95u + index * 0x9e3779b97f4a7c15u;

	return (bench_random(&state) & RANDOM_BITS) | ONE_HALF;
}

static bool word_is_right(const void *layer_bytes, uint32_t layer, uint64_t index)
{
	const uint64_t *words = layer_bytes;

	return words[index] == expected_word(layer, index);
}

static bool words_are_right(const void *layer_bytes, uint32_t layer, uint64_t first, uint64_t count)
{
	for (uint64_t index = first; index < first + count; index++)
		if (!word_is_right(layer_bytes, layer, index))
			return false;
	return true;
}

void bench_fill(void *layer_bytes, uint64_t bytes, uint32_t layer)
{
	uint64_t *words = layer_bytes;

	for (uint64_t index = 0; index < bytes / sizeof *words; index++)
		words[index] = expected_word(layer, index);
}

bool bench_probe(const void *layer_bytes, uint64_t bytes, uint32_t layer, uint64_t pick)
{
	const uint64_t words = bytes / sizeof(uint64_t);

	return words_are_right(layer_bytes, layer, 0, LINE_WORDS) &&
	       words_are_right(layer_bytes, layer, words - LINE_WORDS, LINE_WORDS) &&
	       word_is_right(layer_bytes, layer, pick % words);
}

bool bench_compare(const void *layer_bytes, uint64_t bytes, uint32_t layer)
{
	return words_are_right(layer_bytes, layer, 0, bytes / sizeof(uint64_t));
}

int bench_post_process(void *user, uint32_t layer, void *const *tensors)
{
	bench_fill(tensors[0], *(const uint64_t *)user, layer);
	return 0;
}

lshard_status bench_compare_series(lshard_series *series, uint32_t layers, uint64_t bytes, int64_t *wrong)
{
	lshard_status status = LSHARD_OK;

	*wrong = -1;
	for (uint32_t layer = 0; layer < layers && *wrong < 0; layer++) {
		void *address = NULL;

		status = lshard_reach(series, layer, NULL);
		if (status == LSHARD_OK)
			status = lshard_wait(series, layer, NULL);
		if (status == LSHARD_OK)
			status = lshard_series_address(series, layer, 0, &address);
		if (status != LSHARD_OK)
			return status;
		if (!bench_compare(address, bytes, layer))
			*wrong = (int64_t)layer;
	}
	return LSHARD_OK;
}
