/* SPDX-License-Identifier: Apache-2.0
 *
 * dequant.h - stored values to floats.
 */
#ifndef DEQUANT_H
#define DEQUANT_H

#include <stddef.h>

#include "gguf.h"

/** @p count values, whole blocks, from @p from (gguf_encoded_bytes of them) to @p to. The two must not overlap. */
void dequantise(gguf_encoding encoding, const void *from, float *to, size_t count);

#endif
