/* SPDX-License-Identifier: Apache-2.0
 *
 * exchanged_words.h - what ranks of the shm transport exchange in the tests of its control channel, so that each sees
 * whose it is, of which round, and who its rank had seen alive before.
 */
#ifndef LAYERSHARD_TEST_EXCHANGED_WORDS_H
#define LAYERSHARD_TEST_EXCHANGED_WORDS_H

#include "shm_ranks.h"

struct word {
	uint32_t rank;
	uint32_t round;
	uint32_t alive; /* mask: as this rank saw the round before */
	uint32_t tail[40];
};

struct word word_of(const struct member *member, uint32_t round, uint32_t alive);
int is_word(const struct word *word, uint32_t rank, uint32_t round);
lshard_status exchange(struct shm_rank *rank, const void *mine, void *all, size_t bytes, uint8_t *alive);

#endif
