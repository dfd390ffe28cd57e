/* SPDX-License-Identifier: Apache-2.0
 *
 * blocks.c - puts the linears of the blocks where they are computed from.
 * Knows: layershard's public interface, and where linears lie in the file. Does not know: what they are multiplied
 * with.
 *
 * Dequantising is the series' post-processing: it runs once per layer, on the layer's source, straight into the memory
 * that is shared; the only other buffer is one tensor's stored bytes. Replicated, the same callback fills private
 * memory.
 */
#include "blocks.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dequant.h"

#define ALIGNMENT 256u /* as a series aligns, so that the arithmetic takes the same path everywhere */

#define NAME_BYTES 64u /* of a series' tensor, its end included */

/* What the post-process callback needs, and what it found wrong: commit cannot say that in words. */
struct filling {
	gguf *file;
	const struct llama_config *config;
	void *stored; /* one tensor as the file has it */
	engine_error error;
	lshard_status status;
};

static size_t padded(size_t bytes)
{
	return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

uint64_t blocks_layer_bytes(const struct llama_config *config)
{
	uint64_t bytes = 0;
	uint32_t linear;

	for (linear = 0; linear < LINEARS; linear++)
		bytes += padded(llama_linear_bytes(config, linear));
	return bytes;
}

static const gguf_tensor *find_linear(const gguf *file, uint32_t layer, uint32_t linear)
{
	char name[TENSOR_NAME_BYTES];

	llama_block_tensor_name(layer, llama_linear_name(linear), name);
	return gguf_find_tensor(file, name); /* there: llama_config_read has seen it */
}

static int fill_layer(void *user, uint32_t layer, void *const *tensors)
{
	struct filling *const filling = user;
	uint32_t linear;

	for (linear = 0; linear < LINEARS; linear++) {
		const gguf_tensor *const tensor = find_linear(filling->file, layer, linear);

		filling->status = gguf_read_tensor(filling->file, tensor, 0, filling->stored, (size_t)tensor->bytes,
						   &filling->error);
		if (filling->status < 0)
			return 1;
		dequantise(tensor->encoding, filling->stored, tensors[linear], (size_t)tensor->values);
	}
	return 0;
}

static size_t largest_stored(const gguf *file, const struct llama_config *config)
{
	uint64_t largest = 0;
	uint32_t layer, linear;

	for (layer = 0; layer < config->layers; layer++)
		for (linear = 0; linear < LINEARS; linear++) {
			const uint64_t bytes = find_linear(file, layer, linear)->bytes;

			if (bytes > largest)
				largest = bytes;
		}
	return (size_t)largest;
}

/* ---- Replicated ------------------------------------------------------------------------------------------------ */

static lshard_status allocate_layer(struct blocks *blocks, const struct llama_config *config, uint32_t layer)
{
	float **const addresses = blocks->addresses + (size_t)layer * LINEARS;
	uint8_t *const memory = aligned_alloc(ALIGNMENT, (size_t)blocks_layer_bytes(config));
	size_t offset = 0;
	uint32_t linear;

	if (!memory)
		return LSHARD_ERR_NO_MEMORY;
	blocks->owned[layer] = (float *)(void *)memory;
	for (linear = 0; linear < LINEARS; linear++) {
		addresses[linear] = (float *)(void *)(memory + offset);
		offset += padded(llama_linear_bytes(config, linear));
	}
	return LSHARD_OK;
}

static lshard_status fill_private(struct blocks *blocks, struct filling *filling, engine_error *error)
{
	uint32_t layer, linear;

	blocks->owned = calloc(blocks->layers, sizeof *blocks->owned);
	if (!blocks->owned)
		return engine_fail(error, LSHARD_ERR_NO_MEMORY, "%s: no memory for its layers",
				   gguf_name(filling->file));
	for (layer = 0; layer < blocks->layers; layer++) {
		void *tensors[LINEARS];

		if (allocate_layer(blocks, filling->config, layer) < 0)
			return engine_fail(error, LSHARD_ERR_NO_MEMORY,
					   "%s: no memory for layer %" PRIu32 " of %" PRIu32 " (%" PRIu64 " bytes)",
					   gguf_name(filling->file), layer, blocks->layers,
					   blocks_layer_bytes(filling->config));
		for (linear = 0; linear < LINEARS; linear++)
			tensors[linear] = blocks->addresses[(size_t)layer * LINEARS + linear];
		if (fill_layer(filling, layer, tensors) != 0)
			return engine_fail(error, filling->status, "%s", filling->error.text);
	}
	return LSHARD_OK;
}

/* ---- Sharded --------------------------------------------------------------------------------------------------- */

/* The tensors' names say which model they are of: ranks that were given different ones disagree on them, and the
 * library says so before a byte is shared. */
static void describe_tensors(const struct llama_config *config, uint64_t fingerprint, char names[LINEARS][NAME_BYTES],
			     lshard_tensor tensors[LINEARS])
{
	uint32_t linear;

	memset(tensors, 0, LINEARS * sizeof *tensors);
	for (linear = 0; linear < LINEARS; linear++) {
		(void)snprintf(names[linear], NAME_BYTES, "%s of model %016" PRIx64, llama_linear_name(linear),
			       fingerprint);
		tensors[linear].name = names[linear];
		tensors[linear].bytes = llama_linear_bytes(config, linear);
		tensors[linear].alignment = ALIGNMENT;
		tensors[linear].stripe = LSHARD_STRIPE_BYTES;
	}
}

static lshard_status create_series(struct blocks *blocks, const struct llama_config *config,
				   const engine_options *options, uint64_t fingerprint, engine_error *error)
{
	lshard_series_options series = LSHARD_SERIES_OPTIONS_INIT;
	lshard_tensor tensors[LINEARS];
	char names[LINEARS][NAME_BYTES];
	lshard_status status;

	describe_tensors(config, fingerprint, names, tensors);
	series.name = "blocks";
	series.layer_count = config->layers;
	series.tensors = tensors;
	series.tensor_count = LINEARS;
	series.prefetch = options->prefetch;
	series.placement = options->placement;
	series.resident_bytes = options->resident_bytes;
	status = lshard_series_create(options->group, &series, &blocks->series);
	return status < 0 ? engine_fail(error, status, "%s", lshard_group_error(options->group)) : status;
}

static lshard_status find_addresses(struct blocks *blocks, engine_error *error)
{
	uint32_t layer, linear;

	for (layer = 0; layer < blocks->layers; layer++)
		for (linear = 0; linear < LINEARS; linear++) {
			void *address = NULL;
			const lshard_status status = lshard_series_address(blocks->series, layer, linear, &address);

			if (status < 0)
				return engine_fail(error, status, "%s", lshard_series_error(blocks->series));
			blocks->addresses[(size_t)layer * LINEARS + linear] = address;
		}
	return LSHARD_OK;
}

static lshard_status fill_series(struct blocks *blocks, struct filling *filling, engine_error *error)
{
	lshard_status status = find_addresses(blocks, error);

	if (status < 0)
		return status;
	status = lshard_series_commit(blocks->series, fill_layer, filling);
	if (filling->status < 0) /* our own callback failed: its words say more */
		return engine_fail(error, filling->status, "%s", filling->error.text);
	return status < 0 ? engine_fail(error, status, "%s", lshard_series_error(blocks->series)) : status;
}

/* ---- Both ------------------------------------------------------------------------------------------------------ */

lshard_status blocks_open(struct blocks *blocks, const struct llama_config *config, gguf *file,
			  const engine_options *options, uint64_t fingerprint, engine_error *error)
{
	struct filling filling = {.file = file, .config = config};
	lshard_status status;

	memset(blocks, 0, sizeof *blocks);
	blocks->layers = config->layers;
	blocks->addresses = calloc((size_t)config->layers * LINEARS, sizeof *blocks->addresses);
	filling.stored = malloc(largest_stored(file, config));
	if (!blocks->addresses || !filling.stored) {
		status = engine_fail(error, LSHARD_ERR_NO_MEMORY, "%s: no memory to load its layers", gguf_name(file));
	} else if (!options->group) {
		status = fill_private(blocks, &filling, error);
	} else {
		status = create_series(blocks, config, options, fingerprint, error);
		if (status >= 0)
			status = fill_series(blocks, &filling, error);
	}
	free(filling.stored);
	if (status < 0)
		blocks_close(blocks);
	return status;
}

void blocks_close(struct blocks *blocks)
{
	uint32_t layer;

	(void)lshard_series_destroy(blocks->series); /* whatever it says, nothing can be done about it here */
	for (layer = 0; blocks->owned && layer < blocks->layers; layer++)
		free(blocks->owned[layer]);
	free(blocks->owned);
	free(blocks->addresses);
	memset(blocks, 0, sizeof *blocks);
}

lshard_status blocks_enter(struct blocks *blocks, uint32_t layer, engine_error *error)
{
	lshard_status status;

	if (!blocks->series)
		return LSHARD_OK;
	status = lshard_reach(blocks->series, layer, NULL);
	if (status >= 0)
		status = lshard_wait(blocks->series, layer, NULL);
	return status < 0 ? engine_fail(error, status, "%s", lshard_series_error(blocks->series)) : LSHARD_OK;
}

const float *blocks_linear(const struct blocks *blocks, uint32_t layer, uint32_t linear)
{
	return blocks->addresses[(size_t)layer * LINEARS + linear];
}
