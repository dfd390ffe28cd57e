/* SPDX-License-Identifier: Apache-2.0
 *
 * run_verify.c - every rank hashes every layer as it sees it. See run.h.
 */
#include "run.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "launcher.h"
#include "run_report.h"

static bool is_ok(const struct own_rank *own)
{
	return own->is_verified && !own->verified.corrupt && !*own->error;
}

static int print_text(const struct launcher *launcher)
{
	const int width = snprintf(NULL, 0, "%d", (int)launcher->ranks[launcher->rank_count - 1].task.rank);

	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		const struct own_rank *own = &launcher->ranks[i];

		if (is_ok(own))
			printf("rank %-*d  %016" PRIx64 "  ok\n", width, (int)own->task.rank, own->verified.hash);
		else
			printf("rank %-*d  %-16s  not verified\n", width, (int)own->task.rank,
			       "-"); /* why is told on stderr */
	}
	return cli_flush_output() ? CLI_DONE : CLI_FAILED;
}

static json_t *json_of_rank(const struct own_rank *own)
{
	char hash[17];

	(void)snprintf(hash, sizeof hash, "%016" PRIx64, own->verified.hash);
	return json_pack("{s:i,s:o,s:b,s:o}", "rank", (int)own->task.rank, "hash",
			 is_ok(own) ? json_string(hash) : json_null(), "ok", is_ok(own), "error",
			 *own->error ? cli_json_text(own->error, strlen(own->error)) : json_null());
}

static int print_json(const struct launcher *launcher)
{
	json_t *ranks = json_array();

	for (uint32_t i = 0; ranks && i < launcher->rank_count; i++) {
		if (json_array_append_new(ranks, json_of_rank(&launcher->ranks[i])) != 0) {
			json_decref(ranks);
			ranks = NULL;
		}
	}
	return cli_json_print(json_pack("{s:s,s:o,s:o,s:o}", "schema", "layershard-llama-verify/1", "ranks", ranks,
					"model", run_report_model(launcher), "config", run_report_config(launcher)));
}

/* The hash is of the same bytes everywhere; a rank that got another has not been told so by the library. */
static bool hashes_agree(const struct launcher *launcher)
{
	for (uint32_t i = 1; i < launcher->rank_count; i++) {
		if (launcher->ranks[i].verified.hash != launcher->ranks[0].verified.hash)
			return false;
	}
	return true;
}

int run_verify(const struct run *run)
{
	struct launcher launcher = {.options = &run->options};
	int reported = CLI_DONE;
	int code;

	(void)launcher_run(&launcher);
	code = launcher_code(&launcher);
	if (launcher.rank_count > 0)
		reported = run->json ? print_json(&launcher) : print_text(&launcher);
	if (code == CLI_DONE)
		code = reported;
	for (uint32_t i = 0; i < launcher.rank_count; i++) {
		const struct own_rank *own = &launcher.ranks[i];

		if (*own->error && !launcher_repeats_error(&launcher, i))
			cli_message("%s", own->error);
	}
	if (code == CLI_DONE && !hashes_agree(&launcher)) {
		cli_message("the ranks' hashes differ; do not use the results of these ranks");
		code = CLI_FAILED;
	}
	launcher_free(&launcher);
	return code;
}
