/* SPDX-License-Identifier: Apache-2.0
 *
 * capture.c - a stream is captured: nothing really happens meanwhile, so the ring's state is a copy, dropped at join or
 * by a call that is not in the capture, after which it is not gone on with: what it did before would be forgotten. And
 * the drain, which is nothing to be captured. Knows the ring's state; starts nothing.
 */
#include "internal.h"

#include <string.h>

void capture_leave(lshard_series *series)
{
	if (!series->capture.number)
		return;
	memcpy(series->windows, series->capture.windows, series->scheme.map.n_slots * sizeof *series->windows);
	memcpy(series->window_status, series->capture.status,
	       series->scheme.map.n_slots * sizeof *series->window_status);
	memcpy(series->window_error, series->capture.error, series->scheme.map.n_slots * sizeof *series->window_error);
	series->ring = series->capture.ring;
	poison_leave_capture(series);
	series->capture.number = 0;
}

void capture_spoil(lshard_series *series)
{
	if (series->capture.number)
		series->capture.spoilt = series->capture.number;
	capture_leave(series);
}

static void enter(lshard_series *series, uint64_t number)
{
	memcpy(series->capture.windows, series->windows, series->scheme.map.n_slots * sizeof *series->windows);
	memcpy(series->capture.status, series->window_status,
	       series->scheme.map.n_slots * sizeof *series->window_status);
	memcpy(series->capture.error, series->window_error, series->scheme.map.n_slots * sizeof *series->window_error);
	series->capture.ring = series->ring;
	ring_enter_capture(&series->ring);
	poison_enter_capture(series);
	series->capture.number = number;
}

lshard_status capture_look(lshard_series *series, void *stream)
{
	const lshard_transport_ops *ops = series->group->transport->ops;
	uint64_t number = 0;
	const lshard_status status = ops->capture(series->store, stream, &number);

	if (status < 0)
		return lshard_fail(&series->error, status, SERIES_FORMAT ": %s", SERIES_NAMES(series),
				   series->store->error.text);
	if (number == series->capture.number)
		return LSHARD_OK;
	if (number && number == series->capture.spoilt)
		return lshard_fail(&series->error, LSHARD_ERR_STATE,
				   SERIES_FORMAT
				   ": something that cannot be captured came between the calls of this "
				   "capture (an update, a rewind, a verification, a prepare, a call on a "
				   "stream that is not captured, a region that does not end as it began): end it "
				   "and capture again",
				   SERIES_NAMES(series));
	capture_spoil(series);
	if (number)
		enter(series, number);
	return LSHARD_OK;
}

lshard_status capture_drain(lshard_series *series)
{
	const lshard_transport_ops *ops = series->group->transport->ops;
	lshard_status status = LSHARD_OK;

	capture_spoil(series);
	for (unsigned number = 0; number < series->n_streams && status >= 0; number++)
		status = ops->record_use(series->store, LSHARD_NO_BUFFER, series->streams[number]);
	if (status >= 0)
		status = ops->drain(series->store);
	if (status < 0)
		return lshard_fail(&series->error, status, SERIES_FORMAT ": %s", SERIES_NAMES(series),
				   series->store->error.text);
	return LSHARD_OK;
}
