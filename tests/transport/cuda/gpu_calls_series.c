/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_calls_series.c - what reach, wait and release of a series cost the processor when a layer is transferred, and
 * which calls of the driver the time goes into. Knows the public interface and the trace.
 *
 * Times are taken in every other pass with the trace off; the passes between are traced, since looking at the clock
 * around each of the driver's calls costs time of its own.
 */
#include "gpu_calls.h"

#include <string.h>
#include <sys/resource.h>

/* How the program goes through its layers. */
struct way {
	const char *name;
	unsigned ahead; /* passes that are enqueued before the device is waited for; 0: after every layer */
	int release;    /* a layer is released when its work is enqueued, which starts the next transfer */
	int unasked;    /* remedy: the driver is not asked for what is known */
};

static const struct way ways[] = {
	{"each layer awaited", 0, 0, 0},
	{"each pass awaited", 1, 0, 0},
	{"8 passes ahead", 8, 0, 0},
};

static const struct way remedies[] = {
	{"each pass awaited, driver not asked", 1, 0, 1},
	{"each pass awaited, released", 1, 1, 0},
	{"8 passes ahead, driver not asked", 8, 0, 1},
	{"8 passes ahead, released", 8, 1, 0},
};

struct record {
	struct samples both; /* reach + wait, with a transfer */
	struct samples reach;
	struct samples wait;
	struct samples release; /* with a transfer */
	struct samples first;   /* reach + wait, the first with a transfer since the device was waited for */
	struct samples later;   /* the others */
	size_t traced;          /* and in all of them: */
	double traced_us;
	double calls[TRACED];
	double in[TRACED]; /* us */
	size_t slow;       /* of the traced ones */
	double slow_us;
	double slow_in[TRACED];
	struct rusage usage;
};

struct times {
	double reach;
	double wait;
	double release;
	int moved;
};

static uint64_t transfers(const struct rank *rank)
{
	lshard_stats stats = LSHARD_STATS_INIT;

	return lshard_series_stats(rank->series, &stats) == LSHARD_OK ? stats.fetches : 0;
}

static int visit(struct rank *rank, const struct way *way, uint32_t layer, struct times *times)
{
	const cuda_stream stream = rank->device.streams[0];
	const uint64_t before = transfers(rank);
	double begin = gpu_now_us();
	double end;

	OK(rank, lshard_reach(rank->series, layer, stream));
	times->reach = (end = gpu_now_us()) - begin;
	OK(rank, lshard_wait(rank->series, layer, stream));
	times->wait = gpu_now_us() - end;
	if (!gpu_compare(rank, layer, 0, layer, stream))
		goto failed;
	times->release = 0;
	begin = gpu_now_us();
	if (way->release)
		OK(rank, lshard_release(rank->series, layer, stream));
	times->release = gpu_now_us() - begin;
	times->moved = transfers(rank) > before;
	return 1;
failed:
	return 0;
}

static void note_timed(struct record *record, const struct times *times, int first)
{
	samples_add(&record->both, times->reach + times->wait);
	samples_add(&record->reach, times->reach);
	samples_add(&record->wait, times->wait);
	samples_add(&record->release, times->release);
	samples_add(first ? &record->first : &record->later, times->reach + times->wait);
}

/* Slow: it took twice the mean so far. */
static void note_traced(struct record *record, const struct times *times)
{
	const double us = times->reach + times->wait + times->release;

	record->traced++;
	record->traced_us += us;
	for (int i = 0; i < TRACED; i++) {
		record->in[i] += gpu_trace.us[i];
		record->calls[i] += gpu_trace.calls[i];
	}
	if (record->traced < 20 || us * (double)record->traced < 2 * record->traced_us)
		return;
	record->slow++;
	record->slow_us += us;
	for (int i = 0; i < TRACED; i++)
		record->slow_in[i] += gpu_trace.us[i];
}

static int one_pass(struct rank *rank, const struct way *way, struct record *record, int traced, int *first)
{
	for (uint32_t layer = FIRST; layer < FIRST + LAYERS; layer++) {
		struct times times;

		gpu_trace_clear();
		gpu_trace.on = traced;
		if (!visit(rank, way, layer, &times))
			return 0;
		gpu_trace.on = 0;
		if (times.moved && traced)
			note_traced(record, &times);
		else if (times.moved)
			note_timed(record, &times, *first);
		*first &= !times.moved;
		if (way->ahead)
			continue;
		rank->device.stream_synchronize(rank->device.streams[0]);
		*first = 1;
	}
	return 1;
}

static int run_way(struct rank *rank, const struct probe *probe, const struct way *way, struct record *record)
{
	const double begin = gpu_now_us();
	struct rusage before;
	unsigned pass = 0;
	int first = 1;
	int right = 1;

	gpu_trace.unasked = way->unasked;
	getrusage(RUSAGE_SELF, &before);
	while (right && record->both.count < probe->repeats && gpu_now_us() - begin < probe->limit_us) {
		right = one_pass(rank, way, record, pass & 1, &first);
		pass++;
		if (way->ahead && pass % way->ahead == 0) {
			rank->device.stream_synchronize(rank->device.streams[0]);
			first = 1;
		}
	}
	gpu_trace.unasked = 0;
	rank->device.stream_synchronize(rank->device.streams[0]);
	getrusage(RUSAGE_SELF, &record->usage);
	record->usage.ru_nivcsw -= before.ru_nivcsw;
	record->usage.ru_nvcsw -= before.ru_nvcsw;
	record->usage.ru_minflt -= before.ru_minflt;
	return right;
}

/* ---- lines ---- */

static struct samples *sets(struct record *record, int i)
{
	struct samples *const all[] = {&record->both,    &record->reach, &record->wait,
				       &record->release, &record->first, &record->later};

	return i < 6 ? all[i] : NULL;
}

static void tell_calls(const struct record *record)
{
	double sum = 0;

	printf("    driver:");
	for (int i = 0; i < TRACED && record->traced; i++) {
		sum += record->calls[i] / (double)record->traced;
		if (record->calls[i] > 0)
			printf(" %s %.1f x %.2f us,", gpu_traced_names[i], record->calls[i] / (double)record->traced,
			       record->in[i] / record->calls[i]);
	}
	printf(" %.1f calls of a transfer\n", sum);
	if (!record->slow)
		return;
	printf("    the slow ones, %zu of %zu, mean %.1f us instead of %.1f:", record->slow, record->traced,
	       record->slow_us / (double)record->slow, record->traced_us / (double)record->traced);
	for (int i = 0; i < TRACED; i++)
		if (record->slow_in[i] > 0.02 * record->slow_us)
			printf(" %.0f %% %s", 100 * record->slow_in[i] / record->slow_us, gpu_traced_names[i]);
	printf("\n");
}

static void tell_record(const struct way *way, struct record *record)
{
	const struct samples *both = &record->both;

	for (int i = 0; sets(record, i); i++)
		samples_sort(sets(record, i));
	printf("  %-36s %6.2f %6.2f %7.2f %8.1f of %zu | reach %6.2f %6.2f | wait %6.2f %6.2f |", way->name,
	       samples_at(both, 0.5), samples_at(both, 0.9), samples_at(both, 0.99), samples_at(both, 1), both->count,
	       samples_at(&record->reach, 0.5), samples_at(&record->reach, 0.9), samples_at(&record->wait, 0.5),
	       samples_at(&record->wait, 0.9));
	if (way->release)
		printf(" release %6.2f %6.2f |", samples_at(&record->release, 0.5), samples_at(&record->release, 0.9));
	if (record->first.count && record->later.count)
		printf(" first %6.2f %6.2f | later %6.2f %6.2f |", samples_at(&record->first, 0.5),
		       samples_at(&record->first, 0.9), samples_at(&record->later, 0.5),
		       samples_at(&record->later, 0.9));
	printf(" switched away %ld, slept %ld, faults %ld\n", record->usage.ru_nivcsw, record->usage.ru_nvcsw,
	       record->usage.ru_minflt);
	tell_calls(record);
}

static int tell_way(struct rank *rank, const struct probe *probe, const struct way *way)
{
	struct record record;
	int right = 1;

	memset(&record, 0, sizeof record);
	for (int i = 0; sets(&record, i); i++)
		right &= samples_make(sets(&record, i), probe->repeats + LAYERS);
	right = right && run_way(rank, probe, way, &record);
	if (right)
		tell_record(way, &record);
	for (int i = 0; sets(&record, i); i++)
		samples_free(sets(&record, i));
	return right;
}

int gpu_tells_series_calls(struct rank *rank, const struct probe *probe, enum others others)
{
	printf(" %s: us of reach + wait with a transfer, %s: median 90 %% 99 %% max | median 90 %% of each |\n",
	       probe->name, gpu_others_names[others]);
	for (size_t i = 0; i < sizeof ways / sizeof ways[0]; i++)
		if (!tell_way(rank, probe, &ways[i]))
			return 0;
	for (size_t i = 0; probe->remedies && i < sizeof remedies / sizeof remedies[0]; i++)
		if (!tell_way(rank, probe, &remedies[i]))
			return 0;
	return 1;
}
