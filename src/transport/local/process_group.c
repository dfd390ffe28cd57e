/* SPDX-License-Identifier: Apache-2.0
 *
 * process_group.c - where the threads of one process that are ranks of one group exchange what they say.
 * One mutex and one condition per group, no globals. The in-process group is made by rank 0, found by the others
 * through the bootstrap, and freed by whoever leaves last; as it may outlive the group that made it, it comes from libc
 * and not from the group's allocator.
 */
#include "process_group.h"
#include "verdict.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <time.h>
#include <unistd.h>

/* What a rank that never posted is said to have reached. */
#define NOTHING UINT64_MAX

/* GAVE_UP: came, but its deadline passed before the others were there. */
enum presence { ABSENT, ARRIVED, SERVED, GAVE_UP };

struct member {
	bool gone;
	enum presence presence;
	struct lshard__process_group_offer offer; /* of the blocked rank; the one that comes last fills it */
	lshard_status result;
	char why[sizeof(((lshard_error *)NULL)->text)];
	uint64_t last;  /* highest sequence posted */
	uint64_t ahead; /* posts it may have outstanding: the sum of what it reserved */
};

struct lshard__process_group {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	atomic_uint users; /* members that have not left, plus rank 0 while ranks join */
	int32_t size;
	uint32_t timeout_ms;
	struct lshard__process_group_post *books; /* [size][pages], by sequence; NULL until somebody reserves */
	uint64_t pages;                           /* of each rank */
	struct member members[];
};

/* ---- Joining --------------------------------------------------------------------------------------------------- */

/* Told by each rank at the bootstrap; the same bytes are evaluated by all, so that all come to the same end. */
struct record {
	struct lshard__outcome outcome;
	uint64_t process;
	unsigned char process_random[16]; /* the kernel's, drawn at exec: tells processes of different hosts apart */
	char tag[LSHARD__PROCESS_GROUP_TAG_BYTES];
	struct lshard__process_group *group; /* rank 0's */
};

uint64_t lshard__process_group_deadline(const struct lshard__process_group *group)
{
	return lshard__now_ns() + (uint64_t)group->timeout_ms * 1000000u;
}

static struct timespec until(uint64_t deadline_ns)
{
	return (struct timespec){.tv_sec = (time_t)(deadline_ns / 1000000000u),
				 .tv_nsec = (long)(deadline_ns % 1000000000u)};
}

static void group_free(struct lshard__process_group *group)
{
	if (!group)
		return;
	pthread_cond_destroy(&group->changed);
	pthread_mutex_destroy(&group->lock);
	free(group->books);
	free(group);
}

static struct lshard__process_group *group_new(const lshard_context *context)
{
	size_t size = (size_t)context->size;
	struct lshard__process_group *group = calloc(1, sizeof *group + size * sizeof group->members[0]);

	if (!group)
		return NULL;
	group->size = context->size;
	group->timeout_ms = context->timeout_ms;
	if (pthread_mutex_init(&group->lock, NULL) != 0)
		goto free_group;
	if (lshard__condition_open(&group->changed) != 0)
		goto destroy_lock;
	for (size_t rank = 0; rank < size; rank++)
		group->members[rank].last = NOTHING;
	atomic_init(&group->users,
		    1); /* rank 0, from the beginning, so that nobody can be the last before all have joined */
	return group;

destroy_lock:
	pthread_mutex_destroy(&group->lock);
free_group:
	free(group);
	return NULL;
}

static void record_write(struct record *record, const char *tag, bool ready, struct lshard__process_group *group)
{
	const void *random = (const void *)getauxval(AT_RANDOM);

	memset(record, 0, sizeof *record);
	record->process = (uint64_t)getpid();
	if (random)
		memcpy(record->process_random, random, sizeof record->process_random);
	record->outcome = lshard__outcome_of(ready ? LSHARD_OK : LSHARD_ERR_NO_MEMORY);
	snprintf(record->tag, sizeof record->tag, "%s", tag);
	record->group = group;
}

/* All ranks find the same first difference. */
static lshard_status compare(const struct record *first, const struct record *other, int32_t rank, lshard_error *error)
{
	if (other->process != first->process ||
	    memcmp(other->process_random, first->process_random, sizeof first->process_random) != 0)
		return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED,
				   "local: rank %d (process %llu) is not in the process of rank 0 (process %llu); this "
				   "transport connects threads of one process",
				   (int)rank, (unsigned long long)other->process, (unsigned long long)first->process);
	return lshard_fail(error, LSHARD_ERR_MISMATCH, "local: rank %d has options '%s', rank 0 has '%s'", (int)rank,
			   other->tag, first->tag);
}

static lshard_status records_check(const struct record *records, int32_t size, lshard_error *error)
{
	const struct lshard__record_set set = {.first = records, .bytes = sizeof *records, .size = size};
	const int32_t other =
		lshard__first_differing(&set, offsetof(struct record, process),
					offsetof(struct record, group) - offsetof(struct record, process));
	struct lshard__verdict verdict = lshard__evaluate(&set);

	if (other >= 0)
		return compare(&records[0], &records[other], other, error);
	if (verdict.finding == LSHARD__FAILED)
		return lshard_fail(error, (lshard_status)verdict.status, "local: no memory to join on %s",
				   lshard__ranks_text(&verdict.ranks));
	return LSHARD_OK;
}

static void count_in(struct lshard__process_group *group)
{
	atomic_fetch_add(&group->users, 1);
}

static lshard_status gather_failed(const lshard_context *context, lshard_error *error)
{
	return lshard_fail(error, LSHARD_ERR_TRANSPORT, "local: rank %d: the bootstrap's all-gather failed",
			   (int)context->rank);
}

/*
 * Two gathers: the first tells where the group's memory is, the second that everyone who read it has joined. Rank 0
 * holds it until the second is over, so a rank on which only the first one failed leaves nothing behind.
 */
lshard_status lshard__process_group_join(const lshard_context *context, const char *tag, bool ready,
					 struct lshard__process_group **joined, lshard_error *error)
{
	const lshard_bootstrap *bootstrap = context->bootstrap;
	struct record *records = context->allocate(context, ((size_t)context->size + 1) * sizeof *records);
	struct record *mine = records ? records + context->size : NULL;
	struct lshard__process_group *own = context->rank == 0 ? group_new(context) : NULL;
	struct lshard__process_group *group;
	lshard_status status;

	if (!records) { /* cannot even hear the others: they are told by its opening's end */
		group_free(own);
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "local: rank %d has no memory to join",
				   (int)context->rank);
	}
	record_write(mine, tag, ready && (own || context->rank != 0), own);
	if (bootstrap->allgather(bootstrap->user, mine, records, sizeof *records) != 0)
		status = gather_failed(context, error);
	else
		status = records_check(records, context->size, error);
	if (status < 0) {
		group_free(own);
		goto free_records;
	}
	group = records[0].group;
	if (context->rank != 0)
		count_in(group);
	if (bootstrap->allgather(bootstrap->user, mine, records, sizeof *records) == 0) {
		*joined = group;
	} else {
		lshard__process_group_leave(group, context->rank);
		status = gather_failed(context, error);
	}

free_records:
	context->release(context, records);
	return status;
}

/* ---- Exchange -------------------------------------------------------------------------------------------------- */

/* Two members that stand at different calls, so that nothing can be exchanged. */
static bool offers_differ(const struct lshard__process_group *group, int32_t *one, int32_t *other)
{
	*one = -1;
	for (int32_t rank = 0; rank < group->size; rank++) {
		const struct member *member = &group->members[rank];

		if (member->presence != ARRIVED)
			continue;
		if (*one < 0) {
			*one = rank;
		} else if (member->offer.kind != group->members[*one].offer.kind ||
			   member->offer.bytes != group->members[*one].offer.bytes) {
			*other = rank;
			return true;
		}
	}
	return false;
}

/* Into the buffers of a blocked member: what every other one gave. */
static void serve(struct lshard__process_group *group, struct member *member)
{
	for (int32_t rank = 0; rank < group->size; rank++) {
		const struct member *from = &group->members[rank];
		unsigned char *to = (unsigned char *)member->offer.receive + (size_t)rank * member->offer.bytes;

		member->offer.alive[rank] = !from->gone;
		if (from->gone)
			memset(to, 0, member->offer.bytes);
		else
			memcpy(to, from->offer.send, member->offer.bytes);
	}
	member->result = LSHARD_OK;
}

/* If every living member has arrived, the exchange happens: here, at once and for all. */
static void complete(struct lshard__process_group *group)
{
	int32_t one, other = -1;
	bool differ;

	for (int32_t rank = 0; rank < group->size; rank++)
		if (!group->members[rank].gone && group->members[rank].presence != ARRIVED)
			return;
	differ = offers_differ(group, &one, &other);
	for (int32_t rank = 0; rank < group->size; rank++) {
		struct member *member = &group->members[rank];

		if (member->gone)
			continue;
		if (differ) {
			member->result = LSHARD_ERR_OUT_OF_STEP;
			snprintf(member->why, sizeof member->why, "ranks %d and %d are in different collective calls",
				 (int)one, (int)other);
		} else {
			serve(group, member);
		}
	}
	for (int32_t rank = 0; rank < group->size; rank++)
		if (!group->members[rank].gone)
			group->members[rank].presence = SERVED;
	pthread_cond_broadcast(&group->changed);
}

/* The living ranks that never came; if all did at some time, those that are not here any more. */
static struct lshard__ranks who_is_missing(const struct lshard__process_group *group)
{
	struct lshard__ranks absent = {0}, gave_up = {0};

	for (int32_t rank = 0; rank < group->size; rank++) {
		const struct member *member = &group->members[rank];

		if (!member->gone && member->presence == GAVE_UP)
			lshard__ranks_add(&gave_up, rank);
		else if (!member->gone && member->presence != ARRIVED)
			lshard__ranks_add(&absent, rank);
	}
	return absent.count > 0 ? absent : gave_up;
}

static lshard_status late(struct lshard__process_group *group, int32_t rank,
			  const struct lshard__process_group_offer *offer, lshard_error *error)
{
	struct lshard__ranks missing = who_is_missing(group);

	for (int32_t other = 0; other < group->size; other++) {
		enum presence presence = group->members[other].presence;

		offer->alive[other] = !group->members[other].gone && (presence == ARRIVED || presence == GAVE_UP);
	}
	group->members[rank].presence = GAVE_UP;
	return lshard_fail(error, LSHARD_ERR_TIMEOUT, "rank %d waited %u ms for %s", (int)rank,
			   (unsigned)group->timeout_ms, lshard__ranks_text(&missing));
}

static lshard_status aborted(int32_t rank, lshard_error *error)
{
	return lshard_fail(error, LSHARD_ERR_ABORTED, "rank %d: the group was aborted", (int)rank);
}

lshard_status lshard__process_group_exchange(struct lshard__process_group *group, int32_t rank,
					     const struct lshard__process_group_offer *offer, lshard_error *error)
{
	struct member *member = &group->members[rank];
	struct timespec deadline = until(lshard__process_group_deadline(group));
	lshard_status status;
	int waited = 0;

	pthread_mutex_lock(&group->lock);
	if (!member->gone) {
		member->offer = *offer;
		member->presence = ARRIVED;
		complete(group);
	}
	while (member->presence == ARRIVED && waited == 0)
		waited = pthread_cond_timedwait(&group->changed, &group->lock, &deadline);

	if (member->presence == ARRIVED) {
		status = late(group, rank, offer, error);
	} else if (member->presence == SERVED) { /* it happened for the others, so it did for an aborted rank too */
		member->presence = ABSENT;
		status = member->result;
		if (status < 0)
			lshard_fail(error, status, "%s", member->why);
	} else {
		status = aborted(rank, error);
	}
	pthread_mutex_unlock(&group->lock);
	return status;
}

/* ---- The book of transfers ------------------------------------------------------------------------------------- */

/*
 * Two ranks are apart by what one has posted and not waited for, and by what the other has not waited for either. The
 * rest is for posts that only give a layer.
 */
static uint64_t pages_for(uint64_t ahead)
{
	return 2 * ahead + 256;
}

static struct lshard__process_group_post *page_of(const struct lshard__process_group *group, int32_t rank,
						  uint64_t sequence)
{
	return &group->books[(uint64_t)rank * group->pages + sequence % group->pages];
}

/* With the lock. Larger books, with what stood in the old ones; of two posts on one page the later stays. */
static bool rebind(struct lshard__process_group *group, uint64_t pages)
{
	struct lshard__process_group_post *old = group->books;
	uint64_t old_pages = group->pages;
	struct lshard__process_group_post *books = calloc((size_t)group->size * pages, sizeof *books);

	if (!books)
		return false;
	for (uint64_t page = 0; page < (uint64_t)group->size * pages; page++)
		books[page].sequence = NOTHING;
	group->books = books;
	group->pages = pages;
	for (uint64_t at = 0; at < (uint64_t)group->size * old_pages; at++) {
		struct lshard__process_group_post *page = page_of(group, (int32_t)(at / old_pages), old[at].sequence);

		if (old[at].sequence != NOTHING && (page->sequence == NOTHING || page->sequence < old[at].sequence))
			*page = old[at];
	}
	free(old);
	return true;
}

bool lshard__process_group_reserve(struct lshard__process_group *group, int32_t rank, uint32_t posts)
{
	uint64_t ahead;
	bool done;

	pthread_mutex_lock(&group->lock);
	ahead = group->members[rank].ahead + posts;
	done = pages_for(ahead) <= group->pages || rebind(group, pages_for(ahead));
	if (done)
		group->members[rank].ahead = ahead;
	pthread_mutex_unlock(&group->lock);
	return done;
}

void lshard__process_group_unreserve(struct lshard__process_group *group, int32_t rank, uint32_t posts)
{
	pthread_mutex_lock(&group->lock);
	group->members[rank].ahead -= posts;
	pthread_mutex_unlock(&group->lock);
}

void lshard__process_group_post(struct lshard__process_group *group, int32_t rank,
				const struct lshard__process_group_post *post)
{
	struct member *member = &group->members[rank];
	struct lshard__process_group_post *page;

	pthread_mutex_lock(&group->lock);
	page = page_of(group, rank, post->sequence);
	*page = *post;
	page->posted_ns = lshard__now_ns();
	member->last = post->sequence;
	pthread_cond_broadcast(&group->changed);
	pthread_mutex_unlock(&group->lock);
}

/*
 * One look at everyone's book: OK, IN_PROGRESS with those that are missing, or why it can never be. A rank that waited
 * for none of its last posts may be so far ahead that the page was used again: it is past this one, and what exactly it
 * asked for is not known any more.
 */
static lshard_status look(const struct lshard__process_group *group, int32_t rank,
			  const struct lshard__process_group_post *post, struct lshard__ranks *missing,
			  uint64_t *started_ns, lshard_error *error)
{
	*started_ns = 0;
	for (int32_t other = 0; other < group->size; other++) {
		const struct member *member = &group->members[other];
		const struct lshard__process_group_post *page = page_of(group, other, post->sequence);

		if (member->last == NOTHING || member->last < post->sequence) {
			if (member->gone)
				return lshard_fail(error, LSHARD_ERR_PEER_FAILED,
						   "rank %d is gone before transfer %llu", (int)other,
						   (unsigned long long)post->sequence);
			lshard__ranks_add(missing, other);
		} else if (page->sequence != NOTHING && page->sequence > post->sequence) {
			continue;
		} else if (page->sequence != post->sequence) {
			return lshard_fail(error, LSHARD_ERR_OUT_OF_STEP,
					   "transfer %llu of rank %d is past on rank %d, which is at transfer %llu",
					   (unsigned long long)post->sequence, (int)rank, (int)other,
					   (unsigned long long)member->last);
		} else if (page->store != post->store || page->position != post->position) {
			return lshard_fail(
				error, LSHARD_ERR_OUT_OF_STEP,
				"transfer %llu is position %u of series %u on rank %d but position %u of series %u "
				"on rank %d",
				(unsigned long long)post->sequence, post->position, post->store, (int)rank,
				page->position, page->store, (int)other);
		} else if (page->posted_ns > *started_ns) {
			*started_ns = page->posted_ns;
		}
	}
	return missing->count == 0 ? LSHARD_OK : LSHARD_IN_PROGRESS;
}

lshard_status lshard__process_group_await(struct lshard__process_group *group, int32_t rank,
					  const struct lshard__process_group_post *post, uint64_t deadline_ns,
					  uint64_t *started_ns, lshard_error *error)
{
	struct timespec deadline = until(deadline_ns);
	struct lshard__ranks missing;
	lshard_status status;
	int waited = 0;

	pthread_mutex_lock(&group->lock);
	for (;;) {
		missing = (struct lshard__ranks){0};
		status = group->members[rank].gone ? aborted(rank, error)
						   : look(group, rank, post, &missing, started_ns, error);
		if (status != LSHARD_IN_PROGRESS || waited != 0)
			break;
		waited = pthread_cond_timedwait(&group->changed, &group->lock, &deadline);
	}
	if (*started_ns == 0) /* so long ago that nobody's page is left */
		*started_ns = lshard__now_ns();
	if (status == LSHARD_IN_PROGRESS)
		status = lshard_fail(error, LSHARD_ERR_TIMEOUT,
				     "rank %d waited %u ms for transfer %llu: %s did not ask for it", (int)rank,
				     (unsigned)group->timeout_ms, (unsigned long long)post->sequence,
				     lshard__ranks_text(&missing));
	pthread_mutex_unlock(&group->lock);
	return status;
}

/* ---- Leaving --------------------------------------------------------------------------------------------------- */

static void member_goes(struct lshard__process_group *group, int32_t rank)
{
	struct member *member = &group->members[rank];

	member->gone = true;
	if (member->presence != SERVED)
		member->presence = ABSENT;
	complete(group);
	pthread_cond_broadcast(&group->changed);
}

void lshard__process_group_abort(struct lshard__process_group *group, int32_t rank)
{
	pthread_mutex_lock(&group->lock);
	member_goes(group, rank);
	pthread_mutex_unlock(&group->lock);
}

void lshard__process_group_leave(struct lshard__process_group *group, int32_t rank)
{
	lshard__process_group_abort(group, rank);
	if (atomic_fetch_sub(&group->users, 1) == 1)
		group_free(group);
}

/* The lock may be held by a thread that is not there. */
void lshard__process_group_drop(struct lshard__process_group *group)
{
	if (atomic_fetch_sub(&group->users, 1) != 1)
		return;
	free(group->books);
	free(group);
}
