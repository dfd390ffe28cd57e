/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_stream.c - copies in stream order: what comes before them, what they come before, also inside captures.
 * Knows buffers, streams and events; knows nothing of whose turn a window is.
 *
 * A store's copies (cuda_fetch.c) are issued by the rank that needs the bytes, on a stream of its own device: nothing
 * of the source takes part. Outside captures one stream copies, each buffer has an event after its last copy and one
 * for each stream that has read it. Inside a capture another stream does, drawn into the capture by an event of the
 * caller's stream and led back by join. The two sets of events are never mixed, so a capture that is thrown away leaves
 * nothing behind that anyone would look at.
 */
#include "cuda_transport.h"
#include "sockets.h"

#include <sched.h>
#include <string.h>
#include <time.h>

#define SPIN_NS 50000u /* waits shorter than this do not sleep */
#define NAP_NS  50000

#define CAPTURE_INVALIDATED 901

static struct cuda *cuda_of(const lshard_store *store)
{
	return (struct cuda *)store->transport;
}

static struct cuda_store *store_of(lshard_store *store)
{
	return (struct cuda_store *)store;
}

static lshard_status failed(lshard_store *store, cuda_result result, const char *what, uint32_t number)
{
	if (result == CUDA_OK)
		return LSHARD_OK;
	return cuda_failed(&cuda_of(store)->driver, &store->error, result, "series '%s': %s %u", store->plan->name,
			   what, (unsigned)number);
}

/* ---- streams and events ---- */

static size_t events_per_buffer(void)
{
	return 2 + CUDA_READERS;
}

static void hand_out_events(struct cuda_store *store)
{
	const cuda_event *next = store->events;

	store->point = *next++;
	store->done = *next++;
	for (uint32_t i = 0; i <= store->base.plan->windows; i++) {
		store->buffers[i].ready = *next++;
		store->buffers[i].captured_ready = *next++;
		memcpy(store->buffers[i].used, next, sizeof store->buffers[i].used);
		next += CUDA_READERS;
	}
}

static cuda_result create_events(struct cuda_store *store, const struct cuda_driver *driver, size_t count)
{
	cuda_result result = CUDA_OK;

	while (store->n_events < count && result == CUDA_OK) {
		result = driver->event_create(&store->events[store->n_events], CUDA_EVENT_WITHOUT_TIME);
		store->n_events += result == CUDA_OK;
	}
	return result;
}

lshard_status cuda_streams_open(struct cuda_store *store, lshard_error *error)
{
	struct cuda *cuda = cuda_of(&store->base);
	const lshard_context *context = cuda->base.context;
	const size_t buffers = (size_t)store->base.plan->windows + 1;
	const size_t count = 2 + buffers * events_per_buffer();
	cuda_result result;

	store->buffers = context->allocate(context, buffers * sizeof *store->buffers);
	store->events = context->allocate(context, count * sizeof *store->events);
	if (!store->buffers || !store->events)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "series '%s': no memory for %u windows",
				   store->base.plan->name, (unsigned)store->base.plan->windows);
	result = cuda->driver.stream_create(&store->copies, CUDA_STREAM_NON_BLOCKING, cuda->priority);
	if (result == CUDA_OK)
		result = cuda->driver.stream_create(&store->captured_copies, CUDA_STREAM_NON_BLOCKING, cuda->priority);
	if (result == CUDA_OK)
		result = create_events(store, &cuda->driver, count);
	if (result != CUDA_OK)
		return cuda_failed(&cuda->driver, error, result, "series '%s': streams and events",
				   store->base.plan->name);
	hand_out_events(store);
	return LSHARD_OK;
}

static void destroy_streams(struct cuda_store *store)
{
	struct cuda *cuda = cuda_of(&store->base);

	while (store->n_events)
		cuda->driver.event_destroy(store->events[--store->n_events]);
	if (store->captured_copies)
		cuda->driver.stream_destroy(store->captured_copies);
	if (store->copies)
		cuda->driver.stream_destroy(store->copies);
}

void cuda_streams_close(struct cuda_store *store)
{
	struct cuda *cuda = cuda_of(&store->base);
	const lshard_context *context = cuda->base.context;

	cuda_fetches_close(store);
	if (!context->forked(context))
		destroy_streams(store);
	if (store->events)
		context->release(context, store->events);
	if (store->buffers)
		context->release(context, store->buffers);
}

/* ---- waiting on the host ---- */

static void pause_until_later(uint64_t begin)
{
	const struct timespec nap = {0, NAP_NS};

	if (lshard__now_ns() - begin < SPIN_NS)
		sched_yield();
	else
		nanosleep(&nap, NULL);
}

lshard_status cuda_await(struct cuda *cuda, cuda_event event, uint64_t deadline, int heed_abort, lshard_error *error)
{
	const uint64_t begin = lshard__now_ns();

	for (;;) {
		const cuda_result result = cuda->driver.event_query(event);

		if (result == CUDA_OK)
			return LSHARD_OK;
		if (result != CUDA_NOT_READY)
			return cuda_failed(&cuda->driver, error, result, "rank %d: work on the device",
					   (int)cuda->base.context->rank);
		if (heed_abort && atomic_load(&cuda->aborted))
			return lshard_fail(error, LSHARD_ERR_ABORTED, "rank %d was aborted",
					   (int)cuda->base.context->rank);
		if (lshard__now_ns() >= deadline)
			return lshard_fail(
				error, LSHARD_ERR_TIMEOUT,
				"rank %d waited %u ms for work on the device: a kernel or copy there does not end",
				(int)cuda->base.context->rank, (unsigned)cuda->base.context->timeout_ms);
		pause_until_later(begin);
	}
}

static lshard_status await_copies(struct cuda_store *store, uint64_t deadline, int heed_abort)
{
	struct cuda *cuda = cuda_of(&store->base);
	const cuda_result result = cuda->driver.event_record(store->done, store->copies);

	if (result != CUDA_OK)
		return cuda_failed(&cuda->driver, &store->base.error, result, "series '%s': copies",
				   store->base.plan->name);
	return cuda_await(cuda, store->done, deadline, heed_abort, &store->base.error);
}

lshard_status cuda_settle(struct cuda_store *store, int heed_abort)
{
	struct cuda *cuda = cuda_of(&store->base);
	const uint64_t deadline = lshard__deadline_ns(cuda->base.context->timeout_ms);
	lshard_status status;

	if (!store->point)
		return LSHARD_OK; /* was never opened */
	cuda_pace_bypass(cuda->pace, 1);
	status = await_copies(store, deadline, heed_abort);
	for (uint32_t i = 0; i <= store->base.plan->windows && status == LSHARD_OK; i++) {
		struct cuda_buffer *buffer = &store->buffers[i];

		while (buffer->n_used && status == LSHARD_OK) {
			status = cuda_await(cuda, buffer->used[buffer->n_used - 1], deadline, heed_abort,
					    &store->base.error);
			buffer->n_used -= status == LSHARD_OK;
		}
	}
	store->unsettled = status != LSHARD_OK;
	cuda->unsettled |= store->unsettled && !heed_abort; /* host functions may still come */
	cuda_pace_bypass(cuda->pace, -1);
	return status;
}

/* ---- captures ---- */

/* 0: @p stream is not captured. The legacy stream, which NULL is, cannot be. */
static cuda_result capture_of(struct cuda *cuda, void *stream, uint64_t *capture)
{
	int state = CUDA_CAPTURE_NONE;
	uint64_t number = 0;
	cuda_result result = stream ? cuda->driver.stream_is_capturing(stream, &state) : CUDA_OK;

	*capture = 0;
	if (result != CUDA_OK || state == CUDA_CAPTURE_NONE)
		return result;
	if (state == CUDA_CAPTURE_ACTIVE)
		result = cuda->driver.stream_capture(stream, &state, &number, NULL, NULL, NULL);
	if (result == CUDA_OK && state != CUDA_CAPTURE_ACTIVE)
		result = CAPTURE_INVALIDATED;
	if (result == CUDA_OK)
		*capture = number + 1;
	return result;
}

/*
 * What is captured on @p stream so far comes before the copies captured from now on; the first time draws them into the
 * capture.
 */
static cuda_result follow_captured(struct cuda_store *store, void *stream, uint64_t capture)
{
	const struct cuda_driver *driver = &cuda_of(&store->base)->driver;
	cuda_result result = driver->event_record(store->point, stream);

	if (result == CUDA_OK)
		result = driver->stream_wait(store->captured_copies, store->point, 0);
	if (result == CUDA_OK)
		store->capture = capture;
	return result;
}

static cuda_result fetch_captured(struct cuda_store *store, uint32_t position, uint32_t number, void *stream,
				  uint64_t capture)
{
	const struct cuda_driver *driver = &cuda_of(&store->base)->driver;
	struct cuda_buffer *buffer = &store->buffers[number];
	cuda_result result = CUDA_OK;

	if (store->capture != capture)
		result = follow_captured(store, stream, capture);
	if (result == CUDA_OK)
		result = cuda_copy_layer(store, store->captured_copies, position,
					 cuda_buffer_address(store, number, position), 1);
	if (result == CUDA_OK)
		result = driver->event_record(buffer->captured_ready, store->captured_copies);
	if (result == CUDA_OK)
		buffer->captured = capture;
	return result;
}

/* ---- the pass ---- */

static cuda_result fetch_eager(struct cuda_store *store, uint32_t position, uint32_t number)
{
	const struct cuda_driver *driver = &cuda_of(&store->base)->driver;
	struct cuda_buffer *buffer = &store->buffers[number];
	cuda_result result = CUDA_OK;

	for (unsigned i = 0; i < buffer->n_used && result == CUDA_OK; i++)
		result = driver->stream_wait(store->copies, buffer->used[i], 0);
	if (result != CUDA_OK)
		return result;
	buffer->n_used = 0;
	result = cuda_enqueue_fetch(store, position, number);
	if (result == CUDA_OK)
		result = driver->event_record(buffer->ready, store->copies);
	buffer->fetched |= result == CUDA_OK;
	return result;
}

lshard_status cuda_fetch(lshard_store *base, uint32_t position, uint32_t number, void *stream, uint64_t sequence)
{
	struct cuda_store *store = store_of(base);
	struct cuda *cuda = cuda_of(base);
	const int pushed = cuda_step(cuda);
	uint64_t capture = 0;
	cuda_result result = capture_of(cuda, stream, &capture);

	(void)sequence;
	if (result == CUDA_OK)
		result = capture ? fetch_captured(store, position, number, stream, capture)
				 : fetch_eager(store, position, number);
	cuda_stepped(cuda, pushed);
	return failed(base, result, "copying the layer at position", position);
}

lshard_status cuda_wait(lshard_store *base, uint32_t number, void *stream, lshard_arrival *arrival)
{
	struct cuda *cuda = cuda_of(base);
	struct cuda_buffer *buffer = &store_of(base)->buffers[number];
	const int pushed = cuda_step(cuda);
	uint64_t capture = 0;
	cuda_result result = capture_of(cuda, stream, &capture);

	memset(arrival, 0, sizeof *arrival);
	if (result == CUDA_OK && !capture && buffer->fetched)
		result = cuda->driver.stream_wait(stream, buffer->ready, 0);
	else if (result == CUDA_OK && capture && buffer->captured == capture)
		result = cuda->driver.stream_wait(stream, buffer->captured_ready, 0);
	cuda_stepped(cuda, pushed);
	return failed(base, result, "waiting for window", number);
}

/* More streams than the core allows would be its error: the oldest is then kept waiting for by the newest. */
static cuda_result record_eager(struct cuda_store *store, struct cuda_buffer *buffer, void *stream)
{
	const struct cuda_driver *driver = &cuda_of(&store->base)->driver;
	unsigned i = 0;
	cuda_result result = CUDA_OK;

	while (i < buffer->n_used && buffer->readers[i] != stream)
		i++;
	if (i == CUDA_READERS)
		result = driver->stream_wait(stream, buffer->used[--i], 0);
	if (result == CUDA_OK)
		result = driver->event_record(buffer->used[i], stream);
	if (result != CUDA_OK)
		return result;
	buffer->readers[i] = stream;
	if (i == buffer->n_used)
		buffer->n_used++;
	return CUDA_OK;
}

static cuda_result record_captured(struct cuda_store *store, struct cuda_buffer *buffer, void *stream, uint64_t capture)
{
	buffer->captured_by_many =
		buffer->captured_used == capture && (buffer->captured_by_many || buffer->captured_reader != stream);
	buffer->captured_used = capture;
	buffer->captured_reader = stream;
	return follow_captured(store, stream, capture);
}

lshard_status cuda_record_use(lshard_store *base, uint32_t number, void *stream)
{
	struct cuda_store *store = store_of(base);
	struct cuda *cuda = cuda_of(base);
	const int nowhere = number == LSHARD_NO_BUFFER;
	const int pushed = cuda_step(cuda);
	uint64_t capture = 0;
	cuda_result result = capture_of(cuda, stream, &capture);

	if (result == CUDA_OK && !capture)
		result = record_eager(store, &store->buffers[nowhere ? base->plan->windows : number], stream);
	else if (result == CUDA_OK && !nowhere) /* what is captured does not run: drain has nothing to wait for */
		result = record_captured(store, &store->buffers[number], stream, capture);
	cuda_stepped(cuda, pushed);
	return failed(base, result, "recording a use of window", number);
}

static cuda_result join_eager(struct cuda_store *store, void *stream)
{
	const struct cuda_driver *driver = &cuda_of(&store->base)->driver;
	cuda_result result = driver->event_record(store->done, store->copies);

	if (result == CUDA_OK)
		result = driver->stream_wait(stream, store->done, 0);
	for (uint32_t buffer = 0; buffer <= store->base.plan->windows; buffer++)
		for (unsigned i = 0; i < store->buffers[buffer].n_used && result == CUDA_OK; i++)
			if (store->buffers[buffer].readers[i] != stream)
				result = driver->stream_wait(stream, store->buffers[buffer].used[i], 0);
	return result;
}

/* Leads the copies back into the caller's stream: a capture cannot end with a stream that is not. */
static cuda_result join_captured(struct cuda_store *store, void *stream, uint64_t capture)
{
	const struct cuda_driver *driver = &cuda_of(&store->base)->driver;
	cuda_result result;

	if (store->capture != capture)
		return CUDA_OK; /* nothing was copied in it */
	result = driver->event_record(store->point, store->captured_copies);
	if (result == CUDA_OK)
		result = driver->stream_wait(stream, store->point, 0);
	return result;
}

lshard_status cuda_join(lshard_store *base, void *stream)
{
	struct cuda *cuda = cuda_of(base);
	const int pushed = cuda_step(cuda);
	uint64_t capture = 0;
	cuda_result result = capture_of(cuda, stream, &capture);

	if (result == CUDA_OK)
		result = capture ? join_captured(store_of(base), stream, capture) : join_eager(store_of(base), stream);
	cuda_stepped(cuda, pushed);
	return failed(base, result, "joining the copies into a stream, windows:", base->plan->windows);
}

lshard_status cuda_capture(lshard_store *base, void *stream, uint64_t *capture)
{
	struct cuda *cuda = cuda_of(base);
	const int pushed = cuda_step(cuda);
	uint64_t number = 0;
	const cuda_result result = capture_of(cuda, stream, &number);

	cuda_stepped(cuda, pushed);
	if (result != CUDA_OK)
		return cuda_failed(&cuda->driver, &base->error, result, "series '%s': is the stream being captured?",
				   base->plan->name);
	*capture = number;
	return LSHARD_OK;
}

/* ---- from buffer to buffer ---- */

static cuda_result copy_on(struct cuda_store *store, uint32_t to, uint32_t from, void *stream)
{
	return cuda_of(&store->base)
		->driver.copy(cuda_buffer_address(store, to, 0), cuda_buffer_address(store, from, 0),
			      (size_t)store->base.plan->layer_bytes, stream);
}

/* What other streams have read comes before the copies that are captured: so does this, by way of those. */
static cuda_result await_captured_readers(struct cuda_store *store, const struct cuda_buffer *buffer, void *stream,
					  uint64_t capture)
{
	if (buffer->captured_used != capture || (buffer->captured_reader == stream && !buffer->captured_by_many))
		return CUDA_OK;
	return join_captured(store, stream, capture);
}

/* Who overwrites the buffer comes after this copy as after a reader. */
static cuda_result copy_buffer_captured(struct cuda_store *store, uint32_t to, uint32_t from, void *stream,
					uint64_t capture)
{
	struct cuda_buffer *buffer = &store->buffers[to];
	cuda_result result = await_captured_readers(store, buffer, stream, capture);

	if (result == CUDA_OK)
		result = copy_on(store, to, from, stream);
	if (result == CUDA_OK)
		result = record_captured(store, buffer, stream, capture);
	if (result == CUDA_OK)
		result = cuda_of(&store->base)->driver.event_record(buffer->captured_ready, stream);
	if (result == CUDA_OK)
		buffer->captured = capture;
	return result;
}

static cuda_result copy_buffer_eager(struct cuda_store *store, uint32_t to, uint32_t from, void *stream)
{
	const struct cuda_driver *driver = &cuda_of(&store->base)->driver;
	struct cuda_buffer *buffer = &store->buffers[to];
	cuda_result result = CUDA_OK;

	for (unsigned i = 0; i < buffer->n_used && result == CUDA_OK; i++)
		if (buffer->readers[i] != stream)
			result = driver->stream_wait(stream, buffer->used[i], 0);
	if (result == CUDA_OK)
		result = copy_on(store, to, from, stream);
	if (result == CUDA_OK)
		result = driver->event_record(buffer->ready, stream);
	if (result != CUDA_OK)
		return result;
	buffer->n_used = 0;
	buffer->fetched = 1;
	return record_eager(store, buffer, stream);
}

lshard_status cuda_copy_buffer(lshard_store *base, uint32_t to, uint32_t from, void *stream)
{
	struct cuda_store *store = store_of(base);
	struct cuda *cuda = cuda_of(base);
	const int pushed = cuda_step(cuda);
	uint64_t capture = 0;
	cuda_result result = capture_of(cuda, stream, &capture);

	if (result == CUDA_OK)
		result = capture ? copy_buffer_captured(store, to, from, stream, capture)
				 : copy_buffer_eager(store, to, from, stream);
	cuda_stepped(cuda, pushed);
	return failed(base, result, "copying to window", to);
}

/* ---- outside passes ---- */

lshard_status cuda_drain(lshard_store *base)
{
	struct cuda *cuda = cuda_of(base);
	const struct cuda_scope scope = cuda_enter(cuda);
	const lshard_status status = cuda_settle(store_of(base), 1);

	cuda_leave(cuda, scope);
	return status;
}

lshard_status cuda_read(lshard_store *base, uint32_t position, void *destination)
{
	struct cuda_store *store = store_of(base);
	struct cuda *cuda = cuda_of(base);
	const struct cuda_scope scope = cuda_enter(cuda);
	lshard_status status = failed(base, cuda_copy_layer(store, store->copies, position, (uintptr_t)destination, 0),
				      "reading the layer at position", position);

	if (status == LSHARD_OK)
		status = await_copies(store, lshard__deadline_ns(cuda->base.context->timeout_ms), 1);
	cuda_leave(cuda, scope);
	return status;
}

lshard_status cuda_copy(lshard_store *base, void *to, uint64_t to_pitch, const void *from, uint64_t from_pitch,
			uint64_t width, uint64_t rows)
{
	struct cuda_store *store = store_of(base);
	struct cuda *cuda = cuda_of(base);
	const struct cuda_scope scope = cuda_enter(cuda);
	const struct cuda_rows wish = {(uintptr_t)to, to_pitch, (uintptr_t)from, from_pitch, width, rows};
	const uint32_t timeout_ms = cuda->base.context->timeout_ms;
	/* The driver's copies to the host's memory wait for what is before them, and know no deadline. */
	lshard_status status = await_copies(store, lshard__deadline_ns(timeout_ms), 1);

	if (status == LSHARD_OK)
		status = failed(base, cuda_copy_rows(cuda, store->copies, &wish), "copying rows:", (uint32_t)rows);
	if (status == LSHARD_OK)
		status = await_copies(store, lshard__deadline_ns(timeout_ms), 1);
	cuda_leave(cuda, scope);
	return status;
}
