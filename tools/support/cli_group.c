/* SPDX-License-Identifier: Apache-2.0
 *
 * cli_group.c - how every command leaves a group: never without hearing whether its trace is whole.
 * Knows: the public header. Does not know: who is told of a failure.
 */
#include "cli.h"

lshard_status cli_group_leave(lshard_group *group, char *error, size_t bytes)
{
	lshard_status flushed;
	lshard_status destroyed;

	if (!group)
		return LSHARD_OK;
	flushed = lshard_group_flush(group);
	(void)snprintf(error, bytes, "%s", flushed < 0 ? lshard_group_error(group) : "it could not leave its group");
	destroyed = lshard_group_destroy(group);
	return flushed < 0 ? flushed : destroyed;
}
