/* SPDX-License-Identifier: Apache-2.0
 *
 * channel.c - mesh, control page, agreements and shared memory of the processes of a host in one: what a transport
 * outside this tree gets for its `exchange` and its shards. Knows what each of them is for; adds nothing to what they
 * do.
 */
#include "sockets.h"
#include "agreement.h"
#include "shared_memory.h"

#include <unistd.h>

struct lshard_channel {
	const lshard_context *context;
	lshard_error *error; /* of the transport */
	struct mesh mesh;
	struct control control;
	struct agreement agreement;
};

static uint64_t deadline_of(const lshard_channel *channel)
{
	return lshard__deadline_ns(channel->context->timeout_ms);
}

static lshard_status connect_ranks(lshard_channel *channel)
{
	const uint64_t deadline = deadline_of(channel);
	lshard_status status = mesh_open(&channel->mesh, channel->context, channel->error, deadline);

	if (status < 0)
		return status;
	status = control_open(&channel->control, &channel->mesh, channel->error, deadline);
	if (status < 0)
		mesh_close(&channel->mesh);
	return status;
}

lshard_status lshard_channel_open(const lshard_context *context, lshard_error *error, lshard_channel **channel)
{
	lshard_channel *made = context->allocate(context, sizeof *made);
	lshard_status status;

	if (!made)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "rank %d: no memory to connect %d ranks",
				   (int)context->rank, (int)context->size);
	made->context = context;
	made->error = error;
	status = agreement_make(&made->agreement, context, &made->control, error);
	if (status == LSHARD_OK)
		status = connect_ranks(made);
	if (status == LSHARD_OK) {
		*channel = made;
		return LSHARD_OK;
	}
	agreement_free(&made->agreement, context);
	context->release(context, made);
	return status;
}

void lshard_channel_close(lshard_channel *channel)
{
	if (!channel)
		return;
	control_close(&channel->control);
	mesh_close(&channel->mesh);
	agreement_free(&channel->agreement, channel->context);
	channel->context->release(channel->context, channel);
}

void lshard_channel_abort(lshard_channel *channel)
{
	mesh_abort(&channel->mesh);
}

lshard_status lshard_channel_exchange(lshard_channel *channel, const void *send, void *receive, size_t bytes,
				      uint8_t *alive)
{
	return control_exchange(&channel->control, send, receive, bytes, alive, NULL, deadline_of(channel));
}

static lshard_status agree(lshard_channel *channel, const char *what, lshard_status mine, uint64_t *round)
{
	/* The calls are told apart; an opening has the steps 1 and 2. */
	struct agreement_report report = {.step = round ? 3 : 0};

	return agreement_exchange(&channel->agreement, what, &report, mine, round, deadline_of(channel));
}

lshard_status lshard_channel_agree(lshard_channel *channel, const char *what, lshard_status mine)
{
	return agree(channel, what, mine, NULL);
}

lshard_status lshard_channel_swap(lshard_channel *channel, const char *what, lshard_status mine, int fd, int *fds)
{
	uint64_t round = 0;
	const lshard_status status = agree(channel, what, mine, &round);

	return status < 0 ? status : mesh_swap(&channel->mesh, round, fd, fds, deadline_of(channel));
}

/* ---- Shards ---- */

struct share {
	struct agreement_opening together;
	lshard_channel *channel;
	const lshard_store_plan *plan;
	struct sharing sharing;
	lshard_status mine;
	int *fds; /* [size] of the others' shards */
	int fd;   /* of this rank's */
	void **shards;
};

static lshard_status make_own(struct agreement_opening *together)
{
	struct share *share = (struct share *)together;
	struct shared_memory own = {NULL, 0};
	lshard_status status;

	if (share->mine < 0)
		return share->mine;
	if (!share->fds)
		return lshard_fail(share->channel->error, LSHARD_ERR_NO_MEMORY,
				   "series '%s': no memory for its descriptors", share->plan->name);
	status = shared_make_sealed(&share->sharing, "shard", share->plan->shard_bytes, &own, &share->fd);
	share->shards[share->channel->context->rank] = own.address;
	return status;
}

static lshard_status take_others(struct agreement_opening *together, uint64_t round)
{
	struct share *share = (struct share *)together;
	const lshard_context *context = share->channel->context;
	lshard_status status = mesh_swap(&share->channel->mesh, round, share->fd, share->fds, together->deadline);

	if (status < 0)
		return status;
	for (int32_t rank = 0; rank < context->size; rank++) {
		struct shared_memory other = {share->shards[rank], 0};

		if (rank != context->rank && status == LSHARD_OK)
			status = shared_map_sealed(&share->sharing, rank, share->fds[rank],
						   share->plan->shard_bytes_of[rank], &other);
		share->shards[rank] = other.address;
		if (share->fds[rank] >= 0)
			close(share->fds[rank]);
	}
	return status;
}

void lshard_channel_unshare(const lshard_channel *channel, const lshard_store_plan *plan, void **shards)
{
	for (int32_t rank = 0; rank < channel->context->size; rank++) {
		shared_unmap(&(struct shared_memory){shards[rank], shared_whole_pages(plan->shard_bytes_of[rank])});
		shards[rank] = NULL;
	}
}

lshard_status lshard_channel_share(lshard_channel *channel, const lshard_store_plan *plan, lshard_status mine,
				   void **shards)
{
	const lshard_context *context = channel->context;
	struct share share = {.together = {.what = plan->name,
					   .deadline = shared_deadline(context, plan, 0),
					   .make = make_own,
					   .take = take_others},
			      .channel = channel,
			      .plan = plan,
			      .sharing = {.context = context, .series = plan->name, .error = channel->error},
			      .mine = mine,
			      .fds = context->allocate(context, (size_t)context->size * sizeof *share.fds),
			      .fd = -1,
			      .shards = shards};
	const lshard_status status = agreement_open(&channel->agreement, &share.together);

	if (share.fd >= 0)
		close(share.fd);
	if (share.fds)
		context->release(context, share.fds);
	if (status < 0 && mine == LSHARD_OK)
		lshard_channel_unshare(channel, plan, shards);
	return status;
}
