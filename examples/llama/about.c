/* SPDX-License-Identifier: Apache-2.0
 *
 * about.c - see about.h.
 */
#include "about.h"

#include <dlfcn.h>
#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "cli.h"

static const char options_help[] = "Usage: layershard-llama [OPTION]...\n"
				   "       layershard-llama --verify [OPTION]...\n"
				   "       layershard-llama --version\n\n"
				   "Continues prompts, greedily, on several ranks that hold the model's layers once\n"
				   "between them.\n"
				   "Prompt j goes to rank j mod N; no rank waits for another.\n\n"
				   "Options\n"
				   "  --prompt TEXT        a prompt; may be given several times\n"
				   "  --prompts FILE       one prompt per line; - is standard input\n"
				   "                       (neither: four short prompts that are built in)\n"
				   "  --max-tokens M       tokens generated per prompt, unless the model ends\n"
				   "                       earlier (default 64)\n"
				   "  --ranks N            start N ranks on this machine (default 4). Without it, a\n"
				   "                       process that was started with a rank and a size\n"
				   "                       (LAYERSHARD_RANK and _SIZE, torchrun, MPI, Slurm) is one\n"
				   "                       rank; they find each other by LAYERSHARD_JOB, else by\n"
				   "                       the name that their launcher gives its job\n"
				   "  --model FILE         the model (default: LAYERSHARD_MODEL, else what\n"
				   "                       'make demo' fetched)\n"
				   "  --prefetch K         layers fetched ahead; at most K+1 windows (default 1)\n"
				   "  --placement P        whole: each layer on one rank (default); striped:\n"
				   "                       1/N of each layer on each\n"
				   "  --resident AMOUNT    memory per rank for keeping further layers: bytes (suffix\n"
				   "                       K, M or G), or a percentage of the layers that a rank\n"
				   "                       does not store (default 0)\n"
				   "  --transport T        auto (default), shm (processes), local (threads of one\n"
				   "                       process)\n"
				   "  --shm-copy           copy layers into windows instead of mapping the other\n"
				   "                       ranks' pages\n"
				   "  --link-gbits G       with --shm-copy: a link of G Gbit/s into each rank\n"
				   "  --replicated         every rank keeps all layers; the options about sharding\n"
				   "                       are then ignored\n"
				   "  --verify             generate nothing: each rank hashes every layer as it sees\n"
				   "                       it (its own bytes, a mapping, a window) and compares the\n"
				   "                       hashes with those of the ranks that store the layers. The\n"
				   "                       hash printed is of all layers: the same on every rank and\n"
				   "                       for every way of sharding them\n"
				   "  --json               print one JSON object instead of text and table\n"
				   "  --version            version, and the libraries that it computes with\n"
				   "  -h, --help           this text\n\n";

static const char work_help[] =
	"The model\n"
	"  One GGUF file (version 2 or 3, little-endian, not split) of the architecture\n"
	"  'llama' with the tokenizer 'gpt2' and the pre-tokenizer 'smollm', as SmolLM2;\n"
	"  tensors of type F32, F16, Q8_0 or Q4_1, output tied to the embedding or not.\n"
	"  Experts, sliding windows, scaled rotary positions, biases and whatever else is\n"
	"  not understood are refused with exit status 4. Of the ranks of a launcher rank\n"
	"  0 says why; each does with LAYERSHARD_LOG.\n\n"
	"The output\n"
	"  Each prompt and its continuation after [prompt J, rank R]. On a terminal words\n"
	"  appear as they come where this process has started all ranks; a rank of\n"
	"  somebody else's job prints each text when it is whole, with its own table.\n\n"
	"The table at the end, per rank, in MiB\n"
	"  stored     layers of the own shard\n"
	"  windows    buffers for other ranks' layers\n"
	"  resident   further layers held here\n"
	"  private    pages that only this process maps\n"
	"  pss        those, and its part of shared pages (proportional set size); of\n"
	"             reserved large pages (hugetlb) that are shared the kernel tells no\n"
	"             part: a line under the table tells how much they are\n"
	"  read       bytes read from the model file\n"
	"  waiting    time waiting for layers, of the time from the first prompt to the\n"
	"             last token\n"
	"  tok/s      generated tokens per second of the same time\n"
	"Memory is measured while all ranks hold their layers; '-' where one had left.\n"
	"Under the table: how much of what each process maps is in large pages. In JSON\n"
	"these are \"shared_hugetlb_bytes\" and \"large_bytes\" of each rank, and\n"
	"\"numa_copy_bytes\" what it keeps for the ranks of its NUMA node\n"
	"(LAYERSHARD_NUMA=copy), of which a sentence below tells the sum.\n"
	"'replicated' is computed: what the same ranks would hold and read with all\n"
	"layers in each.\n\n"
	"Environment ('layershard info' tells those of the library)\n"
	"  LAYERSHARD_MODEL      the model, where --model names none\n"
	"  LAYERSHARD_CACHE      folder of the model that 'make demo' fetches; without it\n"
	"                        layershard in XDG_CACHE_HOME, else .cache/layershard in\n"
	"                        HOME\n"
	"  LAYERSHARD_LOG        the library's log on stderr: error, warn, info or debug\n"
	"  OPENBLAS_NUM_THREADS  threads per rank for the products (default 1)\n\n" CLI_EXIT_HELP
		CLI_EXIT_HELP_BAD_MODEL;

int about_print_help(void)
{
	fputs(options_help, stdout);
	fputs(work_help, stdout);
	return cli_flush_output() ? CLI_DONE : CLI_FAILED;
}

/* Any CBLAS will do; OpenBLAS is the one that can tell about itself. */
static const char *blas_text(void)
{
	char *(*config)(void);
	void *symbol = dlsym(RTLD_DEFAULT, "openblas_get_config");

	if (!symbol)
		return "a CBLAS that is not OpenBLAS";
	memcpy(&config, &symbol, sizeof config); /* C has no cast from an object's to a function's address */
	return config();
}

int about_print_version(void)
{
	char pcre2[64] = "unknown";

	(void)pcre2_config(PCRE2_CONFIG_VERSION, pcre2);
	printf("%s %s\n", cli_program, lshard_version());
	printf("blas   %s\n", blas_text());
	printf("pcre2  %s\n", pcre2);
	return cli_flush_output() ? CLI_DONE : CLI_FAILED;
}
