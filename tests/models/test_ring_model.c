/* SPDX-License-Identifier: Apache-2.0
 *
 * test_ring_model.c - src/core/ring.c driven through what ring.pml prints: each call, what it returns, and what every
 * window holds and whether it is viewed afterwards. Reads one scenario from standard input, behind a line
 * "map LAYERS REMOTE PREFETCH HORIZON SLOT..." (REMOTE: bits). Exits 1 at the first difference.
 */
#include "ring.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LAYERS     8
#define MODEL_NONE 255

static struct slotmap map;
static struct ring ring, ring_outside;
static struct ring_window windows[LAYERS], windows_outside[LAYERS];
static uint32_t remote[LAYERS], slot_of[LAYERS], at_or_after[LAYERS];

static void differ(const char *what, unsigned call)
{
	printf("test_ring_model: call %u: %s differs\n", call, what);
	exit(1);
}

static uint32_t number(void)
{
	uint32_t value;

	if (scanf("%" SCNu32, &value) != 1)
		differ("the number of words", 0);
	return value;
}

static void open_ring(void)
{
	uint32_t n_layers, bits, prefetch, horizon, m = 0;

	if (scanf(" map %" SCNu32 " %" SCNu32 " %" SCNu32 " %" SCNu32, &n_layers, &bits, &prefetch, &horizon) != 4 ||
	    n_layers > LAYERS)
		differ("the first line", 0);
	for (uint32_t p = 0; p < n_layers; p++)
		if (bits >> p & 1)
			remote[m++] = p;
	slotmap_build(&map, n_layers, remote, m, prefetch, slot_of, at_or_after);
	for (uint32_t p = 0; p < n_layers; p++)
		if ((slot_of[p] == SLOT_NONE ? MODEL_NONE : slot_of[p]) != number())
			differ("the slot map", 0);
	ring_init(&ring, &map, windows, horizon);
}

static void capture(void)
{
	if (ring.captured) {
		ring = ring_outside;
		memcpy(windows, windows_outside, sizeof windows);
		return;
	}
	ring_outside = ring;
	memcpy(windows_outside, windows, sizeof windows);
	ring_enter_capture(&ring);
}

static uint32_t wait_for(uint32_t position)
{
	static const uint32_t results[] = {[RING_STORED] = 0, [RING_HELD] = 1, [RING_MISS] = 2, [RING_BUSY] = 3};
	uint32_t window, other;

	return results[ring_wait(&ring, position, 0, &window, &other)];
}

static void start_fetches(void)
{
	struct ring_fetch fetch;

	while (ring_next_fetch(&ring, &fetch))
		;
}

/* Returns what a wait returns. */
static uint32_t make_call(const char *name, uint32_t argument)
{
	if (!strcmp(name, "WAIT"))
		return wait_for(argument);
	if (!strcmp(name, "CAPTURE")) {
		capture();
		return 0;
	}
	if (!strcmp(name, "FAIL")) {
		ring_fail(&ring, argument);
		return 0;
	}
	if (!strcmp(name, "REACH"))
		ring_reach(&ring, argument);
	else if (!strcmp(name, "RELEASE"))
		ring_release(&ring, argument);
	else if (!strcmp(name, "JOIN"))
		ring_join(&ring);
	else if (!strcmp(name, "RESTART"))
		ring_restart(&ring);
	else if (!strcmp(name, "PREPARE"))
		ring_prepare(&ring);
	else if (!strcmp(name, "RESET"))
		ring_reset(&ring);
	else
		differ("the name", 0);
	start_fetches();
	return 0;
}

int main(void)
{
	char name[16];
	uint32_t argument, holds, viewed;
	unsigned calls = 0;

	open_ring();
	while (scanf(" call %15s %" SCNu32, name, &argument) == 2) {
		calls++;
		if (make_call(name, argument) != number())
			differ("what wait returns", calls);
		for (uint32_t window = 0; window < map.n_slots; window++) {
			if (scanf("%" SCNu32 "/%" SCNu32, &holds, &viewed) != 2)
				differ("the number of windows", calls);
			if (holds != (windows[window].holds == POSITION_NONE ? MODEL_NONE : windows[window].holds))
				differ("what a window holds", calls);
			if (viewed != windows[window].viewed)
				differ("a view", calls);
		}
	}
	if (!feof(stdin) || !calls)
		differ("the end", calls);
	printf("%u\n", calls);
	return 0;
}
