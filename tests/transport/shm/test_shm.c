/* SPDX-License-Identifier: Apache-2.0
 *
 * test_shm.c - the memory of the shm transport: the right bytes in every mode and shape, pages nobody else can write,
 * bytes that outlive their owner, and nothing left behind. How its ranks exchange is in test_control.c.
 */
#include "shm_ranks.h"
#include "shm.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cmocka.h>

#define LAYERS  7u
#define BUFFERS 3u

struct mode {
	const char *options;
	enum shape shape;
	int direct;
};

static int all_exchange(const struct shm_rank *rank)
{
	uint8_t alive[MOST_RANKS];
	int32_t all[MOST_RANKS];

	return rank->transport->ops->exchange(rank->transport, &rank->context.rank, all, sizeof all[0], alive) ==
	       LSHARD_OK;
}

/* ---- Right bytes ----------------------------------------------------------------------------------------------- */

static int passes_in_place(const struct member *member, struct shm_series *series, unsigned generation)
{
	const lshard_transport_ops *ops = series->store->transport->ops;
	lshard_arrival arrival = {1, 1, 1, 1};

	for (uint32_t position = 0; position < LAYERS; position++) {
		EXPECT(member, shm_series_right(series, position, generation, ops->peer(series->store, position)),
		       "in place");
		EXPECT(member, ops->peer(series->store, position) == ops->peer(series->store, position), "address");
	}
	EXPECT(member, ops->wait(series->store, 0, NULL, &arrival) == LSHARD_OK && arrival.busy_ns == 0,
	       "nothing to wait for");
	return 0;
failed:
	return 1;
}

static int passes_through_buffers(const struct member *member, struct shm_series *series, unsigned generation)
{
	lshard_store *store = series->store;
	const lshard_transport_ops *ops = store->transport->ops;
	uint64_t sequence = 0;

	for (uint32_t step = 0; step < 4 * LAYERS; step++) {
		uint32_t position = step % LAYERS;
		uint32_t buffer = step % BUFFERS;
		lshard_arrival arrival;

		EXPECT(member, ops->fetch(store, position, buffer, NULL, sequence++) == LSHARD_OK, "%s",
		       store->error.text);
		EXPECT(member, ops->wait(store, buffer, NULL, &arrival) == LSHARD_OK, "%s", store->error.text);
		EXPECT(member, shm_series_right(series, position, generation, ops->buffer(store, buffer, position)),
		       "buffer");
		EXPECT(member, arrival.finished_ns >= arrival.started_ns && arrival.started_ns, "times");
		EXPECT(member, ops->wait(store, buffer, NULL, &arrival) == LSHARD_OK && arrival.started_ns == 0,
		       "told twice");
	}
	return 0;
failed:
	return 1;
}

static int reads(const struct member *member, struct shm_series *series, unsigned generation)
{
	lshard_store *store = series->store;
	void *layer = malloc(series->plan.layer_bytes);

	for (uint32_t position = 0; position < LAYERS; position++) {
		EXPECT(member, layer && store->transport->ops->read(store, position, layer) == LSHARD_OK, "read");
		EXPECT(member, shm_series_right(series, position, generation, layer), "read");
	}
	free(layer);
	return 0;
failed:
	free(layer);
	return 1;
}

static int sees_right_bytes(const struct member *member)
{
	const struct mode *mode = member->user;
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};

	EXPECT(member, shm_rank_open(&rank, member, mode->options, LONG_MS), "open");
	shm_series_plan(&series, member, mode->shape, LAYERS, mode->direct, mode->direct ? 0 : BUFFERS);
	EXPECT(member, shm_series_open(&rank, &series) == LSHARD_OK, "%s", rank.transport->error.text);
	for (unsigned generation = 0; generation < 3; generation++) {
		shm_series_fill(&series, generation);
		EXPECT(member, all_exchange(&rank), "%s", rank.transport->error.text);
		EXPECT(member, !(mode->direct ? passes_in_place : passes_through_buffers)(member, &series, generation),
		       "pass");
		EXPECT(member, !reads(member, &series, generation), "read");
		EXPECT(member, all_exchange(&rank), "%s", rank.transport->error.text);
	}
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 1;
}

static void every_mode_shows_the_right_bytes(void **state)
{
	struct mode modes[] = {
		{"", WHOLE, 1},     {"", PAGES, 1},     {"", COLUMNS, 0},
		{"copy", WHOLE, 0}, {"copy", PAGES, 0}, {"copy", COLUMNS, 0},
	};

	(void)state;
	for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++)
		for (int32_t size = 1; size <= 4; size++)
			assert_int_equal(team_of_processes(size, sees_right_bytes, &modes[i]), 0);
}

static void more_ranks_than_layers(void **state)
{
	struct mode direct = {"", WHOLE, 1};
	struct mode copy = {"copy", WHOLE, 0};

	(void)state;
	assert_int_equal(team_of_processes(8, sees_right_bytes, &direct), 0);
	assert_int_equal(team_of_processes(8, sees_right_bytes, &copy), 0);
}

static void threads_of_one_process_can_use_it(void **state)
{
	struct mode direct = {"", PAGES, 1};
	struct mode copy = {"copy", WHOLE, 0};

	(void)state;
	assert_int_equal(team_of_threads(3, sees_right_bytes, &direct), 0);
	assert_int_equal(team_of_threads(3, sees_right_bytes, &copy), 0);
	assert_int_equal(contexts_outstanding(), 0);
}

/* Pieces that are not whole pages cannot be put together in place: said, on all ranks, and nothing is left. */
static int refuses_half_pages(const struct member *member)
{
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	shm_series_plan(&series, member, COLUMNS, LAYERS, 1, 0);
	EXPECT(member, shm_series_open(&rank, &series) == LSHARD_ERR_NOT_SUPPORTED, "%s", rank.transport->error.text);
	EXPECT(member, !series.store, "an out-parameter was written");
	shm_rank_close(&rank);
	return 0;
failed:
	shm_rank_close(&rank);
	return 1;
}

static void half_pages_are_refused_in_place(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, refuses_half_pages, NULL), 0);
}

/* ---- The copying thread ---------------------------------------------------------------------------------------- */

/* Fetches one after the other into one buffer: the last one counts. What is not waited for is dropped by the close. */
static int fetches_over_and_over(const struct member *member)
{
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series[2] = {{.store = NULL}, {.store = NULL}};
	const lshard_transport_ops *ops;
	lshard_arrival arrival;

	EXPECT(member, shm_rank_open(&rank, member, "copy", LONG_MS), "open");
	ops = rank.transport->ops;
	EXPECT(member, !(ops->capabilities & LSHARD_CAP_DIRECT), "copying is not direct");
	for (int i = 0; i < 2; i++) {
		shm_series_plan(&series[i], member, i ? COLUMNS : WHOLE, LAYERS, 0, BUFFERS);
		EXPECT(member, shm_series_open(&rank, &series[i]) == LSHARD_OK, "%s", rank.transport->error.text);
		shm_series_fill(&series[i], (unsigned)i);
	}
	EXPECT(member, all_exchange(&rank), "%s", rank.transport->error.text);
	for (uint32_t turn = 0; turn < 500; turn++) {
		lshard_store *store = series[turn % 2].store;
		uint32_t last = (turn * 5 + 2) % LAYERS;

		for (uint32_t i = 0; i <= turn % 4; i++)
			EXPECT(member, ops->fetch(store, i, 1, NULL, 0) == LSHARD_OK, "%s", store->error.text);
		EXPECT(member, ops->fetch(store, last, 1, NULL, 0) == LSHARD_OK, "%s", store->error.text);
		EXPECT(member, ops->wait(store, 1, NULL, &arrival) == LSHARD_OK, "%s", store->error.text);
		EXPECT(member, shm_series_right(&series[turn % 2], last, turn % 2, ops->buffer(store, 1, last)),
		       "turn %u", turn);
	}
	for (uint32_t buffer = 0; buffer < BUFFERS; buffer++)
		EXPECT(member, ops->fetch(series[0].store, buffer, buffer, NULL, 0) == LSHARD_OK, "%s",
		       series[0].store->error.text);
	EXPECT(member, ops->join(series[0].store, NULL) == LSHARD_OK, "%s", series[0].store->error.text);
	for (uint32_t buffer = 0; buffer < BUFFERS; buffer++)
		EXPECT(member, shm_series_right(&series[0], buffer, 0, ops->buffer(series[0].store, buffer, buffer)),
		       "after join");
	for (int i = 0; i < 2; i++)
		for (uint32_t buffer = 0; buffer < BUFFERS; buffer++)
			EXPECT(member, ops->fetch(series[i].store, buffer, buffer, NULL, 0) == LSHARD_OK,
			       "last fetches");
	EXPECT(member, ops->drain(series[1].store) == LSHARD_OK, "%s", series[1].store->error.text);
	shm_series_close(&series[0]);
	shm_series_close(&series[1]);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_series_close(&series[0]);
	shm_series_close(&series[1]);
	shm_rank_close(&rank);
	return 1;
}

static void the_last_fetch_into_a_buffer_counts(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, fetches_over_and_over, NULL), 0);
	assert_int_equal(team_of_threads(2, fetches_over_and_over, NULL), 0);
}

/* Stop the copying thread as nothing outside this test can, and let it go on later. */
static void copier_stop(struct shm_copier *copier)
{
	pthread_mutex_lock(&copier->lock);
	copier->stop = 1;
	pthread_cond_signal(&copier->work);
	pthread_mutex_unlock(&copier->lock);
	pthread_join(copier->thread, NULL);
	copier->started = copier->stop = 0;
}

/* A wait whose time is up says how long it blocked and changes nothing: the next one goes on. */
static int waits_twice(const struct member *member)
{
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};
	const lshard_transport_ops *ops;
	struct shm_copier *copier;
	lshard_arrival arrival = {0, 1, 1, 1};
	lshard_error error = {""};
	uint32_t others = member->rank ? 0 : 1;

	EXPECT(member, shm_rank_open(&rank, member, "copy", LONG_MS), "open");
	ops = rank.transport->ops;
	copier = &((struct shm *)rank.transport)->copier;
	shm_series_plan(&series, member, WHOLE, LAYERS, 0, BUFFERS);
	EXPECT(member, shm_series_open(&rank, &series) == LSHARD_OK, "%s", rank.transport->error.text);
	shm_series_fill(&series, 4);
	EXPECT(member, all_exchange(&rank), "%s", rank.transport->error.text);
	copier_stop(copier);
	rank.context.timeout_ms = 50;
	EXPECT(member, ops->fetch(series.store, others, 2, NULL, 0) == LSHARD_OK, "%s", series.store->error.text);
	for (int i = 0; i < 2; i++) {
		EXPECT(member, ops->wait(series.store, 2, NULL, &arrival) == LSHARD_ERR_TIMEOUT, "nobody copies");
		EXPECT(member, arrival.blocked_ns >= 50000000u && arrival.busy_ns == 0, "%llu ns",
		       (unsigned long long)arrival.blocked_ns);
	}
	rank.context.timeout_ms = LONG_MS;
	EXPECT(member, shm_copier_start(copier, &error) == LSHARD_OK, "%s", error.text);
	EXPECT(member, ops->wait(series.store, 2, NULL, &arrival) == LSHARD_OK, "%s", series.store->error.text);
	EXPECT(member, arrival.finished_ns >= arrival.started_ns && arrival.started_ns > 0, "its times");
	EXPECT(member, shm_series_right(&series, others, 4, ops->buffer(series.store, 2, others)), "bytes");
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 1;
}

static void a_wait_in_vain_can_be_repeated(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(2, waits_twice, NULL), 0);
}

/* ---- Protection ------------------------------------------------------------------------------------------------ */

/* The file behind an address, opened for writing by way of /proc; -1 where the system does not let us. */
static int reopen(const void *address)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[512];
	int fd = -1;

	while (maps && fd < 0 && fgets(line, sizeof line, maps)) {
		unsigned long first;
		unsigned long end;
		char path[64];

		if (sscanf(line, "%lx-%lx", &first, &end) != 2 || (uintptr_t)address < first ||
		    (uintptr_t)address >= end)
			continue;
		snprintf(path, sizeof path, "/proc/self/map_files/%lx-%lx", first, end);
		fd = open(path, O_RDWR | O_CLOEXEC);
		break;
	}
	if (maps)
		fclose(maps);
	return fd;
}

static int cannot_write(const struct member *member, void *address)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	int fd = -1;

	EXPECT(member, mprotect(address, page, PROT_READ | PROT_WRITE) && errno == EACCES,
	       "a peer's page can be made writable");
	fd = reopen(address);
	if (fd < 0) {
		fprintf(stderr, "not tried: opening a mapping's file again: %s\n", strerror(errno));
		return 0;
	}
	EXPECT(member, mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED, "mapped for writing");
	EXPECT(member, write(fd, "x", 1) < 0, "written to");
	EXPECT(member, ftruncate(fd, 0) < 0, "cut off under its readers");
	EXPECT(member, fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) < 0, "sealed further");
	close(fd);
	return 0;
failed:
	if (fd >= 0)
		close(fd);
	return 1;
}

static int protects(const struct member *member)
{
	const struct mode *mode = member->user;
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};
	uint32_t others = member->rank ? 0 : 1; /* position of a layer, or part of one, of another rank */
	char *layer;

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	shm_series_plan(&series, member, mode->shape, LAYERS, 1, 0);
	EXPECT(member, shm_series_open(&rank, &series) == LSHARD_OK, "%s", rank.transport->error.text);
	layer = rank.transport->ops->peer(series.store, others);
	EXPECT(member, !cannot_write(member, layer), "protection");
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 1;
}

static void nobody_writes_to_another_ranks_pages(void **state)
{
	struct mode whole = {"", WHOLE, 1};
	struct mode pages = {"", PAGES, 1};

	(void)state;
	assert_int_equal(team_of_processes(2, protects, &whole), 0);
	assert_int_equal(team_of_processes(2, protects, &pages), 0);
}

/* ---- Death ----------------------------------------------------------------------------------------------------- */

static int outlives(const struct member *member)
{
	const struct mode *mode = member->user;
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};
	uint8_t alive[MOST_RANKS];
	int32_t all[MOST_RANKS];

	EXPECT(member, shm_rank_open(&rank, member, mode->options, LONG_MS), "open");
	shm_series_plan(&series, member, mode->shape, LAYERS, mode->direct, BUFFERS);
	EXPECT(member, shm_series_open(&rank, &series) == LSHARD_OK, "%s", rank.transport->error.text);
	shm_series_fill(&series, 0);
	EXPECT(member, all_exchange(&rank), "%s", rank.transport->error.text);
	if (member->rank == 1) {
		team_dies(member);
		raise(SIGKILL);
	}
	EXPECT(member,
	       rank.transport->ops->exchange(rank.transport, &member->rank, all, sizeof all[0], alive) == LSHARD_OK,
	       "%s", rank.transport->error.text);
	EXPECT(member, !alive[1] && alive[0] && alive[2], "rank 1 is dead");
	EXPECT(member, !(mode->direct ? passes_in_place : passes_through_buffers)(member, &series, 0), "pass");
	EXPECT(member, !reads(member, &series, 0), "read");
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 1;
}

static void bytes_outlive_their_owner(void **state)
{
	struct mode modes[] = {{"", WHOLE, 1}, {"", PAGES, 1}, {"copy", COLUMNS, 0}};

	(void)state;
	for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++)
		assert_int_equal(team_of_processes(3, outlives, &modes[i]), 0);
}

static int opens_after_a_death(const struct member *member)
{
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	shm_series_plan(&series, member, WHOLE, LAYERS, 1, 0);
	if (member->rank == 2) {
		team_dies(member);
		raise(SIGKILL);
	}
	EXPECT(member, shm_series_open(&rank, &series) == LSHARD_ERR_PEER_FAILED, "%s", rank.transport->error.text);
	EXPECT(member, strstr(rank.transport->error.text, "rank 2") != NULL, "%s", rank.transport->error.text);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 1;
}

static void a_series_needs_all_ranks(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, opens_after_a_death, NULL), 0);
}

/* ---- Failing together ------------------------------------------------------------------------------------------ */

/* What rank 1 asks for cannot be had: all hear it in its words, and the next series is opened as if nothing had been.
 */
static int asks_too_much(const struct member *member)
{
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	shm_series_plan(&series, member, WHOLE, LAYERS, 1, 0);
	series.shard_bytes[1] = UINT64_C(1) << 55;
	series.plan.shard_bytes = series.shard_bytes[member->rank];
	EXPECT(member, shm_series_open(&rank, &series) < 0, "opened");
	EXPECT(member,
	       strstr(rank.transport->error.text, "rank 1: series 'o_proj': shard of 36028797018963968 bytes") != NULL,
	       "%s", rank.transport->error.text);
	shm_series_plan(&series, member, WHOLE, LAYERS, 1, 0);
	EXPECT(member, shm_series_open(&rank, &series) == LSHARD_OK, "%s", rank.transport->error.text);
	shm_series_fill(&series, 9);
	EXPECT(member, all_exchange(&rank), "%s", rank.transport->error.text);
	EXPECT(member, !passes_in_place(member, &series, 9), "pass");
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 1;
}

static void one_without_memory_fails_all(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, asks_too_much, NULL), 0);
}

static int opens_late(const struct member *member)
{
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};

	EXPECT(member, shm_rank_open(&rank, member, "", LONG_MS), "open");
	shm_series_plan(&series, member, PAGES, LAYERS, 1, 0);
	rank.context.timeout_ms = patience(500);
	EXPECT(member, team_barrier(member), "another rank failed"); /* both that come do so together */
	if (member->rank != 1) {
		EXPECT(member, shm_series_open(&rank, &series) == LSHARD_ERR_TIMEOUT, "%s", rank.transport->error.text);
		EXPECT(member, strstr(rank.transport->error.text, "for rank 1") != NULL, "%s",
		       rank.transport->error.text);
	}
	EXPECT(member, team_barrier(member), "another rank failed");
	rank.context.timeout_ms = LONG_MS;
	EXPECT(member, shm_series_open(&rank, &series) == LSHARD_OK, "%s", rank.transport->error.text);
	shm_series_fill(&series, 3);
	EXPECT(member, all_exchange(&rank), "%s", rank.transport->error.text);
	EXPECT(member, !passes_in_place(member, &series, 3), "pass");
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 0;
failed:
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 1;
}

static void a_late_rank_can_be_tried_again(void **state)
{
	(void)state;
	assert_int_equal(team_of_processes(3, opens_late, NULL), 0);
}

/* ---- Nothing left ---------------------------------------------------------------------------------------------- */

static int count_entries(const char *path)
{
	DIR *directory = opendir(path);
	int count = 0;

	while (directory && readdir(directory))
		count++;
	if (directory)
		closedir(directory);
	return count;
}

/* Lines of a file with all of the given words. */
static int count_lines(const char *path, const char *word, const char *other)
{
	FILE *file = fopen(path, "re");
	char line[512];
	int count = 0;

	while (file && fgets(line, sizeof line, file))
		count += strstr(line, word) && strstr(line, other);
	if (file)
		fclose(file);
	return count;
}

static int leaves_nothing(const struct member *member)
{
	const struct mode *mode = member->user;
	struct shm_rank rank = {.transport = NULL};
	struct shm_series series = {.store = NULL};
	int fds = count_entries("/proc/self/fd");
	int threads = count_entries("/proc/self/task");
	int connected;
	char name[64];

	snprintf(name, sizeof name, "@layershard/%lu/%d/", (unsigned long)geteuid(), (int)getpid());
	EXPECT(member, shm_rank_open(&rank, member, mode->options, LONG_MS), "open");
	connected = count_entries("/proc/self/fd");
	/* 00010000 in the flags: a socket that listens. */
	EXPECT(member, count_lines("/proc/net/unix", name, " 00010000 ") == 0, "a socket still listens");
	shm_series_plan(&series, member, mode->shape, LAYERS, mode->direct, mode->direct ? 0 : BUFFERS);
	EXPECT(member, shm_series_open(&rank, &series) == LSHARD_OK, "%s", rank.transport->error.text);
	EXPECT(member, count_entries("/proc/self/fd") == connected, "a series keeps descriptors");
	EXPECT(member, count_entries("/proc/self/task") == threads + !mode->direct, "threads");
	EXPECT(member, count_lines("/proc/self/maps", "memfd:layershard:o_proj:shard", "r--s") > 0,
	       "named and read-only");
	EXPECT(member, count_lines("/proc/self/maps", "memfd:layershard:o_proj:shard", "rw-s") == 1,
	       "one writable mapping");
	EXPECT(member, count_lines("/proc/self/maps", "memfd:layershard:o_proj:windows", "rw-s") == !mode->direct,
	       "windows");
	shm_series_close(&series);
	shm_rank_close(&rank);
	EXPECT(member, count_entries("/proc/self/fd") == fds, "descriptors");
	EXPECT(member, count_entries("/proc/self/task") == threads, "threads");
	EXPECT(member,
	       count_lines("/proc/self/maps", "layershard", "") == count_lines("/proc/self/maps", "layershard", "r-xp"),
	       "mappings");
	EXPECT(member, contexts_outstanding() == 0, "%d blocks", contexts_outstanding());
	return 0;
failed:
	shm_series_close(&series);
	shm_rank_close(&rank);
	return 1;
}

static void nothing_is_left_behind(void **state)
{
	struct mode modes[] = {{"", WHOLE, 1}, {"", PAGES, 1}, {"copy", PAGES, 0}};

	(void)state;
	for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++)
		assert_int_equal(team_of_processes(3, leaves_nothing, &modes[i]), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_mode_shows_the_right_bytes),
		cmocka_unit_test(more_ranks_than_layers),
		cmocka_unit_test(threads_of_one_process_can_use_it),
		cmocka_unit_test(half_pages_are_refused_in_place),
		cmocka_unit_test(the_last_fetch_into_a_buffer_counts),
		cmocka_unit_test(a_wait_in_vain_can_be_repeated),
		cmocka_unit_test(nobody_writes_to_another_ranks_pages),
		cmocka_unit_test(bytes_outlive_their_owner),
		cmocka_unit_test(a_series_needs_all_ranks),
		cmocka_unit_test(one_without_memory_fails_all),
		cmocka_unit_test(a_late_rank_can_be_tried_again),
		cmocka_unit_test(nothing_is_left_behind),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
