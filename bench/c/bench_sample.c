/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_sample.c - the clock, the spread of a set of samples, and a reproducible shuffle.
 * Knows: CLOCK_MONOTONIC. Does not know: what the samples are of.
 */
#include "bench.h"

#include <stdlib.h>
#include <time.h>

uint64_t bench_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* A sleep may end that much late; what is left before the deadline is spun. */
#define SPIN_NS 200000u

void bench_compute_until(uint64_t deadline_ns)
{
	const uint64_t wake_ns = deadline_ns - SPIN_NS;
	const struct timespec wake = {(time_t)(wake_ns / 1000000000u), (long)(wake_ns % 1000000000u)};

	if (bench_now_ns() < wake_ns)
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &wake, NULL);
	while (bench_now_ns() < deadline_ns) {
	}
}

static int compare_doubles(const void *left, const void *right)
{
	const double a = *(const double *)left;
	const double b = *(const double *)right;

	return (a > b) - (a < b);
}

struct bench_spread bench_spread_of(double *samples, size_t count)
{
	struct bench_spread spread;

	qsort(samples, count, sizeof *samples, compare_doubles);
	spread.median = count % 2 ? samples[count / 2] : (samples[count / 2 - 1] + samples[count / 2]) / 2;
	spread.least = samples[0];
	spread.most = samples[count - 1];
	return spread;
}

json_t *bench_spread_json(const struct bench_spread *spread)
{
	return json_pack("{s:f, s:f, s:f}", "median", spread->median, "min", spread->least, "max", spread->most);
}

uint64_t bench_random(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15u);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

void bench_shuffle(uint32_t *items, uint32_t count, uint64_t *state)
{
	for (uint32_t left = count; left > 1; left--) {
		const uint32_t other = (uint32_t)(bench_random(state) % left);
		const uint32_t last = items[left - 1];

		items[left - 1] = items[other];
		items[other] = last;
	}
}
