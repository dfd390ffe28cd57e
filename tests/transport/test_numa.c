/* SPDX-License-Identifier: Apache-2.0
 *
 * test_numa.c - on which NUMA nodes shards come, and one copy of them a node, on a feigned machine of two nodes: what
 * the system says of nodes, on which a rank runs, and the calls that place memory. Which node a page is on nobody sees
 * here; which memory ranks read, how much there is of it and whose bytes it holds is the kernel's word.
 */
#include "memfd.h"
#include "clock.h"
#include "control.h"
#include "large_pages.h"
#include "numa.h"
#include "outside.h"
#include "threads.h"

#include <layershard/plan.h>
#include <layershard/transport.h>

#include <errno.h>
#include <linux/mempolicy.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

#define RANKS       4 /* 0 and 1 on the first node, 2 and 3 on the second */
#define LAYERS      6u
#define LAYER_BYTES UINT64_C(65536)
#define TIMEOUT_MS  30000

/* ---- A machine of two nodes ------------------------------------------------------------------------------------ */

/* A call that places memory, and how many pages were there before it. */
struct placed {
	uint64_t bytes;
	int mode;
	unsigned long nodes;
	uint64_t pages_there;
};

static struct machine {
	uint32_t nodes;   /* 0: as it is */
	uint32_t here;    /* on which this process runs */
	bool forbidden;   /* the calls that place memory */
	uint32_t full_of; /* 1: the second node has no memory left */
	struct placed placed[32];
	unsigned n_placed;
	unsigned policies; /* calls about the thread's own */
	int policy;        /* which was set last */
	bool reserves;     /* large pages are reserved: as far as can be seen here, small ones are */
	int filled_by;     /* the thread's policy while reserved pages were made; -1: none were */
	bool dies_copying;
	bool copying;
	uint64_t waits_ns; /* at most, for who copies */
} machine;

static uint64_t count_pages(void *memory, uint64_t bytes)
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

long __real_syscall(long number, ...);
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

static void run_on(uint32_t node)
{
	machine = (struct machine){.nodes = 2, .here = node, .policy = MPOL_LOCAL, .filled_by = -1};
}

/* ---- A rank ---------------------------------------------------------------------------------------------------- */

/* What ranks tell each other, in memory of all. */
struct noted {
	uint64_t inode[RANKS][LAYERS]; /* of the memory that a rank reads a layer in */
	uint64_t copied[RANKS];
	uint64_t kib[RANKS]; /* each rank's part of the pages of the series */
};

struct wish {
	const char *transport;
	lshard_numa numa;
	lshard_placement placement;
	lshard_poison poison;
	uint64_t resident_bytes;
	lshard_large_pages large_pages;
	uint64_t layer_bytes;
	uint32_t layers;
	bool alone;        /* rank 0 on its node; else two ranks are on each */
	int32_t dies;      /* this rank, after commit; -1: none */
	int32_t dies_late; /* this one, while it copies in an update */
	struct noted *noted;
};

static const struct wish plain = {.transport = "shm",
				  .numa = LSHARD_NUMA_COPY,
				  .large_pages = LSHARD_LARGE_PAGES_NEVER,
				  .layer_bytes = LAYER_BYTES,
				  .layers = LAYERS,
				  .dies = -1,
				  .dies_late = -1};

struct rank {
	const struct member *member;
	const struct wish *wish;
	uint64_t generation;
	lshard_group *group;
	lshard_series *series;
	char log[4096];
	char error[512];
};

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

static lshard_status join(struct rank *rank, lshard_numa numa)
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

static lshard_status create_series(struct rank *rank)
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

static lshard_status open_series(struct rank *rank)
{
	const lshard_status status = create_series(rank);

	return status < 0 ? status : lshard_series_commit(rank->series, fill_layer, rank);
}

static void *look_at(struct rank *rank, uint32_t layer)
{
	void *address = NULL;

	return lshard_reach(rank->series, layer, NULL) || lshard_wait(rank->series, layer, NULL) ||
			       lshard_series_address(rank->series, layer, 0, &address)
		       ? NULL
		       : address;
}

static bool pass_is_right(struct rank *rank)
{
	for (uint32_t layer = 0; layer < rank->wish->layers; layer++) {
		const unsigned char *bytes = look_at(rank, layer);

		for (uint64_t offset = 0; offset < rank->wish->layer_bytes; offset += 13)
			if (!bytes || bytes[offset] != byte_of(rank->generation, layer, offset))
				return false;
	}
	return true;
}

static lshard_status update(struct rank *rank)
{
	lshard_status status = lshard_series_update_begin(rank->series);

	rank->generation += status == LSHARD_OK;
	return status < 0 ? status : lshard_series_update_end(rank->series, fill_layer, rank);
}

static void leave(struct rank *rank)
{
	lshard_series_destroy(rank->series);
	lshard_group_destroy(rank->group);
	rank->series = NULL;
	rank->group = NULL;
}

/* ---- The kernel's word ----------------------------------------------------------------------------------------- */

/* Where the memory at @p address is mapped from, and how ("r--s"). */
static uint64_t inode_at(const void *address, char *rights)
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

static bool is_writable(const void *address)
{
	char rights[5];

	return inode_at(address, rights) != 0 && rights[1] == 'w';
}

/* This process's part of what is mapped by that name, and how many mappings there are. */
static uint64_t part_of(const char *name, unsigned *mappings)
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

/* ---- One copy a node ------------------------------------------------------------------------------------------- */

static void note(struct rank *rank)
{
	struct noted *noted = rank->wish->noted;
	lshard_stats stats = LSHARD_STATS_INIT;
	const int32_t own = rank->member->rank;
	unsigned mappings;
	char rights[5];

	for (uint32_t layer = 0; layer < rank->wish->layers; layer++)
		noted->inode[own][layer] = inode_at(look_at(rank, layer), rights);
	(void)lshard_series_stats(rank->series, &stats);
	noted->copied[own] = stats.numa_copy_bytes;
	noted->kib[own] = part_of("layershard:near", &mappings);
}

static bool reads_near(const struct noted *noted, uint32_t layer)
{
	const uint64_t (*inode)[LAYERS] = noted->inode;

	return inode[0][layer] && inode[0][layer] == inode[1][layer] && inode[2][layer] == inode[3][layer] &&
	       inode[0][layer] != inode[2][layer];
}

/* In place: ranks of a node read the same memory, those of the other node other memory, and it is there once a node. */
static int has_one_copy_a_node(const struct member *member)
{
	const struct wish *wish = member->user;
	const uint64_t all = wish->layers * wish->layer_bytes;
	struct rank rank = {.member = member, .wish = wish};
	uint64_t copied = 0, kib = 0;
	int failed = 1;

	run_on((uint32_t)member->rank / 2);
	EXPECT(member, join(&rank, wish->numa) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, open_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	note(&rank);
	EXPECT(member, team_barrier(member), "a rank is gone");
	for (int32_t other = 0; other < RANKS; other++) {
		copied += wish->noted->copied[other];
		kib += wish->noted->kib[other];
	}
	for (uint32_t layer = 0; wish->placement == LSHARD_WHOLE && layer < wish->layers; layer++)
		EXPECT(member, reads_near(wish->noted, layer), "layer %u", layer);
	EXPECT(member, copied == all, "%llu bytes are copied", (unsigned long long)copied);
	/* The kernel rounds what it tells of each mapping. */
	EXPECT(member, kib * 1024 > 2 * all - all / 8 && kib * 1024 < 2 * all + all / 8, "%llu KiB",
	       (unsigned long long)kib);
	SAYS(member, rank.log, member->rank < 2 ? "is copied to node 0, for 0 1" : "is copied to node 1, for 2 3");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

/* Memory that the processes of a test write to. */
static struct noted *note_book(void)
{
	void *book = mmap(NULL, sizeof(struct noted), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	assert_ptr_not_equal(book, MAP_FAILED);
	return book;
}

static void ranks_of_a_node_share_one_copy(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.noted = note_book();
	assert_int_equal(team_of_processes(RANKS, has_one_copy_a_node, &wish), 0);
	wish.placement = LSHARD_STRIPED;
	assert_int_equal(team_of_processes(RANKS, has_one_copy_a_node, &wish), 0);
	munmap(wish.noted, sizeof *wish.noted);
}

/* ---- Right bytes, whatever happens ----------------------------------------------------------------------------- */

/* In place layers begin at a page where their shard does, at a large one where it is as large; copies do too. */
static bool layers_are_aligned(struct rank *rank)
{
	const struct wish *wish = rank->wish;
	const uint64_t large = wish->large_pages == LSHARD_LARGE_PAGES_NEVER ? 0 : lshard__large_page_bytes();
	const uint64_t page = large && wish->layer_bytes >= large ? large : 4096;

	for (uint32_t layer = 0; layer < RANKS && layer < wish->layers && wish->placement == LSHARD_WHOLE; layer++)
		if ((uintptr_t)look_at(rank, layer) % page != 0)
			return false;
	return true;
}

static int reads_what_was_loaded(const struct member *member)
{
	const struct wish *wish = member->user;
	struct rank rank = {.member = member, .wish = wish};
	const int fds = count_fds();
	unsigned mappings;
	int failed = 1;

	run_on(wish->alone ? member->rank > 0 : (uint32_t)member->rank / 2);
	EXPECT(member, join(&rank, wish->numa) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, open_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	EXPECT(member, layers_are_aligned(&rank), "a layer");
	for (int turn = 0; turn < 3; turn++) {
		EXPECT(member, pass_is_right(&rank) && pass_is_right(&rank), "a byte, in turn %d", turn);
		EXPECT(member, lshard_series_verify(rank.series, NULL) == LSHARD_OK, "%s",
		       lshard_series_error(rank.series));
		EXPECT(member, update(&rank) == LSHARD_OK, "%s", lshard_series_error(rank.series));
	}
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	leave(&rank);
	part_of("layershard:near", &mappings);
	EXPECT(member, mappings == 0 && count_fds() == fds, "%u mappings and %d descriptors are left", mappings,
	       count_fds() - fds);
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void copies_hold_the_bytes_also_after_updates(void **state)
{
	struct wish wish = plain;

	(void)state;
	for (int placement = LSHARD_WHOLE; placement <= LSHARD_STRIPED; placement++) {
		wish.placement = (lshard_placement)placement;
		wish.transport = "shm";
		assert_int_equal(team_of_processes(RANKS, reads_what_was_loaded, &wish), 0);
		wish.transport = "throttle=1e12,shm:copy";
		wish.poison = LSHARD_POISON_ON;
		wish.resident_bytes = 2 * LAYER_BYTES;
		assert_int_equal(team_of_processes(RANKS, reads_what_was_loaded, &wish), 0);
		wish.poison = LSHARD_POISON_OFF;
		wish.resident_bytes = 0;
	}
}

/* ---- Whose memory it is ---------------------------------------------------------------------------------------- */

/* Rank 3, which makes the copy of layer 1, has it made writable and writes to it; rank 2 sees that, and may not. */
static int sees_what_is_wrong_with_a_copy(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	lshard_status status;
	unsigned char *bytes;
	int failed = 1;

	run_on((uint32_t)member->rank / 2);
	EXPECT(member, join(&rank, rank.wish->numa) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, open_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	bytes = look_at(&rank, 1);
	EXPECT(member, is_writable(bytes) == (member->rank == 1), "another rank's layer is");
	if (member->rank == 3) {
		EXPECT(member, mprotect(bytes, 4096, PROT_READ | PROT_WRITE) == 0, "mprotect");
		bytes[13 * 8] ^= 1; /* where passes look */
	} else {
		EXPECT(member, mprotect(bytes, 4096, PROT_READ | PROT_WRITE) != 0 || member->rank == 1, "writable");
	}
	EXPECT(member, team_barrier(member), "a rank is gone");
	EXPECT(member, pass_is_right(&rank) == (member->rank < 2), "a byte");
	status = lshard_series_verify(rank.series, NULL);
	EXPECT(member, status == (member->rank < 2 ? LSHARD_OK : LSHARD_ERR_CORRUPT), "%s", lshard_status_name(status));
	if (member->rank >= 2)
		SAYS(member, lshard_series_error(rank.series), "layer 1 is not what rank 1 stores");
	EXPECT(member, update(&rank) == LSHARD_OK, "%s", lshard_series_error(rank.series));
	EXPECT(member, pass_is_right(&rank), "a byte after the update");
	EXPECT(member, is_writable(bytes) == (member->rank == 1), "after the update another rank's layer is");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void verify_looks_at_copies_and_no_program_writes_them(void **state)
{
	struct wish wish = plain;

	(void)state;
	assert_int_equal(team_of_processes(RANKS, sees_what_is_wrong_with_a_copy, &wish), 0);
}

/* Rank 0 has room for what it makes itself and for one descriptor more; nobody waits until the time is up. */
static int has_no_room(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	int room[3] = {-1, -1, -1}, failed = 1;
	struct rlimit before, small;
	struct timespec begin, end;

	run_on((uint32_t)member->rank / 2);
	EXPECT(member, join(&rank, rank.wish->numa) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, getrlimit(RLIMIT_NOFILE, &before) == 0, "getrlimit");
	for (int i = 0; i < 3; i++)
		room[i] = dup(STDERR_FILENO);
	small = before;
	small.rlim_cur = (rlim_t)room[2] + 1;
	for (int i = 0; i < 3; i++)
		EXPECT(member, room[i] >= 0 && close(room[i]) == 0, "dup");
	EXPECT(member, setrlimit(RLIMIT_NOFILE, member->rank == 0 ? &small : &before) == 0, "setrlimit");
	clock_gettime(CLOCK_MONOTONIC, &begin);
	EXPECT(member, open_series(&rank) == LSHARD_ERR_SYSTEM, "%s", lshard_group_error(rank.group));
	clock_gettime(CLOCK_MONOTONIC, &end);
	EXPECT(member, setrlimit(RLIMIT_NOFILE, &before) == 0, "setrlimit");
	SAYS(member, lshard_group_error(rank.group), "no room for the descriptor that rank ");
	EXPECT(member, end.tv_sec - begin.tv_sec < TIMEOUT_MS / 2000, "%d s", (int)(end.tv_sec - begin.tv_sec));
	EXPECT(member, open_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void a_rank_without_room_for_descriptors_keeps_nobody_waiting(void **state)
{
	struct wish wish = plain;

	(void)state;
	assert_int_equal(team_of_processes(RANKS, has_no_room, &wish), 0);
}

/* Fewer layers than ranks, and a node whose ranks store none. */
static void ranks_that_store_nothing_keep_copies(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.layers = 2;
	assert_int_equal(team_of_processes(RANKS, reads_what_was_loaded, &wish), 0);
}

/* What three ranks store lies one behind the other in what the fourth copies, and is of no whole pages. */
static void a_rank_that_is_alone_copies_all_shards_of_others(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.alone = true;
	for (int large = 0; large < 2; large++) {
		wish.large_pages = large ? LSHARD_LARGE_PAGES_AUTO : LSHARD_LARGE_PAGES_NEVER;
		wish.layer_bytes = (large ? UINT64_C(2) << 20 : LAYER_BYTES) + 100;
		wish.placement = LSHARD_WHOLE;
		assert_int_equal(team_of_processes(RANKS, reads_what_was_loaded, &wish), 0);
		wish.placement = LSHARD_STRIPED;
		assert_int_equal(team_of_processes(RANKS, reads_what_was_loaded, &wish), 0);
	}
}

static void copies_are_in_large_pages_too(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.large_pages = LSHARD_LARGE_PAGES_AUTO;
	wish.layer_bytes = UINT64_C(3) << 20;
	wish.layers = 5;
	assert_int_equal(team_of_processes(RANKS, reads_what_was_loaded, &wish), 0);
}

/* 128 MiB of series, and a shard of 32: more than half a second. */
static int waits_for_copies(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	int failed = 1;

	run_on((uint32_t)member->rank / 2);
	EXPECT(member, join(&rank, rank.wish->numa) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, open_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	EXPECT(member, machine.waits_ns > (TIMEOUT_MS + 300) * UINT64_C(1000000), "%llu ns",
	       (unsigned long long)machine.waits_ns);
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void ranks_wait_longer_for_large_copies(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.layer_bytes = UINT64_C(16) << 20;
	wish.layers = 8;
	assert_int_equal(team_of_processes(RANKS, waits_for_copies, &wish), 0);
}

/* ---- Ranks that die -------------------------------------------------------------------------------------------- */

static int outlives_another(const struct member *member)
{
	const struct wish *wish = member->user;
	struct rank rank = {.member = member, .wish = wish};
	const int32_t dead = wish->dies >= 0 ? wish->dies : wish->dies_late;
	char named[32];
	int failed = 1;

	run_on((uint32_t)member->rank / 2);
	EXPECT(member, join(&rank, wish->numa) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, open_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	EXPECT(member, team_barrier(member), "a rank is gone");
	if (member->rank == dead)
		team_dies(member);
	if (member->rank == wish->dies)
		raise(SIGKILL);
	machine.dies_copying = member->rank == wish->dies_late;
	EXPECT(member, pass_is_right(&rank) && pass_is_right(&rank), "a byte");
	snprintf(named, sizeof named, "rank %d is gone", (int)dead);
	EXPECT(member, update(&rank) == LSHARD_ERR_PEER_FAILED, "%s", lshard_series_error(rank.series));
	SAYS(member, lshard_series_error(rank.series), named);
	if (wish->dies >= 0) /* before anything was written */
		EXPECT(member, pass_is_right(&rank), "a byte after the refused update");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void readers_outlive_sources_and_makers_of_copies(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.dies = 0; /* a source, and it has copied for its node */
	assert_int_equal(team_of_processes(RANKS, outlives_another, &wish), 0);
	wish.layers = 2;
	wish.dies = 3; /* stores nothing: without copies the update would do without it */
	assert_int_equal(team_of_processes(RANKS, outlives_another, &wish), 0);
}

static void a_rank_that_dies_while_it_copies_is_named(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.layers = 2;
	wish.dies_late = 3;
	assert_int_equal(team_of_processes(RANKS, outlives_another, &wish), 0);
}

/* ---- Where memory is asked for --------------------------------------------------------------------------------- */

static int asks_for_its_node(const struct member *member)
{
	const struct wish *wish = member->user;
	const int mode = wish->numa == LSHARD_NUMA_INTERLEAVE ? MPOL_INTERLEAVE : MPOL_PREFERRED;
	const unsigned long nodes = wish->numa == LSHARD_NUMA_INTERLEAVE ? 3 : 1ul << member->rank / 2;
	const unsigned shared = wish->numa == LSHARD_NUMA_COPY ? 2 : 1; /* shards, and copies */
	struct rank rank = {.member = member, .wish = wish};
	int failed = 1;

	run_on((uint32_t)member->rank / 2);
	EXPECT(member, join(&rank, wish->numa) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, open_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	EXPECT(member, machine.n_placed == shared, "%u calls", machine.n_placed);
	for (unsigned i = 0; i < machine.n_placed; i++) {
		const struct placed *placed = &machine.placed[i];

		EXPECT(member, placed->mode == mode && placed->nodes == nodes, "%d %lu", placed->mode, placed->nodes);
		EXPECT(member, placed->pages_there == 0, "%llu pages", (unsigned long long)placed->pages_there);
		EXPECT(member, placed->bytes >= wish->layer_bytes, "%llu", (unsigned long long)placed->bytes);
	}
	EXPECT(member, pass_is_right(&rank), "a byte");
	SAYS(member, rank.log, member->rank < 2 ? "runs on node 0; it may use 2 nodes" : "runs on node 1");
	EXPECT(member, !strstr(rank.log, "lie where"), "%s", rank.log);
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void nodes_are_asked_for_before_any_page_is_there(void **state)
{
	static const lshard_numa all[] = {LSHARD_NUMA_INTERLEAVE, LSHARD_NUMA_SOURCE, LSHARD_NUMA_COPY};
	struct wish wish = plain;

	(void)state;
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
		wish.numa = all[i];
		wish.transport = "shm:copy";
		wish.large_pages = LSHARD_LARGE_PAGES_NEVER;
		wish.layer_bytes = LAYER_BYTES;
		assert_int_equal(team_of_processes(RANKS, asks_for_its_node, &wish), 0);
		wish.transport = "shm";
		wish.large_pages = LSHARD_LARGE_PAGES_AUTO;
		wish.layer_bytes = UINT64_C(4) << 20;
		assert_int_equal(team_of_processes(RANKS, asks_for_its_node, &wish), 0);
	}
}

/* The system makes reserved pages by the policy of the thread that asks for them, which then has its own again. */
static int asks_for_reserved_pages(const struct member *member)
{
	const struct wish *wish = member->user;
	struct rank rank = {.member = member, .wish = wish};
	int failed = 1;

	run_on((uint32_t)member->rank);
	machine.reserves = true;
	EXPECT(member, join(&rank, wish->numa) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, open_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	EXPECT(member, machine.filled_by == (wish->numa == LSHARD_NUMA_INTERLEAVE ? MPOL_INTERLEAVE : MPOL_PREFERRED),
	       "%d", machine.filled_by);
	EXPECT(member, machine.policy == MPOL_LOCAL, "%d", machine.policy);
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void reserved_pages_are_asked_for_by_node(void **state)
{
	struct wish wish = plain;

	(void)state;
	if (lshard__large_page_bytes() != UINT64_C(2) << 20) {
		printf("skipped: this system has no pages of 2 MiB\n");
		return;
	}
	wish.large_pages = LSHARD_LARGE_PAGES_AUTO;
	wish.layer_bytes = UINT64_C(2) << 20;
	wish.numa = LSHARD_NUMA_COPY;
	assert_int_equal(team_of_processes(2, asks_for_reserved_pages, &wish), 0);
	wish.numa = LSHARD_NUMA_INTERLEAVE;
	assert_int_equal(team_of_processes(2, asks_for_reserved_pages, &wish), 0);
}

/* The thread that fills windows may run on another node than the one that creates the series. */
static int touches_its_windows(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	lshard_stats stats = LSHARD_STATS_INIT;
	unsigned mappings;
	uint64_t kib;
	int failed = 1;

	run_on((uint32_t)member->rank / 2);
	EXPECT(member, join(&rank, rank.wish->numa) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, create_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	kib = part_of("layershard:near:windows", &mappings);
	(void)lshard_series_stats(rank.series, &stats);
	EXPECT(member, mappings > 0 && kib * 1024 == stats.window_bytes + stats.resident_bytes, "%llu KiB",
	       (unsigned long long)kib);
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void windows_come_on_the_node_of_who_creates_them(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.transport = "shm:copy";
	wish.numa = LSHARD_NUMA_SOURCE;
	wish.resident_bytes = 2 * LAYER_BYTES;
	assert_int_equal(team_of_processes(RANKS, touches_its_windows, &wish), 0);
}

/* All memory of a node without any comes on the one where the others are. */
static int has_no_memory_near(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	lshard_stats stats = LSHARD_STATS_INIT;
	int failed = 1;

	run_on(member->rank < 2 ? 1 : 5);
	EXPECT(member, join(&rank, rank.wish->numa) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, open_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	(void)lshard_series_stats(rank.series, &stats);
	EXPECT(member, stats.numa_copy_bytes == 0, "%llu bytes", (unsigned long long)stats.numa_copy_bytes);
	EXPECT(member, machine.n_placed == 1 && machine.placed[0].nodes == 2, "%lu", machine.placed[0].nodes);
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void nothing_is_copied_to_a_node_without_memory(void **state)
{
	struct wish wish = plain;

	(void)state;
	assert_int_equal(team_of_processes(RANKS, has_no_memory_near, &wish), 0);
}

static int asks_for_nothing(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	int failed = 1;

	run_on((uint32_t)member->rank);
	EXPECT(member, join(&rank, LSHARD_NUMA_AUTO) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, open_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	EXPECT(member, machine.n_placed == 0 && machine.policies == 0, "%u calls", machine.n_placed);
	SAYS(member, rank.log, "numa none: rank");
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void nothing_is_placed_unasked(void **state)
{
	struct wish wish = plain;

	(void)state;
	assert_int_equal(team_of_processes(2, asks_for_nothing, &wish), 0);
}

/* ---- What cannot be had ---------------------------------------------------------------------------------------- */

/* Ranks of the second node may still look where pages are. */
static int may_not_place(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	int failed = 1;

	run_on((uint32_t)member->rank / 2);
	machine.forbidden = true;
	machine.full_of = (uint32_t)member->rank / 2;
	EXPECT(member, join(&rank, rank.wish->numa) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, open_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	SAYS(member, rank.log, "mbind of the shard: Operation not permitted (a container may forbid it");
	EXPECT(member, !strstr(strstr(rank.log, "mbind of") + 1, "mbind of"), "told twice: %s", rank.log);
	EXPECT(member, !strstr(rank.log, "lie where"), "told in other words: %s", rank.log);
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void a_container_that_forbids_it_is_told_and_survived(void **state)
{
	static const lshard_numa all[] = {LSHARD_NUMA_INTERLEAVE, LSHARD_NUMA_SOURCE, LSHARD_NUMA_COPY};
	struct wish wish = plain;

	(void)state;
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
		wish.numa = all[i];
		assert_int_equal(team_of_processes(RANKS, may_not_place, &wish), 0);
	}
}

static int finds_its_node_full(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	int failed = 1;

	run_on(1);
	machine.full_of = 1;
	EXPECT(member, join(&rank, rank.wish->numa) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, open_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	SAYS(member, rank.log, "where they should, others on node 0: a node is full");
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void a_node_without_memory_is_told(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.numa = LSHARD_NUMA_SOURCE;
	assert_int_equal(team_of_processes(2, finds_its_node_full, &wish), 0);
	wish.numa = LSHARD_NUMA_INTERLEAVE;
	assert_int_equal(team_of_processes(2, finds_its_node_full, &wish), 0);
}

static int is_on_one_node(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	int failed = 1;

	machine = (struct machine){.nodes = 1};
	EXPECT(member, join(&rank, LSHARD_NUMA_COPY) == LSHARD_OK, "%s", rank.error);
	EXPECT(member, open_series(&rank) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	SAYS(member, rank.log, "numa copy: rank");
	SAYS(member, rank.log, "may use one node, where all its memory comes");
	EXPECT(member, machine.n_placed == 0, "%u calls", machine.n_placed);
	EXPECT(member, pass_is_right(&rank), "a byte");
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	leave(&rank);
	return failed;
}

static void one_node_has_nothing_to_place(void **state)
{
	struct wish wish = plain;

	(void)state;
	assert_int_equal(team_of_processes(2, is_on_one_node, &wish), 0);
}

/* ---- What ranks and the environment say ------------------------------------------------------------------------ */

static int disagrees(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	const lshard_status status = join(&rank, member->rank == 0 ? LSHARD_NUMA_NONE : LSHARD_NUMA_COPY);

	EXPECT(member, status == LSHARD_ERR_MISMATCH, "%s", lshard_status_name(status));
	SAYS(member, rank.error, "rank 0 has none for numa, rank 1 copy");
	return 0;
failed:
	leave(&rank);
	return 1;
}

static int is_refused(const struct member *member)
{
	struct rank rank = {.member = member, .wish = member->user};
	const lshard_status status = join(&rank, rank.wish->numa);

	EXPECT(member, status == LSHARD_ERR_NOT_SUPPORTED, "%s", lshard_status_name(status));
	SAYS(member, rank.error, "the transport local places nothing on nodes: take shm");
	return 0;
failed:
	leave(&rank);
	return 1;
}

static void ranks_that_want_different_things_are_named(void **state)
{
	struct wish wish = plain;

	(void)state;
	assert_int_equal(team_of_processes(2, disagrees, &wish), 0);
}

static void threads_are_refused_what_only_shm_does(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.transport = "local";
	assert_int_equal(team_of_threads(2, is_refused, &wish), 0);
	wish.numa = LSHARD_NUMA_INTERLEAVE;
	assert_int_equal(team_of_threads(1, is_refused, &wish), 0);
}

static void the_environment_is_read_where_the_options_leave_it(void **state)
{
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;
	lshard_group *group = NULL;
	char error[256] = "";

	(void)state;
	options.rank = 0;
	options.size = 1;
	options.error = error;
	options.error_bytes = sizeof error;
	setenv("LAYERSHARD_NUMA", "interleave, source", 1);
	assert_int_equal(lshard_group_create(&options, &group), LSHARD_ERR_INVALID);
	assert_non_null(strstr(error, "LAYERSHARD_NUMA='interleave, source' is none of none, interleave, source"));
	setenv("LAYERSHARD_NUMA", "interleave", 1);
	options.transport = "local";
	assert_int_equal(lshard_group_create(&options, &group), LSHARD_ERR_NOT_SUPPORTED);
	options.numa = LSHARD_NUMA_COPY; /* of one rank: nothing is to be done */
	assert_int_equal(lshard_group_create(&options, &group), LSHARD_OK);
	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
	options.numa = (lshard_numa)5;
	assert_int_equal(lshard_group_create(&options, &group), LSHARD_ERR_INVALID);
	unsetenv("LAYERSHARD_NUMA");
}

/* ---- Nodes ----------------------------------------------------------------------------------------------------- */

static void nodes_are_told_as_the_system_has_them(void **state)
{
	lshard_node node = LSHARD_NODE_INIT;

	(void)state;
	run_on(1);
	assert_int_equal(lshard_node_info(1, &node), LSHARD_OK);
	assert_int_equal(node.number, 1);
	assert_true(node.usable && node.here);
	assert_int_equal(node.memory_bytes, 2048 * 1024);
	assert_int_equal(node.free_bytes, 1024 * 1024);
	assert_string_equal(node.processors, "2-3");
	assert_int_equal(lshard_node_info(2, &node), LSHARD_OK);
	assert_int_equal(node.number, 5);
	assert_false(node.usable || node.here);
	assert_int_equal(lshard_node_info(3, &node), LSHARD_ERR_RANGE);
	assert_int_equal(numa_home(), 1);
	run_on(5);
	assert_int_equal(numa_home(), 1); /* 17 away, and the first 32 */
	machine.nodes = 0;
}

/* ---- The machine as it is -------------------------------------------------------------------------------------- */

static void count_lines(const lshard_context *context, lshard_log_level level, const char *format, ...)
{
	(void)level;
	++*(int *)context->group;
	printf("told: %s\n", format);
}

static bool may_place(void)
{
	unsigned long first = 1;
	void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const bool may =
		page != MAP_FAILED && !__real_syscall(SYS_mbind, page, 4096ul, MPOL_PREFERRED, &first, 64ul, 0);

	munmap(page, 4096);
	return may;
}

/* The real calls on its first node: their arguments are as it takes them, and the thread's own policy comes back. */
static void the_system_takes_what_it_is_asked(void **state)
{
	const uint64_t bytes = UINT64_C(4) << 20;
	struct numa_wish wishes[2] = {{.where = NUMA_ON_NODE}, {.where = NUMA_INTERLEAVED}};
	int lines = 0, before = -1, within = -1, after = -1;
	lshard_context context = {.log = count_lines, .group = &lines, .numa = LSHARD_NUMA_SOURCE};
	struct numa_policy kept;

	(void)state;
	if (!may_place()) {
		printf("skipped: this process may not call mbind\n");
		return;
	}
	numa_add(&wishes[1].nodes, 0);
	for (int i = 0; i < 2; i++) {
		const struct numa_use use = {&context, "near", "shard", &wishes[i]};
		void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

		numa_bind(&use, memory, bytes);
		assert_int_equal(count_pages(memory, bytes), 0);
		numa_settle(&use, memory, bytes);
		assert_int_equal(count_pages(memory, bytes), bytes / 4096);
		assert_int_equal(lines, 0);
		munmap(memory, bytes);
		syscall(SYS_get_mempolicy, &before, NULL, 0ul, NULL, 0);
		numa_policy_begin(&wishes[i], &kept);
		syscall(SYS_get_mempolicy, &within, NULL, 0ul, NULL, 0);
		numa_policy_end(&kept);
		syscall(SYS_get_mempolicy, &after, NULL, 0ul, NULL, 0);
		assert_int_equal(within, i == 0 ? MPOL_PREFERRED : MPOL_INTERLEAVE);
		assert_int_equal(after, before);
	}
}

/* A large page made of one small one is where that is: nodes take turns by small pages. */
static void large_pages_take_turns(void **state)
{
	(void)state;
	for (uint32_t turns = 1; turns <= 9; turns++)
		for (uint64_t number = 0; number < 40; number++) {
			const uint64_t turn = numa_turn(number, 512, turns);

			assert_in_range(turn, 0, turns - 1);
			assert_int_equal((number * 512 + turn) % turns, number % turns);
		}
	assert_int_equal(numa_turn(7, 4, 8), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(ranks_of_a_node_share_one_copy),
		cmocka_unit_test(copies_hold_the_bytes_also_after_updates),
		cmocka_unit_test(verify_looks_at_copies_and_no_program_writes_them),
		cmocka_unit_test(a_rank_without_room_for_descriptors_keeps_nobody_waiting),
		cmocka_unit_test(ranks_that_store_nothing_keep_copies),
		cmocka_unit_test(a_rank_that_is_alone_copies_all_shards_of_others),
		cmocka_unit_test(copies_are_in_large_pages_too),
		cmocka_unit_test(ranks_wait_longer_for_large_copies),
		cmocka_unit_test(readers_outlive_sources_and_makers_of_copies),
		cmocka_unit_test(a_rank_that_dies_while_it_copies_is_named),
		cmocka_unit_test(nodes_are_asked_for_before_any_page_is_there),
		cmocka_unit_test(reserved_pages_are_asked_for_by_node),
		cmocka_unit_test(windows_come_on_the_node_of_who_creates_them),
		cmocka_unit_test(nothing_is_copied_to_a_node_without_memory),
		cmocka_unit_test(nothing_is_placed_unasked),
		cmocka_unit_test(a_container_that_forbids_it_is_told_and_survived),
		cmocka_unit_test(a_node_without_memory_is_told),
		cmocka_unit_test(one_node_has_nothing_to_place),
		cmocka_unit_test(ranks_that_want_different_things_are_named),
		cmocka_unit_test(threads_are_refused_what_only_shm_does),
		cmocka_unit_test(the_environment_is_read_where_the_options_leave_it),
		cmocka_unit_test(nodes_are_told_as_the_system_has_them),
		cmocka_unit_test(the_system_takes_what_it_is_asked),
		cmocka_unit_test(large_pages_take_turns),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
