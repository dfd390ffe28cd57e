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
