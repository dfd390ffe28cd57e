/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_read_work.c - what `bench read` does with weights: adding them up, and products of matrices and a vector, by
 * one core or by several, each with a part of the rows. Which rows, and so every bit of the results, depend on the
 * weights' size and on the cores alone.
 * Knows: CBLAS, threads on cores. Does not know: where the weights lie.
 */
#include "bench_read.h"
#include "blas.h"

#include <cblas.h>
#include <sched.h>
#include <stdlib.h>

#define UNIT_ROWS (READ_LARGE_BYTES / READ_ROW_BYTES) /* each core has a number of such */

struct read_worker {
	uint64_t rows;
	int *cores; /* their numbers */
	uint32_t core_count;
	float *vector;                /* [READ_COLUMNS] */
	float *products;              /* [rows] */
	uint64_t *sums;               /* [cores] */
	const unsigned char *weights; /* of the work under way, and what follows */
	bool by_all;
	bool is_product;
	uint64_t begin_ns;
	uint64_t end_ns;
	struct bench_circle circle;
};

/* ---- One core's part ------------------------------------------------------------------------------------------- */

/* What every processor with vectors has registers for. */
typedef uint64_t pair_of_sums __attribute__((vector_size(16), may_alias));

/* As 64 bit numbers, with four additions that do not wait for each other: memory alone is waited for. */
static uint64_t sum_of(const unsigned char *weights, uint64_t bytes)
{
	const pair_of_sums *pairs = (const pair_of_sums *)(const void *)weights;
	pair_of_sums sums[4] = {{0}};

	for (uint64_t pair = 0; pair < bytes / sizeof *pairs; pair += 4) {
		sums[0] += pairs[pair];
		sums[1] += pairs[pair + 1];
		sums[2] += pairs[pair + 2];
		sums[3] += pairs[pair + 3];
	}
	sums[0] += sums[1] + sums[2] + sums[3];
	return sums[0][0] + sums[0][1];
}

/* A matrix of READ_COLUMNS rows after the other, and what is left. */
static void multiply(const struct read_worker *worker, uint64_t first, uint64_t end)
{
	while (first < end) {
		const uint64_t rows = end - first < READ_COLUMNS ? end - first : READ_COLUMNS;

		cblas_sgemv(CblasRowMajor, CblasNoTrans, (int)rows, (int)READ_COLUMNS, 1,
			    (const float *)(const void *)(worker->weights + first * READ_ROW_BYTES), (int)READ_COLUMNS,
			    worker->vector, 1, 0, worker->products + first, 1);
		first += rows;
	}
}

static void stay_on(int core)
{
	cpu_set_t *set = CPU_ALLOC((size_t)core + 1);
	const size_t bytes = CPU_ALLOC_SIZE((size_t)core + 1);

	if (!set)
		return;
	CPU_ZERO_S(bytes, set);
	CPU_SET_S((size_t)core, bytes, set);
	(void)sched_setaffinity(0, bytes, set); /* elsewhere it is slower, not wrong */
	CPU_FREE(set);
}

static void work_part(struct read_worker *worker, uint32_t part, uint32_t parts)
{
	const uint64_t units = worker->rows / UNIT_ROWS;
	const uint64_t first = units * part / parts * UNIT_ROWS;
	const uint64_t end = units * (part + 1) / parts * UNIT_ROWS;

	if (worker->is_product)
		multiply(worker, first, end);
	else
		worker->sums[part] = sum_of(worker->weights + first * READ_ROW_BYTES, (end - first) * READ_ROW_BYTES);
}

static void work_on_core(void *user, int32_t core)
{
	struct read_worker *worker = user;

	stay_on(worker->cores[core]);
	if (!bench_circle_barrier(&worker->circle))
		return;
	if (core == 0)
		worker->begin_ns = bench_now_ns();
	work_part(worker, (uint32_t)core, worker->by_all ? worker->core_count : 1);
	if (bench_circle_barrier(&worker->circle) && core == 0)
		worker->end_ns = bench_now_ns();
}

/* ---- All of them ----------------------------------------------------------------------------------------------- */

static uint64_t bits_of(const struct read_worker *worker)
{
	const uint32_t *bits = (const uint32_t *)(const void *)worker->products;
	uint64_t all = 0;

	if (worker->is_product)
		for (uint64_t row = 0; row < worker->rows; row++)
			all = (all ^ bits[row]) * 0x100000001b3u;
	else
		for (uint32_t part = 0; part < (worker->by_all ? worker->core_count : 1); part++)
			all += worker->sums[part];
	return all;
}

bool read_worker_run(struct read_worker *worker, const void *memory, uint32_t work, struct read_sample *sample)
{
	int32_t threads;
	bool good;

	worker->weights = memory;
	worker->by_all = read_is_by_all(work);
	worker->is_product = read_is_product(work);
	threads = worker->by_all ? (int32_t)worker->core_count : 1;
	if (!bench_circle_open(&worker->circle, threads))
		return false;
	good = bench_threads_run(threads, work_on_core, worker, &worker->circle);
	bench_circle_close(&worker->circle);
	sample->ns = (double)(worker->end_ns - worker->begin_ns);
	sample->bits = bits_of(worker);
	return good;
}

uint32_t read_worker_cores(const struct read_worker *worker)
{
	return worker->core_count;
}

/* Those that this process may run on. */
static bool find_cores(struct read_worker *worker)
{
	cpu_set_t set;

	if (sched_getaffinity(0, sizeof set, &set) != 0)
		return false;
	worker->cores = calloc((size_t)CPU_COUNT(&set), sizeof *worker->cores);
	for (size_t core = 0; worker->cores && core < CPU_SETSIZE; core++)
		if (CPU_ISSET(core, &set))
			worker->cores[worker->core_count++] = (int)core;
	return worker->cores != NULL;
}

struct read_worker *read_worker_open(uint64_t bytes)
{
	struct read_worker *worker = calloc(1, sizeof *worker);

	if (!worker)
		return NULL;
	worker->rows = bytes / READ_ROW_BYTES;
	worker->vector = malloc(READ_ROW_BYTES);
	worker->products = calloc((size_t)worker->rows, sizeof *worker->products);
	if (worker->vector && worker->products && find_cores(worker))
		worker->sums = calloc(worker->core_count, sizeof *worker->sums);
	if (!worker->sums) {
		read_worker_close(worker);
		return NULL;
	}
	bench_fill(worker->vector, READ_ROW_BYTES, 1); /* the weights are layer 0 */
	blas_use_threads(1);                           /* each of ours is one */
	return worker;
}

void read_worker_close(struct read_worker *worker)
{
	if (!worker)
		return;
	free(worker->sums);
	free(worker->products);
	free(worker->vector);
	free(worker->cores);
	free(worker);
}
