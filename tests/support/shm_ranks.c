/* SPDX-License-Identifier: Apache-2.0
 *
 * shm_ranks.c - see shm_ranks.h.
 */
#include "shm_ranks.h"
#include "outside.h"

#include <string.h>
#include <unistd.h>

#define ROWS 6u

int shm_rank_open(struct shm_rank *rank, const struct member *member, const char *options, uint32_t timeout_ms)
{
	lshard__rendezvous *rendezvous = NULL;
	lshard_bootstrap bootstrap;
	lshard_error error = {""};
	lshard_status status = LSHARD_OK;

	rank->context = context_for_member(member, options, timeout_ms);
	rank->transport = NULL;
	if (member->job) {
		rank->context.bootstrap = &bootstrap;
		status = lshard__rendezvous_open(&rank->context, member->job, &rendezvous, &bootstrap, &error);
	}
	if (status == LSHARD_OK)
		status = lshard__shm.open(&rank->context, NULL, &rank->transport, &error);
	lshard__rendezvous_close(rendezvous);
	if (status != LSHARD_OK)
		fprintf(stderr, "rank %d of %d: %s\n", (int)member->rank, (int)member->size, error.text);
	return status == LSHARD_OK;
}

void shm_rank_close(struct shm_rank *rank)
{
	if (rank->transport)
		rank->transport->ops->close(rank->transport);
	rank->transport = NULL;
}

static uint64_t page(void)
{
	return (uint64_t)sysconf(_SC_PAGESIZE);
}

static void add_piece(struct shm_series *series, uint32_t *n, const lshard_piece *piece)
{
	series->pieces[*n] = *piece;
	series->pieces[*n].shard_offset = series->shard_bytes[piece->rank];
	series->shard_bytes[piece->rank] += piece->rows > 1 ? piece->shard_pitch * piece->rows : piece->width;
	++*n;
}

/* Widths differ by rank, so that a wrong offset shows. */
static void add_stripes(struct shm_series *series, uint32_t *n, int32_t size, enum shape shape)
{
	uint64_t unit = shape == PAGES ? page() : 24;
	uint64_t at = 0;
	uint64_t row = 0;

	for (int32_t rank = 0; rank < size; rank++)
		row += unit * (uint64_t)(rank % 2 + 1);
	for (int32_t rank = 0; rank < size; rank++) {
		uint64_t width = unit * (uint64_t)(rank % 2 + 1);
		lshard_piece piece = {.rank = rank,
				      .shard_pitch = width,
				      .layer_offset = at,
				      .layer_pitch = row,
				      .width = width,
				      .rows = shape == PAGES ? 1 : ROWS};

		add_piece(series, n, &piece);
		at += width;
	}
	series->plan.layer_bytes = shape == PAGES ? row : row * ROWS;
}

void shm_series_plan(struct shm_series *series, const struct member *member, enum shape shape, uint32_t layers,
		     int direct, uint32_t buffers)
{
	uint32_t n = 0;

	memset(series, 0, sizeof *series);
	series->plan.layer_bytes = 3 * page();
	for (uint32_t position = 0; position < layers; position++) {
		lshard_piece whole = {.rank = (int32_t)position % member->size, .width = 3 * page(), .rows = 1};

		if (shape == WHOLE)
			add_piece(series, &n, &whole);
		else
			add_stripes(series, &n, member->size, shape);
		series->first_piece[position + 1] = n;
	}
	series->plan.name = "o_proj";
	series->plan.layers = layers;
	series->plan.shard_bytes = series->shard_bytes[member->rank];
	series->plan.shard_bytes_of = series->shard_bytes;
	series->plan.buffers = series->plan.windows = buffers;
	series->plan.direct = direct;
	series->plan.pieces = series->pieces;
	series->plan.first_piece = series->first_piece;
}

static unsigned char byte_of(uint32_t position, uint64_t offset, unsigned generation)
{
	return (unsigned char)(position * 31 + offset * 7 + offset / 251 + generation * 101);
}

lshard_status shm_series_open(struct shm_rank *rank, struct shm_series *series)
{
	return rank->transport->ops->store_open(rank->transport, &series->plan, &series->store);
}

void shm_series_close(struct shm_series *series)
{
	if (series->store)
		series->store->transport->ops->store_close(series->store);
	series->store = NULL;
}

void shm_series_fill(struct shm_series *series, unsigned generation)
{
	lshard_store *store = series->store;
	unsigned char *shard = store->transport->ops->shard(store);

	for (uint32_t position = 0; position < series->plan.layers; position++) {
		for (uint32_t i = series->first_piece[position]; i < series->first_piece[position + 1]; i++) {
			const lshard_piece *piece = &series->pieces[i];

			for (uint64_t at = 0;
			     piece->rank == store->transport->context->rank && at < piece->width * piece->rows; at++) {
				uint64_t row = at / piece->width;
				uint64_t column = at % piece->width;

				shard[piece->shard_offset + row * piece->shard_pitch + column] = byte_of(
					position, piece->layer_offset + row * piece->layer_pitch + column, generation);
			}
		}
	}
}

int shm_series_right(const struct shm_series *series, uint32_t position, unsigned generation, const void *found)
{
	const unsigned char *bytes = found;

	for (uint64_t at = 0; at < series->plan.layer_bytes; at++) {
		if (bytes[at] == byte_of(position, at, generation))
			continue;
		fprintf(stderr, "position %u, byte %llu: %d instead of %d\n", (unsigned)position,
			(unsigned long long)at, bytes[at], byte_of(position, at, generation));
		return 0;
	}
	return 1;
}
