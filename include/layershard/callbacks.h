/* SPDX-License-Identifier: Apache-2.0
 *
 * The caller's own collectives, and its device: what the transport "callback" carries layers with, and by which ranks
 * of the transport "fabric" exchange records (all-gathers in host memory, no layer). A program gives them in
 * lshard_group_options.
 */
#ifndef LAYERSHARD_CALLBACKS_H
#define LAYERSHARD_CALLBACKS_H

#include <layershard/layershard.h>

#ifdef __cplusplus
extern "C" {
#endif

/**
 * The caller's device, for the transport "callback": the library itself calls no driver. It goes on to agree in host
 * memory on every collective; then broadcast and allgather get addresses in device memory, and put the collective on
 * @p stream, behind what is there. OK from finish then means: what is put on @p stream from now on comes after it. A
 * backend that blocks the host until its bytes are there does that too.
 *
 * All get the user of lshard_callbacks and are called by any thread, several at a time. None may wait for the device.
 * A failure is a negative status with a text in @p error, and is the end of the group where a collective needed it.
 *
 * allocate   @p bytes of zeros that are there when it returns; NULL: no memory. Used for what has no
 *            lshard_memory_source.
 * record     after what @p stream (@p stream of this struct, or one of the program's) has been given so far. *event is
 *            the caller's own; where it is NULL a new one is made.
 * wait       for the event: what @p stream is given from now on comes after it.
 * query      OK: what comes before the event is done. IN_PROGRESS: not yet.
 * drop       free an event.
 * copy       put on @p stream of this struct: @p rows runs of @p width bytes; one side may be host memory, and then the
 *            call may wait for the copy.
 * capturing  1 while the stream is recorded into a graph, in which nothing can be agreed on: calls are refused then.
 */
typedef struct lshard_device_callbacks {
	size_t struct_size;
	void *stream;
	void *(*allocate)(void *user, size_t bytes, size_t alignment);
	void (*release)(void *user, void *pointer);
	lshard_status (*record)(void *user, void **event, void *stream, char *error, size_t error_bytes);
	lshard_status (*wait)(void *user, void *stream, void *event, char *error, size_t error_bytes);
	lshard_status (*query)(void *user, void *event, char *error, size_t error_bytes);
	void (*drop)(void *user, void *event);
	lshard_status (*copy)(void *user, void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
			      size_t rows, char *error, size_t error_bytes);
	int (*capturing)(void *user, void *stream);
} lshard_device_callbacks;

#define LSHARD_DEVICE_CALLBACKS_INIT                                                                                   \
	{sizeof(lshard_device_callbacks), NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL}

/**
 * The caller's collectives, for the transport "callback": whatever broadcasts and all-gathers among the ranks can carry
 * the layers, step by step on all of them. For a communicator that nothing else uses: the library makes the same calls
 * in the same order on every rank, whatever the ranks do.
 *
 * All are called by one thread of the library's own, one at a time; the caller's threads go on meanwhile. They must not
 * call the library, and must return: lshard_group_abort waits 0.3 s for that, lshard_group_destroy as long as the
 * deadline; then the thread is left to itself, with all memory. A failure is a negative status (PEER_FAILED, TRANSPORT,
 * ...) with a text in @p error: the library then calls stop and nothing else, and every call on the group returns that
 * status and text.
 *
 * Who is missing: a rank that makes no call says nothing, and a collective that lacks a rank does not tell which. With
 * @p roll_calls the ranks make a small all-gather also where nothing else is to be done, an eighth of timeout_ms after
 * the last collective, a second at most: a TIMEOUT then names the ranks that came to no call, and what they are at. Not
 * for collectives that the program may end while the group still is (a process group of PyTorch): they would be ended
 * under a call. Without it a TIMEOUT names those that came to another call, and of two ranks the other one; else it
 * says "one of ranks 0, 2" and when all were last heard of. A rank that is aborted says so to the others, for up to 0.2
 * s. What the library cannot know: which rank is gone, where a collective fails: @p error alone may say it, in
 * PEER_FAILED (of two ranks it is the other one); and which rank does not answer, where a collective neither fails nor
 * ends. A rank that gives up while the others count on it, a quarter of timeout_ms after its deadline, ends the group
 * for all.
 *
 * broadcast  start to carry @p count bytes at @p bytes from rank @p root to the same place on the others; those of the
 *            root are only read. *work is the caller's own: finish gets it once the call returned OK.
 * allgather  start an all-gather: every rank gives @p count bytes at @p send and gets those of all ranks, in rank
 *            order, at @p receive.
 * finish     wait for what was started, at most @p timeout_ms. OK: it is done. IN_PROGRESS: not yet, it goes on and
 *            finish is called again. ABORTED: it is given up although memory may still be touched, which is then
 *            never freed. Anything else: it failed, and memory is not touched any more.
 * stop       this rank takes part in nothing any more: what the others wait for should fail. What is in progress should
 *            end; finish is called for it until it does, or timeout_ms of the group have passed: then its memory is
 *            never freed. Once per group at most, by lshard_group_abort, lshard_group_destroy or a failure; may be
 *            NULL.
 *
 * For layers in device memory there must be a @p device: see lshard_device_callbacks.
 */
typedef struct lshard_callbacks {
	size_t struct_size;
	lshard_status (*broadcast)(void *user, void *bytes, size_t count, int32_t root, void **work, char *error,
				   size_t error_bytes);
	lshard_status (*allgather)(void *user, const void *send, void *receive, size_t count, void **work, char *error,
				   size_t error_bytes);
	lshard_status (*finish)(void *user, void *work, uint32_t timeout_ms, char *error, size_t error_bytes);
	void (*stop)(void *user);
	void *user;
	const lshard_device_callbacks *device; /* copied; NULL: layers in host memory only */
	int32_t roll_calls;                    /* 1: allgather may be called while the program makes no call */
} lshard_callbacks;

#define LSHARD_CALLBACKS_INIT {sizeof(lshard_callbacks), NULL, NULL, NULL, NULL, NULL, NULL, 0}

#ifdef __cplusplus
}
#endif
#endif
