/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_link_report.c - the result of `bench link` as a table and as JSON.
 *
 *   us      one fetch, of those that follow one another      GB/s   what other ranks sent, 10^9 bytes a second
 *   alone   one fetch by the host's clock, until it is there
 *   of bare the bare copy's time of the same round divided by the fetch's: medians
 *
 * Knows: the samples. Does not know: how they were taken.
 */
#include "bench_link.h"
#include "bench_save.h"
#include "cli.h"

#include <stdlib.h>
#include <string.h>

#define COMMAND "link"

/* Of one variant; of ranks that read at once the slowest counts. Nanoseconds. */
struct variant_figures {
	struct bench_spread each;
	double alone;   /* median */
	uint64_t moved; /* bytes of all readers together */
};

struct row_figures {
	const struct link_row *row;
	const struct link_variant *variant;
	struct variant_figures fetch, bare;
	double share;
	bool in_place; /* nothing moved: the layer is used where it lies */
};

struct link_result {
	const struct link_bench *bench;
	struct row_figures *rows;
	double *scratch; /* [rounds] */
};

/* ---- Figures ------------------------------------------------------------------------------------------------- */

static double slowest(const struct link_bench *bench, uint32_t index, uint32_t round, bool alone)
{
	const struct link_variant *variant = &bench->variants[index];
	double most = 0;

	for (int32_t to = variant->first_to; to < variant->first_to + variant->to_count; to++) {
		const struct link_sample *sample = link_sample_at(bench, index, to, round);
		const double one = alone ? sample->alone_ns : sample->each_ns;

		most = one > most ? one : most;
	}
	return most;
}

static struct bench_spread spread_of(const struct link_result *result, uint32_t index, bool alone)
{
	const uint32_t rounds = result->bench->options.rounds;

	for (uint32_t round = 0; round < rounds; round++)
		result->scratch[round] = slowest(result->bench, index, round, alone);
	return bench_spread_of(result->scratch, rounds);
}

static struct variant_figures figures_of(const struct link_result *result, uint32_t index)
{
	const struct link_variant *variant = &result->bench->variants[index];
	struct variant_figures figures = {.each = spread_of(result, index, false),
					  .alone = spread_of(result, index, true).median};

	for (int32_t to = variant->first_to; to < variant->first_to + variant->to_count; to++)
		figures.moved += link_sample_at(result->bench, index, to, 0)->moved;
	return figures;
}

static double share_of(const struct link_result *result, const struct link_row *row)
{
	const struct link_bench *bench = result->bench;

	for (uint32_t round = 0; round < bench->options.rounds; round++) {
		const double fetch = slowest(bench, row->fetch, round, false);

		result->scratch[round] = fetch > 0 ? slowest(bench, row->bare, round, false) / fetch : 0;
	}
	return bench_spread_of(result->scratch, bench->options.rounds).median;
}

static void evaluate(struct link_result *result, uint32_t index)
{
	const struct link_bench *bench = result->bench;
	struct row_figures *figures = &result->rows[index];

	figures->row = &bench->rows[index];
	figures->variant = &bench->variants[figures->row->bare];
	figures->bare = figures_of(result, figures->row->bare);
	if (figures->row->fetch == LINK_NO_VARIANT)
		return;
	figures->fetch = figures_of(result, figures->row->fetch);
	figures->in_place = figures->fetch.moved == 0;
	figures->share = share_of(result, figures->row);
}

static double gigabytes(const struct variant_figures *figures)
{
	return figures->each.median > 0 ? (double)figures->moved / figures->each.median : 0;
}

/* ---- The table ----------------------------------------------------------------------------------------------- */

static const char *placement_of(const struct link_bench *bench, const struct row_figures *row)
{
	if (row->row->fetch == LINK_NO_VARIANT)
		return "inside";
	return cli_placement_name(bench->options.placements[row->variant->placement]);
}

static void add_ranks(struct cli_table *table, const struct link_variant *variant)
{
	if (variant->from == LINK_ALL)
		cli_table_cell(table, "others");
	else
		cli_table_cell(table, "%d", (int)variant->from);
	if (variant->to_count > 1)
		cli_table_cell(table, "%d..%d", (int)variant->first_to,
			       (int)(variant->first_to + variant->to_count - 1));
	else
		cli_table_cell(table, "%d", (int)variant->first_to);
}

static void add_fetch_cells(struct cli_table *table, const struct row_figures *row)
{
	const bool timed = row->row->fetch != LINK_NO_VARIANT;

	if (!timed || row->in_place) {
		cli_table_cell(table, "%s", timed ? "in place" : "-");
		for (int cell = 0; cell < 3; cell++)
			cli_table_cell(table, "-");
		return;
	}
	cli_table_cell(table, "%.1f", row->fetch.each.median * 1e-3);
	cli_table_cell(table, "%.1f..%.1f", row->fetch.each.least * 1e-3, row->fetch.each.most * 1e-3);
	cli_table_cell(table, "%.1f", row->fetch.alone * 1e-3);
	cli_table_cell(table, "%.2f", gigabytes(&row->fetch));
}

static void add_row(struct cli_table *table, const struct link_bench *bench, const struct row_figures *row)
{
	cli_table_cell(table, "%llu", (unsigned long long)bench->sizes[row->variant->size]);
	cli_table_cell(table, "%s%s", placement_of(bench, row), row->variant->is_readers ? ", at once" : "");
	add_ranks(table, row->variant);
	add_fetch_cells(table, row);
	cli_table_cell(table, "%.1f", row->bare.each.median * 1e-3);
	cli_table_cell(table, "%.1f", row->bare.alone * 1e-3);
	cli_table_cell(table, "%.2f", gigabytes(&row->bare));
	if (row->row->fetch == LINK_NO_VARIANT || row->in_place)
		cli_table_cell(table, "-");
	else
		cli_table_cell(table, "%.1f%%", row->share * 100);
}

static void print_places(const struct link_bench *bench)
{
	for (int32_t rank = 0; rank < bench->options.ranks && bench->options.has_devices; rank++) {
		const struct link_place *place = &bench->shared->places[rank];

		printf("  rank %d: GPU %u, %s, %s\n", (int)rank, bench->options.devices[rank], place->device,
		       place->bus);
	}
}

static void print_head(const struct link_bench *bench)
{
	const struct link_options *options = &bench->options;

	cli_paragraph(stdout, 0,
		      "Layers fetched by lshard_reach and lshard_wait on %d ranks over %s, beside bare copies.",
		      (int)options->ranks, bench->shared->places[0].transport);
	print_places(bench);
	printf("Medians of %u samples in shuffled order; a sample is %u fetches or copies, after %u\n"
	       "that are not timed; every byte compared.\n"
	       "  us: microseconds of one, of those that follow one another; alone: of a\n"
	       "  single one, by the host's clock until it is there; of bare: speed of the\n"
	       "  fetch in %% of the bare copy's; at once: by several readers\n\n",
	       options->rounds, options->iterations, options->warm_up);
}

static bool print_table(const struct link_result *result)
{
	const struct link_bench *bench = result->bench;
	struct cli_table *table = cli_table_create(
		"bytes|<placement|from|to|us|least..most|alone|GB/s|bare us|bare alone|bare GB/s|of bare");
	bool good;

	if (!table)
		return false;
	cli_table_keys(table, 4);
	for (uint32_t index = 0; index < bench->row_count; index++)
		add_row(table, bench, &result->rows[index]);
	print_head(bench);
	good = cli_table_print(table, stdout);
	cli_table_destroy(table);
	return good;
}

/* ---- JSON ---------------------------------------------------------------------------------------------------- */

static json_t *variant_json(const struct variant_figures *figures)
{
	return json_pack("{s:o, s:f, s:I, s:f}", "ns", bench_spread_json(&figures->each), "alone_ns", figures->alone,
			 "moved_bytes", (json_int_t)figures->moved, "gigabytes_per_s", gigabytes(figures));
}

static json_t *row_json(const struct link_bench *bench, const struct row_figures *row)
{
	json_t *object = json_pack("{s:I, s:s, s:b, s:i, s:i, s:i, s:b, s:o}", "bytes",
				   (json_int_t)bench->sizes[row->variant->size], "placement", placement_of(bench, row),
				   "readers", row->variant->is_readers, "from", (int)row->variant->from, "first_to",
				   (int)row->variant->first_to, "to_count", (int)row->variant->to_count, "in_place",
				   row->in_place, "bare", variant_json(&row->bare));

	if (object && row->row->fetch != LINK_NO_VARIANT &&
	    (json_object_set_new(object, "fetch", variant_json(&row->fetch)) != 0 ||
	     json_object_set_new(object, "share", row->in_place ? json_null() : json_real(row->share)) != 0)) {
		json_decref(object);
		return NULL;
	}
	return object;
}

static json_t *rows_json(const struct link_result *result)
{
	json_t *rows = json_array();

	for (uint32_t index = 0; index < result->bench->row_count; index++)
		if (json_array_append_new(rows, row_json(result->bench, &result->rows[index])) != 0) {
			json_decref(rows);
			return NULL;
		}
	return rows;
}

static json_t *gpus_json(const struct link_bench *bench)
{
	json_t *gpus = json_array();

	for (int32_t rank = 0; rank < bench->options.ranks && bench->options.has_devices; rank++) {
		const struct link_place *place = &bench->shared->places[rank];

		json_array_append_new(gpus, json_pack("{s:i, s:i, s:s, s:s, s:i}", "rank", (int)rank, "ordinal",
						      (int)bench->options.devices[rank], "name", place->device, "bus",
						      place->bus, "driver_version", place->driver_version));
	}
	return gpus;
}

static json_t *result_json(const struct link_result *result)
{
	const struct link_options *options = &result->bench->options;

	return json_pack("{s:s, s:s, s:i, s:s, s:i, s:i, s:i, s:b, s:o, s:o}", "schema", "layershard-bench-link/2",
			 "bench", "link", "ranks", (int)options->ranks, "transport",
			 result->bench->shared->places[0].transport, "iters", (int)options->iterations, "warmup",
			 (int)options->warm_up, "rounds", (int)options->rounds, "bits_checked", 1, "gpus",
			 gpus_json(result->bench), "rows", rows_json(result));
}

/* ---- Both ---------------------------------------------------------------------------------------------------- */

static bool show_table(const struct link_result *result)
{
	if (print_table(result))
		return cli_flush_output();
	cli_message(COMMAND ": no memory to print the result");
	return false;
}

static int show(const struct link_result *result, int argc, char **argv)
{
	const struct link_options *options = &result->bench->options;
	json_t *root = options->json || options->save ? result_json(result) : NULL;
	const bool saved = !options->save || bench_save(options->save, argc, argv, gpus_json(result->bench), root);
	bool shown;

	if (options->json) {
		shown = cli_json_print(root) == CLI_DONE;
	} else {
		json_decref(root);
		shown = show_table(result);
	}
	return saved && shown ? CLI_DONE : CLI_FAILED;
}

int link_report(const struct link_bench *bench, int argc, char **argv)
{
	struct link_result result = {.bench = bench};
	int code = CLI_FAILED;

	result.rows = calloc(bench->row_count, sizeof *result.rows);
	result.scratch = calloc(bench->options.rounds, sizeof *result.scratch);
	if (result.rows && result.scratch) {
		for (uint32_t index = 0; index < bench->row_count; index++)
			evaluate(&result, index);
		code = show(&result, argc, argv);
	} else {
		cli_message(COMMAND ": no memory for the result");
	}
	free(result.scratch);
	free(result.rows);
	return code;
}
