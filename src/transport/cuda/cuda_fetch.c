/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_fetch.c - which copies make up a fetch, in which order, and how they are enqueued. Knows pieces, shards and
 * buffers; knows nothing of what comes before or after them on a stream.
 *
 * A layer from one source is one copy: the fewer, the faster. From several, each reader begins with another source and
 * takes slices of all in turn, so that a source is asked by few at once and none waits for the one that all ask.
 *
 * What is copied for a layer and where to never changes, so it is recorded as a graph when the store is opened: to
 * launch that takes the processor less than half as long as to enqueue one copy. Inside captures, and where the driver
 * refuses a graph, the copies are enqueued themselves.
 */
#include "cuda_transport.h"

#define SLICE_BYTES ((uint64_t)16 << 20) /* a plain copy of this size reaches nine tenths of the link's speed */

/* A part of a piece: bytes if it lies in one run on both sides, else rows. */
struct cuda_slice {
	uint32_t piece;
	uint64_t begin;
	uint64_t count;
	struct cuda_charge charge; /* bytes 0: free */
};

struct cuda_fetches {
	struct cuda_slice *slices;
	uint32_t *first_slice;   /* [layers + 1] */
	cuda_graph_exec *graphs; /* [layers], NULL: enqueue the copies */
};

static struct cuda *cuda_of(const struct cuda_store *store)
{
	return (struct cuda *)store->base.transport;
}

/* ---- slices ---- */

static int is_one_run(const lshard_piece *piece)
{
	return piece->rows == 1 || (piece->layer_pitch == piece->width && piece->shard_pitch == piece->width);
}

/* Bytes or rows. */
static uint64_t units_of(const lshard_piece *piece)
{
	return is_one_run(piece) ? piece->width * piece->rows : piece->rows;
}

static uint64_t unit_bytes(const lshard_piece *piece)
{
	return is_one_run(piece) ? 1 : piece->width;
}

/* Units of @p piece that are copied in one go. */
static uint64_t slice_units(const struct cuda_store *store, const lshard_piece *piece, uint32_t sources)
{
	const struct cuda *cuda = cuda_of(store);
	uint64_t bytes = sources > 1 ? SLICE_BYTES : UINT64_MAX;

	if (piece->rank == cuda->base.context->rank)
		return units_of(piece);
	if (cuda->pace && cuda_pace_slice(cuda->pace) < bytes)
		bytes = cuda_pace_slice(cuda->pace);
	return bytes > unit_bytes(piece) ? bytes / unit_bytes(piece) : 1;
}

/* Other ranks with pieces of a layer. Pieces lie in the order of their ranks. */
static uint32_t count_sources(const struct cuda_store *store, uint32_t position)
{
	const lshard_store_plan *plan = store->base.plan;
	const uint32_t end = plan->first_piece[position + 1];
	const int32_t rank = cuda_of(store)->base.context->rank;
	uint32_t sources = 0;

	for (uint32_t i = plan->first_piece[position]; i < end; i++)
		sources += plan->pieces[i].rank != rank &&
			   (i == plan->first_piece[position] || plan->pieces[i].rank != plan->pieces[i - 1].rank);
	return sources;
}

/* Where in the layer's pieces those of a source are, and how far they are cut. */
struct cursor {
	uint32_t piece;
	uint32_t end;
	uint64_t begin; /* in the piece */
};

static struct cursor cursor_of(const lshard_store_plan *plan, uint32_t position, int32_t rank)
{
	struct cursor cursor = {plan->first_piece[position], plan->first_piece[position + 1], 0};

	while (cursor.piece < cursor.end && plan->pieces[cursor.piece].rank != rank)
		cursor.piece++;
	for (uint32_t end = cursor.piece; end < cursor.end; end++)
		if (plan->pieces[end].rank != rank)
			cursor.end = end;
	return cursor;
}

/* Cuts the next slice; only counts it where @p slice is NULL. */
static void cut_slice(const struct cuda_store *store, struct cursor *cursor, uint32_t sources, struct cuda_slice *slice)
{
	const struct cuda *cuda = cuda_of(store);
	const lshard_piece *piece = &store->base.plan->pieces[cursor->piece];
	const uint64_t most = slice_units(store, piece, sources);
	const uint64_t left = units_of(piece) - cursor->begin;
	const uint64_t count = left < most ? left : most;
	const int free_of_charge = !cuda->pace || piece->rank == cuda->base.context->rank;

	if (slice)
		*slice = (struct cuda_slice){cursor->piece,
					     cursor->begin,
					     count,
					     {cuda->pace, free_of_charge ? 0 : count * unit_bytes(piece)}};
	cursor->begin += count;
	if (count == left) {
		cursor->piece++;
		cursor->begin = 0;
	}
}

/* A slice of each source in turn, the own pieces last. Returns how many there are; @p slices NULL: only that. */
static uint32_t cut_layer(const struct cuda_store *store, uint32_t position, struct cursor *cursors,
			  struct cuda_slice *slices)
{
	const lshard_context *context = cuda_of(store)->base.context;
	const uint32_t sources = count_sources(store, position);
	uint32_t count = 0;
	int cut = 1;

	for (int32_t i = 0; i < context->size; i++)
		cursors[i] = cursor_of(store->base.plan, position, (context->rank + 1 + i) % context->size);
	while (cut) {
		cut = 0;
		for (int32_t i = 0; i < context->size; i++) {
			if (cursors[i].piece == cursors[i].end)
				continue;
			cut_slice(store, &cursors[i], sources, slices ? &slices[count] : NULL);
			count++;
			cut = 1;
		}
	}
	return count;
}

static lshard_status cut_layers(struct cuda_store *store, struct cuda_fetches *fetches, struct cursor *cursors)
{
	const lshard_context *context = cuda_of(store)->base.context;
	const uint32_t layers = store->base.plan->layers;

	for (uint32_t position = 0; position < layers; position++)
		fetches->first_slice[position + 1] =
			fetches->first_slice[position] + cut_layer(store, position, cursors, NULL);
	fetches->slices = context->allocate(context, (size_t)fetches->first_slice[layers] * sizeof *fetches->slices);
	if (!fetches->slices)
		return LSHARD_ERR_NO_MEMORY;
	for (uint32_t position = 0; position < layers; position++)
		cut_layer(store, position, cursors, &fetches->slices[fetches->first_slice[position]]);
	return LSHARD_OK;
}

/* ---- copies ---- */

cuda_result cuda_copy_rows(struct cuda *cuda, cuda_stream stream, const struct cuda_rows *rows)
{
	const struct cuda_copy_2d copy = {.from_kind = CUDA_KIND_UNIFIED,
					  .from = rows->from,
					  .from_pitch = (size_t)rows->from_pitch,
					  .to_kind = CUDA_KIND_UNIFIED,
					  .to = rows->to,
					  .to_pitch = (size_t)rows->to_pitch,
					  .width = (size_t)rows->width,
					  .rows = (size_t)rows->rows};

	if (rows->rows == 1 || (rows->to_pitch == rows->width && rows->from_pitch == rows->width))
		return cuda->driver.copy(rows->to, rows->from, (size_t)(rows->width * rows->rows), stream);
	return cuda->driver.copy_2d(&copy, stream);
}

static cuda_result copy_slice(struct cuda_store *store, cuda_stream stream, const struct cuda_slice *slice,
			      const lshard_piece *piece, cuda_address to)
{
	const int one_run = is_one_run(piece);
	const struct cuda_rows rows = {.to = to + piece->layer_offset +
					     slice->begin * (one_run ? 1 : piece->layer_pitch),
				       .to_pitch = piece->layer_pitch,
				       .from = store->shards[piece->rank].address + piece->shard_offset +
					       slice->begin * (one_run ? 1 : piece->shard_pitch),
				       .from_pitch = piece->shard_pitch,
				       .width = one_run ? slice->count : piece->width,
				       .rows = one_run ? 1 : slice->count};

	return cuda_copy_rows(cuda_of(store), stream, &rows);
}

cuda_result cuda_copy_layer(struct cuda_store *store, cuda_stream stream, uint32_t position, cuda_address to, int paced)
{
	const struct cuda_driver *driver = &cuda_of(store)->driver;
	const struct cuda_fetches *fetches = store->fetches;
	const uint32_t end = fetches->first_slice[position + 1];
	cuda_result result = CUDA_OK;

	for (uint32_t i = fetches->first_slice[position]; i < end && result == CUDA_OK; i++) {
		struct cuda_slice *slice = &fetches->slices[i];
		const lshard_piece *piece = &store->base.plan->pieces[slice->piece];

		if (cuda_in_place(store, piece, to))
			continue;
		if (paced && slice->charge.bytes)
			result = driver->host_function(stream, cuda_pace_wait, &slice->charge);
		if (result == CUDA_OK)
			result = copy_slice(store, stream, slice, piece, to);
	}
	return result;
}

/* ---- graphs ---- */

/* Residents come once, when the series is committed, and by another way. */
static int comes_into_window(const lshard_store_plan *plan, uint32_t position)
{
	return plan->buffer_of && plan->buffer_of[position] < plan->windows;
}

static cuda_result record_fetch(struct cuda_store *store, uint32_t position, cuda_graph_exec *exec)
{
	const struct cuda_driver *driver = &cuda_of(store)->driver;
	const cuda_address to = cuda_buffer_address(store, store->base.plan->buffer_of[position], position);
	cuda_graph graph = NULL;
	cuda_result result = driver->capture_begin(store->copies, CUDA_CAPTURE_RELAXED);
	cuda_result ended;

	if (result != CUDA_OK)
		return result;
	result = cuda_copy_layer(store, store->copies, position, to, 1);
	ended = driver->capture_end(store->copies, &graph);
	result = result == CUDA_OK ? ended : result;
	if (result == CUDA_OK)
		result = driver->graph_instantiate(exec, graph, 0);
	if (graph)
		driver->graph_destroy(graph);
	/* Else the first launch would do it, in a pass. */
	return result == CUDA_OK ? driver->graph_upload(*exec, store->copies) : result;
}

static void record_fetches(struct cuda_store *store)
{
	const lshard_store_plan *plan = store->base.plan;
	const lshard_context *context = cuda_of(store)->base.context;
	lshard_error error = {{0}};
	cuda_result result = CUDA_OK;

	for (uint32_t position = 0; position < plan->layers && result == CUDA_OK; position++)
		if (comes_into_window(plan, position))
			result = record_fetch(store, position, &store->fetches->graphs[position]);
	if (result == CUDA_OK)
		return;
	cuda_failed(&cuda_of(store)->driver, &error, result, "recording a copy");
	context->log(context, LSHARD_LOG_INFO,
		     "rank %d, series '%s': copies are enqueued one by one, which takes the processor longer: %s",
		     (int)context->rank, plan->name, error.text);
}

cuda_result cuda_enqueue_fetch(struct cuda_store *store, uint32_t position, uint32_t buffer)
{
	const cuda_graph_exec exec = store->fetches->graphs[position];

	if (exec && buffer == store->base.plan->buffer_of[position])
		return cuda_of(store)->driver.graph_launch(exec, store->copies);
	return cuda_copy_layer(store, store->copies, position, cuda_buffer_address(store, buffer, position), 1);
}

/* ---- opening and closing ---- */

lshard_status cuda_fetches_open(struct cuda_store *store, lshard_error *error)
{
	const lshard_store_plan *plan = store->base.plan;
	const lshard_context *context = cuda_of(store)->base.context;
	struct cursor *cursors = context->allocate(context, (size_t)context->size * sizeof *cursors);
	struct cuda_fetches *fetches = context->allocate(context, sizeof *fetches);
	lshard_status status = LSHARD_ERR_NO_MEMORY;

	store->fetches = fetches;
	if (fetches) {
		fetches->first_slice = context->allocate(context, ((size_t)plan->layers + 1) * sizeof(uint32_t));
		fetches->graphs = context->allocate(context, plan->layers * sizeof *fetches->graphs);
		if (cursors && fetches->first_slice && fetches->graphs)
			status = cut_layers(store, fetches, cursors);
	}
	if (cursors)
		context->release(context, cursors);
	if (status != LSHARD_OK)
		return lshard_fail(error, status, "series '%s': no memory for the copies of %u layers", plan->name,
				   (unsigned)plan->layers);
	record_fetches(store);
	return LSHARD_OK;
}

void cuda_fetches_close(struct cuda_store *store)
{
	const lshard_context *context = cuda_of(store)->base.context;
	const lshard_store_plan *plan = store->base.plan;
	struct cuda_fetches *fetches = store->fetches;

	if (!fetches)
		return;
	for (uint32_t i = 0; fetches->graphs && i < plan->layers; i++)
		if (fetches->graphs[i] && !context->forked(context))
			cuda_of(store)->driver.graph_exec_destroy(fetches->graphs[i]);
	if (fetches->graphs)
		context->release(context, fetches->graphs);
	if (fetches->slices && !(store->unsettled && cuda_of(store)->pace)) /* a charge may still be made */
		context->release(context, fetches->slices);
	if (fetches->first_slice)
		context->release(context, fetches->first_slice);
	context->release(context, fetches);
	store->fetches = NULL;
}
