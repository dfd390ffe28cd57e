/* SPDX-License-Identifier: Apache-2.0
 *
 * test_channel.c - the kit of transports from outside the tree: what one rank cannot open none opens, descriptors come
 * to whom they are meant for, shards are read by all, and a rank that leaves or is aborted keeps nobody waiting. That
 * an exchange happens for all or for none is test_control's.
 */
#include "contexts.h"
#include "patience.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define RANKS 3

struct end {
	lshard_context context;
	lshard_error error;
	lshard_channel *channel;
};

static bool end_open(struct end *end, const struct member *member)
{
	*end = (struct end){.context = context_for_member(member, "", LONG_MS)};
	EXPECT(member, lshard_channel_open(&end->context, &end->error, &end->channel) == LSHARD_OK, "%s",
	       end->error.text);
	return true;
failed:
	return false;
}

/* Every rank gives a pipe's end; what is written to it says whose it was. */
static bool pipes_lead_to_their_ranks(const struct member *member, struct end *end)
{
	int own[2] = {-1, -1};
	int fds[RANKS] = {-1, -1, -1};
	bool right = false;

	EXPECT(member, pipe(own) == 0, "pipe");
	EXPECT(member, lshard_channel_swap(end->channel, "pipes", LSHARD_OK, own[1], fds) == LSHARD_OK, "%s",
	       end->error.text);
	for (int32_t rank = 0; rank < member->size; rank++) {
		const char to = (char)('0' + rank);

		EXPECT(member, (fds[rank] >= 0) == (rank != member->rank), "descriptor of rank %d", (int)rank);
		EXPECT(member, rank == member->rank || write(fds[rank], &to, 1) == 1, "writing");
	}
	EXPECT(member, lshard_channel_agree(end->channel, "pipes", LSHARD_OK) == LSHARD_OK, "%s", end->error.text);
	for (int32_t other = 0; other < member->size - 1; other++) {
		char from = 0;

		EXPECT(member, read(own[0], &from, 1) == 1 && from == '0' + member->rank, "'%c' came", from);
	}
	right = true;
failed:
	for (int32_t rank = 0; rank < member->size; rank++)
		if (fds[rank] >= 0)
			close(fds[rank]);
	close(own[0]);
	close(own[1]);
	return right;
}

/* Shards of 5 bytes and of as many pages as ranks; rank 2 has none. What a rank writes the others read. */
static bool shards_are_read_by_all(const struct member *member, struct end *end)
{
	const uint64_t bytes[RANKS] = {5, 3 * 65536, 0};
	const lshard_store_plan plan = {.name = "bricks", .shard_bytes = bytes[member->rank], .shard_bytes_of = bytes};
	void *shards[RANKS] = {NULL, NULL, NULL};
	unsigned char *last;
	bool right = false;

	EXPECT(member, lshard_channel_share(end->channel, &plan, LSHARD_OK, shards) == LSHARD_OK, "%s",
	       end->error.text);
	EXPECT(member, shards[0] && shards[1] && !shards[2], "whose shards there are");
	if (member->rank < 2) {
		last = (unsigned char *)shards[member->rank] + bytes[member->rank] - 1;
		EXPECT(member, *last == 0, "it begins with %d", *last);
		*last = (unsigned char)(7 + member->rank);
	}
	EXPECT(member, team_barrier(member), "another rank failed");
	for (int32_t rank = 0; rank < 2; rank++) {
		last = (unsigned char *)shards[rank] + bytes[rank] - 1;
		EXPECT(member, *last == 7 + rank, "rank %d wrote %d", (int)rank, *last);
	}
	right = team_barrier(member);
failed:
	lshard_channel_unshare(end->channel, &plan, shards);
	return right;
}

/* All or none, also of those who had theirs. */
static bool shards_of_one_that_fails_are_none(const struct member *member, struct end *end)
{
	const uint64_t bytes[RANKS] = {5, 5, 5};
	const lshard_store_plan plan = {.name = "bricks", .shard_bytes = 5, .shard_bytes_of = bytes};
	const bool mine = member->rank == 1;
	void *shards[RANKS] = {NULL, NULL, NULL};
	lshard_status status = LSHARD_OK;

	if (mine)
		status = lshard_fail(&end->error, LSHARD_ERR_NO_MEMORY, "no room for mortar");
	status = lshard_channel_share(end->channel, &plan, status, mine ? NULL : shards);
	EXPECT(member,
	       status == LSHARD_ERR_NO_MEMORY && strstr(end->error.text, "rank 1") &&
		       strstr(end->error.text, "no room for mortar"),
	       "%s: %s", lshard_status_name(status), end->error.text);
	EXPECT(member, !shards[0] && !shards[1] && !shards[2], "there are shards");
	return true;
failed:
	return false;
}

/* One rank has failed: all hear its status and text, nobody gets a descriptor, and the next opening is as any. */
static bool a_failure_is_told_to_all(const struct member *member, struct end *end, bool swap)
{
	const bool mine = member->rank == 1;
	int fds[RANKS] = {-7, -7, -7};
	lshard_status status = LSHARD_OK;

	if (mine)
		status = lshard_fail(&end->error, LSHARD_ERR_NO_MEMORY, "no room for 5 bytes");
	status = swap ? lshard_channel_swap(end->channel, "cellar", status, -1, fds)
		      : lshard_channel_agree(end->channel, "cellar", status);
	EXPECT(member, status == LSHARD_ERR_NO_MEMORY, "%s", lshard_status_name(status));
	EXPECT(member, strstr(end->error.text, "rank 1") && strstr(end->error.text, "no room for 5 bytes"), "%s",
	       end->error.text);
	EXPECT(member, fds[0] == -7 && fds[2] == -7, "there are descriptors");
	return true;
failed:
	return false;
}

/* What is opened has a name: two ranks at different things are told so. */
static bool other_names_are_found_out(const struct member *member, struct end *end)
{
	const lshard_status status =
		lshard_channel_agree(end->channel, member->rank == 2 ? "attic" : "cellar", LSHARD_OK);

	EXPECT(member, status == LSHARD_ERR_MISMATCH, "%s", lshard_status_name(status));
	return true;
failed:
	return false;
}

/* Rank 0 is gone: by abort, or by closing its end. */
static bool who_is_gone_is_named(const struct member *member, struct end *end, bool abort)
{
	uint8_t alive[RANKS];
	int32_t all[RANKS];
	lshard_status status;

	if (member->rank == 0 && abort) {
		lshard_channel_abort(end->channel);
		status = lshard_channel_exchange(end->channel, &member->rank, all, sizeof all[0], alive);
		EXPECT(member, status == LSHARD_ERR_ABORTED, "%s", lshard_status_name(status));
	}
	if (member->rank == 0) {
		lshard_channel_close(end->channel);
		end->channel = NULL;
		return true;
	}
	status = lshard_channel_agree(end->channel, "roof", LSHARD_OK);
	EXPECT(member, status == LSHARD_ERR_PEER_FAILED && strstr(end->error.text, "rank 0"), "%s: %s",
	       lshard_status_name(status), end->error.text);
	status = lshard_channel_exchange(end->channel, &member->rank, all, sizeof all[0], alive);
	EXPECT(member, status == LSHARD_OK && !alive[0] && alive[1] && alive[2], "%s: %s", lshard_status_name(status),
	       end->error.text);
	EXPECT(member, all[1] == 1 && all[2] == 2, "it gave %d and %d", (int)all[1], (int)all[2]);
	return true;
failed:
	return false;
}

static int body(const struct member *member)
{
	const bool *abort = member->user;
	struct end end;
	bool right;

	if (!end_open(&end, member))
		return 1;
	right = pipes_lead_to_their_ranks(member, &end) && a_failure_is_told_to_all(member, &end, false) &&
		a_failure_is_told_to_all(member, &end, true) && pipes_lead_to_their_ranks(member, &end) &&
		shards_are_read_by_all(member, &end) && shards_of_one_that_fails_are_none(member, &end) &&
		shards_are_read_by_all(member, &end) && other_names_are_found_out(member, &end) &&
		who_is_gone_is_named(member, &end, *abort);
	lshard_channel_close(end.channel);
	return right ? 0 : 1;
}

static void ranks_open_together_or_not_at_all(void **state)
{
	(void)state;
	for (int abort = 0; abort < 2; abort++) {
		bool by_abort = abort;

		assert_int_equal(team_of_threads(RANKS, body, &by_abort), 0);
	}
	assert_int_equal(contexts_outstanding(), 0);
}

/* A rank whose memory ends while it joins leaves nothing behind; alone, as the others would only wait. */
static void *refuse(const lshard_context *context, size_t bytes)
{
	(void)context;
	(void)bytes;
	return NULL;
}

static void without_memory_there_is_no_channel(void **state)
{
	const struct member alone = {.size = 1};
	lshard_context context = context_for_member(&alone, "", LONG_MS);
	lshard_channel *channel = NULL;
	lshard_error error = {""};

	(void)state;
	context.allocate = refuse;
	assert_int_equal(lshard_channel_open(&context, &error, &channel), LSHARD_ERR_NO_MEMORY);
	assert_non_null(strstr(error.text, "rank 0"));
	assert_null(channel);
	lshard_channel_close(NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(ranks_open_together_or_not_at_all),
		cmocka_unit_test(without_memory_there_is_no_channel),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
