/* SPDX-License-Identifier: Apache-2.0
 *
 * What a program can ask before there is a group, or without one: what a series would cost and gain (lshard_plan),
 * which transports there are and which environment variables are read, which rank a launcher has made this process.
 *
 * None of these calls waits, or keeps anything; all may be made by any thread, at the same time. What layershard.h says
 * of every function holds for them, too.
 */
#ifndef LAYERSHARD_PLAN_H
#define LAYERSHARD_PLAN_H

#include <layershard/layershard.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Planning: pure arithmetic --------------------------------------------------------------------------------- */

typedef struct lshard_plan_input {
	size_t struct_size;
	int32_t rank; /* 0..size-1 */
	int32_t size;
	int32_t collective;        /* 1: as on a collective transport */
	int32_t direct;            /* sum of 1: ranks share memory, nothing moves; 2: own stripes are part of windows */
	uint64_t granule_bytes;    /* what the transport maps memory by, where direct is not 0; 0: 1 */
	uint64_t compute_ns;       /* per layer; 0: no exposure is predicted */
	uint64_t link_bytes_per_s; /* into one rank; 0: no exposure is predicted */
	uint64_t large_page_bytes; /* of host memory, where direct is 1: stripes of many are cut at them; 0: none are */
} lshard_plan_input;

#define LSHARD_PLAN_INPUT_INIT {sizeof(lshard_plan_input), 0, 1, 0, 0, 0, 0, 0, 0}

typedef struct lshard_plan_result {
	size_t struct_size;
	uint64_t layer_bytes;
	uint64_t replicated_bytes; /* the whole series */
	uint64_t shard_bytes;
	uint64_t window_bytes;
	uint64_t resident_bytes;
	uint32_t windows;
	uint32_t residents;
	uint32_t fetched_layers;
	uint32_t shortest_distance; /* layers between the start of a fetch and its use; 0: fully exposed */
	uint32_t below_k_count;     /* layers whose prefetch distance is below k */
	uint32_t below_k[LSHARD_BELOW_K_NAMED];
	uint64_t pass_ns;          /* a steady pass: compute plus what could not be hidden */
	uint64_t exposed_ns;       /* pass_ns - layers * compute_ns */
	uint64_t transfer_ns;      /* the link's own time per pass */
	uint64_t captured_pass_ns; /* pass_ns of a captured one in steady replays: nothing is on its way between them */
} lshard_plan_result;

#define LSHARD_PLAN_RESULT_INIT {sizeof(lshard_plan_result), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, {0}, 0, 0, 0, 0}

/**
 * What a series would cost and gain on one rank, by the same slot map and rule as at run time. exposed_ns is found by
 * running the ring over steady passes in virtual time: one link in order, which carries what a layer needs from other
 * ranks. Poison counts as the options say, whatever LAYERSHARD_POISON says. Allocates and frees host memory (malloc).
 * @return OK; INVALID; NO_MEMORY.
 */
LSHARD_API lshard_status lshard_plan(const lshard_series_options *options, const lshard_plan_input *input,
				     lshard_plan_result *result);

/* ---- About this build ------------------------------------------------------------------------------------------ */

typedef struct lshard_transport_information {
	size_t struct_size;
	const char *name;
	const char *summary;
	int available;        /* 1: can be used on this machine */
	char reason[160];     /* why not; "" if available */
	int collective;       /* 1: needs all ranks in step */
	int caller_memory;    /* 1: takes the caller's memory for shards and windows */
	lshard_memory memory; /* where its layers lie */
} lshard_transport_information;

#define LSHARD_TRANSPORT_INFORMATION_INIT                                                                              \
	{sizeof(lshard_transport_information), NULL, NULL, 0, "", 0, 0, LSHARD_MEMORY_HOST}

/** Transport number @p index, in the order in which "auto" prefers them.  @return OK; RANGE past the last. */
LSHARD_API lshard_status lshard_transport_info(uint32_t index, lshard_transport_information *information);

typedef struct lshard_variable {
	size_t struct_size;
	const char *name;
	const char *value; /* its default where unset; as set otherwise; "" if none */
	const char *default_value;
	const char *help;
} lshard_variable;

#define LSHARD_VARIABLE_INIT {sizeof(lshard_variable), NULL, NULL, NULL, NULL}

/** Environment variable number @p index that the library reads.  @return OK; RANGE past the last. */
LSHARD_API lshard_status lshard_variable_info(uint32_t index, lshard_variable *variable);

typedef struct lshard_node {
	size_t struct_size;
	int32_t number; /* the system's */
	int usable; /* 1: it has processors and memory, and this process may have pages there: lshard_numa counts it */
	int here;   /* 1: this thread runs on it just now */
	uint64_t memory_bytes;
	uint64_t free_bytes;
	char processors[128]; /* "0-15,64-79"; "" if none */
} lshard_node;

#define LSHARD_NODE_INIT {sizeof(lshard_node), 0, 0, 0, 0, 0, ""}

/** NUMA node number @p index of this machine, by rising number.  @return OK; RANGE past the last. */
LSHARD_API lshard_status lshard_node_info(uint32_t index, lshard_node *node);

/**
 * Rank, size and the source they were found in ("torchrun"), as lshard_group_create would find them.
 *
 * job is the name that the source's launcher gives what it has started: the same for all of its ranks, another for each
 * launch that may be alive beside it and for each restart. Made of TORCHELASTIC_RUN_ID, MASTER_ADDR, MASTER_PORT and
 * TORCHELASTIC_RESTART_COUNT (torchrun), PMIX_NAMESPACE (Open MPI, PMIx), or SLURM_JOB_ID, SLURM_STEP_ID and
 * SLURM_RESTART_COUNT (Slurm). lshard_group_create takes it where there is no other name, if the group's rank and size
 * are those found here: not for a part of what was started.
 */
typedef struct lshard_discovered {
	size_t struct_size;
	int32_t rank;
	int32_t size;
	int32_t local_rank; /* -1: the source does not say */
	const char *source;
	char job[256]; /* "": the source gives none */
} lshard_discovered;

#define LSHARD_DISCOVERED_INIT {sizeof(lshard_discovered), 0, 0, 0, NULL, ""}

/**
 * @return OK; STATE when no source is set; MISMATCH when a source is incomplete or inconsistent in itself, with the
 *         text in @p error.
 */
LSHARD_API lshard_status lshard_discover(lshard_discovered *found, char *error, size_t error_bytes);

#ifdef __cplusplus
}
#endif
#endif
