/* SPDX-License-Identifier: Apache-2.0
 *
 * pass.c - reach, wait, release and their kin: what a program calls while it computes.
 * The ring decides; this file asks it, starts what it says on the transport, and counts. Nothing here allocates or
 * loops over layers.
 */
#include "internal.h"

#include <string.h>

/* ---- Transfers ---- */

static lshard_status start_fetch(lshard_series *series, uint32_t position, uint32_t window, void *stream)
{
	const lshard_transport_ops *ops = series->group->transport->ops;
	const bool comes_here = series->scheme.place[position] == PLACE_WINDOW;
	const uint32_t buffer = comes_here ? poison_buffer_of(series, window) : LSHARD_NO_BUFFER;
	lshard_status status = LSHARD_OK;

	if (comes_here && has_streams(series))
		status = readers_record(series, window);
	if (status >= 0)
		status = ops->fetch(series->store, position, buffer, stream,
				    group_collective(series->group) ? series->group->sequence++ : 0);
	series->window_status[window] = status;
	series->window_landed[window] = false;
	if (status < 0) {
		series->window_error[window] = series->store->error; /* the next failure writes over it */
		series->group->context.log(&series->group->context, LSHARD_LOG_WARN,
					   SERIES_FORMAT ": layer %u cannot be fetched: %s", SERIES_NAMES(series),
					   series_layer(series, position), series->store->error.text);
		return status;
	}
	count(&series->counters.fetches, comes_here);
	count(&series->counters.fetched_bytes, comes_here ? series->scheme.incoming_bytes : 0);
	return LSHARD_OK;
}

/*
 * A fetch that cannot be started is reported by the wait for its layer: the window keeps the status. After a collective
 * call that failed none is started: it would take a number that the other ranks may lack.
 */
static void start_fetches(lshard_series *series, void *stream)
{
	struct ring_fetch fetch;

	while (!series->failed_call && ring_next_fetch(&series->ring, &fetch))
		start_fetch(series, fetch.position, fetch.window, stream);
}

/* Each window gets what it wants, however far ahead: a state that is the same wherever the ring comes from. */
static void start_all_fetches(lshard_series *series, void *stream)
{
	series->ring.horizon = UINT32_MAX;
	start_fetches(series, stream);
	series->ring.horizon = series->scheme.horizon;
}

/* The first fetch that could not be started, with its cause; or OK. What a window does not hold any more counts not. */
static lshard_status failed_fetch(const lshard_series *series, const char **cause)
{
	for (uint32_t window = 0; window < series->scheme.map.n_slots; window++) {
		if (series->windows[window].holds != POSITION_NONE && series->window_status[window] < 0) {
			*cause = series->window_error[window].text;
			return series->window_status[window];
		}
	}
	return LSHARD_OK;
}

static void count_arrival(lshard_series *series, const lshard_arrival *arrival)
{
	struct counters *counters = &series->counters;

	count(&counters->link_busy_ns, arrival->busy_ns);
	if (!arrival->blocked_ns)
		return;
	count(&counters->stalls, 1);
	count(&counters->blocked_ns, arrival->blocked_ns);
	if (arrival->blocked_ns > atomic_load_explicit(&counters->max_blocked_ns, memory_order_relaxed))
		atomic_store_explicit(&counters->max_blocked_ns, arrival->blocked_ns, memory_order_relaxed);
}

/* The layer is where it was fetched. */
static lshard_status await_transfer(lshard_series *series, uint32_t position, uint32_t window, void *stream)
{
	const bool started = series->window_status[window] >= 0;
	const lshard_error *cause = started ? &series->store->error : &series->window_error[window];
	lshard_status status = series->window_status[window];
	lshard_arrival arrival = {0, 0, 0, 0};

	if (series->window_landed[window])
		return LSHARD_OK;
	if (started) {
		status = series->group->transport->ops->wait(series->store, poison_buffer_of(series, window), stream,
							     &arrival);
		count_arrival(series, &arrival);
	}
	if (status >= 0) {
		series->window_landed[window] = !has_streams(series);
		return LSHARD_OK;
	}
	lshard_fail(&series->error, status, SERIES_FORMAT ": layer %u (source: rank %d) did not come: %s",
		    SERIES_NAMES(series), series_layer(series, position),
		    layout_source(&series->scheme.layout, position), cause->text);
	if (status == LSHARD_ERR_TIMEOUT && started)
		return status; /* it may still come: wait can be called again */
	ring_fail(&series->ring, window);
	series->window_status[window] = LSHARD_OK;
	return status;
}

/* After a failure, which is the one to be told. What cannot be hidden now is tried again at the next call. */
static void hide_what_is_left(lshard_series *series, void *stream)
{
	const lshard_error error = series->error;

	poison_hide(series, stream);
	series->error = error;
}

/* The layer is in its window. */
static lshard_status await_window(lshard_series *series, uint32_t position, uint32_t window, void *stream)
{
	lshard_status status = await_transfer(series, position, window, stream);

	if (status >= 0)
		status = poison_show(series, position, window, stream);
	series->windows[window].viewed = status >= 0;
	if (status < 0)
		hide_what_is_left(series, stream); /* the view of an earlier wait has ended, too */
	return status;
}

/* ---- Windows that hold nothing ---- */

static void empty_windows(lshard_series *series)
{
	capture_leave(series);
	ring_reset(&series->ring);
	hide_what_is_left(series, poison_stream(series));
	memset(series->window_status, 0, series->scheme.map.n_slots * sizeof *series->window_status);
	memset(series->window_landed, 0, series->scheme.map.n_slots * sizeof *series->window_landed);
}

void pass_fail(lshard_series *series, const char *call)
{
	if (!group_collective(series->group))
		return;
	empty_windows(series);
	series->failed_call = call;
}

/* After TIMEOUT all goes on; after any other failure nobody knows what this rank still takes part in. */
static lshard_status end_together(lshard_series *series, lshard_status status, const char *call)
{
	if (status < 0 && status != LSHARD_ERR_TIMEOUT)
		pass_fail(series, call);
	return status;
}

/* Not stored layers alone: each rank is told at its first wait, whichever layers it stores. */
static lshard_status refuse_after_failure(lshard_series *series)
{
	if (!series->failed_call)
		return LSHARD_OK;
	return lshard_fail(&series->error, LSHARD_ERR_OUT_OF_STEP,
			   SERIES_FORMAT
			   ": %s failed, so no window holds a layer: call lshard_series_rewind on all ranks",
			   SERIES_NAMES(series), series->failed_call);
}

/* ---- The public calls ---- */

/* What reach, wait and release have in common. */
static inline lshard_status enter(lshard_series *series, uint32_t layer, void *stream, const char *call,
				  uint32_t *position)
{
	lshard_status status;

	if (series->state != SERIES_COMMITTED || group_aborted(series->group) || !group_is_ours(series->group)) {
		status = series_require(series, SERIES_COMMITTED, call);
		if (status < 0)
			return status;
	}
	status = series_position(series, layer, position);
	if (status < 0)
		return status;
	return capture_follow(series, stream);
}

lshard_status lshard_reach(lshard_series *series, uint32_t layer, void *stream)
{
	uint32_t position;
	lshard_status status = enter(series, layer, stream, "lshard_reach", &position);

	if (status >= 0 && has_streams(series))
		status = readers_note(series, stream);
	if (status < 0)
		return status;
	count(&series->counters.reaches, 1);
	ring_reach(&series->ring, position);
	status = poison_hide(series, stream);
	start_fetches(series, stream);
	return status;
}

static lshard_status wait_window(lshard_series *series, uint32_t position, void *stream, unsigned number)
{
	uint32_t window, other = 0;

	window = series->scheme.map.slot_of[position];
	if (group_collective(series->group) && series->windows[window].holds != position &&
	    !series->windows[window].viewed)
		return lshard_fail(
			&series->error, LSHARD_ERR_OUT_OF_STEP,
			SERIES_FORMAT
			": layer %u was not sent: on a collective transport all ranks reach a layer before they wait "
			"for it",
			SERIES_NAMES(series), series_layer(series, position));
	switch (ring_wait(&series->ring, position, number, &window, &other)) {
	case RING_BUSY:
		return lshard_fail(
			&series->error, LSHARD_ERR_BUSY,
			SERIES_FORMAT
			": layer %u needs the window in which layer %u is still viewed: release or reach first",
			SERIES_NAMES(series), series_layer(series, position), series_layer(series, other));
	case RING_MISS:
		count(&series->counters.misses, 1);
		start_fetch(series, position, window, stream);
		series->windows[window].streams |=
			(uint8_t)(1u << number); /* it came after the readers that were recorded */
		break;
	case RING_HELD:
	case RING_STORED:
		break;
	}
	return await_window(series, position, window, stream);
}

lshard_status lshard_wait(lshard_series *series, uint32_t layer, void *stream)
{
	uint32_t position;
	unsigned number = 0;
	lshard_status status = enter(series, layer, stream, "lshard_wait", &position);

	if (status >= 0)
		status = refuse_after_failure(series);
	if (status >= 0 && has_streams(series)) /* readers of stored layers matter too: to update and destroy */
		status = readers_note_stream(series, stream, &number);
	if (status < 0)
		return status;
	count(&series->counters.waits, 1);
	if (series->scheme.place[position] != PLACE_WINDOW)
		return LSHARD_OK;
	return wait_window(series, position, stream, number);
}

lshard_status lshard_release(lshard_series *series, uint32_t layer, void *stream)
{
	uint32_t position;
	lshard_status status = enter(series, layer, stream, "lshard_release", &position);

	if (status >= 0 && has_streams(series))
		status = readers_note(series, stream);
	if (status < 0)
		return status;
	ring_release(&series->ring, position);
	status = poison_hide(series, stream);
	if (!group_collective(series->group)) /* there, transfers start in step, at reach */
		start_fetches(series, stream);
	return status;
}

/* Orders @p stream after all transfers and, with streams, after every reader so far. */
static lshard_status join_transfers(lshard_series *series, void *stream)
{
	const lshard_status status = series->group->transport->ops->join(series->store, stream);

	if (status < 0)
		return lshard_fail(&series->error, status, SERIES_FORMAT ": %s", SERIES_NAMES(series),
				   series->store->error.text);
	return LSHARD_OK;
}

/*
 * A graph replayed on @p stream may read and overwrite any window: all other readers come before it, and it before what
 * follows.
 */
static lshard_status hand_to_stream(lshard_series *series, void *stream)
{
	unsigned number;
	lshard_status status = readers_note_stream(series, stream, &number);

	for (uint32_t window = 0; window < series->scheme.map.n_slots && status >= 0; window++)
		status = readers_record(series, window);
	if (status >= 0)
		status = join_transfers(series, stream);
	if (status >= 0)
		ring_note_stream(&series->ring, number);
	return status;
}

/*
 * Windows whose fetch could not be started hold nothing again. Not on collective transports, where one rank cannot
 * start it again alone.
 */
static void retry_failed(lshard_series *series)
{
	for (uint32_t window = 0; window < series->scheme.map.n_slots; window++) {
		if (series->window_status[window] >= 0 || group_collective(series->group))
			continue;
		ring_fail(&series->ring, window);
		series->window_status[window] = LSHARD_OK;
	}
}

lshard_status lshard_series_prepare(lshard_series *series, void *stream)
{
	const char *cause = NULL;
	lshard_status status = series_require(series, SERIES_COMMITTED, "lshard_series_prepare");
	lshard_status failed;

	if (status >= 0)
		status = capture_follow(series, stream);
	if (status < 0)
		return status;
	if (series->capture.number) {
		capture_spoil(series); /* what is captured already has moved the windows on */
		return lshard_fail(&series->error, LSHARD_ERR_STATE,
				   SERIES_FORMAT ": prepare comes before a capture, not into it", SERIES_NAMES(series));
	}
	status = refuse_after_failure(series);
	if (status < 0)
		return status;
	ring_prepare(&series->ring);
	status = poison_hide(series, stream);
	retry_failed(series);
	start_all_fetches(series, stream);
	if (status >= 0)
		status = has_streams(series) ? hand_to_stream(series, stream) : join_transfers(series, stream);
	failed = failed_fetch(series, &cause);
	if (status >= 0 && failed < 0)
		status = lshard_fail(&series->error, failed, SERIES_FORMAT ": a window cannot be filled: %s",
				     SERIES_NAMES(series), cause);
	return end_together(series, status, "lshard_series_prepare");
}

/* For messages: -1 is nothing. */
static long long held_layer(const lshard_series *series, uint32_t position)
{
	return position == POSITION_NONE ? -1 : (long long)series_layer(series, position);
}

/*
 * A captured region must begin in start-of-pass state, which prepare makes before each replay, and end with the windows
 * as it found them, which is what the ring believes after each replay. Windows of the tail hold nothing at its
 * beginning, and count as such at its end, whatever is in them.
 */
static lshard_status end_capture(lshard_series *series)
{
	const struct slotmap *map = &series->scheme.map;
	const char *cause = NULL;
	const lshard_status failed = failed_fetch(series, &cause);
	uint32_t first = 0, last = 0, window;

	if (failed < 0) {
		lshard_fail(&series->error, failed, SERIES_FORMAT ": a fetch could not be captured: %s",
			    SERIES_NAMES(series), cause); /* before the capture is left, and its causes with it */
		capture_spoil(series);
		return failed;
	}
	for (window = 0; window < map->n_slots; window++) {
		first = series->capture.windows[window].holds;
		last = series->windows[window].holds;
		if (!series->windows[window].tail && (first != last || first != slotmap_next(map, window, 0)))
			break;
	}
	if (window < map->n_slots)
		capture_spoil(
			series); /* a further region in the same capture would find other windows than it thinks */
	else
		capture_leave(series);
	if (window == map->n_slots)
		return LSHARD_OK;
	return lshard_fail(
		&series->error, LSHARD_ERR_NOT_PERIODIC,
		SERIES_FORMAT
		": window %u begins the captured region with layer %lld, ends it with layer %lld, and a pass begins "
		"with layer %u: call lshard_series_prepare before a capture and capture whole passes",
		SERIES_NAMES(series), window, held_layer(series, first), held_layer(series, last),
		series_layer(series, slotmap_next(map, window, 0)));
}

lshard_status lshard_series_join(lshard_series *series, void *stream)
{
	lshard_status status = series_require(series, SERIES_COMMITTED, "lshard_series_join");

	if (status >= 0)
		status = capture_follow(series, stream);
	if (status >= 0)
		status = refuse_after_failure(series);
	if (status < 0)
		return status;
	ring_join(&series->ring);
	status = poison_hide(series, stream);
	start_all_fetches(series, stream);
	if (status >= 0)
		status = join_transfers(series, stream);
	if (series->capture.number && status >= 0)
		return end_capture(series);
	if (!series->capture.number)
		return end_together(series, status, "lshard_series_join");
	capture_spoil(series);
	return status;
}

/* Until all that comes is there, in the order of @p stream. */
static lshard_status await_all(lshard_series *series, void *stream)
{
	lshard_status status = LSHARD_OK;

	for (uint32_t window = 0; window < series->scheme.map.n_slots && status >= 0; window++) {
		const uint32_t position = series->windows[window].holds;

		if (position != POSITION_NONE && series->scheme.place[position] == PLACE_WINDOW)
			status = await_transfer(series, position, window, stream);
	}
	return status < 0 ? status : join_transfers(series, stream);
}

static lshard_status refuse_switch(lshard_series *series)
{
	if (series->capture.number)
		return lshard_fail(&series->error, LSHARD_ERR_STATE,
				   SERIES_FORMAT ": poison is switched before a capture, not in it",
				   SERIES_NAMES(series));
	if (!series->scheme.spares)
		return lshard_fail(&series->error, LSHARD_ERR_STATE,
				   SERIES_FORMAT ": it was created without memory for poison: set the option poison, "
						 "or LAYERSHARD_POISON=ready",
				   SERIES_NAMES(series));
	return LSHARD_OK;
}

lshard_status lshard_series_poison(lshard_series *series, int on, void *stream)
{
	unsigned number;
	lshard_status status = series_require(series, SERIES_COMMITTED, "lshard_series_poison");

	if (status >= 0)
		status = capture_follow(series, stream);
	if (status >= 0)
		status = refuse_after_failure(series);
	if (status < 0 || !series->scheme.windows || !on == !series->poison.on)
		return status;
	status = refuse_switch(series);
	if (status >= 0 && has_streams(series))
		status = readers_note_stream(series, stream, &number);
	if (status < 0)
		return status;
	ring_join(&series->ring);
	status = poison_hide(series, stream);
	if (status >= 0)
		status = await_all(series, stream);
	if (status >= 0)
		status = poison_switch(series, on, stream);
	return end_together(series, status, "lshard_series_poison");
}

/* ---- For load.c and verify.c ---- */

void pass_restart(lshard_series *series)
{
	empty_windows(series);
	series->failed_call = NULL;
	start_all_fetches(series, NULL);
}

void pass_restart_alike(lshard_series *series)
{
	lshard_group *group = series->group;

	for (int32_t rank = 0; rank < group->context.size; rank++)
		if (group->alive[rank] && group->records[rank].values[0] > group->sequence)
			group->sequence = group->records[rank].values[0];
	pass_restart(series);
}

lshard_status pass_fetch(lshard_series *series, uint32_t position)
{
	const uint32_t window = series->scheme.map.slot_of[position];

	ring_reach(&series->ring, position);
	start_fetches(series, NULL);
	if (series->scheme.place[position] != PLACE_WINDOW || series->window_status[window] >= 0)
		return LSHARD_OK;
	return await_window(series, position, window, NULL); /* tells what failed */
}

lshard_status pass_rewind(lshard_series *series, enum step step, const char *call)
{
	lshard_group *group = series->group;
	struct call_record record;
	lshard_status status = series_require(series, SERIES_COMMITTED, call);

	if (status < 0)
		return status;
	if (!group_collective(group)) {
		capture_spoil(series);
		ring_restart(&series->ring);
		status = poison_hide(series, poison_stream(series));
		start_fetches(series, NULL);
		return status;
	}
	status = capture_drain(series);
	ring_join(&series->ring);
	if (status >= 0) /* before the ranks agree: that a layer cannot be hidden is told to all */
		status = poison_hide(series, poison_stream(series));
	record = series_record(series, step, status);
	record.values[0] = group->sequence;
	if (status != LSHARD_ERR_TIMEOUT) /* else the others may not be in this call: one deadline is enough */
		status = group_agree_all(group, record, &series->error);
	if (status < 0)
		pass_fail(series, call); /* what was drained will not come */
	else
		pass_restart_alike(series);
	return status;
}

lshard_status lshard_series_rewind(lshard_series *series)
{
	return pass_rewind(series, STEP_REWIND, "lshard_series_rewind");
}
