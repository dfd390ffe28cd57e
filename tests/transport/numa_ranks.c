/* SPDX-License-Identifier: Apache-2.0
 *
 * numa_ranks.c - see numa_ranks.h.
 */
#include "numa_ranks.h"
#include "clock.h"
#include "control.h"
#include "memfd.h"

#include <layershard/transport.h>

#include <errno.h>
#include <linux/mempolicy.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- A machine of two nodes ------------------------------------------------------------------------------------ */

struct machine machine;

uint64_t count_pages(void *memory, uint64_t bytes)
{
	static unsigned char there[1 << 16];
	uint64_t count = 0;

	if (mincore(memory, bytes, there))
		return UINT64_MAX;
	for (uint64_t page = 0; page < bytes / 4096; page++)
		count += there[page] & 1;
	return count;
}

static long place(void *memory, uint64_t bytes, int mode, const unsigned long *nodes)
{
	if (machine.n_placed < sizeof machine.placed / sizeof *machine.placed)
		machine.placed[machine.n_placed++] = (struct placed){bytes, mode, nodes[0], count_pages(memory, bytes)};
	return 0;
}

/* Each page where the last call wished it, or on the first node. */
static long tell_nodes(unsigned long count, int *nodes)
{
	const struct placed *last = &machine.placed[machine.n_placed ? machine.n_placed - 1 : 0];

	for (unsigned long i = 0; i < count; i++)
		nodes[i] = machine.full_of ? 0 : last->mode == MPOL_INTERLEAVE ? (int)(i % 2) : last->nodes == 2;
	return 0;
}

/* More must not be read than were given. */
static int count_arguments(long number)
{
	return number == SYS_mbind || number == SYS_move_pages       ? 6
	       : number == SYS_get_mempolicy                         ? 5
	       : number == SYS_getcpu || number == SYS_set_mempolicy ? 3
								     : 2; /* pidfd_open has no more */
}

long __wrap_syscall(long number, ...);
long __wrap_syscall(long number, ...)
{
	long a[6] = {0};
	va_list arguments;

	va_start(arguments, number);
	for (int i = 0; i < count_arguments(number); i++)
		a[i] = va_arg(arguments, long);
	va_end(arguments);
	if (!machine.nodes)
		return __real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	if (machine.forbidden &&
	    (number == SYS_mbind || number == SYS_get_mempolicy || (number == SYS_move_pages && !machine.full_of))) {
		errno = EPERM;
		return -1;
	}
	switch (number) {
	case SYS_getcpu:
		*(unsigned *)a[1] = machine.here;
		return 0;
	case SYS_mbind:
		return place((void *)a[0], (uint64_t)a[1], (int)a[2], (const unsigned long *)a[3]);
	case SYS_move_pages:
		return tell_nodes((unsigned long)a[1], (int *)a[4]);
	case SYS_get_mempolicy:
		machine.policies++;
		*(int *)a[0] = MPOL_LOCAL;
		return 0;
	case SYS_set_mempolicy:
		machine.policies++;
		machine.policy = (int)a[0];
		return 0;
	default:
		return __real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	}
}

static FILE *open_text(const char *text)
{
	return fmemopen((void *)text, strlen(text), "r");
}

FILE *__real_fopen(const char *path, const char *mode);
FILE *__wrap_fopen(const char *path, const char *mode);
FILE *__wrap_fopen(const char *path, const char *mode)
{
	static const char node[] = "/sys/devices/system/node/";
	const char *name = path + strlen(node);

	if (!machine.nodes)
		return __real_fopen(path, mode);
	if (!strcmp(path, "/proc/self/status"))
		return open_text(machine.nodes == 2 ? "Name:\tit\nMems_allowed_list:\t0-1,5\n"
						    : "Mems_allowed_list:\t0\n");
	if (strncmp(path, node, strlen(node)) != 0)
		return __real_fopen(path, mode);
	if (!strcmp(name, "online"))
		return open_text("0-1,5\n");
	if (!strcmp(name, "has_cpu")) /* the last one is a GPU's memory */
		return open_text("0-1\n");
	if (!strcmp(name, "has_memory"))
		return open_text("0-1,5\n");
	if (!strcmp(name, "node5/distance"))
		return open_text("32 17 10\n");
	if (!strcmp(name, "node1/cpulist"))
		return open_text("2-3\n");
	if (!strcmp(name, "node1/meminfo"))
		return open_text("Node 1 MemTotal:       2048 kB\nNode 1 MemFree:        1024 kB\n");
	return NULL;
}

int __wrap_lshard__memfd_create_reserved(const char *name, uint64_t page_bytes);
int __wrap_lshard__memfd_create_reserved(const char *name, uint64_t page_bytes)
{
	(void)page_bytes;
	errno = ENOMEM;
	return machine.reserves ? lshard__memfd_create(name) : -1;
}

int __real_fallocate(int fd, int mode, off_t offset, off_t length);
int __wrap_fallocate(int fd, int mode, off_t offset, off_t length);
int __wrap_fallocate(int fd, int mode, off_t offset, off_t length)
{
	machine.filled_by = machine.policy;
	return __real_fallocate(fd, mode, offset, length);
}

lshard_status __real_shm_refresh(lshard_store *store, uint64_t *bytes);
lshard_status __wrap_shm_refresh(lshard_store *store, uint64_t *bytes);
lshard_status __wrap_shm_refresh(lshard_store *store, uint64_t *bytes)
{
	lshard_status status;

	if (machine.dies_copying)
		raise(SIGKILL);
	machine.copying = true;
	status = __real_shm_refresh(store, bytes);
	machine.copying = false;
	return status;
}

lshard_status __real_control_exchange(struct control *control, const void *send, void *receive, size_t bytes,
				      uint8_t *alive, uint64_t *round, uint64_t deadline);
lshard_status __wrap_control_exchange(struct control *control, const void *send, void *receive, size_t bytes,
				      uint8_t *alive, uint64_t *round, uint64_t deadline);
lshard_status __wrap_control_exchange(struct control *control, const void *send, void *receive, size_t bytes,
				      uint8_t *alive, uint64_t *round, uint64_t deadline)
{
	if (machine.copying)
		machine.waits_ns = deadline - lshard__now_ns();
	return __real_control_exchange(control, send, receive, bytes, alive, round, deadline);
}

void run_on(uint32_t node)
{
	machine = (struct machine){.nodes = 2, .here = node, .policy = MPOL_LOCAL, .filled_by = -1};
}

/* ---- A rank ---------------------------------------------------------------------------------------------------- */

const struct wish plain = {.transport = "shm",
			   .numa = LSHARD_NUMA_COPY,
			   .large_pages = LSHARD_LARGE_PAGES_NEVER,
			   .layer_bytes = LAYER_BYTES,
			   .layers = LAYERS,
			   .dies = -1,
			   .dies_late = -1};

static void keep_log(void *user, lshard_log_level level, const char *text)
{
	struct rank *rank = user;
	const size_t used = strlen(rank->log);

	(void)level;
	snprintf(rank->log + used, sizeof rank->log - used, "%s\n", text);
}

static unsigned char byte_of(uint64_t generation, uint32_t layer, uint64_t offset)
{
	return (unsigned char)(generation * 101 + layer * 31 + offset / 4096 * 7 + offset % 251);
}

static int fill_layer(void *user, uint32_t layer, void *const *tensors)
{
	const struct rank *rank = user;

	for (uint64_t offset = 0; offset < rank->wish->layer_bytes; offset++)
		((unsigned char *)tensors[0])[offset] = byte_of(rank->generation, layer, offset);
	return 0;
}

lshard_status join(struct rank *rank, lshard_numa numa)
{
	lshard_group_options options = member_options(rank->member, rank->wish->transport, TIMEOUT_MS);

	options.numa = numa;
	options.large_pages = rank->wish->large_pages;
	options.log = keep_log;
	options.log_user = rank;
	options.error = rank->error;
	options.error_bytes = sizeof rank->error;
	return lshard_group_create(&options, &rank->group);
}

lshard_status create_series(struct rank *rank)
{
	const lshard_tensor tensor = {"w", rank->wish->layer_bytes, 0, LSHARD_STRIPE_BYTES, 0, 0};
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;

	options.name = "near";
	options.layer_count = rank->wish->layers;
	options.tensors = &tensor;
	options.tensor_count = 1;
	options.placement = rank->wish->placement;
	options.poison = rank->wish->poison;
	options.resident_bytes = rank->wish->resident_bytes;
	return lshard_series_create(rank->group, &options, &rank->series);
}

lshard_status open_series(struct rank *rank)
{
	const lshard_status status = create_series(rank);

	return status < 0 ? status : lshard_series_commit(rank->series, fill_layer, rank);
}

bool enter(struct rank *rank)
{
	lshard_status status = join(rank, rank->wish->numa);

	if (status != LSHARD_OK)
		return false;
	status = open_series(rank);
	if (status != LSHARD_OK)
		snprintf(rank->error, sizeof rank->error, "%s", lshard_group_error(rank->group));
	return status == LSHARD_OK;
}

void *look_at(struct rank *rank, uint32_t layer)
{
	void *address = NULL;

	return lshard_reach(rank->series, layer, NULL) || lshard_wait(rank->series, layer, NULL) ||
			       lshard_series_address(rank->series, layer, 0, &address)
		       ? NULL
		       : address;
}

bool pass_is_right(struct rank *rank)
{
	for (uint32_t layer = 0; layer < rank->wish->layers; layer++) {
		const unsigned char *bytes = look_at(rank, layer);

		for (uint64_t offset = 0; offset < rank->wish->layer_bytes; offset += 13)
			if (!bytes || bytes[offset] != byte_of(rank->generation, layer, offset))
				return false;
	}
	return true;
}

lshard_status update(struct rank *rank)
{
	lshard_status status = lshard_series_update_begin(rank->series);

	rank->generation += status == LSHARD_OK;
	return status < 0 ? status : lshard_series_update_end(rank->series, fill_layer, rank);
}

void leave(struct rank *rank)
{
	lshard_series_destroy(rank->series);
	lshard_group_destroy(rank->group);
	rank->series = NULL;
	rank->group = NULL;
}

/* ---- The kernel's word ----------------------------------------------------------------------------------------- */

uint64_t inode_at(const void *address, char *rights)
{
	FILE *file = __real_fopen("/proc/self/maps", "re");
	unsigned long long begin, end, inode, found = 0;
	char line[512];

	while (file && !found && fgets(line, sizeof line, file))
		if (sscanf(line, "%llx-%llx %4s %*s %*s %llu", &begin, &end, rights, &inode) == 4 &&
		    begin <= (uintptr_t)address && (uintptr_t)address < end)
			found = inode;
	if (file)
		(void)fclose(file);
	return found;
}

bool is_writable(const void *address)
{
	char rights[5];

	return inode_at(address, rights) != 0 && rights[1] == 'w';
}

uint64_t part_of(const char *name, unsigned *mappings)
{
	FILE *file = __real_fopen("/proc/self/smaps", "re");
	unsigned long long begin, end, kib, sum = 0;
	bool within = false;
	char line[512];

	*mappings = 0;
	while (file && fgets(line, sizeof line, file)) {
		if (sscanf(line, "%llx-%llx ", &begin, &end) == 2) {
			within = strstr(line, name) != NULL;
			*mappings += within;
		} else if (within && sscanf(line, "Pss: %llu kB", &kib) == 1)
			sum += kib;
	}
	if (file)
		(void)fclose(file);
	return sum;
}
