/* SPDX-License-Identifier: Apache-2.0
 *
 * run.h - what layershard-llama was asked for, and the two things that it does: continuing prompts, verifying layers.
 */
#ifndef RUN_H
#define RUN_H

#include <stdbool.h>
#include <stdint.h>

#include "prompts.h"
#include "rank_options.h"

struct run {
	struct rank_options options;
	struct prompts prompts;
	uint32_t max_tokens; /* 0: not given */
	bool verify;
	bool json;
	bool help;
	bool version;
};

/** Have the ranks continue the prompts, and print what comes and what it has cost. Returns a cli_exit. */
int run_prompts(struct run *run);
/** Have every rank hash every layer as it sees it, and print the hashes. Returns a cli_exit. */
int run_verify(const struct run *run);

#endif
