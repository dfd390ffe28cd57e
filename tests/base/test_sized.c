/* SPDX-License-Identifier: Apache-2.0
 *
 * test_sized.c - a program and a library of different versions: every public struct as an earlier header has it, which
 * ends before the last member, and as a later one does, with a member behind the last.
 *
 * Knows: the public headers.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <layershard/callbacks.h>
#include <layershard/plan.h>

#include <cmocka.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define MOST  1024
#define EMPTY 0xa5 /* what lies behind a struct */

/* ---- What a program does with each ---- */

static const lshard_tensor tensor = {"w", 512, 0, LSHARD_STRIPE_ROWS, 4, 0};

static lshard_group_options alone(void)
{
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;

	options.rank = 0;
	options.size = 1;
	options.transport = "local";
	return options;
}

static lshard_series_options one_layer(void)
{
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;

	options.name = "s";
	options.layer_count = 1;
	options.tensors = &tensor;
	options.tensor_count = 1;
	return options;
}

static lshard_status make_group(const lshard_group_options *options)
{
	lshard_group *group = NULL;
	const lshard_status status = lshard_group_create(options, &group);

	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
	return status;
}

/* With a series, of which @p look asks something, if there is something to ask. */
static lshard_status make_series(const lshard_series_options *options,
				 lshard_status (*look)(lshard_series *series, void *theirs), void *theirs)
{
	const lshard_group_options group_options = alone();
	lshard_series *series = NULL;
	lshard_group *group = NULL;
	lshard_status status;

	assert_int_equal(lshard_group_create(&group_options, &group), LSHARD_OK);
	status = lshard_series_create(group, options, &series);
	if (status == LSHARD_ERR_INVALID)
		assert_non_null(strstr(lshard_group_error(group), "struct_size"));
	if (status == LSHARD_OK && look)
		status = look(series, theirs);
	assert_int_equal(lshard_series_destroy(series), LSHARD_OK);
	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
	return status;
}

static int allgather(void *user, const void *send, void *receive, size_t bytes)
{
	(void)user;
	memcpy(receive, send, bytes);
	return 0;
}

static void *allocate(void *user, size_t bytes)
{
	(void)user;
	return malloc(bytes);
}

static void release(void *user, void *pointer)
{
	(void)user;
	free(pointer);
}

static void *lend(void *user, lshard_purpose purpose, size_t bytes, size_t alignment)
{
	(void)user;
	(void)purpose;
	return aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

static void take_back(void *user, lshard_purpose purpose, void *pointer)
{
	(void)user;
	(void)purpose;
	free(pointer);
}

static lshard_status broadcast(void *user, void *bytes, size_t count, int32_t root, void **work, char *error,
			       size_t error_bytes)
{
	(void)user, (void)bytes, (void)count, (void)root, (void)work, (void)error, (void)error_bytes;
	return LSHARD_OK;
}

static lshard_status gather(void *user, const void *send, void *receive, size_t count, void **work, char *error,
			    size_t error_bytes)
{
	(void)user, (void)work, (void)error, (void)error_bytes;
	memcpy(receive, send, count);
	return LSHARD_OK;
}

static lshard_status finish(void *user, void *work, uint32_t timeout_ms, char *error, size_t error_bytes)
{
	(void)user, (void)work, (void)timeout_ms, (void)error, (void)error_bytes;
	return LSHARD_OK;
}

static lshard_status use_group_options(void *theirs)
{
	return make_group(theirs);
}

static lshard_status use_bootstrap(void *theirs)
{
	lshard_group_options options = alone();

	options.bootstrap = theirs;
	return make_group(&options);
}

static lshard_status use_allocator(void *theirs)
{
	lshard_group_options options = alone();

	options.allocator = theirs;
	return make_group(&options);
}

static lshard_status use_callbacks(void *theirs)
{
	lshard_group_options options = alone();

	options.transport = "callback";
	options.callbacks = theirs;
	return make_group(&options);
}

static lshard_status use_device(void *theirs)
{
	lshard_callbacks callbacks = {sizeof callbacks, broadcast, gather, finish, NULL, NULL, theirs, 0};

	return use_callbacks(&callbacks); /* layers in host memory: the device is read, and not used */
}

static lshard_status use_series_options(void *theirs)
{
	return make_series(theirs, NULL, NULL);
}

static lshard_status use_memory_source(void *theirs)
{
	lshard_series_options options = one_layer();

	options.memory_source = theirs;
	return make_series(&options, NULL, NULL);
}

/* The second of two, which begins where the first one ends. */
static lshard_status use_tensors(const void *theirs, size_t bytes)
{
	unsigned char *two = calloc(2, bytes);
	lshard_series_options options = one_layer();
	lshard_tensor first = tensor;
	lshard_status status;

	assert_non_null(two);
	first.name = "v";
	memcpy(two, &first, bytes < sizeof first ? bytes : sizeof first);
	memcpy(two + bytes, theirs, bytes);
	options.tensors = (const lshard_tensor *)(void *)two;
	options.tensor_struct_size = bytes;
	options.tensor_count = 2;
	status = make_series(&options, NULL, NULL);
	free(two);
	return status;
}

static lshard_status use_pattern(const void *theirs, size_t bytes)
{
	lshard_series_options options = one_layer();

	options.poison = LSHARD_POISON_ON;
	options.poison_patterns = theirs;
	options.poison_pattern_struct_size = bytes;
	return make_series(&options, NULL, NULL);
}

static lshard_status use_plan_input(void *theirs)
{
	const lshard_series_options options = one_layer();
	lshard_plan_result result = LSHARD_PLAN_RESULT_INIT;

	return lshard_plan(&options, theirs, &result);
}

static lshard_status use_plan_result(void *theirs)
{
	const lshard_series_options options = one_layer();
	const lshard_plan_input input = LSHARD_PLAN_INPUT_INIT;

	return lshard_plan(&options, &input, theirs);
}

static lshard_status ask_stats(lshard_series *series, void *theirs)
{
	return lshard_series_stats(series, theirs);
}

static lshard_status use_stats(void *theirs)
{
	const lshard_series_options options = one_layer();

	return make_series(&options, ask_stats, theirs);
}

static lshard_status ask_stripe(lshard_series *series, void *theirs)
{
	void *address;

	return lshard_series_stripe(series, 0, 0, &address, theirs);
}

static lshard_status use_range(void *theirs)
{
	lshard_series_options options = one_layer();

	options.placement = LSHARD_STRIPED;
	return make_series(&options, ask_stripe, theirs);
}

static lshard_status use_transport(void *theirs)
{
	return lshard_transport_info(0, theirs);
}

static lshard_status use_variable(void *theirs)
{
	return lshard_variable_info(0, theirs);
}

static lshard_status use_node(void *theirs)
{
	return lshard_node_info(0, theirs);
}

static lshard_status use_discovered(void *theirs)
{
	char error[256];

	assert_int_equal(setenv("LAYERSHARD_RANK", "0", 1), 0);
	assert_int_equal(setenv("LAYERSHARD_SIZE", "1", 1), 0);
	return lshard_discover(theirs, error, sizeof error);
}

/* ---- Each as headers of other versions have it ---- */

/* @p bytes of a struct; what lies behind them is not the struct's. */
struct other {
	_Alignas(16) unsigned char bytes[MOST];
	size_t size;
};

static struct other other_version(const void *ours, size_t known, size_t size)
{
	struct other other = {.size = size};

	memset(other.bytes, EMPTY, sizeof other.bytes);
	memset(other.bytes, 0, size);
	memcpy(other.bytes, ours, size < known ? size : known);
	return other;
}

static bool nothing_behind(const struct other *other)
{
	for (size_t i = other->size; i < sizeof other->bytes; i++)
		if (other->bytes[i] != EMPTY)
			return false;
	return true;
}

/* One that begins with its size. */
struct sized {
	const char *name;
	const void *ours;
	size_t known;
	size_t earlier; /* without its last member, and what shares its last word */
	lshard_status (*use)(void *theirs);
	bool result; /* the library writes it */
};

static lshard_status used(const struct sized *sized, struct other *other)
{
	lshard_status status;

	memcpy(other->bytes, &other->size, sizeof other->size);
	status = sized->use(other->bytes);
	if (status < 0 && status != LSHARD_ERR_INVALID)
		print_message("%s of %zu bytes: %s\n", sized->name, other->size, lshard_status_name(status));
	assert_true(nothing_behind(other));
	return status;
}

static void try_sized(const struct sized *sized)
{
	const size_t later = sized->known + 2 * sizeof(size_t);
	struct other other = other_version(sized->ours, sized->known, sized->earlier);

	print_message("%s\n", sized->name);
	assert_true(sized->earlier < sized->known && later < MOST);
	assert_int_equal(used(sized, &other), LSHARD_OK);
	other = other_version(sized->ours, sized->known, sized->known);
	assert_int_equal(used(sized, &other), LSHARD_OK);
	other = other_version(sized->ours, sized->known, later);
	assert_int_equal(used(sized, &other), LSHARD_OK);
	other = other_version(sized->ours, sized->known, later);
	other.bytes[later - 1] = 1;
	assert_int_equal(used(sized, &other), sized->result ? LSHARD_OK : LSHARD_ERR_INVALID);
	assert_int_equal(other.bytes[later - 1], sized->result ? 0 : 1);
	other = other_version(sized->ours, sized->known, sized->known);
	for (size_t i = 0; i < 3; i++) {
		const size_t no_sizes[] = {0, sized->known - 1, 65536};

		memcpy(other.bytes, &no_sizes[i], sizeof no_sizes[i]);
		assert_int_equal(sized->use(other.bytes), LSHARD_ERR_INVALID);
	}
}

/* @p last has to be the last member: behind it there is padding at most. */
#define IS_LAST(type, last)                                                                                            \
	sizeof(struct {                                                                                                \
		_Static_assert(sizeof(type) - offsetof(type, last) - sizeof(((type *)0)->last) < _Alignof(type),       \
			       #last " is not the last member of " #type);                                             \
		int nothing;                                                                                           \
	})
/* The size without it, as a header can have it: a multiple of the alignment. */
#define WITHOUT(type, last) (offsetof(type, last) / _Alignof(type) * _Alignof(type) + 0 * IS_LAST(type, last))
#define SIZED(type, ours, last, use, result) {#type, ours, sizeof(type), WITHOUT(type, last), use, result}

static void structs_that_say_their_size_may_be_of_another_version(void **state)
{
	static const lshard_bootstrap bootstrap = {sizeof bootstrap, allgather, NULL};
	static const lshard_allocator allocator = {sizeof allocator, allocate, release, NULL};
	static const lshard_callbacks callbacks = {sizeof callbacks, broadcast, gather, finish, NULL, NULL, NULL, 0};
	static const lshard_device_callbacks device = LSHARD_DEVICE_CALLBACKS_INIT;
	static const lshard_memory_source source = {sizeof source, lend, take_back, NULL};
	static const lshard_plan_input input = LSHARD_PLAN_INPUT_INIT;
	static const lshard_plan_result plan = LSHARD_PLAN_RESULT_INIT;
	static const lshard_stats stats = LSHARD_STATS_INIT;
	static const lshard_range range = LSHARD_RANGE_INIT;
	static const lshard_transport_information transport = LSHARD_TRANSPORT_INFORMATION_INIT;
	static const lshard_variable variable = LSHARD_VARIABLE_INIT;
	static const lshard_node node = LSHARD_NODE_INIT;
	static const lshard_discovered discovered = LSHARD_DISCOVERED_INIT;
	const lshard_group_options group = alone();
	const lshard_series_options series = one_layer();
	const struct sized all[] = {
		SIZED(lshard_group_options, &group, rejoin, use_group_options, false),
		SIZED(lshard_bootstrap, &bootstrap, user, use_bootstrap, false),
		SIZED(lshard_allocator, &allocator, user, use_allocator, false),
		SIZED(lshard_callbacks, &callbacks, roll_calls, use_callbacks, false),
		SIZED(lshard_device_callbacks, &device, capturing, use_device, false),
		SIZED(lshard_series_options, &series, poison_pattern_struct_size, use_series_options, false),
		SIZED(lshard_memory_source, &source, user, use_memory_source, false),
		SIZED(lshard_plan_input, &input, large_page_bytes, use_plan_input, false),
		SIZED(lshard_plan_result, &plan, captured_pass_ns, use_plan_result, true),
		SIZED(lshard_stats, &stats, numa_copy_bytes, use_stats, true),
		SIZED(lshard_range, &range, row_bytes, use_range, true),
		SIZED(lshard_transport_information, &transport, memory, use_transport, true),
		SIZED(lshard_variable, &variable, help, use_variable, true),
		SIZED(lshard_node, &node, processors, use_node, true),
		SIZED(lshard_discovered, &discovered, job, use_discovered, true),
	};

	(void)state;
	for (size_t i = 0; i < sizeof all / sizeof *all; i++)
		try_sized(&all[i]);
}

static void try_element(const void *ours, size_t known, size_t earlier,
			lshard_status (*use)(const void *theirs, size_t bytes))
{
	const size_t later = known + 2 * sizeof(size_t);
	struct other other = other_version(ours, known, later);

	assert_int_equal(use(ours, earlier), LSHARD_OK);
	assert_int_equal(use(ours, known), LSHARD_OK);
	assert_int_equal(use(other.bytes, later), LSHARD_OK);
	other.bytes[later - 1] = 1;
	assert_int_equal(use(other.bytes, later), LSHARD_ERR_INVALID);
	assert_int_equal(use(other.bytes, known + 1), LSHARD_ERR_INVALID);
	assert_int_equal(use(other.bytes, 0), LSHARD_ERR_INVALID);
}

static void structs_in_arrays_may_be_of_another_version(void **state)
{
	const lshard_poison_pattern none = {NULL, 0};

	(void)state;
	try_element(&tensor, sizeof tensor, WITHOUT(lshard_tensor, column_bytes), use_tensors);
	try_element(&none, sizeof none, WITHOUT(lshard_poison_pattern, bytes), use_pattern);
}

/* ---- What is said, and what is there ---- */

static void a_refusal_says_which_struct_and_why(void **state)
{
	struct {
		lshard_group_options options;
		size_t unknown;
	} later = {alone(), 1};
	char error[256] = "";
	lshard_group *group = NULL;

	(void)state;
	later.options.struct_size = sizeof later;
	later.options.error = error;
	later.options.error_bytes = sizeof error;
	assert_int_equal(lshard_group_create(&later.options, &group), LSHARD_ERR_INVALID);
	assert_non_null(strstr(error, "lshard_group_options"));
	assert_non_null(strstr(error, "older than the program's header"));
}

/* What the program's header does not have is as if it had been left alone, and what it has is taken. */
static void what_an_earlier_header_lacks_has_its_default(void **state)
{
	lshard_plan_input input = LSHARD_PLAN_INPUT_INIT;
	lshard_plan_result result = LSHARD_PLAN_RESULT_INIT;
	lshard_series_options options = one_layer();

	(void)state;
	options.layer_count = 4;
	options.resident_bytes = UINT64_MAX;
	input.size = 2;
	assert_int_equal(lshard_plan(&options, &input, &result), LSHARD_OK);
	assert_int_equal(result.residents, 2);
	options.struct_size = offsetof(lshard_series_options, resident_bytes);
	assert_int_equal(lshard_plan(&options, &input, &result), LSHARD_OK);
	assert_int_equal(result.residents, 0);
	assert_int_equal(result.windows, 2);
}

static void a_stripe_that_cannot_be_told_leaves_the_address(void **state)
{
	const lshard_group_options group_options = alone();
	lshard_series_options options = one_layer();
	lshard_range range = LSHARD_RANGE_INIT;
	void *address = &range;
	lshard_series *series = NULL;
	lshard_group *group = NULL;

	(void)state;
	options.placement = LSHARD_STRIPED;
	assert_int_equal(lshard_group_create(&group_options, &group), LSHARD_OK);
	assert_int_equal(lshard_series_create(group, &options, &series), LSHARD_OK);
	range.struct_size = 3;
	assert_int_equal(lshard_series_stripe(series, 0, 0, &address, &range), LSHARD_ERR_INVALID);
	assert_non_null(strstr(lshard_series_error(series), "lshard_range"));
	assert_ptr_equal(address, &range);
	range.struct_size = sizeof range;
	assert_int_equal(lshard_series_stripe(series, 0, 0, &address, &range), LSHARD_OK);
	assert_int_equal(range.end, 4);
	assert_int_equal(lshard_series_destroy(series), LSHARD_OK);
	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(structs_that_say_their_size_may_be_of_another_version),
		cmocka_unit_test(structs_in_arrays_may_be_of_another_version),
		cmocka_unit_test(a_refusal_says_which_struct_and_why),
		cmocka_unit_test(what_an_earlier_header_lacks_has_its_default),
		cmocka_unit_test(a_stripe_that_cannot_be_told_leaves_the_address),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
