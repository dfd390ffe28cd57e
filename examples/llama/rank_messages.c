/* SPDX-License-Identifier: Apache-2.0
 *
 * rank_messages.c - see rank_messages.h.
 */
#include "rank_messages.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define TAIL_MOST (16u << 20) /* more is no message of ours: a prompt of four million tokens */

struct head {
	uint32_t kind;
	uint32_t tail_bytes;
};

/* Bytes of the fixed part of each kind; -1: no such kind. */
static int fixed_bytes(uint32_t kind)
{
	switch (kind) {
	case RANK_READY:
		return (int)sizeof(struct rank_ready);
	case RANK_PROMPT:
	case RANK_PROMPT_END:
		return (int)sizeof(struct rank_prompt);
	case RANK_TOKEN:
		return (int)sizeof(struct rank_token);
	case RANK_VERIFIED:
		return (int)sizeof(struct rank_verified);
	case RANK_REPORT:
		return (int)sizeof(struct rank_report);
	case RANK_FAILED:
		return (int)sizeof(struct rank_failed);
	case RANK_DONE:
		return 0;
	default:
		return -1;
	}
}

static bool send_bytes(int socket, const char *bytes, size_t count)
{
	while (count > 0) {
		const ssize_t sent = send(socket, bytes, count, MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent <= 0)
			return false;
		bytes += sent;
		count -= (size_t)sent;
	}
	return true;
}

bool rank_send(int socket, enum rank_message_kind kind, const void *fixed, const void *tail, size_t tail_bytes)
{
	const struct head head = {kind, (uint32_t)tail_bytes};
	const size_t middle = (size_t)fixed_bytes(kind);
	char start[sizeof head + sizeof(struct rank_report)];

	if (tail_bytes > TAIL_MOST || middle > sizeof(struct rank_report)) /* no such kind */
		return false;
	memcpy(start, &head, sizeof head);
	if (middle > 0)
		memcpy(start + sizeof head, fixed, middle);
	return send_bytes(socket, start, sizeof head + middle) && send_bytes(socket, tail, tail_bytes);
}

/* ---- Receiving --------------------------------------------------------------------------------------------------- */

static bool make_room(struct rank_inbox *inbox)
{
	const size_t room = inbox->room ? 2 * inbox->room : 8192;
	char *bytes;

	if (inbox->used < inbox->room)
		return true;
	bytes = realloc(inbox->bytes, room);
	if (!bytes)
		return false;
	inbox->bytes = bytes;
	inbox->room = room;
	return true;
}

static void drop_taken(struct rank_inbox *inbox)
{
	if (inbox->taken > 0)
		memmove(inbox->bytes, inbox->bytes + inbox->taken, inbox->used - inbox->taken);
	inbox->used -= inbox->taken;
	inbox->taken = 0;
}

enum rank_inbox_result rank_inbox_receive(struct rank_inbox *inbox, int socket)
{
	ssize_t received;

	drop_taken(inbox);
	if (!make_room(inbox))
		return RANK_INBOX_BAD;
	received = recv(socket, inbox->bytes + inbox->used, inbox->room - inbox->used, MSG_DONTWAIT);
	if (received < 0)
		return errno == EAGAIN || errno == EINTR ? RANK_INBOX_EMPTY : RANK_INBOX_CLOSED;
	if (received == 0)
		return RANK_INBOX_CLOSED;
	inbox->used += (size_t)received;
	return RANK_INBOX_MESSAGE;
}

enum rank_inbox_result rank_inbox_next(struct rank_inbox *inbox, struct rank_message *message)
{
	struct head head;
	size_t middle;

	drop_taken(inbox);
	if (inbox->used < sizeof head)
		return RANK_INBOX_EMPTY;
	memcpy(&head, inbox->bytes, sizeof head);
	if (fixed_bytes(head.kind) < 0 || head.tail_bytes > TAIL_MOST)
		return RANK_INBOX_BAD;
	middle = (size_t)fixed_bytes(head.kind);
	if (inbox->used < sizeof head + middle + head.tail_bytes)
		return RANK_INBOX_EMPTY;
	message->kind = (enum rank_message_kind)head.kind;
	memcpy(&message->fixed, inbox->bytes + sizeof head, middle);
	message->tail = inbox->bytes + sizeof head + middle;
	message->tail_bytes = head.tail_bytes;
	inbox->taken = sizeof head + middle + head.tail_bytes;
	return RANK_INBOX_MESSAGE;
}

void rank_inbox_free(struct rank_inbox *inbox)
{
	free(inbox->bytes);
	*inbox = (struct rank_inbox){NULL, 0, 0, 0};
}
