/* SPDX-License-Identifier: Apache-2.0
 *
 * scheme.c - see scheme.h.
 *
 * On one-sided transports each rank arranges its own windows over the layers it lacks. On collective ones all ranks
 * must start the same transfers in the same order, so the ring is laid over the layers that are not resident
 * everywhere, the same on each rank.
 */
#include "scheme.h"

#include <string.h>

static bool is_mine(const struct scheme *scheme, uint32_t position)
{
	return scheme->layout.placement == LSHARD_WHOLE &&
	       layout_source(&scheme->layout, position) == scheme->link.rank;
}

/* Can this rank compute from the shard of @p rank as it lies? */
static bool is_direct(const struct scheme_link *link, int32_t rank)
{
	return rank == link->rank || !link->is_direct || link->is_direct(link->user, rank);
}

/* Striped layers need all ranks' shards; whole ones may each lie in a direct one, or not. */
static bool uses_peers(const struct scheme *scheme)
{
	int32_t direct = 0;

	if (!scheme->link.direct || !scheme->layout.composable || scheme->link.size == 1)
		return false;
	for (int32_t rank = 0; rank < scheme->link.size; rank++)
		direct += is_direct(&scheme->link, rank);
	return scheme->layout.placement == LSHARD_WHOLE ? direct > 1 : direct == scheme->link.size;
}

/* Fills remote with the layers a ring could be needed for, and place for all others. */
static void find_candidates(struct scheme *scheme)
{
	const bool everyone = scheme->link.collective && scheme->link.size > 1;

	for (uint32_t position = 0; position < scheme->layout.layers; position++) {
		const bool mine = is_mine(scheme, position);
		const bool in_place =
			scheme->direct && (scheme->layout.placement == LSHARD_STRIPED ||
					   is_direct(&scheme->link, layout_source(&scheme->layout, position)));

		scheme->buffer_of[position] = LSHARD_NO_BUFFER;
		scheme->place[position] = mine ? PLACE_SHARD : in_place ? PLACE_PEER : PLACE_WINDOW;
		if (!in_place && (everyone || !mine))
			scheme->remote[scheme->n_remote++] = position;
	}
}

/* Layers among the candidates that the poorest rank would have to keep to have them all. */
static uint64_t most_lacking(const struct scheme *scheme)
{
	const bool everyone = scheme->link.collective && scheme->layout.placement == LSHARD_WHOLE;

	return everyone ? scheme->n_remote - scheme->n_remote / (uint32_t)scheme->link.size : scheme->n_remote;
}

/* As many as fit, spread evenly round the circle; what is left stays in remote. */
static void choose_residents(struct scheme *scheme, uint64_t resident_bytes)
{
	const uint64_t fit = resident_bytes / (scheme->buffer_bytes ? scheme->buffer_bytes : 1);
	const uint32_t candidates = scheme->n_remote;
	const uint64_t kept = fit >= most_lacking(scheme) ? candidates : fit;
	uint32_t left = 0;

	for (uint32_t index = 0; index < candidates; index++) {
		const uint32_t position = scheme->remote[index];
		const bool keep = (index + 1) * kept / candidates > index * kept / candidates;

		if (!keep)
			scheme->remote[left++] = position;
		else if (scheme->place[position] == PLACE_WINDOW)
			scheme->place[position] = PLACE_RESIDENT;
	}
	scheme->n_remote = left;
}

/* Is the piece part of its layer's buffer by mapping? */
static bool is_in_place(const struct scheme *scheme, const lshard_piece *piece)
{
	const struct scheme_link *link = &scheme->link;
	const bool direct = piece->rank == link->rank || (link->direct && is_direct(link, piece->rank));

	return link->composes && direct && piece->granular;
}

static void measure_buffers(struct scheme *scheme)
{
	const struct layout *layout = &scheme->layout;

	scheme->incoming_bytes = scheme->buffer_bytes = layout->layer_bytes;
	if (layout->placement == LSHARD_WHOLE)
		return;
	scheme->incoming_bytes = 0;
	for (uint32_t index = layout->first_piece[0]; index < layout->first_piece[1]; index++) {
		const lshard_piece *piece = &layout->pieces[index];

		scheme->composed |= scheme->link.composes && piece->granular;
		if (is_in_place(scheme, piece))
			scheme->buffer_bytes -= piece->width;
		else if (piece->rank != scheme->link.rank)
			scheme->incoming_bytes += piece->width * piece->rows;
	}
}

/* Windows first, then residents; a window in which nothing comes to this rank gets no memory. */
static void number_buffers(struct scheme *scheme)
{
	for (uint32_t window = 0; window < scheme->map.n_slots; window++)
		scheme->buffer_of_window[window] = LSHARD_NO_BUFFER;
	for (uint32_t position = 0; position < scheme->layout.layers; position++) {
		const uint32_t window = scheme->map.slot_of[position];

		if (scheme->place[position] == PLACE_WINDOW && scheme->buffer_of_window[window] == LSHARD_NO_BUFFER)
			scheme->buffer_of_window[window] = scheme->windows++;
	}
	scheme->spares = scheme->poison && scheme->windows ? scheme->windows + 1 : 0;
	for (uint32_t position = 0; position < scheme->layout.layers; position++)
		if (scheme->place[position] == PLACE_RESIDENT)
			scheme->buffer_of[position] = scheme_moving_buffers(scheme) + scheme->residents++;
		else if (scheme->place[position] == PLACE_WINDOW)
			scheme->buffer_of[position] = scheme->buffer_of_window[scheme->map.slot_of[position]];
}

static lshard_status allocate_scheme(struct scheme *scheme, const struct layout_memory *memory)
{
	const size_t layers = scheme->layout.layers;

	scheme->remote = memory->allocate(memory->user, layers * sizeof(uint32_t));
	scheme->slot_of = memory->allocate(memory->user, layers * sizeof(uint32_t));
	scheme->remote_at_or_after = memory->allocate(memory->user, layers * sizeof(uint32_t));
	scheme->buffer_of = memory->allocate(memory->user, layers * sizeof(uint32_t));
	scheme->place = memory->allocate(memory->user, layers);
	if (!scheme->remote || !scheme->slot_of || !scheme->remote_at_or_after || !scheme->buffer_of || !scheme->place)
		return LSHARD_ERR_NO_MEMORY;
	return LSHARD_OK;
}

static lshard_status arrange(struct scheme *scheme, const lshard_series_options *options,
			     const struct layout_memory *memory)
{
	lshard_status status = allocate_scheme(scheme, memory);

	if (status < 0)
		return status;
	find_candidates(scheme);
	measure_buffers(scheme);
	choose_residents(scheme, options->resident_bytes);
	slotmap_build(&scheme->map, scheme->layout.layers, scheme->remote, scheme->n_remote, options->prefetch,
		      scheme->slot_of, scheme->remote_at_or_after);
	scheme->buffer_of_window = memory->allocate(memory->user, (scheme->map.n_slots + 1) * sizeof(uint32_t));
	if (!scheme->buffer_of_window)
		return LSHARD_ERR_NO_MEMORY;
	number_buffers(scheme);
	return LSHARD_OK;
}

#define LARGE_STRIPE 16 /* large pages: what rounding a layer up to one costs is less than 1/16 of its stripe */

/* Layers that are put together of stripes: cut at large pages, so that they are mapped by them. */
static bool wants_large_stripes(const struct scheme *scheme)
{
	const struct scheme_link *link = &scheme->link;
	const struct layout *layout = &scheme->layout;

	return link->direct && link->large_page > layout->granule && layout->placement == LSHARD_STRIPED &&
	       layout->composable && layout->layer_bytes / LARGE_STRIPE / (uint32_t)link->size >= link->large_page;
}

/* As before where some tensor's stripes do not end at large pages. */
static lshard_status open_large_layout(struct scheme *scheme, const lshard_series_options *options,
				       const struct layout_memory *memory, lshard_error *error)
{
	const struct scheme_link *link = &scheme->link;
	lshard_status status;

	layout_close(&scheme->layout, memory);
	status = layout_open(&scheme->layout, options, link->size, link->large_page, memory, error);
	if (status < 0 || scheme->layout.composable)
		return status;
	layout_close(&scheme->layout, memory);
	return layout_open(&scheme->layout, options, link->size, link->granule, memory, error);
}

/*
 * Where only the own stripes are direct, layers of less than a granule for each rank are not cut at granules: some
 * ranks would have none, and others would be asked by all.
 */
static lshard_status open_layout(struct scheme *scheme, const lshard_series_options *options,
				 const struct layout_memory *memory, lshard_error *error)
{
	const struct scheme_link *link = &scheme->link;
	struct layout *layout = &scheme->layout;
	const lshard_status status = layout_open(layout, options, link->size,
						 link->direct || link->composes ? link->granule : 1, memory, error);

	if (status >= 0 && wants_large_stripes(scheme))
		return open_large_layout(scheme, options, memory, error);
	if (status < 0 || link->direct || layout->layer_bytes / layout->granule >= (uint32_t)link->size)
		return status;
	layout_close(layout, memory);
	scheme->link.composes = false;
	return layout_open(layout, options, link->size, 1, memory, error);
}

/* Poison comes into windows whole, so nothing may be mapped there. */
static lshard_status open_whole_layout(struct scheme *scheme, const lshard_series_options *options,
				       const struct layout_memory *memory, lshard_error *error)
{
	layout_close(&scheme->layout, memory);
	scheme->link.composes = false;
	return open_layout(scheme, options, memory, error);
}

lshard_status scheme_open(struct scheme *scheme, const lshard_series_options *options, const struct scheme_link *link,
			  const struct layout_memory *memory, lshard_error *error)
{
	lshard_status status;

	*scheme = (struct scheme){
		.link = *link, .prefetch = options->prefetch, .poison = options->poison != LSHARD_POISON_OFF};
	if (options->memory_source) { /* the caller's memory cannot be mapped together */
		scheme->link.composes = false;
		scheme->link.direct &= options->placement == LSHARD_WHOLE;
	}
	status = open_layout(scheme, options, memory, error);
	if (status < 0)
		return status;
	scheme->direct = uses_peers(scheme);
	if (scheme->poison && scheme->link.composes && !scheme->direct && options->placement == LSHARD_STRIPED)
		status = open_whole_layout(scheme, options, memory, error);
	if (status < 0)
		return status;
	scheme->horizon = link->collective ? options->prefetch : UINT32_MAX;
	status = arrange(scheme, options, memory);
	if (status >= 0)
		return status;
	scheme_close(scheme, memory);
	return lshard_fail(error, status, "series '%s': no memory for the tables of %u layers", options->name,
			   options->layer_count);
}

void scheme_close(struct scheme *scheme, const struct layout_memory *memory)
{
	memory->release(memory->user, scheme->buffer_of_window);
	memory->release(memory->user, scheme->place);
	memory->release(memory->user, scheme->buffer_of);
	memory->release(memory->user, scheme->remote_at_or_after);
	memory->release(memory->user, scheme->slot_of);
	memory->release(memory->user, scheme->remote);
	layout_close(&scheme->layout, memory);
	*scheme = (struct scheme){0};
}

void scheme_distances(const struct scheme *scheme, struct scheme_distances *distances)
{
	const uint32_t layers = scheme->layout.layers;

	*distances = (struct scheme_distances){.shortest = layers};
	for (uint32_t position = 0; position < layers; position++) {
		uint32_t distance;

		if (scheme->place[position] != PLACE_WINDOW)
			continue;
		distance = slotmap_distance(&scheme->map, position, scheme->horizon);
		if (distance == layers)
			continue; /* alone in its window: fetched once */
		distances->fetched++;
		if (distance < distances->shortest)
			distances->shortest = distance;
		if (distance >= scheme->prefetch)
			continue;
		if (distances->below_k < LSHARD_BELOW_K_NAMED)
			distances->named[distances->below_k] = scheme->layout.first_layer + position;
		distances->below_k++;
	}
}
