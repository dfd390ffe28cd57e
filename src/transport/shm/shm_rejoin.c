/* SPDX-License-Identifier: Apache-2.0
 *
 * shm_rejoin.c - ranks that come back: what a rank's door tells of its series and gives of their shards, and how one
 * that comes is connected and gets what others still map. shm_renew.c gives it memory to write.
 *
 * A shard lives as long as anybody maps it, and every rank keeps the descriptors of all. The lock is held while
 * something is told, for a second at most, and never in a pass.
 */
#include "shm.h"
#include "limit_reason.h"
#include "sockets.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define AGAIN_MS 2

/* What is said of a series, in front of its description. */
struct series_words {
	uint64_t number;
	uint64_t generation;
	char name[64];
};

/* ---- what the door tells ---- */

static void tell_group(struct shm *shm, struct door_visitor *visitor)
{
	const struct living_words words = living_words_of(shm->base.context, "shm");

	door_tell(visitor,
		  &(struct door_reply){
			  .words = &words, .words_bytes = sizeof words, .descriptors = &shm->control.fd, .n = 1});
}

static void tell_series(struct shm *shm, struct door_visitor *visitor)
{
	const struct shm_store *store;
	struct series_words words;
	uint64_t index = door_which(visitor);

	pthread_mutex_lock(&shm->rejoin.lock);
	for (store = shm->rejoin.first; store; store = store->next)
		if (store->filled && index-- == 0)
			break;
	if (store) {
		words = (struct series_words){.number = store->base.plan->number, .generation = store->generation};
		snprintf(words.name, sizeof words.name, "%s", store->base.plan->name);
		door_tell(visitor, &(struct door_reply){.words = &words,
							.words_bytes = sizeof words,
							.bytes = store->base.plan->description,
							.count = store->base.plan->description_bytes,
							.descriptors = store->fds,
							.n = shm->base.context->size});
	} else {
		door_refuse(visitor, LSHARD_ERR_RANGE, "no more series");
	}
	pthread_mutex_unlock(&shm->rejoin.lock);
}

/*
 * Admitted first, and told then: once it knows, it may be counted, and this rank must know whom to nudge. What the mesh
 * says to it before that are nudges.
 */
static void let_join(struct shm *shm, struct door_visitor *visitor)
{
	const struct arrival arrival = {.fd = fcntl(visitor->fd, F_DUPFD_CLOEXEC, 0),
					.process = lshard__socket_peer_process(visitor->fd),
					.pid = visitor->pid,
					.incarnation = (uint32_t)door_which(visitor)};

	if (arrival.fd < 0) {
		door_refuse(visitor, LSHARD_ERR_SYSTEM, lshard__reason(errno, 0).text);
		if (arrival.process >= 0)
			close(arrival.process);
		return;
	}
	mesh_admit(&shm->mesh, visitor->hello.rank, arrival);
	door_tell(visitor, &(struct door_reply){.words = NULL});
}

static void answer(void *user, struct door_visitor *visitor)
{
	struct shm *shm = user;

	switch (door_asked(visitor)) {
	case ASK_GROUP:
		tell_group(shm, visitor);
		break;
	case ASK_JOIN:
		let_join(shm, visitor);
		break;
	case ASK_SERIES:
		tell_series(shm, visitor);
		break;
	default:
		door_refuse(visitor, LSHARD_ERR_INVALID, "this is not known here");
	}
}

/* ---- opening and closing ---- */

lshard_status shm_rejoin_open(struct shm *shm, const lshard_context *context, uint64_t deadline_ns)
{
	int failed;

	if (!context->rejoin)
		return LSHARD_OK;
	failed = pthread_mutex_init(&shm->rejoin.lock, NULL);
	if (failed)
		return lshard_fail(&shm->base.error, LSHARD_ERR_SYSTEM, "mutex: %s", strerror(failed));
	shm->rejoin.made = 1;
	return door_open(&shm->rejoin.door, context, &shm->base.error, deadline_ns);
}

lshard_status shm_rejoin_start(struct shm *shm)
{
	const struct door_host host = {answer, shm};

	return shm->base.context->rejoin ? door_start(&shm->rejoin.door, &host, &shm->base.error) : LSHARD_OK;
}

static void forget_recalled(struct shm *shm)
{
	const lshard_context *context = shm->base.context;
	struct shm_recalled *recalled = &shm->rejoin.recalled;

	for (int32_t rank = 0; recalled->fds && rank < context->size; rank++)
		if (recalled->fds[rank] >= 0)
			close(recalled->fds[rank]);
	if (recalled->fds)
		context->release(context, recalled->fds);
	if (recalled->bytes)
		context->release(context, recalled->bytes);
	*recalled = (struct shm_recalled){.bytes = NULL};
}

void shm_rejoin_close(struct shm *shm, const lshard_context *context)
{
	if (!shm->rejoin.made)
		return;
	door_close(&shm->rejoin.door);
	forget_recalled(shm);
	if (shm->rejoin.taken)
		context->release(context, shm->rejoin.taken);
	if (!context->forked(context))
		pthread_mutex_destroy(&shm->rejoin.lock);
	shm->rejoin.made = 0;
}

/* ---- coming back ---- */

/* PEER_FAILED: it is gone, as the page is to say of that incarnation. */
static lshard_status join(struct shm *shm, int32_t rank, uint32_t incarnation, uint64_t deadline_ns)
{
	const lshard_context *context = shm->base.context;
	const uint64_t token = door_token(ASK_JOIN, shm->mesh.peers[context->rank].incarnation);
	struct door_answer answer;
	const lshard_status status = door_ask(context, rank, token, &answer, &shm->base.error, deadline_ns);

	if (status == LSHARD_OK) {
		mesh_admit(
			&shm->mesh, rank,
			(struct arrival){answer.fd, lshard__socket_peer_process(answer.fd), answer.pid, incarnation});
		mesh_take_in(&shm->mesh);
	} else if (status == LSHARD_ERR_PEER_FAILED) {
		shm->mesh.peers[rank].gone = 1;
		shm->mesh.peers[rank].incarnation = incarnation;
	}
	return status == LSHARD_ERR_PEER_FAILED ? LSHARD_OK : status;
}

static lshard_status join_all(struct shm *shm, uint64_t deadline_ns)
{
	lshard_status status = LSHARD_OK;

	for (int32_t rank = 0; rank < shm->base.context->size && status == LSHARD_OK; rank++) {
		const struct mesh_peer *peer = &shm->mesh.peers[rank];
		int64_t incarnation = -1;

		if (rank != shm->base.context->rank)
			incarnation = control_incarnation(&shm->control, rank, deadline_ns);
		if (incarnation >= 0 && (peer->fd < 0 || peer->incarnation != (uint32_t)incarnation))
			status = join(shm, rank, (uint32_t)incarnation, deadline_ns);
	}
	return status;
}

static lshard_status cannot_return(struct shm *shm, lshard_status status, const struct control_obstacle *obstacle)
{
	static const char *const why[] = {"does not let it in", "is loading, updating or verifying a series",
					  "waits for other ranks in a call"};
	const lshard_context *context = shm->base.context;
	lshard_error *error = &shm->base.error;

	switch (status) {
	case LSHARD_ERR_PEER_FAILED:
		return lshard_fail(error, status, "rank %d comes back to job '%s', and no other rank lives any more",
				   (int)context->rank, context->job);
	case LSHARD_ERR_MISMATCH:
		return lshard_fail(error, status,
				   "rank %d comes back to job '%s', and another process has its number now",
				   (int)context->rank, context->job);
	case LSHARD_IN_PROGRESS:
		return lshard_fail(error, LSHARD_ERR_TIMEOUT,
				   "rank %d waited %u ms to come back to job '%s': rank %d (process %d) %s",
				   (int)context->rank, (unsigned)context->timeout_ms, context->job, (int)obstacle->rank,
				   (int)shm->mesh.peers[obstacle->rank].pid, why[obstacle->why]);
	default:
		return status;
	}
}

lshard_status shm_rejoin_return(struct shm *shm, const lshard_context *context, uint64_t deadline_ns)
{
	struct control_obstacle obstacle = {.rank = -1};
	lshard_status status;

	for (;;) {
		status = join_all(shm, deadline_ns);
		if (status != LSHARD_OK)
			return status;
		status = control_return(&shm->control, &obstacle, &shm->rejoin.note, deadline_ns);
		if (status != LSHARD_IN_PROGRESS || !lshard__left_ms(deadline_ns))
			break;
		status = mesh_wait(&shm->mesh, lshard__deadline_ns(AGAIN_MS)); /* who dies meanwhile is seen */
		if (status != LSHARD_OK && status != LSHARD_ERR_TIMEOUT)
			return status;
	}
	if (status != LSHARD_OK)
		return cannot_return(shm, status, &obstacle);
	context->log(context, LSHARD_LOG_INFO, "rank %d has come back to job '%s'", (int)context->rank, context->job);
	return LSHARD_OK;
}

/* ---- series of this rank ---- */

bool shm_rejoin_offer(struct shm_store *store, int *fds)
{
	struct shm *shm = (struct shm *)store->base.transport;
	struct shm_store **last = &shm->rejoin.first;

	if (!shm->base.context->rejoin || !store->base.plan->description)
		return false;
	if (store->base.plan->recalled)
		shm->rejoin.taken[shm->rejoin.n_taken++] = store->base.plan->number;
	pthread_mutex_lock(&shm->rejoin.lock);
	while (*last)
		last = &(*last)->next;
	store->fds = fds;
	*last = store;
	pthread_mutex_unlock(&shm->rejoin.lock);
	return true;
}

void shm_rejoin_withdraw(struct shm_store *store)
{
	struct shm *shm = (struct shm *)store->base.transport;
	const lshard_context *context = shm->base.context;
	const bool ours = !context->forked(context);
	struct shm_store **at = &shm->rejoin.first;

	if (!store->fds)
		return;
	if (ours)
		pthread_mutex_lock(&shm->rejoin.lock);
	while (*at != store)
		at = &(*at)->next;
	*at = store->next;
	if (ours)
		pthread_mutex_unlock(&shm->rejoin.lock);
	for (int32_t rank = 0; rank < context->size; rank++)
		if (store->fds[rank] >= 0)
			close(store->fds[rank]);
	context->release(context, store->fds);
	store->fds = NULL;
}

struct shm_store *shm_rejoin_find(struct shm *shm, const lshard_store_plan *plan)
{
	struct shm_store *store = shm->rejoin.first;

	while (store && store->base.plan != plan)
		store = store->next;
	return store;
}

void shm_busy(lshard_transport *transport, int change, uint64_t note)
{
	control_busy(&((struct shm *)transport)->control, change, note);
}

uint64_t shm_note(const lshard_transport *transport)
{
	return ((const struct shm *)transport)->rejoin.note;
}

void shm_filled(lshard_transport *transport, const lshard_store_plan *plan, uint64_t generation)
{
	struct shm *shm = (struct shm *)transport;
	struct shm_store *store = shm_rejoin_find(shm, plan);

	if (!store)
		return;
	pthread_mutex_lock(&shm->rejoin.lock);
	store->filled = true;
	store->generation = generation;
	pthread_mutex_unlock(&shm->rejoin.lock);
}

/* ---- recalling ---- */

/* A rank that is slower than this one may still have what this one has destroyed since. */
static bool can_be_recalled(const struct shm *shm, uint64_t number)
{
	const struct shm_rejoin *rejoin = &shm->rejoin;

	for (uint32_t i = 0; i < rejoin->n_taken; i++)
		if (rejoin->taken[i] == number)
			return false;
	return number < rejoin->note;
}

/* Room for one more number, so that a series that was opened is never one too many. */
static lshard_status make_room(struct shm *shm)
{
	const lshard_context *context = shm->base.context;
	struct shm_rejoin *rejoin = &shm->rejoin;
	uint64_t *more = context->allocate(context, (rejoin->n_taken + 1) * sizeof *more);

	if (!more)
		return lshard_fail(&shm->base.error, LSHARD_ERR_NO_MEMORY, "rank %d: no memory to come back",
				   (int)context->rank);
	if (rejoin->taken) {
		memcpy(more, rejoin->taken, rejoin->n_taken * sizeof *more);
		context->release(context, rejoin->taken);
	}
	rejoin->taken = more;
	return LSHARD_OK;
}

static lshard_status take_recalled(struct shm *shm, const struct door_answer *answer, uint64_t deadline_ns)
{
	const lshard_context *context = shm->base.context;
	struct shm_recalled *recalled = &shm->rejoin.recalled;
	lshard_status status;

	if (answer->n != context->size)
		return LSHARD_ERR_MISMATCH;
	recalled->bytes = context->allocate(context, answer->bytes + 1);
	recalled->fds = context->allocate(context, (size_t)context->size * sizeof *recalled->fds);
	for (int32_t rank = 0; recalled->fds && rank < context->size; rank++)
		recalled->fds[rank] = -1;
	if (!recalled->bytes || !recalled->fds)
		return LSHARD_ERR_NO_MEMORY;
	status = door_hear(answer, recalled->bytes, deadline_ns);
	return status == LSHARD_OK ? door_hear_descriptors(answer, recalled->fds, deadline_ns) : status;
}

/* The series of that name at the door of @p rank; RANGE: it has none, PEER_FAILED: it is gone. */
static lshard_status recall_from(struct shm *shm, int32_t rank, const char *name, lshard_recalled *found,
				 uint64_t deadline_ns)
{
	const lshard_context *context = shm->base.context;
	struct series_words words;
	struct door_answer answer;
	lshard_status status;

	for (uint64_t index = 0;; index++) {
		status = door_ask(context, rank, door_token(ASK_SERIES, index), &answer, &shm->base.error, deadline_ns);
		if (status != LSHARD_OK)
			return status;
		memcpy(&words, answer.words, sizeof words);
		words.name[sizeof words.name - 1] = 0;
		if (!strcmp(words.name, name) && can_be_recalled(shm, words.number))
			break;
		door_leave(&answer);
	}
	*found = (lshard_recalled){
		.description_bytes = answer.bytes, .number = words.number, .generation = words.generation};
	status = take_recalled(shm, &answer, deadline_ns);
	door_leave(&answer);
	found->description = shm->rejoin.recalled.bytes;
	if (status == LSHARD_OK)
		return status;
	(void)lshard_fail(&shm->base.error, status, "series '%s': what rank %d has of it cannot be had: %s", name,
			  (int)rank,
			  status == LSHARD_ERR_SYSTEM ? lshard__reason(errno, 0).text : lshard_status_text(status));
	forget_recalled(shm);
	return status;
}

lshard_status shm_recall(lshard_transport *transport, const char *name, lshard_recalled *recalled)
{
	struct shm *shm = (struct shm *)transport;
	const lshard_context *context = transport->context;
	const uint64_t deadline_ns = lshard__deadline_ns(context->timeout_ms);
	lshard_status status = make_room(shm);

	forget_recalled(shm);
	if (status != LSHARD_OK)
		return status;
	status = LSHARD_ERR_PEER_FAILED;
	(void)lshard_fail(&transport->error, status, "rank %d came back, and no other rank lives any more",
			  (int)context->rank);
	for (int32_t rank = 0; rank < context->size; rank++) {
		lshard_status next = LSHARD_ERR_PEER_FAILED;

		if (rank != context->rank)
			next = recall_from(shm, rank, name, recalled, deadline_ns);
		if (next != LSHARD_ERR_PEER_FAILED && next != LSHARD_ERR_RANGE)
			return next;
		if (next == LSHARD_ERR_RANGE) /* it may be about to recall the series itself: others are asked, too */
			status = next;
	}
	return status;
}
