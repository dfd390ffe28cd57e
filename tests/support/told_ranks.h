/* SPDX-License-Identifier: Apache-2.0
 *
 * told_ranks.h - ranks that do what a test tells them, one call at a time, each in a process of its own: they can be
 * killed, stopped and started again at any point. Knows the public calls only.
 */
#ifndef TESTS_TOLD_RANKS_H
#define TESTS_TOLD_RANKS_H

#include <layershard/layershard.h>

#include <stdbool.h>
#include <sys/types.h>

enum order {
	TOLD_GROUP,   /* lshard_group_create */
	TOLD_SERIES,  /* lshard_series_create; number: of the series, 0.. */
	TOLD_COMMIT,  /* with a post_process that writes generation 0; number as above, as in all that follow */
	TOLD_PASS,    /* a pass; of every layer each byte has to be of the generation in `value` */
	TOLD_ON_PASS, /* passes without end, until the next order comes: the reply is to both. `value` as above */
	TOLD_PASSES,  /* `value` passes over what generation 0 has written */
	TOLD_BEGIN,   /* lshard_series_update_begin */
	TOLD_END,     /* lshard_series_update_end; `value`: the generation that is written */
	TOLD_VERIFY,
	TOLD_REWIND,
	TOLD_DESTROY, /* lshard_series_destroy */
	TOLD_LEAVE,   /* lshard_group_destroy */
	TOLD_ABORT,
	TOLD_FAULT, /* number: an enum told_fault */
	TOLD_COUNT, /* descriptors, threads, and mappings of what ranks share */
	TOLD_END_PROCESS
};

/* What happens to a rank's next call, or from now on. */
enum told_fault {
	TOLD_NO_FAULT,        /* nothing any more: limits are lifted */
	TOLD_CALLBACK_FAILS,  /* post_process of the next call */
	TOLD_CALLBACK_BLOCKS, /* the same, for `value` milliseconds */
	TOLD_NO_MEMORY,       /* the allocation of number `value` from now on gives none, and all after it */
	TOLD_FEW_DESCRIPTORS, /* `value` more can be opened */
	TOLD_SMALL_FILES,     /* RLIMIT_FSIZE of `value` bytes */
	TOLD_SMALL_SPACE,     /* RLIMIT_AS: `value` bytes more than now */
	TOLD_FORKS,           /* before the next call a child is forked, which calls, too */
	TOLD_CLOCK_JUMPS      /* the time of day is another, by `value` seconds */
};

struct told_options {
	const char *transport;
	lshard_placement placement;
	uint32_t layers;
	uint64_t tensor_bytes;
	uint32_t timeout_ms;
	uint32_t prefetch;
	lshard_rejoin rejoin;
	int on_device; /* device memory that the processor can read, as the stub of a driver has; a device each */
};

struct told_reply {
	lshard_status status; /* of the call */
	char text[512];
	int returned;          /* GROUP */
	int filled;            /* SERIES */
	lshard_status storage; /* SERIES: of lshard_series_storage of a layer of this rank's */
	int called;            /* COMMIT, END: layers post-processed */
	uint64_t passes;       /* ON_PASS: so far */
	uint64_t hash;         /* VERIFY */
	uint64_t longest_ns;
	uint64_t generation;
	int descriptors;
	int threads;
	int mappings;
	int child; /* FORKS: it was refused whatever it called */
};

struct told_rank {
	pid_t pid; /* 0: none */
	int rank;
	int to;
	int from;
};

/* Pairs of sockets between ranks, by which callbacks carry what "callback" moves. */
struct told_circle {
	int ends[3][3];
};

bool told_circle_open(struct told_circle *circle);
void told_circle_close(struct told_circle *circle);

/* Start rank @p rank of @p size of job @p job; it has done nothing yet. */
void told_start(struct told_rank *told, int rank, int size, const char *job, const struct told_options *options);
/* The same of 3 ranks with callbacks over @p circle, which the parent keeps; NULL: without. */
void told_start_in(struct told_rank *told, int rank, int size, const char *job, const struct told_options *options,
		   const struct told_circle *circle);
void told_kill(struct told_rank *told);
/* False: it has died. */
bool told_tell(const struct told_rank *told, enum order order, uint32_t number, uint64_t value);
bool told_hear(const struct told_rank *told, struct told_reply *reply);
/* Both. The status of one that has died is LSHARD_ERR_PEER_FAILED, its text "died". */
struct told_reply told_do(const struct told_rank *told, enum order order, uint32_t number, uint64_t value);
/* The same by several at once, @p n of them; of the last one the reply, of the first that fails its own. */
struct told_reply told_all(const struct told_rank *const *told, int n, enum order order, uint32_t number,
			   uint64_t value);

#endif
