/* SPDX-License-Identifier: Apache-2.0
 *
 * options.c - see options.h.
 */
#include "options.h"

/* A struct that is pointed to; NULL stays NULL. */
static lshard_status follow(const void **theirs, void *ours, size_t known, const char *type, lshard_error *error)
{
	const void *given = *theirs;

	if (!given)
		return LSHARD_OK;
	*theirs = ours;
	return lshard__sized_take(ours, known, given, type, error);
}

static lshard_status follow_callbacks(struct group_options *taken, lshard_error *error)
{
	const void *callbacks = taken->given.callbacks;
	const void *device;
	lshard_status status =
		follow(&callbacks, &taken->callbacks, sizeof taken->callbacks, "lshard_callbacks", error);

	taken->given.callbacks = callbacks;
	device = taken->callbacks.device;
	if (status >= 0)
		status = follow(&device, &taken->device, sizeof taken->device, "lshard_device_callbacks", error);
	taken->callbacks.device = device;
	return status;
}

lshard_status options_take_group(struct group_options *taken, const lshard_group_options *theirs, lshard_error *error)
{
	const void *bootstrap, *allocator;
	lshard_status status;

	*taken = (struct group_options){.given = LSHARD_GROUP_OPTIONS_INIT};
	status = lshard__sized_take(&taken->given, sizeof taken->given, theirs, "lshard_group_options", error);
	bootstrap = taken->given.bootstrap;
	allocator = taken->given.allocator;
	if (status >= 0)
		status = follow(&bootstrap, &taken->bootstrap, sizeof taken->bootstrap, "lshard_bootstrap", error);
	if (status >= 0)
		status = follow(&allocator, &taken->allocator, sizeof taken->allocator, "lshard_allocator", error);
	taken->given.bootstrap = bootstrap;
	taken->given.allocator = allocator;
	return status < 0 ? status : follow_callbacks(taken, error);
}

lshard_status options_take_series(struct series_options *taken, const lshard_series_options *theirs,
				  lshard_error *error)
{
	const void *source;
	lshard_status status;

	*taken = (struct series_options){.given = LSHARD_SERIES_OPTIONS_INIT};
	status = lshard__sized_take(&taken->given, sizeof taken->given, theirs, "lshard_series_options", error);
	source = taken->given.memory_source;
	if (status >= 0)
		status = follow(&source, &taken->memory_source, sizeof taken->memory_source, "lshard_memory_source",
				error);
	taken->given.memory_source = source;
	return status;
}

/* ---- Arrays ---------------------------------------------------------------------------------------------------- */

static const void *at(const void *first, uint32_t index, size_t bytes)
{
	return (const char *)first + index * bytes;
}

lshard_status options_check_tensor(const lshard_series_options *options, uint32_t index, lshard_error *error)
{
	const size_t bytes = options->tensor_struct_size;

	return lshard__sized_check(at(options->tensors, index, bytes), bytes, sizeof(lshard_tensor), "lshard_tensor",
				   error);
}

lshard_status options_check_pattern(const lshard_series_options *options, uint32_t index, lshard_error *error)
{
	const size_t bytes = options->poison_pattern_struct_size;

	if (!options->poison_patterns)
		return LSHARD_OK;
	return lshard__sized_check(at(options->poison_patterns, index, bytes), bytes, sizeof(lshard_poison_pattern),
				   "lshard_poison_pattern", error);
}

lshard_tensor options_tensor(const lshard_series_options *options, uint32_t index)
{
	const size_t bytes = options->tensor_struct_size;
	lshard_tensor tensor = {NULL, 0, 0, LSHARD_STRIPE_BYTES, 0, 0};

	lshard__sized_copy(&tensor, sizeof tensor, at(options->tensors, index, bytes), bytes);
	return tensor;
}

lshard_poison_pattern options_pattern(const lshard_series_options *options, uint32_t index)
{
	const size_t bytes = options->poison_pattern_struct_size;
	lshard_poison_pattern pattern = {NULL, 0};

	if (options->poison_patterns)
		lshard__sized_copy(&pattern, sizeof pattern, at(options->poison_patterns, index, bytes), bytes);
	return pattern;
}
