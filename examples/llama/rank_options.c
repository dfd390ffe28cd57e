/* SPDX-License-Identifier: Apache-2.0
 *
 * rank_options.c - see rank_options.h.
 */
#include "rank_options.h"

#include <layershard/plan.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

/* A rank that dies is seen at once, whatever the deadline; it must be longer than the slowest rank takes to load. */
#define OWN_RANKS_TIMEOUT_MS 600000

#define LINK_GBITS_LEAST 8e-9 /* a byte per second */
#define LINK_GBITS_MOST  1e9

static int take_transport(struct rank_options *options, const char *text, const char *where)
{
	char why[256];

	if (!cli_transport_is_usable(text, why, sizeof why))
		return cli_usage("", "%s is '%s'; %s ('layershard info' tells more)", where, text, why);
	if (strlen(text) >= sizeof options->spec)
		return cli_usage("", "%s is too long (at most %zu characters)", where, sizeof options->spec - 1);
	options->transport = text;
	return CLI_DONE;
}

int rank_options_take(struct rank_options *options, int option, const char *argument)
{
	switch (option) {
	case OPTION_RANKS:
		options->ranks_given = true;
		return cli_take_number("", "ranks", argument, 1, RANKS_MOST, &options->ranks);
	case OPTION_PREFETCH:
		return cli_take_number("", "prefetch", argument, 0, UINT32_MAX, &options->prefetch);
	case OPTION_PLACEMENT:
		if (!cli_parse_placement(argument, &options->placement))
			return cli_usage("", "--placement is '%s'; it may be whole or striped", argument);
		return CLI_DONE;
	case OPTION_TRANSPORT:
		return take_transport(options, argument, "--transport");
	case OPTION_LINK_GBITS:
		if (!cli_parse_positive(argument, &options->link_gbits) || options->link_gbits < LINK_GBITS_LEAST ||
		    options->link_gbits > LINK_GBITS_MOST)
			return cli_usage("", "--link-gbits is '%s'; it must be a number from %g to %g", argument,
					 LINK_GBITS_LEAST, LINK_GBITS_MOST);
		return CLI_DONE;
	case OPTION_MODEL:
		options->model_given = argument;
		return CLI_DONE;
	case OPTION_RESIDENT:
		options->resident = argument;
		return CLI_DONE;
	case OPTION_SHM_COPY:
		options->shm_copy = true;
		return CLI_DONE;
	default:
		return cli_usage("", "unknown option");
	}
}

/* ---- The transport ----------------------------------------------------------------------------------------------- */

/* `shm:copy` behind the wrappers that were given ("trace=run.json,shm"), the throttle next to it. */
static int copying_transport(struct rank_options *options)
{
	const char *given = options->transport ? options->transport : "";
	const char *comma = strrchr(given, ',');
	const int wrappers = comma ? (int)(comma + 1 - given) : 0;
	const char *mode = strchr(given + wrappers, ':');
	char throttle[48] = "";
	int length;

	if (options->transport && ((!cli_transport_is(given, "auto") && !cli_transport_is(given, "shm")) ||
				   (mode && strcmp(mode, ":copy") != 0)))
		return cli_usage("", "--shm-copy goes with --transport shm, not with '%s'", given);
	if (options->link_gbits > 0)
		(void)snprintf(throttle, sizeof throttle, "throttle=%.0f,", options->link_gbits * 1e9 / 8);
	length = snprintf(options->spec, sizeof options->spec, "%.*s%sshm:copy", wrappers, given, throttle);
	if (length >= (int)sizeof options->spec)
		return cli_usage("", "--transport is too long with --shm-copy (at most %zu characters together)",
				 sizeof options->spec - 1);
	return CLI_DONE;
}

static int find_transport(struct rank_options *options)
{
	const char *variable = getenv("LAYERSHARD_TRANSPORT");

	if (options->link_gbits > 0 && !options->shm_copy)
		return cli_usage("",
				 "--link-gbits needs --shm-copy: without it nothing is copied, so there is no link");
	if (options->shm_copy)
		return copying_transport(options);
	if (!options->transport && variable && *variable &&
	    take_transport(options, variable, "LAYERSHARD_TRANSPORT") != CLI_DONE)
		return CLI_USAGE;
	(void)snprintf(options->spec, sizeof options->spec, "%s", options->transport ? options->transport : "auto");
	return CLI_DONE;
}

/* ---- Which ranks ------------------------------------------------------------------------------------------------- */

/* A name that no other run has, so that only this run's ranks find each other by it. */
static int name_job(struct rank_options *options)
{
	uint64_t random;

	if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random) {
		cli_message("no random number for the name by which the ranks find each other: %s", strerror(errno));
		return CLI_FAILED;
	}
	(void)snprintf(options->job, sizeof options->job, "run-%ld-%016llx", (long)getpid(),
		       (unsigned long long)random);
	return CLI_DONE;
}

static int find_ranks(struct rank_options *options)
{
	lshard_discovered found = LSHARD_DISCOVERED_INIT;
	char error[256] = "";
	lshard_status status = LSHARD_ERR_STATE;

	if (!options->ranks_given)
		status = lshard_discover(&found, error, sizeof error);
	if (status != LSHARD_OK && status != LSHARD_ERR_STATE)
		return cli_usage("", "%s; correct the environment, or start own ranks with --ranks", error);
	if (status == LSHARD_OK) {
		options->one_of_job = true;
		options->rank_0_tells = found.rank > 0 && strcmp(found.source, "LAYERSHARD_*") != 0;
		options->ranks = (uint32_t)found.size;
		options->first_rank = found.rank;
		options->own_ranks = 1;
		options->threads = true;
		return CLI_DONE;
	}
	options->first_rank = 0;
	options->own_ranks = options->ranks;
	options->threads = !options->replicated && cli_transport_is(options->spec, "local");
	options->timeout_ms = getenv("LAYERSHARD_TIMEOUT_MS") ? 0 : OWN_RANKS_TIMEOUT_MS;
	return name_job(options);
}

/* ---- The model --------------------------------------------------------------------------------------------------- */

static int missing_model(const char *path, const char *reason)
{
	cli_message(
		"no model: %s%s%s%s. 'make demo' or scripts/fetch_model.sh fetches one; or give --model FILE, or set "
		"LAYERSHARD_MODEL",
		*path ? "'" : "", path, *path ? "': " : "", reason);
	return CLI_BAD_MODEL;
}

/*
 * Ranks of one launcher read one file: rank 0 says for all why it is refused, and the launcher who ended with status 4.
 * Ranks that were started one by one have each a reader of its own, and what is wrong with reading may be one rank's.
 */
static void tell_refusal(const struct rank_options *options, lshard_status status, const char *text)
{
	if (status != LSHARD_ERR_NOT_SUPPORTED || !options->rank_0_tells || options->log.wanted)
		cli_message("%s", text);
}

static int find_model(struct rank_options *options)
{
	const char *variable = getenv("LAYERSHARD_MODEL");
	const char *path = options->model_given ? options->model_given : variable && *variable ? variable : NULL;
	engine_error error = {""};
	lshard_status status;

	if (!path) {
		if (engine_default_model(options->model, sizeof options->model, &error) < 0)
			return missing_model("", error.text);
		if (access(options->model, F_OK) != 0)
			return missing_model(options->model, strerror(errno));
	} else if (strlen(path) >= sizeof options->model) {
		cli_message("the model's path is too long (at most %zu characters)", sizeof options->model - 1);
		return CLI_BAD_MODEL;
	} else {
		(void)snprintf(options->model, sizeof options->model, "%s", path);
	}
	status = engine_model_info(options->model, &options->shape, &error);
	if (status == LSHARD_OK)
		return CLI_DONE;
	tell_refusal(options, status, error.text);
	return status == LSHARD_ERR_NO_MEMORY ? CLI_FAILED : CLI_BAD_MODEL;
}

/* A percentage is of what the rank with the fewest layers of its own does not store: the same bytes on every rank. */
static int resident_percent(struct rank_options *options, double percent)
{
	lshard_tensor layer = {"layer", options->shape.layer_bytes, 0, LSHARD_STRIPE_BYTES, 0, 0};
	lshard_series_options series = LSHARD_SERIES_OPTIONS_INIT;
	lshard_plan_input input = LSHARD_PLAN_INPUT_INIT;
	lshard_plan_result result = LSHARD_PLAN_RESULT_INIT;
	lshard_status status;

	series.name = "blocks";
	series.layer_count = options->shape.layers;
	series.tensors = &layer;
	series.tensor_count = 1;
	series.prefetch = options->prefetch;
	series.placement = options->placement;
	input.size = (int32_t)options->ranks;
	input.rank = input.size - 1;
	status = lshard_plan(&series, &input, &result);
	if (status < 0) {
		cli_message("--resident could not be turned into bytes: %s", lshard_status_text(status));
		return CLI_FAILED;
	}
	options->resident_bytes =
		percent >= 100 ? UINT64_MAX
			       : (uint64_t)((double)(result.replicated_bytes - result.shard_bytes) * percent / 100);
	return CLI_DONE;
}

static int find_residents(struct rank_options *options)
{
	double percent;

	if (!options->resident || cli_parse_bytes(options->resident, &options->resident_bytes))
		return CLI_DONE;
	if (!cli_parse_percent(options->resident, &percent))
		return cli_usage("",
				 "--resident is '%s'; it may be bytes (500M, 2G) or a percentage (33%%, at most 100%%)",
				 options->resident);
	return resident_percent(options, percent);
}

int rank_options_complete(struct rank_options *options)
{
	int code = cli_log_open(&options->log, 0) ? find_transport(options) : CLI_USAGE;

	if (code == CLI_DONE)
		code = find_ranks(options);
	if (code == CLI_DONE)
		code = find_model(options);
	if (code == CLI_DONE)
		code = find_residents(options);
	return code;
}
