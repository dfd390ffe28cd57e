/* SPDX-License-Identifier: Apache-2.0
 *
 * channel.c - mesh, control page and agreements of the processes of a host in one: what a transport outside this tree
 * gets for its `exchange`. Knows what each of them is for; adds nothing to what they do.
 */
#include "sockets.h"
#include "agreement.h"

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
	struct agreement_report report = {.step = round != NULL}; /* the two calls are told apart */

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
