/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_ranks.h - what the tests of the cuda transport share: a rank whose driver is the stub, a series of known bytes,
 * passes that check them in stream order.
 */
#ifndef TESTS_CUDA_RANKS_H
#define TESTS_CUDA_RANKS_H

#include "patience.h"
#include "stub_cuda/stub_cuda.h"
#include "threads.h"

#include <layershard/callbacks.h>
#include <layershard/transport.h>

#define LAYERS 5u
#define FIRST  2u
#define BYTES  9000u

/* How a rank's stub is set, and what is run on it. */
struct setting {
	const char *spec;
	lshard_placement placement;
	uint32_t prefetch;
	int64_t late;
	uint32_t timeout_ms;
	int lacks_memory; /* of this rank: no virtual memory */
	int neighbours;   /* ranks 0 .. neighbours - 1 are on one device */
	const lshard_callbacks *callbacks;
};

struct rank {
	const struct member *member;
	const struct setting *setting;
	lshard_group *group;
	lshard_series *series;
	cuda_context context;
	cuda_stream streams[2];
	uint64_t differences;
	uint32_t reference[LAYERS][BYTES / 4];
	char said[512]; /* last warning */
	char error[512];
};

#define OK(rank, call) EXPECT((rank)->member, (call) == LSHARD_OK, "%s", lshard_series_error((rank)->series))

/* A stub as at the beginning, set for this rank. */
void cuda_set_stub(const struct member *member, const struct setting *setting);
lshard_status cuda_open_group(struct rank *rank, const struct member *member, const struct setting *setting);
/* The same; @p custom: by a table of the test's own, with wrappers only in the setting's spec. */
lshard_status cuda_open_group_by(struct rank *rank, const struct member *member, const struct setting *setting,
				 const lshard_transport_ops *custom);
lshard_status cuda_create_series(struct rank *rank);
/* In memory of the caller's. */
lshard_status cuda_create_series_in(struct rank *rank, const lshard_memory_source *source);
/* Makes the device's context current. */
int cuda_open_streams(struct rank *rank);
/* Of a clock that only goes on. */
double cuda_now_s(void);
/* Stub, group, series, streams; member->user is the setting. 0 with a message when something is not OK. */
int cuda_open_rank(struct rank *rank, const struct member *member);
void cuda_close_rank(struct rank *rank);

/* From now on layers have the bytes of this generation. */
void cuda_foretell(struct rank *rank, uint32_t generation);
int cuda_fill_layer(void *rank, uint32_t layer, void *const *tensors);

/* reach, wait, and a kernel that counts what differs. */
int cuda_visit(struct rank *rank, uint32_t layer, cuda_stream stream);
int cuda_one_pass(struct rank *rank, uint32_t layers, cuda_stream stream);
/* Ends all work; says how many words differed, if any. */
int cuda_all_right(struct rank *rank, const char *what);

#endif
