/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_samples.c - see gpu_samples.h.
 */
#include "gpu_samples.h"

#include <stdlib.h>

int samples_make(struct samples *samples, size_t room)
{
	*samples = (struct samples){calloc(room, sizeof *samples->us), 0, room};
	return samples->us != NULL;
}

void samples_free(struct samples *samples)
{
	free(samples->us);
	*samples = (struct samples){NULL, 0, 0};
}

void samples_add(struct samples *samples, double us)
{
	if (samples->count < samples->room)
		samples->us[samples->count++] = us;
}

static int by_size(const void *a, const void *b)
{
	return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

void samples_sort(struct samples *samples)
{
	if (samples->count)
		qsort(samples->us, samples->count, sizeof samples->us[0], by_size);
}

double samples_at(const struct samples *samples, double part)
{
	const size_t index = (size_t)((double)samples->count * part);

	if (!samples->count)
		return 0;
	return samples->us[index < samples->count ? index : samples->count - 1];
}
