/* SPDX-License-Identifier: Apache-2.0
 *
 * test_cuda_layers.c - striped layers of the cuda transport over a stand-in for the driver: put together by mapping
 * where stripes end at granules, with this rank's own stripe in place; how much memory that takes; nothing left behind
 * wherever it fails.
 */
#include "cuda_ranks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define MIB          ((uint64_t)1 << 20)
#define GRANULE      (2 * MIB)
#define COUNT        5u
#define MOST_TENSORS 3u

/* A layer's tensors. Of 12 MiB by rows, both halves and thirds are whole granules. */
struct shape {
	const char *name;
	lshard_tensor tensors[MOST_TENSORS];
	uint32_t n_tensors;
	int composes; /* own stripes are in place, of some tensors at least */
};

static const struct shape shapes[] = {
	{"bytes", {{"weight", 7 * MIB + 1000, 0, LSHARD_STRIPE_BYTES, 0, 0}}, 1, 1},
	{"rows", {{"up", 12 * MIB, 0, LSHARD_STRIPE_ROWS, 3072, 0}}, 1, 1},
	{"mixed",
	 {{"norm", 3000, 0, LSHARD_STRIPE_BYTES, 0, 0},
	  {"up", 12 * MIB, 0, LSHARD_STRIPE_ROWS, 3072, 0},
	  {"down", 720 * 1000, 0, LSHARD_STRIPE_COLUMNS, 120, 2}},
	 3,
	 1},
	{"columns", {{"down", 7 * MIB, 0, LSHARD_STRIPE_COLUMNS, 1024, 2}}, 1, 0},
	{"uneven rows", {{"up", 7000 * 1000, 0, LSHARD_STRIPE_ROWS, 7000, 0}}, 1, 0},
	{"small", {{"weight", 300000, 0, LSHARD_STRIPE_BYTES, 0, 0}}, 1, 0},
};

struct variant {
	struct setting setting;
	const struct shape *shape;
	uint64_t resident_bytes;
};

static uint32_t word_of(uint32_t generation, uint32_t layer, uint32_t tensor, uint64_t word)
{
	return (uint32_t)((generation * 131 + layer * 31 + tensor * 7 + word) * 2654435761u);
}

/* What layers must be: one after the other, tensors packed. */
struct truth {
	struct rank rank;
	const struct variant *variant;
	uint32_t *layers[COUNT][MOST_TENSORS];
	uint32_t generation;
};

static int foretell(struct truth *truth)
{
	const struct shape *shape = truth->variant->shape;

	for (uint32_t layer = 0; layer < COUNT; layer++)
		for (uint32_t t = 0; t < shape->n_tensors; t++) {
			uint32_t **words = &truth->layers[layer][t];

			if (!*words)
				*words = malloc(shape->tensors[t].bytes);
			for (uint64_t i = 0; *words && i < shape->tensors[t].bytes / 4; i++)
				(*words)[i] = word_of(truth->generation, layer, t, i);
			if (!*words)
				return 0;
		}
	return 1;
}

static int fill(void *user, uint32_t layer, void *const *tensors)
{
	const struct truth *truth = user;

	for (uint32_t t = 0; t < truth->variant->shape->n_tensors; t++)
		memcpy(tensors[t], truth->layers[layer - FIRST][t], truth->variant->shape->tensors[t].bytes);
	return 0;
}

static lshard_status create(struct truth *truth)
{
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;

	options.name = "blocks";
	options.first_layer = FIRST;
	options.layer_count = COUNT;
	options.tensors = truth->variant->shape->tensors;
	options.tensor_count = truth->variant->shape->n_tensors;
	options.prefetch = truth->variant->setting.prefetch;
	options.placement = LSHARD_STRIPED;
	options.resident_bytes = truth->variant->resident_bytes;
	return lshard_series_create(truth->rank.group, &options, &truth->rank.series);
}

static int open_truth(struct truth *truth, const struct member *member)
{
	struct rank *rank = &truth->rank;

	memset(truth, 0, sizeof *truth);
	truth->variant = member->user;
	cuda_set_stub(member, &truth->variant->setting);
	EXPECT(member, cuda_open_group(rank, member, &truth->variant->setting) == LSHARD_OK, "%s", rank->error);
	EXPECT(member, foretell(truth), "no memory");
	cuInit(0);
	EXPECT(member,
	       !cuDevicePrimaryCtxRetain(&rank->context, member->rank) && !cuCtxSetCurrent(rank->context) &&
		       !cuStreamCreateWithPriority(&rank->streams[0], CUDA_STREAM_NON_BLOCKING, 0),
	       "a stream");
	return 1;
failed:
	return 0;
}

static void close_truth(struct truth *truth)
{
	cuda_close_rank(&truth->rank);
	for (uint32_t layer = 0; layer < COUNT; layer++)
		for (uint32_t t = 0; t < MOST_TENSORS; t++)
			free(truth->layers[layer][t]);
}

/* In stream order, where a program would compute from the layer. */
static int visit(struct truth *truth, uint32_t layer)
{
	struct rank *rank = &truth->rank;

	OK(rank, lshard_reach(rank->series, layer, rank->streams[0]));
	OK(rank, lshard_wait(rank->series, layer, rank->streams[0]));
	for (uint32_t t = 0; t < truth->variant->shape->n_tensors; t++) {
		void *address = NULL;
		uint64_t arguments[4];
		void *parameters[4] = {&arguments[0], &arguments[1], &arguments[2], &arguments[3]};

		OK(rank, lshard_series_address(rank->series, layer, t, &address));
		arguments[0] = (uintptr_t)address;
		arguments[1] = (uintptr_t)truth->layers[layer - FIRST][t];
		arguments[2] = truth->variant->shape->tensors[t].bytes / 4;
		arguments[3] = (uintptr_t)&rank->differences;
		EXPECT(rank->member,
		       !cuLaunchKernel((cuda_function)(void *)rank, 1, 1, 1, 1, 1, 1, 0, rank->streams[0], parameters,
				       NULL),
		       "launch");
	}
	return 1;
failed:
	return 0;
}

static int passes(struct truth *truth, int count, const char *what)
{
	struct rank *rank = &truth->rank;

	for (int pass = 0; pass < count; pass++)
		for (uint32_t layer = FIRST; layer < FIRST + COUNT; layer++)
			if (!visit(truth, layer))
				return 0;
	cuStreamSynchronize(rank->streams[0]);
	EXPECT(rank->member, rank->differences == 0, "%s: %llu wrong words (%s, %s, k %u, late %d)", what,
	       (unsigned long long)rank->differences, truth->variant->shape->name, truth->variant->setting.spec,
	       truth->variant->setting.prefetch, (int)truth->variant->setting.late);
	return 1;
failed:
	return 0;
}

/* ---- a stripe is a shard ---- */

/* This rank's rows or columns of one tensor, where the shard has them. */
static int check_stripe(struct truth *truth, uint32_t layer, uint32_t t)
{
	const lshard_tensor *tensor = &truth->variant->shape->tensors[t];
	const uint64_t row_bytes = tensor->rows ? tensor->bytes / tensor->rows : 0;
	const char *words = (const char *)truth->layers[layer - FIRST][t];
	struct rank *rank = &truth->rank;
	const int by_rows = tensor->stripe == LSHARD_STRIPE_ROWS;
	void *address = NULL;
	lshard_range range = LSHARD_RANGE_INIT;
	uint64_t rows, width;

	if (tensor->stripe == LSHARD_STRIPE_BYTES)
		return 1;
	OK(rank, lshard_series_stripe(rank->series, layer, t, &address, &range));
	rows = by_rows ? range.end - range.begin : tensor->rows;
	width = by_rows ? row_bytes : range.end - range.begin;
	for (uint64_t row = 0; row < rows; row++) {
		const char *stored = (const char *)address + row * range.row_bytes;
		const char *wanted =
			words + (by_rows ? (range.begin + row) * row_bytes : row * row_bytes + range.begin);

		EXPECT(rank->member, memcmp(stored, wanted, width) == 0, "layer %u, tensor %u, row %llu", layer, t,
		       (unsigned long long)row);
	}
	return 1;
failed:
	return 0;
}

static int check_stripes(struct truth *truth)
{
	for (uint32_t layer = FIRST; layer < FIRST + COUNT; layer++)
		for (uint32_t t = 0; t < truth->variant->shape->n_tensors; t++)
			if (!check_stripe(truth, layer, t))
				return 0;
	return 1;
}

/* ---- memory ---- */

static uint64_t layers_bytes(const struct shape *shape)
{
	uint64_t bytes = 0;

	for (uint32_t t = 0; t < shape->n_tensors; t++)
		bytes += shape->tensors[t].bytes;
	return bytes;
}

static int check_memory(struct truth *truth, uint64_t before)
{
	const struct shape *shape = truth->variant->shape;
	const struct member *member = truth->rank.member;
	const uint64_t layer = layers_bytes(shape);
	const uint64_t size = (uint64_t)member->size;
	lshard_stats stats = LSHARD_STATS_INIT;
	uint64_t used = stub_cuda_bytes() - before;
	uint64_t buffers, least, most;

	EXPECT(member, lshard_series_stats(truth->rank.series, &stats) == LSHARD_OK, "stats");
	buffers = stats.windows + stats.residents;
	EXPECT(member, used >= stats.shard_bytes + stats.window_bytes + stats.resident_bytes, "%llu bytes used",
	       (unsigned long long)used);
	EXPECT(member,
	       used <= stats.shard_bytes + stats.window_bytes + stats.resident_bytes + (buffers + COUNT + 1) * GRANULE,
	       "%llu bytes used", (unsigned long long)used);
	/* shards, and of what comes from others as much as the windows hold; a granule for each stripe and window */
	least = COUNT * (layer / size);
	most = least + buffers * (shape->composes ? layer - layer / size : layer) + (COUNT + buffers) * GRANULE +
	       (shape->composes ? buffers * MIB : 0); /* columns are in windows whole */
	EXPECT(member, used <= most, "%s: %llu bytes used, %llu are enough", shape->name, (unsigned long long)used,
	       (unsigned long long)most);
	return 1;
failed:
	return 0;
}

/* ---- the tests ---- */

static int updates(struct truth *truth)
{
	struct rank *rank = &truth->rank;

	OK(rank, lshard_series_update_begin(rank->series));
	truth->generation++;
	EXPECT(rank->member, foretell(truth), "no memory");
	OK(rank, lshard_series_update_end(rank->series, fill, truth));
	return passes(truth, 1, "after an update") && check_stripes(truth);
failed:
	return 0;
}

/* Addresses are fixed. */
static int keeps_addresses(struct truth *truth, void *addresses[COUNT])
{
	for (uint32_t layer = 0; layer < COUNT; layer++) {
		void *address = NULL;

		OK(&truth->rank, lshard_series_address(truth->rank.series, FIRST + layer, 0, &address));
		EXPECT(truth->rank.member, !addresses[layer] || addresses[layer] == address, "layer %u moved", layer);
		addresses[layer] = address;
	}
	return 1;
failed:
	return 0;
}

/* What steady passes move is what others store of the layers that come, and where stripes are in place no more. */
static int copies_what_others_store(struct truth *truth)
{
	const struct member *member = truth->rank.member;
	const struct shape *shape = truth->variant->shape;
	const uint64_t before = stub_cuda_copied();
	lshard_stats stats = LSHARD_STATS_INIT;
	uint64_t copied, own;

	if (!passes(truth, 2, "steady passes"))
		return 0;
	copied = stub_cuda_copied() - before;
	EXPECT(member, lshard_series_stats(truth->rank.series, &stats) == LSHARD_OK, "stats");
	own = layers_bytes(shape) / (uint64_t)member->size;
	/* A pass begins with what the one before it has fetched: as much is on its way at the end. */
	EXPECT(member,
	       !shape->composes ||
		       copied <= (2u * stats.fetched_layers + stats.windows) * (layers_bytes(shape) - own + GRANULE),
	       "%s: %llu bytes copied", shape->name, (unsigned long long)copied);
	EXPECT(member, copied > 0 || stats.fetched_layers == 0 || stats.fetched_bytes == 0, "%s: nothing copied",
	       shape->name);
	return 1;
failed:
	return 0;
}

static int lives(const struct member *member)
{
	static struct truth truth;
	void *addresses[COUNT] = {NULL};
	uint64_t before;

	if (!open_truth(&truth, member))
		goto failed;
	before = stub_cuda_bytes();
	EXPECT(member, create(&truth) == LSHARD_OK, "%s", lshard_group_error(truth.rank.group));
	if (!keeps_addresses(&truth, addresses) || !check_memory(&truth, before))
		goto failed;
	/* Nobody can spoil another's layers, and copies do not queue behind the program's work. */
	EXPECT(member, stub_cuda_writable_imports() == 0, "%u of the others' shards can be written to",
	       stub_cuda_writable_imports());
	EXPECT(member, stub_cuda_first_streams() >= 2, "%u streams of the highest priority", stub_cuda_first_streams());
	OK(&truth.rank, lshard_series_commit(truth.rank.series, fill, &truth));
	if (!passes(&truth, 1, "after commit") || !check_stripes(&truth) || !copies_what_others_store(&truth) ||
	    !updates(&truth) || !keeps_addresses(&truth, addresses) || !check_memory(&truth, before))
		goto failed;
	close_truth(&truth);
	EXPECT(member, stub_cuda_outstanding() == 0 && stub_cuda_bytes() == 0, "%d objects are left",
	       stub_cuda_outstanding());
	return 0;
failed:
	close_truth(&truth);
	return 1;
}

static void layers_are_right_in_as_little_memory_as_that(void **state)
{
	static const struct variant variants[] = {
		{.setting = {.spec = "cuda", .prefetch = 1}},
		{.setting = {.spec = "cuda", .prefetch = 0, .late = 5}},
		{.setting = {.spec = "cuda:copy", .prefetch = 2, .neighbours = 8}, .resident_bytes = 13 * MIB},
		{.setting = {.spec = "cuda", .prefetch = 1, .neighbours = 2}},
		{.setting = {.spec = "cuda:ipc", .prefetch = 1}},
	};

	(void)state;
	for (size_t i = 0; i < sizeof variants / sizeof variants[0]; i++)
		for (size_t j = 0; j < sizeof shapes / sizeof shapes[0]; j++) {
			struct variant variant = variants[i];
			struct shape shape = shapes[j];

			shape.composes &= !strstr(variant.setting.spec, "ipc");
			variant.shape = &shape;
			assert_int_equal(
				team_of_processes(variant.setting.neighbours == 2 ? 3 : 2 + (int32_t)(i + j) % 2, lives,
						  &variant),
				0);
		}
}

/* The own stripe is part of the layer: what is written into the one is seen in the other, and nothing moves. */
static int sees_its_own_stripe(const struct member *member)
{
	static struct truth truth;
	lshard_range range = LSHARD_RANGE_INIT;
	void *stripe = NULL;
	void *layer = NULL;
	uint64_t copied, row_bytes;

	if (!open_truth(&truth, member))
		goto failed;
	EXPECT(member, create(&truth) == LSHARD_OK, "%s", lshard_group_error(truth.rank.group));
	OK(&truth.rank, lshard_series_commit(truth.rank.series, fill, &truth));
	if (!passes(&truth, 1, "before"))
		goto failed;
	OK(&truth.rank, lshard_series_address(truth.rank.series, FIRST + 1, 0, &layer));
	OK(&truth.rank, lshard_series_stripe(truth.rank.series, FIRST + 1, 0, &stripe, &range));
	row_bytes = truth.variant->shape->tensors[0].bytes / truth.variant->shape->tensors[0].rows;
	EXPECT(member, stripe != (char *)layer + range.begin * row_bytes, "the same address tells nothing");
	EXPECT(member, team_barrier(member), "another rank failed"); /* whose pass may still read the stripe */
	copied = stub_cuda_copied();
	memset(stripe, 0x77, (range.end - range.begin) * row_bytes);
	EXPECT(member,
	       !memcmp(stripe, (char *)layer + range.begin * row_bytes, (range.end - range.begin) * row_bytes) &&
		       stub_cuda_copied() == copied,
	       "the stripe in the layer is another one");
	EXPECT(member, team_barrier(member), "another rank failed");
	close_truth(&truth);
	return 0;
failed:
	close_truth(&truth);
	return 1;
}

static void the_own_stripe_is_part_of_the_layer(void **state)
{
	struct variant variant = {.setting = {.spec = "cuda", .prefetch = 1}, .shape = &shapes[1]};

	(void)state;
	assert_int_equal(team_of_processes(2, sees_its_own_stripe, &variant), 0);
	assert_int_equal(team_of_processes(3, sees_its_own_stripe, &variant), 0);
}

/* Rank 1's driver refuses one call after the other until a series is made; each time everything is given back. */
static int fails_everywhere(const struct member *member)
{
	static const char *const symbols[] = {"cuMemCreate",
					      "cuMemAddressReserve",
					      "cuMemMap",
					      "cuMemSetAccess",
					      "cuMemExportToShareableHandle",
					      "cuMemImportFromShareableHandle",
					      "cuStreamCreateWithPriority",
					      "cuEventCreate"};
	static struct truth truth;
	int failures = 0;

	if (!open_truth(&truth, member))
		goto failed;
	for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++)
		for (unsigned nth = 1;; nth++) {
			const int objects = stub_cuda_outstanding();
			const uint64_t bytes = stub_cuda_bytes();
			lshard_status status;

			if (member->rank == 1)
				stub_cuda_fail(symbols[i], nth, CUDA_NO_MEMORY);
			status = create(&truth);
			EXPECT(member, status == LSHARD_OK || status == LSHARD_ERR_NO_MEMORY, "%s, call %u: %d",
			       symbols[i], nth, (int)status);
			lshard_series_destroy(truth.rank.series);
			truth.rank.series = NULL;
			EXPECT(member, stub_cuda_outstanding() == objects && stub_cuda_bytes() == bytes,
			       "%s, call %u: %d objects and %llu bytes are left", symbols[i], nth,
			       stub_cuda_outstanding() - objects, (unsigned long long)(stub_cuda_bytes() - bytes));
			stub_cuda_fail(symbols[i], 0, CUDA_OK);
			if (status == LSHARD_OK)
				break;
			failures++;
		}
	EXPECT(member, failures > 60, "only %d calls failed", failures);
	close_truth(&truth);
	return 0;
failed:
	close_truth(&truth);
	return 1;
}

static void wherever_it_fails_everything_is_given_back(void **state)
{
	struct variant variant = {.setting = {.spec = "cuda", .prefetch = 1}, .shape = &shapes[2]};

	(void)state;
	assert_int_equal(team_of_processes(2, fails_everywhere, &variant), 0);
	variant.setting.neighbours = 2;
	assert_int_equal(team_of_processes(3, fails_everywhere, &variant), 0);
}

int main(int count, char **arguments)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(layers_are_right_in_as_little_memory_as_that),
		cmocka_unit_test(the_own_stripe_is_part_of_the_layer),
		cmocka_unit_test(wherever_it_fails_everything_is_given_back),
	};

	if (count != 2) {
		fprintf(stderr, "usage: test_cuda_layers PATH-OF-THE-STUB\n");
		return 2;
	}
	setenv("LAYERSHARD_CUDA_SO_PATH", arguments[1], 1);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
