/* SPDX-License-Identifier: Apache-2.0
 *
 * callback_rounds.c - what the ranks say to each other before they move anything, and what is moved then. Runs on the
 * worker. Knows operations, announcements and pieces; makes collectives through callback_worker.c.
 *
 * transfers  a round; then the data of as many of the announced ones as are the same on all ranks. None: the ranks have
 *            gone different ways (out of step): transfers fail until they have agreed in an exchange.
 * exchange   a round; a rank that finds others elsewhere comes again. Once all are here, a second all-gather carries
 *            what they gave and whether their callers still wait: for all of them it happens, or for none.
 * read       a round; a second one in which each says that its caller still waits; then the data.
 */
#include "callback.h"
#include "clock.h"
#include "verdict.h"

#include <stdio.h>
#include <string.h>

/* ---- The end of an operation ----------------------------------------------------------------------------------- */

static struct operation *head(const struct callback *callback)
{
	return &callback->queue[callback->first];
}

static void land(const struct operation *operation, lshard_status status, const lshard_error *error)
{
	struct landing *landing;

	if (operation->buffer == LSHARD_NO_BUFFER)
		return;
	landing = &operation->store->landings[operation->buffer];
	if (landing->ticket != operation->ticket)
		return; /* the buffer was asked for something else meanwhile */
	landing->pending = false;
	landing->status = status;
	if (status < 0)
		landing->error = *error;
}

static void answer(struct callback *callback, uint64_t ticket, lshard_status status, const lshard_error *error)
{
	struct visitor *visitor = &callback->visitor;

	if (visitor->ticket != ticket)
		return; /* has left */
	visitor->stage = SERVED;
	visitor->status = status;
	if (status < 0)
		visitor->error = *error;
}

void callback_conclude(struct callback *callback, lshard_status status, const lshard_error *error)
{
	const struct operation *operation = head(callback);

	if (operation->kind == TRANSFER)
		land(operation, status, error);
	else
		answer(callback, operation->ticket, status, error);
	if (operation->store)
		operation->store->outstanding--;
	callback->first = (callback->first + 1) % callback->capacity;
	callback->queued--;
	callback->busy = false;
	pthread_cond_broadcast(&callback->changed);
}

/* ---- Announcements ----------------------------------------------------------------------------------------------- */

static const char *name_of(const struct callback *callback, uint32_t number)
{
	const struct callback_store *store = callback->stores;

	while (store && store->number != number)
		store = store->next;
	return store ? store->base.plan->name : "(closed here)";
}

/* With the lock. */
static void describe(const struct callback *callback, const struct announcement *announcement, char *text, size_t bytes)
{
	const struct entry *entry = &announcement->entry[0];

	if (announcement->kind == EXCHANGE)
		snprintf(text, bytes, "in a collective call");
	else if (announcement->kind == ROLL_CALL)
		snprintf(text, bytes, "in no call that needs the others");
	else
		snprintf(text, bytes, "%s position %u of series '%s' (transfer %llu)",
			 announcement->kind == READ ? "reading" : "at", entry->position,
			 name_of(callback, entry->store), (unsigned long long)entry->sequence);
}

/* How many leading entries are the same on all ranks; an exchange is one if its size is. *other: a rank that differs
 * from rank 0 in the first. */
static uint32_t agreed(const struct callback *callback, int32_t *other)
{
	const struct announcement *all = callback->announcements;
	uint32_t same = all[0].kind == EXCHANGE ? 1 : all[0].entries;

	for (int32_t rank = 1; rank < callback->base.context->size && same > 0; rank++) {
		uint32_t equal = 0;

		if (all[rank].kind == all[0].kind && all[rank].bytes == all[0].bytes) {
			while (equal < same &&
			       memcmp(&all[rank].entry[equal], &all[0].entry[equal], sizeof(struct entry)) == 0)
				equal++;
		}
		if (equal == 0)
			*other = rank;
		same = equal;
	}
	return same;
}

static struct lshard__ranks those_at(const struct callback *callback, enum kind kind)
{
	struct lshard__ranks ranks = {0};

	for (int32_t rank = 0; rank < callback->base.context->size; rank++)
		if (callback->announcements[rank].kind == (uint32_t)kind)
			lshard__ranks_add(&ranks, rank);
	return ranks;
}

static bool any_is(const struct callback *callback, enum kind kind)
{
	return those_at(callback, kind).count > 0;
}

/* With the lock. The words are the same on all ranks. */
static void differ(struct callback *callback, int32_t other, lshard_error *error)
{
	char first[160], second[160];

	describe(callback, &callback->announcements[0], first, sizeof first);
	describe(callback, &callback->announcements[other], second, sizeof second);
	lshard_fail(error, LSHARD_ERR_OUT_OF_STEP, "rank 0 is %s, rank %d %s", first, (int)other, second);
	if (any_is(callback, TRANSFER) && !callback->out_of_step) {
		callback->out_of_step = true;
		callback->why_out_of_step = *error;
	}
}

/* The caller's functions get no further: a rank that leaves is the end of the group. */
static lshard_status heed_farewells(struct callback *callback)
{
	struct lshard__ranks leaving = those_at(callback, LEAVING);
	char text[256];

	if (leaving.count == 0)
		return LSHARD_OK;
	snprintf(text, sizeof text, "%s %s aborted", lshard__ranks_text(&leaving), leaving.count > 1 ? "were" : "was");
	return callback_break(callback, LSHARD_ERR_PEER_FAILED, text);
}

/* With the lock: who has come to what this rank is at, which is the entry after @p passed of the last round's. */
static void note_came(struct callback *callback, uint32_t passed)
{
	const size_t size = (size_t)callback->base.context->size;
	const struct announcement *mine = &callback->mine;
	const bool is_roll = mine->kind == ROLL_CALL || mine->kind == LEAVING;
	const uint64_t asking = is_roll ? 0 : head(callback)->ticket;

	if (callback->asking != asking)
		memset(callback->came, 0, size);
	callback->asking = asking;
	callback->passed = passed;
	for (size_t rank = 0; rank < size; rank++)
		if (callback->seen[rank].kind == mine->kind && callback->seen[rank].bytes == mine->bytes &&
		    memcmp(&callback->seen[rank].entry[passed], &mine->entry[passed], sizeof mine->entry[0]) == 0)
			callback->came[rank] = 1;
}

/* With the lock: what this round has shown, for messages. */
static void note_round(struct callback *callback)
{
	memcpy(callback->seen, callback->announcements,
	       (size_t)callback->base.context->size * sizeof *callback->announcements);
	callback->rounds++;
	callback->round_ns = lshard__now_ns();
	note_came(callback, 0);
}

/* With the lock, let go meanwhile: all ranks learn where all of them are. */
static lshard_status hold_round(struct callback *callback)
{
	lshard_status status;

	callback->asked_ns = lshard__now_ns();
	pthread_mutex_unlock(&callback->lock);
	status = callback_allgather(callback, &callback->mine, callback->announcements, sizeof callback->mine);
	if (status == LSHARD_OK && callback->mine.kind != LEAVING)
		status = heed_farewells(callback);
	pthread_mutex_lock(&callback->lock);
	callback->asked_ns = 0;
	if (status == LSHARD_OK)
		note_round(callback);
	return status;
}

void callback_call_roll(struct callback *callback, enum kind kind)
{
	callback->mine = (struct announcement){.kind = (uint32_t)kind};
	(void)hold_round(callback);
}

/* With the lock, let go meanwhile: all learn whose callers have left. @p bytes of payload go along. False: one has, or
 * nothing works any more. */
static bool hold_vote(struct callback *callback, uint64_t ticket, size_t bytes, struct lshard__ranks *left)
{
	const size_t length = offsetof(struct vote, payload) + bytes;
	struct visitor *visitor = &callback->visitor;
	lshard_status status;

	*left = (struct lshard__ranks){0};
	callback->vote.here = visitor->ticket == ticket;
	if (callback->vote.here) {
		visitor->stage = COMMITTED;
		if (bytes > 0)
			memcpy(callback->vote.payload, visitor->send, bytes);
	}
	pthread_mutex_unlock(&callback->lock);
	status = callback_allgather(callback, &callback->vote, callback->votes, length);
	pthread_mutex_lock(&callback->lock);
	if (status < 0 || callback->broken < 0) /* broken: the caller has left although the others count on it */
		return false;
	for (int32_t rank = 0; rank < callback->base.context->size; rank++) {
		uint64_t here;

		memcpy(&here, callback->votes + (size_t)rank * length, sizeof here);
		if (!here)
			lshard__ranks_add(left, rank);
	}
	return left->count == 0;
}

/* ---- Who is late ----------------------------------------------------------------------------------------------- */

/*
 * With the lock: those that were never seen at what this rank is at; if all were, those that are somewhere else now,
 * like a rank whose deadline came a little earlier. Empty: all are at the same, and the caller's collective hangs.
 */
static struct lshard__ranks find_missing(const struct callback *callback)
{
	const struct announcement *mine = &callback->seen[callback->base.context->rank];
	struct lshard__ranks elsewhere = {0};

	for (int32_t rank = 0; rank < callback->base.context->size; rank++)
		if (callback->seen[rank].kind != mine->kind)
			lshard__ranks_add(&elsewhere, rank);
	if (memchr(callback->came, 0, (size_t)callback->base.context->size))
		return lshard__ranks_absent(callback->came, callback->base.context->size);
	return elsewhere;
}

/* With the lock: a round does not end, so what the one before it has shown of the others is of long ago. */
static bool is_stuck(const struct callback *callback)
{
	return callback->asked_ns > 0 && lshard__now_ns() > callback->asked_ns + 2 * callback_roll_call_pause(callback);
}

/* With the lock: a round has shown who is at what this rank is at. */
static bool is_known(const struct callback *callback)
{
	return callback->queued > 0 && callback->asking == head(callback)->ticket && !is_stuck(callback);
}

/* With the lock: all ranks have answered so lately that none need be gone. */
static bool is_fresh(const struct callback *callback)
{
	return callback->rounds > 0 && lshard__now_ns() < callback->round_ns + 2 * callback_roll_call_pause(callback);
}

/* Whoever is late after this rank's first transfers has a name at the next roll call, not yet at the deadline. */
bool callback_linger(struct callback *callback, uint64_t deadline_ns)
{
	const uint64_t last = deadline_ns + callback_grace(callback);
	const uint64_t due = callback->round_ns + 2 * callback_roll_call_pause(callback);

	if (callback_pause(callback, deadline_ns))
		return true;
	if (callback->roll_call_ns == UINT64_MAX || is_known(callback) || !is_fresh(callback))
		return false;
	return callback_pause(callback, due < last ? due : last);
}

/* All ranks are there: what is before this takes longer than the deadline. */
static lshard_status fail_slow(const struct callback *callback, lshard_error *error)
{
	const lshard_context *context = callback->base.context;

	return lshard_fail(
		error, LSHARD_ERR_TIMEOUT,
		"rank %d waited %u ms: all ranks came to round %llu, %llu ms ago, so none was gone then, but "
		"%u transfers and calls have not ended: the link or a rank is slow",
		(int)context->rank, (unsigned)context->timeout_ms, (unsigned long long)callback->rounds,
		(unsigned long long)((lshard__now_ns() - callback->round_ns) / 1000000u), callback->queued);
}

/* A collective does not end: a rank is stopped, stuck in the caller's functions, or cannot be reached. */
static lshard_status fail_silent(const struct callback *callback, lshard_error *error)
{
	const lshard_context *context = callback->base.context;
	char before[80] = "no round before it has ended";
	char others[200];

	if (callback->rounds > 0)
		snprintf(before, sizeof before, "all ranks came to round %llu, %llu ms ago",
			 (unsigned long long)callback->rounds,
			 (unsigned long long)((lshard__now_ns() - callback->round_ns) / 1000000u));
	return lshard_fail(error, LSHARD_ERR_TIMEOUT,
			   "rank %d waited %u ms for %s: the caller's collective does not end, so a rank is stopped, "
			   "killed or disconnected; %s",
			   (int)context->rank, (unsigned)context->timeout_ms,
			   callback_others(callback, others, sizeof others), before);
}

/* With the lock: what @p rank is at, which is late. */
static void describe_late(const struct callback *callback, int32_t rank, char *text, size_t bytes)
{
	struct announcement last = callback->seen[rank];
	char at[160];

	if (last.kind != TRANSFER || callback->passed == 0) {
		describe(callback, &last, at, sizeof at);
		snprintf(text, bytes, "is %s", at);
		return;
	}
	last.entry[0] = last.entry[callback->passed < last.entries ? callback->passed : last.entries - 1];
	describe(callback, &last, at, sizeof at);
	snprintf(text, bytes, "%s %s", callback->passed < last.entries ? "is" : "came no further yet; it was last", at);
}

lshard_status callback_fail_late(const struct callback *callback, uint8_t *alive, lshard_error *error)
{
	const lshard_context *context = callback->base.context;
	struct lshard__ranks missing = {0};
	char at[200];

	if (is_known(callback))
		missing = find_missing(callback);
	if (alive && is_known(callback))
		memcpy(alive, callback->came, (size_t)context->size);
	if (missing.count == 0)
		return is_fresh(callback) ? fail_slow(callback, error) : fail_silent(callback, error);
	describe_late(callback, missing.named[0], at, sizeof at);
	return lshard_fail(error, LSHARD_ERR_TIMEOUT, "rank %d waited %u ms for %s; rank %d %s", (int)context->rank,
			   (unsigned)context->timeout_ms, lshard__ranks_text(&missing), (int)missing.named[0], at);
}

/* ---- Data ------------------------------------------------------------------------------------------------------ */

static lshard_status carry_from_one(struct callback *callback, struct callback_store *store, uint32_t position,
				    unsigned char *destination)
{
	const lshard_store_plan *plan = store->base.plan;
	const lshard_piece *piece = &plan->pieces[plan->first_piece[position]];
	const bool mine = piece->rank == callback->base.context->rank;
	unsigned char *bytes = mine ? store->shard + piece->shard_offset : destination + piece->layer_offset;
	const lshard_status status = callback_broadcast(callback, bytes, piece->width, piece->rank);

	if (status == LSHARD_OK && mine && destination)
		return callback_copy_piece(callback, piece, store->shard, destination);
	return status;
}

static lshard_status carry_by_staging(struct callback *callback, struct callback_store *store, uint32_t position,
				      unsigned char *destination)
{
	const lshard_store_plan *plan = store->base.plan;
	uint64_t bytes;
	const uint64_t own = callback_block(plan, position, callback->base.context->rank, &bytes);
	lshard_status status = callback_allgather(callback, store->shard + own, store->staging, store->part_bytes);
	uint32_t end;

	if (status < 0)
		return status; /* the plan may have gone with the group */
	end = plan->first_piece[position + 1];
	for (uint32_t index = plan->first_piece[position]; index < end && status == LSHARD_OK; index++) {
		lshard_piece piece = plan->pieces[index];

		piece.shard_offset -= callback_block(plan, position, piece.rank, &bytes);
		status = callback_copy_piece(callback, &piece,
					     store->staging + (uint64_t)piece.rank * store->part_bytes, destination);
	}
	return status;
}

/* The layer to @p destination, on all ranks; NULL where this rank has it all already. */
static lshard_status carry(struct callback *callback, struct callback_store *store, uint32_t position,
			   unsigned char *destination)
{
	const lshard_store_plan *plan = store->base.plan;
	const int32_t rank = callback->base.context->rank;
	const enum way way = callback_way(plan, position, callback->base.context->size);
	const lshard_piece *first = &plan->pieces[plan->first_piece[position]];

	if (!destination && (way != BROADCAST || first->rank != rank))
		return callback_break(callback, LSHARD_ERR_STATE, "a layer was asked for without memory for it");
	if (way == BROADCAST)
		return carry_from_one(callback, store, position, destination);
	if (way == GATHER_STAGED)
		return carry_by_staging(callback, store, position, destination);
	return callback_allgather(callback, store->shard + first[rank].shard_offset, destination, first->width);
}

/* ---- Transfers ------------------------------------------------------------------------------------------------- */

/* With the lock: announces the transfers at the head of the queue, as many as an announcement takes. */
static void announce(struct callback *callback, struct operation *operations)
{
	struct announcement *announcement = &callback->mine;

	memset(announcement, 0, sizeof *announcement);
	announcement->kind = TRANSFER;
	while (announcement->entries < ANNOUNCEMENT_ENTRIES && announcement->entries < callback->queued) {
		const struct operation *next =
			&callback->queue[(callback->first + announcement->entries) % callback->capacity];

		if (next->kind != TRANSFER)
			break;
		operations[announcement->entries] = *next;
		announcement->entry[announcement->entries++] =
			(struct entry){next->sequence, next->store->number, next->position};
	}
}

/* With the lock, let go meanwhile. */
static void carry_out(struct callback *callback, const struct operation *operation)
{
	struct callback_store *store = operation->store;
	struct landing *landing = operation->buffer == LSHARD_NO_BUFFER ? NULL : &store->landings[operation->buffer];
	lshard_arrival arrival = {.started_ns = lshard__now_ns()};
	lshard_status status;

	pthread_mutex_unlock(&callback->lock);
	status = callback->on_device ? callback_device_before(store, operation->buffer) : LSHARD_OK;
	if (status == LSHARD_OK)
		status = carry(callback, store, operation->position,
			       landing ? callback_buffer(&store->base, operation->buffer, operation->position) : NULL);
	if (status == LSHARD_OK && callback->on_device)
		status = callback_device_after(store, operation->buffer);
	arrival.finished_ns = lshard__now_ns();
	arrival.busy_ns = arrival.finished_ns - arrival.started_ns;
	pthread_mutex_lock(&callback->lock);
	if (status < 0)
		return;                      /* the end: it fails with the rest */
	if (landing && !callback->on_device) /* there it is only on its way */
		landing->arrival = arrival;
	callback_conclude(callback, status, NULL);
}

static void serve_transfers(struct callback *callback)
{
	struct operation operations[ANNOUNCEMENT_ENTRIES];
	int32_t other = 0;
	uint32_t same;

	if (callback->out_of_step) {
		callback_conclude(callback, LSHARD_ERR_OUT_OF_STEP, &callback->why_out_of_step);
		return;
	}
	announce(callback, operations);
	if (hold_round(callback) < 0)
		return;
	if (any_is(callback, ROLL_CALL))
		return; /* again: the others will come */
	same = agreed(callback, &other);
	if (same == 0) {
		lshard_error error;

		differ(callback, other, &error);
	}
	for (uint32_t index = 0; index < same && !callback_at_end(callback); index++) {
		if (index > 0)
			note_came(callback, index);
		carry_out(callback, &operations[index]);
	}
	if (same > 0 && same < callback->mine.entries && !callback_at_end(callback))
		note_came(callback, same);
}

/* ---- Exchanges and reads --------------------------------------------------------------------------------------- */

static void hand_out(struct callback *callback, size_t bytes)
{
	const size_t length = offsetof(struct vote, payload) + bytes;

	for (int32_t rank = 0; rank < callback->base.context->size; rank++)
		memcpy((unsigned char *)callback->visitor.receive + (size_t)rank * bytes,
		       callback->votes + (size_t)rank * length + offsetof(struct vote, payload), bytes);
}

static void serve_exchange(struct callback *callback, const struct operation *operation)
{
	int32_t other = 0;
	struct lshard__ranks left;
	lshard_error error;

	callback->mine = (struct announcement){.kind = EXCHANGE, .bytes = operation->bytes};
	if (hold_round(callback) < 0 || any_is(callback, ROLL_CALL))
		return; /* again: the others will come */
	if (agreed(callback, &other) == 0) {
		differ(callback, other, &error);
		if (!any_is(callback, TRANSFER) && !any_is(callback, READ))
			callback_conclude(callback, LSHARD_ERR_OUT_OF_STEP, &error);
		return; /* else again: the others will come */
	}
	if (hold_vote(callback, operation->ticket, operation->bytes, &left)) {
		hand_out(callback, operation->bytes);
		callback->out_of_step = false;
		callback_conclude(callback, LSHARD_OK, NULL);
	} else if (callback->visitor.ticket == operation->ticket && !callback_at_end(callback)) {
		callback->visitor.stage = WAITING; /* it did not happen: again, as long as the caller waits */
	}
}

static void serve_read(struct callback *callback, const struct operation *operation)
{
	int32_t other = 0;
	struct lshard__ranks left;
	lshard_error error = {""};
	lshard_status status;

	callback->mine = (struct announcement){.kind = READ, .entries = 1};
	callback->mine.entry[0] = (struct entry){0, operation->store->number, operation->position};
	if (hold_round(callback) < 0 || any_is(callback, ROLL_CALL))
		return; /* again: the others will come */
	if (agreed(callback, &other) == 0) {
		differ(callback, other, &error);
		callback_conclude(callback, LSHARD_ERR_OUT_OF_STEP, &error);
	} else if (hold_vote(callback, operation->ticket, 0, &left)) {
		void *destination = callback->visitor.destination;

		pthread_mutex_unlock(&callback->lock);
		status = carry(callback, operation->store, operation->position, destination);
		if (status == LSHARD_OK && callback->on_device)
			status = callback_device_finish(callback);
		pthread_mutex_lock(&callback->lock);
		if (status == LSHARD_OK)
			callback_conclude(callback, status, NULL);
	} else if (!callback_at_end(callback)) {
		status = lshard_fail(&error, LSHARD_ERR_TIMEOUT,
				     "%s gave up reading position %u before all had come: the deadline was over there",
				     lshard__ranks_text(&left), operation->position);
		callback_conclude(callback, status, &error);
	}
}

void callback_serve(struct callback *callback)
{
	const struct operation operation = *head(callback);

	if (operation.kind == TRANSFER) {
		callback->busy = true;
		serve_transfers(callback);
	} else if (callback->visitor.ticket != operation.ticket) {
		callback_conclude(callback, LSHARD_OK, NULL); /* nobody waits for it, and nobody has been told of it */
	} else {
		callback->busy = true;
		if (operation.kind == EXCHANGE)
			serve_exchange(callback, &operation);
		else
			serve_read(callback, &operation);
	}
	callback->busy = false;
}
