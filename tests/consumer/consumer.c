/* SPDX-License-Identifier: Apache-2.0
 *
 * A stranger's program in C against the installed library: one rank, one layer, C99, no path of the source tree. It
 * tells why it has no group, as where LAYERSHARD_TRANSPORT asks for what the library does not have.
 */
#include <layershard/layershard.h>
#include <layershard/transport.h>

#include <stdio.h>
#include <string.h>

static int write_layer(void *user, uint32_t layer, void *const *tensors)
{
	(void)user;
	memset(tensors[0], (int)(7 + layer), 100);
	return 0;
}

static lshard_status use(lshard_series *series, unsigned char *last)
{
	void *bytes = NULL;
	lshard_status status = lshard_series_commit(series, write_layer, NULL);

	if (status == LSHARD_OK)
		status = lshard_reach(series, 0, NULL);
	if (status == LSHARD_OK)
		status = lshard_wait(series, 0, NULL);
	if (status == LSHARD_OK)
		status = lshard_series_address(series, 0, 0, &bytes);
	if (status == LSHARD_OK)
		*last = ((unsigned char *)bytes)[99];
	return status;
}

int main(void)
{
	const lshard_tensor tensor = {"weight", 100, 0, LSHARD_STRIPE_BYTES, 0, 0};
	lshard_group_options one_rank = LSHARD_GROUP_OPTIONS_INIT;
	lshard_series_options one_layer = LSHARD_SERIES_OPTIONS_INIT;
	lshard_group *group = NULL;
	lshard_series *series = NULL;
	unsigned char last = 0;
	char why[256] = "";
	lshard_status status;

	one_rank.rank = 0;
	one_rank.size = 1;
	one_rank.error = why;
	one_rank.error_bytes = sizeof why;
	one_layer.name = "one";
	one_layer.layer_count = 1;
	one_layer.tensors = &tensor;
	one_layer.tensor_count = 1;
	status = lshard_group_create(&one_rank, &group);
	if (status == LSHARD_OK)
		status = lshard_series_create(group, &one_layer, &series);
	if (status == LSHARD_OK)
		status = use(series, &last);
	lshard_series_destroy(series);
	lshard_group_destroy(group);
	printf("layershard %s from C: %s, byte %d%s%s\n", lshard_version(), lshard_status_text(status), last,
	       why[0] ? "; " : "", why);
	return status == LSHARD_OK && last == 7 ? 0 : 1;
}
