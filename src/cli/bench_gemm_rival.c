/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_gemm_rival.c - see bench_gemm_rank.h: the same layers brought as others bring them, each with two windows (k =
 * 1) that are kept as full as it can: a window is filled again as soon as the program reaches the layer after its own.
 *
 *   broadcast     NCCL broadcast of a layer from its source, on a stream and a communicator of its own; all ranks send
 *                 and receive all layers, in step
 *   allgather     the same with NCCL all-gather: every rank has a stripe of each layer
 *   allgather-ce  the same with a communicator that is asked to use copy engines, between symmetric memory
 *   peer-copy     a copy from the source's memory by a stream of the source's device, as frameworks copy between
 *                 devices
 *
 * A rival that cannot be had is refused with the reason, on all ranks alike; one that fails later breaks the run.
 */
#include "bench_gemm_nccl.h"
#include "bench_gemm_rank.h"
#include "gpu_peer.h"

#include <stdlib.h>
#include <string.h>

#define WINDOWS 2u

/* How one rival stands. The n-th transfer goes into window n % WINDOWS. */
struct ring {
	uint32_t *travellers; /* [count] layers that come through windows, ascending */
	uint32_t count;
	uint64_t started;
	uint64_t done; /* with which the program is done */
	bool in_use;   /* number `done` */
	gpu_address windows[WINDOWS];
	gpu_event freed;           /* the program is done with a window; on the device that computes */
	gpu_event events[WINDOWS]; /* its own, on the device that computes */
	gpu_event ready[WINDOWS];  /* of the last transfer into each window */
	bool open;
};

struct gemm_rivals {
	struct nccl nccl;
	nccl_comm comm, comm_ce;
	gpu_stream stream;      /* of NCCL */
	gpu_address stripes;    /* for copy engines: [layers] of this rank's stripe */
	gpu_address ce_windows; /* both */
	nccl_window stripes_window, windows_window;
	struct gpu sources[GEMM_RANKS_MOST]; /* other ranks' devices, in this process */
	gpu_address stacks[GEMM_RANKS_MOST]; /* their layers, opened there */
	gpu_stream source_streams[GEMM_RANKS_MOST];
	gpu_event source_events[GEMM_RANKS_MOST][WINDOWS];
	struct ring rings[GEMM_RIVALS];
};

/* ---- Refusing ------------------------------------------------------------------------------------------------ */

static char *refusal(const struct gemm_rank *self, enum gemm_rival rival)
{
	return self->bench->shared->results[self->rank].refused[rival];
}

static bool refuse_gpu(struct gemm_rank *self, enum gemm_rival rival, const struct gpu *gpu)
{
	snprintf(refusal(self, rival), GEMM_TEXT_BYTES, "%s", gpu->error);
	return false;
}

static bool accept_nccl(struct gemm_rank *self, enum gemm_rival rival, int result, const char *what)
{
	return nccl_checked(&self->rivals->nccl, result, what, refusal(self, rival), GEMM_TEXT_BYTES);
}

static bool is_wanted(const struct gemm_rank *self, enum gemm_rival rival)
{
	return self->bench->options.rivals[rival] && !*gemm_refused(self->bench, rival);
}

/* ---- Rings --------------------------------------------------------------------------------------------------- */

static uint64_t stripe_bytes(const struct gemm_rank *self)
{
	return gemm_layer_bytes(&self->bench->options) / self->bench->options.ranks;
}

static int32_t source_of(const struct gemm_rank *self, uint32_t layer)
{
	return (int32_t)(layer % self->bench->options.ranks);
}

static bool list_travellers(struct gemm_rank *self, enum gemm_rival rival)
{
	const uint32_t layers = self->bench->options.layers;
	struct ring *ring = &self->rivals->rings[rival];

	ring->travellers = calloc(layers, sizeof *ring->travellers);
	for (uint32_t layer = 0; ring->travellers && layer < layers; layer++)
		if (rival != GEMM_PEER_COPY || source_of(self, layer) != self->rank)
			ring->travellers[ring->count++] = layer;
	return ring->travellers != NULL;
}

/* @p windows: 0: its own. */
static bool open_ring(struct gemm_rank *self, enum gemm_rival rival, gpu_address windows)
{
	struct ring *ring = &self->rivals->rings[rival];
	const uint64_t bytes = gemm_layer_bytes(&self->bench->options);

	ring->open = true;
	if (!list_travellers(self, rival)) {
		snprintf(refusal(self, rival), GEMM_TEXT_BYTES, "rank %d: no memory", (int)self->rank);
		return false;
	}
	if (gpu_event_open(&self->gpu, &ring->freed) != LSHARD_OK)
		return refuse_gpu(self, rival, &self->gpu);
	for (uint32_t i = 0; i < WINDOWS; i++) {
		ring->windows[i] = windows ? windows + i * bytes : 0;
		if ((!windows && gpu_allocate(&self->gpu, bytes, &ring->windows[i]) != LSHARD_OK) ||
		    gpu_event_open(&self->gpu, &ring->events[i]) != LSHARD_OK)
			return refuse_gpu(self, rival, &self->gpu);
	}
	return true;
}

static void close_ring(struct gemm_rank *self, enum gemm_rival rival)
{
	struct ring *ring = &self->rivals->rings[rival];

	if (!ring->open)
		return;
	for (uint32_t i = 0; i < WINDOWS; i++) {
		gpu_event_close(&self->gpu, ring->events[i]);
		if (rival != GEMM_GATHER_CE)
			gpu_free(&self->gpu, ring->windows[i]);
	}
	gpu_event_close(&self->gpu, ring->freed);
	free(ring->travellers);
}

/* ---- Transfers ----------------------------------------------------------------------------------------------- */

static bool move_nccl(struct gemm_rank *self, enum gemm_rival rival, uint32_t layer, gpu_address window)
{
	const struct gemm_rivals *rivals = self->rivals;
	const uint64_t bytes = gemm_layer_bytes(&self->bench->options);
	const int32_t source = source_of(self, layer);
	const gpu_address own = gemm_own_layer(self, layer);
	const gpu_address stripe = rival == GEMM_GATHER_CE ? rivals->stripes + layer * stripe_bytes(self)
							   : own + (uint64_t)self->rank * stripe_bytes(self);
	const gpu_address to = rival == GEMM_BROADCAST && source == self->rank ? own : window;
	char why[GEMM_TEXT_BYTES];
	int result;

	if (rival == GEMM_BROADCAST)
		result = rivals->nccl.broadcast((const void *)(uintptr_t)to, (void *)(uintptr_t)to, (size_t)bytes,
						NCCL_BYTES, source, rivals->comm, rivals->stream);
	else
		result = rivals->nccl.gather((const void *)(uintptr_t)stripe, (void *)(uintptr_t)to,
					     (size_t)stripe_bytes(self), NCCL_BYTES,
					     rival == GEMM_GATHER_CE ? rivals->comm_ce : rivals->comm, rivals->stream);
	if (nccl_checked(&rivals->nccl, result, gemm_rival_name(rival), why, sizeof why))
		return true;
	return bench_ranks_fail(&self->bench->shared->ranks, "rank %d: %s", (int)self->rank, why);
}

static bool fail_source(struct gemm_rank *self, const struct gpu *gpu)
{
	return bench_ranks_fail(&self->bench->shared->ranks, "rank %d: %s", (int)self->rank, gpu->error);
}

/* In the context of the device that the layer comes from. */
static bool move_from_source(struct gemm_rank *self, uint32_t layer, struct ring *ring, uint32_t slot)
{
	const int32_t source = source_of(self, layer);
	struct gpu *gpu = &self->rivals->sources[source];
	const uint64_t bytes = gemm_layer_bytes(&self->bench->options);
	const gpu_address from = self->rivals->stacks[source] + layer * bytes;
	const gpu_stream stream = self->rivals->source_streams[source];

	ring->ready[slot] = self->rivals->source_events[source][slot];
	if (gpu_enter(gpu) != LSHARD_OK || gpu_stream_wait(gpu, stream, ring->freed) != LSHARD_OK ||
	    gpu_copy(gpu, ring->windows[slot], from, bytes, stream) != LSHARD_OK ||
	    gpu_event_record(gpu, ring->ready[slot], stream) != LSHARD_OK)
		return fail_source(self, gpu);
	return gpu_enter(&self->gpu) == LSHARD_OK || gemm_fail_gpu(self);
}

static bool start(struct gemm_rank *self, enum gemm_rival rival)
{
	struct ring *ring = &self->rivals->rings[rival];
	const uint32_t layer = ring->travellers[ring->started % ring->count];
	const uint32_t slot = (uint32_t)(ring->started % WINDOWS);

	ring->started++;
	if (rival == GEMM_PEER_COPY)
		return move_from_source(self, layer, ring, slot);
	if (gpu_stream_wait(&self->gpu, self->rivals->stream, ring->freed) != LSHARD_OK)
		return gemm_fail_gpu(self);
	if (!move_nccl(self, rival, layer, ring->windows[slot]))
		return false;
	ring->ready[slot] = ring->events[slot];
	return gpu_event_record(&self->gpu, ring->ready[slot], self->rivals->stream) == LSHARD_OK ||
	       gemm_fail_gpu(self);
}

/* The program has left the layer before. */
static bool advance(struct gemm_rank *self, enum gemm_rival rival)
{
	struct ring *ring = &self->rivals->rings[rival];

	if (ring->in_use) {
		if (gpu_event_record(&self->gpu, ring->freed, self->stream) != LSHARD_OK)
			return gemm_fail_gpu(self);
		ring->in_use = false;
		ring->done++;
	}
	while (ring->count > 0 && ring->started < ring->done + WINDOWS)
		if (!start(self, rival))
			return false;
	return true;
}

bool gemm_rival_bring(struct gemm_rank *self, enum gemm_rival rival, uint32_t layer, gpu_address *down)
{
	struct ring *ring = &self->rivals->rings[rival];
	uint32_t slot;

	if (!advance(self, rival))
		return false;
	slot = (uint32_t)(ring->done % WINDOWS);
	*down = gemm_own_layer(self, layer);
	if (ring->count == 0 || ring->travellers[ring->done % ring->count] != layer)
		return true;
	ring->in_use = true;
	if (rival == GEMM_BROADCAST && source_of(self, layer) == self->rank)
		return true;
	*down = ring->windows[slot];
	return gpu_stream_wait(&self->gpu, self->stream, ring->ready[slot]) == LSHARD_OK || gemm_fail_gpu(self);
}

/* What is on its way when a sample ends is the beginning of the next pass, and is kept. */
bool gemm_rival_rest(struct gemm_rank *self, enum gemm_rival rival)
{
	const struct ring *ring = &self->rivals->rings[rival];

	for (uint32_t i = 0; i < WINDOWS && i < ring->started; i++)
		if (gpu_stream_wait(&self->gpu, self->stream, ring->ready[i]) != LSHARD_OK)
			return gemm_fail_gpu(self);
	return true;
}

/* ---- Opening NCCL -------------------------------------------------------------------------------------------- */

static bool meet(struct gemm_rank *self)
{
	return bench_ranks_meet(&self->bench->shared->ranks, self->rank);
}

static void refuse_nccl(struct gemm_rank *self, const char *why)
{
	for (unsigned rival = 0; rival < GEMM_PEER_COPY; rival++)
		if (!*refusal(self, (enum gemm_rival)rival))
			snprintf(refusal(self, (enum gemm_rival)rival), GEMM_TEXT_BYTES, "%s", why);
}

/* What each rank can tell by itself, so that none waits in NCCL for one that does not come. */
static void load_nccl(struct gemm_rank *self)
{
	struct gemm_shared *shared = self->bench->shared;
	struct nccl *nccl = &self->rivals->nccl;
	char why[GEMM_TEXT_BYTES] = "";

	if (gemm_shares_device(&self->bench->options))
		snprintf(why, sizeof why, "NCCL refuses two ranks on one GPU");
	else if (nccl_load(nccl, why, sizeof why) && self->rank == 0)
		for (unsigned i = 0; i < 2 && !*why; i++)
			(void)nccl_checked(nccl, nccl->make_id((struct nccl_id *)&shared->nccl_ids[i]),
					   "ncclGetUniqueId", why, sizeof why);
	if (*why)
		refuse_nccl(self, why);
	shared->nccl_version = nccl->number;
	if (gemm_layer_bytes(&self->bench->options) % self->bench->options.ranks)
		for (unsigned rival = GEMM_GATHER; rival <= GEMM_GATHER_CE; rival++)
			snprintf(refusal(self, (enum gemm_rival)rival), GEMM_TEXT_BYTES,
				 "a layer does not divide into equal stripes");
	if (!*refusal(self, GEMM_GATHER_CE) &&
	    (nccl->number < NCCL_FIRST_WITH_COPY_ENGINES || !nccl->open_configured || !nccl->window_open))
		snprintf(refusal(self, GEMM_GATHER_CE), GEMM_TEXT_BYTES,
			 "NCCL %d.%d.%d has no copy-engine collectives: 2.28.3 or later is needed",
			 nccl->number / 10000, nccl->number / 100 % 100, nccl->number % 100);
}

static void open_plain(struct gemm_rank *self)
{
	struct gemm_rivals *rivals = self->rivals;
	const int ranks = (int)self->bench->options.ranks;
	struct nccl_id id;
	char why[GEMM_TEXT_BYTES];

	if (!is_wanted(self, GEMM_BROADCAST) && !is_wanted(self, GEMM_GATHER))
		return;
	memcpy(&id, self->bench->shared->nccl_ids[0], sizeof id);
	if (!nccl_checked(&rivals->nccl, rivals->nccl.open(&rivals->comm, ranks, id, (int)self->rank),
			  "ncclCommInitRank", why, sizeof why)) {
		refuse_nccl(self, why);
		return;
	}
	if (is_wanted(self, GEMM_BROADCAST))
		(void)open_ring(self, GEMM_BROADCAST, 0);
	if (is_wanted(self, GEMM_GATHER))
		(void)open_ring(self, GEMM_GATHER, 0);
}

/* NCCL gives no window, and no error, where it cannot have symmetric memory: then it would not use copy engines. */
static bool allocate_symmetric(struct gemm_rank *self, uint64_t bytes, gpu_address *address, nccl_window *window)
{
	struct gemm_rivals *rivals = self->rivals;
	void *memory = NULL;

	if (!accept_nccl(self, GEMM_GATHER_CE, rivals->nccl.allocate(&memory, (size_t)bytes), "ncclMemAlloc"))
		return false;
	*address = (uintptr_t)memory;
	if (!accept_nccl(self, GEMM_GATHER_CE,
			 rivals->nccl.window_open(rivals->comm_ce, memory, (size_t)bytes, window, NCCL_SYMMETRIC),
			 "ncclCommWindowRegister"))
		return false;
	if (!*window)
		snprintf(refusal(self, GEMM_GATHER_CE), GEMM_TEXT_BYTES, "NCCL has no symmetric memory here");
	return *window != NULL;
}

static bool fill_stripes(struct gemm_rank *self)
{
	const uint64_t bytes = stripe_bytes(self);

	for (uint32_t layer = 0; layer < self->bench->options.layers; layer++)
		if (gpu_copy_now(&self->gpu, self->rivals->stripes + layer * bytes,
				 gemm_own_layer(self, layer) + (uint64_t)self->rank * bytes, bytes,
				 self->stream) != LSHARD_OK)
			return refuse_gpu(self, GEMM_GATHER_CE, &self->gpu);
	return true;
}

static bool open_copy_engines(struct gemm_rank *self)
{
	struct gemm_rivals *rivals = self->rivals;
	const struct gemm_options *options = &self->bench->options;
	struct nccl_config config = nccl_copy_engine_config();
	struct nccl_id id;

	if (!is_wanted(self, GEMM_GATHER_CE))
		return false;
	memcpy(&id, self->bench->shared->nccl_ids[1], sizeof id);
	if (!accept_nccl(
		    self, GEMM_GATHER_CE,
		    rivals->nccl.open_configured(&rivals->comm_ce, (int)options->ranks, id, (int)self->rank, &config),
		    "ncclCommInitRankConfig"))
		return false;
	return allocate_symmetric(self, stripe_bytes(self) * options->layers, &rivals->stripes,
				  &rivals->stripes_window) &&
	       allocate_symmetric(self, gemm_layer_bytes(options) * WINDOWS, &rivals->ce_windows,
				  &rivals->windows_window) &&
	       fill_stripes(self) && open_ring(self, GEMM_GATHER_CE, rivals->ce_windows);
}

static void close_copy_engines(struct gemm_rivals *rivals)
{
	if (rivals->windows_window)
		rivals->nccl.window_close(rivals->comm_ce, rivals->windows_window);
	if (rivals->stripes_window)
		rivals->nccl.window_close(rivals->comm_ce, rivals->stripes_window);
	if (rivals->ce_windows)
		rivals->nccl.free((void *)(uintptr_t)rivals->ce_windows);
	if (rivals->stripes)
		rivals->nccl.free((void *)(uintptr_t)rivals->stripes);
	if (rivals->comm_ce)
		rivals->nccl.close(rivals->comm_ce);
}

/* ---- Opening the others' memory where it lies ---------------------------------------------------------------- */

static bool open_source(struct gemm_rank *self, int32_t rank)
{
	struct gemm_rivals *rivals = self->rivals;
	struct gpu *gpu = &rivals->sources[rank];
	struct gpu_ipc handle;

	memcpy(&handle, self->bench->shared->ipc_handles[rank], sizeof handle);
	if (gpu_open(gpu, (int)self->bench->options.devices[rank]) != LSHARD_OK ||
	    gpu_peer_allow(gpu, &self->gpu) != LSHARD_OK ||
	    gpu_ipc_open(gpu, &handle, &rivals->stacks[rank]) != LSHARD_OK ||
	    gpu_stream_open(gpu, true, &rivals->source_streams[rank]) != LSHARD_OK)
		return refuse_gpu(self, GEMM_PEER_COPY, gpu);
	for (uint32_t i = 0; i < WINDOWS; i++)
		if (gpu_event_open(gpu, &rivals->source_events[rank][i]) != LSHARD_OK)
			return refuse_gpu(self, GEMM_PEER_COPY, gpu);
	return true;
}

static bool open_sources(struct gemm_rank *self)
{
	const int32_t ranks = (int32_t)self->bench->options.ranks;

	for (int32_t rank = 0; rank < ranks; rank++)
		if (rank != self->rank && !open_source(self, rank))
			return false;
	if (gpu_enter(&self->gpu) != LSHARD_OK)
		return refuse_gpu(self, GEMM_PEER_COPY, &self->gpu);
	return open_ring(self, GEMM_PEER_COPY, 0);
}

static void close_sources(struct gemm_rank *self)
{
	struct gemm_rivals *rivals = self->rivals;

	for (uint32_t rank = 0; rank < self->bench->options.ranks; rank++) {
		struct gpu *gpu = &rivals->sources[rank];

		if (!gpu->driver || gpu_enter(gpu) != LSHARD_OK)
			continue;
		for (uint32_t i = 0; i < WINDOWS; i++)
			gpu_event_close(gpu, rivals->source_events[rank][i]);
		gpu_stream_close(gpu, rivals->source_streams[rank]);
		gpu_ipc_close(gpu, rivals->stacks[rank]);
		gpu_close(gpu);
	}
	(void)gpu_enter(&self->gpu);
}

/* ---- All of them --------------------------------------------------------------------------------------------- */

static bool is_nccl_wanted(const struct gemm_options *options)
{
	return options->rivals[GEMM_BROADCAST] || options->rivals[GEMM_GATHER] || options->rivals[GEMM_GATHER_CE];
}

static void look_around(struct gemm_rank *self)
{
	struct gpu_ipc handle;

	if (is_nccl_wanted(&self->bench->options))
		load_nccl(self);
	if (!self->bench->options.rivals[GEMM_PEER_COPY])
		return;
	if (gpu_ipc_export(&self->gpu, self->down, &handle) == LSHARD_OK)
		memcpy(self->bench->shared->ipc_handles[self->rank], &handle, sizeof handle);
	else
		(void)refuse_gpu(self, GEMM_PEER_COPY, &self->gpu);
}

/* Ranks that have not opened the same rivals would wait for each other: after each step they see what all have. */
bool gemm_rivals_open(struct gemm_rank *self)
{
	const struct gemm_options *options = &self->bench->options;

	if (!is_nccl_wanted(options) && !options->rivals[GEMM_PEER_COPY])
		return true;
	self->rivals = calloc(1, sizeof *self->rivals);
	if (!self->rivals)
		return bench_ranks_fail(&self->bench->shared->ranks, "rank %d: no memory for rivals", (int)self->rank);
	if (gpu_stream_open(&self->gpu, true, &self->rivals->stream) != LSHARD_OK)
		return gemm_fail_gpu(self);
	look_around(self);
	if (!meet(self))
		return false;
	open_plain(self);
	if (!meet(self))
		return false;
	(void)open_copy_engines(self);
	if (!meet(self))
		return false;
	if (is_wanted(self, GEMM_PEER_COPY))
		(void)open_sources(self);
	(void)gpu_enter(&self->gpu);
	return meet(self);
}

void gemm_rivals_close(struct gemm_rank *self)
{
	struct gemm_rivals *rivals = self->rivals;

	if (!rivals)
		return;
	for (unsigned rival = 0; rival < GEMM_RIVALS; rival++)
		close_ring(self, (enum gemm_rival)rival);
	close_sources(self);
	close_copy_engines(rivals);
	if (rivals->comm)
		rivals->nccl.close(rivals->comm);
	nccl_unload(&rivals->nccl);
	gpu_stream_close(&self->gpu, rivals->stream);
	free(rivals);
	self->rivals = NULL;
	(void)meet(self); /* before any rank frees what others have opened */
}
