/* SPDX-License-Identifier: Apache-2.0
 *
 * matrix.c - goes through the cells of the fault matrix: see matrix.h. Prints each cell that fails, with the command
 * that runs it alone, and how many there were; writes the table of docs/reliability.md.
 */
#include "matrix.h"

#include <getopt.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const char help[] =
	"fault_matrix [OPTION...]: the cells are transport x phase x fault, on a victim that the seed draws\n"
	"  --list          name the cells, run none\n"
	"  --only NUMBER   this cell alone\n"
	"  --every N       each Nth cell, with --seed S beginning at S % N\n"
	"  --seconds S     begin no cell after so long; those left are counted\n"
	"  --seed S        of victims, moments and amounts (1)\n"
	"  --seed date     the same by the days since 1970, which also say where to begin\n"
	"  --table FILE    write what the others saw, as a table\n";

struct choice {
	int list;
	long only;
	long every;
	double seconds;
	unsigned long long seed;
	int by_date;
	const char *table;
};

struct counts {
	int run, failed, not_applicable, left;
};

static int n_cells(void)
{
	return matrix_n_transports * (int)PHASES * (int)FAULTS;
}

static struct cell cell_of(int number, unsigned long long seed)
{
	struct cell cell = {.transport = &matrix_transports[number / (PHASES * FAULTS)],
			    .phase = (enum matrix_phase)(number / FAULTS % PHASES),
			    .fault = (enum matrix_fault)(number % FAULTS)};

	cell.random = (seed * 2654435761u + (unsigned)number) * 6364136223846793005u + 1442695040888963407u;
	cell.victim = (int)((cell.random >> 33) % RANKS);
	return cell;
}

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void print_cell(FILE *to, int number, const struct cell *cell)
{
	fprintf(to, "%d: %s; %s; rank %d: %s", number, cell->transport->name, matrix_phases[cell->phase].name,
		cell->victim, matrix_faults[cell->fault]);
}

/* ---- the table ---- */

/* What an operator would call it. */
static void word_of(const struct outcome *outcome, char *word, size_t bytes)
{
	if (outcome->others == LSHARD_OK)
		snprintf(word, bytes, "nothing");
	else
		snprintf(word, bytes, "%s%s%s", lshard_status_name(outcome->others) + strlen("LSHARD_ERR_"),
			 outcome->named ? "" : " (not named)",
			 outcome->after == GO_ON   ? ", go on"
			 : outcome->after == RETRY ? ", call again"
						   : "");
}

static void write_table(const char *path, const struct outcome *outcomes, const char *was_run)
{
	FILE *file = fopen(path, "w");
	char word[80];

	if (!file) {
		perror(path);
		exit(2);
	}
	fprintf(file, "| phase | fault on one rank |");
	for (int transport = 0; transport < matrix_n_transports; transport++)
		fprintf(file, " %s |", matrix_transports[transport].name);
	fprintf(file, "\n| --- | --- |");
	for (int transport = 0; transport < matrix_n_transports; transport++)
		fprintf(file, " --- |");
	fputc('\n', file);
	for (int row = 0; row < PHASES * FAULTS; row++) {
		int any = 0;

		for (int transport = 0; transport < matrix_n_transports; transport++)
			any |= was_run[transport * PHASES * FAULTS + row];
		if (!any)
			continue;
		fprintf(file, "| %s | %s |", matrix_phases[row / FAULTS].name, matrix_faults[row % FAULTS]);
		for (int transport = 0; transport < matrix_n_transports; transport++) {
			const int number = transport * PHASES * FAULTS + row;

			word_of(&outcomes[number], word, sizeof word);
			fprintf(file, " %s |", was_run[number] ? word : "-");
		}
		fputc('\n', file);
	}
	fclose(file);
}

/* ---- the cells ---- */

static void run_cell(int number, const struct choice *choice, struct counts *counts, struct outcome *outcome)
{
	const struct cell cell = cell_of(number, choice->seed);

	*outcome = cell_run(&cell);
	counts->run++;
	if (!outcome->failed)
		return;
	counts->failed++;
	printf("FAILED ");
	print_cell(stdout, number, &cell);
	printf(": %s\n  alone: fault_matrix --seed %llu --only %d\n", outcome->why, choice->seed, number);
	fflush(stdout);
}

static int is_chosen(const struct choice *choice, int number)
{
	if (choice->only >= 0)
		return number == choice->only;
	return (unsigned long long)number % (unsigned long long)choice->every ==
	       choice->seed % (unsigned long long)choice->every;
}

static struct counts run_all(const struct choice *choice, struct outcome *outcomes, char *was_run)
{
	const double until = seconds() + choice->seconds;
	const int begin = choice->by_date ? (int)(choice->seed * 101 % (unsigned)n_cells()) : 0;
	struct counts counts = {0};

	for (int i = 0; i < n_cells(); i++) {
		const int number = (begin + i) % n_cells();
		const struct cell cell = cell_of(number, choice->seed);

		if (!is_chosen(choice, number))
			continue;
		if (matrix_not_applicable(&cell)) {
			counts.not_applicable++;
		} else if (choice->seconds > 0 && seconds() > until) {
			counts.left++;
		} else {
			run_cell(number, choice, &counts, &outcomes[number]);
			was_run[number] = 1;
		}
	}
	return counts;
}

static void list_all(const struct choice *choice)
{
	for (int number = 0; number < n_cells(); number++) {
		const struct cell cell = cell_of(number, choice->seed);
		const char *why = matrix_not_applicable(&cell);

		if (!is_chosen(choice, number))
			continue;
		print_cell(stdout, number, &cell);
		printf("%s%s\n", why ? " - not applicable: " : "", why ? why : "");
	}
}

/* ---- what is asked ---- */

static void refuse(const char *what, const char *text)
{
	fprintf(stderr, "%s '%s' is no number that it can be\n%s", what, text, help);
	exit(2);
}

static double number_of(const char *what, const char *text, double least)
{
	char *end;
	const double value = strtod(text, &end);

	if (*end || end == text || value < least)
		refuse(what, text);
	return value;
}

static void take_seed(struct choice *choice, const char *text)
{
	choice->by_date = !strcmp(text, "date");
	choice->seed = choice->by_date ? (unsigned long long)(time(NULL) / 86400)
				       : (unsigned long long)number_of("--seed", text, 0);
}

static struct choice read_arguments(int argc, char **argv)
{
	static const struct option options[] = {
		{"list", no_argument, NULL, 'l'},        {"only", required_argument, NULL, 'o'},
		{"every", required_argument, NULL, 'e'}, {"seconds", required_argument, NULL, 's'},
		{"seed", required_argument, NULL, 'r'},  {"table", required_argument, NULL, 't'},
		{"help", no_argument, NULL, 'h'},        {NULL, 0, NULL, 0}};
	struct choice choice = {.only = -1, .every = 1, .seed = 1};
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		switch (option) {
		case 'l':
			choice.list = 1;
			break;
		case 'o':
			choice.only = (long)number_of("--only", optarg, 0);
			break;
		case 'e':
			choice.every = (long)number_of("--every", optarg, 1);
			break;
		case 's':
			choice.seconds = number_of("--seconds", optarg, 0);
			break;
		case 'r':
			take_seed(&choice, optarg);
			break;
		case 't':
			choice.table = optarg;
			break;
		case 'h':
			fputs(help, stdout);
			exit(0);
		default:
			fputs(help, stderr);
			exit(2);
		}
	}
	if (optind < argc || choice.only >= n_cells())
		refuse(optind < argc ? "argument" : "--only", optind < argc ? argv[optind] : "beyond the last");
	return choice;
}

int main(int argc, char **argv)
{
	const struct choice choice = read_arguments(argc, argv);
	struct outcome *outcomes = calloc((size_t)n_cells(), sizeof *outcomes);
	char *was_run = calloc((size_t)n_cells(), 1);
	const double begin = seconds();
	struct counts counts;

	if (!outcomes || !was_run)
		return 2;
	signal(SIGPIPE, SIG_IGN);
	setenv("LAYERSHARD_CUDA_SO_PATH", STUB_CUDA, 0);
	if (choice.list) {
		list_all(&choice);
		return 0;
	}
	printf("seed %llu%s\n", choice.seed, choice.by_date ? ", of this day" : "");
	fflush(stdout);
	counts = run_all(&choice, outcomes, was_run);
	printf("%d cells run in %.0f s: %d passed, %d failed; %d not applicable; %d left for want of time\n",
	       counts.run, seconds() - begin, counts.run - counts.failed, counts.failed, counts.not_applicable,
	       counts.left);
	if (choice.table)
		write_table(choice.table, outcomes, was_run);
	free(outcomes);
	free(was_run);
	return counts.failed > 0 || counts.run == 0;
}
