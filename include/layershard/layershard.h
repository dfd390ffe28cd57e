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
 *              only. A failed call has changed nothing, but for what lshard_series_rewind tells.
 *   Threads    one thread at a time per series; different series of a group at the same time on one-sided
 *              transports, from one thread on collective ones. Collective calls of a group: from one thread.
 *   Processes  a program may fork at any time. The child is no rank: every call there is STATE, abort does nothing, and
 *              destroying frees the child's copy, by allocator.release alone (docs/c.md, "After a fork").
 *   Blocking   "collective" calls wait for the other ranks, at most timeout_ms of the group each time they agree; a
 *              call has a few agreements, loading one more for each round of layers. A call in which a deadline has
 *              passed waits for no other; its transfers go on, and it may be made again. Local calls wait for no peer.
 *              Nothing waits for ever.
 *   Names      what fails because of other ranks names them: TIMEOUT those that did not come, PEER_FAILED those that
 *              are gone, MISMATCH and OUT_OF_STEP those in another call; "callback" and "fabric" as far as
 *              callbacks.h says.
 *   Arguments  NULL is allowed only where a comment says so. Arguments that are wrong on one rank only are an error
 *              there; the others may wait for it until their deadline.
 *   Memory     nothing is allocated between lshard_series_commit and lshard_series_destroy, but by updates and verify.
 *   Streams    a stream is the device's own handle (a CUstream) as void *. Host memory has no streams: pass NULL.
 *   Units      _bytes, _ns, _ms. Strings and structs given to a function are copied.
 *   Structs    begin with struct_size, which their INIT macro sets; for those in arrays the options say it. Later
 *              versions add members at the end: what the program's header lacks has its default; what the program sets
 *              and the library does not know is INVALID; results that the library does not know are 0.
 *
 * Beside this header: plan.h (what can be asked without a group), callbacks.h (the caller's own collectives and device)
 * and transport.h, for writers of transports. Nothing else is part of the interface. Version 0: names may still change.
 */
#ifndef LAYERSHARD_LAYERSHARD_H
#define LAYERSHARD_LAYERSHARD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The one place where the version is written. */
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

/** Static texts: "LSHARD_ERR_BUSY" ("LSHARD_UNKNOWN" for any other number), what it means, what a caller can do. */
LSHARD_API const char *lshard_status_name(lshard_status status);
LSHARD_API const char *lshard_status_text(lshard_status status);
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
 * The caller's own memory for shards and windows, on all ranks or none (MISMATCH), where the transport can use it
 * (lshard_transport_info says so; NOT_SUPPORTED otherwise). One call per purpose and series. Given back when the series
 * is destroyed; a shard that others still read, by a later call that creates or destroys a series or the group, or with
 * a warning never. Striped layers are then copied whole.
 *
 * On a GPU windows may be any memory of the rank's device; a shard must be, or lie in, what cudaMalloc gave, which
 * other processes can open (NOT_SUPPORTED otherwise; docs/c.md says what that means for PyTorch).
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

/**
 * Pages of 2 MiB (on most machines), which the system calls huge, for what the library keeps in host memory, shards,
 * windows and residents: processors read them faster than small ones (docs/c.md, "Large pages"). Memory without room
 * for one is not concerned, nor is the caller's (lshard_memory_source).
 */
typedef enum lshard_large_pages {
	LSHARD_LARGE_PAGES_AUTO = 0, /* where they are to be had, unless LAYERSHARD_LARGE_PAGES says otherwise */
	LSHARD_LARGE_PAGES_NEVER = 1,
	LSHARD_LARGE_PAGES_REQUIRE = 2 /* a series that cannot have them is NO_MEMORY */
} lshard_large_pages;

/**
 * On which NUMA nodes a series' shards lie in host memory, where the machine has several (docs/c.md, "NUMA nodes").
 * These are wishes: where a node has no memory left another's is taken, and the log says so.
 */
typedef enum lshard_numa {
	LSHARD_NUMA_AUTO = 0,       /* NONE, unless LAYERSHARD_NUMA says otherwise */
	LSHARD_NUMA_NONE = 1,       /* as the system does it: a page is on the node that first writes to it */
	LSHARD_NUMA_INTERLEAVE = 2, /* page by page on all nodes in turn */
	LSHARD_NUMA_SOURCE = 3,     /* on the node of the rank whose shard it is */
	LSHARD_NUMA_COPY = 4 /* there, and once more on each other node that ranks are on: they read the near one */
} lshard_numa;

/**
 * May a rank that has ended come back under its number while the others go on? They find it by the job's name, so there
 * has to be one, and no bootstrap. Each rank keeps a thread and, for each series, a descriptor of each rank's shard.
 */
typedef enum lshard_rejoin {
	LSHARD_REJOIN_AUTO = 0, /* NEVER, unless LAYERSHARD_REJOIN says otherwise */
	LSHARD_REJOIN_NEVER = 1,
	LSHARD_REJOIN_ALLOW = 2
} lshard_rejoin;

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
	const struct lshard_callbacks *callbacks; /* for the transports "callback" and "fabric"; NULL: none */
	lshard_large_pages large_pages;           /* the same on all ranks */
	lshard_numa numa;                         /* the same on all ranks; "shm" can do it */
	lshard_rejoin rejoin;                     /* the same on all ranks; "shm" can do it, but not with numa COPY */
} lshard_group_options;

/* What formats the rest would give each member a line. */
/* clang-format off */
#define LSHARD_GROUP_OPTIONS_INIT \
	{sizeof(lshard_group_options), -1, -1, NULL, NULL, NULL, 0, LSHARD_MEMORY_HOST, 0, NULL, NULL, NULL, NULL, \
		LSHARD_LOG_INFO, NULL, 0, NULL, LSHARD_LARGE_PAGES_AUTO, LSHARD_NUMA_AUTO, LSHARD_REJOIN_AUTO}
/* clang-format on */

/**
 * Join the group: agree on a transport with the other ranks and connect to them.
 *
 * Ranks find each other through options->bootstrap if it is given, else by the job's name on this host (docs/c.md, "How
 * ranks find each other"), else alone (size 1). Threads of one process are ranks like others: each creates a group of
 * its own. Ranks that a program forks create their groups after the fork.
 * Scope: collective.  Blocks: at most timeout_ms each time the ranks agree, or as long as the bootstrap does.
 * State: on failure nothing is left behind on this rank.
 *
 * With options->rejoin, where other ranks of the job live and this one has ended or left: come back to them. Then it is
 * a local call, no pass of the others waits for it, and their next collective call counts this rank. It waits, at most
 * timeout_ms, while one of them is in a collective call or has a series that is created and not committed, or being
 * updated, and while another process has this rank's number (TIMEOUT names who).
 * @return OK; INVALID for options that make no sense; MISMATCH when ranks disagree on size, transport, large
 *         pages or numa; TIMEOUT;
 *         NOT_SUPPORTED when the transport cannot connect these ranks, cannot do what numa says, or a rank cannot have
 *         the large pages that are required, with the reason; TRANSPORT, also when the
 *         bootstrap fails; PEER_FAILED; NO_MEMORY; SYSTEM.
 */
LSHARD_API lshard_status lshard_group_create(const lshard_group_options *options, lshard_group **group);

/**
 * Write out what this rank's transport writes to files: the trace so far, with "trace=FILE".
 * @return OK, also where nothing is written; SYSTEM: something of it is lost, now or earlier, and the text says why. No
 *         pass stops for that.
 */
LSHARD_API lshard_status lshard_group_flush(lshard_group *group);

/**
 * Leave the group. NULL is allowed.
 * @return OK; BUSY while the group still has series; SYSTEM: the group is gone, but something that lshard_group_flush
 *         would have told of is lost; the text goes to the log.
 */
LSHARD_API lshard_status lshard_group_destroy(lshard_group *group);

/**
 * Make every blocked call of this rank return ABORTED, now and from now on. Only destroy is left after it. Other ranks
 * see this rank as gone in their next collective call.  Threads: any.
 */
LSHARD_API void lshard_group_abort(lshard_group *group);

LSHARD_API int32_t lshard_group_rank(const lshard_group *group);
LSHARD_API int32_t lshard_group_size(const lshard_group *group);
/** The transport in use and why it was chosen: "shm (auto: all ranks on one host)". Lives as long as the group. */
LSHARD_API const char *lshard_group_transport(const lshard_group *group);
/** 1 where lshard_group_create came back to ranks that live. Threads: any. */
LSHARD_API int lshard_group_returned(const lshard_group *group);
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
 * With poison, windows hold the pattern of lshard_poison_pattern while no view of them lives: a program that reads a
 * layer before wait, or after its view has ended, sees that, and never by luck the right bytes. Views are the same.
 * Layers that are read in place (stored here, resident, on "shm", of ranks on the same device) have no windows and no
 * poison. It costs as many buffers as there are windows and one more, and time: docs/c.md, "Poison".
 */
typedef enum lshard_poison {
	LSHARD_POISON_OFF = 0,   /* unless LAYERSHARD_POISON says more: "ready" or "1" */
	LSHARD_POISON_READY = 1, /* off; lshard_series_poison switches it on and off */
	LSHARD_POISON_ON = 2     /* from creation on; lshard_series_poison switches it off and on */
} lshard_poison;

/** What a tensor is filled with, over and over from its first byte; copied. NULL and 0: bytes of 0xff (NaN). */
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
	/* Memory to spend on resident layers: 0 none, UINT64_MAX all. Each costs what a window does; lshard_plan tells
	 * how many a sum buys, and which layers have a distance below k without them. */
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
 * Scope: collective; descriptions are compared field by field.  Blocks: at most timeout_ms each time the ranks agree,
 *        and a second for each 256 MiB of the largest shard while memory is made in large pages or on
 *        NUMA nodes.
 * State: on failure nothing is left behind on this rank.
 *
 * In a rank that came back (lshard_group_returned), a series of that name which the others have and this rank has not
 * opened yet is opened as they have it. Then it is a local call, and so is lshard_series_commit, which calls no
 * post_process: lshard_series_is_filled says so.
 * @return OK; INVALID; MISMATCH, also naming the first difference of the descriptions; NO_MEMORY; NOT_SUPPORTED;
 *         TIMEOUT; PEER_FAILED; OUT_OF_STEP; TRANSPORT; ABORTED; SYSTEM. The text is lshard_group_error(group).
 */
LSHARD_API lshard_status lshard_series_create(lshard_group *group, const lshard_series_options *options,
					      lshard_series **series);

/**
 * Free the series. NULL is allowed. The shard's memory goes when the last rank that reads it lets go.
 * Scope: local.  Blocks: for this rank's own transfers and streams only, at most timeout_ms.
 * @return OK; TIMEOUT when work on a stream may still read the windows, or, with "callback", naming the ranks that have
 *         not asked for what this one has: nothing was freed, call again, or abort the group first.
 */
LSHARD_API lshard_status lshard_series_destroy(lshard_series *series);

/** 1 where the weights are there already, as this rank came back: it needs to read none. */
LSHARD_API int lshard_series_is_filled(const lshard_series *series);

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
 * @return OK; RANGE; STATE after commit, and where the series is filled; NOT_SUPPORTED for STRIPED or when this rank is
 *         not the source.
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
 * With STRIPED, this rank's own slice of a tensor with a stripe dimension, usable as a tensor-parallel shard: aligned
 * to 256 bytes, fixed for the life of the series. NULL and an empty range where no row or column is left for this rank.
 * @return OK; RANGE; NOT_SUPPORTED for WHOLE or a tensor striped by BYTES.
 */
LSHARD_API lshard_status lshard_series_stripe(lshard_series *series, uint32_t layer, uint32_t tensor, void **address,
					      lshard_range *range);

/**
 * Writes the processed bytes of one layer to @p tensors, tensor_count pointers in the order of the options. Called once
 * per layer, on its source only, one layer at a time. On a device it returns when its bytes are there, not when the
 * work is enqueued. Returns 0, or anything else to make commit fail.
 */
typedef int (*lshard_post_process)(void *user, uint32_t layer, void *const *tensors);

/**
 * Fill the series: post_process runs once per layer on its source, stripes and residents are fetched, every window gets
 * its first layer. With WHOLE post_process may be NULL: the bytes are then in lshard_series_storage already.
 * Scope: collective.  Blocks: post_process, and at most timeout_ms each time the ranks agree: choose it above the
 *        longest post_process of any rank. With LSHARD_NUMA_COPY a second for each 256 MiB of all shards longer.
 * State: on failure the series stays uncommitted; commit may be called again by all ranks, or the series destroyed.
 * @return OK; CALLBACK (naming the rank, on every rank); INVALID when STRIPED has no post_process; MISMATCH;
 *         OUT_OF_STEP; TIMEOUT; PEER_FAILED; TRANSPORT; ABORTED; STATE; NO_MEMORY; as the transport's reads.
 */
LSHARD_API lshard_status lshard_series_commit(lshard_series *series, lshard_post_process post_process, void *user);

/* ---- The pass -------------------------------------------------------------------------------------------------- */

/**
 * Say that the program has arrived at @p layer, and start fetching what it will need next.
 *
 * Every window now wants its first layer at or after @p layer, circularly; what is there or on its way is left alone.
 * Calling it twice, skipping layers and jumping back are allowed and cost at most transfers.
 * Scope:   local on one-sided transports; on collective ones every rank makes the same calls in the same order.
 * Blocks:  never on a peer, but with "callback" where at least 32 reaches went by without a wait while a rank is late:
 *          then for room in its queue, a little longer than timeout_ms at most. A transfer that found none is not made:
 *          all ranks are OUT_OF_STEP from its layer on, until lshard_series_rewind.
 * Capture: allowed (see lshard_series_prepare).
 * State:   needs a committed series. Ends the view of every other layer: work enqueued on any stream after this call
 *          must not use them.
 * @param stream  stream on which the work on the previous layers was enqueued; NULL for host memory.
 * @return OK; RANGE; STATE before commit and during an update; ABORTED; NOT_SUPPORTED for more than 8 streams;
 *         TRANSPORT when poison could not be put over a layer of which the view ended: the program has arrived all the
 *         same, and the next call tries again. A transfer that cannot be started is reported by the wait for its layer.
 * Cost:    O(k), no allocation; a sequential step starts at most two transfers, the first of a pass up to one for each
 *          window in a capture and after lshard_series_prepare.
 */
LSHARD_API lshard_status lshard_reach(lshard_series *series, uint32_t layer, void *stream);

/**
 * Make @p layer usable, and start a view of it: host memory blocks until it is there; a device orders @p stream after
 * its arrival. A layer that is neither there nor coming is fetched on demand (one-sided; counted as a miss).
 * Blocks:  at most timeout_ms; streams: only with "callback", until all ranks have asked for the layer.
 * Capture: allowed (not with "callback").
 * @return OK; RANGE; BUSY naming both layers when the window this layer needs has a live view; TIMEOUT: wait again;
 *         PEER_FAILED, TRANSPORT: the fetch failed, and the next reach or wait tries again; OUT_OF_STEP on collective
 *         transports, after a failed call for layers stored here, too (see lshard_series_rewind); NOT_SUPPORTED as
 *         reach; STATE; ABORTED.
 */
LSHARD_API lshard_status lshard_wait(lshard_series *series, uint32_t layer, void *stream);

/**
 * End the view of @p layer before the next reach, so that its window can be filled again at once. Optional.
 * @return OK, also when there was no view; RANGE; NOT_SUPPORTED and TRANSPORT as reach; STATE; ABORTED.
 */
LSHARD_API lshard_status lshard_release(lshard_series *series, uint32_t layer, void *stream);

/**
 * Put the ring into start-of-pass state, as if a captured pass had just ended, and order @p stream after everything in
 * flight. Call it before a capture and before each replay, on the stream of the replay, and once more on another stream
 * if the program goes on there; further streams of a replay follow that one by the program's own events. Nothing to do
 * in steady use. Ends every view.
 *
 * In that state windows hold their first layers, but for those of which the last layer comes so late in a pass that
 * the next pass has more time for the refill: these hold nothing, and a captured pass begins with fetches into them.
 * Between this call and the replay no other call on the series is made.
 * Blocks:  host memory: at most timeout_ms.  Capture: not allowed (STATE).
 * @return OK; STATE; TIMEOUT and, on collective transports, PEER_FAILED, OUT_OF_STEP as wait; NOT_SUPPORTED as reach;
 *         the status of a window that cannot be filled; ABORTED.
 */
LSHARD_API lshard_status lshard_series_prepare(lshard_series *series, void *stream);

/**
 * End every view, that of the present layer too, and order what follows on @p stream after everything in flight. Last
 * call of a captured region, whose windows must then hold what they held at its beginning, but for those that
 * lshard_series_prepare leaves empty: they are not filled here either. Until then all calls of the pass are captured:
 * after one on another stream, or a prepare, those of the region are refused (STATE).
 * Blocks: host memory: at most timeout_ms.
 * @return OK, also where a transfer could not be started, which the wait for its layer tells; NOT_PERIODIC naming the
 *         layer; STATE; ABORTED; as wait otherwise.
 */
LSHARD_API lshard_status lshard_series_join(lshard_series *series, void *stream);

/**
 * Bring all ranks back to the start of a pass, whatever each of them did before: the cure for OUT_OF_STEP.
 *
 * On a collective transport these leave every window empty when they fail on this rank: rewind; prepare and join (not
 * in a capture) and a switch of poison, but for TIMEOUT; verify that did not come to its end; update_begin after the
 * ranks have agreed once. Then, until rewind, verify or an update has succeeded, reach starts no transfer, and wait,
 * prepare, join and a switch of poison are OUT_OF_STEP, naming that call. On one-sided transports nothing is lost.
 * Scope:  collective on collective transports, local on one-sided ones.  Ends every view.
 * Blocks: on collective ones at most timeout_ms for what is on its way, and as long when the ranks agree.
 * State:  after TIMEOUT, MISMATCH or OUT_OF_STEP call it again on all ranks until it is OK: some may have been in
 *         another call still, which has failed there now.
 * @return OK; TIMEOUT; PEER_FAILED; MISMATCH; OUT_OF_STEP; TRANSPORT; STATE; ABORTED.
 */
LSHARD_API lshard_status lshard_series_rewind(lshard_series *series);

/**
 * Switch poison on (1) or off (0) between passes, in a series that was created with memory for it: to run a program's
 * own pass as it is and poisoned, and compare. Addresses and layers in windows stay. Ends every view and orders what
 * follows on @p stream after it, unless it is so already or the series has no windows. A graph captured before the
 * switch goes on as it was captured, and reads poison: capture again.
 * Scope:  local; no other rank need do the same. After a failure on a collective transport other than TIMEOUT, STATE
 *         and NOT_SUPPORTED all ranks must call lshard_series_rewind.
 * Blocks: as lshard_series_prepare, for what is on its way.  Capture: not allowed (STATE).
 * State:  after TIMEOUT the poison is as it was; after another failure of a transfer or a copy it is as it was or
 *         switched, a window of which the copy failed is empty, and it may be called again.
 * @return OK; STATE, also where the series was created without memory for it; TIMEOUT and what else a wait for a
 *         transfer returns; NOT_SUPPORTED as reach; TRANSPORT when a copy failed; OUT_OF_STEP; ABORTED.
 */
LSHARD_API lshard_status lshard_series_poison(lshard_series *series, int on, void *stream);

/* ---- New weights ----------------------------------------------------------------------------------------------- */

/**
 * Begin an update. Ranks that have not called it yet go on reading the old bytes. On return every living rank has
 * called it and has read for the last time: sources may write (lshard_series_storage, or the callback of update_end).
 * Scope:  collective over the living ranks.  Ends every view.
 * Blocks: at most timeout_ms each time the ranks agree, which is twice, and as long between, for its own transfers
 *         and streams.
 * State:  on failure no byte has changed and the series is in use as before; but see lshard_series_rewind.
 * @return OK; TIMEOUT; PEER_FAILED, also naming the layers that the lost ranks are sources of; MISMATCH; OUT_OF_STEP;
 *         TRANSPORT; STATE; ABORTED.
 */
LSHARD_API lshard_status lshard_series_update_begin(lshard_series *series);

/**
 * End an update: as commit, for the layers this rank is source of; generation + 1. The next pass reads the new bytes.
 *
 * With WHOLE an update may write some layers only, or some tensors of a layer: the pointers lead to where the old bytes
 * are, and what is not written keeps them. With STRIPED post_process writes every layer whole: nothing is there before.
 * Scope: collective over the living ranks; with LSHARD_NUMA_COPY, where ranks are on several nodes, over all.
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
	uint64_t link_busy_ns;    /* time the link carried bytes, where the transport knows it */
	uint64_t numa_copy_bytes; /* what was built: copies of others' shards, kept here for the ranks of this node */
} lshard_stats;
#define LSHARD_STATS_INIT {sizeof(lshard_stats), 0, 0, 0, 0, 0, 0, 0, 0, {0}, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

/** Threads: any.  @return OK; INVALID; STATE in a child by fork; both without a text. */
LSHARD_API lshard_status lshard_series_stats(const lshard_series *series, lshard_stats *stats);

/** Text of the last failed call on the series; "" if none. Lives until the next failing call. */
LSHARD_API const char *lshard_series_error(const lshard_series *series);

/**
 * Check every layer as this rank sees it against hashes made by the ranks that store it.
 * Scope:  collective.  Ends every view.  Capture: not allowed.
 * Blocks: reads the whole series; at most timeout_ms each time the ranks agree, which is once for each layer.
 * State:  what this rank finds (CORRUPT, a layer that cannot be had) is told at the end and changes nothing. Where it
 *         breaks off (the ranks did not agree, or one waited for a layer until its deadline): see lshard_series_rewind.
 * Cost:   device memory is seen through a buffer of at most 16 MiB, allocated for the call.
 * @param hash  of the whole series as this rank sees it, the same on all ranks and for all placements; may be NULL.
 * @return OK; CORRUPT naming layer and rank; NO_MEMORY; NOT_SUPPORTED where the transport cannot copy to the host;
 *         MISMATCH, OUT_OF_STEP, also for another layer; TIMEOUT; PEER_FAILED; as wait otherwise.
 */
LSHARD_API lshard_status lshard_series_verify(lshard_series *series, uint64_t *hash);

#ifdef __cplusplus
}
#endif
#endif
