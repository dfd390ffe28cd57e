/* SPDX-License-Identifier: Apache-2.0
 *
 * shm.h - what the files of the shm transport share: shm.c (table, group), shm_store.c (memory), shm_near.c
 * (copies on other nodes), shm_copy.c (the copying thread), shm_rejoin.c and shm_renew.c (ranks that come back).
 * mesh.h, control.h and agreement.h connect the ranks.
 */
#ifndef LAYERSHARD_SHM_H
#define LAYERSHARD_SHM_H

#include "mesh.h"
#include "agreement.h"
#include "living.h"
#include "shared_memory.h"

#include <pthread.h>

struct shm_store;

/* The last fetch into one buffer. `pending` is the only member read without the copier's lock while a copy may run. */
struct shm_request {
	struct shm_store *store;
	struct shm_request *next;
	struct shm_request *previous;
	atomic_int pending; /* fetched and not there yet */
	int queued;
	int untold; /* no wait has reported its times; the store's thread only */
	uint32_t buffer;
	uint32_t position;
	uint64_t generation; /* counts the fetches into this buffer */
	uint64_t started_ns;
	uint64_t finished_ns;
};

/* One thread per rank copies for all stores of its transport, in the order of the fetches. */
struct shm_copier {
	pthread_mutex_t lock;
	pthread_cond_t work;
	pthread_cond_t done; /* CLOCK_MONOTONIC */
	pthread_t thread;
	int made;    /* the three above but thread */
	int started; /* thread */
	int stop;
	int aborted;
	struct shm_request *first;
	struct shm_request *last;
	const struct shm_store *running; /* whose copy runs now */
};

/* What this rank was told of a series, and was given: to be opened. */
struct shm_recalled {
	char *bytes; /* the answer; NULL: none */
	int *fds;    /* [size] */
};

/* Where ranks can come back. */
struct shm_rejoin {
	struct door door;
	pthread_mutex_t lock;    /* of stores, and of what they tell: the door's thread reads them */
	int made;                /* the lock */
	struct shm_store *first; /* those that others may have, in the order in which they were opened */
	struct shm_recalled recalled;
	uint64_t note;   /* of those to whom this rank came back: series from this number on were made with it */
	uint64_t *taken; /* [n_taken] numbers below it that it has opened, whether it still has them or not */
	uint32_t n_taken;
};

struct shm {
	lshard_transport base;
	lshard_transport_ops ops; /* without CAP_DIRECT in copying mode; granule is this machine's page */
	struct mesh mesh;
	struct control control;
	struct shm_copier copier;
	struct agreement agreement; /* of the ranks while a series opens */
	struct numa_wish wish;      /* for this rank's shards */
	uint32_t *nodes;            /* [size] of all ranks, where each of several is to have its own copy; else NULL */
	struct shm_rejoin rejoin;
};

/* Where ranks of a node read another's shard. */
struct shm_near {
	int32_t maker; /* in what that rank has copied, at `offset`; -1: where it is */
	uint64_t offset;
};

struct shm_store {
	lshard_store base;
	struct shared_memory *shards; /* [size]; this rank's own is writable, the others' are not */
	struct shm_near *near;        /* [size] where this rank reads them; NULL: each where it is */
	struct shared_memory *copies; /* [size] by those who made them; this rank's own can be made writable */
	const void **bases;           /* [size] the addresses of shards or their copies, as host_copy wants them */
	struct shared_memory buffers;
	struct shared_memory composed; /* layers put together from several shards */
	void **layers;                 /* direct: [layers] */
	struct shm_request *requests;  /* not direct: [buffers] */
	size_t n_queued;               /* with the copier's lock */
	/* Where ranks can come back, with the lock of shm_rejoin: */
	struct shm_store *next;
	int *fds; /* [size] of the shards, for those who come; NULL: nobody may have them */
	bool filled;
	bool borrowed; /* this rank came back: its own shard is read-only here */
	uint64_t generation;
};

/* Every layer comes to the beginning of its buffer. */
static inline void *shm_window(const struct shm_store *store, uint32_t buffer)
{
	return (char *)store->buffers.address + buffer * store->base.plan->layer_bytes;
}

/* ---- shm_store.c ---- */

lshard_status shm_store_open(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **store);
void shm_store_close(lshard_store *store);
void *shm_shard(lshard_store *store);
void *shm_buffer(lshard_store *store, uint32_t buffer, uint32_t position);
void *shm_peer(lshard_store *store, uint32_t position);
lshard_status shm_read(lshard_store *store, uint32_t position, void *destination);

/* In large pages that are reserved, of @p page bytes, of which a part cannot be mapped. */
bool shm_can_be_reserved(const lshard_store_plan *plan, uint64_t page);
/* Put layers together again from store->fds, at the addresses where they are. */
lshard_status shm_compose_again(struct shm_store *store);

/* ---- shm_rejoin.c ---- */

/* Take this rank's door, unless nobody can come back. */
lshard_status shm_rejoin_open(struct shm *shm, const lshard_context *context, uint64_t deadline_ns);
/* Let those who come back in, from now on. */
lshard_status shm_rejoin_start(struct shm *shm);
/* Connect this rank, which comes back, to all that live, and be counted by them. */
lshard_status shm_rejoin_return(struct shm *shm, const lshard_context *context, uint64_t deadline_ns);
void shm_rejoin_close(struct shm *shm, const lshard_context *context);
/* Others may have the store, whose descriptors become its own; false where nobody can come back. */
bool shm_rejoin_offer(struct shm_store *store, int *fds);
/* Nobody may any more; closes what it kept. */
void shm_rejoin_withdraw(struct shm_store *store);
/* The store of that plan which others may have; NULL: none. */
struct shm_store *shm_rejoin_find(struct shm *shm, const lshard_store_plan *plan);

void shm_busy(lshard_transport *transport, int change, uint64_t note);
uint64_t shm_note(const lshard_transport *transport);
void shm_filled(lshard_transport *transport, const lshard_store_plan *plan, uint64_t generation);
lshard_status shm_recall(lshard_transport *transport, const char *name, lshard_recalled *recalled);

/* ---- shm_renew.c ---- */

lshard_status shm_renew(lshard_transport *transport, const lshard_store_plan *plan);

/* ---- shm_near.c ---- */

/* For the ranks of @p node: near[size], and bytes_of[size], what each rank copies for them. */
void shm_near_lay_out(const struct shm *shm, const lshard_store_plan *plan, uint32_t node, struct shm_near *near,
		      uint64_t *bytes_of);
/* So much that no rank copies more. */
uint64_t shm_near_most(const struct shm *shm, const lshard_store_plan *plan);
/* What this rank copies, of which others' layers are read: not to be written but by a refresh. */
lshard_status shm_near_protect(const struct shm_store *store, int protection, lshard_error *error);
lshard_status shm_refresh(lshard_store *store, uint64_t *bytes);

/* ---- shm_copy.c ---- */

lshard_status shm_copier_make(struct shm_copier *copier, lshard_error *error);
/* Start the thread unless it runs. */
lshard_status shm_copier_start(struct shm_copier *copier, lshard_error *error);
void shm_copier_abort(struct shm_copier *copier);
void shm_copier_close(struct shm_copier *copier);
/* Drop what waits, and wait for the copy that runs, of one store. */
void shm_copier_forget(struct shm_copier *copier, struct shm_store *store);

lshard_status shm_fetch(lshard_store *store, uint32_t position, uint32_t buffer, void *stream, uint64_t sequence);
lshard_status shm_wait(lshard_store *store, uint32_t buffer, void *stream, lshard_arrival *arrival);
lshard_status shm_join(lshard_store *store, void *stream);
lshard_status shm_drain(lshard_store *store);

#endif
