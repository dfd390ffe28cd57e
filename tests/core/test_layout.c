/* SPDX-License-Identifier: Apache-2.0
 *
 * test_layout.c - who keeps which bytes: random series counted byte by byte, stripes as tensor-parallel shards, more
 * ranks than layers, and every option that makes no sense with the message it gets.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include "layout.h"
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#define MOST_TENSORS 5
#define MOST_RANKS   9

struct sample {
	lshard_series_options options;
	lshard_tensor tensors[MOST_TENSORS];
	int32_t size;
	uint64_t granule;
	struct layout layout;
};

/* ---- Memory that is counted and can be made to run out ---- */

struct counted {
	int outstanding;
	int left; /* allocations until there is no more; negative: no end */
};

static void *allocate(void *user, size_t bytes)
{
	struct counted *counted = user;

	if (counted->left == 0)
		return NULL;
	counted->left--;
	counted->outstanding++;
	return calloc(1, bytes ? bytes : 1);
}

static void release(void *user, void *pointer)
{
	struct counted *counted = user;

	if (pointer)
		counted->outstanding--;
	free(pointer);
}

static struct layout_memory memory_of(struct counted *counted)
{
	return (struct layout_memory){allocate, release, counted};
}

static struct counted plenty = {0, -1};

/* ---- Samples ---- */

static uint64_t draw(uint64_t *random, uint64_t below)
{
	uint64_t z = *random += 0x9e3779b97f4a7c15u;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return (z ^ (z >> 31)) % below;
}

static void draw_tensor(lshard_tensor *tensor, uint32_t index, uint64_t *random, bool dimensions)
{
	static const char *const names[MOST_TENSORS] = {"weight", "scale", "bias", "down.weight", "x"};

	*tensor = (lshard_tensor){.name = names[index], .bytes = 1 + draw(random, 6000)};
	if (draw(random, 3) == 0)
		tensor->alignment = 1u << draw(random, 13);
	if (!dimensions || draw(random, 3) == 0)
		return;
	tensor->stripe = draw(random, 2) ? LSHARD_STRIPE_ROWS : LSHARD_STRIPE_COLUMNS;
	tensor->rows = 1 + draw(random, 20);
	tensor->column_bytes = tensor->stripe == LSHARD_STRIPE_COLUMNS ? 1 + (uint32_t)draw(random, 8) : 0;
	tensor->bytes = tensor->rows * (tensor->column_bytes ? tensor->column_bytes : 1) * (1 + draw(random, 30));
}

/* One whose stripes may end at granules of 4096. */
static void draw_granular(lshard_tensor *tensor, int32_t size, uint64_t *random)
{
	const uint64_t granules = (uint64_t)size - 1 + draw(random, 4);

	tensor->stripe = draw(random, 2) ? LSHARD_STRIPE_BYTES : LSHARD_STRIPE_ROWS;
	tensor->bytes = 4096 * (granules ? granules : 1);
	tensor->rows = 0;
	if (tensor->stripe == LSHARD_STRIPE_ROWS)
		tensor->rows = tensor->bytes % 8192 || draw(random, 2) ? tensor->bytes / 2048 : tensor->bytes / 8192;
	tensor->column_bytes = 0;
}

static void draw_sample(struct sample *sample, uint64_t *random)
{
	static const uint64_t granules[] = {1, 16, 256, 4096, 16384};
	bool dimensions = draw(random, 2);

	sample->options = (lshard_series_options)LSHARD_SERIES_OPTIONS_INIT;
	sample->options.name = "sample";
	sample->options.first_layer = (uint32_t)draw(random, 70);
	sample->options.layer_count = 1 + (uint32_t)draw(random, 10);
	sample->options.tensors = sample->tensors;
	sample->options.tensor_count = 1 + (uint32_t)draw(random, MOST_TENSORS);
	sample->options.placement = draw(random, 3) ? LSHARD_STRIPED : LSHARD_WHOLE;
	for (uint32_t t = 0; t < sample->options.tensor_count; t++)
		draw_tensor(&sample->tensors[t], t, random, dimensions);
	sample->size = 1 + (int32_t)draw(random, MOST_RANKS);
	sample->granule = granules[draw(random, 5)];
	for (uint32_t t = 0; dimensions && sample->granule == 4096 && t < sample->options.tensor_count; t++)
		if (draw(random, 2))
			draw_granular(&sample->tensors[t], sample->size, random);
}

static void open_sample(struct sample *sample)
{
	struct layout_memory memory = memory_of(&plenty);
	lshard_error error = {""};

	if (layout_open(&sample->layout, &sample->options, sample->size, sample->granule, &memory, &error) != LSHARD_OK)
		fail_msg("layout_open: %s", error.text);
}

static void close_sample(struct sample *sample)
{
	struct layout_memory memory = memory_of(&plenty);

	layout_close(&sample->layout, &memory);
	assert_int_equal(plenty.outstanding, 0);
}

/* ---- Every byte once ---- */

/* How often each byte of a range is covered. */
struct cover {
	uint64_t bytes;
	uint8_t *times;
};

static struct cover cover_open(uint64_t bytes)
{
	struct cover cover = {bytes, calloc(1, bytes + 1)};

	assert_non_null(cover.times);
	return cover;
}

static void cover_run(struct cover *cover, uint64_t begin, uint64_t bytes)
{
	assert_true(begin + bytes <= cover->bytes && begin + bytes >= begin);
	for (uint64_t i = 0; i < bytes; i++)
		assert_int_equal(cover->times[begin + i]++, 0);
}

static void check_tensors(const struct sample *sample)
{
	const struct layout *layout = &sample->layout;
	uint64_t end = 0;

	for (uint32_t turn = 0; turn < 2 * layout->n_tensors; turn++) { /* those cut at granules first */
		const uint32_t t = turn % layout->n_tensors;
		uint64_t alignment = sample->tensors[t].alignment > 256 ? sample->tensors[t].alignment : 256;

		if (layout->tensors[t].granular != (turn < layout->n_tensors))
			continue;
		if (layout->tensors[t].granular && sample->granule > alignment)
			alignment = sample->granule;
		assert_string_equal(layout->tensors[t].name, sample->tensors[t].name);
		assert_int_equal(layout->tensors[t].bytes, sample->tensors[t].bytes);
		assert_int_equal(layout->tensors[t].offset % alignment, 0);
		assert_int_equal(layout->layer_bytes % alignment, 0);
		assert_true(layout->tensors[t].offset >= end);
		assert_true(layout->tensors[t].offset - end < alignment); /* nothing is wasted but for alignment */
		end = layout->tensors[t].offset + layout->tensors[t].bytes;
	}
	assert_true(end <= layout->layer_bytes);
}

static void check_layers(const struct sample *sample)
{
	const struct layout *layout = &sample->layout;

	for (uint32_t p = 0; p < layout->layers; p++) {
		struct cover cover = cover_open(layout->layer_bytes);

		for (uint32_t i = layout->first_piece[p]; i < layout->first_piece[p + 1]; i++)
			for (uint64_t row = 0; row < layout->pieces[i].rows; row++)
				cover_run(&cover, layout->pieces[i].layer_offset + row * layout->pieces[i].layer_pitch,
					  layout->pieces[i].width);
		for (uint32_t t = 0; t < layout->n_tensors; t++)
			for (uint64_t i = 0; i < layout->tensors[t].bytes; i++)
				assert_int_equal(cover.times[layout->tensors[t].offset + i], 1);
		free(cover.times);
	}
}

static void check_shards(const struct sample *sample)
{
	const struct layout *layout = &sample->layout;

	for (int32_t rank = 0; rank < layout->size; rank++) {
		struct cover cover = cover_open(layout->shard_bytes_of[rank]);

		for (uint32_t i = 0; i < layout->first_piece[layout->layers]; i++) {
			const lshard_piece *piece = &layout->pieces[i];

			assert_in_range((uint64_t)piece->rank, 0, (uint64_t)layout->size - 1);
			for (uint64_t row = 0; row < piece->rows && piece->rank == rank; row++)
				cover_run(&cover, piece->shard_offset + row * piece->shard_pitch, piece->width);
		}
		free(cover.times);
	}
}

static uint64_t larger(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

/* At most one granule beyond an even division, per layer shard or stripe (a stripe is per tensor where tensors are
 * cut). */
static void check_waste(const struct sample *sample)
{
	const struct layout *layout = &sample->layout;
	uint64_t unit = larger(sample->granule, 256);

	for (int32_t rank = 0; rank < layout->size; rank++) {
		uint64_t most = 0, owned = 0;

		for (uint32_t p = 0; p < layout->layers; p++)
			owned += layout_source(layout, p) == rank;
		if (layout->placement == LSHARD_WHOLE)
			most = owned * layout->layer_bytes;
		else
			most = layout->layers *
			       (layout->layer_bytes / (uint64_t)layout->size + unit * (1 + layout->n_tensors));
		assert_true(layout->shard_bytes_of[rank] <= most);
		assert_true(layout->placement != LSHARD_WHOLE || layout->shard_bytes_of[rank] == most);
	}
}

static void check_composable(const struct sample *sample)
{
	const struct layout *layout = &sample->layout;
	bool dimensions = false;

	for (uint32_t t = 0; t < layout->n_tensors; t++)
		dimensions |= layout->tensors[t].stripe != LSHARD_STRIPE_BYTES;
	assert_true(layout->composable || (dimensions && layout->placement == LSHARD_STRIPED));
	if (layout->placement == LSHARD_WHOLE || !layout->composable)
		return;
	for (uint32_t i = 0; i < layout->first_piece[layout->layers]; i++) {
		assert_int_equal(layout->pieces[i].rows, 1);
		assert_int_equal(layout->pieces[i].width % sample->granule, 0);
		assert_int_equal(layout->pieces[i].layer_offset % sample->granule, 0);
		assert_int_equal(layout->pieces[i].shard_offset % sample->granule, 0);
	}
}

/* What can be mapped into a layer is at granules in every layer; of a tensor cut at granules, all stripes are. */
static void check_granular(const struct sample *sample)
{
	const struct layout *layout = &sample->layout;

	for (uint32_t i = 0; i < layout->first_piece[layout->layers]; i++) {
		const lshard_piece *piece = &layout->pieces[i];

		if (!piece->granular)
			continue;
		assert_int_equal(piece->rows, 1);
		assert_int_equal((piece->width | piece->layer_offset | piece->shard_offset) % sample->granule, 0);
		assert_true(sample->granule > 256 && layout->layer_bytes % sample->granule == 0);
	}
	for (uint32_t t = 0; t < layout->n_tensors; t++)
		for (int32_t rank = 0; layout->tensors[t].granular && rank < layout->size; rank++)
			assert_true(!layout_stripe(layout, 0, t, rank) || layout_stripe(layout, 0, t, rank)->granular);
}

static void check_sources(const struct sample *sample)
{
	const struct layout *layout = &sample->layout;

	for (uint32_t p = 0; p < layout->layers; p++) {
		int32_t source = (int32_t)((layout->first_layer + p) % (uint32_t)layout->size);

		assert_int_equal(layout_source(layout, p), source);
		if (layout->placement == LSHARD_WHOLE) {
			assert_int_equal(layout->first_piece[p + 1] - layout->first_piece[p], 1);
			assert_int_equal(layout->pieces[layout->first_piece[p]].rank, source);
		}
	}
}

/* A stripe is what a tensor-parallel rank would hold, in one run of rows or of equal slices of rows. */
static void check_stripe(const struct layout *layout, uint32_t position, uint32_t t, int32_t rank)
{
	const struct layout_tensor *tensor = &layout->tensors[t];
	const lshard_piece *piece = layout_stripe(layout, position, t, rank);
	uint64_t n = (uint64_t)layout->size, r = (uint64_t)rank, row_bytes = tensor->bytes / tensor->rows;
	bool rows = tensor->stripe == LSHARD_STRIPE_ROWS;
	uint64_t unit = rows ? row_bytes : tensor->column_bytes, count = rows ? tensor->rows : row_bytes / unit;
	uint64_t begin = count * r / n * unit, end = count * (r + 1) / n * unit;

	if (begin == end) {
		assert_null(piece);
		return;
	}
	assert_non_null(piece);
	assert_int_equal(piece->layer_offset, tensor->offset + begin);
	assert_int_equal(piece->width, end - begin);
	assert_int_equal(piece->rows, rows ? 1 : tensor->rows);
	assert_int_equal(piece->shard_pitch, piece->width);
	assert_int_equal(piece->shard_offset % 256, 0);
	if (!rows)
		assert_int_equal(piece->layer_pitch, row_bytes);
}

static void check_stripes(const struct sample *sample)
{
	const struct layout *layout = &sample->layout;

	if (layout->placement != LSHARD_STRIPED)
		return;
	for (uint32_t p = 0; p < layout->layers; p++)
		for (uint32_t t = 0; t < layout->n_tensors; t++)
			for (int32_t rank = 0; rank < layout->size && layout->tensors[t].stripe != LSHARD_STRIPE_BYTES;
			     rank++)
				check_stripe(layout, p, t, rank);
}

static void every_byte_has_one_keeper(void **state)
{
	uint64_t random = 1;

	(void)state;
	for (int i = 0; i < 1500; i++) {
		struct sample sample;

		draw_sample(&sample, &random);
		open_sample(&sample);
		check_tensors(&sample);
		check_layers(&sample);
		check_shards(&sample);
		check_waste(&sample);
		check_composable(&sample);
		check_granular(&sample);
		check_sources(&sample);
		check_stripes(&sample);
		close_sample(&sample);
	}
}

/* ---- Particular cases ---- */

static struct sample plain_sample(uint32_t first, uint32_t count, int32_t size, lshard_placement placement)
{
	struct sample sample = {.options = LSHARD_SERIES_OPTIONS_INIT, .size = size, .granule = 1};

	sample.tensors[0] = (lshard_tensor){.name = "weight", .bytes = 1000};
	sample.options.name = "plain";
	sample.options.first_layer = first;
	sample.options.layer_count = count;
	sample.options.placement = placement;
	sample.options.tensor_count = 1;
	return sample;
}

static void more_ranks_than_layers(void **state)
{
	struct sample sample = plain_sample(7, 3, 8, LSHARD_WHOLE); /* layers 7, 8, 9: ranks 7, 0, 1 */

	(void)state;
	sample.options.tensors = sample.tensors;
	open_sample(&sample);
	for (int32_t rank = 0; rank < 8; rank++)
		assert_int_equal(sample.layout.shard_bytes_of[rank], rank == 7 || rank < 2 ? 1024 : 0);
	close_sample(&sample);
}

static void a_rank_alone_keeps_whole_layers(void **state)
{
	struct sample sample = plain_sample(0, 4, 1, LSHARD_STRIPED);

	(void)state;
	sample.options.tensors = sample.tensors;
	open_sample(&sample);
	assert_int_equal(sample.layout.placement, LSHARD_WHOLE);
	assert_int_equal(sample.layout.first_piece[4], 4);
	assert_int_equal(sample.layout.pieces[3].width, sample.layout.layer_bytes);
	assert_int_equal(sample.layout.shard_bytes_of[0], 4 * sample.layout.layer_bytes);
	close_sample(&sample);
}

static void the_last_layers_that_can_be_numbered(void **state)
{
	struct sample sample = plain_sample(UINT32_MAX - 4, 5, 4, LSHARD_WHOLE);

	(void)state;
	sample.options.tensors = sample.tensors;
	open_sample(&sample);
	assert_int_equal(layout_source(&sample.layout, 4), UINT32_MAX % 4);
	close_sample(&sample);
}

/* A tensor that may be cut anywhere is cut at granules only where every rank then has some of it. */
static void every_rank_keeps_some_of_each_tensor(void **state)
{
	for (int32_t size = 2; size <= 6; size++) {
		struct sample sample = plain_sample(0, 3, size, LSHARD_STRIPED);

		sample.granule = 4096;
		sample.tensors[1] = (lshard_tensor){.name = "down",
						    .bytes = 4800,
						    .stripe = LSHARD_STRIPE_ROWS,
						    .rows = 48}; /* tensors are cut each */
		sample.tensors[0].bytes = 3 * 4096;
		sample.options.tensors = sample.tensors;
		sample.options.tensor_count = 2;
		open_sample(&sample);
		assert_int_equal(sample.layout.tensors[0].granular, size <= 3);
		for (int32_t rank = 0; rank < size; rank++)
			assert_non_null(layout_stripe(&sample.layout, 2, 0, rank));
		close_sample(&sample);
	}
	(void)state;
}

/* ---- Options that make no sense ---- */

static void refused(const struct sample *sample, const char *text)
{
	struct layout_memory memory = memory_of(&plenty);
	struct layout layout;
	lshard_error error = {""};

	assert_int_equal(layout_open(&layout, &sample->options, sample->size, 1, &memory, &error), LSHARD_ERR_INVALID);
	if (!strstr(error.text, text))
		fail_msg("'%s' does not say '%s'", error.text, text);
	assert_int_equal(plenty.outstanding, 0);
}

#define REFUSED(change, text)                                                                                          \
	do {                                                                                                           \
		struct sample sample = plain_sample(0, 4, 2, LSHARD_STRIPED);                                          \
		lshard_series_options *options = &sample.options;                                                      \
		lshard_tensor *tensor = &sample.tensors[0];                                                            \
		(void)tensor;                                                                                          \
		options->tensors = sample.tensors;                                                                     \
		change;                                                                                                \
		refused(&sample, text);                                                                                \
	} while (0)

static const char long_name[] = "a_name_of_sixty_four_characters_that_is_one_more_than_is_allowed";

static void senseless_series_are_refused(void **state)
{
	(void)state;
	assert_int_equal(strlen(long_name), 64);
	REFUSED(options->name = NULL, "needs a name");
	REFUSED(options->name = "", "needs a name");
	REFUSED(options->name = long_name, "more than 63 characters");
	REFUSED(options->layer_count = 0, "layers [0, 0 + 0)");
	REFUSED(options->layer_count = (1u << 20) + 1, "count must be in 1..1048576");
	REFUSED(options->first_layer = UINT32_MAX - 1, "layers [4294967294");
	REFUSED(options->placement = (lshard_placement)7, "unknown placement 7");
	REFUSED(options->tensors = NULL, "tensors");
	REFUSED(options->tensor_count = 0, "0 tensors");
	REFUSED(options->tensor_count = 4097, "4097 tensors; 1..4096");
}

static void senseless_tensors_are_refused(void **state)
{
	(void)state;
	REFUSED(tensor->name = NULL, "needs a name");
	REFUSED(tensor->name = long_name, "more than 63 characters");
	REFUSED((tensor[1] = tensor[0], options->tensor_count = 2), "two tensors are named 'weight'");
	REFUSED(tensor->bytes = 0, "tensor 'weight': 0 bytes");
	REFUSED(tensor->bytes = UINT64_MAX, "tensor 'weight': 18446744073709551615 bytes");
	REFUSED(tensor->alignment = 8192, "alignment 8192");
	REFUSED(tensor->alignment = 768, "alignment 768 is no power of two");
	REFUSED(tensor->stripe = (lshard_stripe)9, "unknown stripe 9");
	REFUSED(tensor->stripe = LSHARD_STRIPE_ROWS, "0 rows do not divide 1000 bytes");
	REFUSED((tensor->stripe = LSHARD_STRIPE_ROWS, tensor->rows = 3), "3 rows do not divide 1000 bytes");
	REFUSED((tensor->stripe = LSHARD_STRIPE_COLUMNS, tensor->rows = 10), "columns of 0 bytes");
	REFUSED((tensor->stripe = LSHARD_STRIPE_COLUMNS, tensor->rows = 10, tensor->column_bytes = 3),
		"columns of 3 bytes do not divide rows of 100 bytes");
	REFUSED((tensor->bytes = (uint64_t)1 << 44, tensor[1] = tensor[0], tensor[1].name = "more",
		 options->tensor_count = 2),
		"more than 2^44");
}

/* ---- No memory ---- */

static void without_memory_nothing_stays(void **state)
{
	struct sample sample = plain_sample(0, 4, 3, LSHARD_STRIPED);
	struct layout layout;
	lshard_status status = LSHARD_ERR_NO_MEMORY;
	int fails = 0;

	(void)state;
	sample.options.tensors = sample.tensors;
	for (int left = 0; status != LSHARD_OK; left++) {
		struct counted counted = {0, left};
		struct layout_memory memory = memory_of(&counted);
		lshard_error error = {""};

		assert_true(left < 20);
		status = layout_open(&layout, &sample.options, sample.size, 1, &memory, &error);
		if (status == LSHARD_OK) {
			layout_close(&layout, &memory);
		} else {
			assert_int_equal(status, LSHARD_ERR_NO_MEMORY);
			assert_non_null(strstr(error.text, "series 'plain': no memory"));
			fails++;
		}
		assert_int_equal(counted.outstanding, 0);
	}
	assert_true(fails >= 4);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_byte_has_one_keeper),
		cmocka_unit_test(more_ranks_than_layers),
		cmocka_unit_test(a_rank_alone_keeps_whole_layers),
		cmocka_unit_test(every_rank_keeps_some_of_each_tensor),
		cmocka_unit_test(the_last_layers_that_can_be_numbered),
		cmocka_unit_test(senseless_series_are_refused),
		cmocka_unit_test(senseless_tensors_are_refused),
		cmocka_unit_test(without_memory_nothing_stays),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
