/* SPDX-License-Identifier: Apache-2.0
 *
 * callback.h - what the files of the callback transport share. Each calls those before it, and none after it:
 * callback_calls.c (one of the caller's collectives, and what all look at under the lock), callback_device.c (order on
 * streams, where layers live in device memory), callback_store.c (memory, and which collective carries a layer),
 * callback_rounds.c (what the ranks say to each other), callback_worker.c (the thread that calls the caller) and
 * callback.c (table, what the ring asks for).
 *
 * One thread makes all of the caller's collectives. What is to be done stands in a queue, in the order of the calls. As
 * collectives that do not match hang or mix up bytes, each begins with a round: every rank all-gathers an announcement
 * of one size that says what it is about to do. All ranks then evaluate the same announcements, and only what is the
 * same on all of them is done. A rank that only waits is so never waited for in vain by its own fault, and ranks that
 * went different ways are told so, all in the same round.
 *
 * A rank that has nothing to do answers too, from time to time: the roll call, a round at the same moment on all ranks.
 * So whoever waits in vain can say for whom, and what they are at. Only a rank whose thread cannot answer has no name.
 */
#ifndef LAYERSHARD_CALLBACK_H
#define LAYERSHARD_CALLBACK_H

#include <layershard/callbacks.h>
#include <layershard/transport.h>
#include <pthread.h>
#include <stdbool.h>

/* ROLL_CALL: nothing to do. LEAVING: this is the last round of a rank that was aborted. */
enum kind { TRANSFER = 1, EXCHANGE, READ, ROLL_CALL, LEAVING };

/* What stands in the queue. */
struct operation {
	enum kind kind;
	struct callback_store *store; /* not of exchanges */
	uint32_t position;
	uint32_t buffer;   /* of transfers; LSHARD_NO_BUFFER: only gives */
	uint64_t sequence; /* of transfers: the group's number */
	uint64_t ticket;
	size_t bytes; /* of exchanges */
};

/* The caller that is blocked in an exchange or a read; there is one at most. */
struct visitor {
	uint64_t ticket;                           /* of its operation; 0: nobody is there */
	enum { WAITING, COMMITTED, SERVED } stage; /* COMMITTED: the others count on it, it cannot leave any more */
	lshard_status status;
	lshard_error error;
	const void *send;
	void *receive;     /* of an exchange */
	uint8_t *alive;    /* of an exchange that is late: [size] who came */
	void *destination; /* of a read */
};

/* One transfer of an announcement. */
struct entry {
	uint64_t sequence;
	uint32_t store;
	uint32_t position;
};

#define ANNOUNCEMENT_ENTRIES 4

struct announcement {
	uint32_t kind;
	uint32_t entries; /* in use: transfers, or the one read */
	uint64_t bytes;   /* of an exchange */
	struct entry entry[ANNOUNCEMENT_ENTRIES];
};

/* What is all-gathered in the second step of exchanges and reads: a rank whose caller has left says so. */
struct vote {
	uint64_t here;
	unsigned char payload[LSHARD_EXCHANGE_BYTES];
};

/* The streams of the caller's that read one window, as many as the core allows. */
#define GATE_READERS 8

/* What comes before and after a window's bytes in stream order. */
struct gate {
	void *ready;      /* event after the last collective into it; NULL: none yet */
	uint32_t readers; /* under the lock, as fresh[] */
	void *streams[GATE_READERS];
	void *used[GATE_READERS]; /* event after what streams[i] had been given */
	bool fresh[GATE_READERS]; /* no collective follows it yet */
};

struct callback {
	lshard_transport base;
	lshard_transport_ops ops;       /* as the memory demands */
	lshard_device_callbacks device; /* of device memory */
	bool on_device;
	lshard_context context; /* copies: a worker that is lost may come back when the group has gone */
	lshard_callbacks calls;
	pthread_mutex_t lock;
	pthread_cond_t changed; /* anything below */
	pthread_t worker;
	bool started; /* the worker is to be joined */

	/* under the lock */
	struct operation *queue; /* a ring; the first is what the worker is at */
	uint32_t capacity, first, queued;
	bool busy;        /* the first is begun */
	uint64_t tickets; /* given out so far */
	struct visitor visitor;
	bool stopping; /* make an end: abort, close, or a caller that cannot be left waiting */
	bool aborted;
	uint64_t farewell_ns; /* an aborted rank goes on until then, so as to say that it leaves; 0: it does not */
	bool over;            /* the worker makes no collective any more */
	bool abandoned;       /* and left one in progress, whose memory must stay */
	bool lost;            /* the worker did not come back from the caller */
	lshard_status broken; /* a collective failed: all that comes fails */
	lshard_error why_broken;
	struct callback_store *stores; /* open ones: for messages */
	bool out_of_step;              /* transfers fail until the next exchange */
	lshard_error why_out_of_step;
	uint64_t asked_ns;         /* when the round under way began; 0: there is none */
	uint64_t roll_call_ns;     /* when the next one is due, if nothing else is to be done */
	uint64_t rounds;           /* that have ended */
	uint64_t round_ns;         /* when the last of them did */
	uint64_t asking;           /* ticket of the operation that came[] is about */
	uint8_t *came;             /* [size] who was seen in a round of that operation, at the same */
	struct announcement *seen; /* [size] the announcements of the last round */
	uint32_t passed;           /* entries of them that were carried out */
	uint64_t full;             /* ticket of the first when a fetch gave up for want of room */

	/* of the group's thread */
	uint32_t stores_opened; /* the same on all ranks, so it numbers them */
	uint64_t reserved;      /* buffers of all stores */

	/* the worker's alone */
	bool told; /* the caller's stop was called */
	struct announcement mine;
	struct announcement *announcements; /* [size] */
	struct vote vote;
	unsigned char *votes; /* [size] of the bytes in use */
	void *done;           /* event after a read's collective */
};

/* The last fetch into one buffer. */
struct landing {
	uint64_t ticket;
	bool pending;
	bool unwaited;
	lshard_status status;
	lshard_arrival arrival;
	lshard_error error;
};

struct callback_store {
	lshard_store base;
	uint32_t number;
	struct callback_store *next;
	uint32_t outstanding; /* operations in the queue; under the transport's lock */
	unsigned char *shard;
	void *shard_block; /* as allocated */
	unsigned char *buffers;
	void *buffers_block;
	uint64_t buffer_pitch;
	uint64_t part_bytes;    /* what every rank gives to a gathered layer; 0: none is gathered by way of staging */
	unsigned char *staging; /* [size] parts */
	void *staging_block;
	struct landing *landings; /* [buffers] */
	struct gate *gates;       /* device memory: [buffers + 1], the last for readers of nothing in particular */
	void *point;              /* event after all that is on the collectives' stream; the group's thread's */
	void *came;               /* event after what the program has put on its stream; the group's thread's */
};

static inline struct callback *callback_of(const lshard_transport *transport)
{
	return (struct callback *)transport;
}

static inline struct callback_store *callback_store_of(lshard_store *store)
{
	return (struct callback_store *)store;
}

static inline void *callback_window(const struct callback_store *store, uint32_t buffer)
{
	return store->buffers + buffer * store->buffer_pitch;
}

/* ---- callback_calls.c ---- */

/* With the lock: until something changes; false when @p deadline_ns has passed. */
bool callback_pause(struct callback *callback, uint64_t deadline_ns);
uint64_t callback_deadline(const struct callback *callback);
/* How much longer than its deadline a call may stay, so as not to leave the others without a word. */
uint64_t callback_grace(const struct callback *callback);
/* Between two roll calls. */
uint64_t callback_roll_call_pause(const struct callback *callback);
/* With the lock: append an operation, for which there is room. Returns its ticket. */
uint64_t callback_append(struct callback *callback, struct operation operation);
/* With the lock: no collective is begun or waited for any more. */
bool callback_at_end(const struct callback *callback);
/* With the lock: why nothing can be done any more, with its text; OK if it can. */
lshard_status callback_state(const struct callback *callback, lshard_error *error);
/* With the lock: until the worker, which has been told to stop, is over. One that does not come back from the caller's
 * functions is left to itself, with all memory. */
void callback_await_end(struct callback *callback);

/* The worker's: one collective from its start to its end. A failure is the end of the group: broken is set. */
lshard_status callback_allgather(struct callback *callback, const void *send, void *receive, size_t bytes);
lshard_status callback_broadcast(struct callback *callback, void *bytes, size_t count, int32_t root);
/* The end of the group, for a reason of the transport's own. */
lshard_status callback_break(struct callback *callback, lshard_status status, const char *text);
/* The caller's stop, once. */
void callback_stop_caller(struct callback *callback);
/* Who may be late where nothing tells which, written to @p text: "one of ranks 0, 2", or of two ranks "rank 1". */
const char *callback_others(const struct callback *callback, char *text, size_t bytes);

/* ---- callback_device.c: device memory only ---- */

lshard_status callback_device_take(struct callback *callback, const lshard_context *context, lshard_error *error);
bool callback_device_store_open(struct callback_store *store);
/* False: work on the device did not end; nothing of the store may be freed. */
bool callback_device_store_settle(struct callback_store *store);
void callback_device_store_close(struct callback_store *store);
void callback_drop_event(const struct callback *callback, void *event);

/* The worker's, around a collective into the buffer (LSHARD_NO_BUFFER: none). A failure is the end of the group. */
lshard_status callback_device_before(struct callback_store *store, uint32_t buffer);
lshard_status callback_device_after(struct callback_store *store, uint32_t buffer);
/* The worker's: until all it has put on the stream is done. */
lshard_status callback_device_finish(struct callback *callback);
/* The worker's, in any memory: copies that come after the collectives so far. */
lshard_status callback_copy_piece(struct callback *callback, const lshard_piece *piece, const unsigned char *shard,
				  unsigned char *layer);

/* The program's. */
lshard_status callback_device_follow(struct callback_store *store, uint32_t buffer, void *stream);
lshard_status callback_device_join(struct callback_store *store, void *stream);
lshard_status callback_device_drain(struct callback_store *store, uint64_t deadline_ns);
lshard_status callback_device_copy(lshard_store *store, void *to, uint64_t to_pitch, const void *from,
				   uint64_t from_pitch, uint64_t width, uint64_t rows);

/* ---- callback_store.c ---- */

/* How a layer comes: from one rank to all, from all to all straight into place, or from all to all by way of staging.
 */
enum way { BROADCAST, GATHER, GATHER_STAGED };

enum way callback_way(const lshard_store_plan *plan, uint32_t position, int32_t size);
/* Where rank @p rank's part of the layer begins in its shard, and how long it is; 0 bytes if it has none. */
uint64_t callback_block(const lshard_store_plan *plan, uint32_t position, int32_t rank, uint64_t *bytes);

lshard_status callback_store_open(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **opened);
void callback_store_close(lshard_store *store);
void *callback_shard(lshard_store *store);
void *callback_buffer(lshard_store *store, uint32_t buffer, uint32_t position);

/* ---- callback_rounds.c ---- */

/* With the lock, which is let go meanwhile: deal with the first of the queue. */
void callback_serve(struct callback *callback);
/* With the lock, which is let go meanwhile: a round in which this rank says that it has nothing to do (ROLL_CALL), or
 * that it leaves. */
void callback_call_roll(struct callback *callback, enum kind kind);
/* With the lock: as callback_pause, but goes on after the deadline, within the grace, if the round is still to come
 * that shows who is late. */
bool callback_linger(struct callback *callback, uint64_t deadline_ns);
/*
 * With the lock: TIMEOUT in @p error, with who is missing where the rounds have shown it, and else what is known. @p
 * alive: NULL, or to be filled: 0 for those that did not come.
 */
lshard_status callback_fail_late(const struct callback *callback, uint8_t *alive, lshard_error *error);
/* With the lock: the first of the queue is over, with this. */
void callback_conclude(struct callback *callback, lshard_status status, const lshard_error *error);

/* ---- callback_worker.c ---- */

lshard_status callback_start(struct callback *callback, lshard_error *error);
/* From now on ranks answer though they have nothing to do: all of them have joined. */
void callback_start_roll_calls(struct callback *callback);
/* Ends the worker. */
void callback_end(struct callback *callback);

#endif
