/* SPDX-License-Identifier: Apache-2.0
 *
 * verify.c - every rank hashes what it stores, and compares what it sees of the others with their hashes.
 *
 * Memory that the processor cannot reach is seen through a buffer, which the transport's copy fills. Knows nothing of
 * devices; of streams only that they cannot be waited for here.
 */
#include "internal.h"

#include <string.h>

#define VERIFY     "lshard_series_verify"
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

/* Bytes of the series: read where they lie or, where the processor cannot, through a buffer. */
struct sight {
	lshard_series *series;
	uint8_t *buffer;      /* NULL: not needed */
	uint64_t room;        /* of the buffer; a multiple of 8 */
	const uint8_t *begin; /* what the buffer holds copies of */
	const uint8_t *end;
	const uint8_t *limit; /* what may be read ahead */
	lshard_status status; /* of the first copy that failed; what is seen after it means nothing */
};

#define MOST_ROOM ((uint64_t)16 << 20)

/* Where there is no memory, the status says so: the other ranks are to hear of it when they agree. */
static void sight_open(struct sight *sight, lshard_series *series)
{
	const uint64_t layer = (series->scheme.layout.layer_bytes + 7) & ~(uint64_t)7;

	*sight = (struct sight){.series = series};
	if (!series->group->transport->ops->copy)
		return;
	sight->room = layer < MOST_ROOM ? layer : MOST_ROOM;
	sight->buffer = group_allocate(series->group, (size_t)sight->room);
	if (!sight->buffer)
		sight->status = lshard_fail(&series->error, LSHARD_ERR_NO_MEMORY,
					    SERIES_FORMAT ": no memory for a buffer of %llu bytes",
					    SERIES_NAMES(series), (unsigned long long)sight->room);
}

static void sight_close(struct sight *sight)
{
	group_release(sight->series->group, sight->buffer);
}

/* From now on @p bytes at @p base are looked at: copies of what was there before are not believed. */
static void sight_turn(struct sight *sight, const uint8_t *base, uint64_t bytes)
{
	sight->begin = sight->end = base;
	sight->limit = base + bytes;
}

static void refill(struct sight *sight, const uint8_t *at)
{
	lshard_series *series = sight->series;
	const uint64_t left = (uint64_t)(sight->limit - at);
	const uint64_t count = left < sight->room ? left : sight->room;
	lshard_status status =
		series->group->transport->ops->copy(series->store, sight->buffer, count, at, count, count, 1);

	sight->begin = at;
	sight->end = at + count;
	if (status < 0 && sight->status >= 0)
		sight->status = lshard_fail(&series->error, status, SERIES_FORMAT ": copying for verify: %s",
					    SERIES_NAMES(series), series->store->error.text);
}

/* The @p bytes at @p at, no more than there is room for. */
static const uint8_t *look(struct sight *sight, const uint8_t *at, uint64_t bytes)
{
	if (!sight->buffer)
		return at;
	if (at < sight->begin || at + bytes > sight->end)
		refill(sight, at);
	return sight->buffer + (at - sight->begin);
}

static uint64_t hash_words(uint64_t hash, const uint8_t *bytes, uint64_t count)
{
	uint64_t word;

	for (; count >= sizeof word; count -= sizeof word, bytes += sizeof word) {
		memcpy(&word, bytes, sizeof word);
		hash = mix(hash, word);
	}
	return hash;
}

static uint64_t hash_bytes(uint64_t hash, struct sight *sight, const uint8_t *at, uint64_t count)
{
	uint64_t word = 0;

	while (count >= sizeof word) {
		const uint64_t whole = count & ~(uint64_t)7;
		const uint64_t part = sight->buffer && whole > sight->room ? sight->room : whole;

		hash = hash_words(hash, look(sight, at, part), part);
		at += part;
		count -= part;
	}
	if (count)
		memcpy(&word, look(sight, at, count), (size_t)count);
	return mix(hash, word ^ count << 56);
}

static uint64_t piece_span(uint64_t pitch, const lshard_piece *piece)
{
	return (piece->rows - 1) * pitch + piece->width;
}

/* Of what this rank keeps of the layer in its shard. */
static uint64_t hash_shard(struct sight *sight, uint32_t position)
{
	const lshard_series *series = sight->series;
	const struct layout *layout = &series->scheme.layout;
	const uint8_t *shard = series->group->transport->ops->shard(series->store);
	uint64_t hash = HASH_BEGIN;

	for (uint32_t index = layout->first_piece[position];
	     index < layout->first_piece[position + 1] && sight->status >= 0; index++) {
		const lshard_piece *piece = &layout->pieces[index];
		const uint8_t *at;

		if (piece->rank != series->scheme.link.rank || piece->rows == 0)
			continue;
		at = shard + piece->shard_offset;
		sight_turn(sight, at, piece_span(piece->shard_pitch, piece));
		for (uint64_t row = 0; row < piece->rows; row++)
			hash = hash_bytes(hash, sight, at + row * piece->shard_pitch, piece->width);
	}
	return hash;
}

/* Where the layer is seen: where the program does or, without a wait of its own, where it was fetched. */
static const uint8_t *seen_at(const struct sight *sight, uint32_t position)
{
	return sight->buffer ? poison_seen(sight->series, position) : sight->series->address[position];
}

/* Of what @p rank keeps of the layer, as it is seen here. */
static uint64_t hash_pieces(struct sight *sight, uint32_t position, int32_t rank)
{
	const struct layout *layout = &sight->series->scheme.layout;
	const uint8_t *layer = seen_at(sight, position);
	uint64_t hash = HASH_BEGIN;

	for (uint32_t index = layout->first_piece[position]; index < layout->first_piece[position + 1]; index++) {
		const lshard_piece *piece = &layout->pieces[index];
		const uint8_t *at = layer + piece->layer_offset;

		for (uint64_t row = 0; piece->rank == rank && row < piece->rows; row++)
			hash = hash_bytes(hash, sight, at + row * piece->layer_pitch, piece->width);
	}
	return hash;
}

/* Of the tensors alone: the gaps between them belong to nobody. */
static uint64_t hash_layer(struct sight *sight, uint32_t position, uint64_t hash)
{
	const struct layout *layout = &sight->series->scheme.layout;
	const uint8_t *layer = seen_at(sight, position);

	for (uint32_t tensor = 0; tensor < layout->n_tensors; tensor++)
		hash = hash_bytes(hash, sight, layer + layout->tensors[tensor].offset, layout->tensors[tensor].bytes);
	return hash;
}

static lshard_status compare_layer(struct sight *sight, uint32_t position)
{
	lshard_series *series = sight->series;

	for (int32_t rank = 0; rank < series->scheme.layout.size; rank++)
		if (hash_pieces(sight, position, rank) != series->group->records[rank].values[0] && sight->status >= 0)
			return lshard_fail(&series->error, LSHARD_ERR_CORRUPT,
					   SERIES_FORMAT ": layer %u is not what rank %d stores", SERIES_NAMES(series),
					   series_layer(series, position), rank);
	return sight->status;
}

/* Every rank is at this layer, and its record holds the hash of what it stores of it. */
static lshard_status learn_hashes(struct sight *sight, uint32_t position)
{
	lshard_series *series = sight->series;
	lshard_group *group = series->group;
	const uint64_t mine = hash_shard(sight, position);
	const struct lshard__record_set set = group_records(group, group->records, sizeof *group->records, 0);
	struct call_record record = series_record(series, STEP_VERIFY, sight->status);
	lshard_status status;
	int32_t other;

	record.values[0] = mine;
	record.values[1] = position;
	status = group_agree_all(group, record, &series->error);
	other = lshard__first_differing(&set, offsetof(struct call_record, values[1]), sizeof record.values[1]);
	if (status < 0 || other < 0)
		return status;
	return lshard_fail(&series->error, LSHARD_ERR_OUT_OF_STEP,
			   SERIES_FORMAT
			   ": verify is at layer %u on rank 0 and at layer %u on rank %d: call it again on all ranks",
			   SERIES_NAMES(series), series_layer(series, (uint32_t)group->records[0].values[1]),
			   series_layer(series, (uint32_t)group->records[other].values[1]), other);
}

/* Looks at the layer as this rank's program would. Where there are streams, the transport's copy comes after it. */
static lshard_status look_at_layer(struct sight *sight, uint32_t position, uint64_t *hash)
{
	lshard_series *series = sight->series;
	const uint32_t layer = series_layer(series, position);
	lshard_status status;

	if (sight->buffer) {
		status = pass_fetch(series, position);
	} else {
		status = lshard_reach(series, layer, NULL);
		if (status >= 0)
			status = lshard_wait(series, layer, NULL);
	}
	if (status < 0)
		return status;
	sight_turn(sight, seen_at(sight, position), series->scheme.layout.layer_bytes);
	*hash = hash_layer(sight, position, *hash);
	return compare_layer(sight, position);
}

/*
 * A layer that cannot be had or is corrupt is reported at the end: the others go on and need this rank's hashes. But
 * nobody waits for a second deadline: at the next layer all hear of the first and break off.
 */
static lshard_status verify_layers(struct sight *sight, uint64_t *hash)
{
	lshard_series *series = sight->series;
	lshard_status first = LSHARD_OK;
	lshard_error error = {""};

	for (uint32_t position = 0; position < series->scheme.layout.layers; position++) {
		const lshard_status agreed = learn_hashes(sight, position);
		const lshard_status status = agreed < 0 ? agreed : look_at_layer(sight, position, hash);

		if (status < 0 && first >= 0) {
			first = status;
			error = series->error;
		}
		if (agreed < 0) {
			pass_fail(series, VERIFY);
			break;
		}
		if (status == LSHARD_ERR_TIMEOUT)
			sight->status = status;
	}
	if (first < 0)
		series->error = error;
	return first;
}

lshard_status lshard_series_verify(lshard_series *series, uint64_t *hash)
{
	const lshard_transport_ops *ops = series->group->transport->ops;
	lshard_status status = series_require(series, SERIES_COMMITTED, VERIFY);
	uint64_t seen = HASH_BEGIN;
	lshard_status hidden;
	struct sight sight;

	if (status < 0)
		return status;
	if (ops->capabilities & LSHARD_CAP_STREAMS && !ops->copy)
		return lshard_fail(&series->error, LSHARD_ERR_NOT_SUPPORTED,
				   SERIES_FORMAT ": the transport %s has streams and no way to copy to the host",
				   SERIES_NAMES(series), ops->name);
	rejoin_begin(series);
	status = pass_rewind(series, STEP_VERIFY_BEGIN, VERIFY); /* in step, wherever the ranks were */
	if (status < 0) {
		rejoin_end(series);
		return status;
	}
	sight_open(&sight, series);
	status = verify_layers(&sight, &seen);
	sight_close(&sight);
	rejoin_end(series);
	ring_join(&series->ring); /* ends the last view */
	hidden = poison_hide(series, NULL);
	status = status < 0 ? status : hidden;
	if (status >= 0 && hash)
		*hash = seen;
	return status;
}
