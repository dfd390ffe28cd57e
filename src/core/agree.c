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

/* Two that describe a series, for texts. */
struct compared {
	const char *series;
	const char *first; /* "rank 0" */
	int32_t other;
};

static lshard_status differ(lshard_error *error, const struct compared *compared, const char *field, uint64_t first,
			    uint64_t other)
{
	return lshard_fail(error, LSHARD_ERR_MISMATCH, "series '%s': %s is %llu on %s and %llu on rank %d",
			   compared->series, field, (unsigned long long)first, compared->first,
			   (unsigned long long)other, compared->other);
}

static void fill_values(const lshard_series_options *options, uint64_t values[RECORD_VALUES])
{
	const uint64_t filled[RECORD_VALUES] = {
		options->first_layer,  options->layer_count,           options->placement,
		options->tensor_count, options->memory_source != NULL, options->poison != LSHARD_POISON_OFF,
		options->prefetch,     options->resident_bytes};

	memcpy(values, filled, sizeof filled);
}

static lshard_status agree_on_fields(lshard_group *group, const lshard_series_options *options, lshard_status mine,
				     lshard_error *error)
{
	struct call_record record = {.outcome.status = mine, .step = STEP_CREATE, .number = group->n_created};
	const int compared = group_collective(group) ? RECORD_VALUES : FIELD_PREFETCH;
	const struct lshard__record_set set = group_records(group, group->records, sizeof record, 0);
	lshard_status status;

	fill_values(options, record.values);
	strcpy(record.series, options->name);
	status = group_agree_all(group, record, error);
	for (int field = 0; field < compared && status >= 0; field++) {
		const size_t offset = offsetof(struct call_record, values) + (size_t)field * sizeof *record.values;
		const int32_t other = lshard__first_differing(&set, offset, sizeof *record.values);

		if (other >= 0)
			status = differ(error, &(struct compared){options->name, "rank 0", other}, field_names[field],
					group->records[0].values[field], group->records[other].values[field]);
	}
	return status;
}

static lshard_status compare_tensors(const struct compared *compared, const struct tensor_record *first,
				     const struct tensor_record *other, lshard_error *error)
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
				   "series '%s': a tensor is named '%s' on %s and '%s' on rank %d", compared->series,
				   first->name, compared->first, other->name, compared->other);
	for (size_t index = 0; index < sizeof fields / sizeof *fields; index++) {
		if (fields[index].first == fields[index].other)
			continue;
		snprintf(field, sizeof field, "%s of tensor '%s'", fields[index].name, first->name);
		return differ(error, compared, field, fields[index].first, fields[index].other);
	}
	return LSHARD_OK;
}

static void fill_tensor(struct tensor_record *record, const lshard_series_options *options, uint32_t index)
{
	const lshard_tensor tensor = options_tensor(options, index);

	strcpy(record->name, tensor.name);
	record->bytes = tensor.bytes;
	record->alignment = tensor.alignment;
	record->stripe = tensor.stripe;
	record->rows = tensor.rows;
	record->column_bytes = tensor.column_bytes;
}

static void fill_page(struct tensor_page *page, const lshard_series_options *options, uint32_t begin)
{
	memset(page, 0, sizeof *page);
	for (uint32_t index = 0; index < TENSORS_PER_PAGE && begin + index < options->tensor_count; index++)
		fill_tensor(&page->tensors[index], options, begin + index);
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
			status = compare_tensors(&(struct compared){options->name, "rank 0", rank},
						 &pages[0].tensors[index], &pages[rank].tensors[index], error);
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

/* ---- With ranks that live -------------------------------------------------------------------------------------- */

/* What must agree between ranks whose transfers go in no step. */
struct description {
	uint64_t values[FIELD_PREFETCH];
	struct tensor_record tensors[];
};

size_t agree_description_bytes(const lshard_series_options *options)
{
	return sizeof(struct description) + options->tensor_count * sizeof(struct tensor_record);
}

void agree_describe(const lshard_series_options *options, void *made)
{
	struct description *description = made;
	uint64_t values[RECORD_VALUES];

	fill_values(options, values);
	memcpy(description->values, values, sizeof description->values);
	for (uint32_t index = 0; index < options->tensor_count; index++)
		fill_tensor(&description->tensors[index], options, index);
}

lshard_status agree_with_living(const lshard_group *group, const lshard_series_options *options, const void *mine,
				const lshard_recalled *theirs, lshard_error *error)
{
	const struct compared compared = {options->name, "the ranks that live", group->context.rank};
	const struct description *first = theirs->description, *other = mine;
	lshard_status status = LSHARD_OK;

	if (theirs->description_bytes < sizeof *first)
		return lshard_fail(error, LSHARD_ERR_MISMATCH, "series '%s': its description has %llu bytes",
				   options->name, (unsigned long long)theirs->description_bytes);
	for (int field = 0; field < FIELD_PREFETCH && status >= 0; field++)
		if (first->values[field] != other->values[field])
			status = differ(error, &compared, field_names[field], first->values[field],
					other->values[field]);
	if (status >= 0 && theirs->description_bytes != agree_description_bytes(options))
		status = lshard_fail(error, LSHARD_ERR_MISMATCH, "series '%s': its description has %llu bytes",
				     options->name, (unsigned long long)theirs->description_bytes);
	for (uint32_t index = 0; index < options->tensor_count && status >= 0; index++)
		status = compare_tensors(&compared, &first->tensors[index], &other->tensors[index], error);
	return status;
}
