/* SPDX-License-Identifier: Apache-2.0
 *
 * shared_memory.c - see shared_memory.h.
 */
#include "shared_memory.h"
#include "large_pages.h"
#include "limit_reason.h"
#include "memfd.h"
#include "sockets.h"

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

/* More addresses than asked for, of which the unaligned ends are given back. */
static unsigned char *reserve_aligned(uint64_t bytes, uint64_t alignment)
{
	uint64_t more = alignment > shared_whole_pages(1) ? alignment : 0;
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	unsigned char *mapped = mmap(NULL, bytes + more, PROT_NONE, flags, -1, 0);
	size_t before;

	if (mapped == MAP_FAILED && more > 0) { /* a limit may have room for just the bytes */
		more = 0;
		mapped = mmap(NULL, bytes, PROT_NONE, flags, -1, 0);
	}
	if (mapped == MAP_FAILED)
		return NULL;
	if (more == 0)
		return mapped;
	before = (size_t)(-(uintptr_t)mapped & (alignment - 1));
	if (before > 0)
		munmap(mapped, before);
	munmap(mapped + before + bytes, (size_t)more - before);
	return mapped + before;
}

lshard_status shared_reserve(const struct sharing *sharing, const char *what, uint64_t bytes,
			     struct shared_memory *memory)
{
	const size_t size = shared_whole_pages(bytes);
	const uint64_t page = shared_whole_pages(1);
	void *address = reserve_aligned(size, lshard__large_alignment(sharing->context, size, page));

	if (!address)
		return shared_refused(sharing, what, bytes);
	*memory = (struct shared_memory){address, size};
	return LSHARD_OK;
}

static lshard_status map(const struct sharing *sharing, const char *what, uint64_t bytes, int protection, int fd,
			 struct shared_memory *memory)
{
	struct shared_memory mapped = {NULL, 0};
	lshard_status status = shared_reserve(sharing, what, bytes, &mapped);

	if (status != LSHARD_OK)
		return status;
	if (mmap(mapped.address, mapped.bytes, protection, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
		status = shared_refused(sharing, what, bytes);
		shared_unmap(&mapped);
		return status;
	}
	*memory = mapped;
	return LSHARD_OK;
}

/* ---- Making ---- */

/* Bytes of reserved large pages that would hold @p bytes; 0 where they would not do, or not without much waste. */
static uint64_t reserved_bytes(const struct sharing *sharing, uint64_t bytes)
{
	const uint64_t page = sharing->context->large_page_bytes;
	const uint64_t whole = page ? (bytes + page - 1) & ~(page - 1) : 0;

	return sharing->reserved && whole && whole - bytes <= bytes / 16 ? whole : 0;
}

#define FILLED_AT_ONCE (UINT64_C(64) << 20)

/* In parts, as a signal ends the call, and a timer's would again and again. Returns not 0 and errno on failure. */
static int fill_reserved(int fd, uint64_t bytes)
{
	int failed = 0;

	for (uint64_t offset = 0; offset < bytes && !failed; offset += FILLED_AT_ONCE) {
		const uint64_t rest = bytes - offset;

		do
			failed =
				fallocate(fd, 0, (off_t)offset, (off_t)(rest < FILLED_AT_ONCE ? rest : FILLED_AT_ONCE));
		while (failed && errno == EINTR);
	}
	return failed;
}

/* The system looks at the thread for these pages, and not at the mapping. */
static int fill_reserved_on(const struct numa_wish *wish, int fd, uint64_t bytes)
{
	struct numa_policy before;
	int failed, error;

	numa_policy_begin(wish, &before);
	failed = fill_reserved(fd, bytes);
	error = errno;
	numa_policy_end(&before);
	errno = error;
	return failed;
}

static struct numa_use numa_use_of(const struct sharing *sharing, const char *what)
{
	return (struct numa_use){sharing->context, sharing->series, what, sharing->wish};
}

/*
 * Mapped to be sure of all pages at once (some would be taken from others' plans before it fails), then filled: a limit
 * of the cgroup is met here, and not by a signal where the bytes are first written.
 */
static lshard_status make_reserved(const struct sharing *sharing, const char *name, const char *what, uint64_t bytes,
				   struct shared_memory *memory, int *fd)
{
	const struct numa_use placing = numa_use_of(sharing, what);
	lshard_status status;

	*fd = lshard__memfd_create_reserved(name, sharing->context->large_page_bytes);
	if (*fd < 0 || lshard__resize(*fd, bytes))
		return shared_refused(sharing, what, bytes);
	status = map(sharing, what, bytes, PROT_READ | PROT_WRITE, *fd, memory);
	if (status == LSHARD_OK)
		numa_bind(&placing, memory->address, memory->bytes);
	if (status == LSHARD_OK && fill_reserved_on(sharing->wish, *fd, bytes)) {
		status = shared_refused(sharing, what, bytes);
		shared_unmap(memory);
		*memory = (struct shared_memory){NULL, 0};
	}
	if (status == LSHARD_OK)
		numa_settle(&placing, memory->address, memory->bytes);
	return status;
}

static lshard_status make_plain(const struct sharing *sharing, const char *name, const char *what, uint64_t bytes,
				struct shared_memory *memory, int *fd)
{
	const struct large_pages_use use = {.context = sharing->context,
					    .series = sharing->series,
					    .what = what,
					    .error = sharing->error,
					    .reserved = reserved_bytes(sharing, bytes) != 0,
					    .turns = numa_turns(sharing->wish),
					    .idle_begin = sharing->idle_begin,
					    .idle_bytes = sharing->idle_bytes};
	const struct numa_use placing = numa_use_of(sharing, what);
	const size_t size = shared_whole_pages(bytes);
	lshard_status status;

	*fd = lshard__memfd_create(name);
	if (*fd < 0 || lshard__resize(*fd, size))
		return shared_refused(sharing, what, bytes);
	status = map(sharing, what, size, PROT_READ | PROT_WRITE, *fd, memory);
	if (status != LSHARD_OK)
		return status;
	numa_bind(&placing, memory->address, memory->bytes);
	status = lshard__make_large(&use, memory->address, memory->bytes);
	if (status == LSHARD_OK)
		numa_settle(&placing, memory->address, memory->bytes);
	return status;
}

lshard_status shared_make(const struct sharing *sharing, const char *what, uint64_t bytes, struct shared_memory *memory,
			  int *fd)
{
	const uint64_t reserved = reserved_bytes(sharing, bytes);
	lshard_error why = {""};
	lshard_status status;
	char name[128];

	*fd = -1;
	snprintf(name, sizeof name, "layershard:%s:%s", sharing->series, what);
	if (reserved && make_reserved(sharing, name, what, reserved, memory, fd) == LSHARD_OK)
		return LSHARD_OK;
	if (reserved)
		why = *sharing->error;
	if (*fd >= 0)
		close(*fd);
	status = make_plain(sharing, name, what, bytes, memory, fd);
	if (status != LSHARD_OK && why.text[0] && sharing->context->large_pages == LSHARD_LARGE_PAGES_REQUIRE)
		return lshard_fail(sharing->error, status, "%s. In reserved ones: %s", sharing->error->text, why.text);
	return status;
}

lshard_status shared_make_sealed(const struct sharing *sharing, const char *what, uint64_t bytes,
				 struct shared_memory *memory, int *fd)
{
	lshard_status status;

	*fd = -1;
	if (bytes == 0)
		return LSHARD_OK; /* more ranks than layers: a reader only */
	status = shared_make(sharing, what, bytes, memory, fd);
	if (status == LSHARD_OK && fcntl(*fd, F_ADD_SEALS, SHARE_SEALS))
		status = shared_refused(sharing, what, bytes);
	return status;
}

/* A shard that could shrink under its readers would kill them: take only what cannot. */
lshard_status shared_map_sealed(const struct sharing *sharing, int32_t rank, int fd, uint64_t bytes,
				struct shared_memory *memory)
{
	struct stat found;
	uint64_t reserved, size;
	int seals;

	if (bytes == 0)
		return LSHARD_OK;
	if (fd < 0 || fstat(fd, &found))
		return lshard_fail(sharing->error, LSHARD_ERR_MISMATCH,
				   "series '%s': rank %d shares nothing instead of %llu bytes", sharing->series,
				   (int)rank, (unsigned long long)bytes);
	seals = fcntl(fd, F_GET_SEALS);
	reserved = reserved_bytes(sharing, bytes);
	size = (uint64_t)found.st_size == reserved ? reserved : shared_whole_pages(bytes);
	if ((uint64_t)found.st_size != size || seals < 0 || !(seals & F_SEAL_SHRINK))
		return lshard_fail(sharing->error, LSHARD_ERR_MISMATCH,
				   "series '%s': rank %d shares %lld bytes (seals %#x) instead of %llu sealed ones",
				   sharing->series, (int)rank, (long long)found.st_size, (unsigned)seals,
				   (unsigned long long)bytes);
	return map(sharing, "mapping what a rank shares", size, PROT_READ, fd, memory);
}

void shared_unmap(const struct shared_memory *memory)
{
	if (memory->address)
		munmap(memory->address, memory->bytes);
}

uint64_t shared_deadline(const lshard_context *context, const lshard_store_plan *plan, uint64_t more)
{
	const bool touched = context->large_page_bytes || context->numa > LSHARD_NUMA_NONE;
	uint64_t most = 0;

	for (int32_t rank = 0; rank < context->size; rank++)
		most = plan->shard_bytes_of[rank] > most ? plan->shard_bytes_of[rank] : most;
	most += plan->buffers * plan->layer_bytes + more;
	return lshard__deadline_ns(context->timeout_ms) + (touched ? (most >> 20) * (1000000000u / 256) : 0);
}
