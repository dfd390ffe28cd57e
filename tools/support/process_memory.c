/* SPDX-License-Identifier: Apache-2.0
 *
 * process_memory.c - see process_memory.h.
 */
#include "process_memory.h"

#include <stdio.h>

bool process_memory_read(struct process_memory *memory)
{
	FILE *file = fopen("/proc/self/smaps_rollup", "re");
	struct process_memory sum = {0, 0};
	unsigned long long kib;
	int found = 0;
	char line[256];

	if (!file)
		return false;
	while (fgets(line, sizeof line, file)) {
		if (sscanf(line, "Pss: %llu kB", &kib) == 1) {
			sum.pss_bytes = kib * 1024;
			found++;
		} else if (sscanf(line, "Private_Clean: %llu kB", &kib) == 1 ||
			   sscanf(line, "Private_Dirty: %llu kB", &kib) == 1) {
			sum.private_bytes += kib * 1024;
			found++;
		}
	}
	(void)fclose(file);
	if (found != 3)
		return false;
	*memory = sum;
	return true;
}

/* What a line of smaps adds. */
static void add_pages(const char *line, struct process_pages *sum)
{
	unsigned long long kib;

	if (sscanf(line, "AnonHugePages: %llu kB", &kib) == 1 || sscanf(line, "ShmemPmdMapped: %llu kB", &kib) == 1) {
		sum->large_bytes += kib * 1024;
	} else if (sscanf(line, "Shared_Hugetlb: %llu kB", &kib) == 1 ||
		   sscanf(line, "Private_Hugetlb: %llu kB", &kib) == 1) {
		sum->large_bytes += kib * 1024;
		sum->reserved_bytes += kib * 1024;
	}
}

bool process_pages_read(const void *memory, uint64_t bytes, struct process_pages *pages)
{
	const unsigned long long first = (uintptr_t)memory;
	FILE *file = fopen("/proc/self/smaps", "re");
	struct process_pages sum = {0, 0};
	unsigned long long begin;
	unsigned long long end;
	bool found = false;
	bool within = false;
	char line[512];

	if (!file)
		return false;
	while (fgets(line, sizeof line, file)) {
		if (sscanf(line, "%llx-%llx ", &begin, &end) == 2)
			within = begin < first + bytes && first < end;
		else if (within)
			add_pages(line, &sum);
		found = found || within;
	}
	(void)fclose(file);
	if (!found)
		return false;
	*pages = sum;
	return true;
}
