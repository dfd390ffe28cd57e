/* SPDX-License-Identifier: Apache-2.0
 *
 * rank_work.h - what one rank does, in a process or a thread of its own.
 */
#ifndef RANK_WORK_H
#define RANK_WORK_H

#include <stdbool.h>

#include "prompts.h"
#include "rank_options.h"

struct rank_task {
	const struct rank_options *options;
	const struct prompts *prompts; /* those with index % size == rank are this rank's; NULL: verify instead */
	uint32_t max_tokens;
	int32_t rank;
	bool measures_memory; /* false for all but one of the ranks that share a process */
	int socket;           /* rank_messages.h; closed by whoever opened it */
};

/** Loads, works, reports and leaves. Whatever goes wrong is told over the socket. */
void rank_work(const struct rank_task *task);

#endif
