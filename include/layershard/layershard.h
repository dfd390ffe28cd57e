/* SPDX-License-Identifier: Apache-2.0
 *
 * layershard - data-parallel speed with 1/n of the weights.
 *
 * n ranks run the same model on different data. The layers of a series are stored once, spread over the ranks, and
 * fetched by the others just in time, into a ring of at most k+1 windows, while the layers before them compute.
 *
 * Words
 *   group      n ranks and the transport between them
 *   series     isomorphic layers [first, first + count); a layer may hold several tensors, packed
 *   source     the rank that loads and processes layer i: i % n
 *   shard      the bytes a rank stores for good
 *   window     one of at most k+1 buffers for layers this rank does not store
 *   k          the prefetch distance asked for: layers between the start of a fetch and its use; sets the windows
 *   resident   a layer this rank keeps although another is its source, because there was memory to spare
 *   view       the right to use a layer's bytes: from wait until the next reach of another layer, or release
 *
 * Life of a series
 *   lshard_group_create -> lshard_series_create -> lshard_series_commit
 *   -> for every pass, for every layer: lshard_reach, lshard_wait, compute
 *   -> lshard_series_destroy -> lshard_group_destroy
 *
 * What holds for every function unless it says otherwise
 *   Returns    an lshard_status: negative is an error with a text (lshard_series_error, lshard_group_error, or the
 *              buffer in the options while there is no object yet), 0 is done. Out-parameters are written on success
 *              only. A failed call has changed nothing; on collective transports one that all ranks make together
 *              may cost what the windows hold: see lshard_series_rewind.
 *   Threads    one thread at a time per series; different series of a group at the same time on one-sided
 *              transports, from one thread on collective ones. Collective calls of a group: from one thread.
 *              lshard_group_abort and lshard_series_stats from any thread.
 *   Processes  a program may fork at any time. A child has a copy of the group and is no rank: every call there is
 *              STATE, abort does nothing, and what the child does or how it ends is nothing to the ranks. Memory that
 *              was usable in the parent can be read there; on host memory windows go on changing in some transports.
 *              Destroying series and group in a child, or not doing so, frees its own copy: allocator.release is called
 *              there, but no memory_source, callback or driver. A child that stays keeps what it maps of the ranks'
 *              memory in use. vfork and exec are allowed as anywhere; for a group of its own a child creates one.
 *   Blocking   "collective" calls wait for the other ranks, at most timeout_ms of the group each time they agree; a
 *              call has a few agreements, loading one more for each round of layers. A call in which a deadline has
 *              passed waits for no other. Nothing waits for ever.
 *   Names      what fails because of other ranks names them: TIMEOUT those that did not come, PEER_FAILED those that
 *              are gone, MISMATCH and OUT_OF_STEP those in another call. With the transport "callback" as far as
 *              callbacks.h says.
 *   Arguments  NULL is allowed only where a comment says so. Arguments that are wrong on one rank only are an error
 *              there; the others may wait for it until their deadline.
 *   Memory     nothing is allocated between lshard_series_commit and lshard_series_destroy, but by updates.
 *   Streams    a stream is the device's own handle (a CUstream) as void *. Host memory has no streams: pass NULL.
 *   Units      _bytes, _ns, _ms. Strings and structs given to a function are copied.
 *   Structs    begin with struct_size, which their INIT macro sets; for those in arrays the options say it. So a
 *              program may be built with a header of another version than the library's: later ones add members at the
 *              end. What the program's header lacks has its default. Where the program sets what the library does not
 *              know, the call is INVALID; results that it does not know are 0.
 *
 * Beside this header: plan.h (planning, transports, variables, discovery: no group needed), callbacks.h (the caller's
 * own collectives and device) and transport.h, for writers of transports. What they do not declare is no part of the
 * interface. Version 0: names may still change.
 */
#ifndef LAYERSHARD_LAYERSHARD_H
#define LAYERSHARD_LAYERSHARD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The one place where the version is written; the build reads it from here. */
#define LSHARD_VERSION_MAJOR 0
#define LSHARD_VERSION_MINOR 1
#define LSHARD_VERSION_PATCH 0

#if defined(__GNUC__)
#define LSHARD_API __attribute__((visibility("default")))
#else
#define LSHARD_API
#endif

/* ---- Status ---------------------------------------------------------------------------------------------------- */

/* X(name, value, text, what the caller does about it). Values are never renumbered. */
#define LSHARD_STATUS_MAP(X)                                                                                           \
	X(OK, 0, "done", "go on")                                                                                      \
	X(IN_PROGRESS, 1, "not finished yet", "ask again")                                                             \
	X(ERR_INVALID, -1, "invalid argument", "correct the call; the text names the argument")                        \
	X(ERR_RANGE, -2, "no such layer, tensor or index", "correct the call")                                         \
	X(ERR_NO_MEMORY, -3, "out of memory", "free memory or shard over more ranks")                                  \
	X(ERR_NOT_SUPPORTED, -4, "this transport cannot do that", "choose another transport or option")                \
	X(ERR_STATE, -5, "not allowed in this state", "make the calls in the order of this header")                    \
	X(ERR_BUSY, -6, "something still uses it", "release the layer, or destroy the series first")                   \
	X(ERR_TIMEOUT, -7, "the deadline passed", "look at the ranks named; call again, or abort and destroy")         \
	X(ERR_ABORTED, -8, "the group was aborted", "destroy the series and the group")                                \
	X(ERR_PEER_FAILED, -9, "a rank is gone", "go on if the call was not needed, else destroy and start again")     \
	X(ERR_TRANSPORT, -10, "the transport failed", "the text holds its own words; destroy and start again")         \
	X(ERR_MISMATCH, -11, "the ranks disagree", "give all ranks the options the text names")                        \
	X(ERR_OUT_OF_STEP, -12, "a collective transport's ranks made different calls", "lshard_series_rewind")         \
	X(ERR_NOT_PERIODIC, -13, "the captured region does not end as it began", "lshard_series_prepare before it")    \
	X(ERR_CORRUPT, -14, "bytes differ from what their source stored", "do not use the results")                    \
	X(ERR_CALLBACK, -15, "a callback of the caller failed", "see the caller's own error")                          \
	X(ERR_SYSTEM, -16, "the operating system refused", "the text holds the system's own words")

typedef enum lshard_status {
#define LSHARD_STATUS_ENUM(name, value, text, remedy) LSHARD_##name = (value),
	LSHARD_STATUS_MAP(LSHARD_STATUS_ENUM)
#undef LSHARD_STATUS_ENUM
} lshard_status;

/** The status as written in this header ("LSHARD_ERR_BUSY"); "LSHARD_UNKNOWN" for any other number. Static text. */
LSHARD_API const char *lshard_status_name(lshard_status status);
/** What the status means, in a few words. Static text. */
LSHARD_API const char *lshard_status_text(lshard_status status);
/** What a caller can do about it. Static text. */
LSHARD_API const char *lshard_status_remedy(lshard_status status);
/** The version of the library at run time, "0.1.0". Static text. */
LSHARD_API const char *lshard_version(void);

/* ---- Caller's hooks -------------------------------------------------------------------------------------------- */

/** Host memory for the library's own objects: both functions. allocate returns NULL when there is none. */
typedef struct lshard_allocator {
	size_t struct_size;
	void *(*allocate)(void *user, size_t bytes);
	void (*release)(void *user, void *pointer);
	void *user;
} lshard_allocator;

#define LSHARD_ALLOCATOR_INIT {sizeof(lshard_allocator), NULL, NULL, NULL}

typedef enum lshard_purpose { LSHARD_FOR_SHARD = 1, LSHARD_FOR_WINDOWS = 2 } lshard_purpose;

/**
 * The caller's own memory for shards and windows, where the transport can use it (lshard_transport_info says so;
 * NOT_SUPPORTED otherwise). One call per purpose and series; the memory is given back when the series is destroyed
 * and, for shards, no other rank reads them any more: then, or by a later call that creates or destroys a series or the
 * group. All ranks of a series have a source, or none (MISMATCH); striped
 * layers are then copied whole.
 *
 * On a GPU windows may be any memory of the rank's device. A shard must be what other processes can open: from
 * cudaMalloc, or a part of it, as PyTorch's allocator gives it unless expandable_segments or cudaMallocAsync are
 * chosen; NOT_SUPPORTED otherwise. What another rank still reads when the group is destroyed is not given back, and a
 * warning says so.
 */
typedef struct lshard_memory_source {
	size_t struct_size;
	void *(*allocate)(void *user, lshard_purpose purpose, size_t bytes, size_t alignment);
	void (*release)(void *user, lshard_purpose purpose, void *pointer);
	void *user;
} lshard_memory_source;

#define LSHARD_MEMORY_SOURCE_INIT {sizeof(lshard_memory_source), NULL, NULL, NULL}

/**
 * The caller's all-gather, used only inside lshard_group_create: every rank gives @p bytes at @p send and gets those
 * of all ranks, in rank order, at @p receive. Returns 0, or anything else to make creation fail.
 */
typedef struct lshard_bootstrap {
	size_t struct_size;
	int (*allgather)(void *user, const void *send, void *receive, size_t bytes);
	void *user;
} lshard_bootstrap;

#define LSHARD_BOOTSTRAP_INIT {sizeof(lshard_bootstrap), NULL, NULL}

typedef enum lshard_log_level {
	LSHARD_LOG_ERROR = 0,
	LSHARD_LOG_WARN = 1,
	LSHARD_LOG_INFO = 2,
	LSHARD_LOG_DEBUG = 3
} lshard_log_level;

/** One line without a newline; @p text lives during the call only. Any thread. Must not call the library. */
typedef void (*lshard_log_function)(void *user, lshard_log_level level, const char *text);

/* ---- Group ----------------------------------------------------------------------------------------------------- */

typedef struct lshard_group lshard_group;
typedef struct lshard_series lshard_series;
struct lshard_transport_ops; /* layershard/transport.h */
struct lshard_callbacks;     /* layershard/callbacks.h */

/* DLPack's device numbers. */
typedef enum lshard_memory { LSHARD_MEMORY_HOST = 1, LSHARD_MEMORY_CUDA = 2 } lshard_memory;

typedef struct lshard_group_options {
	size_t struct_size; /* set by LSHARD_GROUP_OPTIONS_INIT */
	int32_t rank;       /* 0..size-1; both -1: discovered (LAYERSHARD_*, torchrun, Open MPI, PMIx, PMI, Slurm) */
	int32_t size;       /* 1..65536 */
	/* "auto", a transport's name, or wrappers in front of one, outermost first:
	 * "trace=run.json,throttle=1e9,shm:copy". NULL: LAYERSHARD_TRANSPORT, else "auto". */
	const char *transport;
	const struct lshard_transport_ops *custom_transport; /* one of the caller's own instead; outlives the group */
	/* By which separate ranks find each other. NULL: LAYERSHARD_JOB, else the launcher's (lshard_discovered). */
	const char *job;
	uint32_t timeout_ms;               /* longest wait each time; 0: LAYERSHARD_TIMEOUT_MS, else 30000 */
	lshard_memory memory;              /* where layers live */
	int32_t device;                    /* device ordinal; ignored for host memory */
	const lshard_bootstrap *bootstrap; /* NULL: ranks connect by the job's name */
	const lshard_allocator *allocator; /* NULL: malloc and free */
	lshard_log_function log;           /* NULL: silent */
	void *log_user;
	lshard_log_level log_level; /* lines above it are not made; default INFO */
	char *error;                /* where a failing lshard_group_create writes its text; may be NULL */
	size_t error_bytes;
	const struct lshard_callbacks *callbacks; /* for the transport "callback"; NULL: none */
} lshard_group_options;

/* What formats the rest would give each member a line. */
/* clang-format off */
#define LSHARD_GROUP_OPTIONS_INIT \
	{sizeof(lshard_group_options), -1, -1, NULL, NULL, NULL, 0, LSHARD_MEMORY_HOST, 0, NULL, NULL, NULL, NULL, \
		LSHARD_LOG_INFO, NULL, 0, NULL}
/* clang-format on */

/**
 * Join the group: agree on a transport with the other ranks and connect to them.
 *
 * Ranks find each other through options->bootstrap if it is given, else by the job's name on this host, else alone
 * (size 1). By a job they connect at an abstract socket, where other users are sent away; or, where LAYERSHARD_MEET_DIR
 * names a directory of mode 0700 that is the user's own, at a socket in it. In a user namespace that does not map the
 * user only the latter can be had (NOT_SUPPORTED): all users look alike there.
 *
 * Threads of one process are ranks like others: each creates a group of its own, with its rank and by one job's name or
 * a bootstrap among them, and "auto" takes "local". A child by fork of a rank is none (see Processes above); ranks that
 * a program forks create their groups after the fork.
 *
 * Scope: collective.  Blocks: until all ranks came, at most timeout_ms each time they agree; where a bootstrap is
 *        given, as long as that does.
 * State: on failure nothing is left behind on this rank.
 * @return OK; INVALID for options that make no sense; MISMATCH when ranks disagree on size or transport; TIMEOUT naming
 *         who is missing; NOT_SUPPORTED when the transport cannot connect these ranks, with the reason;
 *         TRANSPORT, also when the bootstrap fails; PEER_FAILED naming who is gone; NO_MEMORY; SYSTEM.
 */
LSHARD_API lshard_status lshard_group_create(const lshard_group_options *options, lshard_group **group);

/**
 * Write out what this rank's transport writes to files: the trace so far, with "trace=FILE". A trace that cannot be
 * written (a full disk) stops no pass; it is told here and by lshard_group_destroy, and not forgotten.
 *
 * Scope: local.  Blocks: never on a peer.
 * @return OK, also where nothing is written; SYSTEM: something of it is lost, now or earlier, and the text says why.
 */
LSHARD_API lshard_status lshard_group_flush(lshard_group *group);

/**
 * Leave the group. NULL is allowed.
 * Scope: local.  Blocks: never on a peer.
 * @return OK; BUSY while the group still has series. SYSTEM: the group is gone, but a trace of its could not be written
 *         whole: see lshard_group_flush, which has the text; here it goes to the log.
 */
LSHARD_API lshard_status lshard_group_destroy(lshard_group *group);

/**
 * Make every blocked call of this rank return ABORTED, now and from now on. Only destroy is left after it. Other ranks
 * see this rank as gone in their next collective call. Does nothing in a child by fork.
 * Threads: any.
 */
LSHARD_API void lshard_group_abort(lshard_group *group);

LSHARD_API int32_t lshard_group_rank(const lshard_group *group);
LSHARD_API int32_t lshard_group_size(const lshard_group *group);
/**
 * Name of the transport in use and why it was chosen: "shm (auto: all ranks on one host)". Lives as long as the group.
 */
LSHARD_API const char *lshard_group_transport(const lshard_group *group);
/** Text of the last failed call on the group itself; "" if none. Lives until the next failing call. */
LSHARD_API const char *lshard_group_error(const lshard_group *group);

/* ---- Series ---------------------------------------------------------------------------------------------------- */

typedef enum lshard_placement {
	LSHARD_WHOLE = 0,  /* layer i lives whole on rank i % n */
	LSHARD_STRIPED = 1 /* every rank keeps 1/n of each layer */
} lshard_placement;

typedef enum lshard_stripe {
	LSHARD_STRIPE_BYTES = 0,  /* anywhere */
	LSHARD_STRIPE_ROWS = 1,   /* rank r keeps rows [rows*r/n, rows*(r+1)/n): column-parallel for [out, in] */
	LSHARD_STRIPE_COLUMNS = 2 /* rank r keeps a slice of every row: a row-parallel shard */
} lshard_stripe;

/** One stored tensor of a layer, the same in every layer of the series: what is there after post-processing. */
typedef struct lshard_tensor {
	const char *name;      /* 1..63 characters, unique in the layer */
	uint64_t bytes;        /* > 0 */
	uint32_t alignment;    /* power of two up to 4096; 0 and anything below 256 give 256 */
	lshard_stripe stripe;  /* how STRIPED divides it; ignored by WHOLE */
	uint64_t rows;         /* for ROWS and COLUMNS: divides bytes; else 0 */
	uint32_t column_bytes; /* for COLUMNS: bytes of one column's element; divides bytes / rows; else 0 */
} lshard_tensor;

/**
 * What windows hold while no view of them lives. With poison a program that reads a layer before wait, or after its
 * view has ended, always sees the pattern of lshard_poison_pattern there, and never by luck the right bytes. The bits
 * seen in views are the same. It costs memory for one window more than there are windows, two copies of each layer
 * within the memory, and on devices most of what transfers gain by running beside compute. A series of which windows
 * hold only what is not mapped in place (STRIPED, on one-sided device transports) has whole windows then. Layers read
 * in place (stored here, resident, on "shm", of ranks on the same device) have no windows: nothing is poisoned there.
 */
typedef enum lshard_poison {
	LSHARD_POISON_OFF = 0, /* unless LAYERSHARD_POISON says more: "ready" or "1" */
	/*
	 * lshard_series_poison switches it on and off. In host memory, where no tensor has a pattern of its own, it
	 * takes addresses only until it is switched on for the first time.
	 */
	LSHARD_POISON_READY = 1,
	LSHARD_POISON_ON = 2 /* from creation on; lshard_series_poison switches it off and on */
} lshard_poison;

/**
 * What a tensor is filled with, over and over from its first byte; copied. NULL and 0: bytes of 0xff, which are NaN as
 * fp64, fp32, fp16, bf16 and fp8, and -1 as an integer.
 */
typedef struct lshard_poison_pattern {
	const void *pattern;
	uint32_t bytes;
} lshard_poison_pattern;

typedef struct lshard_series_options {
	size_t struct_size;
	const char *name;     /* 1..63 characters; messages and mappings carry it */
	uint32_t first_layer; /* any; need not divide by anything */
	uint32_t layer_count; /* 1..2^20 */
	const lshard_tensor *tensors;
	size_t tensor_struct_size; /* from one to the next; set by LSHARD_SERIES_OPTIONS_INIT */
	uint32_t tensor_count;     /* 1..4096 */
	uint32_t prefetch;         /* k; any; windows = at most min(k + 1, layers not stored here) */
	lshard_placement placement;
	/*
	 * Memory to spend on keeping further layers: 0 none, UINT64_MAX all. Each costs what a window does: layer_bytes
	 * of lshard_stats; with STRIPED less where this rank's own stripes are mapped in place. lshard_plan
	 * (layershard/plan.h) tells how many a sum buys, and which layers have a distance below k without them.
	 */
	uint64_t resident_bytes;
	const lshard_memory_source *memory_source;    /* NULL: the transport's own memory */
	lshard_poison poison;                         /* the same on all ranks, or OFF on all */
	const lshard_poison_pattern *poison_patterns; /* tensor_count of them; NULL: 0xff for all */
	size_t poison_pattern_struct_size;            /* from one to the next; set by LSHARD_SERIES_OPTIONS_INIT */
} lshard_series_options;

/* clang-format off */
#define LSHARD_SERIES_OPTIONS_INIT \
	{sizeof(lshard_series_options), NULL, 0, 0, NULL, sizeof(lshard_tensor), 0, 1, LSHARD_WHOLE, 0, NULL, \
		LSHARD_POISON_OFF, NULL, sizeof(lshard_poison_pattern)}
/* clang-format on */

/**
 * Create a series: lay it out, allocate this rank's shard and windows, map what can be mapped of the others' shards.
 * Addresses (lshard_series_address) are final from here on; bytes are there after commit.
 *
 * Scope: collective; descriptions are compared field by field.  Blocks: at most timeout_ms each time the ranks agree.
 * State: on failure nothing is left behind on this rank.
 * @return OK; INVALID; MISMATCH naming the first difference and the rank, or the rank in another call; NO_MEMORY;
 *         NOT_SUPPORTED; TIMEOUT naming who is missing; PEER_FAILED naming who is gone; OUT_OF_STEP; TRANSPORT;
 *         ABORTED; SYSTEM. The text is lshard_group_error(group).
 */
LSHARD_API lshard_status lshard_series_create(lshard_group *group, const lshard_series_options *options,
					      lshard_series **series);

/**
 * Free the series. NULL is allowed. Other ranks that still read this rank's shard go on reading it: the memory goes
 * when the last of them lets go.
 * Scope: local.  Blocks: for this rank's own transfers and streams only, at most timeout_ms.
 * @return OK; TIMEOUT when work on a stream may still read the windows, or, with "callback", naming the ranks that have
 *         not asked for what this one has: nothing was freed, call again, or abort the group first.
 */
LSHARD_API lshard_status lshard_series_destroy(lshard_series *series);

/** 1 if this rank is the source of @p layer, 0 if not or if there is no such layer. */
LSHARD_API int lshard_series_is_source(const lshard_series *series, uint32_t layer);

/**
 * Where @p tensor of @p layer is found after wait. Fixed for the life of the series. Read-only unless between
 * update_begin and update_end on the source.
 * @return OK; RANGE.
 */
LSHARD_API lshard_status lshard_series_address(lshard_series *series, uint32_t layer, uint32_t tensor, void **address);

/**
 * Where the source may put processed bytes before commit, or between update_begin and update_end (WHOLE only).
 * @return OK; RANGE; STATE after commit; NOT_SUPPORTED for STRIPED or when this rank is not the source.
 */
LSHARD_API lshard_status lshard_series_storage(lshard_series *series, uint32_t layer, uint32_t tensor, void **address);

typedef struct lshard_range {
	size_t struct_size;
	uint64_t begin; /* byte (BYTES), row (ROWS) or byte in each row (COLUMNS) */
	uint64_t end;
	uint64_t row_bytes; /* bytes from one row of the stripe to the next; 0 for BYTES */
} lshard_range;

#define LSHARD_RANGE_INIT {sizeof(lshard_range), 0, 0, 0}

/**
 * With STRIPED, this rank's own slice of a tensor with a stripe dimension, usable as a tensor-parallel shard. Its bytes
 * stay where they are, whatever the windows do; they are aligned to 256 bytes. A rank alone has the whole tensor; one
 * for which no row or column is left gets NULL and an empty range.
 * @return OK; RANGE; NOT_SUPPORTED for WHOLE or a tensor striped by BYTES.
 */
LSHARD_API lshard_status lshard_series_stripe(lshard_series *series, uint32_t layer, uint32_t tensor, void **address,
					      lshard_range *range);

/**
 * Writes the processed bytes of one layer. @p tensors has tensor_count pointers to write to, in the order of the
 * options. Called once per layer, on its source only, one layer at a time. On a device it returns when its bytes are
 * there, not when the work is enqueued: no stream goes with them. Returns 0, or anything else to make commit fail.
 */
typedef int (*lshard_post_process)(void *user, uint32_t layer, void *const *tensors);

/**
 * Fill the series: post_process runs once per layer on its source, stripes and residents are fetched, every window is
 * preloaded with its first layer. With WHOLE post_process may be NULL: the bytes are then in lshard_series_storage
 * already.
 *
 * Scope: collective.  Blocks: post_process, and for the ranks at most timeout_ms each time they agree. A rank still
 *        busy in post_process counts as late: choose timeout_ms above the longest load.
 * State: on failure the series stays uncommitted; commit may be called again by all ranks, or the series destroyed.
 * @return OK; CALLBACK (naming the rank, on every rank); INVALID when STRIPED has no post_process; MISMATCH or
 *         OUT_OF_STEP naming who is in another call; TIMEOUT naming who is missing; PEER_FAILED naming who is gone;
 *         TRANSPORT; ABORTED; STATE; NO_MEMORY; as the transport's reads.
 */
LSHARD_API lshard_status lshard_series_commit(lshard_series *series, lshard_post_process post_process, void *user);

/* ---- The pass -------------------------------------------------------------------------------------------------- */

/**
 * Say that the program has arrived at @p layer, and start fetching what it will need next.
 *
 * Every window now wants its first layer at or after @p layer, circularly; what is there or on its way is left alone.
 * Calling it twice, skipping layers and jumping back are allowed and cost at most transfers.
 *
 * Scope:    local on one-sided transports; on collective ones every rank makes the same calls in the same order.
 * Blocks:   never on a peer, but with the transport "callback": its queue has room for 64 transfers and two for each
 *           window of the group's series. A program that reaches on and on without waiting, while a rank is late, fills
 *           it after at least 32 reaches. Then reach waits for room, at most a little longer than timeout_ms, and once,
 *           until a transfer ends: while nothing moves, later ones do not wait. A transfer that found no room is not
 *           made: the wait for its layer is TIMEOUT naming who is late, and all ranks are OUT_OF_STEP from there on,
 *           until lshard_series_rewind.
 * Capture:  allowed (see lshard_series_prepare).
 * State:    needs a committed series. Ends the view of every other layer: work enqueued on any stream after this call
 *           must not use them.
 * @param stream  stream on which the work on the previous layers was enqueued; NULL for host memory.
 * @return OK; RANGE; STATE before commit, during an update or after abort (ABORTED). NOT_SUPPORTED for
 *         more than 8 different streams. A transfer that cannot be started is reported by the wait for its layer.
 *         TRANSPORT with poison, when it could not be put over a layer of which the view ended: the program has
 *         arrived all the same, and the next call on the series tries again.
 * Cost:     O(k), no allocation; a sequential step starts at most two transfers.
 */
LSHARD_API lshard_status lshard_reach(lshard_series *series, uint32_t layer, void *stream);

/**
 * Make @p layer usable: host memory blocks until it is there; a device orders @p stream after its arrival.
 *
 * Starts a view. A layer that is neither there nor coming is fetched on demand (one-sided; counted as a miss).
 *
 * Blocks:   host memory: at most timeout_ms; streams: never, but with the transport "callback" until all ranks have
 *           asked for the layer, at most timeout_ms.   Capture: allowed (not with "callback").
 * @return OK; RANGE; BUSY naming both layers when the window this layer needs has a live view; TIMEOUT, on collective
 *         transports naming who did not ask for it; PEER_FAILED, TRANSPORT: the fetch failed (the next reach or wait
 *         tries again; after TIMEOUT wait goes on waiting); OUT_OF_STEP on collective transports, naming who is where,
 *         and also for layers stored here where a call that all ranks make together has failed (see
 *         lshard_series_rewind);
 *         NOT_SUPPORTED for more than 8 different streams; STATE; ABORTED.
 */
LSHARD_API lshard_status lshard_wait(lshard_series *series, uint32_t layer, void *stream);

/**
 * End the view of @p layer before the next reach, so that its window can be filled again at once. Optional.
 * @return OK, also when there was no view; RANGE; NOT_SUPPORTED and TRANSPORT as reach; STATE; ABORTED.
 */
LSHARD_API lshard_status lshard_release(lshard_series *series, uint32_t layer, void *stream);

/**
 * Put the ring into start-of-pass state, as if a pass had just ended, and order @p stream after everything in flight.
 * Call it before a capture and before each replay, on the stream of the replay, and once more on another stream if the
 * program goes on there; further streams of a replay follow that one by the program's own events. Nothing to do in
 * steady use. Ends every view.  Blocks: host memory: at most timeout_ms.
 * Capture: not allowed (STATE).
 * State:   after TIMEOUT transfers go on, and it may be called again. Any other failure on a collective transport: see
 *          lshard_series_rewind.
 * @return OK; STATE; TIMEOUT and, on collective transports, PEER_FAILED, OUT_OF_STEP as wait; NOT_SUPPORTED as reach;
 *         the status of a window that cannot be filled; ABORTED.
 */
LSHARD_API lshard_status lshard_series_prepare(lshard_series *series, void *stream);

/**
 * End every view, that of the present layer too, and order what follows on @p stream after everything in flight. Last
 * call of a captured region, whose windows must then hold what they held at its beginning.
 * Blocks: host memory: at most timeout_ms.
 * State:  after TIMEOUT transfers go on, and it may be called again. Any other failure on a collective transport, but
 *         in a capture: see lshard_series_rewind.
 * @return OK; NOT_PERIODIC naming the layer; TIMEOUT and, on collective transports, PEER_FAILED, OUT_OF_STEP as wait;
 *         STATE; ABORTED; as wait otherwise.
 */
LSHARD_API lshard_status lshard_series_join(lshard_series *series, void *stream);

/**
 * Bring all ranks back to the start of a pass, whatever each of them did before: the cure for OUT_OF_STEP.
 *
 * On a collective transport a call that all ranks make together and that fails on this one (rewind; verify that did not
 * come to its end; update_begin after the ranks have met once; prepare and join but for TIMEOUT), or a switch of poison
 * that failed but for TIMEOUT, leaves every window empty: what the others still take part in cannot be known. Until
 * rewind, verify or an update has succeeded, reach starts no transfer, and wait, prepare, join and a switch of poison
 * return OUT_OF_STEP, naming that call. On one-sided transports nothing is lost.
 *
 * Scope: collective on collective transports, local on one-sided ones.  Ends every view.
 * Blocks: on collective ones at most timeout_ms for what is on its way, and as long when the ranks agree.
 * State: on failure on a collective transport every window is empty. After TIMEOUT, MISMATCH or OUT_OF_STEP, when some
 *        ranks may have been in another call still, which has failed there now, call it again on all ranks until it is
 *        OK.
 * @return OK; TIMEOUT naming who is missing; PEER_FAILED naming who is gone; MISMATCH or OUT_OF_STEP naming who is in
 *         another call; TRANSPORT; STATE; ABORTED.
 */
LSHARD_API lshard_status lshard_series_rewind(lshard_series *series);

/**
 * Switch poison on (1) or off (0) between passes, in a series that was created with memory for it: to run a program's
 * own pass as it is and poisoned, and compare. Addresses stay as they are, layers in windows stay there. Nothing to do
 * where it is so already, or where the series has no windows. Ends every view otherwise; orders what follows on
 * @p stream after it.
 *
 * A graph captured before the switch goes on as it was captured, and reads poison: capture again.
 *
 * Scope: local; no other rank need do the same. But on a collective transport a failure other than TIMEOUT, STATE and
 *        NOT_SUPPORTED leaves every window of this rank empty, and all ranks must call lshard_series_rewind.
 * Blocks: as lshard_series_prepare, for what is on its way.
 * Capture: not allowed (STATE).
 * State: after TIMEOUT the poison is as it was, transfers go on, and it may be called again. After another failure of a
 *        transfer or a copy it is as it was or switched; call again. A window of which the copy failed is empty.
 * @return OK; STATE, also where the series was created without memory for it; TIMEOUT and what else a wait for a
 *         transfer returns; NOT_SUPPORTED as reach; TRANSPORT when a copy failed; OUT_OF_STEP on collective transports,
 *         after a call that failed (see lshard_series_rewind); ABORTED.
 */
LSHARD_API lshard_status lshard_series_poison(lshard_series *series, int on, void *stream);

/* ---- New weights ----------------------------------------------------------------------------------------------- */

/**
 * Begin an update. Ranks that have not called it yet go on reading the old bytes. On return every living rank has
 * called it and has read for the last time: sources may write (lshard_series_storage, or the callback of update_end).
 *
 * Scope: collective over the living ranks.  Ends every view.
 * Blocks: at most timeout_ms each time the ranks agree, which is twice, and as long between for its own transfers and
 *         streams.
 * State: on failure no byte has changed and the series is in use as before; on a collective transport its windows may
 *        be empty (see lshard_series_rewind).
 * @return OK; TIMEOUT naming who is missing, PEER_FAILED naming who is gone and the layers it is source of, MISMATCH or
 *         OUT_OF_STEP naming who is in another call, with nothing changed; TRANSPORT; STATE; ABORTED.
 */
LSHARD_API lshard_status lshard_series_update_begin(lshard_series *series);

/**
 * End an update: as commit, for the layers this rank is source of; generation + 1. The next pass reads the new bytes.
 *
 * With WHOLE an update may write some layers only, or some tensors of a layer: the pointers lead to where the old bytes
 * are, and what is not written keeps them. With STRIPED post_process writes every layer whole: nothing is there before.
 *
 * Scope: collective over the living ranks.
 * @return as lshard_series_commit; on failure the series stays in update and update_end may be called again. After
 *         PEER_FAILED only destroy is left: the layers it names may be half written.
 */
LSHARD_API lshard_status lshard_series_update_end(lshard_series *series, lshard_post_process post_process, void *user);

/* ---- Seeing it work -------------------------------------------------------------------------------------------- */

#define LSHARD_BELOW_K_NAMED 16

typedef struct lshard_stats {
	size_t struct_size;
	/* what was built */
	uint64_t layer_bytes;    /* one layer, packed */
	uint64_t shard_bytes;    /* stored here for good */
	uint64_t window_bytes;   /* all windows, and what poison has taken so far */
	uint64_t resident_bytes; /* the resident layers */
	uint32_t windows;
	uint32_t residents;
	uint32_t fetched_layers; /* layers fetched per steady pass */
	uint32_t below_k_count;  /* layers whose prefetch distance is below k */
	uint32_t below_k[LSHARD_BELOW_K_NAMED];
	/* what happened since commit */
	uint64_t generation;
	uint64_t reaches;
	uint64_t waits;
	uint64_t stalls;        /* waits that blocked (host memory) */
	uint64_t misses;        /* waits that had to fetch on demand */
	uint64_t fetches;       /* transfers started or captured; replays are not seen */
	uint64_t fetched_bytes; /* from other ranks */
	uint64_t blocked_ns;    /* time in wait (host memory) */
	uint64_t max_blocked_ns;
	uint64_t link_busy_ns; /* time the link carried bytes, where the transport knows it */
} lshard_stats;

#define LSHARD_STATS_INIT {sizeof(lshard_stats), 0, 0, 0, 0, 0, 0, 0, 0, {0}, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

/** Threads: any.  @return OK; INVALID; STATE in a child by fork, without a text. */
LSHARD_API lshard_status lshard_series_stats(const lshard_series *series, lshard_stats *stats);

/** Text of the last failed call on the series; "" if none. Lives until the next failing call. */
LSHARD_API const char *lshard_series_error(const lshard_series *series);

/**
 * Check every layer as this rank sees it against hashes made by the ranks that store it.
 * Scope: collective.  Ends every view.  Capture: not allowed.
 * Blocks: reads the whole series; at most timeout_ms each time the ranks agree, which is once for each layer.
 * State: what this rank finds (CORRUPT, a layer that cannot be had) is told at the end and changes nothing. Where it
 *        breaks off (ranks did not agree, or one waited for a layer until its deadline, of which all hear at the next),
 *        on a collective transport: see lshard_series_rewind.
 * Cost:  device memory is seen through a buffer of at most 16 MiB, allocated for the call.
 * @param hash  of the whole series as this rank sees it, the same on all ranks and for all placements; may be NULL.
 * @return OK; CORRUPT naming layer and rank; NO_MEMORY; NOT_SUPPORTED where the transport cannot copy to the host;
 *         MISMATCH or OUT_OF_STEP naming who is in another call or at another layer; TIMEOUT naming who is missing;
 *         PEER_FAILED naming who is gone; as wait otherwise.
 */
LSHARD_API lshard_status lshard_series_verify(lshard_series *series, uint64_t *hash);

#ifdef __cplusplus
}
#endif
#endif
