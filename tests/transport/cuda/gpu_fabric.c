/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_fabric.c - what a device and its driver say to the transport "fabric": `gpu_fabric [SEED]`, where SEED is for the
 * stub. Three processes ask for a group. Where a fabric handle is not granted, all must hear the same refusal, which is
 * printed and is no failure; where it is, they share layers by such handles and compare each word.
 */
#include "gpu_rank.h"
#include "socket_circle.h"
#include "transports.h"

#include <stdlib.h>
#include <string.h>

#define PASSES 20

struct circles {
	struct socket_circle meeting; /* while the group is made */
	struct socket_circle circle;  /* from then on */
};

static void print_line(void *user, lshard_log_level level, const char *text)
{
	(void)user;
	if (level <= LSHARD_LOG_WARN || strstr(text, "NVLink domain") || strstr(text, "fetches from"))
		printf("  %s\n", text);
}

static lshard_status ask(struct rank *rank, struct circles *circles, char *error, size_t bytes)
{
	const lshard_bootstrap bootstrap = socket_circle_bootstrap(&circles->meeting);
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;

	options.rank = rank->member->rank;
	options.size = rank->member->size;
	options.transport = rank->plan->spec;
	options.bootstrap = &bootstrap;
	options.callbacks = &circles->circle.callbacks;
	options.memory = LSHARD_MEMORY_CUDA;
	options.device = rank->device.device;
	options.log = print_line;
	options.log_level = LSHARD_LOG_DEBUG;
	options.error = error;
	options.error_bytes = bytes;
	return lshard_group_create(&options, &rank->group);
}

static int shares_layers(struct rank *rank)
{
	uint64_t hash = 0;

	if (!gpu_make_references(rank) || !gpu_fill_references(rank) || !gpu_open_all(rank))
		return 0;
	gpu_differences(rank);
	for (int pass = 0; pass < PASSES; pass++)
		if (!gpu_one_pass(rank, LAYERS, rank->device.streams[pass & 1]))
			goto failed;
	EXPECT(rank->member, gpu_differences(rank) == 0, "passes read wrong words");
	OK(rank, lshard_series_verify(rank->series, &hash));
	EXPECT(rank->member, team_barrier(rank->member) && gpu_close_all(rank), "destroy");
	printf("  rank %d: granted: %d passes and a verification by fabric handles: bit-exact, hash %016llx\n",
	       (int)rank->member->rank, PASSES, (unsigned long long)hash);
	free(rank->host);
	return 1;
failed:
	return 0;
}

static int run_rank(const struct member *member)
{
	struct rank rank = {.member = member, .plan = member->user, .bytes = {8u << 20, 5000}};
	struct circles circles;
	char error[512] = "";
	lshard_status status;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!gpu_open(&rank))
		return 1;
	EXPECT(member, socket_circle_join(&circles.meeting, member), "joining");
	EXPECT(member, socket_circle_join(&circles.circle, member), "joining");
	status = ask(&rank, &circles, error, sizeof error);
	if (status != LSHARD_OK) {
		EXPECT(member, status == LSHARD_ERR_NOT_SUPPORTED && error[0], "status %d: %s", (int)status, error);
		printf("  rank %d: not granted: %s\n", (int)member->rank, error);
		return 0;
	}
	return !shares_layers(&rank);
failed:
	return 1;
}

int main(int count, char **arguments)
{
	const struct plan plans[] = {
		{.spec = "fabric:copy+floor=0", .prefetch = 1, .series = 1, .turns = 1, .placement = LSHARD_WHOLE},
		{.spec = "fabric:floor=0", .prefetch = 1, .series = 1, .turns = 1, .placement = LSHARD_STRIPED},
	};
	lshard_error error = {{0}};
	int failures = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!lshard__fabric.available(&error)) {
		printf("skipped: %s\n", error.text);
		return 77;
	}
	for (size_t i = 0; i < sizeof plans / sizeof plans[0]; i++) {
		struct plan plan = plans[i];

		plan.weight_bytes = 8u << 20;
		plan.late = count > 1 ? atoi(arguments[1]) : 0;
		printf("%s, %s\n", plan.spec, plan.placement == LSHARD_WHOLE ? "WHOLE" : "STRIPED");
		failures += team_of_processes(CIRCLE_RANKS, run_rank, &plan);
	}
	printf("%s\n", failures ? "FAILED" : "passed");
	return failures != 0;
}
