/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_calls.c - `layershard-bench calls`: what reach and wait cost together when there is nothing to transfer.
 *
 * All series are open at once; every round times each of them once, in a new order, on rank 0, while the other ranks
 * are idle. Every byte is compared before the first and after the last round.
 */
#include "bench_calls.h"
#include "bench_save.h"
#include "cli.h"

#include <layershard/plan.h>

#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#define PAIRS_PER_SAMPLE 65536u /* a multiple of every layer count */
#define HELD_LAYER       1u     /* rank 0 is not its source */
#define ROWS_MOST        ((2 * CALLS_SIZES + 1) * CALLS_COUNTS)
#define ROUNDS_LEAST     9u
#define ROUNDS_MOST      10000u

struct calls_bench {
	double most_ns;
	uint32_t rounds;
	bool json;
	const char *save; /* NULL: nowhere */
	struct calls_row rows[ROWS_MOST];
	uint32_t row_count;
	double *samples[ROWS_MOST]; /* [rounds] ns per pair */
	struct bench_spread spread[ROWS_MOST];
	char no_shm[256]; /* why the rows of shm are missing */
	char failure[768];
};

static const char *const kind_texts[] = {"resident", "held in its window", "in place at its source"};
static const char *const kind_names[] = {"stored", "held", "direct"};

/* ---- Measuring ----------------------------------------------------------------------------------------------- */

static int call_pairs(lshard_series *series, uint32_t first, uint32_t layers, uint32_t passes)
{
	int failed = 0;

	for (uint32_t pass = 0; pass < passes; pass++)
		for (uint32_t layer = first; layer < first + layers; layer++)
			failed |= (int)lshard_reach(series, layer, NULL) | (int)lshard_wait(series, layer, NULL);
	return failed;
}

static bool time_row(struct calls_bench *bench, uint32_t index, double *ns)
{
	const struct calls_row *row = &bench->rows[index];
	const uint32_t first = row->kind == CALLS_HELD ? HELD_LAYER : 0;
	const uint32_t layers = row->kind == CALLS_HELD ? 1 : row->layers;
	const uint64_t begin = bench_now_ns();
	const int failed = call_pairs(row->series, first, layers, PAIRS_PER_SAMPLE / layers);

	*ns = (double)(bench_now_ns() - begin) / PAIRS_PER_SAMPLE;
	if (failed)
		snprintf(bench->failure, sizeof bench->failure, "%s", lshard_series_error(row->series));
	return !failed;
}

static bool compare_rows(struct calls_bench *bench)
{
	for (uint32_t index = 0; index < bench->row_count; index++) {
		const struct calls_row *row = &bench->rows[index];
		int64_t wrong;
		const lshard_status status = bench_compare_series(row->series, row->layers, CALLS_LAYER_BYTES, &wrong);

		if (status == LSHARD_OK && wrong < 0)
			continue;
		if (status != LSHARD_OK)
			snprintf(bench->failure, sizeof bench->failure, "%s", lshard_series_error(row->series));
		else
			snprintf(bench->failure, sizeof bench->failure,
				 "wrong bits: layer %lld of %u on %s with %d ranks is not what its source wrote",
				 (long long)wrong, row->layers, row->transport, row->ranks);
		return false;
	}
	return true;
}

static bool time_round(struct calls_bench *bench, uint32_t *order, uint32_t round, uint64_t *random)
{
	double warm_up;

	bench_shuffle(order, bench->row_count, random);
	for (uint32_t i = 0; i < bench->row_count; i++) {
		if (round == 0 && !time_row(bench, order[i], &warm_up))
			return false;
		if (!time_row(bench, order[i], &bench->samples[order[i]][round]))
			return false;
	}
	return true;
}

/* On rank 0 with all other ranks idle. A failure is in bench->failure. */
static void measure(void *user)
{
	struct calls_bench *bench = user;
	uint32_t order[ROWS_MOST];
	uint64_t random = 1;

	for (uint32_t index = 0; index < bench->row_count; index++)
		order[index] = index;
	if (!compare_rows(bench))
		return;
	for (uint32_t round = 0; round < bench->rounds; round++) {
		cli_progress("calls: round %u of %u", round + 1, bench->rounds);
		if (!time_round(bench, order, round, &random))
			break;
	}
	cli_progress_erase();
	if (!*bench->failure && compare_rows(bench))
		for (uint32_t index = 0; index < bench->row_count; index++)
			bench->spread[index] = bench_spread_of(bench->samples[index], bench->rounds);
}

/* ---- Reporting ----------------------------------------------------------------------------------------------- */

static double worst_median(const struct calls_bench *bench)
{
	double worst = 0;

	for (uint32_t index = 0; index < bench->row_count; index++)
		if (bench->spread[index].median > worst)
			worst = bench->spread[index].median;
	return worst;
}

static bool print_table(const struct calls_bench *bench)
{
	struct cli_table *table = cli_table_create("<transport|<the layer is|ranks|layers|median ns|min|max");
	bool good;

	if (!table) {
		cli_message("calls: no memory for the table");
		return false;
	}
	for (uint32_t index = 0; index < bench->row_count; index++) {
		const struct calls_row *row = &bench->rows[index];
		const struct bench_spread *ns = &bench->spread[index];

		cli_table_cell(table, "%s", row->transport);
		cli_table_cell(table, "%s", kind_texts[row->kind]);
		cli_table_cell(table, "%d", row->ranks);
		cli_table_cell(table, "%u", row->layers);
		cli_table_cell(table, "%.1f", ns->median);
		cli_table_cell(table, "%.1f", ns->least);
		cli_table_cell(table, "%.1f", ns->most);
	}
	cli_paragraph(
		stdout, 0,
		"reach + wait with nothing to transfer, nanoseconds for both together; %u rounds in shuffled order, "
		"%u pairs a sample, every byte of every layer compared before and after.",
		bench->rounds, PAIRS_PER_SAMPLE);
	printf("\n");
	good = cli_table_print(table, stdout);
	cli_table_destroy(table);
	if (*bench->no_shm)
		cli_paragraph(stdout, 0, "shm is not in the table: %s", bench->no_shm);
	printf("\nslowest median %.1f ns, target at most %.0f ns: %s\n", worst_median(bench), bench->most_ns,
	       worst_median(bench) <= bench->most_ns ? "met" : "NOT met");
	return good && cli_flush_output();
}

static json_t *row_json(const struct calls_bench *bench, uint32_t index)
{
	const struct calls_row *row = &bench->rows[index];

	return json_pack("{s:s, s:s, s:i, s:i, s:o}", "transport", row->transport, "case", kind_names[row->kind],
			 "ranks", (int)row->ranks, "layers", (int)row->layers, "ns",
			 bench_spread_json(&bench->spread[index]));
}

static json_t *result_json(const struct calls_bench *bench)
{
	json_t *rows = json_array();

	for (uint32_t index = 0; index < bench->row_count; index++)
		if (json_array_append_new(rows, row_json(bench, index)) != 0)
			break;
	if (json_array_size(rows) != bench->row_count) {
		json_decref(rows);
		rows = NULL; /* makes root NULL, and that is told */
	}
	return json_pack("{s:s, s:s, s:i, s:f, s:f, s:b, s:b, s:s, s:o}", "schema", "layershard-bench-calls/1", "bench",
			 "calls", "rounds", (int)bench->rounds, "max_ns", bench->most_ns, "slowest_ns",
			 worst_median(bench), "met", worst_median(bench) <= bench->most_ns, "bits_checked", 1, "no_shm",
			 bench->no_shm, "rows", rows);
}

static bool save(const struct calls_bench *bench, int argc, char **argv)
{
	json_t *result = bench->save ? result_json(bench) : NULL;
	const bool good = !bench->save || bench_save(bench->save, argc, argv, NULL, result);

	json_decref(result);
	return good;
}

static int report(const struct calls_bench *bench, int argc, char **argv)
{
	const bool saved = save(bench, argc, argv);

	if (!(bench->json ? cli_json_print(result_json(bench)) == CLI_DONE : print_table(bench)) || !saved)
		return CLI_FAILED;
	if (worst_median(bench) <= bench->most_ns)
		return CLI_DONE;
	cli_message("calls: reach + wait took %.1f ns, more than %.0f ns", worst_median(bench), bench->most_ns);
	return CLI_FAILED;
}

/* ---- Options and the run ------------------------------------------------------------------------------------- */

static int print_help(void)
{
	printf("Usage: layershard-bench calls [OPTION]...\n\n"
	       "The cost of lshard_reach and lshard_wait together when there is nothing to\n"
	       "transfer: the layer is resident, is held in its window, or is computed from\n"
	       "where its source stores it. For 8 to 8192 layers of %u bytes; 2, 8 and 64 ranks\n"
	       "as threads (local), 2 processes (shm). Only rank 0 calls; the others are idle.\n\n"
	       "  --max-ns N   exit status 1 when a median is above N nanoseconds (default 200)\n"
	       "  --rounds R   samples of each row, at least %u (default %u)\n"
	       "  --json       one JSON object instead of the table\n"
	       "  --save FILE  also write it to FILE, with machine, date, command and version\n"
	       "  -h, --help   this text\n\n" CLI_EXIT_HELP CLI_EXIT_HELP_INCONCLUSIVE,
	       CALLS_LAYER_BYTES, ROUNDS_LEAST, ROUNDS_LEAST);
	return cli_flush_output() ? CLI_DONE : CLI_FAILED;
}

enum { OPTION_MAX_NS = 256, OPTION_ROUNDS, OPTION_JSON, OPTION_SAVE };

static const struct option long_options[] = {{"max-ns", required_argument, NULL, OPTION_MAX_NS},
					     {"rounds", required_argument, NULL, OPTION_ROUNDS},
					     {"json", no_argument, NULL, OPTION_JSON},
					     {"save", required_argument, NULL, OPTION_SAVE},
					     {"help", no_argument, NULL, 'h'},
					     {NULL, 0, NULL, 0}};

/* CLI_DONE: go on. *help: print it and end. */
static int parse_options(int argc, char **argv, struct calls_bench *bench, bool *help)
{
	uint64_t rounds = ROUNDS_LEAST;
	int option;

	while ((option = getopt_long(argc, argv, CLI_OPTSTRING, long_options, NULL)) != -1) {
		if (option == 'h')
			*help = true;
		else if (option == OPTION_JSON)
			bench->json = true;
		else if (option == OPTION_SAVE)
			bench->save = optarg;
		else if (option == OPTION_MAX_NS && !cli_parse_positive(optarg, &bench->most_ns))
			return cli_usage("calls", "--max-ns '%s': a number of nanoseconds above 0 is needed", optarg);
		else if (option == OPTION_ROUNDS && !cli_parse_count(optarg, ROUNDS_LEAST, ROUNDS_MOST, &rounds))
			return cli_usage("calls", "--rounds '%s': a whole number from %u to %u is needed", optarg,
					 ROUNDS_LEAST, ROUNDS_MOST);
		else if (option == '?' || option == ':')
			return cli_bad_option("calls", option, argv);
	}
	if (optind < argc)
		return cli_usage("calls", "'%s' is not expected here", argv[optind]);
	bench->rounds = (uint32_t)rounds;
	if (bench->save && !bench_save_possible("calls", bench->save))
		return CLI_USAGE;
	return CLI_DONE;
}

/* *missing: why shm cannot be had here; "" if it can. */
static void look_for_shm(char *missing, size_t missing_bytes)
{
	lshard_transport_information information = LSHARD_TRANSPORT_INFORMATION_INIT;

	snprintf(missing, missing_bytes, "this build has no shm transport");
	for (uint32_t index = 0; lshard_transport_info(index, &information) == LSHARD_OK; index++)
		if (strcmp(information.name, "shm") == 0)
			snprintf(missing, missing_bytes, "%s", information.available ? "" : information.reason);
}

static bool run_with_threads(struct calls_bench *bench)
{
	struct calls_threads threads = {.measure = measure, .user = bench, .rows = bench->rows};

	bench->row_count += 2 * CALLS_SIZES * CALLS_COUNTS;
	return calls_threads_run(&threads, bench->failure, sizeof bench->failure) && !*bench->failure;
}

/* shm first: the second process must be forked while this one has a single thread. Its rows are printed last. */
static bool run_with_pair(struct calls_bench *bench)
{
	struct calls_pair pair;
	bool good;

	if (!calls_pair_open(&pair, bench->failure, sizeof bench->failure))
		return false;
	for (unsigned count = 0; count < CALLS_COUNTS; count++)
		bench->rows[2 * CALLS_SIZES * CALLS_COUNTS + count] =
			(struct calls_row){CALLS_DIRECT, "shm", 2, calls_counts[count], pair.series[count]};
	bench->row_count = CALLS_COUNTS;
	good = run_with_threads(bench);
	if (!calls_pair_close(&pair) && good) {
		snprintf(bench->failure, sizeof bench->failure, "a rank on shm failed at its end");
		good = false;
	}
	return good;
}

int bench_calls(int argc, char **argv)
{
	struct calls_bench bench = {.most_ns = 200};
	bool help = false;
	double *samples;
	bool good;
	int result = parse_options(argc, argv, &bench, &help);

	if (result != CLI_DONE)
		return result;
	if (help)
		return print_help();
	samples = calloc((size_t)ROWS_MOST * bench.rounds, sizeof *samples);
	if (!samples) {
		cli_message("calls: no memory for the samples");
		return CLI_FAILED;
	}
	for (uint32_t index = 0; index < ROWS_MOST; index++)
		bench.samples[index] = samples + (size_t)index * bench.rounds;
	look_for_shm(bench.no_shm, sizeof bench.no_shm);
	good = *bench.no_shm ? run_with_threads(&bench) : run_with_pair(&bench);
	if (good)
		result = report(&bench, argc, argv);
	else
		cli_message("calls: %s", bench.failure);
	free(samples);
	return good ? result : CLI_FAILED;
}
