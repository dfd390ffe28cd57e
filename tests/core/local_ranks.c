/* SPDX-License-Identifier: Apache-2.0
 *
 * local_ranks.c - see local_ranks.h.
 */
#include "local_ranks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

void play(const char *spec, int32_t size, member_body body, void *user)
{
	subject = (struct subject){.spec = spec, .kind = "threads"};
	assert_int_equal(team_of_threads(size, body, user), 0);
}

struct setting small_setting(uint32_t layers, uint32_t prefetch)
{
	struct setting setting = {.layers = layers, .prefetch = prefetch};

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	return setting;
}

lshard_group *create_alone(const char *spec)
{
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;
	lshard_group *group = NULL;

	options.rank = 0;
	options.size = 1;
	options.transport = spec;
	assert_int_equal(lshard_group_create(&options, &group), LSHARD_OK);
	return group;
}
