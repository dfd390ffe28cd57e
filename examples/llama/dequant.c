/* SPDX-License-Identifier: Apache-2.0
 *
 * dequant.c - stored values to floats. Plain loops that a compiler turns into vector code; the values are exact in
 * float but for the one product and sum of each, so every rank gets the same bits whoever does it.
 */
#include "dequant.h"

#include <string.h>

#define BLOCK 32

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors are read as they lie in the file");

static float from_bits(uint32_t bits)
{
	float value;

	memcpy(&value, &bits, sizeof value);
	return value;
}

/* IEEE half to single. The exponent is moved by a product with a power of two, which is right for subnormals too. */
static float from_half(uint16_t half)
{
	const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
	const uint32_t magnitude = half & 0x7fffu;
	uint32_t bits;
	float value;

	if (magnitude >= 0x7c00u) /* infinities and NaN */
		return from_bits(sign | 0x7f800000u | magnitude << 13);
	value = from_bits(magnitude << 13) * 0x1p112f;
	memcpy(&bits, &value, sizeof bits);
	return from_bits(sign | bits);
}

static float half_at(const uint8_t *at)
{
	return from_half((uint16_t)(at[0] | at[1] << 8));
}

static void dequantise_f16(const uint8_t *restrict from, float *restrict to, size_t count)
{
	size_t i;

	for (i = 0; i < count; i++)
		to[i] = half_at(from + 2 * i);
}

/* A block: scale, 32 signed bytes. */
static void dequantise_q8_0(const uint8_t *restrict from, float *restrict to, size_t count)
{
	size_t block, i;

	for (block = 0; block < count / BLOCK; block++) {
		const float scale = half_at(from);
		const int8_t *const values = (const int8_t *)from + 2;

		for (i = 0; i < BLOCK; i++)
			to[i] = (float)values[i] * scale;
		from += 2 + BLOCK;
		to += BLOCK;
	}
}

/* A block: scale, minimum, 32 nibbles: the low ones are the first 16 values, the high ones the rest. */
static void dequantise_q4_1(const uint8_t *restrict from, float *restrict to, size_t count)
{
	size_t block, i;

	for (block = 0; block < count / BLOCK; block++) {
		const float scale = half_at(from);
		const float minimum = half_at(from + 2);

		for (i = 0; i < BLOCK / 2; i++) {
			to[i] = (float)(from[4 + i] & 15) * scale + minimum;
			to[i + BLOCK / 2] = (float)(from[4 + i] >> 4) * scale + minimum;
		}
		from += 4 + BLOCK / 2;
		to += BLOCK;
	}
}

void dequantise(gguf_encoding encoding, const void *from, float *to, size_t count)
{
	switch (encoding) {
	case GGUF_ENCODING_F32:
		memcpy(to, from, count * sizeof *to);
		break;
	case GGUF_ENCODING_F16:
		dequantise_f16(from, to, count);
		break;
	case GGUF_ENCODING_Q8_0:
		dequantise_q8_0(from, to, count);
		break;
	case GGUF_ENCODING_Q4_1:
		dequantise_q4_1(from, to, count);
		break;
	}
}
