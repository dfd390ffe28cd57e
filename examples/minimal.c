/* SPDX-License-Identifier: Apache-2.0
 *
 * Eight layers, each stored by one rank, used by all. On four ranks of one machine:
 *   for r in 0 1 2 3; do LAYERSHARD_JOB=minimal LAYERSHARD_RANK=$r LAYERSHARD_SIZE=4 ./minimal & done; wait
 */
#include <layershard/layershard.h>
#include <stdio.h>

enum { LAYERS = 8, FLOATS = 1 << 16 };

/* Called once per layer, on the rank that stores it: read it from your checkpoint, process it, write it. */
static int load(void *user, uint32_t layer, void *const *tensors)
{
	(void)user;
	for (int i = 0; i < FLOATS; i++)
		((float *)tensors[0])[i] = (float)layer;
	return 0;
}

int main(void)
{
	const lshard_tensor weight = {"weight", FLOATS * sizeof(float), 0, LSHARD_STRIPE_BYTES, 0, 0};
	lshard_group_options ranks = LSHARD_GROUP_OPTIONS_INIT; /* rank and size are found in the environment */
	lshard_series_options layers = LSHARD_SERIES_OPTIONS_INIT;
	lshard_group *group = NULL;
	lshard_series *series = NULL;
	char cause[512] = "";
	double sum = 0;

	ranks.error = cause;
	ranks.error_bytes = sizeof cause;
	layers.name = "blocks";
	layers.layer_count = LAYERS;
	layers.tensors = &weight;
	layers.tensor_count = 1;
	if (lshard_group_create(&ranks, &group) < 0)
		return fprintf(stderr, "%s\n", cause), 1;
	if (lshard_series_create(group, &layers, &series) < 0)
		return fprintf(stderr, "%s\n", lshard_group_error(group)), 1;
	if (lshard_series_commit(series, load, NULL) < 0)
		return fprintf(stderr, "%s\n", lshard_series_error(series)), 1;

	for (uint32_t layer = 0; layer < LAYERS; layer++) { /* one pass */
		void *bytes;

		lshard_reach(series, layer, NULL);
		if (lshard_wait(series, layer, NULL) < 0 || lshard_series_address(series, layer, 0, &bytes) < 0)
			return fprintf(stderr, "%s\n", lshard_series_error(series)), 1;
		for (int i = 0; i < FLOATS; i++) /* your computation */
			sum += ((const float *)bytes)[i];
	}
	printf("rank %d of %d: sum %.0f by %s\n", (int)lshard_group_rank(group), (int)lshard_group_size(group), sum,
	       lshard_group_transport(group));
	lshard_series_destroy(series);
	lshard_group_destroy(group);
	return 0;
}
