/* SPDX-License-Identifier: Apache-2.0
 *
 * fuzz_peer.c - libFuzzer target: bytes become what another process gives a rank, and the rank must neither read beyond
 * it nor keep a descriptor that it did not ask for. Byte 0 (modulo 3) says what:
 *
 *   0  a first message: every further byte is how much of the rest comes at once; who is heard has said a greeting
 *   1  packets of a peer: byte length (modulo 40), byte descriptors (modulo 4), the packet; then a swap
 *   2  a control page for two ranks: all the rest is its beginning; the last byte says what is missing of its form
 */
#include "contexts.h"
#include "control_page.h"
#include "pending_connections.h"
#include "memfd.h"
#include "mesh.h"
#include "sockets.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(int holds)
{
	if (!holds)
		abort();
}

static void pair(int type, int sockets[2])
{
	require(socketpair(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, sockets) == 0);
}

/* ---- First messages ---- */

static void greet(const lshard_context *context, const uint8_t *data, size_t size)
{
	const struct lshard__greeting greeting = lshard__hello_greeting(16);
	struct lshard__pending_connections pending = {.peers = NULL};
	struct lshard__connecting_peer connecting;
	struct pollfd polled[2];
	lshard_error error;
	int sockets[2];

	pair(SOCK_STREAM, sockets);
	require(lshard__pending_open(&pending, context, greeting));
	pending.peers[pending.count++] = (struct lshard__connecting_peer){.fd = sockets[0]};
	for (size_t at = 0; at < size && pending.count == 1;) {
		size_t part = data[at++] % 48;

		part = part < size - at ? part : size - at;
		(void)send(sockets[1], data + at, part, MSG_NOSIGNAL | MSG_DONTWAIT);
		at += part;
		polled[0] = (struct pollfd){.fd = -1};
		polled[1] = (struct pollfd){.fd = sockets[0], .revents = part ? POLLIN : 0};
		(void)lshard__pending_hear(&pending, polled);
		if (!lshard__pending_next(&pending, &connecting))
			continue;
		require(connecting.got >= sizeof greeting && connecting.got <= sizeof connecting.hello);
		if (lshard__greeting_compare(&greeting, &connecting.hello.greeting, "rank 0", "it", &error) ==
		    LSHARD_OK)
			require(connecting.got == sizeof connecting.hello);
		close(connecting.fd);
	}
	lshard__pending_close(&pending);
	close(sockets[1]);
}

/* ---- Packets ---- */

static void send_packet(int socket, const uint8_t *bytes, size_t size, size_t descriptors)
{
	const int fds[3] = {STDERR_FILENO, STDERR_FILENO, STDERR_FILENO};
	_Alignas(struct cmsghdr) char room[CMSG_SPACE(sizeof fds)] = {0};
	struct cmsghdr *header = (struct cmsghdr *)room;
	struct iovec part = {(void *)(uintptr_t)bytes, size};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

	if (descriptors) {
		message.msg_control = room;
		message.msg_controllen = CMSG_SPACE(descriptors * sizeof fds[0]);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(descriptors * sizeof fds[0]);
		memcpy(CMSG_DATA(header), fds, descriptors * sizeof fds[0]);
	}
	(void)sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void swap(const lshard_context *context, const uint8_t *data, size_t size)
{
	lshard_error error = {""};
	struct mesh mesh = {.context = context, .error = &error, .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
	int fds[2] = {-1, -1};
	int sockets[2];

	pair(SOCK_SEQPACKET, sockets);
	mesh.peers = context->allocate(context, 2 * sizeof *mesh.peers);
	mesh.polled = context->allocate(context, 8 * sizeof *mesh.polled);
	require(mesh.peers && mesh.polled && mesh.wake >= 0);
	for (int rank = 0; rank < 2; rank++) {
		mesh.peers[rank] = (struct mesh_peer){.fd = rank ? sockets[0] : -1, .process = -1};
		mesh.peers[rank].inbox[0].fd = mesh.peers[rank].inbox[1].fd = -1;
	}
	while (size >= 2) {
		const size_t length = data[0] % 40 < size - 2 ? data[0] % 40 : size - 2;

		send_packet(sockets[1], data + 2, length, data[1] % 4);
		data += 2 + length;
		size -= 2 + length;
	}
	if (mesh_swap(&mesh, 1, -1, fds, lshard__now_ns()) == LSHARD_OK && fds[1] >= 0)
		close(fds[1]);
	mesh_close(&mesh);
	close(sockets[1]);
}

/* ---- The control page ---- */

static void map(const uint8_t *data, size_t size)
{
	const uint8_t form = size ? data[size - 1] : 0;
	const int seals = (form & 1 ? 0 : F_SEAL_SHRINK) | (form & 2 ? 0 : F_SEAL_GROW) | (form & 4 ? 0 : F_SEAL_SEAL);
	const size_t bytes = form & 8 ? size : control_page_bytes(2);
	const int fd = lshard__memfd_create("layershard:fuzz");
	const size_t head = size < bytes ? size : bytes;
	lshard_error error;

	require(fd >= 0 && pwrite(fd, data, head, 0) == (ssize_t)head && ftruncate(fd, (off_t)bytes) == 0 &&
		fcntl(fd, F_ADD_SEALS, seals) == 0);
	if (control_page_check(fd, 2, &error) == LSHARD_OK)
		require((form & 7) == 0 && bytes == control_page_bytes(2) && size >= sizeof(struct lshard__greeting));
	close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const struct member member = {.rank = 0, .size = 2};
	const lshard_context context = context_for_member(&member, "", 0);
	const int before = dup(STDERR_FILENO);
	int after;

	require(before >= 0 && close(before) == 0);
	if (size > 0 && data[0] % 3 == 0)
		greet(&context, data + 1, size - 1);
	else if (size > 0 && data[0] % 3 == 1)
		swap(&context, data + 1, size - 1);
	else if (size > 0)
		map(data + 1, size - 1);
	after = dup(STDERR_FILENO);
	require(after == before && close(after) == 0); /* the lowest that is free, as before */
	require(contexts_outstanding() == 0);
	return 0;
}
