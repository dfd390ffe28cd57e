/* SPDX-License-Identifier: Apache-2.0
 *
 * unsharded.h - the tensors every rank keeps whole: norms, embeddings, output matrix.
 */
#ifndef UNSHARDED_H
#define UNSHARDED_H

#include "gguf.h"
#include "llama_config.h"

/* A matrix as the file has it: a quarter of its floats, and rows are turned into floats as they are needed. */
struct stored_matrix {
	gguf_encoding encoding;
	size_t columns;
	size_t row_bytes;
	uint8_t *bytes;
};

struct unsharded {
	struct stored_matrix embedding;
	struct stored_matrix own_output; /* bytes NULL when tied */
	const struct stored_matrix *output;
	float *norms; /* rows of hidden: two for each block (attention, feed-forward), the output's last */
	size_t norm_count;
};

/** @p unsharded stays where it is until unsharded_fini, which is allowed after a failure too. */
lshard_status unsharded_init(struct unsharded *unsharded, const struct llama_config *config, gguf *file,
			     engine_error *error);
void unsharded_fini(struct unsharded *unsharded);

/** @p count rows from @p first on, as floats. */
void stored_rows(const struct stored_matrix *matrix, size_t first, size_t count, float *to);

#endif
