/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_read_rank.c - what the two ranks of `bench read` do: both open the series, the reader its private memory; then
 * it measures, and compares results and bytes.
 * Knows: bench_read.h. Does not know: how weights come to their pages, what is made of the samples.
 */
#include "bench_read.h"
#include "cli.h"

#include <stdlib.h>
#include <string.h>

struct read_rank {
	struct read_bench *bench;
	int32_t rank;
	struct read_series series[READ_VARIANTS];
	void *weights[READ_VARIANTS]; /* the reader's */
	struct read_worker *worker;
};

static bool fail(const struct read_rank *self, const char *text)
{
	return bench_ranks_fail(&self->bench->shared->ranks, "rank %d: %s", (int)self->rank, text);
}

static bool is_missing(const struct read_rank *self, uint32_t variant)
{
	return *self->bench->shared->pages[variant].missing != '\0';
}

static bool barrier(const struct read_rank *self)
{
	return bench_ranks_barrier(&self->bench->shared->ranks, self->rank);
}

/* ---- Opening --------------------------------------------------------------------------------------------------- */

/* Both ranks find the same: of the one that was refused; the other may only know that something failed there. */
static const struct read_opened *refused_for_pages(const struct read_opened *opened)
{
	for (int32_t rank = 0; rank < READ_RANKS; rank++)
		if (opened[rank].status == LSHARD_ERR_NO_MEMORY || opened[rank].status == LSHARD_ERR_NOT_SUPPORTED)
			return &opened[rank];
	return NULL;
}

static bool take_weights(struct read_rank *self, uint32_t variant)
{
	struct read_shared *shared = self->bench->shared;
	struct read_series *series = &self->series[variant];
	lshard_stats stats = LSHARD_STATS_INIT;

	if (lshard_reach(series->series, 0, NULL) != LSHARD_OK || lshard_wait(series->series, 0, NULL) != LSHARD_OK ||
	    lshard_series_address(series->series, 0, 0, &self->weights[variant]) != LSHARD_OK ||
	    lshard_series_stats(series->series, &stats) != LSHARD_OK)
		return fail(self, lshard_series_error(series->series));
	shared->in_place = stats.windows == 0;
	snprintf(shared->transport, sizeof shared->transport, "%s", lshard_group_transport(series->group));
	return true;
}

static bool close_series(struct read_rank *self, uint32_t variant)
{
	char error[512];

	return read_series_close(&self->series[variant], error, sizeof error) || fail(self, error);
}

/* Without large pages there is no variant of them; whatever else fails ends the bench. */
static bool open_shared(struct read_rank *self, uint32_t variant)
{
	struct read_shared *shared = self->bench->shared;
	struct read_opened *opened = shared->opened[variant];
	const struct read_opened *refused;

	read_series_open(self->bench, self->rank, variant, &self->series[variant], &opened[self->rank]);
	if (!barrier(self))
		return false;
	if (opened[READ_SOURCE].status == LSHARD_OK && opened[READ_READER].status == LSHARD_OK)
		return self->rank == READ_SOURCE || take_weights(self, variant);
	refused = read_is_large(variant) ? refused_for_pages(opened) : NULL;
	if (!refused)
		return opened[self->rank].status == LSHARD_OK || fail(self, opened[self->rank].error);
	if (self->rank == READ_READER)
		snprintf(shared->pages[variant].missing, sizeof shared->pages[variant].missing, "%s", refused->error);
	return close_series(self, variant) && barrier(self);
}

static bool open_private(struct read_rank *self, uint32_t variant)
{
	const uint64_t bytes = self->bench->options.bytes;
	struct read_pages *pages = &self->bench->shared->pages[variant];

	self->weights[variant] = read_private_open(&self->bench->options, read_is_large(variant), pages);
	if (!self->weights[variant])
		return fail(self, "no memory for private weights: give fewer --bytes");
	bench_fill(self->weights[variant], bytes, 0);
	return true;
}

static bool open_reader(struct read_rank *self)
{
	struct read_bench *bench = self->bench;

	if (!open_private(self, READ_PRIVATE_SMALL) || !open_private(self, READ_PRIVATE_LARGE))
		return false;
	self->worker = read_worker_open(bench->options.bytes);
	if (!self->worker)
		return fail(self, "no memory for the results");
	bench->shared->cores = read_worker_cores(self->worker);
	return true;
}

static bool open_rank(struct read_rank *self)
{
	return open_shared(self, READ_SHARED_SMALL) && open_shared(self, READ_SHARED_LARGE) &&
	       (self->rank == READ_SOURCE || open_reader(self));
}

static void close_rank(struct read_rank *self)
{
	read_worker_close(self->worker);
	for (uint32_t variant = 0; variant < READ_VARIANTS; variant++)
		if (!read_is_shared(variant))
			read_private_close(self->weights[variant], self->bench->options.bytes);
		else
			(void)close_series(self, variant);
}

/* ---- Bits and pages -------------------------------------------------------------------------------------------- */

/* The first of the variants that there are says what is right: its bytes are. */
static bool is_wrong(const struct read_rank *self, uint32_t variant, uint32_t work)
{
	uint32_t first = 0;
	uint64_t right;

	while (is_missing(self, first))
		first++;
	right = read_sample_at(self->bench, work, first, 0)->bits;

	for (uint32_t round = 0; round < self->bench->options.rounds; round++)
		if (read_sample_at(self->bench, work, variant, round)->bits != right)
			return true;
	return false;
}

/* Every byte, and every result of every round. */
static const char *find_wrong(const struct read_rank *self, uint32_t variant)
{
	if (!bench_compare(self->weights[variant], self->bench->options.bytes, 0))
		return "its bytes";
	for (uint32_t work = 0; work < READ_WORKS; work++)
		if (is_wrong(self, variant, work))
			return read_is_product(work) ? "a product" : "a sum";
	return NULL;
}

static bool check_bits(const struct read_rank *self)
{
	char wrong[256] = "";

	for (uint32_t variant = 0; variant < READ_VARIANTS; variant++) {
		const char *what = is_missing(self, variant) ? NULL : find_wrong(self, variant);
		const size_t used = strlen(wrong);

		if (what)
			snprintf(wrong + used, sizeof wrong - used, "%s%s memory in %s pages (%s)", used ? ", " : "",
				 read_memory_name(self->bench, variant), read_is_large(variant) ? "large" : "small",
				 what);
	}
	return !*wrong || bench_ranks_fail(&self->bench->shared->ranks, "wrong bits in %s", wrong);
}

/* Every page must have been touched. */
static void look_at_pages(const struct read_rank *self)
{
	for (uint32_t variant = 0; variant < READ_VARIANTS; variant++)
		read_pages_look(self->weights[variant], self->bench->options.bytes, read_is_large(variant),
				&self->bench->shared->pages[variant]);
}

/* ---- Rounds ---------------------------------------------------------------------------------------------------- */

static bool run_work(struct read_rank *self, uint32_t work, uint32_t round, const uint32_t *order)
{
	for (uint32_t i = 0; i < READ_VARIANTS; i++)
		if (!is_missing(self, order[i]) && !read_worker_run(self->worker, self->weights[order[i]], work,
								    read_sample_at(self->bench, work, order[i], round)))
			return fail(self, "a thread could not be started");
	return true;
}

/* The source waits at the same barriers: how long is told by what is read between two of them. */
static bool run_rounds(struct read_rank *self)
{
	const uint32_t rounds = self->bench->options.rounds;
	uint32_t order[READ_VARIANTS] = {READ_PRIVATE_SMALL, READ_PRIVATE_LARGE, READ_SHARED_SMALL, READ_SHARED_LARGE};
	uint64_t random = 1;

	for (uint32_t round = 0; round < rounds; round++)
		for (uint32_t work = 0; work < READ_WORKS; work++) {
			if (!barrier(self))
				return false;
			if (self->rank == READ_SOURCE)
				continue;
			cli_progress("read: round %u of %u", round + 1, rounds);
			bench_shuffle(order, READ_VARIANTS, &random);
			if (!run_work(self, work, round, order))
				return false;
		}
	return true;
}

/* The work that comes first has every page in the reader's tables before it is looked at, and its caches as later. */
static bool warm_up(struct read_rank *self)
{
	struct read_sample none;

	if (self->rank == READ_SOURCE)
		return true;
	for (uint32_t variant = 0; variant < READ_VARIANTS; variant++)
		if (!is_missing(self, variant) &&
		    !read_worker_run(self->worker, self->weights[variant], READ_SUM_ONE, &none))
			return fail(self, "a thread could not be started");
	look_at_pages(self);
	return true;
}

static bool check(struct read_rank *self)
{
	if (self->rank == READ_SOURCE)
		return true;
	cli_progress_erase();
	look_at_pages(self); /* once more: the kernel may have taken one apart */
	return check_bits(self);
}

void read_rank_run(void *user, int32_t rank)
{
	struct read_rank self = {.bench = user, .rank = rank};

	/* The last barrier: the source stays until all is read. */
	if (open_rank(&self) && warm_up(&self) && run_rounds(&self) && check(&self))
		(void)barrier(&self);
	close_rank(&self);
}
