/* SPDX-License-Identifier: Apache-2.0
 *
 * load.c - how bytes get into a series: commit, and updates of a committed one.
 * Knows: the source's callback, shards, staging of stripes, residents. The pass itself is pass.c.
 */
#include "internal.h"

#include <stdio.h>
#include <string.h>

static bool is_mine(const lshard_series *series, uint32_t position)
{
	return layout_source(&series->scheme.layout, position) == series->scheme.link.rank;
}

/* Names the layers that nobody can write any more. */
static lshard_status refuse_dead_sources(lshard_series *series);

/* All ranks; in an update, all that live, if the others were source of nothing. */
static lshard_status agree(lshard_series *series, enum step step, lshard_status mine)
{
	struct call_record record = series_record(series, step, mine);
	lshard_status status;

	record.values[0] = series->group->sequence;
	if (series->state == SERIES_CREATED)
		return group_agree_all(series->group, record, &series->error);
	status = group_agree(series->group, record, &series->error);
	return status < 0 ? status : refuse_dead_sources(series);
}

/* Lets the caller write one processed layer at @p base. */
static lshard_status process_layer(lshard_series *series, uint32_t position, uint8_t *base,
				   lshard_post_process post_process, void *user)
{
	const struct layout *layout = &series->scheme.layout;
	int result;

	for (uint32_t tensor = 0; tensor < layout->n_tensors; tensor++)
		series->tensors[tensor] = base + layout->tensors[tensor].offset;
	result = post_process(user, series_layer(series, position), series->tensors);
	if (result == 0)
		return LSHARD_OK;
	return lshard_fail(&series->error, LSHARD_ERR_CALLBACK,
			   SERIES_FORMAT ": post-processing layer %u failed with %d", SERIES_NAMES(series),
			   series_layer(series, position), result);
}

/* ---- WHOLE: processed in place ---- */

static lshard_status load_owned(lshard_series *series, lshard_post_process post_process, void *user)
{
	lshard_status status = LSHARD_OK;

	for (uint32_t position = 0; position < series->scheme.layout.layers && status >= 0; position++) {
		if (post_process && is_mine(series, position))
			status = process_layer(series, position, series->address[position], post_process, user);
		if (group_aborted(series->group) && status >= 0)
			status = series_require(series, series->state, "loading");
	}
	return status;
}

/* ---- STRIPED: processed in a staging layer, from which every rank takes its stripe ---- */

/* A store of one layer per rank, seen by all. */
struct staging {
	lshard_store_plan plan;
	lshard_store *store;
	uint64_t *shard_bytes_of;
	lshard_piece *pieces;
	uint32_t *first_piece;
};

static void staging_close(lshard_series *series, struct staging *staging)
{
	if (staging->store)
		series->group->transport->ops->store_close(staging->store);
	group_release(series->group, staging->first_piece);
	group_release(series->group, staging->pieces);
	group_release(series->group, staging->shard_bytes_of);
}

static lshard_status staging_plan(lshard_series *series, struct staging *staging)
{
	lshard_group *group = series->group;
	const uint32_t size = (uint32_t)group->context.size;
	const uint64_t bytes = series->scheme.layout.layer_bytes;

	staging->shard_bytes_of = group_allocate(group, size * sizeof *staging->shard_bytes_of);
	staging->pieces = group_allocate(group, size * sizeof *staging->pieces);
	staging->first_piece = group_allocate(group, (size + 1) * sizeof *staging->first_piece);
	if (!staging->shard_bytes_of || !staging->pieces || !staging->first_piece)
		return lshard_fail(&series->error, LSHARD_ERR_NO_MEMORY, SERIES_FORMAT ": no memory to load stripes",
				   SERIES_NAMES(series));
	for (uint32_t rank = 0; rank < size; rank++) {
		staging->shard_bytes_of[rank] = bytes;
		staging->first_piece[rank] = rank;
		staging->pieces[rank] = (lshard_piece){
			.rank = (int32_t)rank, .width = bytes, .rows = 1, .shard_pitch = bytes, .layer_pitch = bytes};
	}
	staging->first_piece[size] = size;
	staging->plan = (lshard_store_plan){.name = series->name,
					    .layers = size,
					    .layer_bytes = bytes,
					    .shard_bytes = bytes,
					    .shard_bytes_of = staging->shard_bytes_of,
					    .direct = series->scheme.direct,
					    .pieces = staging->pieces,
					    .first_piece = staging->first_piece};
	return LSHARD_OK;
}

static lshard_status staging_open(lshard_series *series, struct staging *staging)
{
	lshard_group *group = series->group;
	lshard_status status;

	*staging = (struct staging){.store = NULL};
	status = staging_plan(series, staging);
	status = agree(series, STEP_ROUND, status);
	if (status < 0)
		goto close_staging;
	status = group->transport->ops->store_open(group->transport, &staging->plan, &staging->store);
	if (status < 0)
		lshard_fail(&series->error, status, SERIES_FORMAT ": staging: %s", SERIES_NAMES(series),
			    group->transport->error.text);
	status = agree(series, STEP_ROUND, status);
	if (status >= 0)
		return status;
close_staging:
	staging_close(series, staging);
	return status;
}

static lshard_status keep_piece(lshard_series *series, const lshard_piece *piece, uint8_t *shard, const uint8_t *layer)
{
	const lshard_transport_ops *ops = series->group->transport->ops;

	shard += piece->shard_offset;
	layer += piece->layer_offset;
	if (ops->copy)
		return ops->copy(series->store, shard, piece->shard_pitch, layer, piece->layer_pitch, piece->width,
				 piece->rows);
	for (uint64_t row = 0; row < piece->rows; row++)
		memcpy(shard + row * piece->shard_pitch, layer + row * piece->layer_pitch, piece->width);
	return LSHARD_OK;
}

/* This rank's pieces of the layer at @p position, from the whole layer into the shard. */
static lshard_status keep_stripe(lshard_series *series, uint32_t position, const uint8_t *layer)
{
	const struct layout *layout = &series->scheme.layout;
	uint8_t *shard = series->group->transport->ops->shard(series->store);
	lshard_status status = LSHARD_OK;

	for (uint32_t index = layout->first_piece[position]; index < layout->first_piece[position + 1] && status >= 0;
	     index++)
		if (layout->pieces[index].rank == series->scheme.link.rank)
			status = keep_piece(series, &layout->pieces[index], shard, layer);
	if (status < 0)
		return lshard_fail(&series->error, status, SERIES_FORMAT ": layer %u: keeping this rank's stripe: %s",
				   SERIES_NAMES(series), series_layer(series, position), series->store->error.text);
	return LSHARD_OK;
}

/*
 * The layer that rank @p source has staged: where it lies, or fetched into a buffer that nobody uses while loading and
 * that, where there is poison, no program looks at. A buffer that is put together has no room for it.
 */
static lshard_status take_stripe(lshard_series *series, struct staging *staging, uint32_t position, int32_t source)
{
	const lshard_transport_ops *ops = series->group->transport->ops;
	const struct scheme *scheme = &series->scheme;
	const uint8_t *layer;
	lshard_status status = LSHARD_OK;

	if (scheme->direct || scheme->link.composes) {
		layer = ops->peer(staging->store, (uint32_t)source);
	} else {
		uint8_t *buffer = ops->buffer(series->store, series->poison.on ? scheme->windows : 0, position);

		status = ops->read(staging->store, (uint32_t)source, buffer);
		layer = buffer;
	}
	if (status < 0)
		return lshard_fail(&series->error, status, SERIES_FORMAT ": layer %u, staged by rank %d: %s",
				   SERIES_NAMES(series), series_layer(series, position), source,
				   staging->store->error.text);
	return keep_stripe(series, position, layer);
}

/* n layers, one of each rank: process, agree, take, agree. */
static lshard_status load_round(lshard_series *series, struct staging *staging, uint32_t begin,
				lshard_post_process post_process, void *user)
{
	const struct layout *layout = &series->scheme.layout;
	const uint32_t end =
		layout->layers - begin < (uint32_t)layout->size ? layout->layers : begin + (uint32_t)layout->size;
	uint8_t *staged = series->group->transport->ops->shard(staging->store);
	lshard_status status = LSHARD_OK;

	for (uint32_t position = begin; position < end && status >= 0; position++)
		if (is_mine(series, position))
			status = process_layer(series, position, staged, post_process, user);
	status = agree(series, STEP_ROUND, status);
	if (status < 0)
		return status; /* on every rank */
	for (uint32_t position = begin; position < end && status >= 0; position++)
		status = take_stripe(series, staging, position, layout_source(layout, position));
	return agree(series, STEP_ROUND, status);
}

static lshard_status load_striped(lshard_series *series, lshard_post_process post_process, void *user)
{
	struct staging staging;
	lshard_status status = staging_open(series, &staging);

	if (status < 0)
		return status;
	for (uint32_t begin = 0; begin < series->scheme.layout.layers && status >= 0;
	     begin += (uint32_t)series->scheme.layout.size)
		status = load_round(series, &staging, begin, post_process, user);
	staging_close(series, &staging);
	return status;
}

/* ---- Both ---- */

/* On collective transports every rank takes part in fetching each resident, also its source. */
static lshard_status fetch_residents(lshard_series *series)
{
	const struct scheme *scheme = &series->scheme;
	lshard_group *group = series->group;
	lshard_status status = LSHARD_OK;

	for (uint32_t position = 0; position < scheme->layout.layers && status >= 0; position++) {
		const bool resident = scheme->place[position] == PLACE_RESIDENT;
		const bool in_ring = scheme->map.slot_of[position] != SLOT_NONE;

		if (!resident && (!group_collective(group) || in_ring || scheme->link.size == 1))
			continue;
		status = group->transport->ops->read(series->store, position,
						     resident ? series->address[position] : NULL);
		if (status < 0)
			lshard_fail(&series->error, status, SERIES_FORMAT ": resident layer %u: %s",
				    SERIES_NAMES(series), series_layer(series, position), series->store->error.text);
	}
	return status;
}

/* Shards are filled: what transports keep copies of is copied again, before anybody reads it. */
static lshard_status refresh(lshard_series *series)
{
	const lshard_transport_ops *ops = series->group->transport->ops;
	uint64_t bytes = 0;
	lshard_status status;

	if (!ops->refresh)
		return LSHARD_OK;
	status = ops->refresh(series->store, &bytes);
	atomic_store_explicit(&series->counters.numa_copy_bytes, bytes, memory_order_relaxed);
	if (status < 0)
		lshard_fail(&series->error, status, SERIES_FORMAT ": copying to a node: %s", SERIES_NAMES(series),
			    series->store->error.text);
	return agree(series, STEP_ROUND, status);
}

/* Fills shards, residents and windows; poisoned windows hold poison already. All ranks return with the same success. */
static lshard_status load(lshard_series *series, lshard_post_process post_process, void *user)
{
	lshard_status status;

	if (series->scheme.layout.placement == LSHARD_STRIPED)
		status = load_striped(series, post_process, user);
	else
		status = agree(series, STEP_ROUND, load_owned(series, post_process, user));
	if (status >= 0)
		status = refresh(series);
	if (status < 0)
		return status;
	status = agree(series, STEP_READY, fetch_residents(series));
	if (status >= 0)
		pass_restart_alike(series);
	return status;
}

static lshard_status check_callback(lshard_series *series, lshard_post_process post_process)
{
	if (post_process || series->scheme.layout.placement == LSHARD_WHOLE)
		return LSHARD_OK;
	return lshard_fail(&series->error, LSHARD_ERR_INVALID,
			   SERIES_FORMAT ": STRIPED needs a post_process to get at the layers", SERIES_NAMES(series));
}

static void log_commit(const lshard_series *series)
{
	const struct scheme *scheme = &series->scheme;
	const lshard_context *context = &series->group->context;
	const double mib = 1024.0 * 1024.0;
	struct scheme_distances distances;

	scheme_distances(scheme, &distances);
	context->log(context, LSHARD_LOG_INFO,
		     SERIES_FORMAT
		     ": layers %u..%u of %.1f MiB; stored here %.1f MiB, %u windows%s, %u residents; "
		     "%u layers are fetched each pass, %u of them less than %u layers ahead; transport %s",
		     SERIES_NAMES(series), scheme->layout.first_layer,
		     scheme->layout.first_layer + (scheme->layout.layers - 1), (double)scheme->layout.layer_bytes / mib,
		     (double)series->store_plan.shard_bytes / mib, scheme->windows,
		     series->poison.on ? " poisoned outside of views" : "", scheme->residents, distances.fetched,
		     distances.below_k, scheme->prefetch, series->group->transport->ops->name);
}

/* This rank came back: all shards are whole, and what it reads through windows is fetched now. */
static lshard_status take_over(lshard_series *series)
{
	const lshard_status status = fetch_residents(series);

	if (status >= 0)
		pass_restart(series);
	return status;
}

lshard_status lshard_series_commit(lshard_series *series, lshard_post_process post_process, void *user)
{
	lshard_status status = series_require(series, SERIES_CREATED, "lshard_series_commit");

	if (status < 0)
		return status;
	if (series->recalled)
		status = take_over(series);
	else
		status = agree(series, STEP_COMMIT, check_callback(series, post_process));
	if (status >= 0 && !series->recalled)
		status = load(series, post_process, user);
	if (status < 0)
		return status;
	series->state = SERIES_COMMITTED;
	rejoin_offer(series);
	rejoin_end(series);
	log_commit(series);
	return LSHARD_OK;
}

/* ---- Updates ---- */

static lshard_status refuse_dead_sources(lshard_series *series)
{
	const struct layout *layout = &series->scheme.layout;
	const uint8_t *alive = series->group->alive;
	/* Every rank has a part of each layer, or maybe copies of what others store. */
	const bool all = layout->placement == LSHARD_STRIPED || series->group->transport->ops->refresh;
	const bool lacking = all && memchr(alive, 0, (size_t)layout->size);
	char layers[160] = "";
	struct lshard__ranks gone;
	size_t used = 0;
	uint32_t lost = 0;

	for (uint32_t position = 0; position < layout->layers; position++) {
		if (alive[layout_source(layout, position)] && !lacking)
			continue;
		lost++;
		if (used + 16 < sizeof layers)
			used += (size_t)snprintf(layers + used, sizeof layers - used, " %u",
						 series_layer(series, position));
	}
	if (lost == 0)
		return LSHARD_OK;
	gone = lshard__ranks_absent(alive, layout->size);
	return lshard_fail(&series->error, LSHARD_ERR_PEER_FAILED,
			   SERIES_FORMAT ": %s %s gone; %u layers can have no new weights:%s%s; %s",
			   SERIES_NAMES(series), lshard__ranks_text(&gone), lshard__ranks_are(&gone), lost, layers,
			   used + 16 < sizeof layers ? "" : " ...",
			   series->state == SERIES_UPDATING ? "destroy the series" : "nothing was changed");
}

/*
 * Two agreements: before the first nothing has changed, so a rank that waits in vain goes on as it was; the second
 * follows the last read of every rank.
 */
static lshard_status begin_update(lshard_series *series)
{
	lshard_status status =
		group_agree(series->group, series_record(series, STEP_UPDATE_BEGIN, LSHARD_OK), &series->error);

	if (status >= 0)
		status = refuse_dead_sources(series);
	if (status < 0)
		return status;
	status = capture_drain(series);
	if (status >= 0)
		status = poison_fill(series);
	status = group_agree(series->group, series_record(series, STEP_UPDATE_READY, status), &series->error);
	if (status >= 0)
		status = refuse_dead_sources(series);
	if (status >= 0)
		status = rejoin_renew(series);
	if (status < 0 && group_collective(series->group))
		pass_fail(series, "lshard_series_update_begin");
	else if (status < 0)
		pass_restart(series); /* drained windows are filled again with the old bytes */
	return status;
}

lshard_status lshard_series_update_begin(lshard_series *series)
{
	lshard_status status = series_require(series, SERIES_COMMITTED, "lshard_series_update_begin");

	if (status < 0)
		return status;
	rejoin_begin(series);
	status = begin_update(series);
	if (status < 0)
		rejoin_end(series);
	else
		series->state = SERIES_UPDATING;
	return status;
}

lshard_status lshard_series_update_end(lshard_series *series, lshard_post_process post_process, void *user)
{
	lshard_status status = series_require(series, SERIES_UPDATING, "lshard_series_update_end");

	if (status < 0)
		return status;
	status = agree(series, STEP_UPDATE_END, check_callback(series, post_process));
	if (status >= 0)
		status = load(series, post_process, user);
	if (status < 0)
		return status;
	series->state = SERIES_COMMITTED;
	count(&series->counters.generation, 1);
	rejoin_offer(series);
	rejoin_end(series);
	return LSHARD_OK;
}
