/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda_ranks.c - see cuda_ranks.h.
 */
#include "cuda_ranks.h"

#include <string.h>
#include <time.h>

/* ---- a rank ---- */

static void keep_warning(void *user, lshard_log_level level, const char *text)
{
	struct rank *rank = user;

	if (level == LSHARD_LOG_WARN)
		snprintf(rank->said, sizeof rank->said, "%s", text);
}

void cuda_set_stub(const struct member *member, const struct setting *setting)
{
	stub_cuda_reset();
	stub_cuda_set(STUB_LATE, setting->late ? setting->late + member->rank : 0);
	stub_cuda_set(STUB_ONE_DEVICE, member->rank < setting->neighbours);
	stub_cuda_set(STUB_VIRTUAL_MEMORY, member->rank != setting->lacks_memory - 1);
}

lshard_status cuda_open_group(struct rank *rank, const struct member *member, const struct setting *setting)
{
	return cuda_open_group_by(rank, member, setting, NULL);
}

lshard_status cuda_open_group_by(struct rank *rank, const struct member *member, const struct setting *setting,
				 const lshard_transport_ops *custom)
{
	lshard_group_options options =
		member_options(member, setting->spec, setting->timeout_ms ? setting->timeout_ms : LONG_MS);

	memset(rank, 0, sizeof *rank);
	rank->member = member;
	rank->setting = setting;
	options.custom_transport = custom;
	options.callbacks = setting->callbacks;
	options.memory = LSHARD_MEMORY_CUDA;
	options.device = member->rank;
	options.log = keep_warning;
	options.log_user = rank;
	options.error = rank->error;
	options.error_bytes = sizeof rank->error;
	return lshard_group_create(&options, &rank->group);
}

static uint32_t word_of(uint32_t generation, uint32_t layer, uint32_t word)
{
	return (generation * 131 + layer * 31 + word) * 2654435761u;
}

void cuda_foretell(struct rank *rank, uint32_t generation)
{
	for (uint32_t layer = 0; layer < LAYERS; layer++)
		for (uint32_t word = 0; word < BYTES / 4; word++)
			rank->reference[layer][word] = word_of(generation, layer, word);
}

int cuda_fill_layer(void *user, uint32_t layer, void *const *tensors)
{
	struct rank *rank = user;

	memcpy(tensors[0], rank->reference[layer - FIRST], BYTES);
	return 0;
}

lshard_status cuda_create_series_in(struct rank *rank, const lshard_memory_source *source)
{
	const lshard_tensor tensor = {"weight", BYTES, 0, LSHARD_STRIPE_BYTES, 0, 0};
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;

	options.name = "blocks";
	options.first_layer = FIRST;
	options.layer_count = LAYERS;
	options.tensors = &tensor;
	options.tensor_count = 1;
	options.prefetch = rank->setting->prefetch;
	options.placement = rank->setting->placement;
	options.memory_source = source;
	return lshard_series_create(rank->group, &options, &rank->series);
}

lshard_status cuda_create_series(struct rank *rank)
{
	return cuda_create_series_in(rank, NULL);
}

double cuda_now_s(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

int cuda_open_streams(struct rank *rank)
{
	cuInit(0);
	if (cuDevicePrimaryCtxRetain(&rank->context, rank->member->rank) || cuCtxSetCurrent(rank->context))
		return 0;
	return !cuStreamCreateWithPriority(&rank->streams[0], CUDA_STREAM_NON_BLOCKING, 0) &&
	       !cuStreamCreateWithPriority(&rank->streams[1], CUDA_STREAM_NON_BLOCKING, 0);
}

void cuda_close_rank(struct rank *rank)
{
	lshard_series_destroy(rank->series);
	lshard_group_destroy(rank->group);
	if (rank->streams[0])
		cuStreamDestroy_v2(rank->streams[0]);
	if (rank->streams[1])
		cuStreamDestroy_v2(rank->streams[1]);
	if (rank->context)
		cuDevicePrimaryCtxRelease_v2(rank->member->rank);
	cuCtxSetCurrent(NULL);
}

int cuda_open_rank(struct rank *rank, const struct member *member)
{
	cuda_set_stub(member, member->user);
	EXPECT(member, cuda_open_group(rank, member, member->user) == LSHARD_OK, "%s", rank->error);
	EXPECT(member, cuda_create_series(rank) == LSHARD_OK, "%s", lshard_group_error(rank->group));
	cuda_foretell(rank, 0);
	OK(rank, lshard_series_commit(rank->series, cuda_fill_layer, rank));
	EXPECT(member, cuda_open_streams(rank), "streams");
	return 1;
failed:
	cuda_close_rank(rank);
	return 0;
}

/* ---- passes ---- */

/* In stream order, where a program would compute from the layer. */
static int compare(struct rank *rank, uint32_t layer, cuda_stream stream)
{
	void *address = NULL;
	uint64_t arguments[4];
	void *parameters[4];

	OK(rank, lshard_series_address(rank->series, layer, 0, &address));
	arguments[0] = (uintptr_t)address;
	arguments[1] = (uintptr_t)rank->reference[layer - FIRST];
	arguments[2] = BYTES / 4;
	arguments[3] = (uintptr_t)&rank->differences;
	for (int i = 0; i < 4; i++)
		parameters[i] = &arguments[i];
	EXPECT(rank->member,
	       !cuLaunchKernel((cuda_function)(void *)rank, 1, 1, 1, 1, 1, 1, 0, stream, parameters, NULL), "launch");
	return 1;
failed:
	return 0;
}

int cuda_visit(struct rank *rank, uint32_t layer, cuda_stream stream)
{
	OK(rank, lshard_reach(rank->series, layer, stream));
	OK(rank, lshard_wait(rank->series, layer, stream));
	return compare(rank, layer, stream);
failed:
	return 0;
}

int cuda_one_pass(struct rank *rank, uint32_t layers, cuda_stream stream)
{
	for (uint32_t layer = FIRST; layer < FIRST + layers; layer++)
		if (!cuda_visit(rank, layer, stream))
			return 0;
	return 1;
}

int cuda_all_right(struct rank *rank, const char *what)
{
	cuStreamSynchronize(rank->streams[0]);
	cuStreamSynchronize(rank->streams[1]);
	EXPECT(rank->member, rank->differences == 0, "%s: %llu wrong words (%s, placement %d, k %u, seed %lld)", what,
	       (unsigned long long)rank->differences, rank->setting->spec, (int)rank->setting->placement,
	       rank->setting->prefetch, (long long)rank->setting->late);
	return 1;
failed:
	return 0;
}
