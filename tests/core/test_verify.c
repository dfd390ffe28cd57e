/* SPDX-License-Identifier: Apache-2.0
 *
 * test_verify.c - verify looks at every byte, names the first layer that is wrong, and ends the views that are in its
 * way. What it tells of ranks that differ is the conformance suite's.
 */
#include "local_ranks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

/* One window for all layers from elsewhere, and a live view in it. */
static int verify_body(const struct member *member)
{
	const struct setting setting = small_setting(6, 0);
	struct rank rank;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	for (uint32_t position = 0; position < setting.layers; position++) {
		if (!visit(&rank, position == 2 ? 3 : 2))
			goto failed;
		OK_SERIES(&rank, lshard_series_verify(rank.series, NULL));
		OK_SERIES(&rank, lshard_wait(rank.series, position, NULL));
		if (!layer_is_right(&rank, position))
			goto failed;
	}
	right = one_pass(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

/* The third layer to come is not what was stored; the views end all the same. */
static int corrupt_body(const struct member *member)
{
	const struct setting setting = small_setting(6, 0);
	struct rank rank;
	lshard_status status;
	bool right = false;

	if (!rank_open(&rank, member, &setting))
		return 1;
	status = lshard_series_verify(rank.series, NULL);
	EXPECT(member, status == LSHARD_ERR_CORRUPT, "%s", lshard_status_name(status));
	for (uint32_t position = 0; position < 2; position++)
		OK_SERIES(&rank, lshard_wait(rank.series, position, NULL));
	right = one_pass(&rank);
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void verify_ends_every_view(void **state)
{
	(void)state;
	play("local", 2, verify_body, NULL);
	play("faults=wait@3=flip,local", 2, corrupt_body, NULL);
}

static lshard_status verify_with_a_bit_turned(struct rank *rank, uint32_t tensor, uint64_t byte, uint64_t *hash)
{
	unsigned char *at = (unsigned char *)rank->addresses[0][tensor] + byte;
	lshard_status status;

	*at ^= 1;
	status = lshard_series_verify(rank->series, hash);
	*at ^= 1;
	return status;
}

/* Alone: what is stored is what it should be, and every byte of it is in the hash. */
static int hashing_body(const struct member *member)
{
	struct setting setting = small_setting(2, 0);
	uint64_t true_hash = 0, hash = 0;
	struct rank rank;
	bool right = false;

	setting_tensors(&setting, MAX_TENSORS, LSHARD_STRIPE_BYTES);
	if (!rank_open(&rank, member, &setting))
		return 1;
	OK_SERIES(&rank, lshard_series_verify(rank.series, &true_hash));
	for (uint32_t tensor = 0; tensor < MAX_TENSORS; tensor++)
		for (uint64_t byte = 0; byte < setting.tensors[tensor].bytes; byte++) {
			OK_SERIES(&rank, verify_with_a_bit_turned(&rank, tensor, byte, &hash));
			EXPECT(member, hash != true_hash, "tensor %u, byte %u", tensor, (unsigned)byte);
		}
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

/* Rank 1 has layer 0 in memory of its own, where a bit of a row's own stripe or of rank 0's is turned. */
static int comparing_body(const struct member *member)
{
	struct setting setting = small_setting(1, 0);
	struct rank rank;
	lshard_status status;
	bool right = false;

	setting_tensors(&setting, 1, LSHARD_STRIPE_COLUMNS);
	setting.placement = LSHARD_STRIPED;
	setting.resident_bytes = 1 << 20;
	if (!rank_open(&rank, member, &setting))
		return 1;
	for (uint64_t byte = 0; byte < setting.tensors[0].bytes; byte++) {
		status = member->rank == 1 ? verify_with_a_bit_turned(&rank, 0, byte, NULL)
					   : lshard_series_verify(rank.series, NULL);
		EXPECT(member, status == (member->rank == 1 ? LSHARD_ERR_CORRUPT : LSHARD_OK), "byte %u: %s",
		       (unsigned)byte, lshard_status_name(status));
	}
	OK_SERIES(&rank, lshard_series_verify(rank.series, NULL));
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void verify_looks_at_every_byte(void **state)
{
	(void)state;
	play("local", 1, hashing_body, NULL);
	play("local", 2, comparing_body, NULL);
}

/* Of two layers that come wrong the first is named: what comes after it may follow from it. */
static int verify_twice_wrong_body(const struct member *member)
{
	struct setting setting = small_setting(7, 1);
	struct rank rank;
	lshard_status status;
	bool right = false;

	setting.first_layer = 3;
	if (!rank_open(&rank, member, &setting))
		return 1;
	status = lshard_series_verify(rank.series, NULL);
	if (member->rank == 0) {
		EXPECT(member, status == LSHARD_OK, "%s", lshard_series_error(rank.series));
	} else {
		EXPECT(member, status == LSHARD_ERR_CORRUPT, "%s", lshard_status_name(status));
		SAYS(member, lshard_series_error(rank.series), "layer 6 is not what rank 0 stores");
	}
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void verify_tells_the_first_layer_that_is_wrong(void **state)
{
	(void)state;
	play("faults=r1.wait@2=flip+r1.wait@3=flip,local", 2, verify_twice_wrong_body, NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(verify_ends_every_view),
		cmocka_unit_test(verify_looks_at_every_byte),
		cmocka_unit_test(verify_tells_the_first_layer_that_is_wrong),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
