/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_calls.h - what tests call of NVIDIA's driver besides what the transport does: graphs, a kernel, the free memory.
 */
#ifndef TESTS_CUDA_CALLS_H
#define TESTS_CUDA_CALLS_H

#include "cuda_driver.h"

typedef struct CUmod_st *cuda_module;
typedef struct CUfunc_st *cuda_function;

#define CUDA_TEST_FUNCTIONS(X)                                                                                         \
	X(memory_info, cuMemGetInfo_v2, (size_t *free, size_t *total))                                                 \
	X(context_set, cuCtxSetCurrent, (cuda_context context))                                                        \
	X(stream_synchronize, cuStreamSynchronize, (cuda_stream stream))                                               \
	X(capture_begin, cuStreamBeginCapture_v2, (cuda_stream stream, int mode))                                      \
	X(capture_end, cuStreamEndCapture, (cuda_stream stream, cuda_graph * graph))                                   \
	X(graph_instantiate, cuGraphInstantiateWithFlags, (cuda_graph_exec * exec, cuda_graph graph, uint64_t flags))  \
	X(graph_launch, cuGraphLaunch, (cuda_graph_exec exec, cuda_stream stream))                                     \
	X(graph_exec_destroy, cuGraphExecDestroy, (cuda_graph_exec exec))                                              \
	X(graph_destroy, cuGraphDestroy, (cuda_graph graph))                                                           \
	X(module_load, cuModuleLoadData, (cuda_module * module, const void *image))                                    \
	X(module_function, cuModuleGetFunction, (cuda_function * function, cuda_module module, const char *name))      \
	X(launch, cuLaunchKernel,                                                                                      \
	  (cuda_function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,                \
	   unsigned block_y, unsigned block_z, unsigned shared, cuda_stream stream, void **parameters, void **extra))

/* The one kernel of the tests: count_differences(a, b, words, counter, turns), all 64 bits wide; words of 32 bits. */
#define CUDA_TEST_KERNEL "count_differences"

#endif
