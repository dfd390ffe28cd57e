/* SPDX-License-Identifier: Apache-2.0
 *
 * verify_command.c - `layershard verify`: every rank hashes every layer as it sees it.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "commands.h"
#include "launcher.h"
#include "run_report.h"

static const char help[] = "Usage: layershard verify [OPTION]...\n\n"
			   "Loads the model sharded, then each rank hashes every layer as it sees it (its\n"
			   "own bytes, a mapping, a window) and compares the hashes with those of the ranks\n"
			   "that store the layers. The hash printed is of all layers: the same on every rank\n"
			   "and for every way of sharding them.\n\n"
			   "Options\n" RANK_OPTIONS_HELP "  --json               print one JSON object instead\n"
			   "  -h, --help           this text\n\n" RANK_MODEL_HELP "\n" CLI_EXIT_HELP;

enum { OPTION_JSON = 256 };

static const struct option long_options[] = {
	RANK_OPTIONS_LONG,
	{"json", no_argument, NULL, OPTION_JSON},
	{"help", no_argument, NULL, 'h'},
	{NULL, 0, NULL, 0},
};

struct verify {
	struct rank_options options;
	bool json;
	bool help;
};

static int take_options(struct verify *verify, int argc, char **argv)
{
	int code = CLI_DONE;
	int option;

	while (code == CLI_DONE && !verify->help &&
	       (option = getopt_long(argc, argv, CLI_OPTSTRING, long_options, NULL)) != -1) {
		if (option == '?' || option == ':')
			code = cli_bad_option("verify", option, argv);
		else if (option == OPTION_JSON)
			verify->json = true;
		else if (option == 'h')
			verify->help = true;
		else
			code = rank_options_take(&verify->options, "verify", option, optarg);
	}
	if (code != CLI_DONE || verify->help)
		return code;
	if (optind < argc)
		return cli_usage("verify", "'%s' is no option; the model is given by --model", argv[optind]);
	return rank_options_complete(&verify->options, "verify");
}

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
			printf("rank %-*d  %-16s  not verified\n", width, (int)own->task.rank, "-"); /* why is told on stderr */
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
	return cli_json_print(json_pack("{s:o,s:o,s:o}", "ranks", ranks, "model", run_report_model(launcher), "config",
					run_report_config(launcher)));
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

static int launch(const struct verify *verify)
{
	struct launcher launcher = {.options = &verify->options};
	int reported = CLI_DONE;
	int code;

	(void)launcher_run(&launcher);
	code = launcher_code(&launcher);
	if (launcher.rank_count > 0)
		reported = verify->json ? print_json(&launcher) : print_text(&launcher);
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

int command_verify(int argc, char **argv)
{
	struct verify verify = {.options = RANK_OPTIONS_INIT};
	const int code = take_options(&verify, argc, argv);

	if (code != CLI_DONE)
		return code;
	if (!verify.help)
		return launch(&verify);
	fputs(help, stdout);
	return cli_flush_output() ? CLI_DONE : CLI_FAILED;
}
