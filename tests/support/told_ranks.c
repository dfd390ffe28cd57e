/* SPDX-License-Identifier: Apache-2.0
 *
 * told_ranks.c - see told_ranks.h.
 */
#include "told_ranks.h"
#include "patience.h"
#include "socket_circle.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST_SERIES 4
#define TENSORS     2u

struct message {
	enum order order;
	uint32_t number;
	uint64_t value;
};

/* In the rank's own process. */
struct state {
	struct told_options options;
	int rank, size, from, to;
	const char *job;
	lshard_group *group;
	lshard_series *series[MOST_SERIES];
	uint32_t number; /* of the series meant */
	uint64_t generation;
	struct told_reply reply;
	enum told_fault fault;
	uint64_t fault_value;
	long allocations; /* that are left; negative: as many as it likes */
	struct member member;
	struct socket_circle circle;
};

static atomic_llong clock_jump; /* seconds; the library must not see it */

/* The time of day of this program. Linked before the C library's. */
int clock_gettime(clockid_t clock, struct timespec *time)
{
	const int failed = (int)syscall(SYS_clock_gettime, clock, time);

	if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
		time->tv_sec += atomic_load(&clock_jump);
	return failed;
}

int gettimeofday(struct timeval *restrict now_is, void *restrict zone)
{
	struct timespec time;

	(void)zone;
	(void)clock_gettime(CLOCK_REALTIME, &time);
	now_is->tv_sec = time.tv_sec;
	now_is->tv_usec = time.tv_nsec / 1000;
	return 0;
}

time_t time(time_t *into)
{
	struct timespec time;

	(void)clock_gettime(CLOCK_REALTIME, &time);
	if (into)
		*into = time.tv_sec;
	return time.tv_sec;
}

/* ---- Faults ---------------------------------------------------------------------------------------------------- */

static void *allocate(void *user, size_t bytes)
{
	struct state *state = user;

	if (state->allocations == 0)
		return NULL;
	if (state->allocations > 0)
		state->allocations--;
	return calloc(1, bytes);
}

static void release(void *user, void *pointer)
{
	(void)user;
	free(pointer);
}

static void limit(int which, rlim_t value)
{
	struct rlimit now_is;

	getrlimit((__rlimit_resource_t)which, &now_is);
	now_is.rlim_cur = value < now_is.rlim_max ? value : now_is.rlim_max;
	setrlimit((__rlimit_resource_t)which, &now_is);
}

static rlim_t bytes_mapped(void)
{
	FILE *file = fopen("/proc/self/statm", "r");
	unsigned long pages = 0;

	if (file && fscanf(file, "%lu", &pages) != 1)
		pages = 0;
	if (file)
		fclose(file);
	return (rlim_t)pages * (rlim_t)sysconf(_SC_PAGESIZE);
}

static rlim_t highest_descriptor(void)
{
	const int next = dup(0);
	int highest = next;

	for (int fd = 3; fd < 1024; fd++)
		if (fcntl(fd, F_GETFD) >= 0 && fd > highest)
			highest = fd;
	close(next);
	return (rlim_t)(highest + (highest == next ? 0 : 1));
}

static void take_fault(struct state *state, enum told_fault fault, uint64_t value)
{
	state->fault = fault;
	state->fault_value = value;
	state->allocations = fault == TOLD_NO_MEMORY ? (long)value : -1;
	limit(RLIMIT_NOFILE, fault == TOLD_FEW_DESCRIPTORS ? highest_descriptor() + value : RLIM_INFINITY);
	limit(RLIMIT_FSIZE, fault == TOLD_SMALL_FILES ? value : RLIM_INFINITY);
	limit(RLIMIT_AS, fault == TOLD_SMALL_SPACE ? bytes_mapped() + value : RLIM_INFINITY);
	atomic_store(&clock_jump, fault == TOLD_CLOCK_JUMPS ? (long long)value : 0);
}

static unsigned char byte_of(uint32_t number, uint32_t layer, uint32_t tensor, uint64_t at, uint64_t generation)
{
	return (unsigned char)(number * 77 + layer * 31 + tensor * 13 + at * 7 + at / 251 + generation * 101);
}

static int fill(void *user, uint32_t layer, void *const *tensors)
{
	struct state *state = user;

	if (state->fault == TOLD_CALLBACK_BLOCKS)
		usleep((useconds_t)state->fault_value * 1000);
	if (state->fault == TOLD_CALLBACK_BLOCKS || state->fault == TOLD_CALLBACK_FAILS)
		state->reply.called++;
	if (state->fault == TOLD_CALLBACK_FAILS) {
		state->fault = TOLD_NO_FAULT;
		return 7;
	}
	if (state->fault == TOLD_CALLBACK_BLOCKS)
		state->fault = TOLD_NO_FAULT;
	for (uint32_t tensor = 0; tensor < TENSORS; tensor++)
		for (uint64_t at = 0; at < state->options.tensor_bytes; at++)
			((unsigned char *)tensors[tensor])[at] =
				byte_of(state->number, layer, tensor, at, state->generation);
	state->reply.called++;
	return 0;
}

static bool is_right(const struct state *state, uint32_t layer, uint32_t tensor, const unsigned char *bytes)
{
	for (uint64_t at = 0; at < state->options.tensor_bytes; at++)
		if (bytes[at] != byte_of(state->number, layer, tensor, at, state->generation))
			return false;
	return true;
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static lshard_status compute(struct state *state, uint32_t layer)
{
	lshard_series *series = state->series[state->number];
	lshard_status status = lshard_reach(series, layer, NULL);
	void *address;

	if (status >= 0)
		status = lshard_wait(series, layer, NULL);
	for (uint32_t tensor = 0; tensor < TENSORS && status >= 0; tensor++) {
		status = lshard_series_address(series, layer, tensor, &address);
		if (status >= 0 && !is_right(state, layer, tensor, address))
			return LSHARD_ERR_CORRUPT;
	}
	return status;
}

static lshard_status pass(struct state *state)
{
	const uint64_t begin = now();
	lshard_status status = LSHARD_OK;

	for (uint32_t layer = 0; layer < state->options.layers && status >= 0; layer++)
		status = compute(state, layer);
	if (now() - begin > state->reply.longest_ns)
		state->reply.longest_ns = now() - begin;
	state->reply.passes++;
	return status;
}

static bool is_told(int fd)
{
	struct pollfd polled = {.fd = fd, .events = POLLIN};

	return poll(&polled, 1, 0) == 1;
}

static lshard_status pass_on(struct state *state)
{
	lshard_status status = LSHARD_OK;

	while (status >= 0 && !is_told(state->from))
		status = pass(state);
	return status;
}

static lshard_status pass_often(struct state *state, uint64_t times)
{
	lshard_status status = LSHARD_OK;

	state->generation = 0;
	while (status >= 0 && state->reply.passes < times)
		status = pass(state);
	return status;
}

static lshard_status make_group(struct state *state)
{
	const lshard_allocator allocator = {sizeof allocator, allocate, release, state};
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;

	options.allocator = &allocator;
	if (state->member.size)
		options.callbacks = &state->circle.callbacks;
	options.rank = state->rank;
	options.size = state->size;
	options.job = state->job;
	options.transport = state->options.transport;
	options.timeout_ms = state->options.timeout_ms;
	options.rejoin = state->options.rejoin;
	options.memory = state->options.on_device ? LSHARD_MEMORY_CUDA : LSHARD_MEMORY_HOST;
	options.device = state->rank;
	options.error = state->reply.text;
	options.error_bytes = sizeof state->reply.text;
	return lshard_group_create(&options, &state->group);
}

static lshard_status make_series(struct state *state)
{
	lshard_tensor tensors[TENSORS] = {{.name = "weight"}, {.name = "scale"}};
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;
	char name[16];

	for (uint32_t tensor = 0; tensor < TENSORS; tensor++)
		tensors[tensor].bytes = state->options.tensor_bytes;
	snprintf(name, sizeof name, "series %u", (unsigned)state->number);
	options.name = name;
	options.layer_count = state->options.layers;
	options.tensors = tensors;
	options.tensor_count = TENSORS;
	options.placement = state->options.placement;
	options.prefetch = state->options.prefetch;
	return lshard_series_create(state->group, &options, &state->series[state->number]);
}

static lshard_status try_storage(const struct state *state)
{
	void *address;

	return lshard_series_storage(state->series[state->number], (uint32_t)state->rank, 0, &address);
}

static int count_in(const char *path)
{
	DIR *directory = opendir(path);
	int count = 0;

	while (directory && readdir(directory))
		count++;
	if (directory)
		closedir(directory);
	return count;
}

static void count_all(struct told_reply *reply)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	char line[512];

	while (maps && fgets(line, sizeof line, maps))
		reply->mappings += strstr(line, "layershard:") != NULL;
	if (maps)
		fclose(maps);
	reply->descriptors = count_in("/proc/self/fd");
	reply->threads = count_in("/proc/self/task");
}

static lshard_status obey(struct state *state, const struct message *message)
{
	lshard_series *series = message->order == TOLD_FAULT ? NULL : state->series[message->number];
	lshard_stats stats = LSHARD_STATS_INIT;
	lshard_status status = LSHARD_OK;

	if (message->order != TOLD_FAULT) {
		state->number = message->number;
		state->generation = message->value;
	}
	switch (message->order) {
	case TOLD_GROUP:
		return make_group(state);
	case TOLD_SERIES:
		status = make_series(state);
		if (status >= 0)
			state->reply.storage = try_storage(state);
		return status;
	case TOLD_COMMIT:
		return lshard_series_commit(series, fill, state);
	case TOLD_PASS:
		return pass(state);
	case TOLD_ON_PASS:
		return pass_on(state);
	case TOLD_PASSES:
		return pass_often(state, message->value);
	case TOLD_BEGIN:
		return lshard_series_update_begin(series);
	case TOLD_END:
		return lshard_series_update_end(series, fill, state);
	case TOLD_VERIFY:
		status = lshard_series_verify(series, &state->reply.hash);
		if (status >= 0 && lshard_series_stats(series, &stats) >= 0)
			state->reply.generation = stats.generation;
		return status;
	case TOLD_REWIND:
		return lshard_series_rewind(series);
	case TOLD_DESTROY:
		status = lshard_series_destroy(series);
		if (status >= 0)
			state->series[state->number] = NULL;
		return status;
	case TOLD_LEAVE:
		status = lshard_group_destroy(state->group);
		if (status != LSHARD_ERR_BUSY)
			state->group = NULL;
		return status;
	case TOLD_ABORT:
		lshard_group_abort(state->group);
		return LSHARD_OK;
	case TOLD_FAULT:
		take_fault(state, (enum told_fault)message->number, message->value);
		return LSHARD_OK;
	case TOLD_COUNT:
		count_all(&state->reply);
		return LSHARD_OK;
	case TOLD_END_PROCESS:
		break;
	}
	_exit(0);
}

static void explain(struct state *state, enum order order)
{
	const lshard_series *series = state->series[state->number];
	const char *text = "";

	if (state->reply.status == LSHARD_ERR_CORRUPT && (order == TOLD_PASS || order == TOLD_ON_PASS))
		text = "a layer has other bytes";
	else if (order == TOLD_SERIES || order == TOLD_LEAVE)
		text = state->group ? lshard_group_error(state->group) : "";
	else if (order != TOLD_GROUP && series)
		text = lshard_series_error(series);
	if (order != TOLD_GROUP)
		snprintf(state->reply.text, sizeof state->reply.text, "%s", text);
}

/* In a child by fork everything is refused that there is. */
static int try_as_child(struct state *state)
{
	lshard_series *series = state->series[state->number];
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;
	lshard_tensor tensor = {.name = "weight", .bytes = 256};
	lshard_series *made;

	options.name = "a child's";
	options.layer_count = 1;
	options.tensors = &tensor;
	options.tensor_count = 1;
	if (state->group && lshard_series_create(state->group, &options, &made) != LSHARD_ERR_STATE)
		return 1;
	if (series && (lshard_reach(series, 0, NULL) != LSHARD_ERR_STATE ||
		       lshard_series_update_begin(series) != LSHARD_ERR_STATE))
		return 2;
	return 0;
}

static pid_t fork_child(struct state *state)
{
	const pid_t child = fork();

	if (child == 0)
		_exit(try_as_child(state));
	return child;
}

static lshard_status obey_with_child(struct state *state, const struct message *message)
{
	const pid_t child = fork_child(state);
	const lshard_status status = obey(state, message);
	int ended = 0;

	waitpid(child, &ended, 0);
	state->fault = TOLD_NO_FAULT;
	state->reply.child = ended == 0;
	return status;
}

static void live(struct state *state)
{
	struct message message;

	while (recv(state->from, &message, sizeof message, 0) == (ssize_t)sizeof message) {
		memset(&state->reply, 0, sizeof state->reply);
		if (state->fault == TOLD_FORKS)
			state->reply.status = obey_with_child(state, &message);
		else
			state->reply.status = obey(state, &message);
		if (state->reply.status < 0)
			explain(state, message.order);
		state->reply.returned = state->group && lshard_group_returned(state->group);
		state->reply.filled =
			state->series[state->number] && lshard_series_is_filled(state->series[state->number]);
		if (send(state->to, &state->reply, sizeof state->reply, MSG_NOSIGNAL) < 0)
			break;
	}
	_exit(0);
}

bool told_circle_open(struct told_circle *circle)
{
	bool opened = true;
	int pair[2];

	for (int a = 0; a < 3; a++)
		for (int b = a; b < 3; b++) {
			opened &= a == b || !socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair);
			circle->ends[a][b] = a == b ? -1 : pair[0];
			circle->ends[b][a] = a == b ? -1 : pair[1];
		}
	return opened;
}

void told_circle_close(struct told_circle *circle)
{
	for (int a = 0; a < 3; a++)
		for (int b = 0; b < 3; b++)
			if (a != b)
				close(circle->ends[a][b]);
}

/* What a rank has of its parent: its own socket, and its ends of the circle. */
static void close_others(const struct state *state, int own, const struct told_circle *circle)
{
	for (int fd = 3; fd < 256; fd++) {
		bool keeps = fd == own;

		for (int peer = 0; circle && peer < 3; peer++)
			keeps |= fd == circle->ends[state->rank][peer];
		if (!keeps)
			close(fd);
	}
}

void told_start(struct told_rank *told, int rank, int size, const char *job, const struct told_options *options)
{
	told_start_in(told, rank, size, job, options, NULL);
}

void told_start_in(struct told_rank *told, int rank, int size, const char *job, const struct told_options *options,
		   const struct told_circle *circle)
{
	struct state state = {.options = *options, .rank = rank, .size = size, .job = job, .allocations = -1};
	int sockets[2];

	*told = (struct told_rank){.rank = rank};
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets))
		return;
	told->pid = fork();
	if (told->pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close_others(&state, sockets[1], circle);
		if (circle) {
			state.member = (struct member){.rank = rank, .size = size};
			memcpy(state.circle.ends, circle->ends[rank], sizeof state.circle.ends);
			socket_circle_open(&state.circle, &state.member);
		}
		state.from = state.to = sockets[1];
		live(&state);
	}
	close(sockets[1]);
	told->to = told->from = sockets[0];
}

void told_kill(struct told_rank *told)
{
	if (told->pid <= 0)
		return;
	kill(told->pid, SIGKILL);
	waitpid(told->pid, NULL, 0);
	close(told->to);
	told->pid = 0;
}

bool told_tell(const struct told_rank *told, enum order order, uint32_t number, uint64_t value)
{
	const struct message message = {order, number, value};

	return send(told->to, &message, sizeof message, MSG_NOSIGNAL) == (ssize_t)sizeof message;
}

bool told_hear(const struct told_rank *told, struct told_reply *reply)
{
	struct pollfd polled = {.fd = told->from, .events = POLLIN};

	return poll(&polled, 1, (int)LONG_MS) == 1 &&
	       recv(told->from, reply, sizeof *reply, 0) == (ssize_t)sizeof *reply;
}

struct told_reply told_do(const struct told_rank *told, enum order order, uint32_t number, uint64_t value)
{
	return told_all(&told, 1, order, number, value);
}

struct told_reply told_all(const struct told_rank *const *told, int n, enum order order, uint32_t number,
			   uint64_t value)
{
	struct told_reply first = {.status = LSHARD_OK};
	struct told_reply reply = first;

	for (int i = 0; i < n; i++)
		(void)told_tell(told[i], order, number, value);
	for (int i = 0; i < n; i++) {
		if (!told_hear(told[i], &reply))
			reply = (struct told_reply){.status = LSHARD_ERR_PEER_FAILED, .text = "died"};
		if (reply.status < 0 && first.status >= 0)
			first = reply;
	}
	return first.status < 0 ? first : reply;
}
