/* SPDX-License-Identifier: Apache-2.0
 *
 * sim_exchange.c - where the ranks' threads exchange: the control channel of the simulated machine, and the caller's
 * bootstrap.
 *
 * Knows: who is here, who is gone, deadlines. Does not know: what the bytes mean.
 */
#include "sim_world.h"

#include "patience.h"

#include <string.h>
#include <time.h>

static struct timespec deadline_after(uint32_t ms)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	at.tv_sec += ms / 1000;
	at.tv_nsec += (long)(ms % 1000) * 1000000;
	if (at.tv_nsec >= 1000000000) {
		at.tv_sec++;
		at.tv_nsec -= 1000000000;
	}
	return at;
}

static bool all_here(const struct sim_world *world, const struct sim_exchange_point *point)
{
	for (int32_t r = 0; r < world->size; r++)
		if (!point->here[r] && !world->ranks[r].gone)
			return false;
	return true;
}

/* A collective read happens for all ranks at the moment the last one has come. */
static void serve_reads(struct sim_world *world)
{
	for (int32_t r = 0; r < world->size; r++) {
		struct sim_rank *rank = &world->ranks[r];

		if (!rank->read_store)
			continue;
		if (rank->read_to)
			sim_gather(rank->read_store, rank->read_position, rank->read_to, 0,
				   rank->read_store->base.plan->layer_bytes);
		rank->read_store = NULL;
	}
}

static void conclude(struct sim_world *world, struct sim_exchange_point *point)
{
	for (int32_t r = 0; r < world->size; r++) {
		unsigned char *result = point->result + (size_t)r * point->bytes;

		point->alive[r] = point->here[r];
		if (point->here[r])
			memcpy(result, point->send[r], point->bytes);
		else
			memset(result, 0, point->bytes);
		point->here[r] = false;
	}
	if (point == &world->read)
		serve_reads(world);
	point->generation++;
	pthread_cond_broadcast(&world->changed);
}

static lshard_status wait_for_all(struct sim_rank *rank, struct sim_exchange_point *point, uint32_t timeout_ms)
{
	struct sim_world *world = rank->world;
	struct timespec deadline = deadline_after(timeout_ms);
	uint64_t generation = point->generation;

	while (point->generation == generation) {
		if (rank->aborted)
			return LSHARD_ERR_ABORTED;
		if (all_here(world, point))
			conclude(world, point);
		else if (pthread_cond_timedwait(&world->changed, &world->lock, &deadline) != 0 &&
			 point->generation == generation && !all_here(world, point))
			return LSHARD_ERR_TIMEOUT;
	}
	return LSHARD_OK;
}

/* Called with the world locked. */
lshard_status sim_exchange(struct sim_rank *rank, struct sim_exchange_point *point, const void *send, void *receive,
			   size_t bytes, uint8_t *alive, uint32_t timeout_ms)
{
	struct sim_world *world = rank->world;
	lshard_status status;

	if (rank->aborted)
		return LSHARD_ERR_ABORTED;
	point->here[rank->rank] = true;
	point->send[rank->rank] = send;
	point->bytes = bytes;
	status = wait_for_all(rank, point, timeout_ms);
	if (status == LSHARD_OK) {
		memcpy(receive, point->result, bytes * (size_t)world->size);
		memcpy(alive, point->alive, (size_t)world->size);
		return LSHARD_OK;
	}
	for (int32_t r = 0; r < world->size; r++)
		alive[r] = point->here[r];
	point->here[rank->rank] = false;
	return status;
}

void sim_pause(struct sim_world *world, uint32_t ms)
{
	struct timespec until = deadline_after(ms);

	pthread_cond_timedwait(&world->changed, &world->lock, &until);
}

void sim_leave(struct sim_rank *rank)
{
	pthread_mutex_lock(&rank->world->lock);
	rank->gone = true;
	pthread_cond_broadcast(&rank->world->changed);
	pthread_mutex_unlock(&rank->world->lock);
}

/* ---- The caller's bootstrap ---- */

/* The rank whose bootstrap this thread has called last. */
static _Thread_local struct sim_rank *gathering;

static int allgather(void *user, const void *send, void *receive, size_t bytes)
{
	struct sim_rank *rank = gathering = user;
	uint8_t alive[SIM_RANKS];
	lshard_status status;

	if (bytes > LSHARD_EXCHANGE_BYTES)
		return 1;
	pthread_mutex_lock(&rank->world->lock);
	status = sim_exchange(rank, &rank->world->exchange, send, receive, bytes, alive, LONG_MS);
	pthread_mutex_unlock(&rank->world->lock);
	return status == LSHARD_OK ? 0 : 1;
}

struct sim_rank *sim_rank_of(const lshard_context *context)
{
	return context->bootstrap->allgather == allgather ? context->bootstrap->user : gathering;
}

void sim_bootstrap_open(struct sim_rank *rank)
{
	rank->bootstrap = (lshard_bootstrap){sizeof rank->bootstrap, allgather, rank};
}

const lshard_bootstrap *sim_bootstrap(const struct sim_world *world, int32_t rank)
{
	return &world->ranks[rank].bootstrap;
}
