/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_pace.c - see cuda_pace.h.
 */
#include "cuda_pace.h"
#include "sockets.h"

#include <time.h>

#define SLICE_NS  500000.0            /* of the pace: ten times what a host function costs a copy */
#define LEAST     ((uint64_t)1 << 20) /* smaller copies do not reach the link's speed */
#define GRAIN     ((uint64_t)64 << 10)
#define NAP_NS    2000000u /* between looks at `bypassed` */
#define SECOND_NS 1000000000u

uint64_t cuda_pace_slice(const struct cuda_pace *pace)
{
	const double bytes = SLICE_NS / pace->ns_per_byte;

	if (bytes >= (double)(UINT64_MAX / 2))
		return UINT64_MAX / 2;
	return bytes < (double)LEAST ? LEAST : (uint64_t)bytes & ~(GRAIN - 1);
}

static void sleep_until(uint64_t ns)
{
	const struct timespec until = {(time_t)(ns / SECOND_NS), (long)(ns % SECOND_NS)};

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
}

/* Sleeping too long is made up for: the next slice is due when this one was plus what it costs. */
void cuda_pace_wait(void *argument)
{
	const struct cuda_charge *charge = argument;
	struct cuda_pace *pace = charge->pace;
	const uint64_t cost = (uint64_t)((double)charge->bytes * pace->ns_per_byte);
	uint64_t now = lshard__now_ns();
	uint64_t due = atomic_load(&pace->due_ns);
	uint64_t begin;

	if (atomic_load(&pace->bypassed))
		return;
	do
		begin = due > now ? due : now;
	while (!atomic_compare_exchange_weak(&pace->due_ns, &due, begin + cost));
	while (now < begin && !atomic_load(&pace->bypassed)) {
		sleep_until(begin - now > NAP_NS ? now + NAP_NS : begin);
		now = lshard__now_ns();
	}
}

void cuda_pace_bypass(struct cuda_pace *pace, int step)
{
	if (pace)
		atomic_fetch_add(&pace->bypassed, step);
}
