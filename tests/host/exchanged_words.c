/* SPDX-License-Identifier: Apache-2.0
 *
 * exchanged_words.c - see exchanged_words.h.
 */
#include "exchanged_words.h"

struct word word_of(const struct member *member, uint32_t round, uint32_t alive)
{
	struct word word = {(uint32_t)member->rank, round, alive, {0}};

	for (uint32_t i = 0; i < 40; i++)
		word.tail[i] = round * 41 + (uint32_t)member->rank * 3 + i;
	return word;
}

int is_word(const struct word *word, uint32_t rank, uint32_t round)
{
	for (uint32_t i = 0; i < 40; i++)
		if (word->tail[i] != round * 41 + rank * 3 + i)
			return 0;
	return word->rank == rank && word->round == round;
}

lshard_status exchange(struct shm_rank *rank, const void *mine, void *all, size_t bytes, uint8_t *alive)
{
	return rank->transport->ops->exchange(rank->transport, mine, all, bytes, alive);
}
