/* SPDX-License-Identifier: Apache-2.0
 *
 * test_callback.c - the callback transport over a circle of threads, which ends the program when collectives do not
 * match. What every transport must do is in the conformance suite; here is what is its own: whole and striped layers on
 * any way through a series, and options.
 */
#include "callback_circle.h"
#include "callback_ranks.h"
#include "patience.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

/* ---- Walks ------------------------------------------------------------------------------------------------------- */

/* A pass, one that is aborted, one whose layers come twice, one that jumps; all ranks together. */
static bool wander(struct rank *rank)
{
	const uint32_t layers = rank->setting->layers;
	bool right = one_pass(rank);

	for (uint32_t position = 0; right && position < layers / 2; position++)
		right = visit(rank, position);
	for (uint32_t position = 0; right && position < layers; position++)
		right = visit(rank, position) && visit(rank, position);
	for (uint32_t step = 0; right && step < layers; step++)
		right = visit(rank, step * 5 % layers);
	return right && one_pass(rank);
}

static int wander_body(const struct member *member)
{
	const struct setting *setting = member->user;
	struct rank rank;
	bool right;

	if (!rank_open(&rank, member, setting))
		return 1;
	right = wander(&rank);
	OK_SERIES(&rank, lshard_series_update_begin(rank.series));
	rank.generation++;
	OK_SERIES(&rank, lshard_series_update_end(rank.series, fill_layer, &rank));
	right = right && wander(&rank);
	OK_SERIES(&rank, lshard_series_verify(rank.series, NULL));
	right = right && one_pass(&rank);
	return rank_close(&rank) && right ? 0 : 1;
failed:
	rank_close(&rank);
	return 1;
}

static void layers_come_right_on_any_way(void **state)
{
	static const int32_t sizes[] = {1, 2, 3, 5};
	static const lshard_stripe stripes[] = {LSHARD_STRIPE_BYTES, LSHARD_STRIPE_ROWS, LSHARD_STRIPE_COLUMNS};

	(void)state;
	for (int size = 0; size < 4; size++)
		for (uint32_t prefetch = 0; prefetch <= 8; prefetch += 1 + prefetch / 3)
			for (int kind = 0; kind < 4; kind++) {
				struct setting setting = {.layers = 7, .first_layer = 40, .prefetch = prefetch};

				setting_tensors(&setting, 1 + prefetch % 3, stripes[kind % 3]);
				setting.placement = kind == 3 ? LSHARD_WHOLE : LSHARD_STRIPED;
				setting.resident_bytes = prefetch == 2 ? 9000 : 0;
				play(sizes[size], wander_body, &setting);
			}
}

/* Parts that are equal and lie in the order of the ranks come straight into place, in one collective and its round. */
static int gathered_body(const struct member *member)
{
	struct setting setting = {.layers = 6, .first_layer = 1, .prefetch = 1, .placement = LSHARD_STRIPED};
	const bool equal = *(const bool *)member->user;
	struct rank rank;
	long before;
	bool right = false;

	setting_tensors(&setting, equal ? 1 : 3, LSHARD_STRIPE_COLUMNS);
	if (equal)
		setting.tensors[0] = (lshard_tensor){"weight", 256 * 4 * (uint32_t)member->size, 0, 0, 0, 0};
	if (!rank_open(&rank, member, &setting))
		return 1;
	EXPECT(member, one_pass(&rank) && team_barrier(member), "a pass");
	OK_SERIES(&rank, lshard_series_join(rank.series, NULL));
	before = seat_collectives(rank.seat);
	EXPECT(member, one_pass(&rank), "another");
	OK_SERIES(&rank, lshard_series_join(rank.series, NULL));
	EXPECT(member, seat_collectives(rank.seat) - before <= 2 * (long)setting.layers + 4, "%ld collectives",
	       seat_collectives(rank.seat) - before);
	right = true;
failed:
	return rank_close(&rank) && right ? 0 : 1;
}

static void a_striped_layer_is_one_collective(void **state)
{
	bool equal[] = {true, false};

	(void)state;
	for (int i = 0; i < 2; i++)
		play(3, gathered_body, &equal[i]);
}

/* ---- Options ----------------------------------------------------------------------------------------------------- */

static int without_body(const struct member *member)
{
	const int lacking = *(const int *)member->user;
	lshard_group_options options = member_options(member, "callback", LONG_MS);
	struct seat *seat = circle_join(member);
	lshard_group *group = NULL;
	lshard_callbacks callbacks;
	char error[512] = "";
	bool right = false;
	lshard_status status;

	callbacks = *seat_callbacks(seat);
	options.callbacks = member->rank == 1 && lacking == 0 ? NULL : &callbacks;
	if (member->rank == 1 && lacking == 1)
		callbacks.broadcast = NULL;
	if (lacking == 2)
		options.transport = "callback:fast";
	options.error = error;
	options.error_bytes = sizeof error;
	status = lshard_group_create(&options, &group);
	EXPECT(member, status == (lacking == 0 ? LSHARD_ERR_NOT_SUPPORTED : LSHARD_ERR_INVALID), "%s: %s",
	       lshard_status_name(status), error);
	EXPECT(member, !group, "a group was made");
	SAYS(member, error, lacking == 2 ? "fast" : "rank 1");
	right = true;
failed:
	lshard_group_destroy(group);
	circle_leave(seat);
	return right ? 0 : 1;
}

static void missing_callbacks_are_named(void **state)
{
	(void)state;
	for (int lacking = 0; lacking < 3; lacking++)
		play(2, without_body, &lacking);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(layers_come_right_on_any_way),
		cmocka_unit_test(a_striped_layer_is_one_collective),
		cmocka_unit_test(missing_callbacks_are_named),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
