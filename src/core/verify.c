/* SPDX-License-Identifier: Apache-2.0
 *
 * verify.c - every rank hashes what it stores, and compares what it sees of the others with their hashes. Host memory
 * only.
 */
#include "internal.h"

#include <string.h>

#define HASH_BEGIN UINT64_C(0x9e3779b97f4a7c15)

/*
 * A 64-bit hash against accidents (a flipped bit, a stale or torn window), not against malice: each 8-byte word is
 * mixed in by the finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
 */
static uint64_t mix(uint64_t hash, uint64_t word)
{
	hash = (hash ^ word) + HASH_BEGIN;
	hash = (hash ^ (hash >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	hash = (hash ^ (hash >> 27)) * UINT64_C(0x94d049bb133111eb);
	return hash ^ (hash >> 31);
}

static uint64_t hash_bytes(uint64_t hash, const uint8_t *bytes, uint64_t count)
{
	uint64_t word;

	for (; count >= sizeof word; count -= sizeof word, bytes += sizeof word) {
		memcpy(&word, bytes, sizeof word);
		hash = mix(hash, word);
	}
	word = 0;
	memcpy(&word, bytes, (size_t)count);
	return mix(hash, word ^ count << 56);
}

/* Of what @p rank keeps of the layer: @p base is its share, or the whole layer as seen here. */
static uint64_t hash_pieces(const struct layout *layout, uint32_t position, int32_t rank, const uint8_t *base,
			    bool in_share)
{
	uint64_t hash = HASH_BEGIN;

	for (uint32_t index = layout->first_piece[position]; index < layout->first_piece[position + 1]; index++) {
		const lshard_piece *piece = &layout->pieces[index];
		const uint64_t offset = in_share ? piece->share_offset : piece->layer_offset;
		const uint64_t pitch = in_share ? piece->share_pitch : piece->layer_pitch;

		if (piece->rank != rank)
			continue;
		for (uint64_t row = 0; row < piece->rows; row++)
			hash = hash_bytes(hash, base + offset + row * pitch, piece->width);
	}
	return hash;
}

/* Of the tensors alone: the gaps between them belong to nobody. */
static uint64_t hash_layer(const struct layout *layout, uint64_t hash, const uint8_t *layer)
{
	for (uint32_t tensor = 0; tensor < layout->n_tensors; tensor++)
		hash = hash_bytes(hash, layer + layout->tensors[tensor].offset, layout->tensors[tensor].bytes);
	return hash;
}

static lshard_status compare_layer(lshard_series *series, uint32_t position)
{
	const struct layout *layout = &series->scheme.layout;
	const lshard_group *group = series->group;

	for (int32_t rank = 0; rank < layout->size; rank++)
		if (hash_pieces(layout, position, rank, series->address[position], false) !=
		    group->cards[rank].values[0])
			return lshard_fail(&series->error, LSHARD_ERR_CORRUPT,
					   SERIES_FORMAT ": layer %u is not what rank %d stores", SERIES_NAMES(series),
					   series_layer(series, position), rank);
	return LSHARD_OK;
}

/* Every rank is at this layer, and its card holds the hash of what it stores of it. */
static lshard_status learn_hashes(lshard_series *series, uint32_t position)
{
	lshard_group *group = series->group;
	const uint8_t *share = group->transport->ops->share(series->store);
	const uint64_t mine = hash_pieces(&series->scheme.layout, position, series->scheme.link.rank, share, true);
	struct meeting_card card = series_card(series, MEET_VERIFY, LSHARD_OK);
	lshard_status status;

	card.values[0] = mine;
	card.values[1] = position;
	status = group_meet_all(group, card, &series->error);
	for (int32_t rank = 0; rank < group->context.size && status >= 0; rank++)
		if (group->cards[rank].values[1] != position)
			return lshard_fail(
				&series->error, LSHARD_ERR_OUT_OF_STEP,
				SERIES_FORMAT
				": verify is at layer %u here and at layer %u on rank %d: call it again on all ranks",
				SERIES_NAMES(series), series_layer(series, position),
				series_layer(series, (uint32_t)group->cards[rank].values[1]), rank);
	return status;
}

/* Looks at the layer as this rank's program would. */
static lshard_status look_at_layer(lshard_series *series, uint32_t position, uint64_t *hash)
{
	const uint32_t layer = series_layer(series, position);
	lshard_status status = lshard_reach(series, layer, NULL);

	if (status >= 0)
		status = lshard_wait(series, layer, NULL);
	if (status < 0)
		return status;
	*hash = hash_layer(&series->scheme.layout, *hash, series->address[position]);
	return compare_layer(series, position);
}

/* A layer that cannot be had or is corrupt is reported at the end: the other ranks go on and need this one's hashes. */
static lshard_status verify_layers(lshard_series *series, uint64_t *hash)
{
	lshard_status first = LSHARD_OK;
	lshard_error error = {""};

	for (uint32_t position = 0; position < series->scheme.layout.layers; position++) {
		lshard_status status = learn_hashes(series, position);

		if (status < 0)
			return status;
		status = look_at_layer(series, position, hash);
		if (status < 0 && first >= 0) {
			first = status;
			error = series->error;
		}
	}
	if (first < 0)
		series->error = error;
	return first;
}

lshard_status lshard_series_verify(lshard_series *series, uint64_t *hash)
{
	lshard_status status = series_require(series, SERIES_COMMITTED, "lshard_series_verify");
	uint64_t seen = HASH_BEGIN;

	if (status < 0)
		return status;
	if (series->group->context.memory != LSHARD_MEMORY_HOST)
		return lshard_fail(&series->error, LSHARD_ERR_NOT_SUPPORTED,
				   SERIES_FORMAT ": only host memory can be verified", SERIES_NAMES(series));
	status = lshard_series_rewind(series); /* in step, wherever the ranks were */
	if (status < 0)
		return status;
	status = verify_layers(series, &seen);
	ring_join(&series->ring); /* ends the last view */
	if (status >= 0 && hash)
		*hash = seen;
	return status;
}
