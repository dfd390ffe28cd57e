/* SPDX-License-Identifier: Apache-2.0
 *
 * rejoin.c - ranks that come back: what a series leaves for them, and how one that comes opens it. Knows descriptions
 * and the transport's rejoin functions; how ranks find each other again it does not know.
 */
#include "internal.h"

lshard_status rejoin_recall(lshard_series *series, const lshard_series_options *options)
{
	lshard_group *group = series->group;
	lshard_recalled recalled = {.description = NULL};
	lshard_status status = group->rejoin->recall(group->bottom, series->name, &recalled);

	if (status == LSHARD_ERR_RANGE)
		return status;
	if (status < 0)
		return lshard_fail(&group->error, status, SERIES_FORMAT ": %s", SERIES_NAMES(series),
				   group->bottom->error.text);
	status = agree_with_living(group, options, series->description, &recalled, &group->error);
	if (status < 0)
		return status;
	series->recalled = true;
	series->number = recalled.number;
	series->store_plan.recalled = 1;
	series->store_plan.number = recalled.number;
	count(&series->counters.generation, recalled.generation);
	if (group->n_created <= recalled.number)
		group->n_created = recalled.number + 1;
	return LSHARD_OK;
}

void rejoin_begin(lshard_series *series)
{
	if (!series->busy)
		group_busy(series->group, 1);
	series->busy = true;
}

void rejoin_end(lshard_series *series)
{
	if (series->busy && group_is_ours(series->group))
		group_busy(series->group, -1);
	series->busy = false;
}

void rejoin_offer(lshard_series *series)
{
	const lshard_group *group = series->group;

	if (group->rejoin)
		group->rejoin->filled(group->bottom, &series->store_plan,
				      atomic_load_explicit(&series->counters.generation, memory_order_relaxed));
}

lshard_status rejoin_renew(lshard_series *series)
{
	lshard_group *group = series->group;
	const lshard_status status =
		group->rejoin ? group->rejoin->renew(group->bottom, &series->store_plan) : LSHARD_OK;

	return status < 0 ? lshard_fail(&series->error, status, SERIES_FORMAT ": %s", SERIES_NAMES(series),
					group->bottom->error.text)
			  : status;
}
