/* SPDX-License-Identifier: Apache-2.0
 *
 * seer.c - see seer.h.
 */
#include "seer.h"
#include "patience.h"
#include "test_clock.h"

lshard_status seer_open_group(struct seer *seer, const struct member *member, const lshard_callbacks *callbacks,
			      uint32_t timeout_ms, char *error, size_t error_bytes)
{
	lshard_group_options options = member_options(member, "callback", timeout_ms ? timeout_ms : LONG_MS);

	options.memory = LSHARD_MEMORY_CUDA;
	options.callbacks = callbacks;
	options.error = error;
	options.error_bytes = error_bytes;
	return lshard_group_create(&options, &seer->rank.group);
}

bool seer_open(struct seer *seer, const struct member *member, const struct setting *setting)
{
	const lshard_series_options options = rank_series_options(setting);
	struct rank *rank = &seer->rank;
	char error[512] = "";

	*seer = (struct seer){.rank = {.member = member, .setting = setting, .fail_at = -1}};
	seer->fake = fake_open(member);
	if (!seer->fake)
		return false;
	EXPECT(member,
	       seer_open_group(seer, member, fake_callbacks(seer->fake), setting->timeout_ms, error, sizeof error) ==
		       LSHARD_OK,
	       "%s", error);
	EXPECT(member, lshard_series_create(rank->group, &options, &rank->series) == LSHARD_OK, "%s",
	       lshard_group_error(rank->group));
	OK_SERIES(rank, lshard_series_commit(rank->series, fill_layer, rank));
	return true;
failed:
	return false;
}

bool seer_close(struct seer *seer)
{
	const struct member *member = seer->rank.member;
	bool right = false;

	EXPECT(member, lshard_series_destroy(seer->rank.series) == LSHARD_OK, "%s",
	       lshard_series_error(seer->rank.series));
	EXPECT(member, lshard_group_destroy(seer->rank.group) == LSHARD_OK, "%s", lshard_group_error(seer->rank.group));
	right = true;
failed:
	if (!fake_close(seer->fake)) {
		fprintf(stderr, "rank %d: memory or events are left on the device\n", (int)member->rank);
		right = false;
	}
	return right;
}

void seer_see(void *user, uint64_t value)
{
	struct seer *seer = user;
	const struct setting *setting = seer->rank.setting;
	const uint32_t layer = setting->first_layer + (uint32_t)(value & 0xffff);
	bool right = true;

	for (int look = 0; look < 2; look++) {
		for (uint32_t tensor = 0; tensor < setting->n_tensors; tensor++) {
			void *address = NULL;

			lshard_series_address(seer->rank.series, layer, tensor, &address);
			right = right &&
				is_foretold(address, setting->tensors[tensor].bytes, value >> 16, layer, tensor);
		}
		pause_ms(look == 0);
	}
	if (!right)
		atomic_fetch_add(&seer->wrong, 1);
	atomic_fetch_add(&seer->seen, 1);
}

lshard_status seer_go_to(struct seer *seer, uint32_t position, void *stream)
{
	const uint32_t layer = seer->rank.setting->first_layer + position;
	lshard_status status = lshard_reach(seer->rank.series, layer, stream);

	if (status == LSHARD_OK)
		status = lshard_wait(seer->rank.series, layer, stream);
	if (status == LSHARD_OK)
		fake_launch(seer->fake, stream, seer_see, seer, seer->rank.generation << 16 | position);
	return status;
}

bool seer_pass(struct seer *seer, int stream)
{
	struct rank *rank = &seer->rank;

	for (uint32_t position = 0; position < rank->setting->layers; position++)
		OK_SERIES(rank, seer_go_to(seer, position, fake_stream(seer->fake, stream)));
	return true;
failed:
	return false;
}

bool seer_saw_right(struct seer *seer)
{
	fake_synchronize(seer->fake);
	EXPECT(seer->rank.member, atomic_load(&seer->wrong) == 0, "%d of %d layers were wrong when a kernel saw them",
	       atomic_load(&seer->wrong), atomic_load(&seer->seen));
	return true;
failed:
	return false;
}
