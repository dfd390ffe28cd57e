/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_link.c - how the ranks share memory, and is every peer's memory read right, and fast? Knows a store; knows
 * nothing of how it is made.
 *
 * A fetch that the driver stages through the host gives the right bits at a tenth of the speed, and nothing else tells.
 * So every rank shows the others known bytes once, and reads, checks and times theirs. Where a fetch is too slow, the
 * other way of sharing memory is tried, and all ranks take the one whose slowest fetch is faster.
 */
#include "cuda_transport.h"
#include "sockets.h"

#include <stdio.h>
#include <string.h>

#define SAMPLE_BYTES ((uint64_t)16 << 20) /* long enough for a time, short enough for a start */
#define TURNS        3                    /* the best counts: the first one wakes the link */

struct link_speed {
	int32_t rank;     /* of the source */
	double gigabytes; /* per second; 0: none was made */
};

struct sample {
	lshard_store_plan plan;
	uint64_t *shard_bytes_of;
	lshard_piece *pieces;
	uint32_t *first_piece;
	uint64_t *host; /* SAMPLE_BYTES */
	cuda_event from;
	cuda_event to;
	lshard_store *store;
	struct link_speed slowest; /* of this rank */
};

/* ---- how memory is shared ---- */

static int has_neighbours(const struct cuda *cuda)
{
	for (int32_t rank = 0; rank < cuda->base.context->size; rank++)
		for (int32_t other = 0; other < rank; other++)
			if (cuda_same_device(cuda, rank, other))
				return 1;
	return 0;
}

void cuda_shard_by(struct cuda *cuda, int descriptors)
{
	cuda->virtual_memory = descriptors;
	cuda->ops.granule_bytes = descriptors ? cuda->granule : 1;
	cuda->ops.capabilities = cuda->inner ? CUDA_CAPABILITIES & FABRIC_CAPABILITIES : CUDA_CAPABILITIES;
	if (!descriptors)
		cuda->ops.capabilities &= ~(uint32_t)LSHARD_CAP_COMPOSES;
	if (!descriptors || cuda->options.copy || !has_neighbours(cuda))
		cuda->ops.capabilities &= ~(uint32_t)LSHARD_CAP_DIRECT;
}

/* How memory is shared, in words. */
static const char *way_of_sharing(const struct cuda *cuda)
{
	return cuda->inner ? "fabric handles" : cuda->virtual_memory ? "descriptors" : "legacy handles";
}

/* ---- known bytes ---- */

static void fill(uint64_t *words, int32_t rank)
{
	uint64_t state = (uint64_t)rank + 1;

	for (size_t i = 0; i < SAMPLE_BYTES / sizeof *words; i++) { /* splitmix64 */
		uint64_t mixed = state += 0x9e3779b97f4a7c15u;

		mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9u;
		mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebu;
		words[i] = mixed ^ mixed >> 31;
	}
}

static int is_filled(const uint64_t *words, int32_t rank)
{
	uint64_t state = (uint64_t)rank + 1;
	uint64_t differs = 0;

	for (size_t i = 0; i < SAMPLE_BYTES / sizeof *words; i++) {
		uint64_t mixed = state += 0x9e3779b97f4a7c15u;

		mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9u;
		mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebu;
		differs |= words[i] ^ mixed ^ mixed >> 31;
	}
	return !differs;
}

/* One "layer" per rank, and one window. */
static lshard_status plan_sample(struct cuda *cuda, struct sample *sample)
{
	const lshard_context *context = cuda->base.context;
	const size_t size = (size_t)context->size;

	sample->shard_bytes_of = context->allocate(context, size * sizeof *sample->shard_bytes_of);
	sample->pieces = context->allocate(context, size * sizeof *sample->pieces);
	sample->first_piece = context->allocate(context, (size + 1) * sizeof *sample->first_piece);
	sample->host = context->allocate(context, SAMPLE_BYTES);
	if (!sample->shard_bytes_of || !sample->pieces || !sample->first_piece || !sample->host)
		return lshard_fail(&cuda->base.error, LSHARD_ERR_NO_MEMORY,
				   "no memory to check the links between %d ranks", (int)context->size);
	for (uint32_t rank = 0; rank < size; rank++) {
		sample->shard_bytes_of[rank] = SAMPLE_BYTES;
		sample->pieces[rank] = (lshard_piece){.rank = (int32_t)rank, .width = SAMPLE_BYTES, .rows = 1};
		sample->first_piece[rank + 1] = rank + 1;
	}
	sample->plan = (lshard_store_plan){.name = "link check",
					   .layers = (uint32_t)size,
					   .alignment = 1,
					   .layer_bytes = SAMPLE_BYTES,
					   .shard_bytes = SAMPLE_BYTES,
					   .shard_bytes_of = sample->shard_bytes_of,
					   .buffers = 1,
					   .windows = 1,
					   .pieces = sample->pieces,
					   .first_piece = sample->first_piece};
	return LSHARD_OK;
}

static lshard_status refused(struct cuda *cuda, cuda_result result, const char *what)
{
	return result == CUDA_OK
		       ? LSHARD_OK
		       : cuda_failed(&cuda->driver, &cuda->base.error, result, "checking the links: %s", what);
}

static lshard_status move(struct cuda *cuda, struct sample *sample, const void *to, const void *from)
{
	struct cuda_store *store = (struct cuda_store *)sample->store;
	cuda_result result = cuda->driver.copy((uintptr_t)to, (uintptr_t)from, SAMPLE_BYTES, store->copies);

	if (result == CUDA_OK)
		result = cuda->driver.event_record(store->done, store->copies);
	if (result != CUDA_OK)
		return refused(cuda, result, "copying to or from the host");
	return cuda_await(cuda, store->done, lshard__deadline_ns(cuda->base.context->timeout_ms), 1, &cuda->base.error);
}

static lshard_status show(struct cuda *cuda, struct sample *sample)
{
	fill(sample->host, cuda->base.context->rank);
	return move(cuda, sample, cuda_shard(sample->store), sample->host);
}

static lshard_status time_fetch(struct cuda *cuda, struct sample *sample, int32_t rank, float *milliseconds)
{
	const struct cuda_driver *driver = &cuda->driver;
	const struct cuda_store *store = (struct cuda_store *)sample->store;
	cuda_result result = driver->event_record(sample->from, store->copies);
	lshard_status status;

	if (result == CUDA_OK)
		result = driver->copy(store->windows.address, store->shards[rank].address, SAMPLE_BYTES, store->copies);
	if (result == CUDA_OK)
		result = driver->event_record(sample->to, store->copies);
	if (result != CUDA_OK)
		return refused(cuda, result, "fetching from a peer");
	status =
		cuda_await(cuda, sample->to, lshard__deadline_ns(cuda->base.context->timeout_ms), 1, &cuda->base.error);
	if (status == LSHARD_OK)
		status = refused(cuda, driver->event_elapsed(milliseconds, sample->from, sample->to), "timing a fetch");
	return status;
}

static void note_speed(const struct cuda *cuda, struct sample *sample, int32_t rank, float milliseconds)
{
	const lshard_context *context = cuda->base.context;
	const struct cuda_record *mine = &cuda->records[context->rank];
	const struct cuda_record *other = &cuda->records[rank];
	const double gigabytes = (double)SAMPLE_BYTES / 1e6 / (milliseconds > 0 ? (double)milliseconds : 1e-3);

	context->log(context, LSHARD_LOG_DEBUG, "rank %d (%s, %s) fetches from rank %d (%s, %s) at %.1f GB/s by %s",
		     (int)context->rank, mine->name, mine->bus, (int)rank, other->name, other->bus, gigabytes,
		     way_of_sharing(cuda));
	if (sample->slowest.gigabytes <= 0 || gigabytes < sample->slowest.gigabytes)
		sample->slowest = (struct link_speed){rank, gigabytes};
}

static lshard_status check_fetch(struct cuda *cuda, struct sample *sample, int32_t rank)
{
	const struct cuda_record *other = &cuda->records[rank];
	float best = 0;
	lshard_status status = LSHARD_OK;

	for (int turn = 0; turn < TURNS && status == LSHARD_OK; turn++) {
		float milliseconds = 0;

		status = time_fetch(cuda, sample, rank, &milliseconds);
		if (turn == 0 || milliseconds < best)
			best = milliseconds;
	}
	if (status == LSHARD_OK)
		status = move(cuda, sample, sample->host, cuda_buffer(sample->store, 0, 0));
	if (status != LSHARD_OK)
		return status;
	if (!is_filled(sample->host, rank))
		return lshard_fail(&cuda->base.error, LSHARD_ERR_TRANSPORT,
				   "rank %d reads wrong bytes from rank %d (%s, %s): the link between these devices "
				   "cannot be used",
				   (int)cuda->base.context->rank, (int)rank, other->name, other->bus);
	note_speed(cuda, sample, rank, best);
	return LSHARD_OK;
}

/* Everyone begins with another peer, so that few ask the same one at once. */
static lshard_status check_fetches(struct cuda *cuda, struct sample *sample)
{
	const lshard_context *context = cuda->base.context;
	lshard_status status =
		refused(cuda, cuda->driver.event_create(&sample->from, CUDA_EVENT_PLAIN), "cuEventCreate");

	if (status == LSHARD_OK)
		status = refused(cuda, cuda->driver.event_create(&sample->to, CUDA_EVENT_PLAIN), "cuEventCreate");
	for (int32_t i = 1; i < context->size && status == LSHARD_OK; i++)
		status = check_fetch(cuda, sample, (context->rank + i) % context->size);
	return status;
}

static void free_sample(struct cuda *cuda, struct sample *sample)
{
	const lshard_context *context = cuda->base.context;

	if (sample->store)
		cuda_store_close(sample->store);
	if (sample->to)
		cuda->driver.event_destroy(sample->to);
	if (sample->from)
		cuda->driver.event_destroy(sample->from);
	if (sample->host && !cuda->unsettled) /* a copy may still come to it */
		context->release(context, sample->host);
	if (sample->first_piece)
		context->release(context, sample->first_piece);
	if (sample->pieces)
		context->release(context, sample->pieces);
	if (sample->shard_bytes_of)
		context->release(context, sample->shard_bytes_of);
}

/* @p slowest: of this rank; becomes the slowest of all. */
static lshard_status agree(struct cuda *cuda, int step, lshard_status status, double *slowest)
{
	struct agreement_report report = {.step = step};

	if (slowest)
		memcpy(report.body, slowest, sizeof *slowest);
	status = agreement_exchange(&cuda->agreement, "link check", &report, status, NULL,
				    lshard__deadline_ns(cuda->base.context->timeout_ms));
	for (int32_t rank = 0; slowest && rank < cuda->base.context->size && status == LSHARD_OK; rank++) {
		double other;

		memcpy(&other, cuda->agreement.reports[rank].body, sizeof other);
		*slowest = other < *slowest ? other : *slowest;
	}
	return status;
}

/* The way of sharing that is set now. @p mine: this rank's slowest fetch, @p all: the slowest of all ranks. */
static lshard_status check_way(struct cuda *cuda, struct link_speed *mine, double *all)
{
	struct sample sample = {.store = NULL};
	lshard_status status = agree(cuda, 11, plan_sample(cuda, &sample), NULL);

	if (status == LSHARD_OK)
		status = cuda_store_open(&cuda->base, &sample.plan, &sample.store);
	if (status == LSHARD_OK)
		status = agree(cuda, 12, show(cuda, &sample), NULL);
	if (status == LSHARD_OK) {
		status = check_fetches(cuda, &sample);
		*all = sample.slowest.gigabytes;
		status = agree(cuda, 13, status, all);
	}
	free_sample(cuda, &sample);
	*mine = sample.slowest;
	return status;
}

/* A failure of the other way is no failure of the group's: the first way works, if slowly. */
static lshard_status try_legacy(struct cuda *cuda, struct link_speed *mine, double *all)
{
	const lshard_context *context = cuda->base.context;
	struct link_speed fetch = {0, 0};
	double slowest = 0;
	lshard_status status;

	cuda_shard_by(cuda, 0);
	status = check_way(cuda, &fetch, &slowest);
	if (status == LSHARD_ERR_ABORTED || status == LSHARD_ERR_PEER_FAILED || status == LSHARD_ERR_TIMEOUT)
		return status;
	if (status != LSHARD_OK || slowest <= *all) {
		cuda_shard_by(cuda, 1);
		return LSHARD_OK;
	}
	if (context->rank == 0)
		context->log(
			context, LSHARD_LOG_WARN,
			"the slowest fetch is %.1f GB/s by descriptors and %.1f GB/s by legacy handles: all use legacy "
			"handles",
			*all, slowest);
	*mine = fetch;
	*all = slowest;
	return LSHARD_OK;
}

static void warn(const struct cuda *cuda, const struct link_speed *fetch)
{
	const lshard_context *context = cuda->base.context;
	const struct cuda_record *mine = &cuda->records[context->rank];
	const struct cuda_record *other = &cuda->records[fetch->rank];

	if (fetch->gigabytes < cuda->options.floor)
		context->log(
			context, LSHARD_LOG_WARN,
			"rank %d (%s, %s) fetches from rank %d (%s, %s) at %.1f GB/s: the copies seem to go through "
			"the host. `nvidia-smi topo -p2p r` says whether these devices reach each other; in a "
			"virtual machine or container all GPUs of the host's NVLink must be passed on, and an IOMMU "
			"in the way switched off. floor=0 silences this",
			(int)context->rank, mine->name, mine->bus, (int)fetch->rank, other->name, other->bus,
			fetch->gigabytes);
}

lshard_status cuda_check_links(struct cuda *cuda)
{
	const struct cuda_scope scope = cuda_enter(cuda);
	struct link_speed mine = {0, 0};
	double all = 0;
	lshard_status status = check_way(cuda, &mine, &all);

	if (status == LSHARD_OK && all < cuda->options.floor && cuda->virtual_memory && !cuda->inner)
		status = try_legacy(cuda, &mine, &all);
	if (status == LSHARD_OK && all < cuda->options.floor) {
		warn(cuda, &mine);
		snprintf(cuda->remark, sizeof cuda->remark, "slow: a fetch goes at %.1f GB/s", all);
		cuda->ops.summary = cuda->remark;
	}
	cuda_leave(cuda, scope);
	return status;
}
