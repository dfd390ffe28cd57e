/* SPDX-License-Identifier: Apache-2.0
 *
 * numa.c - see numa.h. How: https://docs.kernel.org/admin-guide/mm/numa_memory_policy.html and mbind(2).
 *
 * A node is preferred and not bound to: where it is full, memory of another is slower, and none would be a signal or a
 * killed process.
 */
#include "numa.h"

#include <errno.h>
#include <linux/mempolicy.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The system takes one bit less than it is told. */
#define NODE_BITS (NUMA_MOST + 1ul)

/* ---- Wishes ---------------------------------------------------------------------------------------------------- */

struct numa_wish numa_wish_for(lshard_numa numa, uint32_t node)
{
	struct numa_wish wish = {.where = NUMA_ANYWHERE};

	numa_usable(&wish.nodes);
	if (numa_count(&wish.nodes) < 2)
		return wish;
	if (numa == LSHARD_NUMA_INTERLEAVE)
		wish.where = NUMA_INTERLEAVED;
	if (numa == LSHARD_NUMA_SOURCE || numa == LSHARD_NUMA_COPY)
		wish.where = NUMA_ON_NODE;
	wish.node = node;
	return wish;
}

const char *numa_word(lshard_numa numa)
{
	static const char *const words[] = {"auto", "none", "interleave", "source", "copy"}; /* as the enum */

	return (unsigned)numa < sizeof words / sizeof *words ? words[numa] : "?";
}

void numa_tell(const lshard_context *context)
{
	struct numa_nodes nodes;
	uint32_t count;

	numa_usable(&nodes);
	count = numa_count(&nodes);
	if (count >= 2)
		context->log(context, LSHARD_LOG_INFO, "numa %s: rank %d runs on node %u; it may use %u nodes",
			     numa_word(context->numa), (int)context->rank, numa_here(), count);
	else if (context->numa > LSHARD_NUMA_NONE)
		context->log(context, LSHARD_LOG_INFO, "numa %s: rank %d may use one node, where all its memory comes",
			     numa_word(context->numa), (int)context->rank);
}

static bool wishes(const struct numa_wish *wish)
{
	return wish && wish->where != NUMA_ANYWHERE;
}

/* The system's mode and nodes for a wish that is not NUMA_ANYWHERE. */
static int policy_of(const struct numa_wish *wish, struct numa_nodes *nodes)
{
	if (wish->where == NUMA_INTERLEAVED) {
		*nodes = wish->nodes;
		return MPOL_INTERLEAVE;
	}
	memset(nodes, 0, sizeof *nodes);
	numa_add(nodes, wish->node);
	return MPOL_PREFERRED;
}

uint32_t numa_turns(const struct numa_wish *wish)
{
	return wishes(wish) && wish->where == NUMA_INTERLEAVED ? numa_count(&wish->nodes) : 1;
}

/* Page `number * ratio + turn` is the turn of node `number` of them, each modulo @p turns. */
uint64_t numa_turn(uint64_t number, uint64_t ratio, uint32_t turns)
{
	return turns < ratio ? (number % turns + turns - number % turns * (ratio % turns) % turns) % turns : 0;
}

/* ---- Asking ---------------------------------------------------------------------------------------------------- */

static void tell_refused(const struct numa_use *use, int failed)
{
	const char *why = failed == EPERM ? " (a container may forbid it: it wants CAP_SYS_NICE, or seccomp rules that "
					    "allow mbind)"
			  : failed == ENOSYS ? " (this kernel knows no NUMA nodes)"
					     : "";

	use->context->log(
		use->context, LSHARD_LOG_WARN,
		"series '%s': numa %s: mbind of the %s: %s%s; its pages come where they are first touched, as do "
		"all that follow",
		use->series, numa_word(use->context->numa), use->what, strerror(failed), why);
}

void numa_bind(const struct numa_use *use, void *memory, uint64_t bytes)
{
	struct numa_nodes nodes;
	int mode;

	if (!wishes(use->wish) || use->wish->refused)
		return;
	mode = policy_of(use->wish, &nodes);
	if (syscall(SYS_mbind, memory, (unsigned long)bytes, mode, nodes.words, NODE_BITS, 0) == 0)
		return;
	tell_refused(use, errno);
	use->wish->refused = true;
}

void numa_policy_begin(const struct numa_wish *wish, struct numa_policy *before)
{
	struct numa_nodes nodes;
	int mode;

	before->kept = 0;
	if (!wishes(wish) || wish->refused ||
	    syscall(SYS_get_mempolicy, &before->mode, before->nodes.words, NODE_BITS, NULL, 0))
		return;
	mode = policy_of(wish, &nodes);
	before->kept = !syscall(SYS_set_mempolicy, mode, nodes.words, NODE_BITS);
}

void numa_policy_end(const struct numa_policy *before)
{
	if (before->kept)
		(void)syscall(SYS_set_mempolicy, before->mode, before->nodes.words, NODE_BITS);
}

/* ---- Looking --------------------------------------------------------------------------------------------------- */

#define LOOKED_AT 512 /* pages; chance picks them, as no regular choice would see nodes in turn as they are */

/* Of @p count pages at @p pages, how many are where they should be; -1 where the system does not say. */
static int count_placed(const struct numa_wish *wish, unsigned long count, void *const *pages, uint32_t *elsewhere)
{
	const int fair = (int)(count + count / 2) / (int)numa_turns(wish) + 4; /* of one of the nodes that take turns */
	int nodes[LOOKED_AT];
	int on[NUMA_MOST] = {0};
	int placed = 0;

	memset(nodes, -1, sizeof nodes);
	if (syscall(SYS_move_pages, 0, count, pages, NULL, nodes, 0))
		return -1;
	for (unsigned long i = 0; i < count; i++) {
		const uint32_t node = nodes[i] >= 0 && nodes[i] < NUMA_MOST ? (uint32_t)nodes[i] : NUMA_MOST;
		const bool right =
			wish->where == NUMA_ON_NODE ? node == wish->node : node < NUMA_MOST && on[node]++ < fair;

		placed += right || node == NUMA_MOST; /* that one, the system does not know */
		*elsewhere = right ? *elsewhere : node;
	}
	return placed;
}

void numa_touch(void *memory, uint64_t bytes)
{
	const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);

	for (uint64_t offset = 0; offset < bytes; offset += page) {
		volatile unsigned char *byte = (unsigned char *)memory + offset;

		*byte = *byte;
	}
}

void numa_settle(const struct numa_use *use, void *memory, uint64_t bytes)
{
	const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	const uint64_t pages = bytes / page;
	const unsigned long count = pages < LOOKED_AT ? (unsigned long)pages : LOOKED_AT;
	void *looked_at[LOOKED_AT];
	uint64_t chance = 1;
	uint32_t elsewhere = 0;
	int placed;

	if (!wishes(use->wish) || pages == 0)
		return;
	numa_touch(memory, bytes);
	if (use->wish->refused)
		return; /* told, and no wonder where they are */
	for (unsigned long i = 0; i < count; i++) {
		chance = chance * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407); /* Knuth's */
		looked_at[i] = (unsigned char *)memory + (pages == count ? i : (chance >> 33) % pages) * page;
	}
	placed = count_placed(use->wish, count, looked_at, &elsewhere);
	if (placed >= 0 && (unsigned long)placed * 100 < count * 90)
		use->context->log(
			use->context, LSHARD_LOG_WARN,
			"series '%s': numa %s: of the %s of %llu MiB about %lu %% lie where they should, others "
			"on node %u: a node is full (layershard info), or this process may not use it",
			use->series, numa_word(use->context->numa), use->what, (unsigned long long)(bytes >> 20),
			(unsigned long)placed * 100 / count, elsewhere);
}
