/* SPDX-License-Identifier: Apache-2.0
 *
 * readers.c - which streams read which window: what is enqueued on them comes before whatever overwrites it.
 * Knows windows and streams; knows nothing of where the program is.
 */
#include "internal.h"

lshard_status readers_note_stream(lshard_series *series, void *stream, unsigned *number)
{
	series->poison.stream = stream;
	*number = 0;
	while (*number < series->n_streams && series->streams[*number] != stream)
		++*number;
	if (*number < series->n_streams)
		return LSHARD_OK;
	if (series->n_streams == RING_STREAMS)
		return lshard_fail(&series->error, LSHARD_ERR_NOT_SUPPORTED,
				   SERIES_FORMAT ": more than %d different streams", SERIES_NAMES(series),
				   RING_STREAMS);
	series->streams[series->n_streams++] = stream;
	return LSHARD_OK;
}

lshard_status readers_note(lshard_series *series, void *stream)
{
	unsigned number;
	lshard_status status = readers_note_stream(series, stream, &number);

	for (uint32_t window = 0; window < series->scheme.map.n_slots && status >= 0; window++)
		if (series->windows[window].viewed)
			series->windows[window].streams |= (uint8_t)(1u << number);
	return status;
}

/* A replayed graph reads and writes the spare buffer, too. */
static lshard_status record_reader(lshard_series *series, uint32_t window, void *stream)
{
	const lshard_transport_ops *ops = series->group->transport->ops;
	const uint32_t buffer = series->scheme.buffer_of_window[window];
	lshard_status status = ops->record_use(series->store, buffer, stream);

	if (status >= 0 && series->scheme.spares)
		status = ops->record_use(series->store, series->scheme.windows + buffer, stream);
	return status;
}

lshard_status readers_record(lshard_series *series, uint32_t window)
{
	lshard_status status = LSHARD_OK;

	if (series->scheme.buffer_of_window[window] == LSHARD_NO_BUFFER)
		return status;
	for (unsigned number = 0; number < series->n_streams && status >= 0; number++)
		if (series->windows[window].streams & (1u << number)) {
			status = record_reader(series, window, series->streams[number]);
			if (status >= 0) /* else whatever overwrites it must still come after this one */
				series->windows[window].streams &= (uint8_t)~(1u << number);
		}
	return status;
}
