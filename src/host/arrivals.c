/* SPDX-License-Identifier: Apache-2.0
 *
 * arrivals.c - see arrivals.h.
 */
#include "arrivals.h"

#include <unistd.h>

static const struct arrival none = {.fd = -1, .process = -1};

static void drop(struct arrival *arrival)
{
	if (arrival->fd >= 0)
		close(arrival->fd);
	if (arrival->process >= 0)
		close(arrival->process);
	*arrival = none;
}

bool arrivals_open(struct arrivals *arrivals, const lshard_context *context)
{
	struct arrival *of = context->allocate(context, (size_t)context->size * sizeof *of);

	if (!of || pthread_mutex_init(&arrivals->lock, NULL)) {
		if (of)
			context->release(context, of);
		return false;
	}
	for (int32_t rank = 0; rank < context->size; rank++)
		of[rank] = none;
	arrivals->of = of;
	arrivals->size = context->size;
	return true;
}

void arrivals_close(struct arrivals *arrivals, const lshard_context *context)
{
	if (!arrivals->of)
		return;
	for (int32_t rank = 0; rank < arrivals->size; rank++)
		drop(&arrivals->of[rank]);
	if (!context->forked(context)) /* a child's copy may be locked for ever */
		pthread_mutex_destroy(&arrivals->lock);
	context->release(context, arrivals->of);
	arrivals->of = NULL;
}

void arrivals_put(struct arrivals *arrivals, int32_t rank, struct arrival arrival)
{
	pthread_mutex_lock(&arrivals->lock);
	drop(&arrivals->of[rank]);
	arrivals->of[rank] = arrival;
	pthread_mutex_unlock(&arrivals->lock);
}

void arrivals_lock(struct arrivals *arrivals)
{
	if (arrivals->of)
		pthread_mutex_lock(&arrivals->lock);
}

void arrivals_unlock(struct arrivals *arrivals)
{
	if (arrivals->of)
		pthread_mutex_unlock(&arrivals->lock);
}

bool arrivals_take(struct arrivals *arrivals, int32_t rank, struct arrival *arrival)
{
	if (!arrivals->of || arrivals->of[rank].fd < 0)
		return false;
	*arrival = arrivals->of[rank];
	arrivals->of[rank] = none;
	return true;
}
