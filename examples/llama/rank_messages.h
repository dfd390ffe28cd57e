/* SPDX-License-Identifier: Apache-2.0
 *
 * rank_messages.h - what a rank tells the process that started it, over a stream socket.
 *
 * A message is a head, the fixed part of its kind, and a tail whose length follows from the head. Both ends are the
 * same program, so the fixed parts travel as they lie in memory. The other way go single bytes: see enum rank_order.
 */
#ifndef RANK_MESSAGES_H
#define RANK_MESSAGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum rank_message_kind {
	RANK_READY = 1,  /* rank_ready; tail: name of the transport in use */
	RANK_PROMPT,     /* rank_prompt: begun; tail: int32_t ids of the prompt */
	RANK_TOKEN,      /* rank_token; tail: its text */
	RANK_PROMPT_END, /* rank_prompt; tail: error, or nothing */
	RANK_VERIFIED,   /* rank_verified; tail: error, or nothing */
	RANK_DONE,       /* no fixed part, no tail: everything asked for is done, the layers are still held */
	RANK_REPORT,     /* rank_report, the answer to RANK_MEASURE; tail: why memory is not known, or nothing */
	RANK_FAILED      /* rank_failed; tail: error. The rank ends */
};

enum rank_order {
	RANK_MEASURE = 'm', /* all ranks are done: measure while all of them hold their layers */
	RANK_END = 'e'      /* all have measured; the end of the stream means the same */
};

struct rank_ready {
	uint32_t layers;
	uint64_t layer_bytes;
};

struct rank_prompt {
	uint32_t index;
};

struct rank_token {
	uint32_t index;
	int32_t token;
};

struct rank_verified {
	uint64_t hash;
	uint32_t corrupt;
};

struct rank_failed {
	uint32_t is_usage; /* 1: the options or the environment are wrong */
};

struct rank_report {
	uint64_t shard_bytes;
	uint64_t window_bytes;
	uint64_t resident_bytes;
	uint64_t numa_copy_bytes;
	uint32_t residents;
	uint32_t has_memory; /* 0: the next four are not known */
	uint64_t private_bytes;
	uint64_t pss_bytes;
	uint64_t shared_hugetlb_bytes;
	uint64_t large_bytes;
	uint64_t read_bytes;
	uint64_t metadata_read_bytes;
	uint64_t wait_ns;
	uint64_t total_ns;
	uint64_t generated_tokens;
};

/** Sends one message whole. False when the other end is gone. */
bool rank_send(int socket, enum rank_message_kind kind, const void *fixed, const void *tail, size_t tail_bytes);

/* Bytes received and not yet taken. */
struct rank_inbox {
	char *bytes;
	size_t used;
	size_t room;
	size_t taken; /* bytes of the message that rank_inbox_next gave out last */
};

struct rank_message {
	enum rank_message_kind kind;
	union {
		struct rank_ready ready;
		struct rank_prompt prompt;
		struct rank_token token;
		struct rank_verified verified;
		struct rank_failed failed;
		struct rank_report report;
	} fixed;
	const char *tail; /* lives until the next call on the inbox */
	size_t tail_bytes;
};

enum rank_inbox_result { RANK_INBOX_EMPTY, RANK_INBOX_MESSAGE, RANK_INBOX_CLOSED, RANK_INBOX_BAD };

/** Takes what has arrived, without blocking. RANK_INBOX_MESSAGE: something did. */
enum rank_inbox_result rank_inbox_receive(struct rank_inbox *inbox, int socket);
/** The next whole message, RANK_INBOX_EMPTY if there is none yet, RANK_INBOX_BAD for what is no message. */
enum rank_inbox_result rank_inbox_next(struct rank_inbox *inbox, struct rank_message *message);
void rank_inbox_free(struct rank_inbox *inbox);

#endif
