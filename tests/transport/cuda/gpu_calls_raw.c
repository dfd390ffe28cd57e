/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_calls_raw.c - what the driver's calls cost the processor by themselves: each one that a transfer makes, a whole
 * transfer by the fewest calls, and recorded copies by how many there are. Knows the driver and a device; knows nothing
 * of the transport.
 *
 * Each call is timed twice: awaited every time, so that the device is idle, and 32 in a row, so that it is at work.
 */
#include "gpu_calls.h"

#define IN_A_ROW 32

enum kind {
	CURRENT,
	CAPTURING,
	RECORD,
	WAIT,
	COPY_SMALL,
	COPY_WHOLE,
	COPY_ROWS,
	HOST_FUNCTION,
	GRAPH_1,
	GRAPH_2,
	GRAPH_4,
	GRAPH_8,
	ROWS_1,
	ROWS_2,
	ROWS_4,
	ROWS_8,
	GRAPH_PACED,
	GRAPH_PLAIN_STREAM,
	FRESH_GRAPH,
	TRANSFER_COPY,
	TRANSFER_GRAPH,
	KINDS
};

static const char *const kind_names[KINDS] = {
	"cuCtxGetCurrent",
	"cuStreamIsCapturing",
	"cuEventRecord",
	"cuStreamWaitEvent",
	"cuMemcpyAsync, 4 KiB",
	"cuMemcpyAsync, a weight",
	"cuMemcpy2DAsync, half of a weight",
	"cuLaunchHostFunc",
	"cuGraphLaunch, 1 copy",
	"cuGraphLaunch, 2 copies",
	"cuGraphLaunch, 4 copies",
	"cuGraphLaunch, 8 copies",
	"cuGraphLaunch, 1 copy of rows",
	"cuGraphLaunch, 2 copies of rows",
	"cuGraphLaunch, 4 copies of rows",
	"cuGraphLaunch, 8 copies of rows",
	"cuGraphLaunch, host function and copy",
	"cuGraphLaunch, 1 copy, lowest priority",
	"cuGraphLaunch, 1 copy, 64 graphs in turn",
	"record, wait, cuMemcpyAsync, record, wait",
	"record, wait, cuGraphLaunch, record, wait",
};

enum { GRAPHS = GRAPH_PACED - GRAPH_1 + 1, FRESH = 64 };

struct raw {
	struct rank *rank;
	const struct cuda_driver *driver;
	cuda_stream compute;
	cuda_stream copies; /* of the highest priority */
	cuda_stream plain;
	cuda_event before;
	cuda_event after;
	cuda_graph_exec graphs[GRAPHS];
	cuda_graph_exec fresh[FRESH];
	unsigned turn;
};

static void nothing(void *argument)
{
	(void)argument;
}

/* ---- copies ---- */

/* One of @p parts of a weight, or of half of its columns. */
static cuda_result copy_part(struct raw *raw, int by_rows, unsigned part, unsigned parts)
{
	const struct rank *rank = raw->rank;
	const uint64_t rows = gpu_rows_of(rank, 0) / parts;
	const uint64_t pitch = rank->bytes[0] / gpu_rows_of(rank, 0);
	const uint64_t begin = part * rows * pitch;
	const struct cuda_copy_2d copy = {.from_kind = CUDA_KIND_UNIFIED,
					  .from = rank->reference[0][0] + begin,
					  .from_pitch = pitch,
					  .to_kind = CUDA_KIND_UNIFIED,
					  .to = rank->scratch[0] + begin,
					  .to_pitch = pitch,
					  .width = pitch / 2,
					  .rows = rows};

	if (by_rows)
		return raw->driver->copy_2d(&copy, raw->copies);
	return raw->driver->copy(copy.to, copy.from, rows * pitch, raw->copies);
}

static cuda_result record_graph(struct raw *raw, enum kind kind, cuda_graph_exec *exec)
{
	const struct cuda_driver *driver = raw->driver;
	const int by_rows = kind >= ROWS_1 && kind <= ROWS_8;
	const unsigned parts = kind >= GRAPH_PACED ? 1 : 1u << (by_rows ? kind - ROWS_1 : kind - GRAPH_1);
	cuda_graph graph = NULL;
	cuda_result result = driver->capture_begin(raw->copies, CUDA_CAPTURE_RELAXED);

	if (result == CUDA_OK && kind == GRAPH_PACED)
		result = driver->host_function(raw->copies, nothing, NULL);
	for (unsigned part = 0; part < parts && result == CUDA_OK; part++)
		result = copy_part(raw, by_rows, part, parts);
	if (result == CUDA_OK)
		result = driver->capture_end(raw->copies, &graph);
	if (result == CUDA_OK)
		result = driver->graph_instantiate(exec, graph, 0);
	if (graph)
		driver->graph_destroy(graph);
	return result == CUDA_OK ? driver->graph_upload(*exec, raw->copies) : result;
}

static cuda_result transfer(struct raw *raw, int recorded)
{
	const struct cuda_driver *driver = raw->driver;
	cuda_result result = driver->event_record(raw->before, raw->compute);

	if (result == CUDA_OK)
		result = driver->stream_wait(raw->copies, raw->before, 0);
	if (result == CUDA_OK)
		result = recorded ? driver->graph_launch(raw->graphs[0], raw->copies) : copy_part(raw, 0, 0, 1);
	if (result == CUDA_OK)
		result = driver->event_record(raw->after, raw->copies);
	return result == CUDA_OK ? driver->stream_wait(raw->compute, raw->after, 0) : result;
}

/* ---- calls ---- */

static cuda_result make_call(struct raw *raw, enum kind kind)
{
	const struct cuda_driver *driver = raw->driver;
	cuda_context current;
	int state;

	switch (kind) {
	case CURRENT:
		return driver->context_current(&current);
	case CAPTURING:
		return driver->stream_is_capturing(raw->compute, &state);
	case RECORD:
		return driver->event_record(raw->after, raw->copies);
	case WAIT:
		return driver->stream_wait(raw->compute, raw->after, 0);
	case COPY_SMALL:
		return driver->copy(raw->rank->scratch[0], raw->rank->scratch[1], 4096, raw->copies);
	case COPY_WHOLE:
		return copy_part(raw, 0, 0, 1);
	case COPY_ROWS:
		return copy_part(raw, 1, 0, 1);
	case HOST_FUNCTION:
		return driver->host_function(raw->copies, nothing, NULL);
	case GRAPH_PLAIN_STREAM:
		return driver->graph_launch(raw->graphs[0], raw->plain);
	case FRESH_GRAPH:
		return driver->graph_launch(raw->fresh[raw->turn++ % FRESH], raw->copies);
	case TRANSFER_COPY:
	case TRANSFER_GRAPH:
		return transfer(raw, kind == TRANSFER_GRAPH);
	default:
		return driver->graph_launch(raw->graphs[kind - GRAPH_1], raw->copies);
	}
}

static int await_all(const struct raw *raw)
{
	const struct device *device = &raw->rank->device;

	return device->stream_synchronize(raw->copies) == CUDA_OK &&
	       device->stream_synchronize(raw->plain) == CUDA_OK && device->stream_synchronize(raw->compute) == CUDA_OK;
}

static int time_calls(struct raw *raw, const struct probe *probe, enum kind kind, unsigned in_a_row,
		      struct samples *samples)
{
	const double begin = gpu_now_us();
	double us = begin;

	for (int i = 0; i < IN_A_ROW; i++) /* the first ones cost more */
		CALL(raw->rank, make_call(raw, kind));
	CALL(raw->rank, await_all(raw) ? CUDA_OK : CUDA_NOT_READY);
	samples->count = 0;
	while (samples->count < probe->repeats && us - begin < probe->limit_us) {
		for (unsigned i = 0; i < in_a_row; i++) {
			us = gpu_now_us();
			CALL(raw->rank, make_call(raw, kind));
			samples_add(samples, gpu_now_us() - us);
		}
		CALL(raw->rank, await_all(raw) ? CUDA_OK : CUDA_NOT_READY);
	}
	samples_sort(samples);
	return 1;
failed:
	return 0;
}

static void print_column(const struct samples *samples)
{
	printf(" | %6.2f %6.2f %7.2f %8.1f %6zu", samples_at(samples, 0.5), samples_at(samples, 0.9),
	       samples_at(samples, 0.99), samples_at(samples, 1), samples->count);
}

static int tell_table(struct raw *raw, const struct probe *probe, enum others others, struct samples *samples)
{
	printf("us per call, %s; median 90 %% 99 %% max of, awaited each time | the same, %d in a row\n",
	       gpu_others_names[others], IN_A_ROW);
	for (int kind = 0; kind < KINDS; kind++) {
		if (!time_calls(raw, probe, (enum kind)kind, 1, samples))
			return 0;
		printf("  %-42s", kind_names[kind]);
		print_column(samples);
		if (!time_calls(raw, probe, (enum kind)kind, IN_A_ROW, samples))
			return 0;
		print_column(samples);
		printf("\n");
	}
	return 1;
}

/* ---- what they need ---- */

static int open_raw(struct raw *raw)
{
	const struct cuda_driver *driver = raw->driver;
	int least;
	int greatest;

	CALL(raw->rank, driver->priorities(&least, &greatest));
	CALL(raw->rank, driver->stream_create(&raw->compute, CUDA_STREAM_NON_BLOCKING, least));
	CALL(raw->rank, driver->stream_create(&raw->copies, CUDA_STREAM_NON_BLOCKING, greatest));
	CALL(raw->rank, driver->stream_create(&raw->plain, CUDA_STREAM_NON_BLOCKING, least));
	CALL(raw->rank, driver->event_create(&raw->before, CUDA_EVENT_WITHOUT_TIME));
	CALL(raw->rank, driver->event_create(&raw->after, CUDA_EVENT_WITHOUT_TIME));
	for (int i = 0; i < GRAPHS; i++)
		CALL(raw->rank, record_graph(raw, (enum kind)(GRAPH_1 + i), &raw->graphs[i]));
	for (int i = 0; i < FRESH; i++)
		CALL(raw->rank, record_graph(raw, GRAPH_1, &raw->fresh[i]));
	return 1;
failed:
	return 0;
}

static void close_raw(struct raw *raw)
{
	const struct cuda_driver *driver = raw->driver;

	for (int i = 0; i < GRAPHS; i++)
		if (raw->graphs[i])
			driver->graph_exec_destroy(raw->graphs[i]);
	for (int i = 0; i < FRESH; i++)
		if (raw->fresh[i])
			driver->graph_exec_destroy(raw->fresh[i]);
	if (raw->after)
		driver->event_destroy(raw->after);
	if (raw->before)
		driver->event_destroy(raw->before);
	if (raw->plain)
		driver->stream_destroy(raw->plain);
	if (raw->copies)
		driver->stream_destroy(raw->copies);
	if (raw->compute)
		driver->stream_destroy(raw->compute);
}

int gpu_tells_raw_calls(struct rank *rank, const struct probe *probe, enum others others)
{
	struct raw raw = {.rank = rank, .driver = &rank->device.driver};
	struct samples samples;
	int right = samples_make(&samples, probe->repeats + IN_A_ROW);

	right = right && open_raw(&raw) && tell_table(&raw, probe, others, &samples);
	close_raw(&raw);
	samples_free(&samples);
	return right;
}
