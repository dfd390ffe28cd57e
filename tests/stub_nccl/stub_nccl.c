/* SPDX-License-Identifier: Apache-2.0
 *
 * stub_nccl.c - a stand-in for NCCL on the stub driver, between processes: broadcast and all-gather through a file in
 * memory, as operations of their streams. A rank waits for the others, as with the real one.
 *
 * STUB_NCCL_VERSION sets what it says it is (22809); with STUB_NCCL_FAIL=1 communicators fail, with STUB_NCCL_PLAIN=1
 * there is no symmetric memory. STUB_NCCL_TALLY=F: when a communicator goes, a line of JSON is added to the file F: the
 * bytes that this rank has received from others by each kind of operation.
 */
#include "stub_cuda.h"

#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define RANKS     16
#define BYTES     65536 /* of an operation, at most */
#define LONGEST_S 60

enum { DONE = 0, SYSTEM = 2, INVALID = 4 };

struct nccl_id {
	char bytes[128];
};

/* What all ranks share. An operation is over when all have taken part. */
struct meeting {
	atomic_uint arrived[RANKS]; /* operations to which a rank has given its bytes */
	atomic_uint left[RANKS];    /* operations from which it has taken all it needs */
	unsigned char bytes[RANKS][BYTES];
};

struct ncclComm {
	struct meeting *meeting;
	int rank;
	int ranks;
	unsigned operations;
	unsigned long long broadcast_bytes, gathered_bytes; /* from others */
	struct operation *all;
};

struct operation {
	struct operation *next;
	struct ncclComm *comm;
	const void *from;
	void *to;
	size_t bytes;
	int root; /* -1: all-gather */
};

typedef struct ncclComm *nccl_comm;

int ncclGetVersion(int *version);
int ncclGetUniqueId(struct nccl_id *id);
int ncclCommInitRank(nccl_comm *comm, int ranks, struct nccl_id id, int rank);
int ncclCommInitRankConfig(nccl_comm *comm, int ranks, struct nccl_id id, int rank, const void *config);
int ncclCommDestroy(nccl_comm comm);
int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, nccl_comm comm, cuda_stream stream);
int ncclAllGather(const void *from, void *to, size_t count, int type, nccl_comm comm, cuda_stream stream);
int ncclMemAlloc(void **memory, size_t bytes);
int ncclMemFree(void *memory);
int ncclCommWindowRegister(nccl_comm comm, void *memory, size_t bytes, void **window, int flags);
int ncclCommWindowDeregister(nccl_comm comm, void *window);
const char *ncclGetErrorString(int result);
const char *ncclGetLastError(nccl_comm comm);

int ncclGetVersion(int *version)
{
	const char *text = getenv("STUB_NCCL_VERSION");

	*version = text ? atoi(text) : 22809;
	return DONE;
}

const char *ncclGetErrorString(int result)
{
	return result == SYSTEM ? "unhandled system error" : "invalid argument";
}

const char *ncclGetLastError(nccl_comm comm)
{
	(void)comm;
	return "the stub's words";
}

/* ---- Communicators ---- */

/* The id is the path of the file in the process that made it, which keeps it open. */
int ncclGetUniqueId(struct nccl_id *id)
{
	const int fd = memfd_create("stub nccl", MFD_CLOEXEC);

	if (fd < 0 || ftruncate(fd, sizeof(struct meeting)))
		return SYSTEM;
	snprintf(id->bytes, sizeof id->bytes, "/proc/%ld/fd/%d", (long)getpid(), fd);
	return DONE;
}

int ncclCommInitRank(nccl_comm *comm, int ranks, struct nccl_id id, int rank)
{
	const int fd = open(id.bytes, O_RDWR | O_CLOEXEC);

	if (fd < 0 || ranks > RANKS || getenv("STUB_NCCL_FAIL"))
		return SYSTEM;
	*comm = calloc(1, sizeof **comm);
	if (!*comm)
		return SYSTEM;
	(*comm)->meeting = mmap(NULL, sizeof(struct meeting), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	(*comm)->rank = rank;
	(*comm)->ranks = ranks;
	close(fd);
	return (*comm)->meeting == MAP_FAILED ? SYSTEM : DONE;
}

/* size_t, magic, version, eight members, the policy: as in nccl.h of 2.28 */
int ncclCommInitRankConfig(nccl_comm *comm, int ranks, struct nccl_id id, int rank, const void *config)
{
	unsigned magic, policy;

	memcpy(&magic, (const char *)config + 8, sizeof magic);
	memcpy(&policy, (const char *)config + 60, sizeof policy);
	if (magic != 0xcafebeef || policy != 2)
		return INVALID;
	return ncclCommInitRank(comm, ranks, id, rank);
}

static void tell(const struct ncclComm *comm)
{
	const char *path = getenv("STUB_NCCL_TALLY");
	FILE *file = path ? fopen(path, "a") : NULL;

	if (!file)
		return;
	fprintf(file, "{\"broadcast\": %llu, \"gathered\": %llu}\n", comm->broadcast_bytes, comm->gathered_bytes);
	fclose(file);
}

int ncclCommDestroy(nccl_comm comm)
{
	tell(comm);
	while (comm->all) {
		struct operation *operation = comm->all;

		comm->all = operation->next;
		free(operation);
	}
	munmap(comm->meeting, sizeof *comm->meeting);
	free(comm);
	return DONE;
}

/* ---- Operations ---- */

static void await_all(const struct ncclComm *comm, atomic_uint *counts, unsigned count)
{
	const time_t deadline = time(NULL) + LONGEST_S;

	for (int rank = 0; rank < comm->ranks; rank++)
		while (atomic_load(&counts[rank]) < count) {
			if (time(NULL) > deadline)
				abort();
			sched_yield();
		}
}

static void run(void *argument)
{
	const struct operation *operation = argument;
	struct ncclComm *comm = operation->comm;
	struct meeting *meeting = comm->meeting;
	const unsigned before = comm->operations++;

	await_all(comm, meeting->left, before);
	memcpy(meeting->bytes[comm->rank], operation->from, operation->bytes);
	atomic_store(&meeting->arrived[comm->rank], before + 1);
	await_all(comm, meeting->arrived, before + 1);
	if (operation->root >= 0)
		memcpy(operation->to, meeting->bytes[operation->root], operation->bytes);
	for (int rank = 0; operation->root < 0 && rank < comm->ranks; rank++)
		memcpy((char *)operation->to + (size_t)rank * operation->bytes, meeting->bytes[rank], operation->bytes);
	if (operation->root < 0)
		comm->gathered_bytes += operation->bytes * ((size_t)comm->ranks - 1);
	else if (operation->root != comm->rank)
		comm->broadcast_bytes += operation->bytes;
	atomic_store(&meeting->left[comm->rank], before + 1);
}

static int enqueue(const struct operation *wish, cuda_stream stream)
{
	struct operation *operation = calloc(1, sizeof *operation);

	if (!operation || wish->bytes > BYTES)
		return INVALID;
	*operation = *wish;
	operation->next = wish->comm->all;
	wish->comm->all = operation;
	return cuLaunchHostFunc(stream, run, operation) == CUDA_OK ? DONE : INVALID;
}

int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, nccl_comm comm, cuda_stream stream)
{
	const struct operation wish = {NULL, comm, from, to, count, root};

	return type == 1 ? enqueue(&wish, stream) : INVALID;
}

int ncclAllGather(const void *from, void *to, size_t count, int type, nccl_comm comm, cuda_stream stream)
{
	const struct operation wish = {NULL, comm, from, to, count, -1};

	return type == 1 ? enqueue(&wish, stream) : INVALID;
}

/* ---- Symmetric memory ---- */

int ncclMemAlloc(void **memory, size_t bytes)
{
	cuda_address address;

	if (cuMemAlloc_v2(&address, bytes) != CUDA_OK)
		return SYSTEM;
	*memory = (void *)(uintptr_t)address;
	return DONE;
}

int ncclMemFree(void *memory)
{
	return cuMemFree_v2((uintptr_t)memory) == CUDA_OK ? DONE : INVALID;
}

int ncclCommWindowRegister(nccl_comm comm, void *memory, size_t bytes, void **window, int flags)
{
	*window = getenv("STUB_NCCL_PLAIN") ? NULL : memory;
	return comm && bytes && flags == 1 ? DONE : INVALID;
}

int ncclCommWindowDeregister(nccl_comm comm, void *window)
{
	return comm && window ? DONE : INVALID;
}
