/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_transport.h - what the files of the cuda transport share. Each calls those before it, and none after it:
 * cuda_device.c (this rank's device), cuda_memory.c (ranges of device memory), cuda_fabric.c (NVLink domains of several
 * hosts), cuda_layers.c (layers put together by mapping), cuda_fetch.c (what is copied for a layer), cuda_pace.c (how
 * fast at most), cuda_stream.c (copies in stream order), cuda_caller.c (shards and windows in the caller's memory),
 * cuda_store.c (a series' memory), cuda_link.c (how memory is shared; is every peer's read right and fast?) and cuda.c
 * (tables, a group's life). mesh.h, control.h and agreement.h connect the ranks.
 *
 * The transport is two: "cuda", between ranks of a host, and "fabric", between ranks of an NVLink domain, whatever
 * their hosts. Those hear each other by another transport, the inner one, and name memory by fabric handles.
 */
#ifndef LAYERSHARD_CUDA_TRANSPORT_H
#define LAYERSHARD_CUDA_TRANSPORT_H

#include "cuda_driver.h"
#include "cuda_pace.h"
#include "agreement.h"

#include <pthread.h>
#include <stdatomic.h>

/* Of the transport; a group may have fewer. */
#define CUDA_CAPABILITIES                                                                                              \
	(LSHARD_CAP_STREAMS | LSHARD_CAP_CAPTURE | LSHARD_CAP_DIRECT | LSHARD_CAP_OUTLIVES | LSHARD_CAP_COMPOSES |     \
	 LSHARD_CAP_CALLER_MEMORY)

/*
 * What of it holds between hosts. No process of another host can be watched, so nobody knows when the caller's memory
 * is read no more; and what becomes of a dead rank's memory is up to the domain.
 */
#define FABRIC_CAPABILITIES (~(uint32_t)(LSHARD_CAP_CALLER_MEMORY | LSHARD_CAP_OUTLIVES))

#define CUDA_READERS 8 /* streams of the caller's per series, as the core allows */

/* What a rank tells the others about its device. */
struct cuda_record {
	struct cuda_uuid uuid;
	char bus[24];
	char name[64];
	int32_t ordinal;
	int32_t virtual_memory; /* can allocate physical memory and export it as a descriptor, or by a fabric handle */

	/* fabric only */
	int32_t domain;            /* 1: the device belongs to the domain below, 0: to none, -1: nobody can say */
	uint32_t clique;           /* of the domain: its devices reach each other */
	unsigned char cluster[16]; /* UUID; zeros: a domain of one host alone */
	uint64_t host;
};

struct cuda_options {
	int copy;     /* windows and copies also between ranks on one device */
	int ipc;      /* legacy handles instead of descriptors */
	double floor; /* GB/s of a fetch, below which another way is tried, and it is said */
	double pace;  /* GB/s of this rank's fetches at most; 0: any */
};

struct cuda {
	lshard_transport base;
	lshard_transport_ops ops; /* with CAP_DIRECT where two ranks are on one device; granule is the device's */
	struct cuda_options options;
	struct cuda_driver driver;
	cuda_device device;
	cuda_context context;    /* the device's primary one */
	int priority;            /* the highest for streams */
	lshard_transport *inner; /* fabric: by what ranks exchange records; else NULL, and by these two */
	struct mesh mesh;
	struct control control;
	atomic_int aborted;
	struct agreement agreement;  /* of the ranks while something opens; over the inner transport, if there is one */
	struct cuda_record *records; /* [size] */
	struct cuda_borrowed *borrowed; /* the caller's shards that are not given back yet */
	pthread_mutex_t borrowed_lock;
	struct cuda_pace *pace; /* of all this rank's fetches, or NULL */
	int virtual_memory;     /* all ranks have it; else legacy handles */
	int32_t handle_type;    /* of physical memory: CUDA_HANDLE_FD or CUDA_HANDLE_FABRIC */
	char remark[48];        /* for the group's description, when its fetches are slow */
	uint64_t granule;       /* of physical memory */
	int retained;           /* context */
	int unsettled;          /* a store was closed while something may still run */
	int said_writable;
};

/* A range of this rank's addresses. */
struct cuda_range {
	enum cuda_range_kind {
		CUDA_NOTHING,
		CUDA_RESERVED,  /* addresses, onto which physical memory is mapped */
		CUDA_ALLOCATED, /* legacy */
		CUDA_OPENED,    /* in a peer's legacy allocation */
		CUDA_BORROWED   /* the caller's */
	} kind;
	cuda_address address;
	uint64_t bytes;
	uint64_t offset; /* opened: from the allocation's beginning */
};

/* How a rank tells the others where its shard is, by legacy handles. */
struct cuda_place {
	struct cuda_ipc handle; /* of an allocation */
	uint64_t offset;        /* in it */
};

#define CUDA_NO_PIECE UINT32_MAX

/* Physical memory of one rank, a part of its shard: mapped only whole, wherever it is needed. */
struct cuda_block {
	int32_t rank;
	uint32_t piece;  /* the granular one it is, or CUDA_NO_PIECE: all that is not */
	uint64_t offset; /* in the shard */
	uint64_t bytes;
	cuda_handle handle; /* 0: none; only while the store is opened */
};

/* Between direct stripes: what of a layer comes from others. */
struct cuda_gap {
	uint64_t offset; /* in the layer */
	uint64_t bytes;
};

/* A window in stream order, or (the one after the last) readers of no window in particular. */
struct cuda_buffer {
	cuda_event ready; /* after the last copy into it */
	int fetched;
	unsigned n_used;
	void *readers[CUDA_READERS];
	cuda_event used[CUDA_READERS]; /* after what readers[i] had enqueued */
	cuda_event captured_ready;
	uint64_t captured;      /* in which capture captured_ready was recorded */
	uint64_t captured_used; /* in which one its use was recorded, last by captured_reader */
	void *captured_reader;
	int captured_by_many; /* and by another stream before */
};

struct cuda_store {
	lshard_store base;
	struct cuda_fetches *fetches;
	int unsettled; /* closed while something may still run */
	cuda_stream copies;
	cuda_stream captured_copies; /* is in a capture of the caller's from its first copy to its join */
	uint64_t capture;            /* the last capture it was drawn into */
	cuda_event point;            /* recorded and waited for at once, in captures */
	cuda_event done;             /* the same outside */
	cuda_event *events;          /* all there are */
	size_t n_events;
	struct cuda_buffer *buffers; /* [windows + 1] */
	struct cuda_block *blocks;
	uint32_t n_blocks;
	struct cuda_range *shards;      /* [size] */
	struct cuda_range windows;      /* and residents; not composed */
	cuda_handle window_memory;      /* only while the store is opened */
	struct cuda_range layers;       /* composed: in a row, put together by mapping */
	struct cuda_borrowed *borrowed; /* the caller's memory for the shard; see cuda_caller.c */
	void *borrowed_windows;         /* the caller's */
	int *holds; /* [size] what says to the others that this rank reads their borrowed buffers; -1: none */
	struct cuda_gap *gaps; /* composed: of every layer */
	uint32_t n_gaps;
	cuda_handle *gap_memory; /* [buffers][n_gaps] only while the store is opened */
};

/* ---- cuda_device.c ---- */

/* Driver, device, context and streams' priority; needs no other rank. Fills @p record. */
lshard_status cuda_device_open(struct cuda *cuda, struct cuda_record *record, lshard_error *error);
void cuda_device_close(struct cuda *cuda);

/*
 * Make the transport's context current around calls of the driver. cuda_enter also allows calls that a capture in
 * another thread would forbid; cuda_step is for the pass, which makes none. The caller's state is as it was after the
 * counterpart.
 */
struct cuda_scope {
	int pushed;
	int mode;
};

struct cuda_scope cuda_enter(struct cuda *cuda);
void cuda_leave(struct cuda *cuda, struct cuda_scope scope);
int cuda_step(struct cuda *cuda);
void cuda_stepped(struct cuda *cuda, int pushed);

static inline int cuda_same_device(const struct cuda *cuda, int32_t rank, int32_t other)
{
	const unsigned char *a = cuda->records[rank].uuid.bytes;
	const unsigned char *b = cuda->records[other].uuid.bytes;

	for (size_t i = 0; i < sizeof cuda->records->uuid.bytes; i++)
		if (a[i] != b[i])
			return 0;
	return 1;
}

/* ---- cuda_memory.c ---- */

/* "WHAT of BYTES bytes", which the driver refused, unless @p result is CUDA_OK; into the transport's error. */
lshard_status cuda_refused(const struct cuda_store *store, cuda_result result, const char *what, uint64_t bytes);
/* Physical memory on this rank's device, exportable as a descriptor. */
cuda_result cuda_memory_make(struct cuda *cuda, uint64_t bytes, cuda_handle *handle);
cuda_result cuda_range_reserve(struct cuda *cuda, uint64_t bytes, struct cuda_range *range);
cuda_result cuda_range_map(struct cuda *cuda, const struct cuda_range *range, uint64_t offset, uint64_t bytes,
			   cuda_handle handle, int writable);
void cuda_range_unmap(struct cuda *cuda, const struct cuda_range *range, uint64_t offset, uint64_t bytes);
/* What was mapped onto it is unmapped. */
void cuda_range_free(struct cuda *cuda, struct cuda_range *range);

/* ---- cuda_fabric.c ---- */

/* Can memory of this rank's device be named by a fabric handle, and in which domain is it? The text says why not. */
lshard_status cuda_fabric_ask(struct cuda *cuda, struct cuda_record *record, lshard_error *error);
/* All ranks' records are there: are they in one domain? All ranks find the same. */
lshard_status cuda_fabric_compare(struct cuda *cuda);

/* ---- cuda_store.c ---- */

lshard_status cuda_store_open(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **store);
void cuda_store_close(lshard_store *store);
void *cuda_shard(lshard_store *store);
void *cuda_buffer(lshard_store *store, uint32_t buffer, uint32_t position);
void *cuda_peer(lshard_store *store, uint32_t position);

/* ---- cuda_layers.c ---- */

/* The tables of a new store: all ranks' blocks, this rank's gaps. NO_MEMORY without a text. */
lshard_status cuda_layers_list(struct cuda_store *store);
void cuda_layers_free(struct cuda_store *store);
/* Composed: the memory of windows and residents; needs no other rank. */
lshard_status cuda_layers_make(struct cuda_store *store);
/* Composed: put all layers together, when all direct blocks have come. */
lshard_status cuda_layers_map(struct cuda_store *store);
/* Handles are for mapping alone. */
void cuda_layers_release(struct cuda_store *store);
void cuda_layers_unmap(struct cuda_store *store);

/*
 * Where the layer at @p position begins when it is fetched into @p buffer. Each position may have an address of its
 * own: a fetch must not count buffers from the windows' address.
 */
cuda_address cuda_buffer_address(const struct cuda_store *store, uint32_t buffer, uint32_t position);
/* Is @p piece mapped already in the layer that begins at @p to? Then it must not be written: fetch and read skip it. */
int cuda_in_place(const struct cuda_store *store, const lshard_piece *piece, cuda_address to);

/* ---- cuda_caller.c ---- */

/* Take the caller's memory for shard and windows; where the shard is. Text of a failure: the transport's error. */
lshard_status cuda_caller_make(struct cuda_store *store, struct cuda_place *place);
/* Let every rank hold the others' borrowed buffers, until cuda_caller_close. */
lshard_status cuda_caller_shard(struct cuda_store *store, uint64_t tag, uint64_t deadline);
/* @p settled: nothing of this rank uses the memory any more; else it is never given back. */
void cuda_caller_close(struct cuda_store *store, int settled);
/* The transport ends: what others still read is not given back. */
void cuda_borrowed_close(struct cuda *cuda);

/* ---- cuda_fetch.c ---- */

/* What is copied for each layer. Shards and buffers have their addresses. */
lshard_status cuda_fetches_open(struct cuda_store *store, lshard_error *error);
void cuda_fetches_close(struct cuda_store *store);
/* Outside captures: enqueue the copies of the layer at @p position into @p buffer on the store's stream of copies. */
cuda_result cuda_enqueue_fetch(struct cuda_store *store, uint32_t position, uint32_t buffer);
/* The same copies one by one, to any address, on any stream; also in captures. */
cuda_result cuda_copy_layer(struct cuda_store *store, cuda_stream stream, uint32_t position, cuda_address to,
			    int paced);

struct cuda_rows {
	cuda_address to;
	uint64_t to_pitch;
	cuda_address from;
	uint64_t from_pitch;
	uint64_t width;
	uint64_t rows;
};

cuda_result cuda_copy_rows(struct cuda *cuda, cuda_stream stream, const struct cuda_rows *rows);

/* ---- cuda_stream.c ---- */

lshard_status cuda_streams_open(struct cuda_store *store, lshard_error *error);
void cuda_streams_close(struct cuda_store *store);
/* Wait for @p event, at most until the deadline; ABORTED at once if @p heed_abort. */
lshard_status cuda_await(struct cuda *cuda, cuda_event event, uint64_t deadline, int heed_abort, lshard_error *error);
/* Wait for this rank's copies and its readers. */
lshard_status cuda_settle(struct cuda_store *store, int heed_abort);

lshard_status cuda_fetch(lshard_store *store, uint32_t position, uint32_t buffer, void *stream, uint64_t sequence);
lshard_status cuda_wait(lshard_store *store, uint32_t buffer, void *stream, lshard_arrival *arrival);
lshard_status cuda_record_use(lshard_store *store, uint32_t buffer, void *stream);
lshard_status cuda_join(lshard_store *store, void *stream);
lshard_status cuda_capture(lshard_store *store, void *stream, uint64_t *capture);
lshard_status cuda_drain(lshard_store *store);
lshard_status cuda_read(lshard_store *store, uint32_t position, void *destination);
lshard_status cuda_copy(lshard_store *store, void *to, uint64_t to_pitch, const void *from, uint64_t from_pitch,
			uint64_t width, uint64_t rows);
lshard_status cuda_copy_buffer(lshard_store *store, uint32_t to, uint32_t from, void *stream);

/* ---- cuda_link.c ---- */

/* Share by descriptors (1) or by legacy handles (0) from now on; the same on all ranks. */
void cuda_shard_by(struct cuda *cuda, int descriptors);
/* Fetch known bytes from every peer, check and time them; settle on how memory is shared. Collective. */
lshard_status cuda_check_links(struct cuda *cuda);

#endif
