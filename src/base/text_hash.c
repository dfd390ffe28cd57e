/* SPDX-License-Identifier: Apache-2.0
 *
 * text_hash.c - FNV-1a.
 */
#include "text_hash.h"

uint64_t lshard__text_hash(const char *text)
{
	uint64_t hash = 14695981039346656037u;

	for (; *text; text++)
		hash = (hash ^ (unsigned char)*text) * 1099511628211u;
	return hash;
}
