/* SPDX-License-Identifier: Apache-2.0
 *
 * layout.c - packs tensors into a layer and divides layers among ranks. See layout.h.
 */
#include "layout.h"

#include <string.h>

#define MAX_ALIGNMENT    4096u
#define MAX_LAYERS       (UINT32_C(1) << 20)
#define MAX_TENSORS      4096u
#define MAX_LAYER_BYTES  (UINT64_C(1) << 44)
#define MAX_SERIES_BYTES (UINT64_C(1) << 62)
#define MAX_GRANULE      (UINT64_C(1) << 30)

static uint64_t round_up(uint64_t value, uint64_t unit)
{
	return (value + unit - 1) / unit * unit;
}

static uint64_t larger(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

/* ---- Checking what the caller described ---- */

static lshard_status check_name(const char *what, const char *name, lshard_error *error)
{
	if (!name || !*name)
		return lshard_fail(error, LSHARD_ERR_INVALID, "a %s needs a name", what);
	if (strlen(name) > 63)
		return lshard_fail(error, LSHARD_ERR_INVALID, "the name of %s '%.20s...' has more than 63 characters",
				   what, name);
	return LSHARD_OK;
}

static lshard_status check_stripe(const lshard_tensor *tensor, lshard_error *error)
{
	const int has_rows = tensor->stripe == LSHARD_STRIPE_ROWS || tensor->stripe == LSHARD_STRIPE_COLUMNS;

	if (tensor->stripe != LSHARD_STRIPE_BYTES && !has_rows)
		return lshard_fail(error, LSHARD_ERR_INVALID, "tensor '%s': unknown stripe %d", tensor->name,
				   (int)tensor->stripe);
	if (has_rows && (tensor->rows == 0 || tensor->bytes % tensor->rows))
		return lshard_fail(error, LSHARD_ERR_INVALID, "tensor '%s': %llu rows do not divide %llu bytes",
				   tensor->name, (unsigned long long)tensor->rows, (unsigned long long)tensor->bytes);
	if (tensor->stripe == LSHARD_STRIPE_COLUMNS &&
	    (tensor->column_bytes == 0 || tensor->bytes / tensor->rows % tensor->column_bytes))
		return lshard_fail(error, LSHARD_ERR_INVALID,
				   "tensor '%s': columns of %u bytes do not divide rows of %llu bytes", tensor->name,
				   tensor->column_bytes, (unsigned long long)(tensor->bytes / tensor->rows));
	return LSHARD_OK;
}

static lshard_status check_tensor(const lshard_series_options *options, uint32_t index, lshard_error *error)
{
	lshard_status status = options_check_tensor(options, index, error);
	lshard_tensor tensor;

	if (status < 0)
		return status;
	tensor = options_tensor(options, index);
	status = check_name("tensor", tensor.name, error);
	if (status < 0)
		return status;
	for (uint32_t other = 0; other < index; other++)
		if (strcmp(options_tensor(options, other).name, tensor.name) == 0)
			return lshard_fail(error, LSHARD_ERR_INVALID, "two tensors are named '%s'", tensor.name);
	if (tensor.bytes == 0 || tensor.bytes > MAX_LAYER_BYTES)
		return lshard_fail(error, LSHARD_ERR_INVALID, "tensor '%s': %llu bytes is not in 1..2^44", tensor.name,
				   (unsigned long long)tensor.bytes);
	if (tensor.alignment > MAX_ALIGNMENT || (tensor.alignment & (tensor.alignment - 1)))
		return lshard_fail(error, LSHARD_ERR_INVALID, "tensor '%s': alignment %u is no power of two up to %u",
				   tensor.name, tensor.alignment, MAX_ALIGNMENT);
	return check_stripe(&tensor, error);
}

static lshard_status check_options(const lshard_series_options *options, lshard_error *error)
{
	lshard_status status = check_name("series", options->name, error);

	if (status < 0)
		return status;
	if (options->layer_count == 0 || options->layer_count > MAX_LAYERS ||
	    options->first_layer > UINT32_MAX - (options->layer_count - 1))
		return lshard_fail(error, LSHARD_ERR_INVALID,
				   "series '%s': layers [%u, %u + %u): the count must be in 1..%u", options->name,
				   options->first_layer, options->first_layer, options->layer_count, MAX_LAYERS);
	if (options->placement != LSHARD_WHOLE && options->placement != LSHARD_STRIPED)
		return lshard_fail(error, LSHARD_ERR_INVALID, "series '%s': unknown placement %d", options->name,
				   (int)options->placement);
	if (!options->tensors || options->tensor_count == 0 || options->tensor_count > MAX_TENSORS)
		return lshard_fail(error, LSHARD_ERR_INVALID, "series '%s': %u tensors; 1..%u are possible",
				   options->name, options->tensor_count, MAX_TENSORS);
	for (uint32_t index = 0; index < options->tensor_count && status >= 0; index++)
		status = check_tensor(options, index, error);
	return status;
}

/* ---- Packing a layer ---- */

static bool has_stripes(const struct layout *layout)
{
	for (uint32_t index = 0; index < layout->n_tensors; index++)
		if (layout->tensors[index].stripe != LSHARD_STRIPE_BYTES)
			return true;
	return false;
}

/* Do the stripes of a tensor that begins at a granule end at granules? Where anything will do, none may be empty. */
static bool can_be_granular(const struct layout *layout, const lshard_tensor *tensor)
{
	const uint64_t size = (uint32_t)layout->size;
	uint64_t row_bytes;

	if (layout->placement != LSHARD_STRIPED || layout->granule <= LAYOUT_ALIGNMENT)
		return false;
	if (tensor->stripe == LSHARD_STRIPE_BYTES)
		return tensor->bytes % layout->granule == 0 && tensor->bytes / layout->granule >= size;
	if (tensor->stripe != LSHARD_STRIPE_ROWS)
		return false;
	row_bytes = tensor->bytes / tensor->rows;
	return row_bytes % layout->granule == 0 ||
	       (tensor->rows % size == 0 && tensor->bytes / size % layout->granule == 0);
}

static void describe_tensors(struct layout *layout, const lshard_series_options *options)
{
	for (uint32_t index = 0; index < options->tensor_count; index++) {
		const lshard_tensor from = options_tensor(options, index);
		struct layout_tensor *tensor = &layout->tensors[index];

		strcpy(tensor->name, from.name);
		tensor->bytes = from.bytes;
		tensor->stripe = from.stripe;
		layout->alignment = larger(layout->alignment, larger(from.alignment, LAYOUT_ALIGNMENT));
		tensor->rows = from.stripe == LSHARD_STRIPE_BYTES ? 0 : from.rows;
		tensor->column_bytes = from.stripe == LSHARD_STRIPE_COLUMNS ? from.column_bytes : 0;
	}
	for (uint32_t index = 0; index < options->tensor_count && has_stripes(layout); index++) {
		const lshard_tensor from = options_tensor(options, index);

		layout->tensors[index].granular = can_be_granular(layout, &from);
	}
}

/*
 * Puts the tensors one behind the other, those first that are cut at granules, so that what is lost to granules is
 * less than one; returns the bytes used and the largest alignment met.
 */
static uint64_t pack_tensors(struct layout *layout, const lshard_series_options *options, uint64_t *alignment)
{
	uint64_t offset = 0;

	*alignment = LAYOUT_ALIGNMENT;
	for (uint32_t turn = 0; turn < 2 * options->tensor_count; turn++) {
		const uint32_t index = turn % options->tensor_count;
		struct layout_tensor *tensor = &layout->tensors[index];
		const uint64_t own = larger(options_tensor(options, index).alignment,
					    tensor->granular ? layout->granule : LAYOUT_ALIGNMENT);

		if (tensor->granular != (turn < options->tensor_count))
			continue;
		tensor->offset = round_up(offset, own);
		offset = tensor->offset + tensor->bytes;
		*alignment = larger(*alignment, own);
	}
	return offset;
}

/* ---- Dividing it ---- */

int32_t layout_source(const struct layout *layout, uint32_t position)
{
	return (int32_t)(((uint64_t)layout->first_layer + position) % (uint32_t)layout->size);
}

/* Begin of part `part` of `count` things divided into n parts. */
static uint64_t part_begin(uint64_t count, int32_t part, int32_t n)
{
	return count / (uint64_t)n * (uint64_t)part + count % (uint64_t)n * (uint64_t)part / (uint64_t)n;
}

/* [begin, end) of the range of `rank` among bytes cut at multiples of `unit`. */
static void cut(uint64_t bytes, uint64_t unit, int32_t rank, int32_t n, uint64_t *begin, uint64_t *end)
{
	const uint64_t units = (bytes + unit - 1) / unit;

	*begin = part_begin(units, rank, n) * unit;
	*end = part_begin(units, rank + 1, n) * unit;
	if (*begin > bytes)
		*begin = bytes;
	if (*end > bytes)
		*end = bytes;
}

static lshard_piece whole(int32_t rank, uint64_t layer_offset, uint64_t bytes)
{
	return (lshard_piece){.rank = rank,
			      .layer_offset = layer_offset,
			      .width = bytes,
			      .rows = 1,
			      .shard_pitch = bytes,
			      .layer_pitch = bytes};
}

/* What `rank` keeps of one tensor; width 0 when nothing. */
static lshard_piece stripe_of(const struct layout *layout, const struct layout_tensor *tensor, int32_t rank)
{
	const int32_t n = layout->size;
	const uint64_t row_bytes = tensor->rows ? tensor->bytes / tensor->rows : 0;
	uint64_t begin, end;
	lshard_piece piece;

	switch (tensor->stripe) {
	case LSHARD_STRIPE_ROWS:
		begin = part_begin(tensor->rows, rank, n) * row_bytes;
		end = part_begin(tensor->rows, rank + 1, n) * row_bytes;
		return whole(rank, tensor->offset + begin, end - begin);
	case LSHARD_STRIPE_COLUMNS:
		begin = part_begin(row_bytes / tensor->column_bytes, rank, n) * tensor->column_bytes;
		end = part_begin(row_bytes / tensor->column_bytes, rank + 1, n) * tensor->column_bytes;
		piece = whole(rank, tensor->offset + begin, end - begin);
		piece.rows = tensor->rows;
		piece.layer_pitch = row_bytes;
		return piece;
	default:
		cut(tensor->bytes, tensor->granular ? layout->granule : LAYOUT_ALIGNMENT, rank, n, &begin, &end);
		return whole(rank, tensor->offset + begin, end - begin);
	}
}

/*
 * What a rank keeps of a layer: first what is cut at granules, then the rest. In a shard the former parts of all layers
 * come first, so that only the shard's end is no whole granule.
 */
struct stripe_bytes {
	uint64_t granular;
	uint64_t rest;
};

/* The next piece of a rank in the order of its shard. */
static void add_piece(struct layout *layout, uint32_t *count, lshard_piece piece, struct stripe_bytes *used)
{
	uint64_t *end = piece.granular ? &used->granular : &used->rest;

	if (piece.width == 0 || piece.rows == 0)
		return;
	piece.shard_offset = round_up(*end, LAYOUT_ALIGNMENT);
	*end = piece.shard_offset + piece.width * piece.rows;
	layout->pieces[(*count)++] = piece;
}

/*
 * The pieces of the first layer, shard offsets counted from the place of the layer's granular part or its rest in each
 * shard. Tensors that are cut where anything will do are cut as one, at granules, so that the ranks' pages can be put
 * together; a stripe dimension cuts each tensor for itself.
 */
static uint32_t cut_layer(struct layout *layout, struct stripe_bytes *bytes)
{
	const uint64_t unit = larger(layout->granule, LAYOUT_ALIGNMENT);
	const bool by_tensor = has_stripes(layout);
	uint32_t count = 0;

	for (int32_t rank = 0; rank < layout->size; rank++) {
		struct stripe_bytes used = {0, 0};

		for (uint32_t index = 0; index < (by_tensor ? layout->n_tensors : 1); index++) {
			lshard_piece piece;
			uint64_t begin, end;

			if (by_tensor) {
				piece = stripe_of(layout, &layout->tensors[index], rank);
				piece.granular = layout->tensors[index].granular;
			} else {
				cut(layout->layer_bytes, unit, rank, layout->size, &begin, &end);
				piece = whole(rank, begin, end - begin);
				piece.granular = layout->granule > LAYOUT_ALIGNMENT;
			}
			add_piece(layout, &count, piece, &used);
		}
		bytes[rank] = (struct stripe_bytes){used.granular, round_up(used.rest, LAYOUT_ALIGNMENT)};
	}
	return count;
}

static bool piece_is_composable(const struct layout *layout, const lshard_piece *piece)
{
	return piece->rows == 1 && (piece->width | piece->layer_offset | piece->shard_offset) % layout->granule == 0;
}

/* STRIPED: every layer has the pieces of the first one, further on in each shard. */
static void repeat_pieces(struct layout *layout, uint32_t per_layer, const struct stripe_bytes *bytes)
{
	const uint32_t layers = layout->layers;

	for (uint32_t index = 0; index < per_layer; index++) {
		const lshard_piece first = layout->pieces[index];
		const struct stripe_bytes *of = &bytes[first.rank];

		for (uint32_t position = 0; position < layers; position++) {
			lshard_piece *piece = &layout->pieces[position * per_layer + index];

			*piece = first;
			piece->shard_offset +=
				first.granular ? position * of->granular : layers * of->granular + position * of->rest;
		}
	}
	for (uint32_t position = 0; position <= layers; position++)
		layout->first_piece[position] = position * per_layer;
	for (int32_t rank = 0; rank < layout->size; rank++)
		layout->shard_bytes_of[rank] = layers * (bytes[rank].granular + bytes[rank].rest);
	layout->composable = true;
	for (uint32_t index = 0; index < layers * per_layer && layout->composable; index++)
		layout->composable = piece_is_composable(layout, &layout->pieces[index]);
}

static lshard_status stripe_layers(struct layout *layout, const struct layout_memory *memory)
{
	struct stripe_bytes *bytes = memory->allocate(memory->user, (size_t)layout->size * sizeof *bytes);

	if (!bytes)
		return LSHARD_ERR_NO_MEMORY;
	repeat_pieces(layout, cut_layer(layout, bytes), bytes);
	memory->release(memory->user, bytes);
	return LSHARD_OK;
}

/* WHOLE: layer after layer in its source's shard. */
static void own_layers(struct layout *layout)
{
	layout->composable = true;
	for (uint32_t position = 0; position < layout->layers; position++) {
		const int32_t rank = layout_source(layout, position);

		layout->pieces[position] = whole(rank, 0, layout->layer_bytes);
		layout->pieces[position].shard_offset = layout->shard_bytes_of[rank];
		layout->first_piece[position] = position;
		layout->shard_bytes_of[rank] += layout->layer_bytes;
	}
	layout->first_piece[layout->layers] = layout->layers;
}

const lshard_piece *layout_stripe(const struct layout *layout, uint32_t position, uint32_t tensor, int32_t rank)
{
	const struct layout_tensor *of = &layout->tensors[tensor];

	for (uint32_t index = layout->first_piece[position]; index < layout->first_piece[position + 1]; index++) {
		const lshard_piece *piece = &layout->pieces[index];

		if (piece->rank == rank && piece->layer_offset >= of->offset &&
		    piece->layer_offset < of->offset + of->bytes)
			return piece;
	}
	return NULL;
}

/* ---- Together ---- */

static uint64_t most_pieces(const struct layout *layout)
{
	if (layout->placement == LSHARD_WHOLE)
		return layout->layers;
	return (uint64_t)layout->layers * (uint32_t)layout->size * (has_stripes(layout) ? layout->n_tensors : 1);
}

static lshard_status allocate_tables(struct layout *layout, const struct layout_memory *memory)
{
	const uint64_t pieces = most_pieces(layout);

	if (pieces > UINT32_MAX)
		return LSHARD_ERR_NO_MEMORY;
	layout->shard_bytes_of = memory->allocate(memory->user, (size_t)layout->size * sizeof(uint64_t));
	layout->first_piece = memory->allocate(memory->user, ((size_t)layout->layers + 1) * sizeof(uint32_t));
	layout->pieces = memory->allocate(memory->user, (size_t)pieces * sizeof(lshard_piece));
	return layout->shard_bytes_of && layout->first_piece && layout->pieces ? LSHARD_OK : LSHARD_ERR_NO_MEMORY;
}

static lshard_status lay_out(struct layout *layout, const lshard_series_options *options,
			     const struct layout_memory *memory, lshard_error *error)
{
	uint64_t packed, alignment;
	lshard_status status = LSHARD_ERR_NO_MEMORY;

	layout->tensors = memory->allocate(memory->user, options->tensor_count * sizeof *layout->tensors);
	if (!layout->tensors)
		goto no_memory;
	describe_tensors(layout, options);
	packed = pack_tensors(layout, options, &alignment);
	if (packed > MAX_LAYER_BYTES)
		return lshard_fail(error, LSHARD_ERR_INVALID, "series '%s': a layer of %llu bytes is more than 2^44",
				   options->name, (unsigned long long)packed);
	if (layout->placement == LSHARD_STRIPED && !has_stripes(layout) && layout->granule > alignment)
		alignment = layout->granule;
	layout->layer_bytes = round_up(packed, alignment);
	if (layout->layer_bytes > MAX_SERIES_BYTES / layout->layers)
		return lshard_fail(error, LSHARD_ERR_INVALID, "series '%s': %u layers of %llu bytes are more than 2^62",
				   options->name, layout->layers, (unsigned long long)layout->layer_bytes);

	status = allocate_tables(layout, memory);
	if (status < 0)
		goto no_memory;
	if (layout->placement == LSHARD_STRIPED)
		status = stripe_layers(layout, memory);
	else
		own_layers(layout);
	if (status >= 0)
		return status;
no_memory:
	return lshard_fail(error, status, "series '%s': no memory for the tables of %u layers", options->name,
			   options->layer_count);
}

lshard_status layout_open(struct layout *layout, const lshard_series_options *options, int32_t size, uint64_t granule,
			  const struct layout_memory *memory, lshard_error *error)
{
	lshard_status status = check_options(options, error);

	if (status >= 0 && (granule > MAX_GRANULE || (granule & (granule - 1))))
		status = lshard_fail(error, LSHARD_ERR_INVALID, "a granule of %llu bytes is no power of two up to 2^30",
				     (unsigned long long)granule);
	if (status < 0)
		return status;
	*layout = (struct layout){.first_layer = options->first_layer,
				  .layers = options->layer_count,
				  .size = size,
				  .placement =
					  size > 1 ? options->placement : LSHARD_WHOLE, /* alone, they are the same */
				  .granule = granule ? granule : 1,
				  .n_tensors = options->tensor_count};
	status = lay_out(layout, options, memory, error);
	if (status < 0)
		layout_close(layout, memory);
	return status;
}

void layout_close(struct layout *layout, const struct layout_memory *memory)
{
	memory->release(memory->user, layout->pieces);
	memory->release(memory->user, layout->first_piece);
	memory->release(memory->user, layout->shard_bytes_of);
	memory->release(memory->user, layout->tensors);
	*layout = (struct layout){0};
}
