/* SPDX-License-Identifier: Apache-2.0
 *
 * rank_options.h - the options that `run` and `verify` have in common: which ranks there are, how they hold the model.
 */
#ifndef RANK_OPTIONS_H
#define RANK_OPTIONS_H

#include <getopt.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

#include "cli.h"
#include "engine.h"

#define RANKS_DEFAULT 4
#define RANKS_MOST    1024 /* on one machine, started by this program */

struct rank_options {
	/* as given */
	uint32_t ranks; /* size of the group */
	bool ranks_given;
	const char *model_given;
	uint32_t prefetch;
	lshard_placement placement;
	const char *resident; /* NULL: none */
	const char *transport;
	bool shm_copy;
	double link_gbits; /* 0: not throttled */
	bool replicated;
	/* found by rank_options_complete */
	struct cli_log log;
	char model[PATH_MAX];
	engine_model shape;
	uint64_t resident_bytes;
	char spec[256];      /* of the transport, for lshard_group_options */
	char job[64];        /* "": LAYERSHARD_JOB */
	uint32_t timeout_ms; /* 0: LAYERSHARD_TIMEOUT_MS, or the library's default */
	bool one_of_job;     /* this process is one rank of a job that somebody else started */
	bool rank_0_tells;   /* what all its ranks find alike: a launcher started them */
	int32_t first_rank;  /* of those this process starts */
	uint32_t own_ranks;
	bool threads; /* they are threads of this process: the transport `local`, or the rank of a job */
};

#define RANK_OPTIONS_INIT                                                                                              \
	{                                                                                                              \
		.ranks = RANKS_DEFAULT, .prefetch = 1, .placement = LSHARD_OWNER                                       \
	}

/* Entries of getopt_long's table for these options, and their part of --help. */
enum {
	OPTION_RANKS = 1000,
	OPTION_MODEL,
	OPTION_PREFETCH,
	OPTION_PLACEMENT,
	OPTION_RESIDENT,
	OPTION_TRANSPORT,
	OPTION_SHM_COPY,
	OPTION_LINK_GBITS
};

#define RANK_OPTIONS_LONG                                                                                              \
	{"ranks", required_argument, NULL, OPTION_RANKS}, {"model", required_argument, NULL, OPTION_MODEL},            \
		{"prefetch", required_argument, NULL, OPTION_PREFETCH},                                                \
		{"placement", required_argument, NULL, OPTION_PLACEMENT},                                              \
		{"resident", required_argument, NULL, OPTION_RESIDENT},                                                \
		{"transport", required_argument, NULL, OPTION_TRANSPORT},                                              \
		{"shm-copy", no_argument, NULL, OPTION_SHM_COPY},                                                      \
	{                                                                                                              \
		"link-gbits", required_argument, NULL, OPTION_LINK_GBITS                                               \
	}

#define RANK_OPTIONS_HELP                                                                                              \
	"  --ranks N            start N ranks on this machine (default 4). Without it, a\n"                            \
	"                       process that was started with a rank and a size\n"                                     \
	"                       (LAYERSHARD_RANK and _SIZE, torchrun, MPI, Slurm) is one\n"                            \
	"                       rank; such ranks meet by LAYERSHARD_JOB, else by the name\n"                           \
	"                       that their launcher gives its job\n"                                                   \
	"  --model FILE         the model (default: LAYERSHARD_MODEL, else what\n"                                     \
	"                       'make demo' fetched)\n"                                                                \
	"  --prefetch K         layers fetched ahead; at most K+1 windows (default 1)\n"                               \
	"  --placement P        owner: each layer whole on one rank (default); striped:\n"                             \
	"                       1/N of each layer on each\n"                                                           \
	"  --resident AMOUNT    memory per rank for keeping further layers: bytes (suffix\n"                           \
	"                       K, M or G), or a percentage of the layers that a rank\n"                               \
	"                       does not store (default 0)\n"                                                          \
	"  --transport T        auto (default), shm (processes), local (threads of one\n"                              \
	"                       process)\n"                                                                            \
	"  --shm-copy           copy layers into windows instead of mapping the other\n"                               \
	"                       ranks' pages\n"                                                                        \
	"  --link-gbits G       with --shm-copy: a link of G Gbit/s into each rank\n"

#define RANK_MODEL_HELP                                                                                                \
	"The model\n"                                                                                                  \
	"  One GGUF file (version 2 or 3, little-endian, not split) of the architecture\n"                             \
	"  'llama' with the tokenizer 'gpt2' and the pre-tokenizer 'smollm', as SmolLM2;\n"                            \
	"  tensors of type F32, F16, Q8_0 or Q4_1, output tied to the embedding or not.\n"                             \
	"  Experts, sliding windows, scaled rotary positions, biases and whatever else is\n"                           \
	"  not understood are refused with exit status 4. Of the ranks of a launcher rank\n"                           \
	"  0 says why; each does with LAYERSHARD_LOG.\n"

/** One option of RANK_OPTIONS_LONG. Returns CLI_DONE, or CLI_USAGE after a message. */
int rank_options_take(struct rank_options *options, const char *command, int option, const char *argument);
/** Finds the rest: the model, rank and size, the transport. Returns a cli_exit, after a message if not 0. */
int rank_options_complete(struct rank_options *options, const char *command);

#endif
