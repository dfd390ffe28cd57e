/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_link_rank.c - one rank of `bench link`: opens its group, a series per size and placement and the memory of bare
 * copies, runs every variant it has a part in, and compares every byte at the end.
 * Knows: the public header, bench_link_gpu.h. Does not know: what is made of the samples.
 */
#include "bench_link.h"
#include "bench_link_gpu.h"
#include "cli.h"

#include <stdlib.h>
#include <string.h>

#define TIMEOUT_MS 30000

struct link_rank {
	struct link_bench *bench;
	int32_t rank;
	struct link_gpu gpu;
	struct link_gpu *used; /* &gpu, once open; NULL: host memory */
	cuda_stream stream;
	cuda_stream urgent; /* of bare copies, as the library's own copies are */
	cuda_event begin, end;
	unsigned char *staging; /* GPUs: a layer on the host */
	struct cli_log log;
	lshard_group *group;
	lshard_series *series[LINK_SERIES_MOST];
	uint32_t turn[LINK_SERIES_MOST];  /* which of the two layers is next */
	uint64_t moved[LINK_SERIES_MOST]; /* bytes of one fetch from the others; 0: in place */
	struct link_bare *bare;
};

static bool fail(const struct link_rank *self, const char *text)
{
	return bench_ranks_fail(&self->bench->shared->ranks, "rank %d: %s", (int)self->rank, text);
}

static bool gpu_good(const struct link_rank *self, bool good)
{
	return good || fail(self, self->gpu.error.text);
}

static bool series_good(const struct link_rank *self, uint32_t series, lshard_status status)
{
	return status == LSHARD_OK || fail(self, lshard_series_error(self->series[series]));
}

static uint32_t series_of(const struct link_bench *bench, const struct link_variant *variant)
{
	return variant->placement * bench->size_count + variant->size;
}

/* ---- Opening ------------------------------------------------------------------------------------------------- */

struct load {
	struct link_rank *rank;
	uint64_t bytes;
};

static int post_process(void *user, uint32_t layer, void *const *tensors)
{
	const struct load *load = user;
	struct link_rank *self = load->rank;

	if (!self->used)
		return bench_post_process((void *)(uintptr_t)&load->bytes, layer, tensors);
	bench_fill(self->staging, load->bytes, layer);
	return link_gpu_copy_now(self->used, (cuda_address)(uintptr_t)tensors[0],
				 (cuda_address)(uintptr_t)self->staging, load->bytes, self->stream)
		       ? 0
		       : -1;
}

static bool open_gpu(struct link_rank *self)
{
	struct link_place *place = &self->bench->shared->places[self->rank];

	if (!self->bench->options.has_devices)
		return true;
	if (!gpu_good(self, link_gpu_open(&self->gpu, (int)self->bench->options.devices[self->rank])))
		return false;
	self->used = &self->gpu;
	snprintf(place->device, sizeof place->device, "%s", self->gpu.name);
	snprintf(place->bus, sizeof place->bus, "%s", self->gpu.bus);
	place->driver_version = self->gpu.driver.version;
	self->staging = malloc((size_t)link_biggest(self->bench));
	if (!self->staging)
		return fail(self, "no memory for a layer on the host");
	return gpu_good(self, link_gpu_stream_open(self->used, false, &self->stream)) &&
	       gpu_good(self, link_gpu_stream_open(self->used, true, &self->urgent)) &&
	       gpu_good(self, link_gpu_event_open(self->used, &self->begin)) &&
	       gpu_good(self, link_gpu_event_open(self->used, &self->end));
}

static bool open_group(struct link_rank *self)
{
	const struct link_options *options = &self->bench->options;
	lshard_group_options ranks = LSHARD_GROUP_OPTIONS_INIT;
	char error[512] = "";
	struct link_place *place = &self->bench->shared->places[self->rank];

	ranks.rank = self->rank;
	ranks.size = options->ranks;
	ranks.transport = options->transport;
	ranks.job = self->bench->job;
	ranks.timeout_ms = TIMEOUT_MS;
	ranks.memory = self->used ? LSHARD_MEMORY_CUDA : LSHARD_MEMORY_HOST;
	ranks.device = self->used ? self->gpu.ordinal : 0;
	ranks.error = error;
	ranks.error_bytes = sizeof error;
	if (!cli_log_open(&self->log, self->rank))
		return fail(self, "LAYERSHARD_LOG is not understood");
	cli_log_default_to_warnings(&self->log); /* a slow link is told of there alone */
	cli_log_attach(&self->log, &ranks);
	if (lshard_group_create(&ranks, &self->group) != LSHARD_OK)
		return bench_ranks_fail(&self->bench->shared->ranks, "%s", error); /* it names the rank */
	snprintf(place->transport, sizeof place->transport, "%s", lshard_group_transport(self->group));
	return true;
}

static bool open_series(struct link_rank *self, uint32_t placement, uint32_t size)
{
	const struct link_options *options = &self->bench->options;
	const uint64_t bytes = self->bench->sizes[size];
	const lshard_tensor tensor = {"block", bytes, 0, LSHARD_STRIPE_BYTES, 0, 0};
	const uint32_t index = placement * self->bench->size_count + size;
	struct load load = {self, bytes};
	lshard_series_options layers = LSHARD_SERIES_OPTIONS_INIT;
	char name[32];

	snprintf(name, sizeof name, "link-%u", index);
	layers.name = name;
	layers.layer_count = 2 * (uint32_t)options->ranks;
	layers.tensors = &tensor;
	layers.tensor_count = 1;
	layers.prefetch = 0;
	layers.placement = options->placements[placement];
	if (lshard_series_create(self->group, &layers, &self->series[index]) != LSHARD_OK)
		return fail(self, lshard_group_error(self->group));
	return series_good(self, index, lshard_series_commit(self->series[index], post_process, &load));
}

static bool open_rank(struct link_rank *self)
{
	/* They wait for each other first: a rank without its GPU would be waited for in the group. */
	if (!open_gpu(self) || !bench_ranks_barrier(&self->bench->shared->ranks, self->rank) || !open_group(self))
		return false;
	for (uint32_t placement = 0; placement < self->bench->options.placement_count; placement++)
		for (uint32_t size = 0; size < self->bench->size_count; size++)
			if (!open_series(self, placement, size))
				return false;
	self->bare = link_bare_open(self->bench, self->rank, self->used, self->urgent);
	return self->bare != NULL;
}

static void close_rank(struct link_rank *self)
{
	char error[512];

	link_bare_close(self->bare);
	for (uint32_t index = 0; index < LINK_SERIES_MOST; index++)
		lshard_series_destroy(self->series[index]);
	if (cli_group_leave(self->group, error, sizeof error) < 0)
		(void)fail(self, error);
	if (self->used) {
		link_gpu_event_close(self->used, self->end);
		link_gpu_event_close(self->used, self->begin);
		link_gpu_stream_close(self->used, self->urgent);
		link_gpu_stream_close(self->used, self->stream);
		link_gpu_close(self->used);
	}
	free(self->staging);
}

/* ---- Moving bytes -------------------------------------------------------------------------------------------- */

static bool fetch(struct link_rank *self, uint32_t series, uint32_t layer)
{
	return series_good(self, series, lshard_reach(self->series[series], layer, self->stream)) &&
	       series_good(self, series, lshard_wait(self->series[series], layer, self->stream));
}

/* Whole layers of one source share the one window, unless they are used where that source keeps them. */
static bool is_in_place(const struct link_rank *self, uint32_t series, int32_t from)
{
	void *first = NULL;
	void *second = NULL;

	lshard_series_address(self->series[series], (uint32_t)from, 0, &first);
	lshard_series_address(self->series[series], (uint32_t)(from + self->bench->options.ranks), 0, &second);
	return first != second;
}

/* A striped layer may have an address of its own around the window; in place are then all of them or none. */
static uint64_t fetched_bytes(const struct link_rank *self, const struct link_variant *variant)
{
	const uint32_t series = series_of(self->bench, variant);

	return variant->from != LINK_ALL && is_in_place(self, series, variant->from) ? 0 : self->moved[series];
}

/* As many as a fetch of the row moves. A stripe is whole granules, so that of a small layer is more than its part. */
static uint64_t bare_bytes(const struct link_rank *self, const struct link_variant *variant)
{
	const uint64_t bytes = self->bench->sizes[variant->size];
	const uint64_t ranks = (uint64_t)self->bench->options.ranks;
	const uint64_t moved = self->moved[series_of(self->bench, variant)];

	if (variant->from != LINK_ALL)
		return bytes;
	return moved ? moved : bytes / ranks * (ranks - 1);
}

/* One fetch, or one bare copy: enqueued, or on the host done. */
static bool move_once(struct link_rank *self, const struct link_variant *variant)
{
	const uint32_t series = series_of(self->bench, variant);
	const uint32_t from = variant->from == LINK_ALL ? 0 : (uint32_t)variant->from;

	if (variant->kind == LINK_BARE)
		return link_bare_copy(self->bare, variant->from, bare_bytes(self, variant)) ||
		       fail(self, self->gpu.error.text);
	return fetch(self, series, from + (self->turn[series]++ % 2) * (uint32_t)self->bench->options.ranks);
}

static bool move_often(struct link_rank *self, const struct link_variant *variant, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++)
		if (!move_once(self, variant))
			return false;
	return true;
}

static cuda_stream stream_of(const struct link_rank *self, const struct link_variant *variant)
{
	return variant->kind == LINK_BARE ? self->urgent : self->stream;
}

static bool finish(struct link_rank *self, const struct link_variant *variant)
{
	return !self->used || gpu_good(self, link_gpu_stream_finish(self->used, stream_of(self, variant)));
}

/* One after the other: on a GPU by its own clock, between what is before the first and after the last. */
static bool time_row(struct link_rank *self, const struct link_variant *variant, double *each_ns)
{
	const uint32_t count = self->bench->options.iterations;
	const cuda_stream stream = stream_of(self, variant);
	const uint64_t begin = bench_now_ns();
	double elapsed;

	if (!self->used) {
		if (!move_often(self, variant, count))
			return false;
		*each_ns = (double)(bench_now_ns() - begin) / count;
		return true;
	}
	if (!gpu_good(self, link_gpu_event_record(self->used, self->begin, stream)) ||
	    !move_often(self, variant, count) ||
	    !gpu_good(self, link_gpu_event_record(self->used, self->end, stream)) ||
	    !gpu_good(self, link_gpu_event_finish(self->used, self->end)) ||
	    !gpu_good(self, link_gpu_event_elapsed(self->used, self->begin, self->end, &elapsed)))
		return false;
	*each_ns = elapsed / count;
	return true;
}

static bool time_alone(struct link_rank *self, const struct link_variant *variant, double *alone_ns)
{
	const uint64_t begin = bench_now_ns();

	if (!move_once(self, variant) || !finish(self, variant))
		return false;
	*alone_ns = (double)(bench_now_ns() - begin);
	return true;
}

static bool time_variant(struct link_rank *self, const struct link_variant *variant, struct link_sample *sample)
{
	sample->moved = variant->kind == LINK_BARE ? bare_bytes(self, variant) : fetched_bytes(self, variant);
	return move_often(self, variant, self->bench->options.warm_up) && finish(self, variant) &&
	       time_row(self, variant, &sample->each_ns) && time_alone(self, variant, &sample->alone_ns);
}

/* A layer from another rank, then another one: what the second moves. */
static bool find_moved(struct link_rank *self, uint32_t series)
{
	const uint32_t ranks = (uint32_t)self->bench->options.ranks;
	const uint32_t other = self->rank == 0 ? 1 : 0;
	lshard_stats before = LSHARD_STATS_INIT;
	lshard_stats after = LSHARD_STATS_INIT;

	if (!fetch(self, series, other))
		return false;
	lshard_series_stats(self->series[series], &before);
	if (!fetch(self, series, other + ranks))
		return false;
	lshard_series_stats(self->series[series], &after);
	self->moved[series] = after.fetched_bytes - before.fetched_bytes;
	return true;
}

static bool find_all_moved(struct link_rank *self)
{
	for (uint32_t index = 0; index < self->bench->options.placement_count * self->bench->size_count; index++)
		if (!find_moved(self, index))
			return false;
	return true;
}

/* ---- Rounds -------------------------------------------------------------------------------------------------- */

static bool run_variant(struct link_rank *self, uint32_t index, uint32_t round)
{
	const struct link_variant *variant = &self->bench->variants[index];

	if (!bench_ranks_barrier(&self->bench->shared->ranks, self->rank))
		return false;
	if (self->rank < variant->first_to || self->rank >= variant->first_to + variant->to_count)
		return true;
	return time_variant(self, variant, link_sample_at(self->bench, index, self->rank, round));
}

/* All ranks draw the same orders. */
static bool run_rounds(struct link_rank *self)
{
	const struct link_bench *bench = self->bench;
	uint32_t *order = calloc(bench->variant_count, sizeof *order);
	uint64_t random = 1;
	bool good = order != NULL || fail(self, "no memory for the order of the variants");

	for (uint32_t i = 0; good && i < bench->variant_count; i++)
		order[i] = i;
	for (uint32_t round = 0; good && round < bench->options.rounds; round++) {
		if (self->rank == 0)
			cli_progress("link: round %u of %u", round + 1, bench->options.rounds);
		bench_shuffle(order, bench->variant_count, &random);
		for (uint32_t i = 0; good && i < bench->variant_count; i++)
			good = run_variant(self, order[i], round);
	}
	if (self->rank == 0)
		cli_progress_erase();
	free(order);
	return good;
}

/* ---- Bits ---------------------------------------------------------------------------------------------------- */

static bool check_layer(struct link_rank *self, uint32_t series, uint32_t layer, uint64_t bytes)
{
	void *address = NULL;

	if (!fetch(self, series, layer) ||
	    !series_good(self, series, lshard_series_address(self->series[series], layer, 0, &address)))
		return false;
	if (self->used) {
		if (!gpu_good(self, link_gpu_copy_now(self->used, (cuda_address)(uintptr_t)self->staging,
						      (cuda_address)(uintptr_t)address, bytes, self->stream)))
			return false;
		address = self->staging;
	}
	return bench_compare(address, bytes, layer) ||
	       bench_ranks_fail(&self->bench->shared->ranks,
				"wrong bits: layer %u of %llu bytes on rank %d is not what its source wrote", layer,
				(unsigned long long)bytes, (int)self->rank);
}

static bool check_bits(struct link_rank *self)
{
	const struct link_options *options = &self->bench->options;

	for (uint32_t index = 0; index < options->placement_count * self->bench->size_count; index++)
		for (uint32_t layer = 0; layer < 2 * (uint32_t)options->ranks; layer++)
			if (!check_layer(self, index, layer, self->bench->sizes[index % self->bench->size_count]))
				return false;
	for (int32_t from = 0; from < options->ranks; from++)
		if (!link_bare_check(self->bare, from))
			return false;
	return true;
}

void link_rank_run(void *user, int32_t rank)
{
	struct link_bench *bench = user;
	struct bench_ranks *ranks = &bench->shared->ranks;
	struct link_rank *self = calloc(1, sizeof *self);

	if (!self) {
		bench_ranks_fail(ranks, "rank %d: no memory", (int)rank);
		return;
	}
	self->bench = bench;
	self->rank = rank;
	/* The last barrier: what one rank has written for the others stays until all have looked at it. */
	if (open_rank(self) && bench_ranks_barrier(ranks, rank) && find_all_moved(self) && run_rounds(self) &&
	    check_bits(self))
		bench_ranks_barrier(ranks, rank);
	close_rank(self);
	free(self);
}
