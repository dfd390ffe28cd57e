/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_times.c - what the cuda transport costs the processor, how fast it copies and what memory it takes, on a device.
 */
#include "gpu_rank.h"

#include <stdlib.h>
#include <time.h>

double gpu_now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

static int by_size(const void *a, const void *b)
{
	return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static uint64_t fetches(const struct rank *rank)
{
	lshard_stats stats = LSHARD_STATS_INIT;

	return lshard_series_stats(rank->series, &stats) == LSHARD_OK ? stats.fetches : 0;
}

static void tell_times(const struct rank *rank, const char *what, double *times, size_t count)
{
	if (count == 0)
		return;
	qsort(times, count, sizeof times[0], by_size);
	printf("  rank %d: %s: median %.1f us, 10 %% %.1f us, 90 %% %.1f us of %zu\n", (int)rank->member->rank, what,
	       times[count / 2], times[count / 10], times[count * 9 / 10], count);
}

/* Host time of reach + wait, per layer: the device idle, and at work on what came before, as in a pass. */
int gpu_tells_host_time(struct rank *rank, int busy)
{
	enum { PASSES = 30 };
	double times[2][PASSES * LAYERS]; /* without a transfer, with one */
	size_t counts[2] = {0, 0};

	for (int pass = 0; pass < PASSES; pass++) {
		for (uint32_t layer = FIRST; layer < FIRST + LAYERS; layer++) {
			const uint64_t before = fetches(rank);
			const double begin = gpu_now_us();
			double end;
			int moved;

			OK(rank, lshard_reach(rank->series, layer, rank->device.streams[0]));
			OK(rank, lshard_wait(rank->series, layer, rank->device.streams[0]));
			end = gpu_now_us();
			moved = fetches(rank) > before;
			times[moved][counts[moved]++] = end - begin;
			if (busy && !gpu_compare(rank, layer, 0, layer, rank->device.streams[0]))
				goto failed;
			if (!busy)
				rank->device.stream_synchronize(rank->device.streams[0]);
		}
		rank->device.stream_synchronize(rank->device.streams[0]);
	}
	tell_times(rank, busy ? "reach + wait on the host, no transfer" : "the same, device idle, no transfer",
		   times[0], counts[0]);
	tell_times(rank, busy ? "reach + wait on the host, a transfer" : "the same, device idle, a transfer", times[1],
		   counts[1]);
	return 1;
failed:
	return 0;
}

/* Bytes per second of passes in which nothing computes. */
static int moves_at(struct rank *rank, cuda_graph_exec exec, double *gigabytes)
{
	const unsigned passes = exec ? 4 : 6;
	lshard_stats before = LSHARD_STATS_INIT;
	lshard_stats after = LSHARD_STATS_INIT;
	double begin;
	double bytes = 0;

	EACH_SERIES(rank)
	OK(rank, lshard_series_prepare(rank->series, rank->device.streams[0]));
	rank->device.stream_synchronize(rank->device.streams[0]);
	begin = gpu_now_us();
	EACH_SERIES(rank)
	{
		OK(rank, lshard_series_stats(rank->series, &before));
		for (uint32_t i = 0; i < passes * LAYERS; i++) {
			OK(rank, lshard_reach(rank->series, FIRST + i % LAYERS, rank->device.streams[0]));
			OK(rank, lshard_wait(rank->series, FIRST + i % LAYERS, rank->device.streams[0]));
		}
		OK(rank, lshard_series_join(rank->series, rank->device.streams[0]));
		OK(rank, lshard_series_stats(rank->series, &after));
		bytes += (double)(after.fetched_bytes - before.fetched_bytes);
	}
	rank->device.stream_synchronize(rank->device.streams[0]);
	*gigabytes = bytes / (gpu_now_us() - begin) / 1e3;
	if (!exec)
		return 1;
	begin = gpu_now_us();
	for (unsigned i = 0; i < passes; i++)
		if (!gpu_replay(rank, exec))
			goto failed;
	rank->device.stream_synchronize(rank->device.streams[0]);
	*gigabytes = bytes / (gpu_now_us() - begin) / 1e3; /* a replay moves what an eager pass does */
	return 1;
failed:
	return 0;
}

int gpu_keeps_its_pace(struct rank *rank, cuda_graph_exec exec)
{
	double eager = 0;
	double captured = 0;

	if (!moves_at(rank, NULL, &eager) || !moves_at(rank, exec, &captured))
		goto failed;
	printf("  rank %d: %.2f GB/s by copies alone, %.2f GB/s in replays that compare", (int)rank->member->rank,
	       eager, captured);
	printf(rank->plan->pace > 0 ? ", asked for at most %.2f\n" : "\n", rank->plan->pace);
	if (rank->plan->pace > 0) /* the last slice may be under way, and none is counted before it has begun */
		EXPECT(rank->member, eager < 1.2 * rank->plan->pace && captured < 1.2 * rank->plan->pace, "too fast");
	return 1;
failed:
	return 0;
}

/* What the driver's calls of a pass cost this processor. */
int gpu_tells_call_times(struct rank *rank)
{
	const struct cuda_driver *driver = &rank->device.driver;
	const cuda_stream stream = rank->device.streams[0];
	enum { CURRENT, CAPTURING, RECORD, WAIT, COPY, KINDS };
	double spent[KINDS] = {0};
	cuda_context current;
	cuda_event event;
	int state;

	CALL(rank, driver->event_create(&event, CUDA_EVENT_WITHOUT_TIME));
	for (int turn = 0; turn < 100; turn++) {
		double times[KINDS + 1];

		times[0] = gpu_now_us();
		CALL(rank, driver->context_current(&current));
		times[1] = gpu_now_us();
		CALL(rank, driver->stream_is_capturing(stream, &state));
		times[2] = gpu_now_us();
		CALL(rank, driver->event_record(event, stream));
		times[3] = gpu_now_us();
		CALL(rank, driver->stream_wait(rank->device.streams[1], event, 0));
		times[4] = gpu_now_us();
		CALL(rank, driver->copy(rank->reference[0][1], rank->reference[1][1], 4096, stream));
		times[5] = gpu_now_us();
		for (int kind = 0; kind < KINDS && turn >= 10; kind++)
			spent[kind] += (times[kind + 1] - times[kind]) / 90;
		if (turn % 10 == 0)
			rank->device.stream_synchronize(stream);
	}
	rank->device.stream_synchronize(stream);
	driver->event_destroy(event);
	printf("  rank %d: us per call: cuCtxGetCurrent %.2f, cuStreamIsCapturing %.2f, cuEventRecord %.2f, "
	       "cuStreamWaitEvent %.2f, "
	       "cuMemcpyAsync %.2f\n",
	       (int)rank->member->rank, spent[CURRENT], spent[CAPTURING], spent[RECORD], spent[WAIT], spent[COPY]);
	return 1;
failed:
	return 0;
}

/* What a recorded copy costs: one is made for each layer that comes into a window. */
int gpu_tells_graph_cost(struct rank *rank)
{
	enum { GRAPHS = 100 };
	const struct device *device = &rank->device;
	const cuda_stream stream = device->streams[0];
	cuda_graph_exec execs[GRAPHS] = {NULL};
	cuda_graph graph = NULL;
	uint64_t free_before;
	double begin;
	double made;

	CALL(rank, device->capture_begin(stream, CUDA_CAPTURE_RELAXED));
	CALL(rank, device->driver.copy(rank->reference[0][1], rank->reference[1][1], 4096, stream));
	CALL(rank, device->capture_end(stream, &graph));
	free_before = gpu_free_memory(rank);
	begin = gpu_now_us();
	for (int i = 0; i < GRAPHS; i++) {
		CALL(rank, device->graph_instantiate(&execs[i], graph, 0));
		CALL(rank, device->driver.graph_upload(execs[i], stream));
	}
	made = gpu_now_us() - begin;
	CALL(rank, device->stream_synchronize(stream));
	printf("  rank %d: a graph of one copy: %.1f us to make, %.1f KiB of the device\n", (int)rank->member->rank,
	       made / GRAPHS, ((double)free_before - (double)gpu_free_memory(rank)) / 1024 / GRAPHS);
	for (int i = 0; i < GRAPHS; i++)
		CALL(rank, device->graph_exec_destroy(execs[i]));
	CALL(rank, device->graph_destroy(graph));
	return 1;
failed:
	return 0;
}

/* Of the device, all ranks together: what a series adds, and what its end leaves. */
void gpu_tell_memory(const struct rank *rank, const char *what, uint64_t free_before, uint64_t free_now)
{
	const double mib = 1024.0 * 1024.0;
	lshard_stats stats = LSHARD_STATS_INIT;

	if (rank->series)
		lshard_series_stats(rank->series, &stats);
	if (rank->member->rank == 0)
		printf("  %s: %+.1f MiB of the device's free memory; rank 0: shard %.1f, windows %.1f, residents %.1f "
		       "MiB, layer %.3f MiB\n",
		       what, ((double)free_now - (double)free_before) / mib, (double)stats.shard_bytes / mib,
		       (double)stats.window_bytes / mib, (double)stats.resident_bytes / mib,
		       (double)stats.layer_bytes / mib);
}
