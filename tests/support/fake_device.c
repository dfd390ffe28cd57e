/* SPDX-License-Identifier: Apache-2.0
 *
 * fake_device.c - see fake_device.h. One lock for a device; every stream is a thread that takes a little time
 * for all it does.
 */
#include "fake_device.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MOST_WORK   4096
#define MOST_BLOCKS 64

struct event {
	uint64_t recorded, happened; /* the last of each */
};

struct work {
	enum { RECORD, WAIT, COPY, BROADCAST, GATHER, KERNEL } kind;
	struct event *event;
	uint64_t number; /* of the record; of a kernel: its value */
	unsigned char *to;
	const unsigned char *from;
	size_t to_pitch, from_pitch, width, rows;
	int32_t root;
	void (*kernel)(void *user, uint64_t value);
	void *user;
};

struct stream {
	struct fake *fake;
	pthread_t thread;
	struct work work[MOST_WORK]; /* a ring */
	size_t given, done;
};

struct fake {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct stream streams[FAKE_STREAMS];
	struct seat *host_seat, *device_seat;
	const lshard_callbacks *on_host, *on_device; /* the circles' */
	lshard_callbacks callbacks;
	lshard_device_callbacks device;
	struct {
		unsigned char *begin;
		size_t bytes;
	} blocks[MOST_BLOCKS];
	long events;
	long collectives, copies;
	long calls, fail_at;
	long rest; /* of allocations; -1: any number */
	long slow_ms;
	int held; /* the first stream that is */
	bool capturing, unsure, ending;
	bool torn; /* memory was released that a stream had still to do with */
};

/* ---- What streams do ------------------------------------------------------------------------------------------- */

static void take_time(const struct stream *stream, size_t number, long slow_ms)
{
	const long us = (long)((number * 7919 + (size_t)(stream - stream->fake->streams) * 104729) % 5) * 60;

	nanosleep(&(struct timespec){slow_ms / 1000, us * 1000 + slow_ms % 1000 * 1000000}, NULL);
}

static void collect(struct fake *fake, const struct work *work)
{
	const lshard_callbacks *calls = fake->on_device;
	char text[256];
	void *begun = NULL;
	lshard_status status =
		work->kind == BROADCAST
			? calls->broadcast(calls->user, work->to, work->width, work->root, &begun, text, sizeof text)
			: calls->allgather(calls->user, work->from, work->to, work->width, &begun, text, sizeof text);

	while (status == LSHARD_OK && calls->finish(calls->user, begun, 50, text, sizeof text) == LSHARD_IN_PROGRESS)
		;
}

static void run(struct stream *stream, const struct work *work, long slow_ms)
{
	take_time(stream, stream->done, work->kind == BROADCAST || work->kind == GATHER ? slow_ms : 0);
	if (work->kind == KERNEL)
		work->kernel(work->user, work->number);
	if (work->kind == BROADCAST || work->kind == GATHER)
		collect(stream->fake, work);
	for (size_t row = 0; work->kind == COPY && row < work->rows; row++)
		memcpy(work->to + row * work->to_pitch, work->from + row * work->from_pitch, work->width);
}

/* With the lock. */
static bool may_run(const struct stream *stream)
{
	const struct fake *fake = stream->fake;
	const struct work *work = &stream->work[stream->done % MOST_WORK];

	if (stream->done == stream->given || stream - fake->streams >= fake->held)
		return false;
	return work->kind != WAIT || work->event->happened >= work->number;
}

static void *run_stream(void *argument)
{
	struct stream *stream = argument;
	struct fake *fake = stream->fake;

	pthread_mutex_lock(&fake->lock);
	for (;;) {
		struct work work;
		long slow_ms;

		while (!may_run(stream) && !fake->ending)
			pthread_cond_wait(&fake->changed, &fake->lock);
		if (fake->ending)
			break;
		work = stream->work[stream->done % MOST_WORK];
		slow_ms = fake->slow_ms;
		pthread_mutex_unlock(&fake->lock);
		run(stream, &work, slow_ms);
		pthread_mutex_lock(&fake->lock);
		if (work.kind == RECORD)
			work.event->happened = work.number;
		stream->done++;
		pthread_cond_broadcast(&fake->changed);
	}
	pthread_mutex_unlock(&fake->lock);
	return NULL;
}

/* With the lock. */
static void give(struct stream *stream, struct work work)
{
	if (stream->given - stream->done == MOST_WORK)
		abort();
	stream->work[stream->given++ % MOST_WORK] = work;
	pthread_cond_broadcast(&stream->fake->changed);
}

/* ---- The library's calls --------------------------------------------------------------------------------------- */

static bool is_ours(struct fake *fake, const void *address)
{
	const unsigned char *at = address;
	bool found = false;

	pthread_mutex_lock(&fake->lock);
	for (int i = 0; i < MOST_BLOCKS; i++)
		found = found || (fake->blocks[i].begin && at >= fake->blocks[i].begin &&
				  at < fake->blocks[i].begin + fake->blocks[i].bytes);
	pthread_mutex_unlock(&fake->lock);
	return found;
}

static void *fake_allocate(void *user, size_t bytes, size_t alignment)
{
	struct fake *fake = user;
	const size_t whole = (bytes + alignment - 1) / alignment * alignment;
	unsigned char *block;
	int i = 0;

	if (fake->rest == 0)
		return NULL;
	fake->rest -= fake->rest > 0;
	block = aligned_alloc(alignment, whole);
	if (!block)
		abort();
	memset(block, 0, whole);
	pthread_mutex_lock(&fake->lock);
	while (fake->blocks[i].begin)
		if (++i == MOST_BLOCKS)
			abort();
	fake->blocks[i].begin = block;
	fake->blocks[i].bytes = whole;
	pthread_mutex_unlock(&fake->lock);
	return block;
}

/* With the lock. */
static bool is_in_use(const struct fake *fake, const unsigned char *begin, size_t bytes)
{
	bool used = false;

	for (int i = 0; i < FAKE_STREAMS; i++)
		for (size_t at = fake->streams[i].done; at < fake->streams[i].given; at++) {
			const unsigned char *to = fake->streams[i].work[at % MOST_WORK].to;
			const unsigned char *from = fake->streams[i].work[at % MOST_WORK].from;

			used = used || (to >= begin && to < begin + bytes) || (from >= begin && from < begin + bytes);
		}
	return used;
}

static void fake_release(void *user, void *pointer)
{
	struct fake *fake = user;

	pthread_mutex_lock(&fake->lock);
	for (int i = 0; i < MOST_BLOCKS; i++)
		if (fake->blocks[i].begin == pointer) {
			fake->torn = fake->torn || is_in_use(fake, pointer, fake->blocks[i].bytes);
			fake->blocks[i].begin = NULL;
		}
	pthread_mutex_unlock(&fake->lock);
	free(pointer);
}

/* With the lock. */
static lshard_status told_to_fail(struct fake *fake, char *error, size_t error_bytes)
{
	if (fake->fail_at < 0 || fake->calls++ < fake->fail_at)
		return LSHARD_OK;
	snprintf(error, error_bytes, "the device is on fire");
	return LSHARD_ERR_TRANSPORT;
}

static lshard_status fake_record(void *user, void **event, void *stream, char *error, size_t error_bytes)
{
	struct fake *fake = user;
	struct event *made;
	lshard_status status;

	pthread_mutex_lock(&fake->lock);
	status = told_to_fail(fake, error, error_bytes);
	if (status == LSHARD_OK && !*event) {
		*event = calloc(1, sizeof *made);
		fake->events++;
	}
	made = *event;
	if (status == LSHARD_OK)
		give(stream, (struct work){.kind = RECORD, .event = made, .number = ++made->recorded});
	pthread_mutex_unlock(&fake->lock);
	return status;
}

static lshard_status fake_wait(void *user, void *stream, void *event, char *error, size_t error_bytes)
{
	struct fake *fake = user;
	struct event *awaited = event;
	lshard_status status;

	pthread_mutex_lock(&fake->lock);
	status = told_to_fail(fake, error, error_bytes);
	if (status == LSHARD_OK)
		give(stream, (struct work){.kind = WAIT, .event = awaited, .number = awaited->recorded});
	pthread_mutex_unlock(&fake->lock);
	return status;
}

static lshard_status fake_query(void *user, void *event, char *error, size_t error_bytes)
{
	struct fake *fake = user;
	const struct event *asked = event;
	lshard_status status;

	pthread_mutex_lock(&fake->lock);
	status = asked->happened < asked->recorded ? LSHARD_IN_PROGRESS : LSHARD_OK;
	if (fake->unsure) {
		snprintf(error, error_bytes, "the device does not know");
		status = LSHARD_ERR_TRANSPORT;
	}
	pthread_mutex_unlock(&fake->lock);
	return status;
}

static void fake_drop(void *user, void *event)
{
	struct fake *fake = user;

	pthread_mutex_lock(&fake->lock);
	fake->events--;
	pthread_mutex_unlock(&fake->lock);
	free(event);
}

static lshard_status fake_copy(void *user, void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
			       size_t rows, char *error, size_t error_bytes)
{
	struct fake *fake = user;
	const bool device = is_ours(fake, to) && is_ours(fake, from);
	lshard_status status;
	bool waits; /* it may, with host memory */

	pthread_mutex_lock(&fake->lock);
	waits = fake->slow_ms > 0 || fake->copies++ % 2 == 0;
	status = told_to_fail(fake, error, error_bytes);
	if (status < 0)
		goto unlock;
	give(&fake->streams[0], (struct work){.kind = COPY,
					      .to = to,
					      .from = from,
					      .to_pitch = to_pitch,
					      .from_pitch = from_pitch,
					      .width = width,
					      .rows = rows});
	while (waits && !device && fake->streams[0].done < fake->streams[0].given)
		pthread_cond_wait(&fake->changed, &fake->lock);
unlock:
	pthread_mutex_unlock(&fake->lock);
	return status;
}

static int fake_capturing(void *user, void *stream)
{
	struct fake *fake = user;
	int capturing;

	(void)stream;
	pthread_mutex_lock(&fake->lock);
	capturing = fake->capturing;
	pthread_mutex_unlock(&fake->lock);
	return capturing;
}

/* *work is the circle's for what happens on the host, and the fake itself for what is only enqueued. */
static lshard_status enqueue(struct fake *fake, struct work work, void **begun)
{
	pthread_mutex_lock(&fake->lock);
	give(&fake->streams[0], work);
	fake->collectives++;
	pthread_mutex_unlock(&fake->lock);
	*begun = fake;
	return LSHARD_OK;
}

static lshard_status fake_broadcast(void *user, void *bytes, size_t count, int32_t root, void **work, char *error,
				    size_t error_bytes)
{
	struct fake *fake = user;

	if (is_ours(fake, bytes))
		return enqueue(fake, (struct work){.kind = BROADCAST, .to = bytes, .width = count, .root = root}, work);
	return fake->on_host->broadcast(fake->on_host->user, bytes, count, root, work, error, error_bytes);
}

static lshard_status fake_allgather(void *user, const void *send, void *receive, size_t count, void **work, char *error,
				    size_t error_bytes)
{
	struct fake *fake = user;

	if (is_ours(fake, receive))
		return enqueue(fake, (struct work){.kind = GATHER, .to = receive, .from = send, .width = count}, work);
	return fake->on_host->allgather(fake->on_host->user, send, receive, count, work, error, error_bytes);
}

static lshard_status fake_finish(void *user, void *work, uint32_t timeout_ms, char *error, size_t error_bytes)
{
	struct fake *fake = user;

	return work == fake ? LSHARD_OK
			    : fake->on_host->finish(fake->on_host->user, work, timeout_ms, error, error_bytes);
}

static void fake_stop(void *user)
{
	struct fake *fake = user;

	fake->on_host->stop(fake->on_host->user);
	fake->on_device->stop(fake->on_device->user);
}

const lshard_callbacks *fake_callbacks(const struct fake *fake)
{
	return &fake->callbacks;
}

/* ---- The test's calls ------------------------------------------------------------------------------------------ */

struct fake *fake_open(const struct member *member)
{
	struct fake *fake = calloc(1, sizeof *fake);

	if (!fake)
		abort();
	fake->host_seat = circle_join(member);
	fake->device_seat = fake->host_seat ? circle_join(member) : NULL;
	if (!fake->device_seat) {
		circle_leave(fake->host_seat);
		free(fake);
		return NULL;
	}
	fake->on_host = seat_callbacks(fake->host_seat);
	fake->on_device = seat_callbacks(fake->device_seat);
	fake->callbacks = (lshard_callbacks){
		sizeof fake->callbacks, fake_broadcast, fake_allgather, fake_finish, fake_stop, fake, &fake->device, 1};
	fake->fail_at = fake->rest = -1;
	fake->held = FAKE_STREAMS;
	pthread_mutex_init(&fake->lock, NULL);
	pthread_cond_init(&fake->changed, NULL);
	fake->device = (lshard_device_callbacks){sizeof fake->device, &fake->streams[0], fake_allocate, fake_release,
						 fake_record,         fake_wait,         fake_query,    fake_drop,
						 fake_copy,           fake_capturing};
	for (int i = 0; i < FAKE_STREAMS; i++) {
		fake->streams[i].fake = fake;
		if (pthread_create(&fake->streams[i].thread, NULL, run_stream, &fake->streams[i]) != 0)
			abort();
	}
	return fake;
}

bool fake_close(struct fake *fake)
{
	bool clean;

	if (!fake)
		return true;
	fake->on_device->stop(fake->on_device->user);
	pthread_mutex_lock(&fake->lock);
	fake->ending = true;
	pthread_cond_broadcast(&fake->changed);
	pthread_mutex_unlock(&fake->lock);
	for (int i = 0; i < FAKE_STREAMS; i++)
		pthread_join(fake->streams[i].thread, NULL);
	clean = fake->events == 0 && !fake->torn;
	for (int i = 0; i < MOST_BLOCKS; i++)
		clean = clean && !fake->blocks[i].begin;
	circle_leave(fake->device_seat);
	circle_leave(fake->host_seat);
	pthread_cond_destroy(&fake->changed);
	pthread_mutex_destroy(&fake->lock);
	free(fake);
	return clean;
}

struct seat *fake_seat(struct fake *fake)
{
	return fake->host_seat;
}

void *fake_stream(struct fake *fake, int number)
{
	return &fake->streams[number];
}

void fake_launch(struct fake *fake, void *stream, void (*kernel)(void *user, uint64_t value), void *user,
		 uint64_t value)
{
	pthread_mutex_lock(&fake->lock);
	give(stream, (struct work){.kind = KERNEL, .kernel = kernel, .user = user, .number = value});
	pthread_mutex_unlock(&fake->lock);
}

void fake_synchronize(struct fake *fake)
{
	pthread_mutex_lock(&fake->lock);
	for (int i = 0; i < FAKE_STREAMS; i++)
		while (fake->streams[i].done < fake->streams[i].given)
			pthread_cond_wait(&fake->changed, &fake->lock);
	pthread_mutex_unlock(&fake->lock);
}

void fake_hold(struct fake *fake, int first)
{
	pthread_mutex_lock(&fake->lock);
	fake->held = first;
	pthread_cond_broadcast(&fake->changed);
	pthread_mutex_unlock(&fake->lock);
}

void fake_slow_down(struct fake *fake, long slow_ms)
{
	pthread_mutex_lock(&fake->lock);
	fake->slow_ms = slow_ms;
	pthread_mutex_unlock(&fake->lock);
}

void fake_capture(struct fake *fake, bool capturing)
{
	pthread_mutex_lock(&fake->lock);
	fake->capturing = capturing;
	pthread_mutex_unlock(&fake->lock);
}

void fake_fail_at(struct fake *fake, long calls)
{
	pthread_mutex_lock(&fake->lock);
	fake->calls = 0;
	fake->fail_at = calls;
	pthread_mutex_unlock(&fake->lock);
}

void fake_fail_queries(struct fake *fake, bool unsure)
{
	pthread_mutex_lock(&fake->lock);
	fake->unsure = unsure;
	pthread_mutex_unlock(&fake->lock);
}

void fake_allow_blocks(struct fake *fake, long rest)
{
	fake->rest = rest;
}

long fake_collectives(struct fake *fake)
{
	long collectives;

	pthread_mutex_lock(&fake->lock);
	collectives = fake->collectives;
	pthread_mutex_unlock(&fake->lock);
	return collectives;
}
