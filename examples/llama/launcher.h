/* SPDX-License-Identifier: Apache-2.0
 *
 * launcher.h - starts this process's ranks, listens to them, and sees to it that none outlives it.
 */
#ifndef LAUNCHER_H
#define LAUNCHER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "prompts.h"
#include "rank_messages.h"
#include "rank_options.h"
#include "rank_work.h"
#include "workers.h"

enum rank_phase { RANK_LOADING, RANK_WORKING, RANK_WAITING, RANK_REPORTED };

/* One rank that this process has started. */
struct own_rank {
	struct rank_task task;
	struct worker *worker;
	struct rank_inbox inbox;
	enum rank_phase phase;
	struct rank_ready ready;
	struct rank_report report;     /* from RANK_REPORTED on */
	struct rank_verified verified; /* where is_verified */
	bool is_verified;
	bool is_usage;       /* the error is one of options or environment */
	char error[768];     /* "": none */
	char no_memory[256]; /* why its memory is not known; "": it is, or it is another's part to say */
};

struct pollfd;

struct launcher {
	/* set by the caller */
	const struct rank_options *options;
	struct prompts *prompts; /* filled with what the ranks answer; NULL: verify */
	uint32_t max_tokens;
	void (*prompt_changed)(void *user); /* NULL: not wanted */
	void *user;
	/* results */
	struct own_rank *ranks;
	uint32_t rank_count;
	char transport[128]; /* in use, and why */
	/* own */
	struct workers workers;
	struct pollfd *polled; /* a place for each rank */
	bool measure_ordered;
	bool end_ordered;
};

/**
 * Starts the ranks and returns when all of them are gone. Ends this process by the signal it was sent (SIGINT, SIGTERM,
 * SIGHUP, SIGPIPE), once its ranks are gone.
 * @return false when a rank did not do all it should: its error is set, and so is that of its unfinished prompts.
 */
bool launcher_run(struct launcher *launcher);
/** True when rank number @p index of this process failed at what the one before it failed at: that is told once. */
bool launcher_repeats_error(const struct launcher *launcher, uint32_t index);
/** What to exit with: CLI_USAGE when the options or the environment were what made the ranks fail. */
int launcher_code(const struct launcher *launcher);
void launcher_free(struct launcher *launcher);

#endif
