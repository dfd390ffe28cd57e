/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_step_rank.c - one rank of `bench step`: opens its groups and series, runs the variants round by round, and
 * checks the bits.
 *
 * A sample is a few passes that are not timed and then P that are, so that it begins and ends in the steady state in
 * which passes flow into one another; then the ring comes to rest, and the next variant finds the link idle. Knows:
 * the public header. Does not know: why a variant is run, what is made of its samples.
 */
#include "bench_step.h"
#include "cli.h"

#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>

/* After a rest all windows are full. Where transfers dominate it takes some passes until that start is used up. */
#define WARM_PASSES 3u

struct rank_series {
	lshard_series *series;
	void **addresses;  /* [layers] */
	uint32_t *awaited; /* [layers] whose transfer is under way after reach with one window (D) */
};

struct step_rank {
	struct step_bench *bench;
	struct bench_member member;
	lshard_group *groups[STEP_LINKS_MOST];
	struct rank_series series[STEP_SERIES_MOST];
	unsigned char *own; /* a copy of the whole stack (A); ranks that compute only */
	uint64_t random;    /* for the words that are checked */
	int64_t wrong;      /* first layer whose bytes were not its source's; -1: none */
};

static bool fail_series(struct step_rank *self, const struct rank_series *one)
{
	return bench_circle_fail(self->member.circle, "%s", lshard_series_error(one->series)); /* it names the rank */
}

static bool fail_memory(struct step_rank *self)
{
	return bench_circle_fail(self->member.circle, "rank %d: no memory for its copy of the stack",
				 (int)self->member.rank);
}

/* ---- Opening ------------------------------------------------------------------------------------------------- */

static bool open_group(struct step_rank *self, uint32_t link)
{
	char error[512] = "";
	const lshard_bootstrap bootstrap = {sizeof bootstrap, bench_circle_allgather, &self->member};
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;

	options.rank = self->member.rank;
	options.size = self->bench->options.ranks;
	options.transport = self->bench->links[link].spec;
	options.bootstrap = &bootstrap;
	options.error = error;
	options.error_bytes = sizeof error;
	if (lshard_group_create(&options, &self->groups[link]) != LSHARD_OK)
		return bench_circle_fail(self->member.circle, "%s", error);
	return true;
}

/* With a single window, as D has, the layers that share an address with another are those that come through it. */
static bool is_windowed(const struct rank_series *one, uint32_t layer, uint32_t layers)
{
	for (uint32_t other = 0; other < layers; other++)
		if (other != layer && one->addresses[other] == one->addresses[layer])
			return true;
	return false;
}

/* Twice round the circle backwards: the second time what follows the last layer is known. */
static void find_awaited(struct rank_series *one, uint32_t layers)
{
	uint32_t next = UINT32_MAX;

	for (uint32_t left = 2 * layers; left > 0; left--) {
		const uint32_t layer = (left - 1) % layers;

		if (is_windowed(one, layer, layers))
			next = layer;
		one->awaited[layer] = next == UINT32_MAX ? layer : next;
	}
}

static bool find_addresses(struct step_rank *self, struct rank_series *one, uint32_t layers)
{
	one->addresses = calloc(layers, sizeof *one->addresses);
	one->awaited = calloc(layers, sizeof *one->awaited);
	if (!one->addresses || !one->awaited)
		return fail_memory(self);
	for (uint32_t layer = 0; layer < layers; layer++)
		if (lshard_series_address(one->series, layer, 0, &one->addresses[layer]) != LSHARD_OK)
			return fail_series(self, one);
	return true;
}

static bool open_series(struct step_rank *self, uint32_t index)
{
	struct step_bench *bench = self->bench;
	struct rank_series *one = &self->series[index];
	lshard_group *group = self->groups[bench->series[index].link];
	uint64_t bytes = bench->options.layer_bytes;
	lshard_series_options options;
	lshard_tensor tensor;
	char name[32];

	step_series_options(bench, index, &tensor, &options);
	snprintf(name, sizeof name, "stack-%u", index);
	options.name = name;
	if (lshard_series_create(group, &options, &one->series) != LSHARD_OK)
		return bench_circle_fail(self->member.circle, "%s", lshard_group_error(group));
	if (lshard_series_commit(one->series, bench_post_process, &bytes) != LSHARD_OK)
		return fail_series(self, one);
	return find_addresses(self, one, bench->options.layers);
}

static bool open_own(struct step_rank *self)
{
	const struct step_options *options = &self->bench->options;

	if (self->member.rank != 0 && !options->all_compute)
		return true;
	self->own = malloc((size_t)options->layer_bytes * options->layers);
	if (!self->own)
		return fail_memory(self);
	for (uint32_t layer = 0; layer < options->layers; layer++)
		bench_fill(self->own + layer * options->layer_bytes, options->layer_bytes, layer);
	return true;
}

/* On a collective transport k = 0 starts no transfer before its layer is reached: there is nothing else to wait for. */
static bool waits_ahead(const struct step_bench *bench, const struct step_variant *variant)
{
	return variant->kind == STEP_SERIAL && !bench->links[bench->series[variant->series].link].collective;
}

static bool open_rank(struct step_rank *self)
{
	bool good = open_own(self);

	for (uint32_t link = 0; good && link < self->bench->link_count; link++)
		good = open_group(self, link);
	for (uint32_t index = 0; good && index < self->bench->series_count; index++)
		good = open_series(self, index);
	for (uint32_t index = 0; good && index < self->bench->variant_count; index++)
		if (waits_ahead(self->bench, &self->bench->variants[index]))
			find_awaited(&self->series[self->bench->variants[index].series], self->bench->options.layers);
	return good;
}

static void close_rank(struct step_rank *self)
{
	char error[512];

	for (uint32_t index = 0; index < self->bench->series_count; index++) {
		lshard_series_destroy(self->series[index].series);
		free(self->series[index].addresses);
		free(self->series[index].awaited);
	}
	for (uint32_t link = 0; link < self->bench->link_count; link++)
		if (cli_group_leave(self->groups[link], error, sizeof error) < 0)
			(void)bench_circle_fail(self->member.circle, "rank %d: %s", (int)self->member.rank, error);
	free(self->own);
}

/* ---- Passes -------------------------------------------------------------------------------------------------- */

/* Use the layer: look at some of its bytes and, but for B, let as much time pass as its compute takes. */
static void use_layer(struct step_rank *self, const struct step_variant *variant, const void *bytes, uint32_t layer)
{
	const struct step_options *options = &self->bench->options;
	const uint64_t deadline_ns = bench_now_ns() + options->compute_ns;

	if (!bench_probe(bytes, options->layer_bytes, layer, bench_random(&self->random)) && self->wrong < 0)
		self->wrong = (int64_t)layer;
	if (variant->kind != STEP_TRANSFERS)
		bench_compute_until(deadline_ns);
}

/* D waits for whatever reach set in motion before it lets the layer compute. */
static bool fetch_layer(struct step_rank *self, const struct step_variant *variant, uint32_t layer)
{
	const struct rank_series *one = &self->series[variant->series];

	if (lshard_reach(one->series, layer, NULL) != LSHARD_OK || lshard_wait(one->series, layer, NULL) != LSHARD_OK)
		return false;
	return !waits_ahead(self->bench, variant) || lshard_wait(one->series, one->awaited[layer], NULL) == LSHARD_OK;
}

static void sleep_ns(uint64_t duration_ns)
{
	const struct timespec duration = {(time_t)(duration_ns / 1000000000u), (long)(duration_ns % 1000000000u)};

	clock_nanosleep(CLOCK_MONOTONIC, 0, &duration, NULL);
}

static bool run_pass(struct step_rank *self, const struct step_variant *variant)
{
	const struct step_options *options = &self->bench->options;
	const struct rank_series *one = variant->series == STEP_NO_SERIES ? NULL : &self->series[variant->series];

	for (uint32_t layer = 0; layer < options->layers; layer++) {
		const void *bytes = one ? one->addresses[layer] : self->own + layer * options->layer_bytes;

		if (one && !fetch_layer(self, variant, layer))
			return fail_series(self, one);
		use_layer(self, variant, bytes, layer);
	}
	if (variant->delay_ns && self->member.rank == options->ranks - 1)
		sleep_ns(variant->delay_ns);
	return true;
}

static lshard_stats stats_of(const struct rank_series *one)
{
	lshard_stats stats = LSHARD_STATS_INIT;

	if (one)
		lshard_series_stats(one->series, &stats);
	return stats;
}

static bool time_passes(struct step_rank *self, const struct step_variant *variant, struct step_sample *sample)
{
	const struct rank_series *one = variant->series == STEP_NO_SERIES ? NULL : &self->series[variant->series];
	const uint32_t passes = self->bench->options.passes;
	lshard_stats before, after;
	uint64_t begin;

	for (uint32_t pass = 0; pass < WARM_PASSES; pass++)
		if (!run_pass(self, variant))
			return false;
	before = stats_of(one);
	begin = bench_now_ns();
	for (uint32_t pass = 0; pass < passes; pass++)
		if (!run_pass(self, variant))
			return false;
	sample->elapsed = (double)(bench_now_ns() - begin) / passes;
	after = stats_of(one);
	sample->blocked = (double)(after.blocked_ns - before.blocked_ns) / passes;
	sample->link_busy = (double)(after.link_busy_ns - before.link_busy_ns) / passes;
	if (one && lshard_series_prepare(one->series, NULL) != LSHARD_OK)
		return fail_series(self, one);
	return true;
}

static bool fail_bits(struct step_rank *self, int64_t layer)
{
	return bench_circle_fail(self->member.circle, "wrong bits: layer %lld on rank %d is not what its source wrote",
				 (long long)layer, (int)self->member.rank);
}

static bool run_variant(struct step_rank *self, uint32_t index, uint32_t round)
{
	const struct step_variant *variant = &self->bench->variants[index];

	if (!bench_circle_barrier(self->member.circle))
		return false;
	if (self->member.rank != 0 && !variant->all)
		return true;
	if (!time_passes(self, variant, step_sample_at(self->bench, index, self->member.rank, round)))
		return false;
	return self->wrong < 0 || fail_bits(self, self->wrong);
}

/* All ranks draw the same orders. */
static bool run_rounds(struct step_rank *self)
{
	const struct step_bench *bench = self->bench;
	uint32_t order[STEP_VARIANTS_MOST];
	const uint32_t count = bench->variant_count - STEP_VARIANT_SHUFFLED;
	uint64_t random = 1;

	for (uint32_t i = 0; i < count; i++)
		order[i] = STEP_VARIANT_SHUFFLED + i;
	for (uint32_t round = 0; round < bench->options.rounds; round++) {
		if (self->member.rank == 0)
			cli_progress("step: round %u of %u", round + 1, bench->options.rounds);
		bench_shuffle(order, count, &random);
		if (!run_variant(self, STEP_VARIANT_FIRST, round))
			return false;
		for (uint32_t i = 0; i < count; i++)
			if (!run_variant(self, order[i], round))
				return false;
		if (!run_variant(self, STEP_VARIANT_LAST, round))
			return false;
	}
	return true;
}

/* ---- Bits ---------------------------------------------------------------------------------------------------- */

/* Every byte of every layer of every series, on every rank; then the hashes of verify. */
static bool check_bits(struct step_rank *self)
{
	const struct step_options *options = &self->bench->options;
	int64_t wrong;

	for (uint32_t index = 0; index < self->bench->series_count; index++) {
		const struct rank_series *one = &self->series[index];

		if (bench_compare_series(one->series, options->layers, options->layer_bytes, &wrong) != LSHARD_OK)
			return fail_series(self, one);
		if (wrong >= 0)
			return fail_bits(self, wrong);
		if (!bench_circle_barrier(self->member.circle)) /* a rank that failed would be waited for in verify */
			return false;
		if (lshard_series_verify(one->series, NULL) != LSHARD_OK)
			return fail_series(self, one);
	}
	return true;
}

static void run_rank(void *user, int32_t rank)
{
	struct step_bench *bench = user;
	struct step_rank *self = calloc(1, sizeof *self);

	if (!self) {
		bench_circle_fail(&bench->circle, "rank %d: no memory", (int)rank);
		return;
	}
	self->bench = bench;
	self->member = (struct bench_member){&bench->circle, rank};
	self->random = (uint64_t)rank;
	self->wrong = -1;
	prctl(PR_SET_TIMERSLACK, 1UL); /* a wait ends when the link is done, not up to 50 us later */
	if (open_rank(self) && run_rounds(self) && bench_circle_barrier(&bench->circle) && check_bits(self) &&
	    rank == 0)
		for (uint32_t index = 0; index < bench->series_count; index++)
			bench->stats[index] = stats_of(&self->series[index]);
	close_rank(self);
	free(self);
}

bool step_ranks_run(struct step_bench *bench)
{
	const bool started = bench_threads_run(bench->options.ranks, run_rank, bench, &bench->circle);

	cli_progress_erase();
	return started && !bench->circle.broken;
}
