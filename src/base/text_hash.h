/* SPDX-License-Identifier: Apache-2.0
 *
 * text_hash.h - 64 bits that tell texts apart; the same in every process. Knows nothing else.
 */
#ifndef LAYERSHARD_TEXT_HASH_H
#define LAYERSHARD_TEXT_HASH_H

#include <stdint.h>

uint64_t lshard__text_hash(const char *text);

#endif
