/* SPDX-License-Identifier: Apache-2.0
 *
 * shared_memory.c - see shared_memory.h.
 */
#include "shared_memory.h"
#include "limit_reason.h"
#include "memfd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define SHARE_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)

size_t shared_whole_pages(uint64_t bytes)
{
	const size_t page = (size_t)sysconf(_SC_PAGESIZE);

	return ((size_t)bytes + page - 1) & ~(page - 1);
}

lshard_status shared_refused(const struct sharing *sharing, const char *what, uint64_t bytes)
{
	lshard_status status = errno == ENOMEM || errno == ENOSPC ? LSHARD_ERR_NO_MEMORY : LSHARD_ERR_SYSTEM;

	return lshard_fail(sharing->error, status, "series '%s': %s of %llu bytes: %s", sharing->series, what,
			   (unsigned long long)bytes, lshard__reason(errno, bytes).text);
}

static lshard_status map(const struct sharing *sharing, const char *what, uint64_t bytes, int protection, int fd,
			 struct shared_memory *memory)
{
	const size_t size = shared_whole_pages(bytes);
	void *mapped = mmap(NULL, size, protection, MAP_SHARED, fd, 0);

	if (mapped == MAP_FAILED)
		return shared_refused(sharing, what, bytes);
	*memory = (struct shared_memory){mapped, size};
	return LSHARD_OK;
}

lshard_status shared_make(const struct sharing *sharing, const char *what, uint64_t bytes, struct shared_memory *memory,
			  int *fd)
{
	char name[128];

	snprintf(name, sizeof name, "layershard:%s:%s", sharing->series, what);
	*fd = lshard__memfd_create(name);
	if (*fd < 0 || lshard__resize(*fd, shared_whole_pages(bytes)))
		return shared_refused(sharing, what, bytes);
	return map(sharing, what, bytes, PROT_READ | PROT_WRITE, *fd, memory);
}

lshard_status shared_make_shard(const struct sharing *sharing, uint64_t bytes, struct shared_memory *memory, int *fd)
{
	lshard_status status;

	*fd = -1;
	if (bytes == 0)
		return LSHARD_OK; /* more ranks than layers: a reader only */
	status = shared_make(sharing, "shard", bytes, memory, fd);
	if (status == LSHARD_OK && fcntl(*fd, F_ADD_SEALS, SHARE_SEALS))
		status = shared_refused(sharing, "sealing a shard", bytes);
	return status;
}

/* A shard that could shrink under its readers would kill them: take only what cannot. */
lshard_status shared_map_shard(const struct sharing *sharing, int32_t rank, int fd, uint64_t bytes,
			       struct shared_memory *memory)
{
	struct stat found;
	int seals;

	if (bytes == 0)
		return LSHARD_OK;
	if (fd < 0 || fstat(fd, &found))
		return lshard_fail(sharing->error, LSHARD_ERR_MISMATCH,
				   "series '%s': rank %d shares nothing instead of %llu bytes", sharing->series,
				   (int)rank, (unsigned long long)bytes);
	seals = fcntl(fd, F_GET_SEALS);
	if ((uint64_t)found.st_size < bytes || seals < 0 || !(seals & F_SEAL_SHRINK))
		return lshard_fail(sharing->error, LSHARD_ERR_MISMATCH,
				   "series '%s': rank %d shares %lld bytes (seals %#x) instead of %llu sealed ones",
				   sharing->series, (int)rank, (long long)found.st_size, (unsigned)seals,
				   (unsigned long long)bytes);
	return map(sharing, "mapping a shard", bytes, PROT_READ, fd, memory);
}

void shared_unmap(const struct shared_memory *memory)
{
	if (memory->address)
		munmap(memory->address, memory->bytes);
}
