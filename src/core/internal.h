/* SPDX-License-Identifier: Apache-2.0
 *
 * internal.h - the private structs of group and series, shared by the files of src/core that implement the public
 * calls. Never included outside src/core.
 */
#ifndef LAYERSHARD_INTERNAL_H
#define LAYERSHARD_INTERNAL_H

#include "options.h"
#include "outside.h"
#include "ring.h"
#include "scheme.h"
#include "verdict.h"

#include <stdatomic.h>

/* Where a rank is in its collective calls, told to the others first, so that ranks in different calls are found out. */
enum step {
	STEP_CREATE = 1,
	STEP_OPENED,
	STEP_COMMIT,
	STEP_ROUND,
	STEP_READY,
	STEP_UPDATE_BEGIN,
	STEP_UPDATE_READY,
	STEP_UPDATE_END,
	STEP_REWIND,
	STEP_VERIFY_BEGIN,
	STEP_VERIFY
};

#define RECORD_VALUES 8

struct call_record {
	struct lshard__outcome outcome; /* how the rank fared so far */
	uint64_t step;                  /* with number and series: which call it is in */
	uint64_t number;                /* of the series in the group */
	char series[64];
	uint64_t values[RECORD_VALUES]; /* of the step: a sequence number, a hash, the fields of a series */
};

struct lshard_group {
	lshard_context context;         /* given to the transport */
	struct lshard__process process; /* that created it */
	lshard_allocator allocator;
	lshard_callbacks callbacks; /* the caller's, if there are any */
	lshard_device_callbacks device;
	lshard_log_function log;
	void *log_user;
	lshard_log_level log_level;
	lshard__stack *stack;
	lshard_transport *transport;
	const lshard_rejoin_ops *rejoin; /* NULL: nobody can come back */
	lshard_transport *bottom;        /* whose they are */
	bool returned;                   /* this rank came back */
	char *job;                       /* the context's; NULL: none */
	atomic_uint n_series;
	uint64_t n_created;          /* series so far; the same on all ranks */
	uint64_t sequence;           /* next fetch on a collective transport, group-wide */
	struct call_record *records; /* [size] of the last agreement */
	uint8_t *alive;              /* [size] who took part in it */
	atomic_bool aborted;
	lshard_error error;
};

enum series_state { SERIES_CREATED, SERIES_COMMITTED, SERIES_UPDATING };

/* Written by the series' thread, read by any. */
struct counters {
	atomic_uint_least64_t generation, reaches, waits, stalls, misses, fetches, fetched_bytes, blocked_ns,
		max_blocked_ns, link_busy_ns, numa_copy_bytes;
};

/* What the ring was before a capture began. */
struct capture {
	uint64_t number; /* 0: no capture */
	uint64_t spoilt; /* of the last one into which something came that cannot be captured */
	struct ring ring;
	struct ring_window *windows; /* [n_slots] */
	lshard_status *status;       /* [n_slots] */
	lshard_error *error;         /* [n_slots] */
};

/* What windows show; see poison.c. */
struct poison {
	bool on;
	bool painted;            /* there is the poison of a layer; before it the spare buffers are not touched */
	uint32_t *shown;         /* [n_slots] the position of the layer in the window; POSITION_NONE: poison */
	uint32_t *shown_outside; /* [n_slots] of the capture */
	void *stream;            /* the last one that the program named */
};

struct lshard_series {
	lshard_group *group;
	uint64_t number; /* in the group */
	char name[64];
	enum series_state state;
	bool recalled;     /* this rank came back: the shards were filled before */
	bool busy;         /* the group is told that it is being loaded or updated */
	void *description; /* of it, where ranks can come back */
	size_t description_bytes;
	struct scheme scheme;
	lshard_store_plan store_plan;
	lshard_memory_source memory_source; /* the caller's, if there is one */
	lshard_store *store;
	uint8_t **address; /* [N] first byte of each layer here */
	struct ring ring;
	struct ring_window *windows;  /* the ring's */
	lshard_status *window_status; /* [n_slots] of the fetch on its way: a failure is kept for its wait */
	lshard_error *window_error;   /* [n_slots] why, where that is a failure */
	bool *window_landed;          /* [n_slots] host memory: waited for already */
	void *streams[RING_STREAMS];
	unsigned n_streams;
	struct capture capture;
	const char *failed_call; /* collective transports: it emptied the windows for good; NULL: they are in use */
	struct poison poison;
	void **tensors; /* [n_tensors] for post_process */
	struct counters counters;
	lshard_error error;
};

/* ---- group.c ---- */

void *group_allocate(lshard_group *group, size_t bytes); /* zeroed */
void group_release(lshard_group *group, void *pointer);
struct layout_memory group_memory(lshard_group *group);

/*
 * Exchange records with the living ranks and learn how each fared: group->records, group->alive. Fails with a text in
 * @p error when they are late, in another call, or when one of them fared badly (its status). A rank whose own status
 * is TIMEOUT does not wait for them once more.
 */
lshard_status group_agree(lshard_group *group, struct call_record record, lshard_error *error);
/* The same, and PEER_FAILED naming the ranks that are gone unless all took part. */
lshard_status group_agree_all(lshard_group *group, struct call_record record, lshard_error *error);
/* PEER_FAILED naming those of the group->alive that are not, needed in @p what. */
lshard_status group_fail_missing(const lshard_group *group, const char *series, const char *what, lshard_error *error);
/* Those who took part in the last agreement, as records of @p bytes at @p first. */
struct lshard__record_set group_records(const lshard_group *group, const void *first, size_t bytes, size_t call_bytes);

/* False in a child by fork of the process that created the group. */
static inline bool group_is_ours(const lshard_group *group)
{
	return lshard__process_is_ours(&group->process);
}

/* STATE with a text, which begins with @p who, where the group is not ours. */
lshard_status group_require_ours(const lshard_group *group, const char *who, lshard_error *error);

static inline bool group_aborted(const lshard_group *group)
{
	return atomic_load_explicit(&group->aborted, memory_order_relaxed);
}

/* A call of several agreements begins (1) or ends (-1): nobody comes back between them. */
static inline void group_busy(lshard_group *group, int change)
{
	if (group->rejoin)
		group->rejoin->busy(group->bottom, change, group->n_created);
}

static inline bool group_collective(const lshard_group *group)
{
	return group->transport->ops->capabilities & LSHARD_CAP_COLLECTIVE;
}

/* ---- series.c ---- */

static inline bool has_streams(const lshard_series *series)
{
	return series->group->transport->ops->capabilities & LSHARD_CAP_STREAMS;
}

/* Prefix of every text: "rank 1, series 'blocks'". */
#define SERIES_FORMAT        "rank %d, series '%s'"
#define SERIES_NAMES(series) (series)->group->context.rank, (series)->name

static inline uint32_t series_layer(const lshard_series *series, uint32_t position)
{
	return series->scheme.layout.first_layer + position;
}

/* A record for a step of the series. */
struct call_record series_record(const lshard_series *series, enum step step, lshard_status status);
/* The state a call needs, or the error. */
lshard_status series_require(lshard_series *series, enum series_state state, const char *call);
/* Position of a layer of the caller's, or RANGE. */
lshard_status series_position(lshard_series *series, uint32_t layer, uint32_t *position);

static inline void count(atomic_uint_least64_t *counter, uint64_t amount)
{
	atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + amount,
			      memory_order_relaxed);
}

/* ---- agree.c ---- */

/* Compare the description of a series field by field with the other ranks'. @p mine: how this rank fared before. */
lshard_status agree_on_series(lshard_group *group, const lshard_series_options *options, lshard_status mine,
			      lshard_error *error);

/* What ranks that come back compare with: @p description [agree_description_bytes]. Local. */
size_t agree_description_bytes(const lshard_series_options *options);
void agree_describe(const lshard_series_options *options, void *description);
/* Compare with what the ranks that live have. MISMATCH names the first difference. */
lshard_status agree_with_living(const lshard_group *group, const lshard_series_options *options, const void *mine,
				const lshard_recalled *theirs, lshard_error *error);

/* ---- rejoin.c: ranks that come back ---- */

/* The series, of which the description is made, as other ranks have it. RANGE: they have none. */
lshard_status rejoin_recall(lshard_series *series, const lshard_series_options *options);
/* It is loading or being updated, or no more. */
void rejoin_begin(lshard_series *series);
void rejoin_end(lshard_series *series);
/* Shards are whole: others may come to them. */
void rejoin_offer(lshard_series *series);
/* In an update, while nobody reads: what only others could read this rank can write. */
lshard_status rejoin_renew(lshard_series *series);

/* ---- readers.c: where there are streams ---- */

/* Number of a stream of the caller's in this series; its bit in the ring's masks. */
lshard_status readers_note_stream(lshard_series *series, void *stream, unsigned *number);
/* The work on the layers viewed so far was enqueued on @p stream, whichever stream waited for them. */
lshard_status readers_note(lshard_series *series, void *stream);
/* What every noted reader of the window has enqueued so far comes before whatever overwrites it. */
lshard_status readers_record(lshard_series *series, uint32_t window);

/* ---- capture.c ---- */

/* Where streams can be captured: the capture that @p stream is in now, if it is in one. */
lshard_status capture_look(lshard_series *series, void *stream);
/* What follows is in the capture that @p stream is in, if any. */
static inline lshard_status capture_follow(lshard_series *series, void *stream)
{
	const bool can_be = series->group->transport->ops->capabilities & LSHARD_CAP_CAPTURE;

	return can_be ? capture_look(series, stream) : LSHARD_OK;
}
/* The windows are as before the capture. Nothing to do outside one. */
void capture_leave(lshard_series *series);
/* What follows cannot be captured: the rest of a capture would miss it. */
void capture_spoil(lshard_series *series);
/* Nothing of this rank reads or writes any more; a capture is spoilt. */
lshard_status capture_drain(lshard_series *series);

/* ---- poison.c ---- */

/* What options and environment say together. */
lshard_status poison_read_options(const lshard_group *group, const lshard_series_options *options, lshard_poison *mode,
				  lshard_error *error);
/*
 * The store is open: make the poison of a layer, and fill windows with it that are to begin so. Text of a failure: the
 * group's.
 */
lshard_status poison_open(lshard_series *series, const lshard_series_options *options);
/* The buffer into which layers of the window are fetched. */
uint32_t poison_buffer_of(const lshard_series *series, uint32_t window);
/* Where the layer at @p position is once it was fetched. */
const uint8_t *poison_seen(const lshard_series *series, uint32_t position);
/* The layer at @p position was waited for on @p stream: its window shows it to what follows there. */
lshard_status poison_show(lshard_series *series, uint32_t position, uint32_t window, void *stream);
/*
 * Windows whose view has ended hold poison for what follows on @p stream; after a failure the next call tries again.
 */
lshard_status poison_hide(lshard_series *series, void *stream);
/* A stream for poison_hide where the program names none. */
void *poison_stream(lshard_series *series);
/* Nothing reads or fills any window: all hold poison on return. */
lshard_status poison_fill(lshard_series *series);
void poison_enter_capture(lshard_series *series);
void poison_leave_capture(lshard_series *series);
/* Nothing is viewed, or on its way but in the order of @p stream. A window that cannot be changed is emptied. */
lshard_status poison_switch(lshard_series *series, bool on, void *stream);

/* ---- pass.c ---- */

/* Forget every window, and start filling each with its first layer. */
void pass_restart(lshard_series *series);
/*
 * The same on all ranks, after they exchanged records whose values[0] are their sequences: all go on from the highest.
 */
void pass_restart_alike(lshard_series *series);
/*
 * Ranks did not come through @p call together. Collective transports: whose transfers go on, and with which number, is
 * known to nobody, so no window holds anything and none is filled before the ranks have agreed in pass_restart_alike.
 * One-sided ones: nothing is lost.
 */
void pass_fail(lshard_series *series, const char *call);
/* What lshard_series_rewind does, as a part of @p call, whose ranks agree in @p step and in no other. */
lshard_status pass_rewind(lshard_series *series, enum step step, const char *call);
/*
 * Where there are streams: the program is at the layer, which is there or coming, for the library's own eyes. No stream
 * is ordered after it; the transport's copy is.
 */
lshard_status pass_fetch(lshard_series *series, uint32_t position);

#endif
