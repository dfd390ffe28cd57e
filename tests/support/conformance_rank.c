/* SPDX-License-Identifier: Apache-2.0
 *
 * conformance_rank.c - a rank of a test: its group, its series of foretold bytes, and the checks of what it sees.
 * Every byte of a layer follows from (generation, layer, tensor, offset), so each rank checks without asking anyone.
 */
#include "conformance.h"
#include "patience.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct subject subject;

/* ---- What does not apply --------------------------------------------------------------------------------------- */

static unsigned not_applying;

void does_not_apply(const char *test, const char *why)
{
	printf("does not apply: %s: %s\n", test, why);
	fflush(stdout); /* or a child of a later test says it again */
	not_applying++;
}

void tell_how_many_do_not_apply(void)
{
	if (not_applying)
		printf("%u do not apply to %s by %s\n", not_applying, subject.spec, subject.kind);
}

/* ---- Bytes that can be foretold -------------------------------------------------------------------------------- */

uint64_t random_next(uint64_t *state)
{
	uint64_t mixed = *state += 0x9e3779b97f4a7c15u;

	mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9u;
	mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebu;
	return mixed ^ mixed >> 31;
}

/* By number of the tensor: what no option says, and a pattern whose length divides nothing. */
static const char nan_of_fp32[] = {0, 0, (char)0xc0, 0x7f};
static const char three[] = {0x5a, 0x01, (char)0x99};
static const lshard_poison_pattern poison[MAX_TENSORS] = {{NULL, 0}, {nan_of_fp32, 4}, {three, 3}};

static unsigned char poison_byte(uint32_t tensor, uint64_t offset)
{
	const char *pattern = poison[tensor].pattern;

	return pattern ? (unsigned char)pattern[offset % poison[tensor].bytes] : 0xff;
}

static bool is_all_poison(const unsigned char *bytes, uint64_t n, uint32_t tensor)
{
	for (uint64_t offset = 0; offset < n; offset++)
		if (bytes[offset] != poison_byte(tensor, offset))
			return false;
	return true;
}

static uint64_t word_of(uint64_t generation, uint32_t layer, uint32_t tensor, uint64_t word)
{
	uint64_t state = generation << 56 ^ (uint64_t)layer << 40 ^ (uint64_t)tensor << 32 ^ word;

	return random_next(&state);
}

void foretell(unsigned char *bytes, uint64_t n, uint64_t generation, uint32_t layer, uint32_t tensor)
{
	for (uint64_t offset = 0; offset < n; offset += 8) {
		uint64_t word = word_of(generation, layer, tensor, offset / 8);

		memcpy(bytes + offset, &word, n - offset < 8 ? n - offset : 8);
	}
}

bool is_foretold(const unsigned char *bytes, uint64_t n, uint64_t generation, uint32_t layer, uint32_t tensor)
{
	if (generation == POISON)
		return is_all_poison(bytes, n, tensor);
	for (uint64_t offset = 0; offset < n; offset += 8) {
		uint64_t word = word_of(generation, layer, tensor, offset / 8);

		if (memcmp(bytes + offset, &word, n - offset < 8 ? n - offset : 8) != 0)
			return false;
	}
	return true;
}

/* ---- Memory of the series ---- */

bool rank_write(struct rank *rank, void *to, const void *from, size_t bytes)
{
	if (rank->device)
		return device_copy(rank->device, (uintptr_t)to, (uintptr_t)from, bytes);
	memcpy(to, from, bytes);
	return true;
}

bool rank_read(struct rank *rank, void *to, const void *from, size_t bytes)
{
	if (rank->device)
		return device_copy(rank->device, (uintptr_t)to, (uintptr_t)from, bytes);
	memcpy(to, from, bytes);
	return true;
}

static bool write_tensor(struct rank *rank, uint32_t layer, uint32_t tensor, void *to)
{
	const uint64_t bytes = rank->setting->tensors[tensor].bytes;
	unsigned char *foretold = malloc(bytes);
	bool right = false;

	if (!foretold)
		return false;
	foretell(foretold, bytes, rank->generation, layer, tensor);
	right = rank_write(rank, to, foretold, bytes);
	free(foretold);
	return right;
}

int fill_layer(void *user, uint32_t layer, void *const *tensors)
{
	struct rank *rank = user;

	if (rank->fail_at == (int)layer)
		return 7;
	rank->calls[layer - rank->setting->first_layer]++;
	for (uint32_t tensor = 0; tensor < rank->setting->n_tensors; tensor++)
		if (!write_tensor(rank, layer, tensor, tensors[tensor]))
			return 8;
	return 0;
}

/* ---- A rank ---------------------------------------------------------------------------------------------------- */

void setting_tensors(struct setting *setting, uint32_t n, lshard_stripe stripe)
{
	static const lshard_tensor rows[MAX_TENSORS] = {
		{"weight", 37 * 26, 0, LSHARD_STRIPE_ROWS, 37, 0},
		{"scales", 333, 512, LSHARD_STRIPE_BYTES, 0, 0},
		{"down", 5 * 21 * 2, 0, LSHARD_STRIPE_ROWS, 5, 0},
	};
	static const lshard_tensor columns[MAX_TENSORS] = {
		{"weight", 11 * 46, 0, LSHARD_STRIPE_COLUMNS, 11, 2},
		{"scales", 333, 512, LSHARD_STRIPE_BYTES, 0, 0},
		{"down", 3 * 36, 1024, LSHARD_STRIPE_COLUMNS, 3, 4},
	};
	static const lshard_tensor bytes[MAX_TENSORS] = {
		{"weight", 1511, 0, LSHARD_STRIPE_BYTES, 0, 0},
		{"scales", 1, 4096, LSHARD_STRIPE_BYTES, 0, 0},
		{"down", 4099, 64, LSHARD_STRIPE_BYTES, 0, 0},
	};
	const lshard_tensor *chosen = stripe == LSHARD_STRIPE_ROWS      ? rows
				      : stripe == LSHARD_STRIPE_COLUMNS ? columns
									: bytes;

	setting->n_tensors = n;
	memcpy(setting->tensors, chosen, n * sizeof *chosen);
}

struct setting plain_setting(const struct member *member)
{
	struct setting setting = {.size = member->size, .prefetch = 1, .layers = 7, .first_layer = 3};

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	return setting;
}

static void log_nothing(void *user, lshard_log_level level, const char *text)
{
	(void)user;
	(void)level;
	(void)text;
}

static bool take_seat(struct rank *rank, lshard_group_options *options)
{
	rank->fake = subject.fake ? fake_open(rank->member) : NULL;
	rank->seat = rank->fake ? fake_seat(rank->fake) : subject.fake ? NULL : circle_join(rank->member);
	EXPECT(rank->member, rank->seat, "a rank failed");
	options->callbacks = rank->fake ? fake_callbacks(rank->fake) : seat_callbacks(rank->seat);
	rank->stream = rank->fake ? fake_stream(rank->fake, 1) : NULL;
	return true;
failed:
	return false;
}

bool rank_equip(struct rank *rank, lshard_group_options *options)
{
	if (subject.memory == LSHARD_MEMORY_CUDA)
		options->memory = subject.memory;
	if (subject.callbacks && !take_seat(rank, options))
		return false;
	if (subject.fake || subject.memory != LSHARD_MEMORY_CUDA)
		return true;
	rank->device = device_open(rank->member);
	if (!rank->device)
		return false;
	rank->stream = device_stream(rank->device, 0);
	options->device = device_number(rank->device, rank->member->rank);
	return true;
}

bool rank_strip(struct rank *rank)
{
	const bool right = fake_close(rank->fake);

	if (!rank->fake)
		circle_leave(rank->seat);
	device_close(rank->device);
	rank->seat = NULL;
	rank->fake = NULL;
	rank->device = NULL;
	return right;
}

bool rank_group(struct rank *rank, const struct member *member, const struct setting *setting)
{
	lshard_group_options options =
		member_options(member, NULL, setting->timeout_ms ? setting->timeout_ms : LONG_MS);
	char error[512] = "";

	*rank = (struct rank){.member = member, .setting = setting, .fail_at = -1};
	if (!rank_equip(rank, &options))
		return false;
	options.custom_transport = subject.custom;
	options.transport = setting->spec ? setting->spec : subject.custom ? NULL : subject.spec;
	options.log = log_nothing; /* lines are made, so that making them is tested */
	options.log_level = LSHARD_LOG_DEBUG;
	options.error = error;
	options.error_bytes = sizeof error;
	EXPECT(member, lshard_group_create(&options, &rank->group) == LSHARD_OK, "%s", error);
	return true;
failed:
	rank_strip(rank);
	rank->group = NULL;
	return false;
}

/* How many ranks @p rank can read in place, itself among them. */
static int32_t reached_by(const struct rank *seen_from, int32_t rank)
{
	int32_t reached = 0;

	if (!subject.direct)
		return 1;
	if (!seen_from->device)
		return seen_from->member->size;
	for (int32_t other = 0; other < seen_from->member->size; other++)
		reached += device_number(seen_from->device, other) == device_number(seen_from->device, rank);
	return reached;
}

int32_t rank_reaches(const struct rank *rank)
{
	return reached_by(rank, rank->member->rank);
}

bool ranks_are_mixed(const struct rank *rank)
{
	int32_t most = 1;

	for (int32_t other = 0; other < rank->member->size; other++)
		most = reached_by(rank, other) > most ? reached_by(rank, other) : most;
	return most > 1 && most < rank->member->size;
}

lshard_series_options rank_series_options(const struct setting *setting)
{
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;

	options.name = "s";
	options.first_layer = setting->first_layer;
	options.layer_count = setting->layers;
	options.tensors = setting->tensors;
	options.tensor_count = setting->n_tensors;
	options.prefetch = setting->prefetch;
	options.placement = setting->placement;
	options.resident_bytes = setting->resident_bytes;
	options.poison = subject.poison && !setting->poison ? LSHARD_POISON_ON : setting->poison;
	options.poison_patterns = poison;
	return options;
}

bool rank_note_addresses(struct rank *rank)
{
	for (uint32_t position = 0; position < rank->setting->layers; position++)
		for (uint32_t tensor = 0; tensor < rank->setting->n_tensors; tensor++) {
			uint32_t alignment = rank->setting->tensors[tensor].alignment;
			void **address = &rank->addresses[position][tensor];

			OK_SERIES(rank, lshard_series_address(rank->series, rank->setting->first_layer + position,
							      tensor, address));
			EXPECT(rank->member, (uintptr_t)*address % (alignment < 256 ? 256 : alignment) == 0,
			       "%p is not at %u", *address, alignment);
		}
	return true;
failed:
	return false;
}

bool rank_series(struct rank *rank)
{
	lshard_series_options options = rank_series_options(rank->setting);

	EXPECT(rank->member, lshard_series_create(rank->group, &options, &rank->series) == LSHARD_OK, "%s",
	       lshard_group_error(rank->group));
	if (!rank_note_addresses(rank))
		goto failed;
	OK_SERIES(rank, lshard_series_commit(rank->series, fill_layer, rank));
	return true;
failed:
	return false;
}

bool rank_open(struct rank *rank, const struct member *member, const struct setting *setting)
{
	if (!rank_group(rank, member, setting))
		return false;
	if (rank_series(rank))
		return true;
	rank_close(rank);
	return false;
}

bool rank_close(struct rank *rank)
{
	bool right = lshard_series_destroy(rank->series) == LSHARD_OK;

	right = rank_looked(rank) && right; /* destroying has waited for the streams */
	right = lshard_group_destroy(rank->group) == LSHARD_OK && right;
	right = rank_strip(rank) && right;
	rank->series = NULL;
	rank->group = NULL;
	return right;
}

bool layer_is_right(struct rank *rank, uint32_t position)
{
	const struct setting *setting = rank->setting;
	uint32_t layer = setting->first_layer + position;

	for (uint32_t tensor = 0; tensor < setting->n_tensors; tensor++) {
		void *address = NULL;

		OK_SERIES(rank, lshard_series_address(rank->series, layer, tensor, &address));
		EXPECT(rank->member, address == rank->addresses[position][tensor], "layer %u moved", layer);
		if (rank->device) {
			if (!device_look(rank, address, setting->tensors[tensor].bytes, layer, tensor))
				goto failed;
			continue;
		}
		EXPECT(rank->member,
		       is_foretold(address, setting->tensors[tensor].bytes, rank->generation, layer, tensor),
		       "layer %u tensor %u has wrong bytes (k %u, layers %u, first %u, placement %d)", layer, tensor,
		       setting->prefetch, setting->layers, setting->first_layer, (int)setting->placement);
	}
	return true;
failed:
	return false;
}

bool rank_looked(struct rank *rank)
{
	return !rank->device || device_looked(rank);
}

bool visit(struct rank *rank, uint32_t position)
{
	uint32_t layer = rank->setting->first_layer + position;

	if (rank->device)
		rank->stream = device_stream(rank->device, rank->stream == device_stream(rank->device, 0));
	OK_SERIES(rank, lshard_reach(rank->series, layer, rank->stream));
	OK_SERIES(rank, lshard_wait(rank->series, layer, rank->stream));
	return layer_is_right(rank, position);
failed:
	return false;
}

bool one_pass(struct rank *rank)
{
	for (uint32_t position = 0; position < rank->setting->layers; position++)
		if (!visit(rank, position))
			return false;
	return true;
}

/* ---- Memory of all ranks --------------------------------------------------------------------------------------- */

void *shared_new(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		abort();
	return memory;
}

void shared_free(void *memory, size_t bytes)
{
	munmap(memory, bytes);
}
