/* SPDX-License-Identifier: Apache-2.0
 *
 * options.h - what a program has asked for, as this library knows it, whatever header the program was built with. Knows
 * the public structs; nothing of what they mean.
 */
#ifndef LAYERSHARD_OPTIONS_H
#define LAYERSHARD_OPTIONS_H

#include "sized.h"

#include <layershard/callbacks.h>

struct group_options {
	lshard_group_options given; /* its pointers lead to the members below, or are NULL */
	lshard_bootstrap bootstrap;
	lshard_allocator allocator;
	lshard_callbacks callbacks;
	lshard_device_callbacks device;
};

struct series_options {
	lshard_series_options given; /* tensors and patterns are still the program's */
	lshard_memory_source memory_source;
};

/* INVALID with a text that begins with struct_size. Also then error and error_bytes are the program's, or NULL and 0.
 */
lshard_status options_take_group(struct group_options *taken, const lshard_group_options *theirs, lshard_error *error);
lshard_status options_take_series(struct series_options *taken, const lshard_series_options *theirs,
				  lshard_error *error);

lshard_status options_check_tensor(const lshard_series_options *options, uint32_t index, lshard_error *error);
lshard_status options_check_pattern(const lshard_series_options *options, uint32_t index, lshard_error *error);
/* After that check. */
lshard_tensor options_tensor(const lshard_series_options *options, uint32_t index);
/* Where there are none: that of bytes of 0xff. */
lshard_poison_pattern options_pattern(const lshard_series_options *options, uint32_t index);

#endif
