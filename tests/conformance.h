/* SPDX-License-Identifier: Apache-2.0
 *
 * conformance.h - what the parts of the conformance suite share: a transport under test, series whose every byte can be
 * foretold, and checks of what a rank sees. Public interface only.
 */
#ifndef TESTS_CONFORMANCE_H
#define TESTS_CONFORMANCE_H

#include "threads.h"

#define MAX_RANKS   7
#define MAX_TENSORS 3
#define MAX_LAYERS  64

/* What is tested, and how ranks are made. */
struct subject {
	const char *spec;
	const char *kind; /* "threads" or "forks" */
	bool collective;
	bool caller_memory;
	bool direct; /* layers are read in place: no windows, no transfers */
};

extern struct subject subject;

/* One series and who uses it. */
struct setting {
	int32_t size;
	uint32_t prefetch;
	uint32_t layers;
	uint32_t first_layer;
	lshard_placement placement;
	uint32_t n_tensors;
	lshard_tensor tensors[MAX_TENSORS];
	uint64_t resident_bytes;
	uint32_t timeout_ms; /* 0: long */
	uint64_t seed;       /* of walks */
	int variant;
};

/* A rank's objects in a test. */
struct rank {
	const struct member *member;
	const struct setting *setting;
	lshard_group *group;
	lshard_series *series;
	uint64_t generation;        /* of the bytes that post_process writes */
	uint32_t calls[MAX_LAYERS]; /* of post_process, by position */
	void *addresses[MAX_LAYERS][MAX_TENSORS];
	int fail_at; /* layer at which post_process fails; -1: none */
};

/* @p n tensors, up to MAX_TENSORS, whose sizes are multiples of nothing. */
void setting_tensors(struct setting *setting, uint32_t n, lshard_stripe stripe);

/* Create the group, the series "s" and commit; false with a message when something is not OK. */
bool rank_open(struct rank *rank, const struct member *member, const struct setting *setting);
bool rank_group(struct rank *rank, const struct member *member, const struct setting *setting);
lshard_series_options rank_series_options(const struct setting *setting);
/* Where every tensor is to be found from now on; checks the alignment. */
bool rank_note_addresses(struct rank *rank);
/* Destroy what there is. */
bool rank_close(struct rank *rank);

/* The bytes of a tensor. */
void foretell(unsigned char *bytes, uint64_t n, uint64_t generation, uint32_t layer, uint32_t tensor);
/* A post_process callback whose user is a struct rank. */
int fill_layer(void *rank, uint32_t layer, void *const *tensors);

/* What lies in the windows is what its source wrote, at the address of the first day. */
bool layer_is_right(struct rank *rank, uint32_t position);
/* reach, wait, check. */
bool visit(struct rank *rank, uint32_t position);
bool one_pass(struct rank *rank);

uint64_t random_next(uint64_t *state);

/* A check that must be OK, with the rank's own text if it is not. */
#define OK_SERIES(rank, call) EXPECT((rank)->member, (call) == LSHARD_OK, "%s", lshard_series_error((rank)->series))

/* Memory that forked ranks share with the test. */
void *shared_new(size_t bytes);
void shared_free(void *memory, size_t bytes);

/* The parts. Each is a cmocka test. */
void walks_give_the_right_bytes(void **state);
void two_series_do_not_disturb_each_other(void **state);
void ranks_need_no_lockstep(void **state);
void out_of_step_is_found_and_cured(void **state);
void sources_may_write_in_place(void **state);
void stripes_are_shards(void **state);
void callers_memory_is_used_and_given_back(void **state);
void misuse_has_a_status_and_a_text(void **state);
void differing_options_are_named(void **state);
void a_failing_callback_is_seen_by_all(void **state);
void abort_ends_a_blocked_call(void **state);
void the_others_go_on_without_a_rank(void **state);

#endif
