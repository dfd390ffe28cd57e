/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_link_bare.c - the memory between which `bench link` copies without the library: a block per rank that every
 * other rank reads, exported from one GPU to another or shared by processes, and a block to copy to.
 * Knows: bench_link_gpu.h, local sockets. Does not know: series, rounds.
 */
#include "bench_link.h"
#include "bench_link_gpu.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAIL_MS 60000

struct link_bare {
	struct link_bench *bench;
	int32_t rank;
	struct link_gpu *gpu; /* NULL: host memory */
	cuda_stream stream;
	struct link_gpu_shard shards[LINK_RANKS_MOST]; /* the own one and the others', as this device sees them */
	cuda_address to;
	uint64_t turn;       /* counts copies */
	unsigned char *host; /* host memory to copy to; GPUs: where bytes are made and checked */
};

/* ---- Descriptors --------------------------------------------------------------------------------------------- */

static bool fail(const struct link_bare *bare, const char *text)
{
	return bench_ranks_fail(&bare->bench->shared->ranks, "rank %d: %s", (int)bare->rank, text);
}

static bool fail_system(const struct link_bare *bare, const char *what)
{
	return bench_ranks_fail(&bare->bench->shared->ranks, "rank %d: %s: %s", (int)bare->rank, what, strerror(errno));
}

union descriptor_room {
	struct cmsghdr head;
	char bytes[CMSG_SPACE(sizeof(int))];
};

static bool post_descriptor(const struct link_bare *bare, int32_t to, int descriptor)
{
	union descriptor_room room;
	int32_t from = bare->rank;
	struct iovec part = {&from, sizeof from};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = room.bytes, .msg_controllen = sizeof room.bytes};

	memset(&room, 0, sizeof room);
	room.head.cmsg_level = SOL_SOCKET;
	room.head.cmsg_type = SCM_RIGHTS;
	room.head.cmsg_len = CMSG_LEN(sizeof descriptor);
	memcpy(CMSG_DATA(&room.head), &descriptor, sizeof descriptor);
	return sendmsg(bare->bench->mail[to][1], &message, MSG_NOSIGNAL) == (ssize_t)sizeof from ||
	       fail_system(bare, "its GPU memory could not be sent to another rank");
}

/* Who sent it is in the message: they arrive in any order. */
static bool take_descriptor(const struct link_bare *bare, int32_t *from, int *descriptor)
{
	union descriptor_room room;
	struct iovec part = {from, sizeof *from};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = room.bytes, .msg_controllen = sizeof room.bytes};
	struct pollfd mail = {.fd = bare->bench->mail[bare->rank][0], .events = POLLIN};

	memset(&room, 0, sizeof room);
	if (poll(&mail, 1, MAIL_MS) != 1)
		return fail(bare, "the other ranks have sent no descriptor of their GPU memory within a minute");
	if (recvmsg(mail.fd, &message, MSG_CMSG_CLOEXEC) != (ssize_t)sizeof *from)
		return fail_system(bare, "GPU memory of another rank could not be received");
	if (message.msg_controllen < CMSG_LEN(sizeof *descriptor) || room.head.cmsg_type != SCM_RIGHTS || *from < 0 ||
	    *from >= bare->bench->options.ranks)
		return fail(bare, "a message from another rank has no descriptor");
	memcpy(descriptor, CMSG_DATA(&room.head), sizeof *descriptor);
	return true;
}

static bool post_to_all(const struct link_bare *bare, int descriptor)
{
	for (int32_t to = 0; to < bare->bench->options.ranks; to++)
		if (to != bare->rank && !post_descriptor(bare, to, descriptor))
			return false;
	return true;
}

static bool open_others(struct link_bare *bare)
{
	for (int32_t left = bare->bench->options.ranks - 1; left > 0; left--) {
		int32_t from;
		int descriptor = -1;
		bool opened;

		if (!take_descriptor(bare, &from, &descriptor))
			return false;
		opened = link_gpu_shard_open(bare->gpu, link_block_bytes(bare->bench), descriptor, &bare->shards[from]);
		close(descriptor);
		if (!opened)
			return fail(bare, bare->gpu->error.text);
	}
	return true;
}

/* ---- Memory -------------------------------------------------------------------------------------------------- */

/* Bare blocks hold what no layer holds: the bits of a copy cannot be right by mistake. */
static uint32_t block_of(int32_t rank)
{
	return 1000u + (uint32_t)rank;
}

static bool open_on_gpu(struct link_bare *bare)
{
	const uint64_t bytes = link_block_bytes(bare->bench);
	struct link_gpu_shard *own = &bare->shards[bare->rank];
	int descriptor = -1;
	bool good;

	if (!link_gpu_shard_make(bare->gpu, bytes, own, &descriptor))
		return fail(bare, bare->gpu->error.text);
	good = post_to_all(bare, descriptor);
	close(descriptor);
	if (!good || !open_others(bare))
		return false;
	bench_fill(bare->host, bytes, block_of(bare->rank));
	if (!link_gpu_allocate(bare->gpu, bytes, &bare->to) ||
	    !link_gpu_copy_now(bare->gpu, own->address, (cuda_address)(uintptr_t)bare->host, bytes, bare->stream))
		return fail(bare, bare->gpu->error.text);
	return true;
}

struct link_bare *link_bare_open(struct link_bench *bench, int32_t rank, struct link_gpu *gpu, void *stream)
{
	struct link_bare *bare = calloc(1, sizeof *bare);
	const uint64_t bytes = link_block_bytes(bench);

	if (!bare) {
		bench_ranks_fail(&bench->shared->ranks, "rank %d: no memory", (int)rank);
		return NULL;
	}
	bare->bench = bench;
	bare->rank = rank;
	bare->gpu = gpu;
	bare->stream = stream;
	bare->host = malloc((size_t)bytes);
	if (!bare->host)
		fail(bare, "no memory to copy to");
	if (bare->host && !gpu) {
		bench_fill(bench->sources[rank], bytes, block_of(rank));
		memset(bare->host, 0, (size_t)bytes);
		return bare;
	}
	if (bare->host && open_on_gpu(bare))
		return bare;
	link_bare_close(bare);
	return NULL;
}

void link_bare_close(struct link_bare *bare)
{
	if (!bare)
		return;
	if (bare->gpu) {
		link_gpu_free(bare->gpu, bare->to);
		for (int32_t rank = 0; rank < bare->bench->options.ranks; rank++)
			link_gpu_shard_close(bare->gpu, &bare->shards[rank]);
	}
	free(bare->host);
	free(bare);
}

/* ---- Copies -------------------------------------------------------------------------------------------------- */

static bool copy_part(struct link_bare *bare, int32_t from, uint64_t from_offset, uint64_t to_offset, uint64_t bytes)
{
	if (bare->gpu)
		return link_gpu_copy(bare->gpu, bare->to + to_offset, bare->shards[from].address + from_offset, bytes,
				     bare->stream);
	memcpy(bare->host + to_offset, bare->bench->sources[from] + from_offset, (size_t)bytes);
	return true;
}

bool link_bare_copy(struct link_bare *bare, int32_t from, uint64_t bytes)
{
	const int32_t ranks = bare->bench->options.ranks;
	const uint64_t part = bytes / (uint64_t)(ranks - 1);
	const uint64_t place = bare->turn++ % 2 * (link_block_bytes(bare->bench) / 2);

	if (from != LINK_ALL)
		return copy_part(bare, from, place, 0, bytes);
	for (int32_t i = 1; i < ranks; i++) {
		const uint64_t offset = part * (uint64_t)(i - 1);

		if (!copy_part(bare, (bare->rank + i) % ranks, place + offset, offset, part))
			return false;
	}
	return true;
}

bool link_bare_check(struct link_bare *bare, int32_t from)
{
	const uint64_t bytes = link_block_bytes(bare->bench);

	if (!copy_part(bare, from, 0, 0, bytes))
		return fail(bare, bare->gpu->error.text);
	if (bare->gpu &&
	    !link_gpu_copy_now(bare->gpu, (cuda_address)(uintptr_t)bare->host, bare->to, bytes, bare->stream))
		return fail(bare, bare->gpu->error.text);
	return bench_compare(bare->host, bytes, block_of(from)) ||
	       fail(bare, "wrong bits: a bare copy is not what its source wrote");
}
