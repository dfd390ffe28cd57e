/* SPDX-License-Identifier: Apache-2.0
 *
 * gathering.h - the all-gathers of ranks while a transport opens. A rank that has failed makes one more, and all others
 * hear why in whichever of theirs they are: nobody waits for it until a deadline.
 * Knows the bootstrap; knows nothing of what is gathered.
 */
#ifndef LAYERSHARD_GATHERING_H
#define LAYERSHARD_GATHERING_H

#include <layershard/transport.h>

struct gathering_frame;

struct gathering {
	const lshard_context *context;
	struct gathering_frame *frames; /* [size], and this rank's own */
	lshard_bootstrap bootstrap;     /* what a transport gets for its own all-gathers */
	lshard_status ended;            /* a rank has failed, and all know: nothing is gathered any more */
	lshard_error why;
};

/* Local; NO_MEMORY with a text. @p context has the bootstrap, and lives as long. */
lshard_status gathering_open(struct gathering *gathering, const lshard_context *context, lshard_error *error);
void gathering_close(struct gathering *gathering);

/*
 * Collective, once all has been opened or could not be: OK if it was on all ranks; else this rank's own failure, or
 * that of the first rank that failed of its own accord, with its text.
 */
lshard_status gathering_conclude(struct gathering *gathering, lshard_status opened, lshard_error *error);

#endif
