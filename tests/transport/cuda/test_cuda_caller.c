/* SPDX-License-Identifier: Apache-2.0
 *
 * test_cuda_caller.c - shards and windows of the cuda transport in the caller's memory, over a stand-in for the driver:
 * taken from an allocator that cuts them out of larger allocations, given back when nobody reads them, refused where
 * others could not.
 */
#include "cuda_ranks.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#include <cmocka.h>

#define SEGMENT ((size_t)2 << 20)
#define CHUNKS  2 /* segments of which a mapped one is made, as torch makes its expandable ones */

/* What the caller's allocator gives. */
enum gives { CUT_OUT, HOST, OTHER_DEVICE, MAPPED, CROOKED, NOTHING, FAR_END, NO_PIPE };

struct variant {
	struct setting setting;
	enum gives gives;
	int rank; /* whose allocator does; the others' cut out. -1: all */
	lshard_status status;
	const char *words;
};

/* An allocator as frameworks have them: large allocations, pieces of them. */
struct purse {
	const struct variant *variant;
	enum gives gives;
	cuda_address segment;
	size_t used;
	int given[3];
	int returned[3];
	cuda_handle handles[CHUNKS]; /* MAPPED */
	char host[65536];
};

static cuda_address map_segment(struct purse *purse)
{
	const struct cuda_memory_properties properties = {
		.type = CUDA_PINNED, .handle_types = CUDA_HANDLE_FD, .location = {CUDA_ON_DEVICE, 0}};
	const struct cuda_access access = {{CUDA_ON_DEVICE, 0}, CUDA_CAN_WRITE};
	cuda_address address = 0;

	if (cuMemAddressReserve(&address, CHUNKS * SEGMENT, 0, 0, 0))
		return 0;
	for (size_t i = 0; i < CHUNKS; i++) {
		const cuda_address chunk = address + i * SEGMENT;

		if (cuMemCreate(&purse->handles[i], SEGMENT, &properties, 0) ||
		    cuMemMap(chunk, SEGMENT, 0, purse->handles[i], 0) || cuMemSetAccess(chunk, SEGMENT, &access, 1))
			return 0;
	}
	return address;
}

static void unmap_segment(struct purse *purse)
{
	for (size_t i = 0; i < CHUNKS; i++) {
		cuMemUnmap(purse->segment + i * SEGMENT, SEGMENT);
		cuMemRelease(purse->handles[i]);
	}
	cuMemAddressFree(purse->segment, CHUNKS * SEGMENT);
}

static int open_purse(struct purse *purse, const struct variant *variant, const struct member *member)
{
	cuda_context context = NULL;

	memset(purse, 0, sizeof *purse);
	purse->variant = variant;
	purse->gives = variant->rank < 0 || variant->rank == member->rank ? variant->gives : CUT_OUT;
	cuInit(0);
	/* A context of a device is there already: the group's. */
	cuDevicePrimaryCtxRetain(&context, member->rank + (purse->gives == OTHER_DEVICE));
	cuCtxPushCurrent_v2(context);
	if (purse->gives == MAPPED)
		purse->segment = map_segment(purse);
	else
		cuMemAlloc_v2(&purse->segment, SEGMENT);
	cuCtxPopCurrent_v2(&context);
	return purse->segment != 0;
}

static void close_purse(struct purse *purse, const struct member *member)
{
	if (purse->gives == MAPPED)
		unmap_segment(purse);
	else
		cuMemFree_v2(purse->segment);
	cuDevicePrimaryCtxRelease_v2(member->rank + (purse->gives == OTHER_DEVICE));
}

static void *give(void *user, lshard_purpose purpose, size_t bytes, size_t alignment)
{
	struct purse *purse = user;

	if (purse->gives == NOTHING)
		return NULL;
	purse->given[purpose]++;
	if (purse->gives == HOST)
		return purse->host;
	if (purse->gives == FAR_END || purse->gives == MAPPED) /* where it is mapped, into the next chunk */
		return (void *)(uintptr_t)(purse->segment + SEGMENT - 4096);
	purse->used = (purse->used + 512 + alignment - 1) / alignment * alignment;
	purse->used += bytes;
	return (void *)(uintptr_t)(purse->segment + purse->used - bytes + (purse->gives == CROOKED ? 8 : 0));
}

static void take_back(void *user, lshard_purpose purpose, void *pointer)
{
	(void)pointer;
	((struct purse *)user)->returned[purpose]++;
}

/* So many descriptors are open: no further one from now on. Returns the limit there was. */
static struct rlimit forbid_descriptors(void)
{
	const int next = dup(0);
	struct rlimit before;
	struct rlimit now;

	close(next);
	getrlimit(RLIMIT_NOFILE, &before);
	now = before;
	now.rlim_cur = (rlim_t)next;
	setrlimit(RLIMIT_NOFILE, &now);
	return before;
}

static lshard_status create(struct rank *rank, struct purse *purse)
{
	const lshard_memory_source source = {sizeof source, give, take_back, purse};

	return purse ? cuda_create_series_in(rank, &source) : cuda_create_series(rank);
}

static int open_rank(struct rank *rank, struct purse *purse, const struct member *member)
{
	const struct variant *variant = member->user;

	cuda_set_stub(member, &variant->setting);
	EXPECT(member, cuda_open_group(rank, member, &variant->setting) == LSHARD_OK, "%s", rank->error);
	EXPECT(member, open_purse(purse, variant, member), "no segment");
	EXPECT(member, cuda_open_streams(rank), "streams");
	cuda_foretell(rank, 0);
	return 1;
failed:
	return 0;
}

/* ---- used ---- */

static int lies_in_segment(struct rank *rank, const struct purse *purse)
{
	for (uint32_t layer = FIRST; layer < FIRST + LAYERS; layer++) {
		void *address = NULL;

		OK(rank, lshard_series_address(rank->series, layer, 0, &address));
		EXPECT(rank->member, (uintptr_t)address - purse->segment < SEGMENT, "layer %u lies elsewhere", layer);
	}
	return 1;
failed:
	return 0;
}

static int is_balanced(const struct member *member, const struct purse *purse)
{
	for (int purpose = LSHARD_FOR_SHARD; purpose <= LSHARD_FOR_WINDOWS; purpose++)
		EXPECT(member, purse->given[purpose] == purse->returned[purpose], "purpose %d: given %d, returned %d",
		       purpose, purse->given[purpose], purse->returned[purpose]);
	return 1;
failed:
	return 0;
}

static int uses_it(const struct member *member)
{
	const struct variant *variant = member->user;
	static struct purse purse;
	struct rank rank;
	uint64_t before;

	if (!open_rank(&rank, &purse, member))
		return 1;
	before = stub_cuda_bytes();
	EXPECT(member, create(&rank, &purse) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	EXPECT(member, stub_cuda_bytes() == before, "%d bytes of its own", (int)(stub_cuda_bytes() - before));
	OK(&rank, lshard_series_commit(rank.series, cuda_fill_layer, &rank));
	if (!variant->setting.neighbours && !lies_in_segment(&rank, &purse))
		goto failed;
	if (!cuda_one_pass(&rank, LAYERS, rank.streams[0]) || !cuda_one_pass(&rank, LAYERS, rank.streams[1]) ||
	    !cuda_all_right(&rank, "in the caller's memory"))
		goto failed;
	OK(&rank, lshard_series_update_begin(rank.series));
	cuda_foretell(&rank, 1);
	OK(&rank, lshard_series_update_end(rank.series, cuda_fill_layer, &rank));
	if (!cuda_one_pass(&rank, LAYERS, rank.streams[0]) || !cuda_all_right(&rank, "after an update"))
		goto failed;
	EXPECT(member, lshard_series_destroy(rank.series) == LSHARD_OK, "destroy");
	rank.series = NULL;
	EXPECT(member, purse.given[LSHARD_FOR_WINDOWS] == purse.returned[LSHARD_FOR_WINDOWS], "windows");
	EXPECT(member, team_barrier(member), "another rank failed"); /* nobody reads any more */
	cuda_close_rank(&rank);
	EXPECT(member, purse.given[LSHARD_FOR_SHARD] == 1 && is_balanced(member, &purse), "shards");
	close_purse(&purse, member);
	EXPECT(member, stub_cuda_outstanding() == 0 && stub_cuda_bytes() == 0, "%d objects are left",
	       stub_cuda_outstanding());
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void the_callers_memory_is_used(void **state)
{
	const struct variant variants[] = {
		{.setting = {.spec = "cuda", .prefetch = 1}, .rank = -1},
		{.setting = {.spec = "cuda", .prefetch = 1, .placement = LSHARD_STRIPED, .late = 3}, .rank = -1},
		{.setting = {.spec = "cuda", .prefetch = 1, .neighbours = 8}, .rank = -1},
		{.setting = {.spec = "cuda", .prefetch = 1, .neighbours = 8, .placement = LSHARD_STRIPED}, .rank = -1},
		{.setting = {.spec = "cuda:ipc", .prefetch = 0}, .rank = -1},
	};

	(void)state;
	for (size_t i = 0; i < sizeof variants / sizeof variants[0]; i++)
		for (int32_t size = 2; size <= 3; size++) {
			struct variant variant = variants[i];

			assert_int_equal(team_of_processes(size, uses_it, &variant), 0);
		}
}

/* ---- given back ---- */

/* Rank 0 leaves its series while the others go on reading its shard. */
static int lends(const struct member *member)
{
	static struct purse purse;
	struct rank rank;

	if (!open_rank(&rank, &purse, member))
		return 1;
	EXPECT(member, create(&rank, &purse) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	OK(&rank, lshard_series_commit(rank.series, cuda_fill_layer, &rank));
	if (member->rank == 0) {
		EXPECT(member, lshard_series_destroy(rank.series) == LSHARD_OK, "destroy");
		rank.series = NULL;
		EXPECT(member, purse.returned[LSHARD_FOR_SHARD] == 0, "given back under its readers");
	}
	EXPECT(member, team_barrier(member), "another rank failed");
	if (member->rank > 0 &&
	    (!cuda_one_pass(&rank, LAYERS, rank.streams[0]) || !cuda_all_right(&rank, "from a rank that has left")))
		goto failed;
	EXPECT(member, lshard_series_destroy(rank.series) == LSHARD_OK, "destroy");
	rank.series = NULL;
	EXPECT(member, team_barrier(member), "another rank failed");
	cuda_close_rank(&rank);
	EXPECT(member, member->rank != 0 || purse.returned[LSHARD_FOR_SHARD] == 1, "not given back");
	close_purse(&purse, member);
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void a_shard_is_given_back_when_nobody_reads_it(void **state)
{
	struct variant variant = {.setting = {.spec = "cuda", .prefetch = 1}, .rank = -1};

	(void)state;
	assert_int_equal(team_of_processes(3, lends, &variant), 0);
}

struct lending {
	struct variant variant; /* first: what the other parts look for */
	pid_t *children;        /* [size] of ranks that fork, shared by all */
};

/* It has what its parent has; the test ends it. */
static void leave_a_child(const struct member *member)
{
	const struct lending *lending = member->user;
	const pid_t forked = fork();

	if (forked == 0) {
		alarm(60);
		pause();
		_exit(0);
	}
	lending->children[member->rank] = forked;
}

/* Rank 1 reads no more, rank 2 is dead, and children of both have their descriptors. */
static int lends_to_parents(const struct member *member)
{
	static struct purse purse;
	struct rank rank;

	if (!open_rank(&rank, &purse, member))
		return 1;
	EXPECT(member, create(&rank, &purse) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	if (member->rank > 0)
		leave_a_child(member);
	if (member->rank == 2) {
		team_dies(member);
		raise(SIGKILL);
	}
	EXPECT(member, lshard_series_destroy(rank.series) == LSHARD_OK, "destroy");
	rank.series = NULL;
	/* An agreement of the two that are left, after both have let go. */
	EXPECT(member, create(&rank, &purse) == LSHARD_ERR_PEER_FAILED, "rank 2 is not dead yet");
	cuda_close_rank(&rank);
	EXPECT(member, purse.returned[LSHARD_FOR_SHARD] == 1, "not given back");
	close_purse(&purse, member);
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void children_of_readers_are_no_readers(void **state)
{
	struct lending lending = {.variant = {.setting = {.spec = "cuda", .prefetch = 1}, .rank = -1}};
	int failures, ended = 0;

	(void)state;
	lending.children = mmap(NULL, 3 * sizeof(pid_t), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	assert_true(lending.children != MAP_FAILED);
	failures = team_of_processes(3, lends_to_parents, &lending);
	for (int rank = 1; rank < 3; rank++)
		ended += lending.children[rank] > 0 && kill(lending.children[rank], SIGKILL) == 0;
	assert_int_equal(failures, 0);
	assert_int_equal(ended, 2);
	munmap(lending.children, 3 * sizeof(pid_t));
}

/* A reader that stays keeps it beyond the owner's group: then it is not given back, and the owner is told. */
static int keeps(const struct member *member)
{
	static struct purse purse;
	struct rank rank;

	if (!open_rank(&rank, &purse, member))
		return 1;
	EXPECT(member, create(&rank, &purse) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	OK(&rank, lshard_series_commit(rank.series, cuda_fill_layer, &rank));
	if (member->rank == 0) {
		lshard_series_destroy(rank.series);
		lshard_group_destroy(rank.group);
		rank.series = NULL;
		rank.group = NULL;
		EXPECT(member, purse.returned[LSHARD_FOR_SHARD] == 0 && strstr(rank.said, "is not given back"),
		       "said: %s", rank.said);
	}
	EXPECT(member, team_barrier(member), "another rank failed");
	if (member->rank == 1 &&
	    (!cuda_one_pass(&rank, LAYERS, rank.streams[0]) || !cuda_all_right(&rank, "from a group that has ended")))
		goto failed;
	EXPECT(member, team_barrier(member), "another rank failed");
	cuda_close_rank(&rank);
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void what_is_read_for_ever_is_not_given_back(void **state)
{
	struct variant variant = {.setting = {.spec = "cuda", .prefetch = 1}, .rank = -1};

	(void)state;
	assert_int_equal(team_of_processes(2, keeps, &variant), 0);
}

/* Rank 0's device hangs with a copy on its way when it leaves; nobody else reads its shard. */
static int keeps_what_hangs(const struct member *member)
{
	static struct purse purse;
	struct rank rank;

	if (!open_rank(&rank, &purse, member))
		return 1;
	EXPECT(member, create(&rank, &purse) == LSHARD_OK, "%s", lshard_group_error(rank.group));
	OK(&rank, lshard_series_commit(rank.series, cuda_fill_layer, &rank));
	if (!cuda_one_pass(&rank, LAYERS, rank.streams[0]) || !cuda_all_right(&rank, "before"))
		goto failed;
	if (member->rank == 1) {
		cuda_close_rank(&rank);
		EXPECT(member, team_barrier(member), "another rank failed");
		return 0;
	}
	EXPECT(member, team_barrier(member), "another rank failed");
	stub_cuda_set(STUB_STUCK, 1);
	for (uint32_t layer = FIRST; layer < FIRST + LAYERS; layer++)
		OK(&rank, lshard_reach(rank.series, layer, rank.streams[0]));
	EXPECT(member, lshard_series_destroy(rank.series) == LSHARD_ERR_TIMEOUT, "nothing hangs");
	lshard_group_abort(rank.group); /* now it goes without */
	EXPECT(member, lshard_series_destroy(rank.series) == LSHARD_OK, "destroy");
	lshard_group_destroy(rank.group);
	EXPECT(member, purse.given[LSHARD_FOR_SHARD] == 1 && purse.given[LSHARD_FOR_WINDOWS] == 1, "nothing was lent");
	EXPECT(member, !purse.returned[LSHARD_FOR_SHARD] && !purse.returned[LSHARD_FOR_WINDOWS],
	       "%d shards and %d windows were given back under a copy", purse.returned[LSHARD_FOR_SHARD],
	       purse.returned[LSHARD_FOR_WINDOWS]);
	return 0;
failed:
	return 1;
}

static void what_a_copy_may_still_use_is_not_given_back(void **state)
{
	struct variant variant = {.setting = {.spec = "cuda", .prefetch = 0, .timeout_ms = patience(2000)}, .rank = -1};

	(void)state;
	assert_int_equal(team_of_processes(2, keeps_what_hangs, &variant), 0);
}

/* ---- refused ---- */

static int is_refused(const struct member *member)
{
	const struct variant *variant = member->user;
	static struct purse purse;
	struct rlimit limit;
	struct rank rank;
	lshard_status status;
	int objects;

	if (!open_rank(&rank, &purse, member))
		return 1;
	objects = stub_cuda_outstanding();
	getrlimit(RLIMIT_NOFILE, &limit);
	if (purse.gives == NO_PIPE)
		limit = forbid_descriptors();
	status = create(&rank, variant->status == LSHARD_ERR_MISMATCH && member->rank == 1 ? NULL : &purse);
	setrlimit(RLIMIT_NOFILE, &limit);
	EXPECT(member, status == variant->status && strstr(lshard_group_error(rank.group), variant->words), "%d: %s",
	       (int)status, lshard_group_error(rank.group));
	EXPECT(member, stub_cuda_outstanding() == objects, "%d objects are left", stub_cuda_outstanding() - objects);
	EXPECT(member, team_barrier(member), "another rank failed");
	cuda_close_rank(&rank);
	EXPECT(member, is_balanced(member, &purse), "not given back");
	close_purse(&purse, member);
	return 0;
failed:
	cuda_close_rank(&rank);
	return 1;
}

static void memory_that_will_not_do_is_refused(void **state)
{
	const struct setting setting = {.spec = "cuda", .prefetch = 1};
	const struct variant variants[] = {
		{setting, HOST, 1, LSHARD_ERR_INVALID, "for a shard at 0x"},
		{setting, HOST, 0, LSHARD_ERR_INVALID, "is not memory of device 0"},
		{setting, OTHER_DEVICE, 1, LSHARD_ERR_INVALID, "is not memory of device 1"},
		{setting, MAPPED, 1, LSHARD_ERR_NOT_SUPPORTED, "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"},
		{setting, CROOKED, 1, LSHARD_ERR_INVALID, "is not aligned to 256"},
		{setting, NOTHING, 1, LSHARD_ERR_NO_MEMORY,
		 "rank 1: series 'blocks': the caller has no memory for a shard"},
		{setting, NO_PIPE, 1, LSHARD_ERR_TRANSPORT, "who reads the caller's memory: Too many open files"},
		{setting, FAR_END, 1, LSHARD_ERR_INVALID, "ends after 4096"},
		{setting, CUT_OUT, 1, LSHARD_ERR_MISMATCH, "memory_source is 1 on rank 0 and 0 on rank 1"},
	};

	(void)state;
	for (size_t i = 0; i < sizeof variants / sizeof variants[0]; i++) {
		struct variant variant = variants[i];

		assert_int_equal(team_of_processes(2, is_refused, &variant), 0);
	}
}

int main(int count, char **arguments)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_callers_memory_is_used),
		cmocka_unit_test(a_shard_is_given_back_when_nobody_reads_it),
		cmocka_unit_test(children_of_readers_are_no_readers),
		cmocka_unit_test(what_is_read_for_ever_is_not_given_back),
		cmocka_unit_test(what_a_copy_may_still_use_is_not_given_back),
		cmocka_unit_test(memory_that_will_not_do_is_refused),
	};

	if (count != 2) {
		fprintf(stderr, "usage: test_cuda_caller PATH-OF-THE-STUB\n");
		return 2;
	}
	setenv("LAYERSHARD_CUDA_SO_PATH", arguments[1], 1);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
