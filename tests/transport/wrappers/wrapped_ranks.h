/* SPDX-License-Identifier: Apache-2.0
 *
 * wrapped_ranks.h - what the tests of wrappers share: a small series, groups of one rank, and one layer between two
 * ranks with a wrapper in front of `local` and no group.
 */
#ifndef LAYERSHARD_TEST_WRAPPED_RANKS_H
#define LAYERSHARD_TEST_WRAPPED_RANKS_H

#include "conformance.h"
#include "contexts.h"

struct setting small_setting(void);

/* Create a group alone; what it says if that fails. */
lshard_status create_alone(const char *spec, char *error, size_t bytes, lshard_log_function log, void *log_user,
			   lshard_group **group);
/* A group by @p spec is refused, with @p word in the text. */
void assert_refused(const char *spec, lshard_status status, const char *word);

/* One layer of 300 bytes on rank 0, which rank 1 has a window for. */
struct narrow {
	lshard_piece piece;
	uint32_t first_piece[2];
	uint64_t shard_bytes[2];
	lshard_store_plan plan;
	lshard_context contexts[2]; /* local's and the wrapper's */
	lshard_transport *transport;
	lshard_store *store;
};

bool narrow_open(struct narrow *narrow, const struct member *member, const char *local,
		 const lshard_transport_ops *wrapper, const char *options);
void narrow_close(struct narrow *narrow);

#endif
