/* SPDX-License-Identifier: Apache-2.0
 *
 * test_large_pages.c - what a series keeps in host memory is in large pages where they are wanted and to be had, as the
 * kernel counts it in this process's own maps; where they are not, that is said or refused, and the bytes are right all
 * the same. Pages that an administrator has reserved: reserved_pages.sh runs this program by each of its names.
 */
#include "callback_circle.h"
#include "shared_memory.h"

#include <layershard/plan.h>

#include <stdarg.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <setjmp.h>
#include <stddef.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cmocka.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define LARGE       (UINT64_C(2) << 20)
#define LAYERS      5u
#define LAYER_BYTES (3 * LARGE + 4096) /* whole layers begin and end within large pages */

/* What is asked for, and what a process should find. */
struct wish {
	const char *transport;
	lshard_placement placement;
	uint64_t layer_bytes;
	lshard_large_pages large_pages;
	bool denied; /* by prctl: the process has no large pages */
	bool hidden; /* from a rank: nobody has any */
	bool little; /* the caller's allocator has no more than it needs */
	bool reserved;
	bool unsure;               /* who gets some is left to the ranks' turns */
	const char *refused_group; /* the text of a group that is not made */
	lshard_poison poison;
	lshard_status status;
	const char *log;    /* a part of a line */
	const char *unsaid; /* what is in no line */
};

/* ---- The kernel's word ----------------------------------------------------------------------------------------- */

struct mapped {
	uint64_t bytes, large, reserved;
};

/* All mappings of the series: those of its shards and windows carry its name, composed layers those of shards. */
static struct mapped count_mapped(const char *of)
{
	FILE *file = fopen("/proc/self/smaps", "re");
	struct mapped mapped = {0, 0, 0};
	unsigned long long begin, end, kib;
	bool within = false;
	char line[512];

	while (file && fgets(line, sizeof line, file)) {
		if (sscanf(line, "%llx-%llx ", &begin, &end) == 2) {
			within = strstr(line, of) != NULL;
			mapped.bytes += within ? end - begin : 0;
		} else if (within && sscanf(line, "ShmemPmdMapped: %llu", &kib) == 1)
			mapped.large += kib * 1024;
		else if (within && (sscanf(line, "Shared_Hugetlb: %llu", &kib) == 1 ||
				    sscanf(line, "Private_Hugetlb: %llu", &kib) == 1))
			mapped.reserved += kib * 1024;
	}
	if (file)
		(void)fclose(file);
	return mapped;
}

/* Large private pages of the process: what local and callback have. */
static uint64_t count_private(void)
{
	FILE *file = fopen("/proc/self/smaps_rollup", "re");
	unsigned long long kib = 0;
	char line[256];

	while (file && fgets(line, sizeof line, file))
		if (sscanf(line, "AnonHugePages: %llu", &kib) == 1)
			break;
	if (file)
		(void)fclose(file);
	return kib * 1024;
}

/* ---- A rank ---------------------------------------------------------------------------------------------------- */

struct told {
	const char *wanted;
	const char *unwanted;
	bool found;
	bool unasked;
};

static void listen(void *user, lshard_log_level level, const char *text)
{
	struct told *told = user;

	(void)level;
	told->found |= strstr(text, told->wanted ? told->wanted : "small pages") != NULL;
	told->unasked |= told->unwanted && strstr(text, told->unwanted);
}

static unsigned char byte_of(uint32_t layer, uint64_t offset)
{
	return (unsigned char)(layer * 31 + offset / 4096 * 7 + offset % 251);
}

static int fill_layer(void *user, uint32_t layer, void *const *tensors)
{
	const struct wish *wish = user;

	for (uint64_t offset = 0; offset < wish->layer_bytes; offset++)
		((unsigned char *)tensors[0])[offset] = byte_of(layer, offset);
	return 0;
}

static bool has_its_bytes(lshard_series *series, const struct wish *wish, uint32_t layer)
{
	void *address = NULL;

	if (lshard_reach(series, layer, NULL) || lshard_wait(series, layer, NULL) ||
	    lshard_series_address(series, layer, 0, &address))
		return false;
	for (uint64_t offset = 0; offset < wish->layer_bytes; offset += 509)
		if (((unsigned char *)address)[offset] != byte_of(layer, offset))
			return false;
	return true;
}

static lshard_status open_series(lshard_group *group, const struct wish *wish, lshard_series **series)
{
	const lshard_tensor tensor = {"w", wish->layer_bytes, 0, LSHARD_STRIPE_BYTES, 0, 0};
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;
	lshard_status status;

	options.name = "pages";
	options.layer_count = LAYERS;
	options.tensors = &tensor;
	options.tensor_count = 1;
	options.placement = wish->placement;
	options.poison = wish->poison;
	status = lshard_series_create(group, &options, series);
	return status < 0 ? status : lshard_series_commit(*series, fill_layer, (void *)wish);
}

/* What has been read of the series, at least, but for the ends of shards and windows, which lose less than one page. */
static uint64_t least_large(const struct wish *wish, const struct mapped *mapped)
{
	if (!strstr(wish->transport, "shm")) /* each rank's shard and two windows, all in this process */
		return (LAYERS + (wish->little ? 0 : 4)) * wish->layer_bytes - 4 * LARGE;
	if (wish->placement == LSHARD_STRIPED) /* the other's shard is read as layers that are put together */
		return LAYERS * wish->layer_bytes + LAYERS / 2 * wish->layer_bytes;
	return mapped->bytes - 4 * LARGE;
}

static bool is_large(const struct wish *wish, uint64_t private_before)
{
	const struct mapped mapped = count_mapped("layershard:pages");
	const bool wanted = wish->large_pages != LSHARD_LARGE_PAGES_NEVER && !wish->denied && !wish->hidden;
	const bool in_process = !strstr(wish->transport, "shm");
	const uint64_t in_large = in_process ? count_private() - private_before : mapped.large + mapped.reserved;

	if (!wanted)
		return in_large == 0;
	if (wish->poison == LSHARD_POISON_READY) { /* two windows, and addresses for three buffers more */
		const struct mapped windows = count_mapped("layershard:pages:windows");

		return windows.bytes >= 5 * wish->layer_bytes && windows.large <= 2 * wish->layer_bytes &&
		       windows.large >= 2 * wish->layer_bytes - 2 * LARGE;
	}
	if (wish->reserved)
		return mapped.large == 0 && mapped.reserved >= least_large(wish, &mapped);
	return in_large >= least_large(wish, &mapped);
}

/* One that has room for the windows at a multiple of 4096, and for no more. */
static void *allocate_little(void *user, size_t bytes)
{
	return bytes <= 2 * LAYER_BYTES + 4095 ? calloc(1, bytes) : ((void)user, NULL);
}

static void release_little(void *user, void *pointer)
{
	(void)user;
	free(pointer);
}

static int takes_pages(const struct member *member)
{
	const struct wish *wish = member->user;
	static const lshard_allocator little = {sizeof little, allocate_little, release_little, NULL};
	struct told told = {wish->log, wish->unsaid, false, false};
	lshard_group_options options = member_options(member, wish->transport, 0);
	struct seat *seat = strcmp(wish->transport, "callback") ? NULL : circle_join(member);
	lshard_group *group = NULL;
	lshard_series *series = NULL;
	uint64_t before;
	lshard_status status;
	char error[512] = "";
	int failed = 1;

	if (wish->denied)
		prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
	if (wish->little)
		options.allocator = &little;
	options.callbacks = seat ? seat_callbacks(seat) : NULL;
	options.large_pages = wish->large_pages;
	options.log = listen;
	options.log_user = &told;
	options.error = error;
	options.error_bytes = sizeof error;
	status = lshard_group_create(&options, &group);
	if (wish->refused_group) {
		EXPECT(member, status == LSHARD_ERR_NOT_SUPPORTED, "%s", lshard_status_name(status));
		SAYS(member, error, wish->refused_group);
		return 0;
	}
	EXPECT(member, status == LSHARD_OK, "%s", error);
	before = count_private();
	EXPECT(member, team_barrier(member), "a rank is gone");
	status = open_series(group, wish, &series);
	EXPECT(member, status == wish->status, "%s: %s", lshard_status_name(status), lshard_group_error(group));
	if (status < 0 && wish->log)
		EXPECT(member, strstr(lshard_group_error(group), wish->log), "%s", lshard_group_error(group));
	else if (!wish->unsure)
		EXPECT(member, told.found == (wish->log != NULL), "the log says %s",
		       told.found ? "something" : "nothing");
	EXPECT(member, !told.unasked, "the log says '%s'", wish->unsaid);
	for (uint32_t layer = 0; status >= 0 && layer < LAYERS; layer++)
		EXPECT(member, has_its_bytes(series, wish, layer), "layer %u", layer);
	EXPECT(member, team_barrier(member), "a rank is gone");
	if (status >= 0 && !wish->unsure)
		EXPECT(member, is_large(wish, before), "%s: not as wished", wish->transport);
	EXPECT(member, team_barrier(member), "a rank is gone");
	failed = 0;
failed:
	lshard_series_destroy(series);
	lshard_group_destroy(group);
	circle_leave(seat);
	return failed;
}

static void try_by_processes(struct wish wish)
{
	assert_int_equal(team_of_processes(2, takes_pages, &wish), 0);
}

/* In a process of its own, for what the kernel counts and what prctl sets. */
static int takes_pages_among_threads(const struct member *member)
{
	return team_of_threads(2, takes_pages, member->user);
}

static void try_by_threads(struct wish wish)
{
	assert_int_equal(team_of_processes(1, takes_pages_among_threads, &wish), 0);
}

/* ---- Cases ----------------------------------------------------------------------------------------------------- */

static const struct wish plain = {
	.transport = "shm", .layer_bytes = LAYER_BYTES, .large_pages = LSHARD_LARGE_PAGES_REQUIRE};

static void shards_and_windows_of_processes_are_large(void **state)
{
	struct wish wish = plain;

	(void)state;
	try_by_processes(wish);
	wish.transport = "shm:copy";
	try_by_processes(wish);
	wish.large_pages = LSHARD_LARGE_PAGES_NEVER;
	try_by_processes(wish);
	wish.transport = "shm";
	try_by_processes(wish);
}

static void what_poison_may_need_later_takes_no_memory(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.transport = "shm:copy";
	wish.poison = LSHARD_POISON_READY;
	try_by_processes(wish);
}

/* 16 large pages for each of 2 ranks are mapped as such, one less are not. */
static void large_stripes_are_mapped_by_large_pages(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.placement = LSHARD_STRIPED;
	wish.layer_bytes = 32 * LARGE + 4096;
	try_by_processes(wish);
	wish.large_pages = LSHARD_LARGE_PAGES_NEVER;
	wish.layer_bytes = 4 * LARGE;
	try_by_processes(wish);
}

static void threads_have_large_pages(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.transport = "local";
	try_by_threads(wish);
	wish.transport = "callback";
	try_by_threads(wish);
}

/* The system as this process sees it: no transparent pages, and @p meminfo in /proc/meminfo. */
static int fake_system(const struct member *member, const char *meminfo)
{
	FILE *file = NULL;

	EXPECT(member,
	       unshare(CLONE_NEWNS) == 0 && mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 &&
		       mount("none", "/sys/kernel/mm", "tmpfs", 0, NULL) == 0,
	       "%s", strerror(errno));
	file = fopen("/sys/kernel/mm/meminfo", "we");
	EXPECT(member,
	       file && fputs(meminfo, file) >= 0 && fclose(file) == 0 &&
		       mount("/sys/kernel/mm/meminfo", "/proc/meminfo", NULL, MS_BIND, NULL) == 0,
	       "%s", strerror(errno));
	return 0;
failed:
	return 1;
}

static int hide_system(const struct member *member)
{
	return fake_system(member, "");
}

static bool can_fake_system(void)
{
	const bool can = team_of_processes(1, hide_system, NULL) == 0;

	if (!can)
		printf("skipped: this user cannot hide /sys/kernel/mm from a process\n");
	return can;
}

static int sees_no_system(const struct member *member)
{
	return member->rank == 1 && hide_system(member) ? 1 : takes_pages(member);
}

/* Layers are cut alike on all ranks, and none has large pages. */
static void a_rank_that_sees_no_large_pages_gets_the_right_bytes(void **state)
{
	struct wish wish = plain;

	(void)state;
	if (!can_fake_system())
		return;
	wish.large_pages = LSHARD_LARGE_PAGES_AUTO;
	wish.hidden = true;
	wish.placement = LSHARD_STRIPED;
	wish.layer_bytes = 32 * LARGE + 4096;
	assert_int_equal(team_of_processes(2, sees_no_system, &wish), 0);
	wish.large_pages = LSHARD_LARGE_PAGES_REQUIRE;
	wish.refused_group = "rank 1: large pages are required, and its system has none that it can see";
	assert_int_equal(team_of_processes(2, sees_no_system, &wish), 0);
}

/* As a kernel that is built without transparent pages. */
static int refuse_advice(const struct member *member)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_madvise, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2])),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, MADV_HUGEPAGE, 2, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, MADV_COLLAPSE, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EINVAL),
	};
	const struct sock_fprog program = {sizeof filter / sizeof *filter, filter};

	EXPECT(member,
	       prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0,
	       "%s", strerror(errno));
	return 0;
failed:
	return 1;
}

static int has_reserved_pages_alone(const struct member *member)
{
	return fake_system(member, "MemFree: 1 kB\nHugepagesize:       2048 kB\n") || refuse_advice(member)
		       ? 1
		       : takes_pages(member);
}

static int has_pages_too_large(const struct member *member)
{
	return fake_system(member, "Hugepagesize:    1048576 kB\n") ? 1 : takes_pages(member);
}

static void a_kernel_without_transparent_pages_is_told(void **state)
{
	struct wish wish = plain;

	(void)state;
	if (!can_fake_system())
		return;
	wish.log = "this kernel makes none but reserved ones";
	wish.status = LSHARD_ERR_NO_MEMORY;
	assert_int_equal(team_of_processes(2, has_reserved_pages_alone, &wish), 0);
	wish.large_pages = LSHARD_LARGE_PAGES_AUTO;
	wish.status = LSHARD_OK;
	wish.hidden = true;
	assert_int_equal(team_of_processes(2, has_reserved_pages_alone, &wish), 0);
	wish.large_pages = LSHARD_LARGE_PAGES_REQUIRE;
	wish.refused_group = "rank 0: large pages are required, and its system has none that it can see";
	assert_int_equal(team_of_processes(2, has_pages_too_large, &wish), 0);
}

static void what_cannot_be_large_is_told_or_refused(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.denied = true;
	wish.log = "switched large pages off";
	wish.status = LSHARD_ERR_NO_MEMORY;
	try_by_processes(wish);
	wish.transport = "local";
	try_by_threads(wish);
	wish.large_pages = LSHARD_LARGE_PAGES_AUTO;
	wish.status = LSHARD_OK;
	try_by_threads(wish);
	wish.transport = "shm";
	try_by_processes(wish);
	wish.transport = "shm:copy";
	try_by_processes(wish);
}

/* Not where rounding up adds more than 1/16, nor for stripes that do not end at large pages. */
static void reserving_is_advised_where_it_would_do(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.large_pages = LSHARD_LARGE_PAGES_AUTO;
	wish.denied = true;
	wish.layer_bytes = 9 * LARGE;
	wish.log = "for this rank (sysctl vm.nr_hugepages) would do";
	try_by_processes(wish);
	wish.placement = LSHARD_STRIPED;
	wish.layer_bytes = 32 * LARGE + 4096; /* cut at large pages */
	try_by_processes(wish);
	wish.log = "small pages";
	wish.unsaid = "reserving 80 for this rank";
	wish.layer_bytes = 32 * LARGE - 8192; /* shards of 80 large pages, less 5 small ones */
	try_by_processes(wish);
	wish.unsaid = "would do";
	wish.placement = LSHARD_WHOLE;
	wish.layer_bytes = LAYER_BYTES;
	try_by_processes(wish);
}

/* Where there are none, or a few that are reserved. */
static void what_the_system_has_not_is_told_or_refused(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.log = "must be in large pages and cannot be";
	wish.status = LSHARD_ERR_NO_MEMORY;
	try_by_processes(wish);
	wish.large_pages = LSHARD_LARGE_PAGES_AUTO;
	wish.log = "small pages";
	wish.status = LSHARD_OK;
	wish.hidden = true;
	try_by_processes(wish);
	wish.unsure = true;
	wish.layer_bytes = 2 * LARGE; /* of which reserved ones are made */
	try_by_processes(wish);
	wish.transport = "shm:copy";
	try_by_processes(wish);
	wish.transport = "local"; /* its memory is private, to which only some settings apply */
	try_by_threads(wish);
}

/* Memory that has no room for one is not concerned, and nothing is said of it. */
static void small_layers_are_left_alone(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.denied = true; /* nothing would become large */
	wish.layer_bytes = 4096;
	try_by_processes(wish);
}

/* ---- What ranks and the environment say ------------------------------------------------------------------------ */

static int disagrees(const struct member *member)
{
	lshard_group_options options = member_options(member, "shm", 0);
	lshard_group *group = NULL;
	char error[256] = "";
	lshard_status status;

	options.large_pages = member->rank == 0 ? LSHARD_LARGE_PAGES_NEVER : LSHARD_LARGE_PAGES_REQUIRE;
	options.error = error;
	options.error_bytes = sizeof error;
	status = lshard_group_create(&options, &group);
	EXPECT(member, status == LSHARD_ERR_MISMATCH, "%s", lshard_status_name(status));
	EXPECT(member, strstr(error, "rank 0 has never for large_pages, rank 1 require"), "%s", error);
	return 0;
failed:
	lshard_group_destroy(group);
	return 1;
}

static void ranks_that_want_different_pages_are_named(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, disagrees, NULL), 0);
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
	setenv("LAYERSHARD_LARGE_PAGES", "sometimes", 1);
	assert_int_equal(lshard_group_create(&options, &group), LSHARD_ERR_INVALID);
	assert_non_null(strstr(error, "LAYERSHARD_LARGE_PAGES='sometimes' is none of auto, never, require"));
	options.large_pages = LSHARD_LARGE_PAGES_NEVER;
	assert_int_equal(lshard_group_create(&options, &group), LSHARD_OK);
	assert_int_equal(lshard_group_destroy(group), LSHARD_OK);
	options.large_pages = (lshard_large_pages)3;
	assert_int_equal(lshard_group_create(&options, &group), LSHARD_ERR_INVALID);
	unsetenv("LAYERSHARD_LARGE_PAGES");
}

static void a_callers_allocator_need_have_no_more_than_before(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.transport = "local";
	wish.large_pages = LSHARD_LARGE_PAGES_AUTO;
	wish.little = true;
	try_by_threads(wish);
}

/* Clearing large pages is part of making them, and takes time that the other ranks wait. */
static void ranks_wait_longer_for_large_shards(void **state)
{
	const uint64_t of_ranks[] = {UINT64_C(3) << 30, 4096};
	const lshard_store_plan plan = {.shard_bytes_of = of_ranks};
	lshard_context context = {.size = 2, .timeout_ms = 1000, .large_page_bytes = LARGE};
	uint64_t with, without;

	(void)state;
	with = shared_deadline(&context, &plan, 0);
	context.large_page_bytes = 0;
	without = shared_deadline(&context, &plan, 0);
	assert_in_range(with - without, UINT64_C(11000000000),
			UINT64_C(12000000000)); /* the calls are not at one time */
}

/* ---- Reserved pages -------------------------------------------------------------------------------------------- */

static void reserved_pages_are_taken_first(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.layer_bytes = 20 * LARGE;
	wish.reserved = true;
	try_by_processes(wish);
	wish.transport = "shm:copy";
	try_by_processes(wish);
	wish.transport = "shm";
	wish.placement = LSHARD_STRIPED;
	wish.layer_bytes = 40 * LARGE;
	try_by_processes(wish);
}

static void reserved_pages_do_where_no_others_are(void **state)
{
	struct wish wish = plain;

	(void)state;
	if (!can_fake_system())
		return;
	wish.layer_bytes = 20 * LARGE;
	wish.reserved = true;
	assert_int_equal(team_of_processes(2, has_reserved_pages_alone, &wish), 0);
}

/* Ranks that are killed while they hold reserved pages; reserved_pages.sh counts what is left. */
static int is_killed(const struct member *member)
{
	const struct wish *wish = member->user;
	lshard_group_options options = member_options(member, wish->transport, 0);
	lshard_group *group = NULL;
	lshard_series *series = NULL;

	options.large_pages = wish->large_pages;
	EXPECT(member, lshard_group_create(&options, &group) == LSHARD_OK, "group");
	EXPECT(member, open_series(group, wish, &series) == LSHARD_OK, "%s", lshard_group_error(group));
	EXPECT(member, count_mapped("layershard:pages").reserved > 0, "no reserved pages");
	team_dies(member);
	raise(SIGKILL);
failed:
	return 1;
}

static void ranks_are_killed(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.layer_bytes = 2 * LARGE;
	for (int turn = 0; turn < 200; turn++)
		assert_int_equal(team_of_processes(2, is_killed, &wish), 0);
}

static void both_reasons_are_in_the_refusal(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.denied = true;
	wish.layer_bytes = 20 * LARGE;
	wish.status = LSHARD_ERR_NO_MEMORY;
	wish.log = "In reserved ones: series 'pages': shard of ";
	try_by_processes(wish);
}

/* Some of the shards and windows get theirs; who made them gives them back. */
static void pages_that_run_out_in_the_middle_are_refused(void **state)
{
	struct wish wish = plain;

	(void)state;
	wish.transport = "shm:copy";
	wish.denied = true;
	wish.layer_bytes = 2 * LARGE; /* 3 + 2 layers, and 2 windows each: 18 pages */
	wish.status = LSHARD_ERR_NO_MEMORY;
	wish.log = "In reserved ones: series 'pages': ";
	try_by_processes(wish);
}

static bool can_have_large_pages(void)
{
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;
	const struct wish wish = plain;
	lshard_group *group = NULL;
	lshard_series *series = NULL;
	bool can;

	options.rank = 0;
	options.size = 1;
	options.transport = "shm";
	options.large_pages = LSHARD_LARGE_PAGES_REQUIRE;
	can = lshard_group_create(&options, &group) == LSHARD_OK && open_series(group, &wish, &series) == LSHARD_OK;
	lshard_series_destroy(series);
	lshard_group_destroy(group);
	return can;
}

#define WHATEVER_THERE_IS                                                                                              \
	cmocka_unit_test(a_rank_that_sees_no_large_pages_gets_the_right_bytes),                                        \
		cmocka_unit_test(a_kernel_without_transparent_pages_is_told),                                          \
		cmocka_unit_test(what_cannot_be_large_is_told_or_refused),                                             \
		cmocka_unit_test(reserving_is_advised_where_it_would_do),                                              \
		cmocka_unit_test(small_layers_are_left_alone),                                                         \
		cmocka_unit_test(ranks_that_want_different_pages_are_named),                                           \
		cmocka_unit_test(a_callers_allocator_need_have_no_more_than_before),                                   \
		cmocka_unit_test(ranks_wait_longer_for_large_shards),                                                  \
		cmocka_unit_test(the_environment_is_read_where_the_options_leave_it)

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(shards_and_windows_of_processes_are_large),
		cmocka_unit_test(what_poison_may_need_later_takes_no_memory),
		cmocka_unit_test(large_stripes_are_mapped_by_large_pages),
		cmocka_unit_test(threads_have_large_pages),
		WHATEVER_THERE_IS,
	};
	const struct CMUnitTest without[] = {
		cmocka_unit_test(what_the_system_has_not_is_told_or_refused),
		WHATEVER_THERE_IS,
	};
	const struct CMUnitTest reserved[] = {
		cmocka_unit_test(reserved_pages_are_taken_first),
		cmocka_unit_test(reserved_pages_do_where_no_others_are),
	};
	const struct CMUnitTest killed[] = {cmocka_unit_test(ranks_are_killed)};
	const struct CMUnitTest refused[] = {
		cmocka_unit_test(both_reasons_are_in_the_refusal),
		cmocka_unit_test(pages_that_run_out_in_the_middle_are_refused),
	};

	(void)unsetenv("LAYERSHARD_LARGE_PAGES"); /* each case says what it wants */
	if (argc == 2 && !strcmp(argv[1], "reserved"))
		return cmocka_run_group_tests(reserved, NULL, NULL);
	if (argc == 2 && !strcmp(argv[1], "killed"))
		return cmocka_run_group_tests(killed, NULL, NULL);
	if (argc == 2 && !strcmp(argv[1], "refused"))
		return cmocka_run_group_tests(refused, NULL, NULL);
	if (!can_have_large_pages()) {
		printf("skipped: four cases: this kernel gives no large pages to who asks (Linux 6.1, and "
		       "transparent_hugepage/shmem_enabled other than 'deny')\n");
		return cmocka_run_group_tests(without, NULL, NULL);
	}
	return cmocka_run_group_tests(tests, NULL, NULL);
}
