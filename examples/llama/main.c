/* SPDX-License-Identifier: Apache-2.0
 *
 * main.c - layershard-llama: a language model on several ranks that hold its layers once. Reads the options.
 */
#include <string.h>

#include "about.h"
#include "cli.h"
#include "run.h"

#define MAX_TOKENS_DEFAULT 64

const char cli_program[] = "layershard-llama";

enum {
	OPTION_PROMPT = 256,
	OPTION_PROMPTS,
	OPTION_MAX_TOKENS,
	OPTION_REPLICATED,
	OPTION_VERIFY,
	OPTION_JSON,
	OPTION_VERSION
};

static const struct option long_options[] = {
	RANK_OPTIONS_LONG,
	{"prompt", required_argument, NULL, OPTION_PROMPT},
	{"prompts", required_argument, NULL, OPTION_PROMPTS},
	{"max-tokens", required_argument, NULL, OPTION_MAX_TOKENS},
	{"replicated", no_argument, NULL, OPTION_REPLICATED},
	{"verify", no_argument, NULL, OPTION_VERIFY},
	{"json", no_argument, NULL, OPTION_JSON},
	{"version", no_argument, NULL, OPTION_VERSION},
	{"help", no_argument, NULL, 'h'},
	{NULL, 0, NULL, 0},
};

static int take_prompt(struct run *run, const char *text)
{
	if (*text == '\0')
		return cli_usage("", "--prompt is empty; give it some text to continue");
	if (prompts_add(&run->prompts, text, strlen(text)))
		return CLI_DONE;
	cli_message("out of memory");
	return CLI_FAILED;
}

static int take_option(struct run *run, int option, const char *argument)
{
	switch (option) {
	case OPTION_PROMPT:
		return take_prompt(run, argument);
	case OPTION_PROMPTS:
		return prompts_read(&run->prompts, argument) ? CLI_DONE : CLI_USAGE;
	case OPTION_MAX_TOKENS:
		return cli_take_number("", "max-tokens", argument, 1, INT32_MAX, &run->max_tokens);
	case OPTION_REPLICATED:
		run->options.replicated = true;
		return CLI_DONE;
	case OPTION_VERIFY:
		run->verify = true;
		return CLI_DONE;
	case OPTION_JSON:
		run->json = true;
		return CLI_DONE;
	case OPTION_VERSION:
		run->version = true;
		return CLI_DONE;
	case 'h':
		run->help = true;
		return CLI_DONE;
	default:
		return rank_options_take(&run->options, option, argument);
	}
}

static int take_all_options(struct run *run, int argc, char **argv)
{
	int code = CLI_DONE;
	int option;

	while (code == CLI_DONE && !run->help && !run->version &&
	       (option = getopt_long(argc, argv, CLI_OPTSTRING, long_options, NULL)) != -1)
		code = option == '?' || option == ':' ? cli_bad_option("", option, argv)
						      : take_option(run, option, optarg);
	if (code == CLI_DONE && !run->help && !run->version && optind < argc)
		return cli_usage("", "'%s' is no option; a prompt is given by --prompt, the model by --model",
				 argv[optind]);
	return code;
}

/* What is left, where layers are to be verified: that takes the sharded ones, and nothing is generated. */
static int complete_verify(struct run *run)
{
	if (run->prompts.count > 0 || run->max_tokens > 0)
		return cli_usage("", "--verify generates nothing, so it takes neither prompts nor --max-tokens");
	if (run->options.replicated)
		return cli_usage("", "--verify compares what ranks see of each other's layers; --replicated leaves "
				     "nothing to compare");
	return rank_options_complete(&run->options);
}

static int complete_prompts(struct run *run)
{
	int code;

	if (run->max_tokens == 0)
		run->max_tokens = MAX_TOKENS_DEFAULT;
	if (run->prompts.count == 0 && !prompts_add_default(&run->prompts)) {
		cli_message("out of memory");
		return CLI_FAILED;
	}
	code = rank_options_complete(&run->options);
	if (code == CLI_DONE && !run->options.replicated && run->options.ranks > 1 &&
	    cli_transport_is_collective(run->options.spec))
		return cli_usage("",
				 "transport '%s' needs all ranks in step, but prompts differ in length and so do "
				 "their ranks' passes; --verify, and 'layershard-bench step --all-compute', can "
				 "use it",
				 run->options.spec);
	return code;
}

static int do_run(struct run *run, int argc, char **argv)
{
	int code = take_all_options(run, argc, argv);

	if (code != CLI_DONE)
		return code;
	if (run->help)
		return about_print_help();
	if (run->version)
		return about_print_version();
	code = run->verify ? complete_verify(run) : complete_prompts(run);
	if (code != CLI_DONE)
		return code;
	return run->verify ? run_verify(run) : run_prompts(run);
}

static int run_llama(int argc, char **argv)
{
	struct run run = {.options = RANK_OPTIONS_INIT};
	const int code = do_run(&run, argc, argv);

	prompts_free(&run.prompts);
	return code;
}

int main(int argc, char **argv)
{
	return cli_main(argc, argv, run_llama);
}
