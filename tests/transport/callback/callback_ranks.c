/* SPDX-License-Identifier: Apache-2.0
 *
 * callback_ranks.c - see callback_ranks.h.
 */
#include "callback_ranks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

void play(int32_t size, member_body body, void *user)
{
	subject = (struct subject){.spec = "callback",
				   .kind = "threads",
				   .collective = true,
				   .callbacks = true,
				   .memory = LSHARD_MEMORY_HOST};
	assert_int_equal(team_of_threads(size, body, user), 0);
}

lshard_status go_to(struct rank *rank, uint32_t position)
{
	const uint32_t layer = rank->setting->first_layer + position;
	const lshard_status status = lshard_reach(rank->series, layer, NULL);

	return status == LSHARD_OK ? lshard_wait(rank->series, layer, NULL) : status;
}
