/* SPDX-License-Identifier: Apache-2.0
 *
 * control_return.c - how a rank that comes back is counted again by the others' exchanges: see control.h.
 *
 * Each process that comes under a number is another incarnation of that rank. So what a rank has seen end is not taken
 * for who has come since. A rank that comes back is counted in one step, under the page's lock, and only where nobody
 * could miss it: no exchange is half gathered, and no rank is between two exchanges of one call.
 */
#include "control.h"
#include "control_page.h"

#include <unistd.h>

void control_busy(struct control *control, int change, uint64_t note)
{
	struct control_rank *mine = &control->block->ranks[control->mesh->context->rank];

	atomic_store(&mine->noted, note);
	if (change > 0)
		atomic_fetch_add(&mine->busy, 1);
	else
		atomic_fetch_sub(&mine->busy, 1);
}

/* Whoever had the number before is gone: this rank listens at its door now. */
static lshard_status begin(struct control *control, uint64_t deadline_ns)
{
	const int32_t rank = control->mesh->context->rank;
	struct control_rank *mine = &control->block->ranks[rank];
	const lshard_status status = control_lock(control, deadline_ns);

	if (status != LSHARD_OK)
		return status;
	mine->gone = 1;
	mine->arrived = 0;
	mine->withdrew = 0;
	atomic_store(&mine->busy, 0);
	control->mesh->peers[rank].incarnation = ++mine->incarnation;
	control_unlock(control);
	return LSHARD_OK;
}

lshard_status control_attach(struct control *control, struct mesh *mesh, lshard_error *error, int fd,
			     uint64_t deadline_ns)
{
	const int32_t size = mesh->context->size;
	lshard_status status;

	*control = (struct control){.mesh = mesh, .error = error, .bytes = control_page_bytes(size), .fd = fd};
	status = control_page_check(fd, size, error);
	if (status == LSHARD_OK)
		status = control_map(control, fd);
	if (status == LSHARD_OK)
		status = begin(control, deadline_ns);
	if (status != LSHARD_OK)
		control_close(control);
	return status;
}

int64_t control_incarnation(struct control *control, int32_t rank, uint64_t deadline_ns)
{
	const struct control_rank *state = &control->block->ranks[rank];
	int64_t incarnation;

	if (control_lock(control, deadline_ns) != LSHARD_OK)
		return -1;
	incarnation = state->gone ? -1 : (int64_t)state->incarnation;
	control_unlock(control);
	return incarnation;
}

/* With the lock. False: because of @p obstacle. */
static bool may_return(const struct control *control, struct control_obstacle *obstacle)
{
	const struct control_block *block = control->block;
	const struct mesh *mesh = control->mesh;
	bool may = true;

	obstacle->rank = -1;
	for (int32_t rank = 0; rank < mesh->context->size && may; rank++) {
		const struct control_rank *state = &block->ranks[rank];
		const struct mesh_peer *peer = &mesh->peers[rank];
		const bool connected = peer->fd >= 0 && peer->incarnation == state->incarnation;

		if (rank == mesh->context->rank || state->gone)
			continue;
		may = connected && atomic_load(&state->busy) == 0 && state->arrived != block->round;
		*obstacle = (struct control_obstacle){rank, !connected                  ? CONTROL_NOT_CONNECTED
							    : atomic_load(&state->busy) ? CONTROL_BUSY
											: CONTROL_EXCHANGING};
	}
	return may && obstacle->rank >= 0;
}

static uint64_t highest_note(const struct control *control)
{
	uint64_t highest = 0;

	for (int32_t rank = 0; rank < control->mesh->context->size; rank++) {
		const struct control_rank *state = &control->block->ranks[rank];
		const uint64_t noted = atomic_load(&state->noted);

		if (!state->gone && noted > highest)
			highest = noted;
	}
	return highest;
}

lshard_status control_return(struct control *control, struct control_obstacle *obstacle, uint64_t *note,
			     uint64_t deadline_ns)
{
	struct control_rank *mine = &control->block->ranks[control->mesh->context->rank];
	lshard_status status = control_lock(control, deadline_ns);

	if (status != LSHARD_OK)
		return status;
	control_note_gone(control);
	status = may_return(control, obstacle) ? LSHARD_OK
		 : obstacle->rank < 0          ? LSHARD_ERR_PEER_FAILED
					       : LSHARD_IN_PROGRESS;
	if (status == LSHARD_OK && control->mesh->peers[control->mesh->context->rank].incarnation != mine->incarnation)
		status = LSHARD_ERR_MISMATCH;
	if (status == LSHARD_OK) {
		*note = highest_note(control);
		atomic_store(&mine->noted, *note);
		mine->gone = 0;
	}
	control_unlock(control);
	return status;
}
