/* SPDX-License-Identifier: Apache-2.0
 *
 * stub_stream.c - see stub_cuda.h: streams, events, captures, graphs. An event is a point of a stream's queue, or of a
 * capture.
 *
 * Late streams run one operation at a time, of any stream whose next one may run, a copy in two halves and the first
 * half leaves garbage in the second: who should have waited cannot be right by luck. The operations of a graph run in
 * any order that its edges allow.
 */
#include "stub_world.h"

#include <stdlib.h>
#include <string.h>

#define NODES      2048
#define MOST_READY 256
#define GARBAGE    0xdb

typedef struct {
	uint64_t words[NODES / 64];
} set;

struct comparison {
	uint64_t a, b, words, counter;
};

struct operation {
	enum { COPY, WAIT, CALL, HOST, LAUNCH } kind;
	struct cuda_copy_2d copy;
	unsigned halves;
	struct CUstream_st *stream; /* WAIT: for its operation number `count` */
	uint64_t count;
	struct comparison comparison;
	void (*function)(void *); /* HOST */
	void *argument;
	struct CUgraph_st *graph;
	unsigned char *done; /* LAUNCH: [nodes] halves done */
};

struct CUgraph_st {
	struct operation *nodes;
	set *before;
	size_t count;
	int references; /* its own, its executables', those of launches on their way */
};

struct capture {
	uint64_t number;
	int mode;
	int broken;
	struct CUstream_st *origin;
	struct CUgraph_st *graph;
};

struct CUstream_st {
	struct CUstream_st *next;
	struct operation *queue; /* [queued - done] from the front */
	uint64_t done;
	uint64_t queued;
	size_t room;
	struct capture *capture;
	set before; /* capture: what comes before the next node */
};

struct CUevent_st {
	struct CUstream_st *stream;
	uint64_t count;
	uint64_t capture; /* number, 0: none */
	set before;
	unsigned flags;
};

static struct CUstream_st legacy;
static struct CUstream_st *streams;
static struct CUstream_st *destroyed; /* events and waits may still point at them */
static uint64_t captures;
static uint64_t randomness;
static int from_legacy; /* did the last copy read a peer's legacy allocation? */

static void *some(size_t count, size_t bytes)
{
	void *memory = calloc(count, bytes);

	if (!memory)
		abort();
	return memory;
}

static uint64_t random_below(uint64_t n)
{
	randomness = randomness * 6364136223846793005u + 1442695040888963407u + (uint64_t)stub_setting(STUB_LATE);
	return (randomness >> 33) % n;
}

static struct CUstream_st *stream_of(cuda_stream stream)
{
	return stream ? stream : &legacy;
}

/* ---- running ---- */

static void copy_rows(const struct cuda_copy_2d *copy, size_t from_row, size_t to_row, size_t begin, size_t end)
{
	for (size_t row = from_row; row < to_row; row++)
		memcpy((char *)(uintptr_t)copy->to + row * copy->to_pitch + begin,
		       (const char *)(uintptr_t)copy->from + row * copy->from_pitch + begin, end - begin);
}

static uint64_t copied;
static struct stub_copy recent[STUB_COPIES]; /* a ring */
static unsigned copies_done;

uint64_t stub_cuda_copied(void)
{
	return copied;
}

struct stub_copy stub_cuda_copy(unsigned ago)
{
	return recent[(copies_done - 1 - ago) % STUB_COPIES];
}

static void copy_half(const struct cuda_copy_2d *copy, unsigned half)
{
	const size_t middle = copy->width / 2;

	if (half == 0) {
		for (size_t row = 0; row < copy->rows; row++)
			memset((char *)(uintptr_t)copy->to + row * copy->to_pitch + middle, GARBAGE,
			       copy->width - middle);
		copy_rows(copy, 0, copy->rows, 0, middle);
		return;
	}
	copy_rows(copy, 0, copy->rows, middle, copy->width);
	copied += copy->width * copy->rows;
	recent[copies_done++ % STUB_COPIES] = (struct stub_copy){copy->to, copy->width * copy->rows};
	if (stub_setting(STUB_GARBLE) && stub_is_memory(copy->from) && stub_is_memory(copy->to))
		*(unsigned char *)(uintptr_t)copy->to ^= 1;
}

/* There is only one kernel. */
static void count_differences(const struct comparison *work)
{
	const uint32_t *a = (const uint32_t *)(uintptr_t)work->a;
	const uint32_t *b = (const uint32_t *)(uintptr_t)work->b;

	for (uint64_t i = 0; i < work->words; i++)
		*(uint64_t *)(uintptr_t)work->counter += a[i] != b[i];
}

/* Runs a step of a leaf; 1 when it is finished. */
static int run_leaf(const struct operation *operation, unsigned half)
{
	if (operation->kind == COPY) {
		copy_half(&operation->copy, half);
		return half == 1;
	}
	if (operation->kind == HOST)
		operation->function(operation->argument);
	else
		count_differences(&operation->comparison);
	return 1;
}

static void unreference(struct CUgraph_st *graph)
{
	if (--graph->references)
		return;
	free(graph->nodes);
	free(graph->before);
	free(graph);
}

static int node_may_run(const struct operation *launch, size_t node)
{
	const struct CUgraph_st *graph = launch->graph;

	for (size_t i = 0; i < graph->count; i++)
		if ((graph->before[node].words[i / 64] >> (i % 64) & 1) && launch->done[i] != 2)
			return 0;
	return launch->done[node] != 2;
}

/* A step of any node that may run; 1 when all are done. */
static int run_graph(struct operation *launch)
{
	const size_t count = launch->graph->count;
	const size_t start = count ? random_below(count) : 0;
	size_t left = 0;

	for (size_t i = 0; i < count; i++) {
		const size_t node = (start + i) % count;

		if (!node_may_run(launch, node))
			continue;
		launch->done[node] = run_leaf(&launch->graph->nodes[node], launch->done[node]) ? 2 : 1;
		break;
	}
	for (size_t i = 0; i < count; i++)
		left += launch->done[i] != 2;
	if (left)
		return 0;
	free(launch->done);
	unreference(launch->graph);
	return 1;
}

static void pop(struct CUstream_st *stream)
{
	stream->done++;
	memmove(stream->queue, stream->queue + 1, (size_t)(stream->queued - stream->done) * sizeof *stream->queue);
}

static int may_run(const struct CUstream_st *stream)
{
	if (stream->done == stream->queued)
		return 0;
	return stream->queue[0].kind != WAIT || stream->queue[0].stream->done >= stream->queue[0].count;
}

static void run_head(struct CUstream_st *stream)
{
	struct operation *head = &stream->queue[0];
	int finished = 1;

	if (head->kind == LAUNCH)
		finished = run_graph(head);
	else if (head->kind != WAIT)
		finished = run_leaf(head, head->halves++);
	if (finished)
		pop(stream);
}

/* One step of any stream; 0 when none can. */
static int step(void)
{
	struct CUstream_st *ready[MOST_READY];
	size_t count = 0;

	if (stub_setting(STUB_STUCK))
		return 0;
	if (may_run(&legacy))
		ready[count++] = &legacy;
	for (struct CUstream_st *stream = streams; stream && count < MOST_READY; stream = stream->next)
		if (may_run(stream))
			ready[count++] = stream;
	if (count == 0)
		return 0;
	run_head(ready[random_below(count)]);
	return 1;
}

static void run_at_once(void)
{
	while (!stub_setting(STUB_LATE) && step())
		;
}

/* ---- enqueueing ---- */

static void push(struct CUstream_st *stream, const struct operation *operation)
{
	const size_t length = (size_t)(stream->queued - stream->done);

	if (stream->capture) {
		struct CUgraph_st *graph = stream->capture->graph;

		if (graph->count == NODES)
			abort();
		graph->nodes[graph->count] = *operation;
		graph->before[graph->count] = stream->before;
		stream->before.words[graph->count / 64] |= (uint64_t)1 << (graph->count % 64);
		graph->count++;
		return;
	}
	if (length == stream->room) {
		stream->room = stream->room ? 2 * stream->room : 16;
		stream->queue = realloc(stream->queue, stream->room * sizeof *stream->queue);
		if (!stream->queue)
			abort();
	}
	stream->queue[length] = *operation;
	stream->queued++;
	run_at_once();
}

static cuda_result check_stream(const struct CUstream_st *stream)
{
	if (!stub_has_context())
		return STUB_INVALID_CONTEXT;
	return stream->capture && stream->capture->broken ? STUB_CAPTURE_INVALIDATED : CUDA_OK;
}

static cuda_result break_capture(struct CUstream_st *stream, cuda_result why)
{
	stream->capture->broken = 1;
	return why;
}

cuda_result cuMemcpyAsync(cuda_address to, cuda_address from, size_t bytes, cuda_stream stream)
{
	const struct operation copy = {.kind = COPY, .copy = {.from = from, .to = to, .width = bytes, .rows = 1}};
	cuda_result result;

	STUB_ENTER();
	from_legacy = stub_is_opened(from);
	result = check_stream(stream_of(stream));
	if (result == CUDA_OK)
		push(stream_of(stream), &copy);
	return stub_leave(result);
}

cuda_result cuMemcpy2DAsync_v2(const struct cuda_copy_2d *wish, cuda_stream stream)
{
	const struct operation copy = {.kind = COPY, .copy = *wish};
	cuda_result result;

	STUB_ENTER();
	result = check_stream(stream_of(stream));
	if (wish->from_kind != CUDA_KIND_UNIFIED || wish->to_kind != CUDA_KIND_UNIFIED ||
	    wish->from_pitch < wish->width || wish->to_pitch < wish->width)
		result = STUB_INVALID_VALUE;
	if (result == CUDA_OK)
		push(stream_of(stream), &copy);
	return stub_leave(result);
}

cuda_result cuLaunchHostFunc(cuda_stream stream, void (*function)(void *), void *argument)
{
	const struct operation call = {.kind = HOST, .function = function, .argument = argument};
	cuda_result result;

	STUB_ENTER();
	result = check_stream(stream_of(stream));
	if (result == CUDA_OK)
		push(stream_of(stream), &call);
	return stub_leave(result);
}

cuda_result cuModuleLoadData(cuda_module *module, const void *image)
{
	STUB_ENTER();
	*module = (cuda_module)(uintptr_t)image;
	return stub_leave(stub_has_context() ? CUDA_OK : STUB_INVALID_CONTEXT);
}

cuda_result cuModuleGetFunction(cuda_function *function, cuda_module module, const char *name)
{
	STUB_ENTER();
	*function = (cuda_function)(void *)module;
	return stub_leave(strcmp(name, CUDA_TEST_KERNEL) ? STUB_INVALID_VALUE : CUDA_OK);
}

cuda_result cuLaunchKernel(cuda_function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
			   unsigned block_y, unsigned block_z, unsigned shared, cuda_stream stream, void **parameters,
			   void **extra)
{
	struct operation call = {.kind = CALL};
	cuda_result result;

	STUB_ENTER();
	if (!function || grid_x * grid_y * grid_z * block_x * block_y * block_z == 0 || shared || extra)
		return stub_leave(STUB_INVALID_VALUE);
	call.comparison = (struct comparison){*(uint64_t *)parameters[0], *(uint64_t *)parameters[1],
					      *(uint64_t *)parameters[2], *(uint64_t *)parameters[3]};
	result = check_stream(stream_of(stream));
	if (result == CUDA_OK)
		push(stream_of(stream), &call);
	return stub_leave(result);
}

/* ---- streams ---- */

static unsigned first_streams;

unsigned stub_cuda_first_streams(void)
{
	return first_streams;
}

cuda_result cuStreamCreateWithPriority(cuda_stream *stream, unsigned flags, int priority)
{
	STUB_ENTER();
	if (flags != CUDA_STREAM_NON_BLOCKING || priority > 0 || priority < STUB_HIGHEST)
		return stub_leave(STUB_INVALID_VALUE);
	first_streams += priority == STUB_HIGHEST;
	*stream = some(1, sizeof **stream);
	(*stream)->next = streams;
	streams = *stream;
	stub_count(1);
	return stub_leave(CUDA_OK);
}

/* What does not end is given up. */
static void drop_launches(const struct CUstream_st *stream)
{
	for (uint64_t i = 0; i < stream->queued - stream->done; i++)
		if (stream->queue[i].kind == LAUNCH) {
			free(stream->queue[i].done);
			unreference(stream->queue[i].graph);
		}
}

cuda_result cuStreamDestroy_v2(cuda_stream stream)
{
	const cuda_result injected = stub_enter(__func__);

	while (stream->done != stream->queued && step())
		;
	for (struct CUstream_st **link = &streams; *link; link = &(*link)->next)
		if (*link == stream) {
			*link = stream->next;
			break;
		}
	drop_launches(stream);
	free(stream->queue);
	*stream = (struct CUstream_st){.next = destroyed, .done = stream->queued, .queued = stream->queued};
	destroyed = stream;
	stub_count(-1);
	return stub_leave(injected);
}

cuda_result cuStreamSynchronize(cuda_stream stream)
{
	cuda_result unsafe;

	STUB_ENTER();
	unsafe = stub_unsafe_call();
	while (unsafe == CUDA_OK && stream_of(stream)->done != stream_of(stream)->queued)
		if (!step())
			return stub_leave(CUDA_NOT_READY); /* the real one would not return */
	return stub_leave(unsafe);
}

/* ---- events ---- */

cuda_result cuEventCreate(cuda_event *event, unsigned flags)
{
	STUB_ENTER();
	if (!stub_has_context())
		return stub_leave(STUB_INVALID_CONTEXT);
	*event = some(1, sizeof **event);
	(*event)->flags = flags;
	stub_count(1);
	return stub_leave(CUDA_OK);
}

/* As the real one: an error of earlier work may be told here, and the event goes all the same. */
cuda_result cuEventDestroy_v2(cuda_event event)
{
	const cuda_result injected = stub_enter(__func__);

	free(event);
	stub_count(-1);
	return stub_leave(injected);
}

cuda_result cuEventRecord(cuda_event event, cuda_stream stream)
{
	struct CUstream_st *on = stream_of(stream);
	cuda_result result;

	STUB_ENTER();
	result = check_stream(on);
	if (result != CUDA_OK)
		return stub_leave(result);
	event->stream = on;
	event->count = on->queued;
	event->capture = on->capture ? on->capture->number : 0;
	event->before = on->before;
	return stub_leave(CUDA_OK);
}

static int is_past(const struct CUevent_st *event)
{
	return !event->stream || event->stream->done >= event->count;
}

cuda_result cuEventQuery(cuda_event event)
{
	cuda_result unsafe;

	STUB_ENTER();
	unsafe = stub_unsafe_call();
	if (unsafe)
		return stub_leave(unsafe);
	if (event->capture)
		return stub_leave(STUB_CAPTURED_EVENT);
	for (uint64_t steps = stub_setting(STUB_LATE) ? random_below(4) : 0; steps > 0; steps--)
		step();
	return stub_leave(is_past(event) ? CUDA_OK : CUDA_NOT_READY);
}

cuda_result cuEventElapsedTime(float *milliseconds, cuda_event from, cuda_event to)
{
	STUB_ENTER();
	if ((from->flags | to->flags) & CUDA_EVENT_WITHOUT_TIME)
		return stub_leave(STUB_INVALID_HANDLE);
	*milliseconds = (float)stub_setting(from_legacy ? STUB_LEGACY_FETCH_NS : STUB_FETCH_NS) / 1e6f;
	return stub_leave(CUDA_OK);
}

/* ---- captures ---- */

static struct capture *find_capture(uint64_t number)
{
	for (struct CUstream_st *stream = streams; stream; stream = stream->next)
		if (stream->capture && stream->capture->number == number)
			return stream->capture;
	return NULL;
}

static cuda_result wait_captured(struct CUstream_st *stream, const struct CUevent_st *event)
{
	struct capture *capture = find_capture(event->capture);

	if (!capture)
		return stream->capture ? break_capture(stream, STUB_CAPTURE_ISOLATION) : STUB_CAPTURED_EVENT;
	if (!stream->capture) {
		stream->capture = capture; /* drawn into it */
		memset(&stream->before, 0, sizeof stream->before);
	}
	if (stream->capture != capture)
		return break_capture(stream, STUB_CAPTURE_MERGE);
	for (size_t i = 0; i < NODES / 64; i++)
		stream->before.words[i] |= event->before.words[i];
	return CUDA_OK;
}

cuda_result cuStreamWaitEvent(cuda_stream stream, cuda_event event, unsigned flags)
{
	struct CUstream_st *waiting = stream_of(stream);
	const struct operation wait = {.kind = WAIT, .stream = event->stream, .count = event->count};
	cuda_result result;

	STUB_ENTER();
	result = flags ? STUB_INVALID_VALUE : check_stream(waiting);
	if (result == CUDA_OK && event->capture)
		result = wait_captured(waiting, event);
	else if (result == CUDA_OK && waiting->capture)
		result = break_capture(waiting, STUB_CAPTURE_ISOLATION);
	else if (result == CUDA_OK && !is_past(event))
		push(waiting, &wait);
	return stub_leave(result);
}

int stub_capture_in_progress(void)
{
	for (const struct CUstream_st *stream = streams; stream; stream = stream->next)
		if (stream->capture && stream->capture->mode == 0)
			return 1;
	return 0;
}

void stub_invalidate_captures(void)
{
	for (struct CUstream_st *stream = streams; stream; stream = stream->next)
		if (stream->capture && stream->capture->mode == 0)
			stream->capture->broken = 1;
}

cuda_result cuStreamIsCapturing(cuda_stream stream, int *state)
{
	const struct CUstream_st *asked = stream_of(stream);

	STUB_ENTER();
	*state = !asked->capture ? CUDA_CAPTURE_NONE : asked->capture->broken ? 2 : CUDA_CAPTURE_ACTIVE;
	return stub_leave(CUDA_OK);
}

cuda_result cuStreamGetCaptureInfo_v2(cuda_stream stream, int *state, uint64_t *number, void **graph,
				      const void ***nodes, size_t *count)
{
	const struct CUstream_st *asked = stream_of(stream);

	STUB_ENTER();
	if (graph || nodes || count)
		return stub_leave(CUDA_UNSUPPORTED);
	*state = !asked->capture ? CUDA_CAPTURE_NONE : asked->capture->broken ? 2 : CUDA_CAPTURE_ACTIVE;
	if (*state == CUDA_CAPTURE_ACTIVE)
		*number = asked->capture->number;
	return stub_leave(CUDA_OK);
}

cuda_result cuStreamBeginCapture_v2(cuda_stream stream, int mode)
{
	STUB_ENTER();
	if (!stream || stream->capture)
		return stub_leave(STUB_INVALID_VALUE);
	stream->capture = some(1, sizeof *stream->capture);
	stream->capture->number = ++captures;
	stream->capture->mode = mode;
	stream->capture->origin = stream;
	stream->capture->graph = some(1, sizeof *stream->capture->graph);
	stream->capture->graph->nodes = some(NODES, sizeof *stream->capture->graph->nodes);
	stream->capture->graph->before = some(NODES, sizeof *stream->capture->graph->before);
	stream->capture->graph->references = 1;
	memset(&stream->before, 0, sizeof stream->before);
	return stub_leave(CUDA_OK);
}

static int is_joined(const struct CUstream_st *origin, const struct CUstream_st *stream)
{
	for (size_t i = 0; i < NODES / 64; i++)
		if (stream->before.words[i] & ~origin->before.words[i])
			return 0;
	return 1;
}

cuda_result cuStreamEndCapture(cuda_stream stream, cuda_graph *graph)
{
	struct capture *capture = stream->capture;
	cuda_result result = stub_enter(__func__); /* whatever it is, the capture has ended */

	if (!capture || capture->origin != stream)
		return stub_leave(STUB_CAPTURE_UNMATCHED);
	for (struct CUstream_st *other = streams; other; other = other->next) {
		if (other->capture != capture)
			continue;
		if (!is_joined(stream, other))
			result = STUB_CAPTURE_UNJOINED;
		other->capture = NULL;
	}
	if (capture->broken)
		result = STUB_CAPTURE_INVALIDATED;
	if (result == CUDA_OK) {
		*graph = capture->graph;
		stub_count(1);
	} else {
		*graph = NULL;
		unreference(capture->graph);
	}
	free(capture);
	return stub_leave(result);
}

/* ---- graphs ---- */

cuda_result cuGraphInstantiateWithFlags(cuda_graph_exec *exec, cuda_graph graph, uint64_t flags)
{
	STUB_ENTER();
	*exec = NULL;
	if (flags)
		return stub_leave(STUB_INVALID_VALUE);
	graph->references++;
	*exec = (cuda_graph_exec)(void *)graph;
	stub_count(1);
	return stub_leave(CUDA_OK);
}

cuda_result cuGraphUpload(cuda_graph_exec exec, cuda_stream stream)
{
	STUB_ENTER();
	return stub_leave(exec ? check_stream(stream_of(stream)) : STUB_INVALID_VALUE);
}

cuda_result cuGraphLaunch(cuda_graph_exec exec, cuda_stream stream)
{
	struct operation launch = {.kind = LAUNCH, .graph = (struct CUgraph_st *)(void *)exec};

	STUB_ENTER();
	launch.graph->references++;
	launch.done = some(launch.graph->count + 1, 1);
	push(stream_of(stream), &launch);
	return stub_leave(CUDA_OK);
}

cuda_result cuGraphExecDestroy(cuda_graph_exec exec)
{
	const cuda_result injected = stub_enter(__func__);

	unreference((struct CUgraph_st *)(void *)exec);
	stub_count(-1);
	return stub_leave(injected);
}

cuda_result cuGraphDestroy(cuda_graph graph)
{
	const cuda_result injected = stub_enter(__func__);

	unreference(graph);
	stub_count(-1);
	return stub_leave(injected);
}

void stub_streams_reset(void)
{
	randomness = 0;
	first_streams = 0;
}
