/* SPDX-License-Identifier: Apache-2.0
 *
 * numa_nodes.c - see numa_nodes.h. From /sys/devices/system/node and /proc/self/status, since containers that forbid
 * get_mempolicy have these. By files and system calls: libnuma would be one more library for the sake of a few lines.
 */
#include "numa_nodes.h"
#include "sized.h"

#include <layershard/plan.h>

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NODES   "/sys/devices/system/node/"
#define IN_WORD (8 * sizeof(unsigned long))

bool numa_has(const struct numa_nodes *nodes, uint32_t node)
{
	return node < NUMA_MOST && nodes->words[node / IN_WORD] >> node % IN_WORD & 1;
}

void numa_add(struct numa_nodes *nodes, uint32_t node)
{
	if (node < NUMA_MOST)
		nodes->words[node / IN_WORD] |= 1ul << node % IN_WORD;
}

uint32_t numa_count(const struct numa_nodes *nodes)
{
	uint32_t count = 0;

	for (uint32_t node = 0; node < NUMA_MOST; node++)
		count += numa_has(nodes, node);
	return count;
}

/* ---- What the system says -------------------------------------------------------------------------------------- */

/* The line of a file that begins with @p key, without it and the blanks after it; false where there is none. */
static bool read_line(const char *path, const char *key, char *text, size_t room)
{
	FILE *file = fopen(path, "re");
	bool found = false;
	char line[512];

	while (file && !found && fgets(line, sizeof line, file)) {
		const char *value = line + strlen(key);

		found = strncmp(line, key, strlen(key)) == 0;
		if (found)
			snprintf(text, room, "%s", value + strspn(value, " \t"));
	}
	if (file)
		(void)fclose(file);
	if (found)
		text[strcspn(text, "\n")] = 0;
	return found;
}

/* "0-3,8" */
static void parse_list(const char *text, struct numa_nodes *nodes)
{
	memset(nodes, 0, sizeof *nodes);
	while (*text >= '0' && *text <= '9') {
		char *end;
		unsigned long first = strtoul(text, &end, 10);
		const unsigned long last = *end == '-' ? strtoul(end + 1, &end, 10) : first;

		for (; first <= last && first < NUMA_MOST; first++)
			numa_add(nodes, (uint32_t)first);
		text = *end == ',' ? end + 1 : end;
	}
}

/* Take away those that the file does not list, if it is there. */
static void keep_listed(struct numa_nodes *nodes, const char *path, const char *key)
{
	struct numa_nodes listed;
	char text[512];

	if (!read_line(path, key, text, sizeof text))
		return;
	parse_list(text, &listed);
	for (size_t i = 0; i < sizeof nodes->words / sizeof *nodes->words; i++)
		nodes->words[i] &= listed.words[i];
}

static void read_online(struct numa_nodes *nodes)
{
	char text[512];

	memset(nodes, 0, sizeof *nodes);
	if (read_line(NODES "online", "", text, sizeof text))
		parse_list(text, nodes);
}

void numa_usable(struct numa_nodes *nodes)
{
	read_online(nodes);
	keep_listed(nodes, NODES "has_cpu", "");
	keep_listed(nodes, NODES "has_memory", "");
	keep_listed(nodes, "/proc/self/status", "Mems_allowed_list:");
	if (numa_count(nodes) == 0)
		numa_add(nodes, 0);
}

uint32_t numa_here(void)
{
	unsigned processor, node;

	return syscall(SYS_getcpu, &processor, &node, NULL) == 0 && node < NUMA_MOST ? node : 0;
}

/* Of all nodes that are there by rising number: how far each is from @p node, "10 21"; "" where it is not told. */
static void read_distances(uint32_t node, char *text, size_t room)
{
	char path[96];

	text[0] = 0;
	snprintf(path, sizeof path, NODES "node%u/distance", node);
	read_line(path, "", text, room);
}

uint32_t numa_home(void)
{
	const uint32_t here = numa_here();
	unsigned long least = ULONG_MAX;
	struct numa_nodes online, usable;
	uint32_t nearest = here;
	char text[512], *next = text;

	numa_usable(&usable);
	if (numa_has(&usable, here))
		return here;
	read_online(&online);
	read_distances(here, text, sizeof text);
	for (uint32_t node = 0; node < NUMA_MOST; node++) {
		const unsigned long distance = numa_has(&online, node) ? strtoul(next, &next, 10) : 0;

		if (!numa_has(&usable, node) || (nearest != here && distance >= least))
			continue;
		nearest = node;
		least = distance;
	}
	return nearest;
}

/* ---- For programs ---------------------------------------------------------------------------------------------- */

static uint64_t read_meminfo(uint32_t node, const char *what)
{
	unsigned long long kib;
	char path[96], key[64], text[64];

	snprintf(path, sizeof path, NODES "node%u/meminfo", node);
	snprintf(key, sizeof key, "Node %u %s:", node, what);
	return read_line(path, key, text, sizeof text) && sscanf(text, "%llu kB", &kib) == 1 ? kib * 1024 : 0;
}

static uint32_t find_online(const struct numa_nodes *online, uint32_t index)
{
	uint32_t node = 0;

	while (node < NUMA_MOST && (!numa_has(online, node) || index-- > 0))
		node++;
	return node;
}

lshard_status lshard_node_info(uint32_t index, lshard_node *node)
{
	lshard_node found = LSHARD_NODE_INIT;
	struct numa_nodes nodes;
	char path[96];
	uint32_t number;

	read_online(&nodes);
	number = find_online(&nodes, index);
	if (number == NUMA_MOST)
		return LSHARD_ERR_RANGE;
	if (!node)
		return LSHARD_ERR_INVALID;
	numa_usable(&nodes);
	snprintf(path, sizeof path, NODES "node%u/cpulist", number);
	read_line(path, "", found.processors, sizeof found.processors);
	found.number = (int32_t)number;
	found.usable = numa_has(&nodes, number);
	found.here = number == numa_here();
	found.memory_bytes = read_meminfo(number, "MemTotal");
	found.free_bytes = read_meminfo(number, "MemFree");
	return lshard__sized_give(node, &found, sizeof found, "lshard_node", NULL);
}
