/* SPDX-License-Identifier: Apache-2.0
 *
 * rank_options.h - the options about ranks: which there are, how they hold the model.
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

#define RANK_OPTIONS_INIT {.ranks = RANKS_DEFAULT, .prefetch = 1, .placement = LSHARD_WHOLE}

/* Entries of getopt_long's table for these options. */
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

/** One option of RANK_OPTIONS_LONG. Returns CLI_DONE, or CLI_USAGE after a message. */
int rank_options_take(struct rank_options *options, int option, const char *argument);
/** Finds the rest: the model, rank and size, the transport. Returns a cli_exit, after a message if not 0. */
int rank_options_complete(struct rank_options *options);

#endif
