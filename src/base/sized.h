/* SPDX-License-Identifier: Apache-2.0
 *
 * sized.h - structs that pass between a program and the library, where either may have been built with the later
 * header. They begin with struct_size, or lie in an array that says how far one is from the next; later headers add
 * members behind the last one and its padding, so that the size tells them apart. Knows no struct.
 */
#ifndef LAYERSHARD_SIZED_H
#define LAYERSHARD_SIZED_H

#include <layershard/transport.h>

/*
 * @p given bytes of a struct of which @p known are this library's: INVALID, with a text, where that is no size, or a
 * member is set of which the library knows nothing. @p error may be NULL.
 */
lshard_status lshard__sized_check(const void *theirs, size_t given, size_t known, const char *type,
				  lshard_error *error);
/* What both know of it. The rest of @p ours stays. */
void lshard__sized_copy(void *ours, size_t known, const void *theirs, size_t given);

/*
 * Both, for a struct that begins with struct_size. @p ours holds defaults; where only its tail was refused, what both
 * know is there nevertheless.
 */
lshard_status lshard__sized_take(void *ours, size_t known, const void *theirs, const char *type, lshard_error *error);
/* The other way round: fills an out-parameter of the program's. What the library knows nothing of is 0 there. */
lshard_status lshard__sized_give(void *theirs, const void *ours, size_t known, const char *type, lshard_error *error);

#endif
