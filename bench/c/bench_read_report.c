/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_read_report.c - the result of `bench read` as a table and as JSON.
 *
 *   GB/s        10^9 bytes a second, of the median and of the fastest round
 *   to private  a round's time with private memory in the same pages divided by the row's: medians
 *   to small    the same of private memory in small pages
 *
 * Knows: the samples. Does not know: how they were taken.
 */
#include "bench_read.h"
#include "bench_save.h"
#include "cli.h"

#include <stdlib.h>
#include <string.h>

#define COMMAND "read"

struct read_row {
	struct bench_spread ns;
	double to_private; /* 0: there is none, or it is that itself */
	double to_small;
};

struct read_result {
	const struct read_bench *bench;
	struct read_row rows[READ_WORKS][READ_VARIANTS];
	double *scratch; /* [rounds] */
};

/* ---- Figures --------------------------------------------------------------------------------------------------- */

static bool is_there(const struct read_bench *bench, uint32_t variant)
{
	return !*bench->shared->pages[variant].missing;
}

static double ratio_of(const struct read_result *result, uint32_t work, uint32_t variant, uint32_t base)
{
	const struct read_bench *bench = result->bench;

	if (variant == base || !is_there(bench, base))
		return 0;
	for (uint32_t round = 0; round < bench->options.rounds; round++)
		result->scratch[round] =
			read_sample_at(bench, work, base, round)->ns / read_sample_at(bench, work, variant, round)->ns;
	return bench_spread_of(result->scratch, bench->options.rounds).median;
}

static void evaluate(struct read_result *result, uint32_t work, uint32_t variant)
{
	struct read_row *row = &result->rows[work][variant];

	if (!is_there(result->bench, variant))
		return;
	for (uint32_t round = 0; round < result->bench->options.rounds; round++)
		result->scratch[round] = read_sample_at(result->bench, work, variant, round)->ns;
	row->ns = bench_spread_of(result->scratch, result->bench->options.rounds);
	row->to_private =
		ratio_of(result, work, variant, read_is_large(variant) ? READ_PRIVATE_LARGE : READ_PRIVATE_SMALL);
	row->to_small = ratio_of(result, work, variant, READ_PRIVATE_SMALL);
}

/* What the targets are of. */
static const struct read_row *target_row(const struct read_result *result)
{
	return &result->rows[READ_SUM_ONE][READ_SHARED_LARGE];
}

static double gigabytes(const struct read_result *result, double ns)
{
	return (double)result->bench->options.bytes / ns;
}

static const char *work_name(uint32_t work)
{
	return read_is_product(work) ? "product" : "sum";
}

static uint32_t cores_of(const struct read_bench *bench, uint32_t work)
{
	return read_is_by_all(work) ? bench->shared->cores : 1;
}

/* ---- The table ------------------------------------------------------------------------------------------------- */

static void add_ratio(struct cli_table *table, double ratio)
{
	if (ratio > 0)
		cli_table_cell(table, "%.2fx", ratio);
	else
		cli_table_cell(table, "-");
}

static void page_text(uint32_t variant, char *text, size_t bytes)
{
	const unsigned long long page = read_page_bytes(variant);

	snprintf(text, bytes, page < 1u << 20 ? "%llu KiB" : "%llu MiB", page < 1u << 20 ? page >> 10 : page >> 20);
}

static void add_row(struct cli_table *table, const struct read_result *result, uint32_t work, uint32_t variant)
{
	const struct read_row *row = &result->rows[work][variant];
	char pages[32];

	page_text(variant, pages, sizeof pages);
	cli_table_cell(table, "%s", work_name(work));
	cli_table_cell(table, "%u", cores_of(result->bench, work));
	cli_table_cell(table, "%s", read_memory_name(result->bench, variant));
	cli_table_cell(table, "%s", pages);
	cli_table_cell(table, "%.2f", gigabytes(result, row->ns.median));
	cli_table_cell(table, "%.2f", gigabytes(result, row->ns.least));
	add_ratio(table, row->to_private);
	add_ratio(table, row->to_small);
}

static const char *kind_of(const struct read_pages *pages)
{
	if (pages->large_bytes == 0)
		return "in small pages";
	return pages->reserved_bytes > 0 ? "in large pages that were reserved (hugetlb)"
					 : "in large pages that the kernel made (transparent)";
}

static void print_pages(const struct read_bench *bench, uint32_t variant)
{
	const struct read_pages *pages = &bench->shared->pages[variant];
	const char *memory = read_memory_name(bench, variant);
	char page[32];

	page_text(variant, page, sizeof page);
	if (*pages->missing)
		cli_paragraph(stdout, 2, "  %s, %s: not to be had: %s", memory, page, pages->missing);
	else
		cli_paragraph(stdout, 2, "  %s, %s: all of it %s", memory, page, kind_of(pages));
}

static void print_settings(void)
{
	char enabled[64];
	char shmem[64];
	char reserved[64];

	read_setting(READ_SETTING_PRIVATE, enabled, sizeof enabled);
	read_setting(READ_SETTING_SHARED, shmem, sizeof shmem);
	read_setting(READ_SETTING_RESERVED, reserved, sizeof reserved);
	cli_paragraph(stdout, 2, "  settings: transparent_hugepage/enabled %s, shmem_enabled %s; vm.nr_hugepages %s",
		      enabled, shmem, reserved);
}

static void print_head(const struct read_bench *bench)
{
	cli_paragraph(stdout, 0,
		      "%llu MiB of weights read by a rank: its own (private), and those of a series whose source is "
		      "another rank (%s). Transport: %s.%s",
		      (unsigned long long)(bench->options.bytes >> 20),
		      bench->shared->in_place ? "shared: where the source has them" : "window: a copy of them",
		      bench->shared->transport,
		      bench->options.scatter ? " Small pages were touched in no order first." : "");
	printf("Medians of %u rounds, each in a new order; every result and every byte is the\n"
	       "same in all of them.\n"
	       "  sum: of all words; product: of matrices and a vector by cblas_sgemv;\n"
	       "  best: of the fastest round; to private: speed to that of private memory in\n"
	       "  the same pages; to small: to that of private memory in pages of %llu KiB\n\n",
	       bench->options.rounds, (unsigned long long)(read_page_bytes(READ_PRIVATE_SMALL) >> 10));
}

/* Also what is not asked for. */
static bool meets(double found, double least)
{
	return found >= least;
}

static void print_target(const char *what, double found, double least)
{
	if (least <= 0)
		return;
	if (found > 0)
		printf("%s: %.2fx, target at least %g: %s\n", what, found, least,
		       meets(found, least) ? "met" : "NOT met");
	else
		printf("%s: not measured, target at least %g\n", what, least);
}

static bool print_table(const struct read_result *result)
{
	const struct read_bench *bench = result->bench;
	struct cli_table *table = cli_table_create("<work|cores|<memory|pages|GB/s|best|to private|to small");
	bool good;

	if (!table)
		return false;
	for (uint32_t work = 0; work < READ_WORKS; work++)
		for (uint32_t variant = 0; variant < READ_VARIANTS; variant++)
			if (is_there(bench, variant))
				add_row(table, result, work, variant);
	print_head(bench);
	good = cli_table_print(table, stdout);
	cli_table_destroy(table);
	printf("\nWhat the kernel says of their pages:\n");
	for (uint32_t variant = 0; variant < READ_VARIANTS; variant++)
		print_pages(bench, variant);
	print_settings();
	print_target("one core's sum, large pages, to private ones", target_row(result)->to_private,
		     bench->options.least_to_large);
	print_target("one core's sum, large pages, to private small ones", target_row(result)->to_small,
		     bench->options.least_to_small);
	return good;
}

/* ---- JSON ------------------------------------------------------------------------------------------------------ */

static json_t *ratio_json(double ratio)
{
	return ratio > 0 ? json_real(ratio) : json_null();
}

static json_t *row_json(const struct read_result *result, uint32_t work, uint32_t variant)
{
	const struct read_row *row = &result->rows[work][variant];

	return json_pack("{s:s, s:i, s:s, s:I, s:o, s:f, s:f, s:o, s:o}", "work", work_name(work), "cores",
			 (int)cores_of(result->bench, work), "memory", read_memory_name(result->bench, variant),
			 "page_bytes", (json_int_t)read_page_bytes(variant), "ns", bench_spread_json(&row->ns),
			 "gigabytes_per_s", gigabytes(result, row->ns.median), "best_gigabytes_per_s",
			 gigabytes(result, row->ns.least), "to_private", ratio_json(row->to_private), "to_small",
			 ratio_json(row->to_small));
}

/* NULL, which makes the whole NULL, when memory ran out. */
static json_t *rows_json(const struct read_result *result)
{
	json_t *rows = json_array();

	for (uint32_t work = 0; work < READ_WORKS; work++)
		for (uint32_t variant = 0; variant < READ_VARIANTS; variant++)
			if (is_there(result->bench, variant) &&
			    json_array_append_new(rows, row_json(result, work, variant)) != 0) {
				json_decref(rows);
				return NULL;
			}
	return rows;
}

static json_t *memories_json(const struct read_bench *bench)
{
	json_t *memories = json_array();

	for (uint32_t variant = 0; variant < READ_VARIANTS; variant++) {
		const struct read_pages *pages = &bench->shared->pages[variant];

		json_array_append_new(memories,
				      json_pack("{s:s, s:I, s:I, s:I, s:o}", "memory", read_memory_name(bench, variant),
						"page_bytes", (json_int_t)read_page_bytes(variant), "large_bytes",
						(json_int_t)pages->large_bytes, "reserved_bytes",
						(json_int_t)pages->reserved_bytes, "missing",
						*pages->missing ? cli_json_text(pages->missing, strlen(pages->missing))
								: json_null()));
	}
	return memories;
}

static json_t *setting_json(const char *path)
{
	char text[64];

	read_setting(path, text, sizeof text);
	return cli_json_text(text, strlen(text));
}

static json_t *target_json(double found, double least)
{
	return json_pack("{s:o, s:o, s:o}", "least", ratio_json(least), "found", ratio_json(found), "met",
			 least > 0 ? json_boolean(meets(found, least)) : json_null());
}

static json_t *result_json(const struct read_result *result)
{
	const struct read_bench *bench = result->bench;
	const struct read_options *options = &bench->options;

	return json_pack("{s:s, s:s, s:I, s:i, s:i, s:s, s:b, s:b, s:b, s:{s:o, s:o, s:o}, s:o, s:o, s:o, s:o}",
			 "schema", "layershard-bench-read/1", "bench", "read", "bytes", (json_int_t)options->bytes,
			 "columns", (int)READ_COLUMNS, "rounds", (int)options->rounds, "transport",
			 bench->shared->transport, "in_place", bench->shared->in_place, "scattered", options->scatter,
			 "bits_checked", 1, "settings", "enabled", setting_json(READ_SETTING_PRIVATE), "shmem_enabled",
			 setting_json(READ_SETTING_SHARED), "nr_hugepages", setting_json(READ_SETTING_RESERVED),
			 "to_large", target_json(target_row(result)->to_private, options->least_to_large), "to_small",
			 target_json(target_row(result)->to_small, options->least_to_small), "memories",
			 memories_json(bench), "rows", rows_json(result));
}

/* ---- Both ------------------------------------------------------------------------------------------------------ */

static bool show(const struct read_result *result)
{
	const struct read_options *options = &result->bench->options;
	json_t *root = options->json || options->save ? result_json(result) : NULL;
	const bool saved = !options->save || bench_save(options->save, options->argc, options->argv, NULL, root);

	if (options->json)
		return cli_json_print(root) == CLI_DONE && saved;
	json_decref(root);
	if (!print_table(result)) {
		cli_message(COMMAND ": no memory to print the result");
		return false;
	}
	return cli_flush_output() && saved;
}

static int check_targets(const struct read_result *result)
{
	const struct read_options *options = &result->bench->options;
	const struct read_row *row = target_row(result);
	const bool measured = (options->least_to_large <= 0 || row->to_private > 0) &&
			      (options->least_to_small <= 0 || row->to_small > 0);

	if (!measured) {
		cli_message(COMMAND ": inconclusive: the targets are of large pages, which are not to be had");
		return CLI_INCONCLUSIVE;
	}
	if (meets(row->to_private, options->least_to_large) && meets(row->to_small, options->least_to_small))
		return CLI_DONE;
	cli_message(COMMAND ": large pages of the series are read at %.2f of the speed of private ones, and at %.2f of "
			    "that of small ones",
		    row->to_private, row->to_small);
	return CLI_FAILED;
}

int read_report(const struct read_bench *bench)
{
	struct read_result result = {.bench = bench};
	bool shown;

	result.scratch = calloc(bench->options.rounds, sizeof *result.scratch);
	if (!result.scratch) {
		cli_message(COMMAND ": no memory for the result");
		return CLI_FAILED;
	}
	for (uint32_t work = 0; work < READ_WORKS; work++)
		for (uint32_t variant = 0; variant < READ_VARIANTS; variant++)
			evaluate(&result, work, variant);
	free(result.scratch);
	shown = show(&result);
	return shown ? check_targets(&result) : CLI_FAILED;
}
