/* SPDX-License-Identifier: Apache-2.0
 *
 * stub_cuda.h - a stand-in for NVIDIA's driver library on machines without a device, and how tests steer it.
 *
 * Device memory is host memory in files without names, so what one process exports another really maps. Device pointers
 * are host pointers: a test may look through them once the streams are done. Streams run their work at once, or late
 * and in any order that events allow; captures keep the driver's rules and are replayed in any such order.
 *
 * Each process steers its own copy; a fork inherits its parent's settings.
 */
#ifndef STUB_CUDA_H
#define STUB_CUDA_H

#include "cuda_calls.h"

#include <stddef.h>
#include <stdint.h>

enum stub_setting {
	STUB_VERSION,        /* 13000 */
	STUB_DEVICES,        /* 8 */
	STUB_ONE_DEVICE,     /* 1: all device numbers are one physical device */
	STUB_VIRTUAL_MEMORY, /* attributes; 1 */
	STUB_DESCRIPTORS,
	STUB_FABRIC,
	STUB_CHANNEL,         /* 1: fabric handles are granted */
	STUB_CLUSTER,         /* the domain: the last byte of its UUID, 0: none; 1 */
	STUB_CLIQUE,          /* in it */
	STUB_READ_ONLY,       /* 1: read-only access is granted */
	STUB_MEMORY_BYTES,    /* of a device, as far as this process sees; 1 GiB */
	STUB_FETCH_NS,        /* what any two timed events are apart; 50000 */
	STUB_LEGACY_FETCH_NS, /* the same after a copy from a peer's legacy allocation; 50000 */
	STUB_LATE,            /* not 0: seed; work runs only when somebody asks for its end */
	STUB_STUCK,           /* 1: no work ends */
	STUB_GARBLE,          /* 1: copies between devices change their first byte */
	STUB_CROOKED,         /* bytes by which allocations lie beside where they should */
	STUB_SETTINGS
};

void stub_cuda_set(enum stub_setting setting, int64_t value);
enum { STUB_KILLED = -1 }; /* instead of a result */

/*
 * The @p nth call (1: the next) of the function with this symbol returns @p result, or kills this process where it is
 * STUB_KILLED; 0 as nth: never.
 */
void stub_cuda_fail(const char *symbol, unsigned nth, cuda_result result);
/* Calls of the function so far; NULL: of all. */
unsigned stub_cuda_calls(const char *symbol);
/* All settings and counts as at the beginning. */
void stub_cuda_reset(void);
/* Contexts, streams, events, memory, mappings, graphs that this process has and has not given back. */
int stub_cuda_outstanding(void);
/* Memory of the device that this process has made, and not given back. */
uint64_t stub_cuda_bytes(void);
/* Mappings of other processes' memory that were made writable so far, and streams of the highest priority. */
unsigned stub_cuda_writable_imports(void);
unsigned stub_cuda_first_streams(void);
/* Bytes that this process' copies have moved so far. */
uint64_t stub_cuda_copied(void);
/* The latest of them, the last one first: where to, and how many bytes. At most STUB_COPIES are remembered. */
enum { STUB_COPIES = 16 };
struct stub_copy {
	cuda_address to;
	uint64_t bytes;
};
struct stub_copy stub_cuda_copy(unsigned ago);

#define STUB_DECLARE(member, symbol, parameters) cuda_result symbol parameters;
CUDA_FUNCTIONS(STUB_DECLARE)
CUDA_TEST_FUNCTIONS(STUB_DECLARE)
#undef STUB_DECLARE

#endif
