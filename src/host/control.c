/* SPDX-License-Identifier: Apache-2.0
 *
 * control.c - see control.h.
 *
 * Everything that decides an exchange is in one shared block under one robust mutex; sockets only wake the waiting and
 * show deaths. A rank arrives by writing its bytes and then the number of the round. Whoever finds that all ranks that
 * are not gone have arrived decides the round: writes down who took part and counts the round up, as its last and only
 * deciding step. So a rank that dies with the lock held leaves a round undecided, never half decided.
 *
 * Bytes and decisions are kept for two rounds, by parity: round r + 2 cannot begin to be written before every living
 * rank has arrived in round r + 1 and so has read round r.
 */
#include "control.h"
#include "control_page.h"
#include "limit_reason.h"
#include "memfd.h"
#include "sockets.h"
#include "verdict.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- making ---- */

static lshard_status refused(struct control *control, const char *what)
{
	return lshard_fail(control->error, LSHARD_ERR_SYSTEM, "control page: %s: %s", what,
			   lshard__reason(errno, control->bytes).text);
}

#define PAGE_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

size_t control_page_bytes(int32_t size)
{
	return sizeof(struct control_block) + (size_t)size * sizeof(struct control_rank);
}

static struct lshard__greeting page_greeting(void)
{
	return lshard__greeting_make(CONTROL_MAGIC, sizeof(struct control_block), sizeof(struct control_rank));
}

/* A page that could shrink would kill this process, one laid out otherwise mislead it: look before mapping. */
lshard_status control_page_check(int fd, int32_t size, lshard_error *error)
{
	const struct lshard__greeting expected = page_greeting();
	struct control_block head;
	struct stat found;
	const int seals = fcntl(fd, F_GET_SEALS);
	lshard_status status;

	if (seals < 0 || (seals & PAGE_SEALS) != PAGE_SEALS || fstat(fd, &found))
		return lshard_fail(error, LSHARD_ERR_MISMATCH,
				   "the control page that rank 0 shares is not sealed (seals %#x)", (unsigned)seals);
	if (pread(fd, &head, sizeof head, 0) != (ssize_t)sizeof head)
		return lshard_fail(error, LSHARD_ERR_MISMATCH,
				   "the control page that rank 0 shares has %lld bytes instead of %zu",
				   (long long)found.st_size, control_page_bytes(size));
	status = lshard__greeting_compare(&expected, &head.greeting, "this rank",
					  "rank 0, by the control page that it shares,", error);
	if (status != LSHARD_OK)
		return status;
	if (head.size == (uint64_t)size && (uint64_t)found.st_size == control_page_bytes(size))
		return LSHARD_OK;
	return lshard_fail(error, LSHARD_ERR_MISMATCH,
			   "the control page that rank 0 shares has %lld bytes for %llu ranks instead of %zu for %d",
			   (long long)found.st_size, (unsigned long long)head.size, control_page_bytes(size),
			   (int)size);
}

lshard_status control_map(struct control *control, int fd)
{
	void *mapped = mmap(NULL, control->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (mapped == MAP_FAILED)
		return refused(control, "mmap");
	control->block = mapped;
	return LSHARD_OK;
}

static lshard_status fill_block(struct control *control)
{
	struct control_block *block = control->block;
	pthread_mutexattr_t attributes;
	int failed = pthread_mutexattr_init(&attributes);

	if (!failed)
		failed = pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
	if (!failed)
		failed = pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
	if (!failed)
		failed = pthread_mutex_init(&block->lock, &attributes);
	block->greeting = page_greeting();
	block->size = (uint64_t)control->mesh->context->size;
	block->round = 1;
	if (!failed)
		return LSHARD_OK;
	errno = failed;
	return refused(control, "mutex");
}

/* The mutex goes with the page: destroying it would take a rank that knows to be the last. */
static lshard_status make_block(struct control *control, int *fd)
{
	lshard_status status = LSHARD_OK;

	*fd = lshard__memfd_create("layershard:control");
	if (*fd < 0)
		return refused(control, "memfd_create");
	if (lshard__resize(*fd, control->bytes) || fcntl(*fd, F_ADD_SEALS, PAGE_SEALS))
		status = refused(control, "size");
	if (status == LSHARD_OK)
		status = control_map(control, *fd);
	if (status == LSHARD_OK)
		status = fill_block(control);
	if (status == LSHARD_OK)
		return LSHARD_OK;
	close(*fd);
	*fd = -1;
	return status;
}

/* Every rank makes the swap, also when rank 0 has no page to give: nobody waits for what will not come. */
static lshard_status shard_block(struct control *control, int fd, int *fds, uint64_t deadline)
{
	const lshard_context *context = control->mesh->context;
	lshard_status status = mesh_swap(control->mesh, 0, fd, fds, deadline);

	if (status != LSHARD_OK || context->rank == 0)
		return status;
	status = fds[0] >= 0
			 ? control_page_check(fds[0], context->size, control->error)
			 : lshard_fail(control->error, LSHARD_ERR_PEER_FAILED, "rank 0 has no control page to share");
	if (status == LSHARD_OK)
		status = control_map(control, fds[0]);
	if (status == LSHARD_OK && context->rejoin) {
		control->fd = fds[0];
		fds[0] = -1;
	}
	for (int32_t rank = 0; rank < context->size; rank++)
		if (fds[rank] >= 0)
			close(fds[rank]);
	return status;
}

lshard_status control_open(struct control *control, struct mesh *mesh, lshard_error *error, uint64_t deadline_ns)
{
	const lshard_context *context = mesh->context;
	size_t size = (size_t)context->size;
	int *fds = context->allocate(context, size * sizeof *fds);
	lshard_status made = LSHARD_OK;
	lshard_status status;
	int fd = -1;

	control->mesh = mesh;
	control->error = error;
	control->block = NULL;
	control->bytes = control_page_bytes(context->size);
	control->fd = -1;
	if (!fds)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "no memory to connect %d ranks", (int)context->size);
	if (context->rank == 0)
		made = make_block(control, &fd);
	status = shard_block(control, fd, fds, deadline_ns);
	if (fd >= 0 && context->rejoin)
		control->fd = fd;
	else if (fd >= 0)
		close(fd);
	context->release(context, fds);
	if (made == LSHARD_OK && status == LSHARD_OK)
		return LSHARD_OK;
	control_close(control);
	return made != LSHARD_OK ? made : status;
}

void control_close(struct control *control)
{
	if (control->block)
		munmap(control->block, control->bytes);
	control->block = NULL;
	if (control->fd >= 0)
		close(control->fd);
	control->fd = -1;
}

/* ---- exchanging ---- */

#define YIELDS 200

/*
 * The lock is held for a few copies at most, unless its holder is stopped: trying again is as good as waiting, and
 * keeps to the monotonic clock. A holder that died left nothing half done.
 */
lshard_status control_lock(struct control *control, uint64_t deadline)
{
	int failed = pthread_mutex_trylock(&control->block->lock);

	for (int tries = 0; failed == EBUSY && (tries < YIELDS || lshard__left_ms(deadline)); tries++) {
		if (tries < YIELDS)
			sched_yield();
		else
			poll(NULL, 0, 1);
		failed = pthread_mutex_trylock(&control->block->lock);
	}
	if (failed == EOWNERDEAD)
		failed = pthread_mutex_consistent(&control->block->lock);
	if (!failed)
		return LSHARD_OK;
	if (failed == EBUSY)
		return lshard_fail(control->error, LSHARD_ERR_TIMEOUT,
				   "rank %d waited %u ms for the control page: the rank that holds it is stopped",
				   (int)control->mesh->context->rank, (unsigned)control->mesh->context->timeout_ms);
	return lshard_fail(control->error, LSHARD_ERR_SYSTEM, "control page: lock: %s", strerror(failed));
}

void control_unlock(struct control *control)
{
	pthread_mutex_unlock(&control->block->lock);
}

/* Not of another process that has come back under that number since. */
void control_note_gone(struct control *control)
{
	for (int32_t rank = 0; rank < control->mesh->context->size; rank++) {
		const struct mesh_peer *peer = &control->mesh->peers[rank];

		if (peer->gone && peer->incarnation == control->block->ranks[rank].incarnation)
			control->block->ranks[rank].gone = 1;
	}
}

/* With the lock. Returns 1 if this call decided the round. The number of ranks is this one's: no peer changes it. */
static int decide(struct control_block *block, int32_t size)
{
	unsigned parity = block->round & 1;

	for (int32_t rank = 0; rank < size; rank++)
		if (!block->ranks[rank].gone && block->ranks[rank].arrived != block->round)
			return 0;
	for (int32_t rank = 0; rank < size; rank++)
		block->ranks[rank].took_part[parity] = !block->ranks[rank].gone;
	block->round++;
	return 1;
}

static lshard_status arrive(struct control *control, const void *send, size_t bytes, uint64_t *round, uint64_t deadline)
{
	struct control_rank *mine = &control->block->ranks[control->mesh->context->rank];
	lshard_status status = control_lock(control, deadline);
	unsigned parity;
	int decided;

	if (status != LSHARD_OK)
		return status;
	if (mine->gone) {
		control_unlock(control);
		return lshard_fail(control->error, LSHARD_ERR_ABORTED, "rank %d has left the group",
				   (int)control->mesh->context->rank);
	}
	*round = control->block->round;
	parity = *round & 1;
	memcpy(mine->bytes[parity], send, bytes);
	memset(mine->bytes[parity] + bytes, 0, LSHARD_EXCHANGE_BYTES - bytes);
	mine->arrived = *round;
	control_note_gone(control);
	decided = decide(control->block, control->mesh->context->size);
	control_unlock(control);
	if (decided)
		mesh_nudge(control->mesh);
	return LSHARD_OK;
}

/* Decided yet? OK or IN_PROGRESS. Deaths that were seen meanwhile may decide it. */
static lshard_status look(struct control *control, uint64_t round, uint64_t deadline)
{
	lshard_status status = control_lock(control, deadline);
	int decided_here;
	int decided;

	if (status != LSHARD_OK)
		return status;
	control_note_gone(control);
	decided_here = control->block->round == round && decide(control->block, control->mesh->context->size);
	decided = control->block->round > round;
	control_unlock(control);
	if (decided_here)
		mesh_nudge(control->mesh);
	return decided ? LSHARD_OK : LSHARD_IN_PROGRESS;
}

/* With the lock. Of those who are not gone; @p strict: also those that came and went again when their time was up. */
static int is_missing(const struct control_block *block, int32_t rank, int strict)
{
	const struct control_rank *state = &block->ranks[rank];

	return !state->gone && state->arrived != block->round && (strict || state->withdrew != block->round);
}

/*
 * With the lock: those that are missing; in @p alive 0 for them and for those that are gone. Ranks whose deadline came
 * a little earlier are not to blame, unless there is nobody else.
 */
static struct lshard__ranks find_missing(const struct control_block *block, int32_t size, uint8_t *alive)
{
	struct lshard__ranks missing = {0};
	int strict = 1;

	for (int32_t rank = 0; rank < size; rank++)
		strict &= !is_missing(block, rank, 0);
	for (int32_t rank = 0; rank < size; rank++) {
		alive[rank] = !block->ranks[rank].gone && !is_missing(block, rank, strict);
		if (is_missing(block, rank, strict))
			lshard__ranks_add(&missing, rank);
	}
	return missing;
}

/*
 * The deadline passed or this rank was aborted: take the arrival back, so that nothing has happened, unless it was
 * decided in the last moment. One more second for the lock: it must not be left standing because the deadline is over.
 */
static lshard_status withdraw(struct control *control, uint64_t round, lshard_status cause, uint8_t *alive)
{
	const lshard_context *context = control->mesh->context;
	lshard_status status = control_lock(control, lshard__deadline_ns(1000));
	struct lshard__ranks missing;

	if (status != LSHARD_OK)
		return status;
	if (control->block->round > round) {
		control_unlock(control);
		return cause == LSHARD_ERR_TIMEOUT ? LSHARD_OK : cause;
	}
	missing = find_missing(control->block, context->size, alive);
	control->block->ranks[context->rank].arrived = 0;
	control->block->ranks[context->rank].withdrew = round;
	control_unlock(control);
	if (cause != LSHARD_ERR_TIMEOUT)
		return cause;
	return lshard_fail(control->error, cause, "rank %d waited %u ms for %s", (int)context->rank,
			   (unsigned)context->timeout_ms, lshard__ranks_text(&missing));
}

/* Stays unchanged until this rank arrives in the next round: no lock is needed. */
static void read_round(const struct control_block *block, int32_t size, uint64_t round, char *receive, size_t bytes,
		       uint8_t *alive)
{
	unsigned parity = round & 1;

	for (int32_t rank = 0; rank < size; rank++) {
		alive[rank] = block->ranks[rank].took_part[parity];
		if (alive[rank])
			memcpy(receive + (size_t)rank * bytes, block->ranks[rank].bytes[parity], bytes);
		else
			memset(receive + (size_t)rank * bytes, 0, bytes);
	}
}

lshard_status control_exchange(struct control *control, const void *send, void *receive, size_t bytes, uint8_t *alive,
			       uint64_t *round, uint64_t deadline_ns)
{
	uint64_t number = 0;
	lshard_status status;

	if (bytes > LSHARD_EXCHANGE_BYTES)
		return lshard_fail(control->error, LSHARD_ERR_INVALID, "an exchange of %zu bytes: %d at most", bytes,
				   LSHARD_EXCHANGE_BYTES);
	if (atomic_load(&control->mesh->aborted))
		return lshard_fail(control->error, LSHARD_ERR_ABORTED, "rank %d was aborted",
				   (int)control->mesh->context->rank);
	mesh_take_in(control->mesh);
	status = arrive(control, send, bytes, &number, deadline_ns);
	if (status != LSHARD_OK)
		return status;
	for (status = look(control, number, deadline_ns); status == LSHARD_IN_PROGRESS;) {
		status = mesh_wait(control->mesh, deadline_ns);
		if (status == LSHARD_OK)
			status = look(control, number, deadline_ns);
	}
	if (status != LSHARD_OK)
		status = withdraw(control, number, status, alive);
	if (status != LSHARD_OK)
		return status;
	read_round(control->block, control->mesh->context->size, number, receive, bytes, alive);
	if (round)
		*round = number;
	return LSHARD_OK;
}
