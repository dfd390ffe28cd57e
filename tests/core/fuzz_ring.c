/* SPDX-License-Identifier: Apache-2.0
 *
 * fuzz_ring.c - libFuzzer target: bytes become a slot map and a sequence of calls on the ring; every invariant of
 * ring_check.h is checked after each. A broken one aborts.
 *
 *   byte 0      layers - 1 (modulo 64)
 *   bytes 1..8  which of them are not stored here
 *   byte 9      k
 *   byte 10     horizon; 255: none
 *   then pairs  call (modulo 8), layer or window
 */
#include "ring_check.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEAD 11

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void broken(const struct ring_check *check, const char *what)
{
	fprintf(stderr, "%u layers, %u remote, %u windows, at %u: %s\n", check->map.n_positions, check->map.n_remote,
		check->map.n_slots, check->ring.position, what);
	abort();
}

static void call(struct ring_check *check, uint8_t number, uint8_t argument)
{
	uint32_t n = check->map.n_positions, position = argument % n;

	switch (number % 8) {
	case 0:
		ring_check_reach(check, (check->ring.position + 1) % n);
		break;
	case 1:
		ring_check_reach(check, position);
		break;
	case 2:
		ring_check_wait(check, position, argument / 32);
		break;
	case 3:
		ring_check_wait(check, check->ring.position, argument / 32);
		break;
	case 4:
		ring_check_release(check, position);
		break;
	case 5:
		ring_check_join(check);
		break;
	case 6:
		if (argument < 128)
			ring_check_prepare(check);
		else if (argument < 192)
			ring_check_capture(check);
		else
			ring_check_restart(check);
		break;
	default:
		if (check->map.n_slots && argument < 128)
			ring_check_fail(check, argument % check->map.n_slots);
		else
			ring_check_reset(check);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct ring_check check;
	uint64_t remote;
	uint32_t n;

	if (size < HEAD)
		return 0;
	n = data[0] % RING_CHECK_LAYERS + 1;
	memcpy(&remote, data + 1, sizeof remote);
	if (n < 64)
		remote &= ((uint64_t)1 << n) - 1;
	ring_check_open(&check, n, remote, data[9], data[10] == 255 ? UINT32_MAX : data[10], broken);
	for (size_t i = HEAD; i + 1 < size; i += 2)
		call(&check, data[i], data[i + 1]);
	return 0;
}
