/* SPDX-License-Identifier: Apache-2.0
 *
 * wrapped_ranks.c - see wrapped_ranks.h.
 */
#include "wrapped_ranks.h"
#include "patience.h"
#include "transports.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

struct setting small_setting(void)
{
	struct setting setting = {.prefetch = 1, .layers = 7, .first_layer = 3};

	setting_tensors(&setting, 2, LSHARD_STRIPE_BYTES);
	return setting;
}

lshard_status create_alone(const char *spec, char *error, size_t bytes, lshard_log_function log, void *log_user,
			   lshard_group **group)
{
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;

	options.rank = 0;
	options.size = 1;
	options.transport = spec;
	options.log = log;
	options.log_user = log_user;
	options.error = error;
	options.error_bytes = bytes;
	return lshard_group_create(&options, group);
}

void assert_refused(const char *spec, lshard_status status, const char *word)
{
	lshard_group *group = NULL;
	char error[512] = "";
	lshard_status got = create_alone(spec, error, sizeof error, NULL, NULL, &group);

	if (got != status || !strstr(error, word))
		fail_msg("'%s': %s, not %s: %s (should say '%s')", spec, lshard_status_name(got),
			 lshard_status_name(status), error, word);
	assert_null(group);
}

bool narrow_open(struct narrow *narrow, const struct member *member, const char *local,
		 const lshard_transport_ops *wrapper, const char *options)
{
	lshard_transport *inner = NULL;
	lshard_error error = {""};

	*narrow = (struct narrow){.piece = {.width = 300, .rows = 1}, .first_piece = {0, 1}, .shard_bytes = {300, 0}};
	narrow->plan = (lshard_store_plan){.name = "narrow",
					   .layers = 1,
					   .layer_bytes = 300,
					   .shard_bytes = narrow->shard_bytes[member->rank],
					   .shard_bytes_of = narrow->shard_bytes,
					   .buffers = 1,
					   .windows = 1,
					   .pieces = &narrow->piece,
					   .first_piece = narrow->first_piece};
	narrow->contexts[0] = context_for_member(member, local, LONG_MS);
	narrow->contexts[1] = context_for_member(member, options, LONG_MS);
	EXPECT(member, lshard__local.open(&narrow->contexts[0], NULL, &inner, &error) == LSHARD_OK, "%s", error.text);
	EXPECT(member, wrapper->open(&narrow->contexts[1], inner, &narrow->transport, &error) == LSHARD_OK, "%s",
	       error.text);
	EXPECT(member,
	       narrow->transport->ops->store_open(narrow->transport, &narrow->plan, &narrow->store) == LSHARD_OK, "%s",
	       narrow->transport->error.text);
	return true;
failed:
	return false;
}

void narrow_close(struct narrow *narrow)
{
	if (narrow->store)
		narrow->transport->ops->store_close(narrow->store);
	if (narrow->transport)
		narrow->transport->ops->close(narrow->transport);
}
