/* SPDX-License-Identifier: Apache-2.0
 *
 * A public header alone, as C++11, and the shared library seen through them. Built once for each: TEST_HEADER is it.
 */
#include TEST_HEADER

#include <layershard/callbacks.h>
#include <layershard/plan.h>

#include <cstdio>
#include <cstring>

static int failures;

static void check(bool holds, const char *what)
{
	if (holds)
		return;
	std::printf("%s: does not hold\n", what);
	failures++;
}

/* An INIT macro must fit the struct in C++ too, and begin with its size. */
template <typename Options> static void check_size(const Options &options, const char *what)
{
	check(options.struct_size == sizeof(Options), what);
}

int main()
{
	const lshard_group_options group = LSHARD_GROUP_OPTIONS_INIT;
	const lshard_series_options series = LSHARD_SERIES_OPTIONS_INIT;
	const lshard_stats stats = LSHARD_STATS_INIT;
	const lshard_plan_input input = LSHARD_PLAN_INPUT_INIT;
	const lshard_plan_result result = LSHARD_PLAN_RESULT_INIT;

	check_size(group, "group options");
	check_size(series, "series options");
	check_size(stats, "stats");
	check_size(input, "plan input");
	check_size(result, "plan result");
	check(group.rank == -1 && group.size == -1, "rank and size are discovered by default");
	check(group.log_level == LSHARD_LOG_INFO, "lines up to INFO by default");
	check(group.error == nullptr && group.error_bytes == 0, "no text buffer by default");
	check(series.prefetch == 1 && series.placement == LSHARD_WHOLE, "one layer ahead, whole layers by default");
	check(input.size == 1, "a plan for one rank by default");

	char version[32];
	std::snprintf(version, sizeof version, "%d.%d.%d", LSHARD_VERSION_MAJOR, LSHARD_VERSION_MINOR,
		      LSHARD_VERSION_PATCH);
	check(std::strcmp(version, lshard_version()) == 0, "lshard_version() says what the header says");
	check(std::strcmp(lshard_status_name(LSHARD_ERR_BUSY), "LSHARD_ERR_BUSY") == 0, "a status by its name");
	return failures != 0;
}
