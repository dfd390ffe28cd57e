/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_calls_trace.c - the cuda transport's calls of the driver in a pass: counted, timed, left out or refused. Knows
 * the transport's table of the driver's functions and puts its own there; one group of a process at a time.
 */
#include "cuda_transport.h"
#include "gpu_calls.h"
#include "internal.h"

#include <string.h>

struct trace gpu_trace;

static struct cuda_driver real;
static cuda_context known;

const char *const gpu_traced_names[TRACED] = {"cuCtxGetCurrent",   "cuStreamIsCapturing", "cuEventRecord",
					      "cuStreamWaitEvent", "cuGraphLaunch",       "cuMemcpyAsync",
					      "cuMemcpy2DAsync",   "cuLaunchHostFunc"};

static cuda_result note(enum traced what, double begin, cuda_result result)
{
	gpu_trace.us[what] += gpu_trace.on ? gpu_now_us() - begin : 0;
	gpu_trace.calls[what]++;
	return result;
}

static double now(void)
{
	return gpu_trace.on ? gpu_now_us() : 0;
}

static cuda_result context_current(cuda_context *context)
{
	const double begin = now();

	if (gpu_trace.unasked) {
		*context = known;
		return CUDA_OK;
	}
	return note(TRACED_CONTEXT, begin, real.context_current(context));
}

static cuda_result stream_is_capturing(cuda_stream stream, int *state)
{
	const double begin = now();

	if (gpu_trace.unasked) {
		*state = CUDA_CAPTURE_NONE;
		return CUDA_OK;
	}
	return note(TRACED_CAPTURING, begin, real.stream_is_capturing(stream, state));
}

static cuda_result event_record(cuda_event event, cuda_stream stream)
{
	const double begin = now();

	return note(TRACED_RECORD, begin, real.event_record(event, stream));
}

static cuda_result stream_wait(cuda_stream stream, cuda_event event, unsigned flags)
{
	const double begin = now();

	return note(TRACED_WAIT, begin, real.stream_wait(stream, event, flags));
}

static cuda_result graph_launch(cuda_graph_exec exec, cuda_stream stream)
{
	const double begin = now();

	return note(TRACED_LAUNCH, begin, real.graph_launch(exec, stream));
}

static cuda_result copy(cuda_address to, cuda_address from, size_t bytes, cuda_stream stream)
{
	const double begin = now();

	return note(TRACED_COPY, begin, real.copy(to, from, bytes, stream));
}

static cuda_result copy_2d(const struct cuda_copy_2d *wish, cuda_stream stream)
{
	const double begin = now();

	return note(TRACED_COPY_2D, begin, real.copy_2d(wish, stream));
}

static cuda_result host_function(cuda_stream stream, void (*function)(void *), void *argument)
{
	const double begin = now();

	return note(TRACED_HOST, begin, real.host_function(stream, function, argument));
}

static cuda_result capture_begin(cuda_stream stream, int mode)
{
	return gpu_trace.refuse ? CUDA_UNSUPPORTED : real.capture_begin(stream, mode);
}

void gpu_trace_group(lshard_group *group)
{
	struct cuda *cuda = (struct cuda *)group->transport;

	real = cuda->driver;
	known = cuda->context;
	cuda->driver.context_current = context_current;
	cuda->driver.stream_is_capturing = stream_is_capturing;
	cuda->driver.event_record = event_record;
	cuda->driver.stream_wait = stream_wait;
	cuda->driver.graph_launch = graph_launch;
	cuda->driver.copy = copy;
	cuda->driver.copy_2d = copy_2d;
	cuda->driver.host_function = host_function;
	cuda->driver.capture_begin = capture_begin;
}

void gpu_trace_clear(void)
{
	memset(gpu_trace.us, 0, sizeof gpu_trace.us);
	memset(gpu_trace.calls, 0, sizeof gpu_trace.calls);
}
