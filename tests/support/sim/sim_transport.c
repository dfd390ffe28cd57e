/* SPDX-License-Identifier: Apache-2.0
 *
 * sim_transport.c - the transport of the simulated machine; what a transport for a real device looks like. Every rank
 * has one copy stream for fetches and one for those inside captures. A fetch waits for the recorded uses of its buffer,
 * copies, and marks the buffer's ready point; a wait orders the reader after that point.
 *
 * Inside a capture the points are kept apart and carry the capture's number: a capture that is thrown away leaves
 * nothing behind that anyone would look at.
 *
 * Knows: the SPI, streams, buffers. Does not know: rings, layers, when anything runs.
 */
#include "sim_world.h"
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

struct sim_transport {
	lshard_transport base;
	struct sim_rank *rank;
};

static struct sim_store *store_of(lshard_store *store)
{
	return (struct sim_store *)store;
}

static void lock(struct sim_rank *rank)
{
	pthread_mutex_lock(&rank->world->lock);
}

static void unlock(struct sim_rank *rank)
{
	pthread_mutex_unlock(&rank->world->lock);
}

static struct sim_stream *stream_of(const struct sim_store *store, void *stream)
{
	return stream ? stream : store->rank->plain;
}

/* ---- The group ---- */

static int available(lshard_error *error)
{
	(void)error;
	return 1;
}

static lshard_status open_as(const lshard_transport_ops *ops, const lshard_context *context, lshard_transport **out,
			     lshard_error *error)
{
	struct sim_rank *rank = sim_rank_of(context);
	struct sim_transport *transport;

	if (context->size != rank->world->size || context->rank != rank->rank)
		return lshard_fail(error, LSHARD_ERR_MISMATCH,
				   "rank %d of %d is rank %d of %d in the simulated machine", context->rank,
				   context->size, rank->rank, rank->world->size);
	transport = context->allocate(context, sizeof *transport);
	if (!transport)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "rank %d: no memory for the transport", context->rank);
	transport->base.ops = ops;
	transport->base.context = context;
	transport->rank = rank;
	*out = &transport->base;
	return LSHARD_OK;
}

static struct sim_rank *rank_of(lshard_transport *transport)
{
	return ((struct sim_transport *)transport)->rank;
}

static void close_transport(lshard_transport *transport)
{
	sim_leave(rank_of(transport));
	transport->context->release(transport->context, transport);
}

static lshard_status exchange(lshard_transport *transport, const void *send, void *receive, size_t bytes,
			      uint8_t *alive)
{
	struct sim_rank *rank = rank_of(transport);
	lshard_status status;

	lock(rank);
	if (rank->fail_exchange && --rank->fail_exchange == 0)
		status = LSHARD_ERR_TIMEOUT;
	else
		status = sim_exchange(rank, &rank->world->exchange, send, receive, bytes, alive,
				      transport->context->timeout_ms);
	unlock(rank);
	if (status < 0)
		return lshard_fail(&transport->error, status, "rank %d: the ranks did not agree", rank->rank);
	return status;
}

static void abort_transport(lshard_transport *transport)
{
	struct sim_rank *rank = rank_of(transport);

	lock(rank);
	rank->aborted = true;
	unlock(rank);
	sim_leave(rank);
}

/* ---- The store ---- */

/* After the last buffer lies one without memory: for layers that are only sent, and readers of no certain buffer. */
static struct sim_buffer *buffer_of(const struct sim_store *store, uint32_t number)
{
	return &store->buffer[number == LSHARD_NO_BUFFER ? store->base.plan->buffers : number];
}

/* Everyone's shard, by address: the ranks are in one process. */
static lshard_status exchange_shards(struct sim_store *store)
{
	lshard_transport *transport = store->base.transport;
	uint8_t alive[SIM_RANKS];
	lshard_status status = exchange(transport, &store->shard, store->shards, sizeof store->shard, alive);

	for (int32_t r = 0; status == LSHARD_OK && r < store->rank->world->size; r++)
		if (!alive[r])
			status = lshard_fail(&transport->error, LSHARD_ERR_PEER_FAILED, "rank %d: rank %d is gone",
					     store->rank->rank, r);
	return status;
}

static unsigned char *keep_shard(struct sim_rank *rank, uint64_t bytes)
{
	struct sim_shard *shard = sim_memory(1, sizeof *shard);

	shard->bytes = sim_memory(bytes, 1);
	lock(rank);
	shard->next = rank->world->shards;
	rank->world->shards = shard;
	unlock(rank);
	return shard->bytes;
}

static lshard_status store_open(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **out)
{
	const lshard_context *context = transport->context;
	struct sim_store *store = context->allocate(context, sizeof *store);
	lshard_status status = LSHARD_ERR_NO_MEMORY;

	if (!store)
		return lshard_fail(&transport->error, status, "rank %d: no memory for series '%s'", context->rank,
				   plan->name);
	store->base.transport = transport;
	store->base.plan = plan;
	store->rank = rank_of(transport);
	store->collective = transport->ops->capabilities & LSHARD_CAP_COLLECTIVE;
	store->streams = transport->ops->capabilities & LSHARD_CAP_STREAMS;
	store->buffer = context->allocate(context, (plan->buffers + 1) * sizeof *store->buffer);
	store->buffers = context->allocate(context, plan->buffers * plan->layer_bytes + 1);
	if (!store->buffer || !store->buffers) {
		lshard_fail(&transport->error, status, "rank %d: no memory for %u buffers", context->rank,
			    plan->buffers);
		goto free_store;
	}
	store->shard = keep_shard(store->rank, plan->shard_bytes);
	status = exchange_shards(store);
	if (status < 0)
		goto free_store;
	*out = &store->base;
	return LSHARD_OK;

free_store:
	if (store->buffers)
		context->release(context, store->buffers);
	if (store->buffer)
		context->release(context, store->buffer);
	context->release(context, store);
	return status;
}

static void *shard(lshard_store *store)
{
	return store->plan->shard_bytes ? store_of(store)->shard : NULL;
}

static void *buffer(lshard_store *store, uint32_t number, uint32_t position)
{
	(void)position;
	return store_of(store)->buffers + number * store->plan->layer_bytes;
}

/* ---- What all ranks of a collective transport ask for, compared ---- */

static struct sim_post *post_of(const struct sim_store *store, uint64_t sequence)
{
	return &store->rank->world->posts[sequence % SIM_POSTS];
}

static void post(struct sim_store *store, uint32_t position, uint64_t sequence)
{
	struct sim_post *post = post_of(store, sequence);
	uint64_t mine = (uint64_t)1 << store->rank->rank, all = ((uint64_t)1 << store->rank->world->size) - 1;

	if (!post->ranks || post->sequence != sequence || (post->ranks & mine) ||
	    (post->ranks == all && !post->mismatch)) {
		*post = (struct sim_post){.sequence = sequence, .first = store->rank->rank, .position = position};
		strncpy(post->series, store->base.plan->name, sizeof post->series - 1);
	}
	post->ranks |= mine;
	if (post->position != position || strcmp(post->series, store->base.plan->name) != 0)
		post->mismatch = true;
}

/* A transfer that this rank no longer wants. */
static void unpost(const struct sim_op *op)
{
	struct sim_post *post = post_of(op->store, op->amount);

	if (post->sequence == op->amount)
		post->ranks &= ~((uint64_t)1 << op->store->rank->rank);
}

static lshard_status check_step(struct sim_store *store, const struct sim_buffer *one)
{
	const struct sim_post *post = post_of(store, one->sequence);

	if (!store->collective || sim_past(&one->ready) || post->sequence != one->sequence || !post->mismatch)
		return LSHARD_OK;
	return lshard_fail(&store->base.error, LSHARD_ERR_OUT_OF_STEP,
			   "rank %d: transfer %" PRIu64
			   " is position %u of series '%s' here, but other ranks disagree: rank %d asked first, for "
			   "position %u of series '%s'",
			   store->rank->rank, one->sequence, one->position, store->base.plan->name, post->first,
			   post->position, post->series);
}

/* ---- Moving ---- */

static uint64_t capture_of(const struct sim_store *store, void *stream)
{
	const struct sim_stream *s = stream_of(store, stream);

	return s->capture ? s->capture->id : 0;
}

/* Draw the copy stream into the capture at its beginning. */
static void fork_capture(struct sim_store *store, void *stream)
{
	uint64_t id = capture_of(store, stream);

	if (!id || store->fork == id)
		return;
	store->fork = id;
	sim_follow(store->rank->capture_copy, stream_of(store, stream));
}

static void push_copy(struct sim_store *store, struct sim_stream *copy, uint32_t position, uint32_t number,
		      uint64_t sequence)
{
	struct sim_op op = {.kind = SIM_COPY, .store = store, .number = position, .buffer = number, .amount = sequence};

	sim_push(copy, &op);
}

static void fetch_eager(struct sim_store *store, uint32_t position, uint32_t number, uint64_t sequence)
{
	struct sim_buffer *one = buffer_of(store, number);

	for (unsigned i = 0; i < one->n_used; i++)
		sim_order(store->rank->copy, &one->used[i]);
	one->n_used = 0;
	push_copy(store, store->rank->copy, position, number, sequence);
	sim_record(store->rank->copy, &one->ready);
	one->position = position;
	one->sequence = sequence;
}

static void fetch_captured(struct sim_store *store, uint32_t position, uint32_t number, uint64_t sequence,
			   uint64_t capture)
{
	struct sim_buffer *one = buffer_of(store, number);

	if (one->captured_used.capture == capture)
		sim_order(store->rank->capture_copy, &one->captured_used);
	push_copy(store, store->rank->capture_copy, position, number, sequence);
	sim_record(store->rank->capture_copy, &one->captured_ready);
}

static lshard_status fetch(lshard_store *base, uint32_t position, uint32_t number, void *stream, uint64_t sequence)
{
	struct sim_store *store = store_of(base);
	struct sim_rank *rank = store->rank;
	lshard_status status = LSHARD_OK;

	lock(rank);
	if (rank->fail) {
		rank->fail--;
		status = lshard_fail(&base->error, LSHARD_ERR_PEER_FAILED,
				     "rank %d: position %u of series '%s' cannot be read: its source is gone",
				     rank->rank, position, base->plan->name);
		goto done;
	}
	if (store->collective)
		post(store, position, sequence);
	fork_capture(store, stream);
	if (capture_of(store, stream))
		fetch_captured(store, position, number, sequence, capture_of(store, stream));
	else
		fetch_eager(store, position, number, sequence);
done:
	unlock(rank);
	return status;
}

static const char *missing_ranks(const struct sim_store *store, uint64_t sequence, char *text, size_t bytes)
{
	const struct sim_post *post = post_of(store, sequence);
	size_t used = 0;

	text[0] = '\0';
	for (int32_t r = 0; r < store->rank->world->size && used < bytes; r++)
		if (post->sequence != sequence || !(post->ranks >> r & 1))
			used += (size_t)snprintf(text + used, bytes - used, "%s%d", used ? ", " : "", r);
	return text;
}

/* Host memory: nobody else runs in this thread, so what cannot run now has missed its deadline. */
static lshard_status wait_host(struct sim_store *store, const struct sim_buffer *one)
{
	char missing[128];

	while (!sim_past(&one->ready))
		if (!sim_step(store->rank->world))
			return lshard_fail(&store->base.error, LSHARD_ERR_TIMEOUT,
					   "rank %d: position %u of series '%s' did not come: transfer %" PRIu64
					   " was not asked for by rank %s",
					   store->rank->rank, one->position, store->base.plan->name, one->sequence,
					   missing_ranks(store, one->sequence, missing, sizeof missing));
	return LSHARD_OK;
}

static void wait_stream(struct sim_store *store, const struct sim_buffer *one, void *stream)
{
	uint64_t capture = capture_of(store, stream);

	if (!capture)
		sim_order(stream_of(store, stream), &one->ready);
	else if (one->captured_ready.capture == capture)
		sim_order(stream_of(store, stream), &one->captured_ready);
}

static lshard_status wait_buffer(lshard_store *base, uint32_t number, void *stream, lshard_arrival *arrival)
{
	struct sim_store *store = store_of(base);
	struct sim_buffer *one = buffer_of(store, number);
	lshard_status status;

	memset(arrival, 0, sizeof *arrival);
	lock(store->rank);
	status = store->rank->aborted ? lshard_fail(&base->error, LSHARD_ERR_ABORTED, "rank %d: the group was aborted",
						    store->rank->rank)
				      : check_step(store, one);
	if (status == LSHARD_OK && !store->streams)
		status = wait_host(store, one);
	else if (status == LSHARD_OK)
		wait_stream(store, one, stream);
	unlock(store->rank);
	return status;
}

/* ---- Reading's end ---- */

static void record_eager(struct sim_store *store, struct sim_buffer *one, struct sim_stream *stream)
{
	unsigned i = 0;

	while (i < one->n_used && one->used[i].stream != stream)
		i++;
	if (i == sizeof one->used / sizeof one->used[0]) {
		sim_fault(store->rank->world, "rank %d: uses of a buffer are recorded on more than %u streams",
			  store->rank->rank, i);
		return;
	}
	if (i == one->n_used)
		one->n_used++;
	sim_record(stream, &one->used[i]);
}

/* Several streams of one capture may record uses of a buffer: their points are one point after both. */
static void record_captured(struct sim_buffer *one, struct sim_stream *stream)
{
	struct sim_event event;

	sim_record(stream, &event);
	if (one->captured_used.capture == event.capture)
		for (size_t i = 0; i < SIM_NODES / 64; i++)
			event.before.words[i] |= one->captured_used.before.words[i];
	one->captured_used = event;
}

static lshard_status record_use(lshard_store *base, uint32_t number, void *stream)
{
	struct sim_store *store = store_of(base);
	struct sim_stream *reader = stream_of(store, stream);

	lock(store->rank);
	fork_capture(store, stream);
	if (reader->capture)
		record_captured(buffer_of(store, number), reader);
	else
		record_eager(store, buffer_of(store, number), reader);
	unlock(store->rank);
	return LSHARD_OK;
}

static bool in_flight_done(const struct sim_store *store)
{
	const struct sim_stream *copy = store->rank->copy;

	if (copy->done != copy->queued)
		return false;
	for (uint32_t c = 0; c <= store->base.plan->buffers; c++)
		for (unsigned i = 0; i < store->buffer[c].n_used; i++)
			if (!sim_past(&store->buffer[c].used[i]))
				return false;
	return true;
}

static void order_after_all(struct sim_store *store, struct sim_stream *stream)
{
	sim_follow(stream, store->rank->copy);
	for (uint32_t c = 0; c <= store->base.plan->buffers; c++)
		for (unsigned i = 0; i < store->buffer[c].n_used; i++)
			sim_order(stream, &store->buffer[c].used[i]);
}

static lshard_status join(lshard_store *base, void *stream)
{
	struct sim_store *store = store_of(base);
	struct sim_stream *after = stream_of(store, stream);
	lshard_status status = LSHARD_OK;

	lock(store->rank);
	if (!store->streams) {
		for (uint32_t c = 0; c <= base->plan->buffers && status == LSHARD_OK; c++)
			status = wait_host(store, &store->buffer[c]);
	} else if (after->capture) {
		fork_capture(store, stream);
		sim_follow(after, store->rank->capture_copy);
	} else {
		order_after_all(store, after);
	}
	unlock(store->rank);
	return status;
}

static lshard_status capture(lshard_store *base, void *stream, uint64_t *number)
{
	struct sim_store *store = store_of(base);

	lock(store->rank);
	*number = capture_of(store, stream);
	fork_capture(store, stream);
	unlock(store->rank);
	return LSHARD_OK;
}

/* ---- From buffer to buffer ---- */

/* Who overwrites the buffer comes after the copy as after a reader. */
static lshard_status copy_buffer(lshard_store *base, uint32_t to, uint32_t from, void *stream)
{
	struct sim_store *store = store_of(base);
	struct sim_stream *on = stream_of(store, stream);
	struct sim_op move = {.kind = SIM_MOVE, .store = store, .buffer = to, .number = from};
	struct sim_buffer *target = buffer_of(store, to);

	lock(store->rank);
	fork_capture(store, stream);
	for (unsigned i = 0; !on->capture && i < target->n_used; i++)
		sim_order(on, &target->used[i]);
	if (on->capture && target->captured_used.capture == on->capture->id)
		sim_order(on, &target->captured_used);
	sim_push(on, &move);
	sim_record(on, on->capture ? &target->captured_ready : &target->ready);
	if (on->capture) {
		record_captured(target, on);
	} else {
		target->n_used = 0;
		record_eager(store, target, on);
	}
	target->sequence = UINT64_MAX; /* no transfer that ranks agree on */
	unlock(store->rank);
	return LSHARD_OK;
}

/* ---- The end of everything ---- */

/* Transfers that have not begun will not happen. */
static void drop_transfers(struct sim_store *store)
{
	struct sim_stream *copy = store->rank->copy;

	for (uint64_t i = copy->done; i < copy->queued; i++) {
		struct sim_op *op = &copy->ops[i & (copy->capacity - 1)];

		if (op->kind != SIM_COPY || op->half || op->store != store)
			continue;
		op->cancelled = true;
		unpost(op);
	}
}

/* Let others come as long as they may; one thread per rank, so they can. */
static void run_until_done(struct sim_store *store, uint32_t timeout_ms)
{
	struct sim_world *world = store->rank->world;
	uint32_t waited = 0;

	while (!in_flight_done(store)) {
		if (sim_step(world))
			continue;
		if (!store->collective || waited++ >= timeout_ms)
			return;
		sim_pause(world, 1);
	}
}

static bool out_of_step(const struct sim_store *store)
{
	for (uint32_t c = 0; c <= store->base.plan->buffers; c++) {
		const struct sim_post *post = post_of(store, store->buffer[c].sequence);

		if (!sim_past(&store->buffer[c].ready) && post->sequence == store->buffer[c].sequence && post->mismatch)
			return true;
	}
	return false;
}

static void settle(struct sim_store *store, uint32_t timeout_ms)
{
	run_until_done(store, store->collective && out_of_step(store) ? 0 : timeout_ms);
	if (!in_flight_done(store))
		drop_transfers(store);
	run_until_done(store, 0);
}

static lshard_status drain(lshard_store *base)
{
	struct sim_store *store = store_of(base);
	lshard_status status = LSHARD_OK;

	lock(store->rank);
	settle(store, base->transport->context->timeout_ms / 4); /* the exchange that follows has a deadline, too */
	if (!in_flight_done(store))
		status = lshard_fail(&base->error, LSHARD_ERR_TIMEOUT,
				     "rank %d: streams that read series '%s' do not end", store->rank->rank,
				     base->plan->name);
	unlock(store->rank);
	return status;
}

static void store_close(lshard_store *base)
{
	struct sim_store *store = store_of(base);
	const lshard_context *context = base->transport->context;

	lock(store->rank);
	settle(store, 0);
	unlock(store->rank);
	context->release(context, store->buffers);
	context->release(context, store->buffer);
	context->release(context, store);
}

static lshard_status read_layer(lshard_store *base, uint32_t position, void *destination)
{
	struct sim_store *store = store_of(base);
	struct sim_world *world = store->rank->world;
	unsigned char everyone[SIM_RANKS];
	uint8_t alive[SIM_RANKS];
	lshard_status status = LSHARD_OK;

	lock(store->rank);
	if (!store->collective) {
		if (destination)
			sim_gather(store, position, destination, 0, base->plan->layer_bytes);
	} else {
		store->rank->read_store = store;
		store->rank->read_position = position;
		store->rank->read_to = destination;
		status = sim_exchange(store->rank, &world->read, "", everyone, 1, alive,
				      base->transport->context->timeout_ms);
		store->rank->read_store = NULL;
	}
	unlock(store->rank);
	if (status < 0)
		return lshard_fail(&base->error, status,
				   "rank %d: position %u of series '%s' was not read by all ranks", store->rank->rank,
				   position, base->plan->name);
	return LSHARD_OK;
}

/* ---- The tables ---- */

#define SIM_OPEN(flavour)                                                                                              \
	static lshard_status open_##flavour(const lshard_context *context, lshard_transport *inner,                    \
					    lshard_transport **out, lshard_error *error)                               \
	{                                                                                                              \
		(void)inner;                                                                                           \
		return open_as(&flavour, context, out, error);                                                         \
	}

SIM_OPEN(sim_one_sided)
SIM_OPEN(sim_lockstep)
SIM_OPEN(sim_host_one_sided)
SIM_OPEN(sim_host_lockstep)

#define SIM_TABLE(flavour, text, caps)                                                                                 \
	{.struct_size = sizeof(lshard_transport_ops),                                                                  \
	 .abi = LSHARD_TRANSPORT_ABI,                                                                                  \
	 .name = #flavour,                                                                                             \
	 .summary = (text),                                                                                            \
	 .capabilities = (caps),                                                                                       \
	 .granule_bytes = 16,                                                                                          \
	 .available = available,                                                                                       \
	 .open = open_##flavour,                                                                                       \
	 .close = close_transport,                                                                                     \
	 .exchange = exchange,                                                                                         \
	 .abort = abort_transport,                                                                                     \
	 .store_open = store_open,                                                                                     \
	 .store_close = store_close,                                                                                   \
	 .shard = shard,                                                                                               \
	 .buffer = buffer,                                                                                             \
	 .fetch = fetch,                                                                                               \
	 .wait = wait_buffer,                                                                                          \
	 .record_use = record_use,                                                                                     \
	 .join = join,                                                                                                 \
	 .capture = capture,                                                                                           \
	 .drain = drain,                                                                                               \
	 .read = read_layer,                                                                                           \
	 .copy_buffer = copy_buffer}

const lshard_transport_ops sim_one_sided = SIM_TABLE(sim_one_sided, "simulated devices that fetch",
						     LSHARD_CAP_STREAMS | LSHARD_CAP_CAPTURE | LSHARD_CAP_OUTLIVES);
const lshard_transport_ops sim_lockstep = SIM_TABLE(sim_lockstep, "simulated devices in lockstep",
						    LSHARD_CAP_STREAMS | LSHARD_CAP_CAPTURE | LSHARD_CAP_COLLECTIVE);
const lshard_transport_ops sim_host_one_sided =
	SIM_TABLE(sim_host_one_sided, "simulated hosts that fetch", LSHARD_CAP_OUTLIVES);
const lshard_transport_ops sim_host_lockstep =
	SIM_TABLE(sim_host_lockstep, "simulated hosts in lockstep", LSHARD_CAP_COLLECTIVE);
