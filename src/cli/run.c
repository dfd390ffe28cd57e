/* SPDX-License-Identifier: Apache-2.0
 *
 * run.c - `layershard run`: a language model on several ranks that hold its layers once.
 */
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "commands.h"
#include "launcher.h"
#include "run_report.h"
#include "run_text.h"

#define MAX_TOKENS_DEFAULT 64

static const char help[] = "Usage: layershard run [OPTION]...\n\n"
			   "Continues prompts, greedily, on several ranks that hold the model's layers once\n"
			   "between them.\n"
			   "Prompt j goes to rank j mod N; no rank waits for another.\n\n"
			   "Options\n"
			   "  --prompt TEXT        a prompt; may be given several times\n"
			   "  --prompts FILE       one prompt per line; - is standard input\n"
			   "                       (neither: four short prompts that are built in)\n"
			   "  --max-tokens M       tokens generated per prompt, unless the model ends\n"
			   "                       earlier (default 64)\n" RANK_OPTIONS_HELP
			   "  --replicated         every rank keeps all layers; the options about sharding\n"
			   "                       are then ignored\n"
			   "  --json               print one JSON object instead of text and table\n"
			   "  -h, --help           this text\n\n" RANK_MODEL_HELP "\n"
			   "The output\n"
			   "  Each prompt and its continuation after [prompt J, rank R]. On a terminal words\n"
			   "  appear as they come where this process has started all ranks; a rank of\n"
			   "  somebody else's job prints each text when it is whole, with its own table.\n\n"
			   "The table at the end, per rank, in MiB\n"
			   "  stored     layers kept for good\n"
			   "  windows    buffers for other ranks' layers\n"
			   "  resident   further layers kept\n"
			   "  private    pages that only this process maps\n"
			   "  pss        those, and its part of shared pages (proportional set size)\n"
			   "  read       bytes read from the model file\n"
			   "  waiting    time waiting for layers, of the time from the first prompt to the\n"
			   "             last token\n"
			   "  tok/s      generated tokens per second of the same time\n"
			   "Memory is measured while all ranks hold their layers; '-' where one had left.\n"
			   "'replicated' is computed: what the same ranks would hold and read with all\n"
			   "layers in each.\n\n"
			   "Environment: see 'layershard info'. OPENBLAS_NUM_THREADS sets the threads per\n"
			   "rank (default 1).\n\n" CLI_EXIT_HELP;

enum { OPTION_PROMPT = 256, OPTION_PROMPTS, OPTION_MAX_TOKENS, OPTION_REPLICATED, OPTION_JSON };

static const struct option long_options[] = {
	RANK_OPTIONS_LONG,
	{"prompt", required_argument, NULL, OPTION_PROMPT},
	{"prompts", required_argument, NULL, OPTION_PROMPTS},
	{"max-tokens", required_argument, NULL, OPTION_MAX_TOKENS},
	{"replicated", no_argument, NULL, OPTION_REPLICATED},
	{"json", no_argument, NULL, OPTION_JSON},
	{"help", no_argument, NULL, 'h'},
	{NULL, 0, NULL, 0},
};

struct run {
	struct rank_options options;
	struct prompts prompts;
	uint32_t max_tokens;
	bool json;
	bool help;
};

static int take_option(struct run *run, int option, const char *argument)
{
	uint64_t number;

	switch (option) {
	case OPTION_PROMPT:
		if (*argument == '\0')
			return cli_usage("run", "--prompt is empty; give it some text to continue");
		if (prompts_add(&run->prompts, argument, strlen(argument)))
			return CLI_DONE;
		cli_message("out of memory");
		return CLI_FAILED;
	case OPTION_PROMPTS:
		return prompts_read(&run->prompts, argument) ? CLI_DONE : CLI_USAGE;
	case OPTION_MAX_TOKENS:
		if (!cli_parse_count(argument, 1, INT32_MAX, &number))
			return cli_usage("run", "--max-tokens is '%s'; it must be a whole number from 1 to %d",
					 argument, INT32_MAX);
		run->max_tokens = (uint32_t)number;
		return CLI_DONE;
	case OPTION_REPLICATED:
		run->options.replicated = true;
		return CLI_DONE;
	case OPTION_JSON:
		run->json = true;
		return CLI_DONE;
	case 'h':
		run->help = true;
		return CLI_DONE;
	default:
		return rank_options_take(&run->options, "run", option, argument);
	}
}

static int take_options(struct run *run, int argc, char **argv)
{
	int code = CLI_DONE;
	int option;

	while (code == CLI_DONE && !run->help &&
	       (option = getopt_long(argc, argv, CLI_OPTSTRING, long_options, NULL)) != -1)
		code = option == '?' || option == ':' ? cli_bad_option("run", option, argv)
						      : take_option(run, option, optarg);
	if (code != CLI_DONE || run->help)
		return code;
	if (optind < argc)
		return cli_usage("run", "'%s' is no option; a prompt is given by --prompt", argv[optind]);
	if (run->prompts.count == 0 && !prompts_add_default(&run->prompts)) {
		cli_message("out of memory");
		return CLI_FAILED;
	}
	code = rank_options_complete(&run->options, "run");
	if (code == CLI_DONE && !run->options.replicated && run->options.ranks > 1 &&
	    cli_transport_is_collective(run->options.spec))
		return cli_usage("run",
				 "transport '%s' needs all ranks in step, but prompts differ in length and so do "
				 "their ranks' passes; 'verify' and 'bench step --all-compute' can use it",
				 run->options.spec);
	return code;
}

/* True when some rank has loaded the model: then there is something to report. */
static bool any_worked(const struct launcher *launcher)
{
	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		if (launcher->ranks[i].phase != RANK_LOADING)
			return true;
	}
	return false;
}

/* The prompts that a rank has taken with it, in one line. */
static void tell_lost_prompts(const struct launcher *launcher, const struct own_rank *own)
{
	const size_t step = launcher->options->ranks;
	bool first = true;

	for (size_t i = (size_t)own->task.rank; i < launcher->prompts->count; i += step) {
		if (strcmp(launcher->prompts->items[i].error, own->error) != 0)
			continue;
		if (first)
			fprintf(stderr, "layershard: not finished by rank %d: prompts", own->task.rank);
		fprintf(stderr, "%s %zu", first ? "" : ",", i);
		first = false;
	}
	if (!first)
		fputc('\n', stderr);
}

/* A prompt's own error: of a rank that lives. */
static bool tell_failed_prompts(const struct launcher *launcher, const struct own_rank *own)
{
	const size_t step = launcher->options->ranks;
	bool failed = false;

	for (size_t i = (size_t)own->task.rank; i < launcher->prompts->count; i += step) {
		const char *error = launcher->prompts->items[i].error;

		if (*error && strcmp(error, own->error) != 0) {
			cli_message("prompt %zu was not finished: %s", i, error);
			failed = true;
		}
	}
	return failed;
}

/* After all else, where it is found. True when anything failed. */
static bool tell_failures(const struct launcher *launcher)
{
	bool failed = false;

	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		const struct own_rank *own = &launcher->ranks[i];

		if (*own->error) {
			if (!launcher_repeats_error(launcher, i))
				cli_message("%s", own->error);
			failed = true;
			if (any_worked(launcher))
				tell_lost_prompts(launcher, own);
		}
		failed = tell_failed_prompts(launcher, own) || failed;
	}
	return failed;
}

/* Ranks of a launcher mostly write to one terminal, or into one pipe, and none of them knows. */
static bool shares_output(const struct rank_options *options)
{
	return options->one_of_job && options->ranks > 1;
}

/* So that a text, or a table, is one write and whole among those of other ranks; the buffer outlives main. */
static char shared_output[1 << 16];

static int launch(struct run *run)
{
	const bool terminal = cli_is_terminal(stdout);
	struct run_text text = {.options = &run->options,
				.prompts = &run->prompts,
				.terminal = terminal,
				.streams = terminal && !shares_output(&run->options)};
	struct launcher launcher = {.options = &run->options,
				    .prompts = &run->prompts,
				    .max_tokens = run->max_tokens,
				    .prompt_changed = run->json ? NULL : run_text_update,
				    .user = &text};
	int reported = CLI_DONE;
	int code;

	if (shares_output(&run->options))
		(void)setvbuf(stdout, shared_output, _IOFBF, sizeof shared_output);
	(void)launcher_run(&launcher);
	code = launcher_code(&launcher);
	if (launcher.rank_count > 0 && run->json)
		reported = run_report_json(&launcher);
	else if (any_worked(&launcher))
		reported = run_report_table(&launcher);
	if (tell_failures(&launcher) && code == CLI_DONE)
		code = CLI_FAILED;
	if (code == CLI_DONE)
		code = reported;
	launcher_free(&launcher);
	return code;
}

int command_run(int argc, char **argv)
{
	struct run run = {.options = RANK_OPTIONS_INIT, .max_tokens = MAX_TOKENS_DEFAULT};
	int code = take_options(&run, argc, argv);

	if (code == CLI_DONE && run.help) {
		fputs(help, stdout);
		code = cli_flush_output() ? CLI_DONE : CLI_FAILED;
	} else if (code == CLI_DONE) {
		code = launch(&run);
	}
	prompts_free(&run.prompts);
	return code;
}
