/* SPDX-License-Identifier: Apache-2.0
 *
 * stub_world.h - what the files of the stub share: its lock, its settings, what is made to fail.
 */
#ifndef STUB_WORLD_H
#define STUB_WORLD_H

#include "stub_cuda.h"

enum {
	STUB_INVALID_VALUE = 1,
	STUB_INVALID_CONTEXT = 201,
	STUB_INVALID_HANDLE = 400,
	STUB_CAPTURE_UNSUPPORTED = 900,
	STUB_CAPTURE_INVALIDATED = 901,
	STUB_CAPTURE_MERGE = 902,
	STUB_CAPTURE_UNMATCHED = 903,
	STUB_CAPTURE_UNJOINED = 904,
	STUB_CAPTURE_ISOLATION = 905,
	STUB_CAPTURED_EVENT = 907,
};
enum { STUB_HIGHEST = -5 }; /* priority of streams; the lowest is 0 */

/* Every function begins with STUB_ENTER and returns stub_leave(result). */
#define STUB_ENTER()                                                                                                   \
	do {                                                                                                           \
		const cuda_result injected = stub_enter(__func__);                                                     \
		if (injected)                                                                                          \
			return stub_leave(injected);                                                                   \
	} while (0)

cuda_result stub_enter(const char *symbol); /* takes the lock */
cuda_result stub_leave(cuda_result result); /* gives it back */
int64_t stub_setting(enum stub_setting setting);
void stub_count(int objects);
/* Is a context current in this thread? */
int stub_has_context(void);
/* Number of the device whose context is current. */
int stub_device(void);
/* May this thread make calls that could disturb a capture? If not, captures in progress are invalidated. */
cuda_result stub_unsafe_call(void);

/* stub_memory.c */
void stub_memory_reset(void);
/* Is it in the memory of a device? */
int stub_is_memory(cuda_address address);
/* Does it lie in a peer's legacy allocation? */
int stub_is_opened(cuda_address address);

/* stub_stream.c */
void stub_streams_reset(void);
int stub_capture_in_progress(void);
void stub_invalidate_captures(void);

#endif
