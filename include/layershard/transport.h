/* SPDX-License-Identifier: Apache-2.0
 *
 * What a transport fills in. A transport moves bytes between ranks and lets ranks exchange records; it knows ranks,
 * buffers and byte ranges. It never sees what a layer means, the ring's states or another series.
 * docs/writing-a-transport.md is the guide.
 *
 * A transport is a const table of functions. open() makes an lshard_transport (one per group and rank), store_open()
 * makes an lshard_store (one per series and rank); both are the first member of the transport's own struct.
 *
 *   shard    the bytes this rank keeps for good and the others read
 *   buffer   layer-sized memory of this rank for bytes that come from others: layers are fetched and copied into
 *            buffers 0..windows-1 in passes, the residents follow
 *   position 0..layers-1: a layer's place in its series
 *
 * Unless a comment says otherwise: functions return an lshard_status and, on failure, have put a text into the `error`
 * of their object with lshard_fail and changed nothing; calls on one object come from one thread at a time; calls on
 * different stores of a one-sided transport may come from different threads; nothing allocates outside open, store_open
 * and their closing counterparts.
 */
#ifndef LAYERSHARD_TRANSPORT_H
#define LAYERSHARD_TRANSPORT_H

#include <layershard/layershard.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LSHARD_TRANSPORT_ABI 6

typedef enum lshard_capability {
	LSHARD_CAP_COLLECTIVE = 1 << 0, /* every rank must fetch the same layers in the same order; else one-sided */
	LSHARD_CAP_STREAMS = 1 << 1,    /* fetch, record_use, wait are ordered on streams; else host memory */
	LSHARD_CAP_CAPTURE = 1 << 2,    /* streams can be captured: capture() is there */
	/* Ranks compute from each other's shards in place: peer() is there, windows are not used. */
	LSHARD_CAP_DIRECT = 1 << 3,
	LSHARD_CAP_CALLER_MEMORY = 1 << 4, /* shards and windows may come from lshard_memory_source */
	LSHARD_CAP_OUTLIVES = 1 << 5,      /* a shard stays readable after its rank died or destroyed the series */
	LSHARD_CAP_COMPOSES = 1 << 6,      /* one-sided: buffers are put together by mapping; copy() is there */
	LSHARD_CAP_PLACES = 1 << 7         /* host memory: shards come on the NUMA nodes that the context says */
} lshard_capability;

/** A text of bounded length; where errors are told. */
typedef struct lshard_error {
	char text[512];
} lshard_error;

/**
 * Write a text (printf) into @p error, which may be NULL, and return @p status: `return lshard_fail(&s->error, ...)`.
 * The text that is there may be part of the new one. Any thread.
 */
LSHARD_API lshard_status lshard_fail(lshard_error *error, lshard_status status, const char *format, ...)
#if defined(__GNUC__)
	__attribute__((format(printf, 3, 4)))
#endif
	;

/** What the group gives a transport; lives as long as the group. */
typedef struct lshard_context {
	size_t struct_size;
	int32_t rank;
	int32_t size;
	uint32_t timeout_ms;
	lshard_memory memory;
	int32_t device;
	const char *options;               /* what stood after the transport's name and ':' or '='; "" if nothing */
	const lshard_bootstrap *bootstrap; /* during open() only; always there, also for one rank */
	void *(*allocate)(const struct lshard_context *context, size_t bytes); /* zeroed; NULL when there is none */
	void (*release)(const struct lshard_context *context, void *pointer);
	void (*log)(const struct lshard_context *context, lshard_log_level level, const char *format, ...);
	void *group;
	const struct lshard_callbacks *callbacks; /* the caller's (layershard/callbacks.h); NULL: none */
	/*
	 * 1 in a child by fork of the process that opened the transport. Only close and store_close are called there.
	 * They give back this process's memory, mappings and descriptors, and touch nothing else: no message, no
	 * shutdown() of a socket, no call of the caller's or of a driver, no thread, and no lock, which a thread that
	 * is not there may hold.
	 */
	int (*forked)(const struct lshard_context *context);
	lshard_large_pages large_pages;
	uint64_t large_page_bytes; /* of host memory, the same on all ranks; 0: there are none, or none are wanted */
	lshard_numa numa;          /* the same on all ranks; AUTO is NONE; all else needs CAP_PLACES */
	const char *job;           /* the name by which the ranks found each other; NULL: otherwise */
	int rejoin;                /* 1: ranks may come back, by that name: ops->rejoin is there */
	/* During open(): this rank comes back, to those found here; there is no bootstrap. NULL: all begin. */
	const struct lshard__living *living;
} lshard_context;

typedef struct lshard_transport {
	const struct lshard_transport_ops *ops;
	const lshard_context *context;
	lshard_error error;
} lshard_transport;

/** A range of a layer that one rank keeps: `rows` runs of `width` bytes; contiguous where rows is 1. */
typedef struct lshard_piece {
	int32_t rank;          /* whose shard it is in */
	int32_t granular;      /* 1: begins and ends at granules, in the shard and in the layer, as in every layer */
	uint64_t shard_offset; /* in that rank's shard */
	uint64_t shard_pitch;  /* from one run to the next there */
	uint64_t layer_offset; /* in the packed layer */
	uint64_t layer_pitch;
	uint64_t width;
	uint64_t rows;
} lshard_piece;

/** What a store is made of; the same on every rank but for what says otherwise. Lives as long as the store. */
typedef struct lshard_store_plan {
	const char *name; /* the series' name: mappings and messages carry it */
	uint32_t layers;
	uint64_t layer_bytes;           /* one buffer */
	uint64_t shard_bytes;           /* this rank's own shard; 0 is allowed */
	const uint64_t *shard_bytes_of; /* every rank's */
	uint32_t buffers;               /* windows and residents of this rank; 0 is allowed */
	uint32_t windows;               /* the first of them */
	int direct;                     /* 1: peer() will be asked for layers of direct() ranks */
	/*
	 * 1 (CAP_COMPOSES only): granular pieces that are this rank's own or a direct() rank's are found in place
	 * in the buffer of their layer and are never copied there. The pieces of all layers lie alike, and a buffer is
	 * as large as what is not found in place.
	 */
	int composed;
	const lshard_piece *pieces;
	/* layers + 1 entries: position p has pieces [first_piece[p], first_piece[p + 1]). */
	const uint32_t *first_piece;
	const uint32_t *buffer_of; /* [layers] where each layer comes, LSHARD_NO_BUFFER: nowhere; NULL: anywhere */
	uint64_t alignment;        /* of the tensors in a layer: what memory_source is asked for */
	const lshard_memory_source *memory_source; /* the caller's (CAP_CALLER_MEMORY); NULL: none */
	uint32_t spares; /* the last of the windows, which poison may need later: addresses that need no memory yet */
	int refreshed;   /* 1: refresh() follows whatever is written to shards, before any other rank reads it */
	int recalled;    /* 1: this rank came back: store_open is local, and opens what rejoin->recall has found */
	uint64_t number; /* of the series in the group; two of one name have two */
	const void *description; /* of the series, for ranks that come back; NULL: this store is not for them */
	size_t description_bytes;
} lshard_store_plan;

typedef struct lshard_store {
	lshard_transport *transport;
	const lshard_store_plan *plan;
	lshard_error error;
} lshard_store;

/** What wait() tells about a transfer; all 0 where the transport does not know. Nanoseconds of CLOCK_MONOTONIC. */
typedef struct lshard_arrival {
	uint64_t blocked_ns;  /* how long this call blocked */
	uint64_t started_ns;  /* when the bytes began to move */
	uint64_t finished_ns; /* when the last one was there */
	uint64_t busy_ns;     /* how long the link worked for it */
} lshard_arrival;

/** What a rank that came back is told of a series. */
typedef struct lshard_recalled {
	const void *description; /* as the plan of the ranks that live has it; until the next recall or store_open */
	size_t description_bytes;
	uint64_t number;
	uint64_t generation;
} lshard_recalled;

/**
 * What one-sided transports need so that ranks can come back (context->rejoin). Called on the transport itself, with
 * the plan of a store, also where wrappers stand in front.
 */
typedef struct lshard_rejoin_ops {
	size_t struct_size;
	/*
	 * A call of several exchanges begins (1) or ends (-1) on this rank: nobody comes back between them. Local.
	 * @p note: what all ranks have alike, for those who come back.
	 */
	void (*busy)(lshard_transport *transport, int change, uint64_t note);
	/* In a rank that came back: what it was told. */
	uint64_t (*note)(const lshard_transport *transport);
	/* The store's shards are whole: those who come back may have them. */
	void (*filled)(lshard_transport *transport, const lshard_store_plan *plan, uint64_t generation);
	/*
	 * In a rank that came back: ask the others for a filled series of that name which this rank has not opened.
	 * RANGE: they have none. Blocks at most timeout_ms.
	 */
	lshard_status (*recall)(lshard_transport *transport, const char *name, lshard_recalled *recalled);
	/*
	 * Shards of ranks that came back are read-only there: give each memory that its rank may write, with the same
	 * bytes at the same addresses. Collective over the ranks of the last exchange, while no rank reads. On failure
	 * bytes and addresses are as they were.
	 */
	lshard_status (*renew)(lshard_transport *transport, const lshard_store_plan *plan);
} lshard_rejoin_ops;

typedef struct lshard_transport_ops {
	size_t struct_size;
	uint32_t abi; /* LSHARD_TRANSPORT_ABI */
	const char *name;
	const char *summary; /* one line for `layershard info` */
	uint32_t capabilities;
	uint64_t granule_bytes; /* what shards, stripes and buffers are rounded up to; a power of two */

	/* Optional; NULL: always. 1 if this machine can do it; else 0 and why in @p error. Needs no group. */
	int (*available)(lshard_error *error);

	/*
	 * Connect the ranks. Collective; blocks at most timeout_ms. On failure the text goes to @p error.
	 * A wrapper (see inner) opens nothing itself but gets the transport it wraps in @p inner; "fabric" gets what
	 * its ranks exchange records by, and closes it in the end as a wrapper does; for others it is NULL.
	 */
	lshard_status (*open)(const lshard_context *context, lshard_transport *inner, lshard_transport **transport,
			      lshard_error *error);
	/* Local; never blocks on a peer. All stores are closed. A wrapper closes its inner one. */
	void (*close)(lshard_transport *transport);

	/*
	 * The control channel: an all-gather among living ranks. Every living rank gives @p bytes and gets everyone's,
	 * in rank order (those of ranks that are gone are zero); alive[r] says who took part, the same on every rank.
	 * Either it happens for all living ranks or, on TIMEOUT, for none: then alive[r] is 0 for the ranks that did
	 * not come. A rank that dies while others wait ends their waiting for it at once. Blocks at most timeout_ms.
	 * @p bytes <= LSHARD_EXCHANGE_BYTES, the same on every rank. lshard_channel_exchange does it among the
	 * processes of a host.
	 */
	lshard_status (*exchange)(lshard_transport *transport, const void *send, void *receive, size_t bytes,
				  uint8_t *alive);

	/*
	 * Make every blocked call return ABORTED, now and later, and let the others see this rank as gone. Any thread.
	 */
	void (*abort)(lshard_transport *transport);

	/*
	 * Allocate this rank's shard and buffers and get at the others' shards. Collective. plan->direct is only set if
	 * CAP_DIRECT. Text of a failure: transport->error.
	 */
	lshard_status (*store_open)(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **store);
	/*
	 * Local. Waits for this rank's own transfers (cancels what it can), never for a peer: others may go on reading
	 * the shard.
	 */
	void (*store_close)(lshard_store *store);

	/* Addresses, fixed for the life of the store. */
	void *(*shard)(lshard_store *store);                                      /* NULL if shard_bytes is 0 */
	void *(*buffer)(lshard_store *store, uint32_t buffer, uint32_t position); /* the layer as one range */
	/*
	 * CAP_DIRECT: the layer as one range, in place. CAP_COMPOSES: of layers that are one piece, also where copy()
	 * can read them.
	 */
	void *(*peer)(lshard_store *store, uint32_t position);
	/*
	 * CAP_DIRECT, optional: 1 if this rank can compute from the shard of @p rank in place; the answer never
	 * changes. Whole layers are read in place from those ranks that can, striped ones if all can; the others' go
	 * through windows. NULL: all ranks can.
	 */
	int (*direct)(lshard_transport *transport, int32_t rank);

	/*
	 * Start fetching the layer at @p position into @p buffer. Never blocks on a peer. Fetches of a store happen in
	 * order; one that has not begun when the next one for its buffer comes is dropped. With streams, the copy waits
	 * for all uses that were recorded of this buffer.
	 * @p buffer: LSHARD_NO_BUFFER on collective transports where this rank only gives the layer. @p sequence:
	 * collective transports compare it and what is fetched between ranks; wait reports OUT_OF_STEP.
	 */
	lshard_status (*fetch)(lshard_store *store, uint32_t position, uint32_t buffer, void *stream,
			       uint64_t sequence);

	/*
	 * The last fetch into @p buffer is done (host memory: blocks at most timeout_ms), or will be before what
	 * follows on @p stream. Returns OK at once where nothing was ever fetched, a wait for it was OK already, or
	 * drain has dropped it. Inside a capture, fetches from before it are taken as done. OK is said of bytes that
	 * are there: a fetch that failed fails every wait for it, until the next fetch into the buffer or drain, also
	 * where join, or a wait for another buffer, has told of it before. Collective transports: where it is OK, a
	 * wait for what was fetched earlier, into any store, blocks on no peer. A wait that fails fills blocked_ns too;
	 * after TIMEOUT the transfer goes on and can be waited for again.
	 */
	lshard_status (*wait)(lshard_store *store, uint32_t buffer, void *stream, lshard_arrival *arrival);

	/*
	 * CAP_STREAMS: record an event: what @p stream was given so far may read @p buffer, and the next fetch into it
	 * waits for that. LSHARD_NO_BUFFER: it may read anything of this store; drain waits for that.
	 */
	lshard_status (*record_use)(lshard_store *store, uint32_t buffer, void *stream);

	/*
	 * Order what follows on @p stream (host: this call) after everything in flight and after all recorded uses.
	 * Ends this store's part in a capture. Fails where a fetch that nobody waited for fails, and leaves that to be
	 * told by the wait for its buffer too; after TIMEOUT transfers go on and can be waited for or joined again.
	 */
	lshard_status (*join)(lshard_store *store, void *stream);

	/* CAP_CAPTURE: *capture is 0 if @p stream is not being captured, else a number that this capture has alone. */
	lshard_status (*capture)(lshard_store *store, void *stream, uint64_t *capture);

	/*
	 * Finish or drop every transfer, and wait (timeout_ms) for all recorded uses: afterwards nothing of this
	 * rank reads or writes, and what buffers hold is not known. One that fails has dropped nothing.
	 */
	lshard_status (*drain)(lshard_store *store);

	/*
	 * Fetch the layer at @p position to @p destination, memory of this rank, and return when it is there. Only
	 * outside passes (commit, update, verify). Collective transports: collective, same order on all ranks. Pieces
	 * of this rank itself are copied too.
	 * @p destination NULL: this rank only gives the layer (collective transports).
	 */
	lshard_status (*read)(lshard_store *store, uint32_t position, void *destination);

	/*
	 * Optional: copy @p rows runs of @p width bytes between addresses of this store (shard, buffer, peer) or of
	 * another store of the transport or host memory, and return when they are there. What was fetched before comes
	 * first. Only outside passes. NULL: the processor can reach them, memcpy does.
	 */
	lshard_status (*copy)(lshard_store *store, void *to, uint64_t to_pitch, const void *from, uint64_t from_pitch,
			      uint64_t width, uint64_t rows);

	/*
	 * CAP_STREAMS, optional: put on @p stream a copy of all of buffer @p from, which was waited for on that stream,
	 * to buffer @p to; both are below windows, and the plan is not composed. It comes after all recorded uses of
	 * @p to and after an earlier copy to it; what follows on @p stream, or on another after wait(to), comes after
	 * it, and so does the next fetch or copy into @p to. Where streams can be captured, also inside captures.
	 * NULL: series cannot be poisoned.
	 */
	lshard_status (*copy_buffer)(lshard_store *store, uint32_t to, uint32_t from, void *stream);

	/*
	 * Optional: write out what goes to files of the transport's own. Local. SYSTEM: something of it is lost, now or
	 * earlier, and all further calls say so too. Called before close, and whenever the program wishes.
	 */
	lshard_status (*flush)(lshard_transport *transport);

	/*
	 * Optional, of stores that are refreshed: all ranks have filled their shards, so copies of these that this rank
	 * keeps for others (LSHARD_NUMA_COPY) are made anew. All ranks call it, and none reads another's shard before
	 * all have returned. *bytes: of such copies. With it, an update needs every rank. NULL: there are no copies.
	 */
	lshard_status (*refresh)(lshard_store *store, uint64_t *bytes);

	const lshard_rejoin_ops *rejoin; /* NULL: a rank that is gone stays so */
} lshard_transport_ops;

#define LSHARD_EXCHANGE_BYTES 1024
#define LSHARD_NO_BUFFER      UINT32_MAX

/* ---- A kit: what many transports need, and need not write ------------------------------------------------------ */

/**
 * Connects ranks that are processes of one host and one user, or threads of one: sockets between every two of them, by
 * which a rank's end is seen at once, and a page that they share. The transports of this library for one host stand on
 * it. One thread at a time, but for lshard_channel_abort. Statuses and texts are those that a transport's own functions
 * are to return.
 */
typedef struct lshard_channel lshard_channel;

/**
 * For open(): collective, by the context's bootstrap. Texts of failures go to @p error, now and as long as the channel
 * lives: give the transport's.
 */
LSHARD_API lshard_status lshard_channel_open(const lshard_context *context, lshard_error *error,
					     lshard_channel **channel);
/** For close(), also in a child by fork. NULL is allowed. */
LSHARD_API void lshard_channel_close(lshard_channel *channel);
/** For abort(). Any thread. */
LSHARD_API void lshard_channel_abort(lshard_channel *channel);

/** All that exchange() promises. */
LSHARD_API lshard_status lshard_channel_exchange(lshard_channel *channel, const void *send, void *receive, size_t bytes,
						 uint8_t *alive);

/**
 * For store_open(): all ranks go on, or all fail alike, with the text of the first one that failed or the names of
 * those that are gone. @p what names what is opened, the same on all ranks. @p mine: how this rank fared; where it
 * failed its text is in the channel's error.
 */
LSHARD_API lshard_status lshard_channel_agree(lshard_channel *channel, const char *what, lshard_status mine);

/**
 * The same, and then every rank gives a descriptor @p fd (-1: none) to all others: @p fds gets theirs in rank order, -1
 * for none and for this rank. The caller closes them. On failure there are none.
 */
LSHARD_API lshard_status lshard_channel_swap(lshard_channel *channel, const char *what, lshard_status mine, int fd,
					     int *fds);

/**
 * For store_open(), among processes and threads alike: @p shards, all NULL before, gets every rank's shard in rank
 * order, NULL where it has no bytes: this rank's own, zeroed, which nobody else can write, and the others' to be read.
 * They stay readable when their rank has died. All ranks have them or all fail alike, and on failure all are NULL
 * again. @p mine: as in lshard_channel_agree; where it is a failure @p shards is not looked at.
 */
LSHARD_API lshard_status lshard_channel_share(lshard_channel *channel, const lshard_store_plan *plan,
					      lshard_status mine, void **shards);
/** For store_close(), also in a child by fork: what lshard_channel_share gave. */
LSHARD_API void lshard_channel_unshare(const lshard_channel *channel, const lshard_store_plan *plan, void **shards);

/**
 * Put the layer at @p position together at @p layer, from memory that the processor reads: @p shards has the first byte
 * of every rank's shard, in rank order.
 */
LSHARD_API void lshard_copy_layer(const lshard_store_plan *plan, uint32_t position, const void *const *shards,
				  void *layer);

#ifdef __cplusplus
}
#endif
#endif
