/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_transport.h - what the files of the cuda transport share: cuda.c (table, a group's life), cuda_device.c (this
 * rank's device), cuda_memory.c (ranges of device memory), cuda_store.c (a series' memory), cuda_stream.c (copies in
 * stream order), cuda_link.c (is every peer's memory read right and fast?). mesh.h and shm_control.h connect the ranks.
 */
#ifndef LAYERSHARD_CUDA_TRANSPORT_H
#define LAYERSHARD_CUDA_TRANSPORT_H

#include "cuda_driver.h"
#include "mesh.h"
#include "shm_control.h"

#define CUDA_READERS 8 /* streams of the caller's per series, as the core allows */

/* What a rank tells the others about its device. */
struct cuda_card {
	struct cuda_uuid uuid;
	char bus[24];
	char name[64];
	int32_t ordinal;
	int32_t virtual_memory; /* can allocate physical memory and export it as a descriptor */
};

/* What every rank says while something is opened together. */
struct cuda_report {
	uint64_t what; /* hash of the name of what is opened: ranks open in the same order */
	int32_t step;
	int32_t status;
	int32_t echo; /* of a failure elsewhere, which tells more */
	union {
		struct cuda_card card;
		struct cuda_ipc share;
	} body;
	char text[400];
};

struct cuda_options {
	int copy;     /* windows and copies also between ranks on one device */
	int ipc;      /* legacy handles instead of descriptors */
	double floor; /* GB/s of a pull, below which it is said */
};

struct cuda {
	lshard_transport base;
	lshard_transport_ops ops; /* with CAP_DIRECT where two ranks are on one device; granule is the device's */
	struct cuda_options options;
	struct cuda_driver driver;
	cuda_device device;
	cuda_context context; /* the device's primary one */
	int priority;         /* the highest for streams */
	struct mesh mesh;
	struct control control;
	struct cuda_card *cards;     /* [size] */
	struct cuda_report *reports; /* [size] of the last agreement */
	uint8_t *alive;              /* [size] */
	int virtual_memory;          /* all ranks have it; else legacy handles */
	int retained;                /* context */
	int said_writable;
};

/* A range of this rank's addresses. */
struct cuda_range {
	enum cuda_range_kind {
		CUDA_NOTHING,
		CUDA_RESERVED,  /* addresses, onto which physical memory is mapped */
		CUDA_ALLOCATED, /* legacy */
		CUDA_OPENED     /* a peer's legacy allocation */
	} kind;
	cuda_address address;
	uint64_t bytes;
};

/* Physical memory of one rank, a part of its share: mapped only whole, wherever it is needed. */
struct cuda_block {
	int32_t rank;
	uint32_t piece;  /* composed: which piece it holds */
	uint64_t offset; /* in the share */
	uint64_t bytes;
	cuda_handle handle; /* 0: none; only while the store is opened */
};

/* A window in stream order, or (the one after the last) readers of no window in particular. */
struct cuda_cell {
	cuda_event ready; /* after the last copy into it */
	int fetched;
	unsigned n_retired;
	void *readers[CUDA_READERS];
	cuda_event retired[CUDA_READERS]; /* after what readers[i] had enqueued */
	cuda_event captured_ready;
	uint64_t captured; /* in which capture captured_ready was recorded */
};

struct cuda_store {
	lshard_store base;
	cuda_stream copies;
	cuda_stream captured_copies; /* is in a capture of the caller's from its first copy to its join */
	uint64_t capture;            /* the last capture it was drawn into */
	cuda_event point;            /* recorded and waited for at once, in captures */
	cuda_event done;             /* the same outside */
	cuda_event *events;          /* all there are */
	size_t n_events;
	struct cuda_cell *cells; /* [windows + 1] */
	int composed;            /* layers are put together from several ranks' blocks */
	struct cuda_block *blocks;
	uint32_t n_blocks;
	struct cuda_range *shares; /* [size] */
	struct cuda_range windows; /* and residents */
	cuda_handle window_memory; /* only while the store is opened */
	struct cuda_range layers;  /* composed ones, in a row */
};

/* ---- cuda_device.c ---- */

/* Driver, device, context and streams' priority; needs no other rank. Fills @p card. */
lshard_status cuda_device_open(struct cuda *cuda, struct cuda_card *card, lshard_error *error);
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
	const unsigned char *a = cuda->cards[rank].uuid.bytes;
	const unsigned char *b = cuda->cards[other].uuid.bytes;

	for (size_t i = 0; i < sizeof cuda->cards->uuid.bytes; i++)
		if (a[i] != b[i])
			return 0;
	return 1;
}

/* ---- cuda_memory.c ---- */

uint64_t cuda_whole_granules(const struct cuda *cuda, uint64_t bytes);
/* Physical memory on this rank's device, exportable as a descriptor. */
cuda_result cuda_memory_make(struct cuda *cuda, uint64_t bytes, cuda_handle *handle);
cuda_result cuda_range_reserve(struct cuda *cuda, uint64_t bytes, struct cuda_range *range);
cuda_result cuda_range_map(struct cuda *cuda, const struct cuda_range *range, uint64_t offset, uint64_t bytes,
			   cuda_handle handle, int writable);
void cuda_range_unmap(struct cuda *cuda, const struct cuda_range *range, uint64_t offset, uint64_t bytes);
/* What was mapped onto it is unmapped. */
void cuda_range_free(struct cuda *cuda, struct cuda_range *range);

/* ---- cuda_agree.c ---- */

/*
 * Meet the others; all go on or all fail alike, with the text of the first rank that failed. @p status and the
 * transport's error: how this rank fared. All ranks' reports are left in cuda->reports. @p round: as control_exchange.
 */
lshard_status cuda_agree(struct cuda *cuda, const char *what, struct cuda_report *mine, lshard_status status,
			 uint64_t *round, uint64_t deadline);

/* ---- cuda_store.c ---- */

lshard_status cuda_store_open(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **store);
void cuda_store_close(lshard_store *store);
void *cuda_share(lshard_store *store);
void *cuda_cell(lshard_store *store, uint32_t cell, uint32_t position);
void *cuda_peer(lshard_store *store, uint32_t position);

/* ---- cuda_stream.c ---- */

lshard_status cuda_streams_open(struct cuda_store *store, lshard_error *error);
void cuda_streams_close(struct cuda_store *store);
/* Wait for @p event, at most until the deadline; ABORTED at once if @p heed_abort. */
lshard_status cuda_await(struct cuda *cuda, cuda_event event, uint64_t deadline, int heed_abort, lshard_error *error);
/* Wait for this rank's copies and its readers. */
lshard_status cuda_settle(struct cuda_store *store, int heed_abort);

lshard_status cuda_fetch(lshard_store *store, uint32_t position, uint32_t cell, void *stream, uint64_t sequence);
lshard_status cuda_wait(lshard_store *store, uint32_t cell, void *stream, lshard_arrival *arrival);
lshard_status cuda_retire(lshard_store *store, uint32_t cell, void *stream);
lshard_status cuda_join(lshard_store *store, void *stream);
lshard_status cuda_capture(lshard_store *store, void *stream, uint64_t *capture);
lshard_status cuda_drain(lshard_store *store);
lshard_status cuda_read(lshard_store *store, uint32_t position, void *destination);
lshard_status cuda_copy(lshard_store *store, void *to, uint64_t to_pitch, const void *from, uint64_t from_pitch,
			uint64_t width, uint64_t rows);

/* ---- cuda_link.c ---- */

/* Pull known bytes from every peer, check and time them; collective. */
lshard_status cuda_check_links(struct cuda *cuda);

#endif
