/* SPDX-License-Identifier: Apache-2.0
 *
 * poison.c - what a window holds while nobody may read it: nothing that could be taken for a layer.
 *
 * Beside each window there is a spare buffer, and one more buffer holds the poison of a whole layer. While poison is
 * on, layers are fetched into the spare buffers; a wait copies the layer into its window, and the end of its view
 * copies the poison there. On devices both copies go on the program's own stream: what it has put there before the wait
 * still reads poison, whatever runs late. The spare buffer keeps its layer until the next fetch, so a layer that stays
 * in its window can be waited for again. Knows buffers and streams; of the ring only whether a window is viewed.
 */
#include "internal.h"

#include <string.h>

#define POISON_BYTE 0xff /* NaN in every floating type */
#define MOST_BUFFER ((uint64_t)16 << 20)

/* What a window shows, besides positions and POSITION_NONE, which is poison: a copy into it failed, so anything. */
#define SHOWN_ANYTHING (POSITION_NONE - 1)

/* ---- Buffers ---- */

static uint32_t buffer_of(const lshard_series *series, uint32_t window)
{
	return series->scheme.buffer_of_window[window];
}

static uint32_t spare_of(const lshard_series *series, uint32_t window)
{
	return series->scheme.windows + buffer_of(series, window);
}

static uint32_t poison_buffer(const lshard_series *series)
{
	return scheme_moving_buffers(&series->scheme) - 1;
}

uint32_t poison_buffer_of(const lshard_series *series, uint32_t window)
{
	return series->poison.on ? spare_of(series, window) : buffer_of(series, window);
}

static uint8_t *address_of(const lshard_series *series, uint32_t buffer)
{
	return series->group->transport->ops->buffer(series->store, buffer, 0); /* not composed: any position */
}

const uint8_t *poison_seen(const lshard_series *series, uint32_t position)
{
	if (!series->poison.on || series->scheme.place[position] != PLACE_WINDOW)
		return series->address[position];
	return address_of(series, spare_of(series, series->scheme.map.slot_of[position]));
}

/* In the order of the stream; host memory: now. */
static lshard_status copy_buffer(lshard_series *series, uint32_t to, uint32_t from, void *stream)
{
	const lshard_transport_ops *ops = series->group->transport->ops;
	lshard_status status = LSHARD_OK;

	if (has_streams(series))
		status = ops->copy_buffer(series->store, to, from, stream);
	else
		memcpy(address_of(series, to), address_of(series, from), series->scheme.buffer_bytes);
	if (status < 0)
		return lshard_fail(&series->error, status, SERIES_FORMAT ": window %u, copying for poison: %s",
				   SERIES_NAMES(series), to % series->scheme.windows, series->store->error.text);
	return LSHARD_OK;
}

/* @p bytes from @p from, wherever the transport's memory is, and be done; outside passes. */
static lshard_status copy_now(lshard_series *series, uint8_t *to, const uint8_t *from, uint64_t bytes)
{
	const lshard_transport_ops *ops = series->group->transport->ops;
	lshard_status status = LSHARD_OK;

	if (ops->copy)
		status = ops->copy(series->store, to, bytes, from, bytes, bytes, 1);
	else
		memcpy(to, from, bytes);
	if (status < 0)
		return lshard_fail(&series->error, status, SERIES_FORMAT ": filling windows with poison: %s",
				   SERIES_NAMES(series), series->store->error.text);
	return LSHARD_OK;
}

/* ---- What is asked for ---- */

static lshard_status find_mode(const lshard_series_options *options, lshard_poison *mode, lshard_error *error)
{
	static const char *const names[] = {"0", "ready", "1"}; /* by lshard_poison */
	const char *text = lshard__variable("LAYERSHARD_POISON");
	int asked = LSHARD_POISON_OFF;

	if ((unsigned)options->poison > LSHARD_POISON_ON)
		return lshard_fail(error, LSHARD_ERR_INVALID, "series '%s': there is no poison %d", options->name,
				   (int)options->poison);
	while (text && asked <= LSHARD_POISON_ON && strcmp(text, names[asked]) != 0)
		asked++;
	if (asked > LSHARD_POISON_ON)
		return lshard_fail(error, LSHARD_ERR_INVALID,
				   "series '%s': LAYERSHARD_POISON='%s' is not 0, 1 or ready", options->name, text);
	*mode = asked > (int)options->poison ? (lshard_poison)asked : options->poison;
	return LSHARD_OK;
}

static lshard_status check_patterns(const lshard_series_options *options, lshard_error *error)
{
	for (uint32_t tensor = 0; options->poison_patterns && tensor < options->tensor_count; tensor++) {
		const lshard_status status = options_check_pattern(options, tensor, error);
		lshard_poison_pattern pattern;

		if (status < 0)
			return status;
		pattern = options_pattern(options, tensor);
		if (!pattern.pattern != !pattern.bytes)
			return lshard_fail(
				error, LSHARD_ERR_INVALID,
				"series '%s': the poison of tensor number %u needs both pattern and bytes, or "
				"NULL and 0",
				options->name, tensor);
	}
	return LSHARD_OK;
}

lshard_status poison_read_options(const lshard_group *group, const lshard_series_options *options, lshard_poison *mode,
				  lshard_error *error)
{
	const lshard_transport_ops *ops = group->transport->ops;
	lshard_status status = find_mode(options, mode, error);

	if (status >= 0)
		status = check_patterns(options, error);
	if (status >= 0 && *mode != LSHARD_POISON_OFF && ops->capabilities & LSHARD_CAP_STREAMS && !ops->copy_buffer)
		return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED,
				   "series '%s': windows cannot be poisoned: the transport %s has streams and no "
				   "copy_buffer",
				   options->name, ops->name);
	return status;
}

/* ---- The poison of a layer ---- */

/* The part of a tensor's poison that lies in bytes [begin, begin + count) of the layer; @p staging begins at @p begin.
 */
static void paint_tensor(uint8_t *staging, uint64_t begin, uint64_t count, const struct layout_tensor *tensor,
			 const lshard_poison_pattern *with)
{
	const uint8_t *pattern = with->pattern;
	const uint64_t first = tensor->offset > begin ? tensor->offset : begin;
	const uint64_t last =
		tensor->offset + tensor->bytes < begin + count ? tensor->offset + tensor->bytes : begin + count;

	for (uint64_t at = first; at < last; at++)
		staging[at - begin] = pattern[(at - tensor->offset) % with->bytes];
}

static lshard_status paint(lshard_series *series, const lshard_series_options *options, uint8_t *staging, uint64_t room)
{
	const struct layout *layout = &series->scheme.layout;
	uint8_t *buffer = address_of(series, poison_buffer(series));
	lshard_status status = LSHARD_OK;

	for (uint64_t begin = 0; begin < layout->layer_bytes && status >= 0; begin += room) {
		const uint64_t left = layout->layer_bytes - begin;
		const uint64_t count = left < room ? left : room;

		memset(staging, POISON_BYTE, count);
		for (uint32_t tensor = 0; tensor < layout->n_tensors; tensor++) {
			const lshard_poison_pattern pattern = options_pattern(options, tensor);

			if (pattern.bytes)
				paint_tensor(staging, begin, count, &layout->tensors[tensor], &pattern);
		}
		status = copy_now(series, buffer + begin, staging, count);
	}
	return status;
}

static void show_poison(lshard_series *series)
{
	for (uint32_t window = 0; window < series->scheme.map.n_slots; window++)
		series->poison.shown[window] = POSITION_NONE;
}

/* The spare buffers of host memory are addresses only as long as nothing touches them. */
static bool may_paint_later(const lshard_series *series, const lshard_series_options *options)
{
	if (options->poison == LSHARD_POISON_ON || has_streams(series))
		return false;
	for (uint32_t tensor = 0; tensor < options->tensor_count; tensor++)
		if (options_pattern(options, tensor).bytes)
			return false; /* they are the caller's, and here only now */
	return true;
}

lshard_status poison_open(lshard_series *series, const lshard_series_options *options)
{
	const uint64_t layer = series->scheme.layout.layer_bytes;
	const uint64_t room = layer < MOST_BUFFER ? layer : MOST_BUFFER;
	uint8_t *staging;
	lshard_status status;

	show_poison(series);
	if (!series->scheme.spares || may_paint_later(series, options))
		return LSHARD_OK;
	staging = group_allocate(series->group, room);
	if (!staging)
		return lshard_fail(&series->group->error, LSHARD_ERR_NO_MEMORY,
				   SERIES_FORMAT ": no memory for a buffer of %llu bytes", SERIES_NAMES(series),
				   (unsigned long long)room);
	status = paint(series, options, staging, room);
	group_release(series->group, staging);
	series->poison.painted = true;
	series->poison.on = options->poison == LSHARD_POISON_ON;
	if (status >= 0)
		status = poison_fill(series);
	if (status < 0)
		series->group->error = series->error;
	return status;
}

/* ---- Views ---- */

/* On another stream than the layer was copied on, perhaps. */
static lshard_status follow_copy(lshard_series *series, uint32_t window, void *stream)
{
	lshard_arrival arrival;
	lshard_status status;

	if (!has_streams(series))
		return LSHARD_OK;
	status = series->group->transport->ops->wait(series->store, buffer_of(series, window), stream, &arrival);
	if (status < 0)
		return lshard_fail(&series->error, status, SERIES_FORMAT ": %s", SERIES_NAMES(series),
				   series->store->error.text);
	return LSHARD_OK;
}

/* Also after a copy of poison that failed: who read what is still there comes first, and counts as a reader on. */
static lshard_status copy_layer(lshard_series *series, uint32_t window, void *stream)
{
	const uint8_t readers = series->windows[window].streams;
	lshard_status status = LSHARD_OK;

	if (series->poison.shown[window] != POSITION_NONE)
		status = readers_record(series, window);
	series->windows[window].streams = readers;
	if (status < 0)
		return status;
	series->poison.shown[window] = SHOWN_ANYTHING;
	return copy_buffer(series, buffer_of(series, window), spare_of(series, window), stream);
}

lshard_status poison_show(lshard_series *series, uint32_t position, uint32_t window, void *stream)
{
	lshard_status status;

	if (!series->poison.on)
		return LSHARD_OK;
	if (series->poison.shown[window] == position)
		return follow_copy(series, window, stream);
	status = copy_layer(series, window, stream);
	if (status >= 0)
		series->poison.shown[window] = position;
	return status;
}

lshard_status poison_hide(lshard_series *series, void *stream)
{
	lshard_status first = LSHARD_OK;

	for (uint32_t window = 0; series->poison.on && window < series->scheme.map.n_slots; window++) {
		lshard_status status;

		if (series->poison.shown[window] == POSITION_NONE || series->windows[window].viewed)
			continue;
		status = readers_record(series, window);
		if (status >= 0)
			status = copy_buffer(series, buffer_of(series, window), poison_buffer(series), stream);
		series->poison.shown[window] = status >= 0 ? POSITION_NONE : SHOWN_ANYTHING;
		first = first < 0 ? first : status;
	}
	return first;
}

void *poison_stream(lshard_series *series)
{
	const lshard_transport_ops *ops = series->group->transport->ops;
	uint64_t capture = 0;

	if (series->poison.on && ops->capabilities & LSHARD_CAP_CAPTURE &&
	    (ops->capture(series->store, series->poison.stream, &capture) < 0 || capture))
		return NULL;
	return series->poison.stream;
}

lshard_status poison_fill(lshard_series *series)
{
	const uint8_t *poison;
	lshard_status status = LSHARD_OK;

	if (!series->poison.on)
		return status;
	poison = address_of(series, poison_buffer(series));
	for (uint32_t window = 0; window < series->scheme.windows && status >= 0; window++)
		status = copy_now(series, address_of(series, window), poison, series->scheme.buffer_bytes);
	if (status >= 0)
		show_poison(series);
	return status;
}

/* ---- Captures ---- */

/* A replay begins with poison everywhere, so in a capture nothing is shown before its own waits. */
void poison_enter_capture(lshard_series *series)
{
	if (!series->scheme.spares)
		return;
	memcpy(series->poison.shown_outside, series->poison.shown,
	       series->scheme.map.n_slots * sizeof *series->poison.shown);
	show_poison(series);
}

void poison_leave_capture(lshard_series *series)
{
	if (series->scheme.spares)
		memcpy(series->poison.shown, series->poison.shown_outside,
		       series->scheme.map.n_slots * sizeof *series->poison.shown);
}

/* ---- Switching ---- */

/* The layer goes to where it would have been fetched with the poison as it will be; poison comes where it was. */
static lshard_status move_layer(lshard_series *series, uint32_t window, bool on, void *stream)
{
	const uint32_t from = on ? buffer_of(series, window) : spare_of(series, window);
	const uint32_t to = on ? spare_of(series, window) : buffer_of(series, window);
	lshard_status status = readers_record(series, window);

	if (status >= 0)
		status = copy_buffer(series, to, from, stream);
	if (status >= 0)
		status = copy_buffer(series, from, poison_buffer(series), stream);
	return status;
}

lshard_status poison_switch(lshard_series *series, bool on, void *stream)
{
	lshard_status first = LSHARD_OK;

	if (!series->poison.painted)
		memset(address_of(series, poison_buffer(series)), POISON_BYTE, series->scheme.layout.layer_bytes);
	series->poison.painted = true;
	for (uint32_t window = 0; window < series->scheme.map.n_slots; window++) {
		lshard_status status;

		if (buffer_of(series, window) == LSHARD_NO_BUFFER)
			continue;
		status = move_layer(series, window, on, stream);
		series->poison.shown[window] = on && status < 0 ? SHOWN_ANYTHING : POSITION_NONE;
		if (status >= 0)
			continue;
		ring_fail(&series->ring, window);
		first = first < 0 ? first : status;
	}
	series->poison.on = on;
	return first;
}
