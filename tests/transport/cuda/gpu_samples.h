/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_samples.h - times in microseconds and where they lie. Knows nothing of what was timed.
 */
#ifndef TESTS_GPU_SAMPLES_H
#define TESTS_GPU_SAMPLES_H

#include <stddef.h>

struct samples {
	double *us;
	size_t count;
	size_t room;
};

/* Room for @p room times; 0 when there is no memory. */
int samples_make(struct samples *samples, size_t room);
void samples_free(struct samples *samples);
/* Does nothing when it is full. */
void samples_add(struct samples *samples, double us);
/* From the shortest to the longest; before samples_at. */
void samples_sort(struct samples *samples);
/* The time that a part of all, 0 to 1, does not exceed; 0 when there is none. */
double samples_at(const struct samples *samples, double part);

#endif
