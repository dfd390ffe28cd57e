/* SPDX-License-Identifier: Apache-2.0
 *
 * stub_memory.c - see stub_cuda.h: device memory, as files without names. Knows the driver's rules of mapping: a handle
 * is mapped whole, a mapping is reached only after its access is set, memory lives while anything maps it.
 */
#include "stub_world.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define GRANULE ((size_t)2 << 20)
#define STEP    ((size_t)512) /* of allocations that are not whole granules: they share one with others */
#define MOST    4096

struct physical {
	int fd;
	int32_t type; /* of the handles that it can be named by */
	size_t bytes;
	int handles;
	int mappings;
	int made_here;
};

/* A reservation (no physical), a mapping onto one, or an allocation (its own reservation and mapping). */
enum area_kind { FREE, RESERVED, MAPPED, ALLOCATED, OPENED };

struct area {
	char *address;
	size_t bytes;
	struct physical *physical;
	enum area_kind kind;
	int device;  /* of an allocation */
	size_t skip; /* of an allocation, from where the file is mapped */
};

static struct area areas[MOST];
static uint64_t made;
static unsigned writable_imports;

static struct area *area_at(cuda_address address, enum area_kind kind)
{
	for (int i = 0; i < MOST; i++)
		if (areas[i].kind == kind && areas[i].address == (char *)(uintptr_t)address)
			return &areas[i];
	return NULL;
}

static struct area *new_area(void *address, size_t bytes, struct physical *physical, enum area_kind kind)
{
	for (int i = 0; i < MOST; i++)
		if (areas[i].kind == FREE) {
			areas[i] = (struct area){address, bytes, physical, kind, stub_has_context() ? stub_device() : 0,
						 0};
			stub_count(1);
			return &areas[i];
		}
	abort();
}

static void drop_area(struct area *area)
{
	area->kind = FREE;
	stub_count(-1);
}

static struct physical *new_physical(int fd, size_t bytes, int made_here)
{
	struct physical *physical = calloc(1, sizeof *physical);

	if (!physical)
		abort();
	*physical = (struct physical){fd, CUDA_HANDLE_FD, bytes, 1, 0, made_here};
	made += made_here ? bytes : 0;
	stub_count(1);
	return physical;
}

static void drop_physical(struct physical *physical)
{
	if (physical->handles || physical->mappings)
		return;
	close(physical->fd);
	made -= physical->made_here ? physical->bytes : 0;
	stub_count(-1);
	free(physical);
}

static int new_file(size_t bytes)
{
	const int fd = memfd_create("stub device memory", MFD_CLOEXEC);

	if (fd < 0 || ftruncate(fd, (off_t)bytes))
		abort();
	return fd;
}

static int fits(size_t bytes)
{
	return bytes <= (uint64_t)stub_setting(STUB_MEMORY_BYTES) &&
	       made + bytes <= (uint64_t)stub_setting(STUB_MEMORY_BYTES);
}

int stub_is_memory(cuda_address address)
{
	const char *at = (const char *)(uintptr_t)address;

	for (int i = 0; i < MOST; i++)
		if (areas[i].physical && areas[i].kind != FREE && at >= areas[i].address &&
		    at < areas[i].address + areas[i].bytes)
			return 1;
	return 0;
}

uint64_t stub_cuda_bytes(void)
{
	return made;
}

unsigned stub_cuda_writable_imports(void)
{
	return writable_imports;
}

void stub_memory_reset(void)
{
	for (int i = 0; i < MOST; i++) {
		if (areas[i].kind == RESERVED || areas[i].kind == ALLOCATED || areas[i].kind == OPENED)
			munmap(areas[i].address - areas[i].skip, areas[i].bytes + areas[i].skip);
		areas[i].kind = FREE;
	}
	made = 0;
	writable_imports = 0;
}

int stub_is_opened(cuda_address address)
{
	for (int i = 0; i < MOST; i++)
		if (areas[i].kind == OPENED && address - (uintptr_t)areas[i].address < areas[i].bytes)
			return 1;
	return 0;
}

/* ---- physical memory ---- */

cuda_result cuMemGetInfo_v2(size_t *free_bytes, size_t *total)
{
	STUB_ENTER();
	*total = (size_t)stub_setting(STUB_MEMORY_BYTES);
	*free_bytes = *total - (size_t)made;
	return stub_leave(CUDA_OK);
}

cuda_result cuMemGetAllocationGranularity(size_t *bytes, const struct cuda_memory_properties *properties, int option)
{
	STUB_ENTER();
	(void)properties;
	(void)option;
	*bytes = GRANULE;
	return stub_leave(CUDA_OK);
}

cuda_result cuMemCreate(cuda_handle *handle, size_t bytes, const struct cuda_memory_properties *properties,
			uint64_t flags)
{
	cuda_result unsafe;

	STUB_ENTER();
	unsafe = stub_unsafe_call();
	if (unsafe)
		return stub_leave(unsafe);
	if (flags || bytes == 0 || bytes % GRANULE || properties->type != CUDA_PINNED ||
	    (properties->handle_types != CUDA_HANDLE_FD && properties->handle_types != CUDA_HANDLE_FABRIC))
		return stub_leave(STUB_INVALID_VALUE);
	if (properties->handle_types == CUDA_HANDLE_FABRIC && !stub_setting(STUB_CHANNEL))
		return stub_leave(CUDA_NOT_PERMITTED);
	if (!fits(bytes))
		return stub_leave(CUDA_NO_MEMORY);
	*handle = (uintptr_t)new_physical(new_file(bytes), bytes, 1);
	((struct physical *)(uintptr_t)*handle)->type = properties->handle_types;
	return stub_leave(CUDA_OK);
}

cuda_result cuMemRelease(cuda_handle handle)
{
	struct physical *physical = (struct physical *)(uintptr_t)handle;
	const cuda_result injected = stub_enter(__func__);

	physical->handles--;
	drop_physical(physical);
	return stub_leave(injected);
}

/* What a fabric handle holds: who has the memory, and where. It is of use as long as that process lives. */
struct shown {
	pid_t process;
	int fd;
};

cuda_result cuMemExportToShareableHandle(void *out, cuda_handle handle, int type, uint64_t flags)
{
	const struct physical *physical = (struct physical *)(uintptr_t)handle;
	const struct shown shown = {getpid(), physical->fd};

	STUB_ENTER();
	if (flags || type != physical->type)
		return stub_leave(STUB_INVALID_VALUE);
	if (type == CUDA_HANDLE_FD)
		*(int *)out = fcntl(physical->fd, F_DUPFD_CLOEXEC, 0);
	else
		memcpy(memset(out, 0, sizeof(struct cuda_fabric_handle)), &shown, sizeof shown);
	return stub_leave(CUDA_OK);
}

static int open_shown(const void *in)
{
	struct shown shown;
	char path[64];

	memcpy(&shown, in, sizeof shown);
	snprintf(path, sizeof path, "/proc/%ld/fd/%d", (long)shown.process, shown.fd);
	return open(path, O_RDWR | O_CLOEXEC);
}

cuda_result cuMemImportFromShareableHandle(cuda_handle *handle, void *in, int type)
{
	const int fd = type == CUDA_HANDLE_FD ? fcntl((int)(intptr_t)in, F_DUPFD_CLOEXEC, 0) : open_shown(in);
	struct stat found;

	STUB_ENTER();
	if (type == CUDA_HANDLE_FABRIC && !stub_setting(STUB_CHANNEL)) {
		close(fd);
		return stub_leave(CUDA_NOT_PERMITTED);
	}
	if (fd < 0 || fstat(fd, &found))
		return stub_leave(STUB_INVALID_HANDLE);
	*handle = (uintptr_t)new_physical(fd, (size_t)found.st_size, 0);
	((struct physical *)(uintptr_t)*handle)->type = type;
	return stub_leave(CUDA_OK);
}

/* ---- addresses ---- */

/* Addresses that begin at a granule; NULL: none. */
static char *reserve(size_t bytes)
{
	char *mapped = mmap(NULL, bytes + GRANULE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	const size_t whole = (bytes + 4095) & ~(size_t)4095;
	char *start;

	if (mapped == MAP_FAILED)
		return NULL;
	start = (char *)(((uintptr_t)mapped + GRANULE - 1) & ~(uintptr_t)(GRANULE - 1));
	if (start != mapped)
		munmap(mapped, (size_t)(start - mapped));
	if (mapped + bytes + GRANULE > start + whole)
		munmap(start + whole, (size_t)(mapped + bytes + GRANULE - (start + whole)));
	return start;
}

cuda_result cuMemAddressReserve(cuda_address *address, size_t bytes, size_t alignment, cuda_address wish,
				uint64_t flags)
{
	char *start;

	STUB_ENTER();
	if (bytes == 0 || bytes % GRANULE || alignment || wish || flags)
		return stub_leave(STUB_INVALID_VALUE);
	start = reserve(bytes);
	if (!start)
		return stub_leave(CUDA_NO_MEMORY);
	new_area(start, bytes, NULL, RESERVED);
	*address = (uintptr_t)start;
	return stub_leave(CUDA_OK);
}

cuda_result cuMemAddressFree(cuda_address address, size_t bytes)
{
	struct area *area;

	STUB_ENTER();
	area = area_at(address, RESERVED);
	if (!area || area->bytes != bytes)
		return stub_leave(STUB_INVALID_VALUE);
	for (int i = 0; i < MOST; i++)
		if (areas[i].kind == MAPPED && areas[i].address >= area->address &&
		    areas[i].address < area->address + bytes)
			return stub_leave(STUB_INVALID_VALUE);
	munmap(area->address, bytes);
	drop_area(area);
	return stub_leave(CUDA_OK);
}

static int is_reserved(const char *address, size_t bytes)
{
	for (int i = 0; i < MOST; i++)
		if (areas[i].kind == RESERVED && address >= areas[i].address &&
		    address + bytes <= areas[i].address + areas[i].bytes)
			return 1;
	return 0;
}

cuda_result cuMemMap(cuda_address address, size_t bytes, size_t offset, cuda_handle handle, uint64_t flags)
{
	struct physical *physical = (struct physical *)(uintptr_t)handle;
	char *at = (char *)(uintptr_t)address;

	STUB_ENTER();
	if (offset || flags || bytes != physical->bytes || address % GRANULE || !is_reserved(at, bytes) ||
	    area_at(address, MAPPED))
		return stub_leave(STUB_INVALID_VALUE);
	if (mmap(at, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, physical->fd, 0) == MAP_FAILED)
		abort();
	physical->mappings++;
	new_area(at, bytes, physical, MAPPED);
	return stub_leave(CUDA_OK);
}

cuda_result cuMemSetAccess(cuda_address address, size_t bytes, const struct cuda_access *access, size_t count)
{
	struct area *area;

	STUB_ENTER();
	area = area_at(address, MAPPED);
	if (!area || area->bytes != bytes || count != 1)
		return stub_leave(STUB_INVALID_VALUE);
	if (access->flags == CUDA_CAN_READ && !stub_setting(STUB_READ_ONLY))
		return stub_leave(CUDA_UNSUPPORTED);
	if (mprotect(area->address, bytes, access->flags == CUDA_CAN_READ ? PROT_READ : PROT_READ | PROT_WRITE))
		abort();
	writable_imports += !area->physical->made_here && access->flags != CUDA_CAN_READ;
	return stub_leave(CUDA_OK);
}

cuda_result cuMemUnmap(cuda_address address, size_t bytes)
{
	struct area *area;

	STUB_ENTER();
	area = area_at(address, MAPPED);
	if (!area || area->bytes != bytes)
		return stub_leave(STUB_INVALID_VALUE);
	if (mmap(area->address, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) ==
	    MAP_FAILED)
		abort();
	area->physical->mappings--;
	drop_physical(area->physical);
	drop_area(area);
	return stub_leave(CUDA_OK);
}

/* ---- allocations, and the legacy way to share them ---- */

static cuda_address map_whole(struct physical *physical, size_t skip, enum area_kind kind)
{
	char *mapped = reserve(physical->bytes + skip);

	if (!mapped || mmap(mapped, physical->bytes + skip, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
			    physical->fd, 0) == MAP_FAILED)
		abort();
	physical->handles--; /* the mapping holds it */
	physical->mappings++;
	new_area(mapped + skip, physical->bytes, physical, kind)->skip = skip;
	return (uintptr_t)(mapped + skip);
}

static cuda_result unmap_whole(cuda_address address, enum area_kind kind)
{
	struct area *area = area_at(address, kind);

	if (!area)
		return STUB_INVALID_VALUE;
	munmap(area->address - area->skip, area->bytes + area->skip);
	area->physical->mappings--;
	drop_physical(area->physical);
	drop_area(area);
	return CUDA_OK;
}

/* As the driver's: whole granules begin at one, anything else anywhere in a granule. */
cuda_result cuMemAlloc_v2(cuda_address *address, size_t bytes)
{
	static size_t turn;
	size_t skip;
	cuda_result unsafe;

	STUB_ENTER();
	skip = (bytes % GRANULE ? STEP * (1 + turn++ % 7) : 0) + (size_t)stub_setting(STUB_CROOKED);
	unsafe = stub_unsafe_call();
	if (unsafe || bytes == 0)
		return stub_leave(unsafe ? unsafe : STUB_INVALID_VALUE);
	if (!fits(bytes))
		return stub_leave(CUDA_NO_MEMORY);
	*address = map_whole(new_physical(new_file(bytes + skip), bytes, 1), skip, ALLOCATED);
	return stub_leave(CUDA_OK);
}

cuda_result cuMemFree_v2(cuda_address address)
{
	STUB_ENTER();
	return stub_leave(unmap_whole(address, ALLOCATED));
}

static const struct area *area_around(cuda_address address)
{
	for (int i = 0; i < MOST; i++)
		if ((areas[i].kind == MAPPED || areas[i].kind == ALLOCATED || areas[i].kind == OPENED) &&
		    address - (uintptr_t)areas[i].address < areas[i].bytes)
			return &areas[i];
	return NULL;
}

cuda_result cuMemGetAddressRange_v2(cuda_address *base, size_t *bytes, cuda_address address)
{
	const struct area *area;

	STUB_ENTER();
	area = area_around(address);
	if (!area)
		return stub_leave(STUB_INVALID_VALUE);
	*base = (uintptr_t)area->address;
	*bytes = area->bytes;
	return stub_leave(CUDA_OK);
}

cuda_result cuPointerGetAttribute(void *value, int attribute, cuda_address address)
{
	const struct area *area;

	STUB_ENTER();
	area = area_around(address);
	if (!area)
		return stub_leave(STUB_INVALID_VALUE);
	if (attribute == CUDA_MEMORY_KIND)
		*(uint32_t *)value = CUDA_KIND_DEVICE;
	else
		*(int *)value = area->device;
	return stub_leave(CUDA_OK);
}

struct legacy {
	pid_t process;
	int fd;
	size_t bytes;
	size_t skip;
};

cuda_result cuIpcGetMemHandle(struct cuda_ipc *handle, cuda_address address)
{
	struct legacy legacy = {getpid(), -1, 0, 0};
	struct area *area;

	STUB_ENTER();
	area = area_at(address, ALLOCATED);
	if (!area)
		return stub_leave(STUB_INVALID_VALUE);
	legacy.fd = area->physical->fd;
	legacy.bytes = area->bytes;
	legacy.skip = area->skip;
	memcpy(handle, &legacy, sizeof legacy);
	return stub_leave(CUDA_OK);
}

cuda_result cuIpcOpenMemHandle_v2(cuda_address *address, struct cuda_ipc handle, unsigned flags)
{
	struct legacy legacy;
	char path[64];
	int fd;

	STUB_ENTER();
	memcpy(&legacy, &handle, sizeof legacy);
	snprintf(path, sizeof path, "/proc/%ld/fd/%d", (long)legacy.process, legacy.fd);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0 || flags != CUDA_IPC_ENABLE_PEER || legacy.process == getpid())
		return stub_leave(STUB_INVALID_CONTEXT);
	*address = map_whole(new_physical(fd, legacy.bytes, 0), legacy.skip, OPENED);
	return stub_leave(CUDA_OK);
}

cuda_result cuIpcCloseMemHandle(cuda_address address)
{
	STUB_ENTER();
	return stub_leave(unmap_whole(address, OPENED));
}
