/* SPDX-License-Identifier: Apache-2.0
 *
 * callback_device.c - order on streams, where the callback transport's layers live in device memory. Knows the caller's
 * device functions and what reads and fills a window; no driver, and nothing of what the ranks say to each other.
 *
 * The worker puts collectives on one stream of the caller's, each after the ranks have agreed on it. So the host waits
 * for the other ranks' hosts until a collective is on its stream, and never for the device: what reads a window follows
 * an event after the collective, and the collective follows an event after what read the window before. An event is
 * recorded by the thread that has given the stream its work, and followed by the worker when the collective's turn has
 * come: an earlier one, still waiting for a rank, is not held up by it.
 */
#include "callback.h"
#include "clock.h"
#include "host_copy.h"

#include <string.h>
#include <time.h>

#define NAP_NS 50000

/* ---- The caller's functions ------------------------------------------------------------------------------------ */

/* What a failing function left, whose status may be none of ours. */
static lshard_status failed(lshard_error *error, lshard_status status, const char *what, const char *text)
{
	if (status > 0 || strcmp(lshard_status_name(status), "LSHARD_UNKNOWN") == 0)
		status = LSHARD_ERR_CALLBACK;
	return lshard_fail(error, status, "the caller's %s failed: %s", what,
			   text[0] ? text : lshard_status_name(status));
}

static lshard_status record(const struct callback *callback, void **event, void *stream, lshard_error *error)
{
	char text[384] = "";
	const lshard_status status =
		callback->device.record(callback->context.callbacks->user, event, stream, text, sizeof text);

	return status == LSHARD_OK ? status : failed(error, status, "record", text);
}

static lshard_status wait_for_event(const struct callback *callback, void *stream, void *event, lshard_error *error)
{
	char text[384] = "";
	const lshard_status status =
		callback->device.wait(callback->context.callbacks->user, stream, event, text, sizeof text);

	return status == LSHARD_OK ? status : failed(error, status, "wait", text);
}

static lshard_status copy_rows(const struct callback *callback, void *to, uint64_t to_pitch, const void *from,
			       uint64_t from_pitch, uint64_t width, uint64_t rows, lshard_error *error)
{
	char text[384] = "";
	const lshard_status status = callback->device.copy(callback->context.callbacks->user, to, to_pitch, from,
							   from_pitch, width, rows, text, sizeof text);

	return status == LSHARD_OK ? status : failed(error, status, "copy", text);
}

void callback_drop_event(const struct callback *callback, void *event)
{
	if (event)
		callback->device.drop(callback->context.callbacks->user, event);
}

static bool is_set(struct callback *callback, const bool *flag)
{
	bool set;

	pthread_mutex_lock(&callback->lock);
	set = *flag;
	pthread_mutex_unlock(&callback->lock);
	return set;
}

/* What a kernel waits for is not known: it may be its own fault, or a collective's. */
static lshard_status fail_unending(const struct callback *callback, lshard_error *error)
{
	const lshard_context *context = &callback->context;
	char others[200];

	return lshard_fail(error, LSHARD_ERR_TIMEOUT,
			   "rank %d waited %u ms for work on the device: a kernel there does not end, or a collective "
			   "that %s may not have begun",
			   (int)context->rank, (unsigned)context->timeout_ms,
			   callback_others(callback, others, sizeof others));
}

/* Until what comes before the event is done, or @p given_up (NULL: nothing gives up) is set. */
static lshard_status await_event(struct callback *callback, void *event, uint64_t deadline, const bool *given_up,
				 lshard_error *error)
{
	const lshard_context *context = &callback->context;
	const struct timespec nap = {0, NAP_NS};
	char text[384] = "";

	for (;;) {
		const lshard_status status = callback->device.query(context->callbacks->user, event, text, sizeof text);

		if (status == LSHARD_OK)
			return status;
		if (status != LSHARD_IN_PROGRESS)
			return failed(error, status, "query", text);
		if (given_up && is_set(callback, given_up))
			return lshard_fail(error, LSHARD_ERR_ABORTED, "rank %d: the group was aborted or has failed",
					   (int)context->rank);
		if (lshard__now_ns() >= deadline)
			return fail_unending(callback, error);
		nanosleep(&nap, NULL);
	}
}

/* ---- Life ------------------------------------------------------------------------------------------------------ */

bool callback_device_store_open(struct callback_store *store)
{
	const lshard_context *context = store->base.transport->context;

	store->gates = context->allocate(context, (store->base.plan->buffers + (size_t)1) * sizeof *store->gates);
	return store->gates != NULL;
}

void callback_device_store_close(struct callback_store *store)
{
	const struct callback *callback = callback_of(store->base.transport);
	const lshard_context *context = store->base.transport->context;

	if (context->forked(context)) {
		context->release(context, store->gates);
		return;
	}
	callback_drop_event(callback, store->point);
	callback_drop_event(callback, store->came);
	for (uint32_t buffer = 0; store->gates && buffer <= store->base.plan->buffers; buffer++) {
		callback_drop_event(callback, store->gates[buffer].ready);
		for (uint32_t reader = 0; reader < GATE_READERS; reader++)
			callback_drop_event(callback, store->gates[buffer].used[reader]);
	}
	context->release(context, store->gates);
}

/* ---- The worker's ---------------------------------------------------------------------------------------------- */

/* What comes on the collectives' stream comes after all that read the buffer. */
static lshard_status follow_readers(struct callback_store *store, uint32_t buffer, lshard_error *error)
{
	struct callback *callback = callback_of(store->base.transport);
	struct gate *gate = &store->gates[buffer];
	void *events[GATE_READERS];
	lshard_status status = LSHARD_OK;
	uint32_t count = 0;

	pthread_mutex_lock(&callback->lock);
	for (uint32_t reader = 0; reader < gate->readers; reader++) {
		if (gate->fresh[reader])
			events[count++] = gate->used[reader];
		gate->fresh[reader] = false;
	}
	pthread_mutex_unlock(&callback->lock);
	while (count > 0 && status == LSHARD_OK)
		status = wait_for_event(callback, callback->device.stream, events[--count], error);
	return status;
}

lshard_status callback_device_before(struct callback_store *store, uint32_t buffer)
{
	lshard_status status;
	lshard_error error;

	if (buffer == LSHARD_NO_BUFFER)
		return LSHARD_OK;
	status = follow_readers(store, buffer, &error);
	return status == LSHARD_OK ? status : callback_break(callback_of(store->base.transport), status, error.text);
}

lshard_status callback_device_after(struct callback_store *store, uint32_t buffer)
{
	struct callback *callback = callback_of(store->base.transport);
	lshard_status status;
	lshard_error error;

	if (buffer == LSHARD_NO_BUFFER)
		return LSHARD_OK;
	status = record(callback, &store->gates[buffer].ready, callback->device.stream, &error);
	return status == LSHARD_OK ? status : callback_break(callback, status, error.text);
}

/* The caller that reads has the deadline. */
lshard_status callback_device_finish(struct callback *callback)
{
	lshard_error error;
	lshard_status status = record(callback, &callback->done, callback->device.stream, &error);

	if (status == LSHARD_OK)
		status = await_event(callback, callback->done, UINT64_MAX, &callback->stopping, &error);
	if (status < 0 && status != LSHARD_ERR_ABORTED)
		callback_break(callback, status, error.text);
	return status;
}

lshard_status callback_copy_piece(struct callback *callback, const lshard_piece *piece, const unsigned char *shard,
				  unsigned char *layer)
{
	lshard_status status;
	lshard_error error;

	if (!callback->on_device) {
		lshard__host_copy_piece(piece, shard, layer);
		return LSHARD_OK;
	}
	status = copy_rows(callback, layer + piece->layer_offset, piece->layer_pitch, shard + piece->shard_offset,
			   piece->shard_pitch, piece->width, piece->rows, &error);
	return status == LSHARD_OK ? status : callback_break(callback, status, error.text);
}

/* ---- The pass -------------------------------------------------------------------------------------------------- */

static lshard_status tell(struct callback_store *store, lshard_status status, const lshard_error *error)
{
	if (status == LSHARD_OK)
		return status;
	return lshard_fail(&store->base.error, status, "series '%s': %s", store->base.plan->name, error->text);
}

static lshard_status record_use(lshard_store *base, uint32_t buffer, void *stream)
{
	struct callback *callback = callback_of(base->transport);
	struct callback_store *store = callback_store_of(base);
	struct gate *gate = &store->gates[buffer == LSHARD_NO_BUFFER ? base->plan->buffers : buffer];
	uint32_t reader = 0;
	lshard_status status;
	lshard_error error;

	while (reader < gate->readers && gate->streams[reader] != stream)
		reader++;
	if (reader == GATE_READERS)
		return lshard_fail(&base->error, LSHARD_ERR_NOT_SUPPORTED, "series '%s': more than %d streams read it",
				   base->plan->name, GATE_READERS);
	status = record(callback, &gate->used[reader], stream, &error);
	if (status < 0)
		return tell(store, status, &error);
	pthread_mutex_lock(&callback->lock);
	gate->streams[reader] = stream;
	gate->fresh[reader] = true;
	gate->readers += reader == gate->readers;
	pthread_mutex_unlock(&callback->lock);
	return LSHARD_OK;
}

lshard_status callback_device_follow(struct callback_store *store, uint32_t buffer, void *stream)
{
	struct callback *callback = callback_of(store->base.transport);
	lshard_error error;

	if (!store->gates[buffer].ready)
		return LSHARD_OK; /* nothing was ever fetched */
	return tell(store, wait_for_event(callback, stream, store->gates[buffer].ready, &error), &error);
}

/* The next reader that no collective follows yet, counted over all gates; its event, or NULL: there is none. */
static void *next_reader(struct callback_store *store, uint32_t *at, void **stream)
{
	struct callback *callback = callback_of(store->base.transport);
	const uint32_t all = (store->base.plan->buffers + 1) * GATE_READERS;
	void *event = NULL;

	pthread_mutex_lock(&callback->lock);
	for (; *at < all && !event; ++*at) {
		const struct gate *gate = &store->gates[*at / GATE_READERS];
		const uint32_t reader = *at % GATE_READERS;

		if (reader >= gate->readers || !gate->fresh[reader])
			continue;
		event = gate->used[reader];
		*stream = gate->streams[reader];
	}
	pthread_mutex_unlock(&callback->lock);
	return event;
}

lshard_status callback_device_join(struct callback_store *store, void *stream)
{
	struct callback *callback = callback_of(store->base.transport);
	void *event, *other = NULL;
	uint32_t at = 0;
	lshard_error error;
	lshard_status status = record(callback, &store->point, callback->device.stream, &error);

	if (status == LSHARD_OK)
		status = wait_for_event(callback, stream, store->point, &error);
	while (status == LSHARD_OK && (event = next_reader(store, &at, &other)))
		if (other != stream)
			status = wait_for_event(callback, stream, event, &error);
	return tell(store, status, &error);
}

/* The caller copies on the collectives' stream alone, so the program's waits for that, and that for the program's. */
static lshard_status copy_buffer(lshard_store *base, uint32_t to, uint32_t from, void *stream)
{
	struct callback_store *store = callback_store_of(base);
	struct callback *callback = callback_of(base->transport);
	const uint64_t bytes = base->plan->layer_bytes;
	lshard_error error;
	lshard_status status = record(callback, &store->came, stream, &error);

	if (status == LSHARD_OK)
		status = wait_for_event(callback, callback->device.stream, store->came, &error);
	if (status == LSHARD_OK)
		status = follow_readers(store, to, &error);
	if (status == LSHARD_OK)
		status = copy_rows(callback, callback_window(store, to), bytes, callback_window(store, from), bytes,
				   bytes, 1, &error);
	if (status == LSHARD_OK)
		status = record(callback, &store->gates[to].ready, callback->device.stream, &error);
	if (status == LSHARD_OK)
		status = wait_for_event(callback, stream, store->gates[to].ready, &error);
	return tell(store, status, &error);
}

/* All ranks agree on the host on every collective, and a replay would make it without being asked. */
static lshard_status refuse_capture(lshard_store *base, void *stream, uint64_t *capture)
{
	struct callback *callback = callback_of(base->transport);

	*capture = 0;
	if (!callback->device.capturing(callback->context.callbacks->user, stream))
		return LSHARD_OK;
	return lshard_fail(&base->error, LSHARD_ERR_NOT_SUPPORTED,
			   "the transport callback cannot be captured: the ranks agree on the host on each collective "
			   "before it begins, which a replay would not");
}

/* ---- Outside passes -------------------------------------------------------------------------------------------- */

static lshard_status await_stream(struct callback_store *store, uint64_t deadline, const bool *given_up,
				  lshard_error *error)
{
	struct callback *callback = callback_of(store->base.transport);
	lshard_status status = record(callback, &store->point, callback->device.stream, error);

	if (status == LSHARD_OK)
		status = await_event(callback, store->point, deadline, given_up, error);
	return status;
}

static lshard_status settle(struct callback_store *store, uint64_t deadline, const bool *given_up, lshard_error *error)
{
	struct callback *callback = callback_of(store->base.transport);
	lshard_status status = await_stream(store, deadline, given_up, error);
	void *event, *stream = NULL;
	uint32_t at = 0;

	while (status == LSHARD_OK && (event = next_reader(store, &at, &stream)))
		status = await_event(callback, event, deadline, given_up, error);
	return status;
}

lshard_status callback_device_drain(struct callback_store *store, uint64_t deadline_ns)
{
	lshard_error error;

	return tell(store, settle(store, deadline_ns, &callback_of(store->base.transport)->aborted, &error), &error);
}

bool callback_device_store_settle(struct callback_store *store)
{
	lshard_error error;

	return settle(store, callback_deadline(callback_of(store->base.transport)), NULL, &error) == LSHARD_OK;
}

/* With nothing in the queue: the first fetch that nobody was told of and that failed. */
static lshard_status failed_fetch(struct callback_store *store)
{
	for (uint32_t buffer = 0; buffer < store->base.plan->buffers; buffer++)
		if (store->landings[buffer].unwaited && store->landings[buffer].status < 0)
			return tell(store, store->landings[buffer].status, &store->landings[buffer].error);
	return LSHARD_OK;
}

/* One side may be host memory: the copy itself has no deadline, so all else has ended before it. */
lshard_status callback_device_copy(lshard_store *base, void *to, uint64_t to_pitch, const void *from,
				   uint64_t from_pitch, uint64_t width, uint64_t rows)
{
	struct callback_store *store = callback_store_of(base);
	struct callback *callback = callback_of(base->transport);
	lshard_status status = failed_fetch(store);
	lshard_error error;

	if (status < 0)
		return status;
	status = await_stream(store, callback_deadline(callback), &callback->aborted, &error);
	if (status == LSHARD_OK)
		status = copy_rows(callback, to, to_pitch, from, from_pitch, width, rows, &error);
	if (status == LSHARD_OK)
		status = await_stream(store, callback_deadline(callback), &callback->aborted, &error);
	return tell(store, status, &error);
}

/* ---- The table --------------------------------------------------------------------------------------------------- */

lshard_status callback_device_take(struct callback *callback, const lshard_context *context, lshard_error *error)
{
	const lshard_device_callbacks *calls = context->callbacks->device;

	if (!calls)
		return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED,
				   "callback: rank %d gives callbacks for host memory only", (int)context->rank);
	if (!calls->allocate || !calls->release || !calls->record || !calls->wait || !calls->query || !calls->drop ||
	    !calls->copy || !calls->capturing)
		return lshard_fail(error, LSHARD_ERR_INVALID,
				   "callback: rank %d gives callbacks for a device of which one is NULL",
				   (int)context->rank);
	callback->device = *calls;
	callback->on_device = true;
	callback->ops.capabilities |= LSHARD_CAP_STREAMS | LSHARD_CAP_CAPTURE;
	callback->ops.record_use = record_use;
	callback->ops.capture = refuse_capture;
	callback->ops.copy_buffer = copy_buffer;
	return LSHARD_OK;
}
