/* SPDX-License-Identifier: Apache-2.0
 *
 * agree.c - the ranks compare their descriptions of a series, field by field, before anything is allocated.
 * Knows: options and the control channel. A difference is told on every rank with the same words.
 */
#include "internal.h"

#include <stdio.h>
#include <string.h>

#define TENSORS_PER_PAGE 8

/* A tensor's description as it travels. */
struct tensor_record {
	char name[64];
	uint64_t bytes, alignment, stripe, rows, column_bytes;
};

struct tensor_page {
	struct tensor_record tensors[TENSORS_PER_PAGE];
};

_Static_assert(sizeof(struct tensor_page) <= LSHARD_EXCHANGE_BYTES, "a page of tensors fits one exchange");

/*
 * The fields of a series as they travel in a record; from FIELD_PREFETCH on they must agree only where transfers go in
 * step.
 */
enum { FIELD_PREFETCH = 6 };

static const char *const field_names[RECORD_VALUES] = {"first_layer",   "layer_count", "placement", "tensor_count",
						       "memory_source", "poison",      "prefetch",  "resident_bytes"};

static lshard_status differ(lshard_error *error, const char *series, const char *field, int32_t rank, uint64_t first,
			    uint64_t other)
{
	return lshard_fail(error, LSHARD_ERR_MISMATCH, "series '%s': %s is %llu on rank 0 and %llu on rank %d", series,
			   field, (unsigned long long)first, (unsigned long long)other, rank);
}

static lshard_status agree_on_fields(lshard_group *group, const lshard_series_options *options, lshard_status mine,
				     lshard_error *error)
{
	struct call_record record = {.outcome.status = mine,
				     .step = STEP_CREATE,
				     .number = group->n_created,
				     .values = {options->first_layer, options->layer_count, options->placement,
						options->tensor_count, options->memory_source != NULL,
						options->poison != LSHARD_POISON_OFF, options->prefetch,
						options->resident_bytes}};
	const int compared = group_collective(group) ? RECORD_VALUES : FIELD_PREFETCH;
	const struct lshard__record_set set = group_records(group, group->records, sizeof record, 0);
	lshard_status status;

	strcpy(record.series, options->name);
	status = group_agree_all(group, record, error);
	for (int field = 0; field < compared && status >= 0; field++) {
		const size_t offset = offsetof(struct call_record, values) + (size_t)field * sizeof *record.values;
		const int32_t other = lshard__first_differing(&set, offset, sizeof *record.values);

		if (other >= 0)
			status = differ(error, options->name, field_names[field], other,
					group->records[0].values[field], group->records[other].values[field]);
	}
	return status;
}

static lshard_status compare_tensors(const char *series, const struct tensor_record *first,
				     const struct tensor_record *other, int32_t rank, lshard_error *error)
{
	const struct {
		const char *name;
		uint64_t first, other;
	} fields[] = {
		{"bytes", first->bytes, other->bytes},
		{"alignment", first->alignment, other->alignment},
		{"stripe", first->stripe, other->stripe},
		{"rows", first->rows, other->rows},
		{"column_bytes", first->column_bytes, other->column_bytes},
	};
	char field[96];

	if (strcmp(first->name, other->name) != 0)
		return lshard_fail(error, LSHARD_ERR_MISMATCH,
				   "series '%s': a tensor is named '%s' on rank 0 and '%s' on rank %d", series,
				   first->name, other->name, rank);
	for (size_t index = 0; index < sizeof fields / sizeof *fields; index++) {
		if (fields[index].first == fields[index].other)
			continue;
		snprintf(field, sizeof field, "%s of tensor '%s'", fields[index].name, first->name);
		return differ(error, series, field, rank, fields[index].first, fields[index].other);
	}
	return LSHARD_OK;
}

static void fill_page(struct tensor_page *page, const lshard_series_options *options, uint32_t begin)
{
	memset(page, 0, sizeof *page);
	for (uint32_t index = 0; index < TENSORS_PER_PAGE && begin + index < options->tensor_count; index++) {
		const lshard_tensor tensor = options_tensor(options, begin + index);
		struct tensor_record *record = &page->tensors[index];

		strcpy(record->name, tensor.name);
		record->bytes = tensor.bytes;
		record->alignment = tensor.alignment;
		record->stripe = tensor.stripe;
		record->rows = tensor.rows;
		record->column_bytes = tensor.column_bytes;
	}
}

static lshard_status agree_on_page(lshard_group *group, const lshard_series_options *options, uint32_t begin,
				   struct tensor_page *pages, lshard_error *error)
{
	lshard_transport *transport = group->transport;
	struct tensor_page page;
	lshard_status status;

	fill_page(&page, options, begin);
	status = transport->ops->exchange(transport, &page, pages, sizeof page, group->alive);
	if (status < 0)
		return lshard_fail(error, status, "rank %d, series '%s', lshard_series_create, comparing tensors: %s",
				   group->context.rank, options->name, transport->error.text);
	if (memchr(group->alive, 0, (size_t)group->context.size))
		return group_fail_missing(group, options->name, "lshard_series_create, comparing tensors", error);
	for (uint32_t index = 0; index < TENSORS_PER_PAGE; index++)
		for (int32_t rank = 1; rank < group->context.size && status >= 0; rank++)
			status = compare_tensors(options->name, &pages[0].tensors[index], &pages[rank].tensors[index],
						 rank, error);
	return status;
}

lshard_status agree_on_series(lshard_group *group, const lshard_series_options *options, lshard_status mine,
			      lshard_error *error)
{
	struct tensor_page *pages = group_allocate(group, (size_t)group->context.size * sizeof *pages);
	lshard_status status;

	if (!pages && mine >= 0)
		mine = lshard_fail(error, LSHARD_ERR_NO_MEMORY,
				   "rank %d, series '%s': no memory to compare it with %d ranks", group->context.rank,
				   options->name, group->context.size);
	status = agree_on_fields(group, options, mine, error);
	for (uint32_t begin = 0; begin < options->tensor_count && status >= 0; begin += TENSORS_PER_PAGE)
		status = agree_on_page(group, options, begin, pages, error);
	group_release(group, pages);
	return status;
}
