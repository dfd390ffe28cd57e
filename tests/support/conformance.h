/* SPDX-License-Identifier: Apache-2.0
 *
 * conformance.h - what the parts of the conformance suite share: a transport under test, series whose every byte can be
 * foretold, and checks of what a rank sees. Public interface only; device memory is reached through the driver that the
 * library itself would load, which may be the stub.
 */
#ifndef TESTS_CONFORMANCE_H
#define TESTS_CONFORMANCE_H

#include "fake_device.h"

#include <layershard/transport.h>

#define MAX_RANKS   7
#define MAX_TENSORS 3
#define MAX_LAYERS  64

/* What is tested, and how ranks are made. */
struct subject {
	const char *spec;
	const lshard_transport_ops *custom; /* a transport of somebody else's, which is named in spec; NULL: none */
	const char *kind;                   /* "threads" or "forks" */
	bool collective;
	bool caller_memory;
	bool direct;    /* layers are read in place, on devices by ranks on the same one: no windows, no transfers */
	bool callbacks; /* the ranks meet by the caller's collectives: the transport itself cannot know who is gone */
	bool fake;      /* by the collectives of fake_device.h, in its memory */
	lshard_memory memory;
	uint32_t configurations; /* of walks */
	int32_t neighbours;      /* devices: the ranks below this one are on the first device */
	int64_t late;            /* the stub: seed of work that runs late, 0: at once */
	bool poison;             /* windows are poisoned outside of views */
};

extern struct subject subject;

/* Said by a test that is about what the subject is not meant to do: it is no test that was skipped. */
void does_not_apply(const char *test, const char *why);
/* At the end of all tests: how many have said so. */
void tell_how_many_do_not_apply(void);

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
	lshard_poison poison;
	uint64_t seed; /* of walks */
	int variant;
	const char *spec; /* NULL: the subject's */
};

struct device;

/* A rank's objects in a test. */
struct rank {
	const struct member *member;
	const struct setting *setting;
	lshard_group *group;
	lshard_series *series;
	uint64_t generation;        /* of the bytes that post_process writes */
	uint32_t calls[MAX_LAYERS]; /* of post_process, by position */
	void *addresses[MAX_LAYERS][MAX_TENSORS];
	int fail_at;           /* layer at which post_process fails; -1: none */
	struct device *device; /* NULL: host memory */
	struct seat *seat;     /* where the caller carries the layers; else NULL */
	struct fake *fake;     /* whose seat it is, where layers are in its memory; else NULL */
	void *stream;          /* what the rank computes on now; NULL: host memory */
};

/* @p n tensors, up to MAX_TENSORS, whose sizes are multiples of nothing. */
void setting_tensors(struct setting *setting, uint32_t n, lshard_stripe stripe);
/* Of seven layers of two tensors. */
struct setting plain_setting(const struct member *member);

/* Create the group, the series "s" and commit; false with a message when something is not OK. */
bool rank_open(struct rank *rank, const struct member *member, const struct setting *setting);
bool rank_group(struct rank *rank, const struct member *member, const struct setting *setting);
/* What comes before its group, and after: the device, the caller's collectives. They are set in @p options. */
bool rank_equip(struct rank *rank, lshard_group_options *options);
bool rank_strip(struct rank *rank);
/* The series "s" of rank->setting, committed, in the group there is. */
bool rank_series(struct rank *rank);
lshard_series_options rank_series_options(const struct setting *setting);
/* Where every tensor is to be found from now on; checks the alignment. */
bool rank_note_addresses(struct rank *rank);
/* Destroy what there is. */
bool rank_close(struct rank *rank);

/* The bytes of a tensor; of this generation are those of its poison. */
#define POISON UINT64_MAX
void foretell(unsigned char *bytes, uint64_t n, uint64_t generation, uint32_t layer, uint32_t tensor);
bool is_foretold(const unsigned char *bytes, uint64_t n, uint64_t generation, uint32_t layer, uint32_t tensor);
/* A post_process callback whose user is a struct rank. */
int fill_layer(void *rank, uint32_t layer, void *const *tensors);

/*
 * What lies in the windows is what its source wrote, at the address of the first day. On a device it is looked at in
 * the order of the rank's stream, as a kernel would, and compared when there is no more room, or by rank_looked.
 */
bool layer_is_right(struct rank *rank, uint32_t position);
/* All that was looked at until now was right. */
bool rank_looked(struct rank *rank);
/* reach, wait, check; on a device on one of two streams in turn. */
bool visit(struct rank *rank, uint32_t position);
bool one_pass(struct rank *rank);

uint64_t random_next(uint64_t *state);

/* How many ranks, this one among them, this rank can read in place. */
int32_t rank_reaches(const struct rank *rank);
/* Some ranks of the group read some others' memory in place, not all. */
bool ranks_are_mixed(const struct rank *rank);
/* Bytes of the series' memory, written and read when nobody else does. */
bool rank_write(struct rank *rank, void *to, const void *from, size_t bytes);
bool rank_read(struct rank *rank, void *to, const void *from, size_t bytes);

/* ---- conformance_device.c ---- */

/* Driver, context and streams of one rank; NULL with a message on failure. Closing one of NULL is allowed. */
struct device *device_open(const struct member *member);
void device_close(struct device *device);
int device_number(const struct device *device, int32_t rank);
/* Streams 0 and 1 are for passes. */
void *device_stream(const struct device *device, unsigned number);
bool device_copy(struct device *device, uintptr_t to, uintptr_t from, size_t bytes);
/* Memory that other processes can open. NULL if there is none. */
void *device_allocate(struct device *device, size_t bytes);
void device_release(struct device *device, void *memory);
bool device_free_bytes(struct device *device, uint64_t *bytes);
/* Look at a tensor in the order of @p stream, and compare it later with what it should have been now. */
bool device_look(struct rank *rank, const void *address, size_t bytes, uint32_t layer, uint32_t tensor);
bool device_looked(struct rank *rank);
/*
 * What is looked at from _begin to _end, on both streams, is captured, and looked at again by each replay. Nothing may
 * be left to compare before the first one. _drop ends a capture that cannot become a graph.
 */
bool device_capture_begin(struct rank *rank);
bool device_capture_end(struct rank *rank, void **graph);
bool device_capture_drop(struct rank *rank);
bool device_replay(struct rank *rank, void *graph);
void device_forget(struct rank *rank, void *graph);

/* A check that must be OK, with the rank's own text if it is not. */
#define OK_SERIES(rank, call) EXPECT((rank)->member, (call) == LSHARD_OK, "%s", lshard_series_error((rank)->series))

/* Memory that forked ranks share with the test. */
void *shared_new(size_t bytes);
void shared_free(void *memory, size_t bytes);

/* The parts. Each is a cmocka test. */
void walks_give_the_right_bytes(void **state);
void rough_walks_give_the_right_bytes_or_a_status(void **state);
void two_series_do_not_disturb_each_other(void **state);
void ranks_need_no_lockstep(void **state);
void out_of_step_is_found_and_cured(void **state);
void sources_may_write_in_place(void **state);
void stripes_are_shards(void **state);
void layers_of_many_pages_are_right(void **state);
void callers_memory_is_used_and_given_back(void **state);
void misuse_has_a_status_and_a_text(void **state);
void differing_options_are_named(void **state);
void a_failing_callback_is_seen_by_all(void **state);
void abort_ends_a_blocked_call(void **state);
void the_others_go_on_without_a_rank(void **state);
void updates_begin_in_the_middle_of_a_pass(void **state);
void a_changed_byte_is_found(void **state);
void captured_passes_are_replayed(void **state);
void nothing_stays_on_the_device(void **state);
void children_by_fork_are_no_ranks(void **state);
void a_dead_rank_is_gone_although_its_child_lives(void **state);
void poison_is_all_that_is_seen_outside_of_views(void **state);
void poison_is_all_that_is_seen_around_a_load(void **state);
void poison_is_switched_between_passes(void **state);
void a_layer_that_is_late_stays_poison(void **state);
void poison_belongs_to_captured_passes(void **state);

#endif
