/* SPDX-License-Identifier: Apache-2.0
 *
 * process_memory.c - see process_memory.h.
 */
#include "process_memory.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum amount {
	PSS,
	PRIVATE_CLEAN,
	PRIVATE_DIRTY,
	ANONYMOUS_LARGE,
	SHARED_MEMORY_LARGE,
	SHARED_HUGETLB,
	PRIVATE_HUGETLB,
	AMOUNTS
};

static const char *const names[AMOUNTS] = {
	[PSS] = "Pss:",
	[PRIVATE_CLEAN] = "Private_Clean:",
	[PRIVATE_DIRTY] = "Private_Dirty:",
	[ANONYMOUS_LARGE] = "AnonHugePages:",
	[SHARED_MEMORY_LARGE] = "ShmemPmdMapped:",
	[SHARED_HUGETLB] = "Shared_Hugetlb:",
	[PRIVATE_HUGETLB] = "Private_Hugetlb:",
};

struct amounts {
	uint64_t bytes[AMOUNTS];
	unsigned times[AMOUNTS];
};

/* What lies behind the room is no line of its own, whatever it looks like: a path can be long. */
static bool next_line(FILE *file, char *line, int room)
{
	int byte = 0;

	if (!fgets(line, room, file))
		return false;
	if (!strchr(line, '\n'))
		while (byte != EOF && byte != '\n')
			byte = getc(file);
	return true;
}

/* "   12 kB", and nothing else. */
static bool parse_bytes(const char *text, uint64_t *bytes)
{
	unsigned long long kib;
	char *end;

	text += strspn(text, " \t");
	if (*text < '0' || *text > '9')
		return false;
	errno = 0;
	kib = strtoull(text, &end, 10);
	if (errno || kib > UINT64_MAX / 1024 || (strcmp(end, " kB\n") != 0 && strcmp(end, " kB") != 0))
		return false;
	*bytes = kib * 1024;
	return true;
}

/* False for a line that begins with one of the names and is not understood; others count nothing. */
static bool count_line(const char *line, struct amounts *amounts)
{
	uint64_t bytes;

	for (int i = 0; i < AMOUNTS; i++) {
		if (strncmp(line, names[i], strlen(names[i])) != 0)
			continue;
		if (!parse_bytes(line + strlen(names[i]), &bytes) || bytes > UINT64_MAX - amounts->bytes[i])
			return false;
		amounts->bytes[i] += bytes;
		amounts->times[i]++;
	}
	return true;
}

static uint64_t large_bytes(const struct amounts *amounts)
{
	return amounts->bytes[ANONYMOUS_LARGE] + amounts->bytes[SHARED_MEMORY_LARGE] + amounts->bytes[SHARED_HUGETLB] +
	       amounts->bytes[PRIVATE_HUGETLB];
}

bool process_memory_parse(FILE *rollup, struct process_memory *memory)
{
	struct amounts amounts = {{0}, {0}};
	const uint64_t *bytes = amounts.bytes;
	char line[512];

	while (next_line(rollup, line, sizeof line))
		if (!count_line(line, &amounts))
			return false;
	for (int i = 0; i < AMOUNTS; i++)
		if (amounts.times[i] != 1)
			return false;
	*memory = (struct process_memory){
		.private_bytes = bytes[PRIVATE_CLEAN] + bytes[PRIVATE_DIRTY] + bytes[PRIVATE_HUGETLB],
		.pss_bytes = bytes[PSS] + bytes[PRIVATE_HUGETLB],
		.shared_hugetlb_bytes = bytes[SHARED_HUGETLB],
		.large_bytes = large_bytes(&amounts),
	};
	return true;
}

bool process_memory_read(struct process_memory *memory)
{
	FILE *file = fopen("/proc/self/smaps_rollup", "re");
	bool understood;

	if (!file)
		return false;
	understood = process_memory_parse(file, memory);
	(void)fclose(file);
	return understood;
}

bool process_pages_read(const void *memory, uint64_t bytes, struct process_pages *pages)
{
	const unsigned long long first = (uintptr_t)memory;
	FILE *file = fopen("/proc/self/smaps", "re");
	struct amounts sum = {{0}, {0}};
	unsigned long long begin;
	unsigned long long end;
	bool understood = true;
	bool found = false;
	bool within = false;
	char line[512];

	if (!file)
		return false;
	while (understood && next_line(file, line, sizeof line)) {
		if (sscanf(line, "%llx-%llx ", &begin, &end) == 2)
			within = begin < first + bytes && first < end;
		else if (within)
			understood = count_line(line, &sum);
		found = found || within;
	}
	(void)fclose(file);
	if (!found || !understood)
		return false;
	pages->large_bytes = large_bytes(&sum);
	pages->reserved_bytes = sum.bytes[SHARED_HUGETLB] + sum.bytes[PRIVATE_HUGETLB];
	return true;
}
