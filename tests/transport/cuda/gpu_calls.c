/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_calls.c - `gpu_calls [REPEATS [BYTES [MS [WORD]]]]`: what transfers cost the processor on a real device, by call
 * of the driver and by configuration of the cuda transport, alone and beside other processes that use the device.
 * BYTES: of a weight; MS: most of them for one line; WORD: only configurations whose name has it, `raw` for the calls
 * of the driver by themselves. Runs on the stub too, where its figures mean nothing. Exits 77 where there is no device.
 */
#include "gpu_calls.h"
#include "transports.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define STRIPES(dimension) .placement = LSHARD_STRIPED, .stripe = LSHARD_STRIPE_##dimension

const char *const gpu_others_names[OTHERS] = {"the other processes idle", "the others compute", "the others copy",
					      "the others make passes"};

/* ---- what the others do ---- */

static int disturb_once(struct rank *rank, enum others what)
{
	const cuda_stream stream = rank->device.streams[0];

	for (int i = 0; i < 8; i++) {
		if (what == OTHERS_COPY)
			CALL(rank,
			     rank->device.driver.copy(rank->scratch[0], rank->scratch[1], rank->bytes[0], stream));
		else if (!gpu_compare_bytes(rank, rank->reference[0][0], rank->reference[0][0], rank->bytes[0], stream))
			goto failed;
	}
	rank->device.stream_synchronize(stream);
	return 1;
failed:
	return 0;
}

int gpu_disturb(struct rank *rank, struct probe *probe, enum others what)
{
	int right = 1;

	while (right && what != OTHERS_NOTHING && !atomic_load(&probe->shared->stop)) {
		right = what == OTHERS_PASSES ? gpu_one_pass(rank, LAYERS, rank->device.streams[0])
					      : disturb_once(rank, what);
		rank->device.stream_synchronize(rank->device.streams[0]);
	}
	return right;
}

/* ---- a rank ---- */

typedef int (*teller)(struct rank *rank, const struct probe *probe, enum others others);

static int tell_beside(struct rank *rank, struct probe *probe, enum others others, teller tell)
{
	int right;

	if (!team_barrier(rank->member))
		return 0;
	if (rank->member->rank) {
		right = gpu_disturb(rank, probe, others);
	} else {
		right = tell(rank, probe, others);
		atomic_store(&probe->shared->stop, 1);
	}
	if (!team_barrier(rank->member))
		return 0;
	atomic_store(&probe->shared->stop, 0);
	return right && team_barrier(rank->member);
}

static int open_rank(struct rank *rank, const struct member *member, struct probe *probe)
{
	rank->member = member;
	rank->plan = &probe->plan;
	rank->bytes[0] = probe->plan.weight_bytes;
	rank->bytes[1] = 5000;
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!gpu_open(rank) || !gpu_make_references(rank) || !gpu_fill_references(rank))
		return 0;
	gpu_differences(rank);
	return 1;
}

/* Two processors from each other, in case neighbours share a core. */
static void pin(const struct member *member)
{
	cpu_set_t allowed;
	cpu_set_t mine;
	int wanted = 2 * member->rank;

	if (sched_getaffinity(0, sizeof allowed, &allowed) != 0)
		return;
	CPU_ZERO(&mine);
	for (size_t cpu = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, &allowed) && wanted-- == 0)
			CPU_SET(cpu, &mine);
	if (CPU_COUNT(&mine) == 0 || sched_setaffinity(0, sizeof mine, &mine) != 0)
		printf("  rank %d is not pinned\n", (int)member->rank);
}

static int run_raw(const struct member *member)
{
	struct probe *probe = member->user;
	struct rank rank = {.group = NULL};
	int right = open_rank(&rank, member, probe);

	for (int others = OTHERS_NOTHING; right && others <= OTHERS_COPY; others++)
		right = tell_beside(&rank, probe, (enum others)others, gpu_tells_raw_calls);
	free(rank.host);
	return !right;
}

static int run_series(const struct member *member)
{
	static const enum others beside[] = {OTHERS_NOTHING, OTHERS_PASSES, OTHERS_COMPUTE};
	struct probe *probe = member->user;
	struct rank rank = {.group = NULL};
	int right;

	if (probe->pinned)
		pin(member);
	right = open_rank(&rank, member, probe) && gpu_open_group(&rank);
	if (!right)
		return 1;
	gpu_trace.refuse = probe->enqueued;
	gpu_trace_group(rank.group);
	right = gpu_open_all(&rank);
	for (size_t i = 0; right && i < sizeof beside / sizeof beside[0]; i++)
		right = tell_beside(&rank, probe, beside[i], gpu_tells_series_calls);
	if (right && gpu_differences(&rank)) {
		fprintf(stderr, "rank %d: wrong words\n", (int)member->rank);
		right = 0;
	}
	right &= gpu_close_all(&rank);
	free(rank.host);
	return !right;
}

/* ---- the processor by itself ---- */

/* How long it is away from a loop that does nothing else: no call can be faster than this. */
static void tell_hiccups(void)
{
	const double begin = gpu_now_us();
	struct samples gaps;
	double last = begin;

	if (!samples_make(&gaps, 1u << 21))
		return;
	while (last - begin < 200000) {
		const double us = gpu_now_us();

		samples_add(&gaps, us - last);
		last = us;
	}
	samples_sort(&gaps);
	printf("us between two looks at the clock, the processor alone: median %.3f, 99 %% %.3f, 99.99 %% %.2f, "
	       "max %.1f of %zu\n",
	       samples_at(&gaps, 0.5), samples_at(&gaps, 0.99), samples_at(&gaps, 0.9999), samples_at(&gaps, 1),
	       gaps.count);
	samples_free(&gaps);
}

/* ---- what is run ---- */

static int run(struct probe probe, const char *word, member_body body)
{
	int failed;

	if (word && !strstr(probe.name, word))
		return 0;
	printf("%s: %s, %d ranks, k = %u\n", probe.name, probe.plan.spec, (int)probe.plan.size, probe.plan.prefetch);
	failed = team_of_processes(probe.plan.size, body, &probe);
	if (failed)
		printf("FAILED\n");
	return failed;
}

int main(int count, char **arguments)
{
	const uint64_t bytes = count > 2 ? strtoull(arguments[2], NULL, 10) : 24u << 20;
	const char *word = count > 4 ? arguments[4] : NULL;
	struct shared *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	const struct probe probes[] = {
		{.name = "raw", .plan = {.spec = "the driver alone"}},
		{.name = "whole", .plan = {.spec = "cuda:copy"}, .remedies = 1},
		{.name = "whole, pinned", .plan = {.spec = "cuda:copy"}, .pinned = 1},
		{.name = "whole, enqueued", .plan = {.spec = "cuda:copy"}, .enqueued = 1},
		{.name = "whole, ipc", .plan = {.spec = "cuda:copy+ipc"}},
		{.name = "bytes", .plan = {.spec = "cuda:copy", STRIPES(BYTES)}},
		{.name = "rows", .plan = {.spec = "cuda:copy", STRIPES(ROWS)}},
		{.name = "columns", .plan = {.spec = "cuda:copy", STRIPES(COLUMNS)}},
		{.name = "columns, ipc", .plan = {.spec = "cuda:copy+ipc", STRIPES(COLUMNS)}, .remedies = 1},
		{.name = "columns, ipc, enqueued", .plan = {.spec = "cuda:copy+ipc", STRIPES(COLUMNS)}, .enqueued = 1},
		{.name = "columns, ipc, 3 ranks", .plan = {.spec = "cuda:copy+ipc", .size = 3, STRIPES(COLUMNS)}},
		{.name = "whole, paced", .plan = {.spec = "cuda:copy+pace=20"}},
		{.name = "whole, paced, enqueued", .plan = {.spec = "cuda:copy+pace=20"}, .enqueued = 1},
		{.name = "bytes, paced", .plan = {.spec = "cuda:copy+pace=20", STRIPES(BYTES)}},
	};
	lshard_error error = {{0}};
	int failures = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!lshard__cuda.available(&error)) {
		printf("skipped: %s\n", error.text);
		return 77;
	}
	if (shared == MAP_FAILED)
		return 1;
	tell_hiccups();
	for (size_t i = 0; i < sizeof probes / sizeof probes[0]; i++) {
		struct probe probe = probes[i];

		probe.shared = shared;
		probe.repeats = count > 1 ? strtoul(arguments[1], NULL, 10) : 2000;
		probe.limit_us = count > 3 ? strtod(arguments[3], NULL) * 1000 : 400000;
		probe.plan.weight_bytes = bytes;
		probe.plan.size = probe.plan.size ? probe.plan.size : 2;
		probe.plan.prefetch = 1;
		probe.plan.series = 1;
		probe.plan.turns = 1;
		failures += run(probe, word, i ? run_series : run_raw);
	}
	munmap(shared, sizeof *shared);
	return failures != 0;
}
