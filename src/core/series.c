/* SPDX-License-Identifier: Apache-2.0
 *
 * series.c - life of a series: creation, addresses, destruction, statistics.
 * Knows: scheme and store. Filling it is load.c, running it pass.c.
 */
#include "internal.h"

#include <stdio.h>
#include <string.h>

/* ---- What other files ask ---- */

static const char *state_name(enum series_state state)
{
	return state == SERIES_CREATED     ? "not committed yet"
	       : state == SERIES_COMMITTED ? "committed"
					   : "being updated";
}

struct call_record series_record(const lshard_series *series, enum step step, lshard_status status)
{
	struct call_record record = {.outcome.status = status, .step = (uint64_t)step, .number = series->number};

	strcpy(record.series, series->name);
	return record;
}

/* Also in a child by fork: STATE, since the group is its parent's. */
static lshard_status require_ours(lshard_series *series)
{
	char who[128];

	if (group_is_ours(series->group))
		return LSHARD_OK;
	snprintf(who, sizeof who, SERIES_FORMAT, SERIES_NAMES(series));
	return group_require_ours(series->group, who, &series->error);
}

lshard_status series_require(lshard_series *series, enum series_state state, const char *call)
{
	const lshard_status ours = require_ours(series);

	if (ours < 0)
		return ours;
	if (group_aborted(series->group))
		return lshard_fail(&series->error, LSHARD_ERR_ABORTED, SERIES_FORMAT ": the group was aborted",
				   SERIES_NAMES(series));
	if (series->state == state)
		return LSHARD_OK;
	return lshard_fail(&series->error, LSHARD_ERR_STATE, SERIES_FORMAT ": %s needs a series that is %s; it is %s",
			   SERIES_NAMES(series), call, state_name(state), state_name(series->state));
}

lshard_status series_position(lshard_series *series, uint32_t layer, uint32_t *position)
{
	const struct layout *layout = &series->scheme.layout;

	if (layer - layout->first_layer >= layout->layers) /* wraps below the first */
		return lshard_fail(&series->error, LSHARD_ERR_RANGE, SERIES_FORMAT ": layer %u is not in %u..%u",
				   SERIES_NAMES(series), layer, layout->first_layer,
				   layout->first_layer + (layout->layers - 1));
	*position = layer - layout->first_layer;
	return LSHARD_OK;
}

static lshard_status check_tensor(lshard_series *series, uint32_t layer, uint32_t tensor, uint32_t *position)
{
	lshard_status status = require_ours(series);

	if (status >= 0)
		status = series_position(series, layer, position);
	if (status < 0)
		return status;
	if (tensor >= series->scheme.layout.n_tensors)
		return lshard_fail(&series->error, LSHARD_ERR_RANGE,
				   SERIES_FORMAT ": layer %u has %u tensors, no number %u", SERIES_NAMES(series), layer,
				   series->scheme.layout.n_tensors, tensor);
	return LSHARD_OK;
}

/* ---- Creation ---- */

static void fill_store_plan(lshard_series *series, const lshard_series_options *options)
{
	const struct scheme *scheme = &series->scheme;

	if (options->memory_source)
		series->memory_source = *options->memory_source;
	series->store_plan = (lshard_store_plan){
		.name = series->name,
		.layers = scheme->layout.layers,
		.layer_bytes = scheme->layout.layer_bytes,
		.shard_bytes = scheme->layout.shard_bytes_of[scheme->link.rank],
		.shard_bytes_of = scheme->layout.shard_bytes_of,
		.buffers = scheme_moving_buffers(scheme) + scheme->residents,
		.windows = scheme_moving_buffers(scheme),
		.refreshed = 1,
		.spares = options->poison == LSHARD_POISON_READY ? scheme->spares : 0,
		.direct = scheme->direct,
		.composed = scheme->composed,
		.pieces = scheme->layout.pieces,
		.first_piece = scheme->layout.first_piece,
		.buffer_of = scheme->buffer_of,
		.alignment = scheme->layout.alignment,
		.memory_source = options->memory_source ? &series->memory_source : NULL,
		.number = series->number,
		.description = series->description,
		.description_bytes = series->description_bytes,
	};
}

static lshard_status allocate_tables(lshard_series *series)
{
	const uint32_t layers = series->scheme.layout.layers;
	const uint32_t windows = series->scheme.map.n_slots;
	lshard_group *group = series->group;

	series->address = group_allocate(group, layers * sizeof *series->address);
	series->windows = group_allocate(group, windows * sizeof *series->windows);
	series->window_status = group_allocate(group, windows * sizeof *series->window_status);
	series->window_error = group_allocate(group, windows * sizeof *series->window_error);
	series->window_landed = group_allocate(group, windows * sizeof *series->window_landed);
	series->capture.windows = group_allocate(group, windows * sizeof *series->capture.windows);
	series->capture.status = group_allocate(group, windows * sizeof *series->capture.status);
	series->capture.error = group_allocate(group, windows * sizeof *series->capture.error);
	series->poison.shown = group_allocate(group, windows * sizeof *series->poison.shown);
	series->poison.shown_outside = group_allocate(group, windows * sizeof *series->poison.shown_outside);
	series->tensors = group_allocate(group, series->scheme.layout.n_tensors * sizeof *series->tensors);
	if (series->address && series->windows && series->window_status && series->window_error &&
	    series->window_landed && series->capture.windows && series->capture.status && series->capture.error &&
	    series->poison.shown && series->poison.shown_outside && series->tensors)
		return LSHARD_OK;
	return lshard_fail(&group->error, LSHARD_ERR_NO_MEMORY, SERIES_FORMAT ": no memory for the tables of %u layers",
			   SERIES_NAMES(series), layers);
}

static bool is_direct(const void *user, int32_t rank)
{
	lshard_transport *transport = ((const lshard_series *)user)->group->transport;

	return !transport->ops->direct || transport->ops->direct(transport, rank);
}

/* For ranks that come back. */
static lshard_status describe(lshard_series *series, const lshard_series_options *options)
{
	lshard_group *group = series->group;

	if (!group->rejoin)
		return LSHARD_OK;
	series->description_bytes = agree_description_bytes(options);
	series->description = group_allocate(group, series->description_bytes);
	if (!series->description)
		return lshard_fail(&group->error, LSHARD_ERR_NO_MEMORY, SERIES_FORMAT ": no memory for its description",
				   SERIES_NAMES(series));
	agree_describe(options, series->description);
	return LSHARD_OK;
}

/* Everything of a series that needs no other rank. */
static lshard_status build_series(lshard_series *series, const lshard_series_options *options)
{
	lshard_group *group = series->group;
	const lshard_transport_ops *ops = group->transport->ops;
	const struct layout_memory memory = group_memory(group);
	const struct scheme_link link = {.rank = group->context.rank,
					 .size = group->context.size,
					 .collective = group_collective(group),
					 .composes = ops->capabilities & LSHARD_CAP_COMPOSES,
					 .direct = ops->capabilities & LSHARD_CAP_DIRECT,
					 .is_direct = is_direct,
					 .user = series,
					 .granule = ops->granule_bytes,
					 .large_page = group->context.memory == LSHARD_MEMORY_HOST
							       ? group->transport->context->large_page_bytes
							       : 0};
	lshard_status status;

	if (options->memory_source && (!options->memory_source->allocate || !options->memory_source->release))
		return lshard_fail(&group->error, LSHARD_ERR_INVALID,
				   SERIES_FORMAT ": a memory source needs both allocate and release",
				   SERIES_NAMES(series));
	if (options->memory_source && !(ops->capabilities & LSHARD_CAP_CALLER_MEMORY))
		return lshard_fail(&group->error, LSHARD_ERR_NOT_SUPPORTED,
				   SERIES_FORMAT ": transport %s takes no caller's memory", SERIES_NAMES(series),
				   ops->name);
	status = scheme_open(&series->scheme, options, &link, &memory, &group->error);
	if (status < 0)
		return status;
	status = describe(series, options);
	fill_store_plan(series, options);
	if (status >= 0)
		status = allocate_tables(series);
	if (status >= 0)
		ring_init(&series->ring, &series->scheme.map, series->windows, series->scheme.horizon);
	return status;
}

static lshard_status open_store(lshard_series *series, const lshard_series_options *options)
{
	lshard_group *group = series->group;
	const lshard_status status =
		group->transport->ops->store_open(group->transport, &series->store_plan, &series->store);

	if (status < 0)
		return lshard_fail(&group->error, status, SERIES_FORMAT ": %s", SERIES_NAMES(series),
				   group->transport->error.text);
	return poison_open(series, options);
}

static void find_addresses(lshard_series *series)
{
	const struct scheme *scheme = &series->scheme;
	const lshard_transport_ops *ops = series->group->transport->ops;
	uint8_t *shard = ops->shard(series->store);

	for (uint32_t position = 0; position < scheme->layout.layers; position++) {
		switch ((enum place)scheme->place[position]) {
		case PLACE_SHARD:
			series->address[position] =
				shard + scheme->layout.pieces[scheme->layout.first_piece[position]].shard_offset;
			break;
		case PLACE_PEER:
			series->address[position] = ops->peer(series->store, position);
			break;
		case PLACE_RESIDENT:
		case PLACE_WINDOW:
			series->address[position] = ops->buffer(series->store, scheme->buffer_of[position], position);
			break;
		}
	}
}

/* Frees what build_series and open_store made, as far as they came. */
static void series_free(lshard_series *series)
{
	lshard_group *group = series->group;
	const struct layout_memory memory = group_memory(group);

	rejoin_end(series);
	if (series->store)
		group->transport->ops->store_close(series->store);
	group_release(group, series->description);
	group_release(group, series->tensors);
	group_release(group, series->poison.shown_outside);
	group_release(group, series->poison.shown);
	group_release(group, series->capture.error);
	group_release(group, series->capture.status);
	group_release(group, series->capture.windows);
	group_release(group, series->window_landed);
	group_release(group, series->window_error);
	group_release(group, series->window_status);
	group_release(group, series->windows);
	group_release(group, series->address);
	scheme_close(&series->scheme, &memory);
	group_release(group, series);
}

/* With all others, and for all or none. @p status: how this rank fared before. */
static lshard_status open_together(lshard_series *series, const lshard_series_options *options, lshard_status status)
{
	lshard_group *group = series->group;

	rejoin_begin(series); /* until it is committed */
	status = agree_on_series(group, options, status, &group->error);
	if (status < 0)
		return status;
	status = open_store(series, options);
	status = group_agree_all(group, series_record(series, STEP_OPENED, status), &group->error);
	if (status >= 0)
		group->n_created++;
	return status;
}

/* A rank that came back opens what the others have; what they do not have is new to all. */
static lshard_status open_series(lshard_series *series, const lshard_series_options *options, lshard_status status)
{
	if (status >= 0 && series->group->returned) {
		status = rejoin_recall(series, options);
		if (status >= 0)
			return open_store(series, options);
		if (status != LSHARD_ERR_RANGE)
			return status;
		status = LSHARD_OK;
	}
	return open_together(series, options, status);
}

/* @p options: with the poison that the environment asks for. @p status: what is wrong with them already. */
static lshard_status create(lshard_group *group, const lshard_series_options *options, lshard_status status,
			    lshard_series **out)
{
	lshard_series *series = group_allocate(group, sizeof *series);

	if (!series) { /* tell the others, who would wait */
		status = lshard_fail(&group->error, LSHARD_ERR_NO_MEMORY, "rank %d, series '%s': no memory",
				     group->context.rank, options->name);
		return agree_on_series(group, options, status, &group->error);
	}
	series->group = group;
	series->number = group->n_created;
	strcpy(series->name, options->name);
	if (status >= 0)
		status = build_series(series, options);
	status = open_series(series, options, status);
	if (status < 0)
		goto free_series;
	find_addresses(series);
	atomic_fetch_add(&group->n_series, 1);
	*out = series;
	return LSHARD_OK;

free_series:
	series_free(series);
	return status;
}

lshard_status lshard_series_create(lshard_group *group, const lshard_series_options *options, lshard_series **series)
{
	struct series_options meant;
	lshard_status status;
	char who[32];

	if (!group)
		return LSHARD_ERR_INVALID;
	if (!options || !series)
		return lshard_fail(&group->error, LSHARD_ERR_INVALID,
				   "rank %d: lshard_series_create needs options (LSHARD_SERIES_OPTIONS_INIT) and a "
				   "place for the series",
				   group->context.rank);
	status = options_take_series(&meant, options, &group->error);
	if (status < 0)
		return status;
	options = &meant.given;
	if (!options->name || !*options->name || strlen(options->name) > 63)
		return lshard_fail(&group->error, LSHARD_ERR_INVALID,
				   "rank %d: a series needs a name of 1..63 characters", group->context.rank);
	snprintf(who, sizeof who, "rank %d", group->context.rank);
	if (group_require_ours(group, who, &group->error) < 0)
		return LSHARD_ERR_STATE;
	if (group_aborted(group))
		return lshard_fail(&group->error, LSHARD_ERR_ABORTED, "rank %d: the group was aborted",
				   group->context.rank);
	status = poison_read_options(group, options, &meant.given.poison, &group->error);
	status = create(group, options, status, series);
	if (status < 0)
		group->context.log(&group->context, LSHARD_LOG_ERROR, "%s: %s", lshard_status_name(status),
				   group->error.text);
	return status;
}

lshard_status lshard_series_destroy(lshard_series *series)
{
	if (!series)
		return LSHARD_OK;
	/*
	 * Readers still on a stream come before the memory goes. What else can fail there changes nothing for the
	 * worse.
	 */
	if (series->state == SERIES_COMMITTED && group_is_ours(series->group) &&
	    capture_drain(series) == LSHARD_ERR_TIMEOUT)
		return LSHARD_ERR_TIMEOUT;
	atomic_fetch_sub(&series->group->n_series, 1);
	series_free(series);
	return LSHARD_OK;
}

/* ---- Addresses ---- */

int lshard_series_is_filled(const lshard_series *series)
{
	return series->recalled;
}

int lshard_series_is_source(const lshard_series *series, uint32_t layer)
{
	const struct layout *layout = &series->scheme.layout;
	const uint32_t position = layer - layout->first_layer;

	return position < layout->layers && layout_source(layout, position) == series->scheme.link.rank;
}

lshard_status lshard_series_address(lshard_series *series, uint32_t layer, uint32_t tensor, void **address)
{
	uint32_t position = 0;
	const lshard_status status = check_tensor(series, layer, tensor, &position);

	if (status >= 0)
		*address = series->address[position] + series->scheme.layout.tensors[tensor].offset;
	return status;
}

lshard_status lshard_series_storage(lshard_series *series, uint32_t layer, uint32_t tensor, void **address)
{
	uint32_t position = 0;
	const lshard_status status = check_tensor(series, layer, tensor, &position);

	if (status < 0)
		return status;
	if (series->state == SERIES_COMMITTED)
		return lshard_fail(&series->error, LSHARD_ERR_STATE,
				   SERIES_FORMAT ": committed weights change by lshard_series_update_begin",
				   SERIES_NAMES(series));
	if (series->recalled && series->state == SERIES_CREATED)
		return lshard_fail(&series->error, LSHARD_ERR_STATE,
				   SERIES_FORMAT ": its weights are there already: this rank came back",
				   SERIES_NAMES(series));
	if (series->scheme.place[position] != PLACE_SHARD)
		return lshard_fail(&series->error, LSHARD_ERR_NOT_SUPPORTED,
				   SERIES_FORMAT ": layer %u is not stored whole on this rank", SERIES_NAMES(series),
				   layer);
	*address = series->address[position] + series->scheme.layout.tensors[tensor].offset;
	return LSHARD_OK;
}

static lshard_status give_stripe(lshard_series *series, void *begin, const lshard_range *found, void **address,
				 lshard_range *range)
{
	const lshard_status status = lshard__sized_give(range, found, sizeof *found, "lshard_range", &series->error);

	if (status >= 0)
		*address = begin;
	return status;
}

lshard_status lshard_series_stripe(lshard_series *series, uint32_t layer, uint32_t tensor, void **address,
				   lshard_range *range)
{
	const struct layout *layout = &series->scheme.layout;
	const struct layout_tensor *of;
	lshard_range found = LSHARD_RANGE_INIT;
	const lshard_piece *piece;
	uint64_t inside, row_bytes;
	uint32_t position = 0;
	void *begin = NULL; /* as where there are fewer rows or columns than ranks */
	const lshard_status status = check_tensor(series, layer, tensor, &position);

	if (status < 0)
		return status;
	of = &layout->tensors[tensor];
	if ((layout->placement != LSHARD_STRIPED && layout->size > 1) || of->stripe == LSHARD_STRIPE_BYTES)
		return lshard_fail(&series->error, LSHARD_ERR_NOT_SUPPORTED,
				   SERIES_FORMAT
				   ": tensor '%s' has no stripe: placement STRIPED and a stripe dimension give one",
				   SERIES_NAMES(series), of->name);
	row_bytes = of->bytes / of->rows;
	if (layout->size == 1) { /* the stripe of a rank alone is everything */
		begin = series->address[position] + of->offset;
		found.end = of->stripe == LSHARD_STRIPE_ROWS ? of->rows : row_bytes;
		found.row_bytes = row_bytes;
		return give_stripe(series, begin, &found, address, range);
	}
	piece = layout_stripe(layout, position, tensor, series->scheme.link.rank);
	if (!piece)
		return give_stripe(series, begin, &found, address, range);
	inside = piece->layer_offset - of->offset;
	begin = (uint8_t *)series->group->transport->ops->shard(series->store) + piece->shard_offset;
	found = of->stripe == LSHARD_STRIPE_ROWS
			? (lshard_range){sizeof found, inside / row_bytes, (inside + piece->width) / row_bytes,
					 row_bytes}
			: (lshard_range){sizeof found, inside, inside + piece->width, piece->shard_pitch};
	return give_stripe(series, begin, &found, address, range);
}

/* ---- Statistics ---- */

static uint64_t now(const atomic_uint_least64_t *counter)
{
	return atomic_load_explicit(counter, memory_order_relaxed);
}

lshard_status lshard_series_stats(const lshard_series *series, lshard_stats *stats)
{
	const struct scheme *scheme;
	const struct counters *counters;
	struct scheme_distances distances;
	lshard_stats found;

	if (!series || !stats)
		return LSHARD_ERR_INVALID;
	if (!group_is_ours(series->group))
		return LSHARD_ERR_STATE;
	scheme = &series->scheme;
	counters = &series->counters;
	scheme_distances(scheme, &distances);
	found = (lshard_stats){
		.layer_bytes = scheme->layout.layer_bytes,
		.shard_bytes = series->store_plan.shard_bytes,
		.window_bytes = (series->poison.painted ? scheme_moving_buffers(scheme) : scheme->windows) *
				scheme->buffer_bytes,
		.resident_bytes = scheme->residents * scheme->buffer_bytes,
		.windows = scheme->windows,
		.residents = scheme->residents,
		.fetched_layers = distances.fetched,
		.below_k_count = distances.below_k,
		.generation = now(&counters->generation),
		.reaches = now(&counters->reaches),
		.waits = now(&counters->waits),
		.stalls = now(&counters->stalls),
		.misses = now(&counters->misses),
		.fetches = now(&counters->fetches),
		.fetched_bytes = now(&counters->fetched_bytes),
		.blocked_ns = now(&counters->blocked_ns),
		.max_blocked_ns = now(&counters->max_blocked_ns),
		.link_busy_ns = now(&counters->link_busy_ns),
		.numa_copy_bytes = now(&counters->numa_copy_bytes),
	};
	memcpy(found.below_k, distances.named, sizeof found.below_k);
	return lshard__sized_give(stats, &found, sizeof found, "lshard_stats", NULL);
}

const char *lshard_series_error(const lshard_series *series)
{
	return series->error.text;
}
