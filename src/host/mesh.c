/* SPDX-License-Identifier: Apache-2.0
 *
 * mesh.c - see mesh.h. A packet is one byte (a nudge) or a struct packet with at most one descriptor.
 */
#include "mesh.h"
#include "greeting.h"
#include "hello.h"
#include "limit_reason.h"
#include "pending_connections.h"
#include "sockets.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#define RECORD_MAGIC 0x6c736d63u

/* What every rank tells all others through the bootstrap. */
struct record {
	struct lshard__greeting greeting;
	int32_t failed; /* status, if it cannot connect */
	int32_t pid;
	uint64_t token; /* whoever knows it belongs to the group */
	char name[64];
	char why[200]; /* it failed */
};

struct packet {
	uint64_t tag;
	uint64_t has_fd;
};

static struct lshard__greeting greeting(void)
{
	return lshard__hello_greeting(sizeof(struct packet));
}

/* ---- connecting ---- */

static void refuse(struct record *record, lshard_status status, const char *what, const char *why)
{
	if (record->failed)
		return; /* the first cause counts */
	record->failed = status;
	snprintf(record->why, sizeof record->why, "%s%.*s", what, 160, why);
}

/*
 * Will there be a socket and a process for every other rank, and the control page? Found out before the records are
 * exchanged, by opening as many, so that a rank that is short of descriptors can say so to all.
 */
static void try_descriptors(struct mesh *mesh, struct record *record)
{
	const int wanted = 2 * (mesh->context->size - 1) + 1;
	int opened = 0;

	while (opened < wanted && (mesh->polled[opened].fd = fcntl(mesh->wake, F_DUPFD_CLOEXEC, 0)) >= 0)
		opened++;
	if (opened < wanted)
		refuse(record, LSHARD_ERR_SYSTEM, "", lshard__reason(errno, 0).text);
	while (opened > 0)
		close(mesh->polled[--opened].fd);
}

static int listen_somewhere(struct mesh *mesh, struct record *record)
{
	uint64_t random[2] = {0, 0};
	int listener;

	if (getrandom(random, sizeof random, 0) != sizeof random)
		refuse(record, LSHARD_ERR_SYSTEM, "getrandom: ", strerror(errno));
	record->token = random[1];
	snprintf(record->name, sizeof record->name, "layershard/%lu/%d/%016llx", (unsigned long)geteuid(),
		 (int)getpid(), (unsigned long long)random[0]);
	listener = lshard__socket_listen(record->name, SOCK_SEQPACKET);
	if (listener < 0)
		refuse(record, LSHARD_ERR_SYSTEM, "listening: ", lshard__reason(errno, 0).text);
	else
		try_descriptors(mesh, record);
	return listener;
}

/* Every rank listens before the records are exchanged: one that refuses is gone. */
static lshard_status reach_peer(struct mesh *mesh, int32_t rank, const struct record *record, uint64_t deadline)
{
	lshard_status status;

	for (;;) {
		status = lshard__socket_connect(record->name, SOCK_SEQPACKET, lshard__now_ns(), &mesh->peers[rank].fd);
		if (status != LSHARD_ERR_TIMEOUT || errno == ECONNREFUSED || !lshard__left_ms(deadline))
			break;
		poll(NULL, 0, 1);
	}
	if (status == LSHARD_OK)
		return LSHARD_OK;
	if (errno == ECONNREFUSED)
		return lshard_fail(mesh->error, LSHARD_ERR_PEER_FAILED, "rank %d (process %d) is gone", (int)rank,
				   (int)record->pid);
	return lshard_fail(mesh->error, status, "connecting to rank %d (process %d): %s", (int)rank, (int)record->pid,
			   lshard__reason(errno, 0).text);
}

/* One user is not proof enough (user.h): whoever answers must know this rank's token as well, see await_answer. */
static lshard_status check_user(struct mesh *mesh, int32_t rank)
{
	pid_t pid;
	uid_t uid;

	if (lshard__socket_peer(mesh->peers[rank].fd, &pid, &uid))
		return lshard_fail(mesh->error, LSHARD_ERR_SYSTEM, "rank %d: its user cannot be found out: %s",
				   (int)rank, strerror(errno));
	if (uid != geteuid())
		return lshard_fail(mesh->error, LSHARD_ERR_SYSTEM, "rank %d (process %d) belongs to user %lu, not %lu",
				   (int)rank, (int)pid, (unsigned long)uid, (unsigned long)geteuid());
	return LSHARD_OK;
}

/* Says whose token is meant, so that only who was given the records can say it. */
static struct lshard__hello hello_to(const struct mesh *mesh, const struct record *record)
{
	return (struct lshard__hello){greeting(), record->token, mesh->context->rank, mesh->context->size};
}

static lshard_status connect_lower(struct mesh *mesh, const struct record *records, uint64_t deadline)
{
	for (int32_t rank = 0; rank < mesh->context->rank; rank++) {
		struct lshard__hello hello = hello_to(mesh, &records[rank]);
		lshard_status status = reach_peer(mesh, rank, &records[rank], deadline);

		if (status == LSHARD_OK)
			status = check_user(mesh, rank);
		if (status != LSHARD_OK)
			return status;
		status = lshard__socket_send(mesh->peers[rank].fd, &hello, sizeof hello, deadline);
		if (status != LSHARD_OK)
			return lshard_fail(mesh->error, status, "rank %d (process %d) does not listen", (int)rank,
					   (int)records[rank].pid);
	}
	return LSHARD_OK;
}

/* Which rank it is; -1 for a stranger. */
static int32_t identify(const struct mesh *mesh, struct lshard__pending_connections *pending,
			const struct lshard__connecting_peer *connecting, const struct record *records)
{
	const lshard_context *context = mesh->context;
	const struct lshard__hello *hello = &connecting->hello;

	if (connecting->got == sizeof *hello && hello->token == records[context->rank].token &&
	    hello->rank > context->rank && hello->rank < context->size && mesh->peers[hello->rank].fd < 0)
		return hello->rank;
	if (lshard__pending_first_stranger(pending))
		context->log(
			context, LSHARD_LOG_WARN,
			"rank %d: process %d has connected, does not speak as a rank of the group, and is sent away",
			(int)context->rank, (int)connecting->pid);
	return -1;
}

static lshard_status no_answer(struct mesh *mesh, int32_t rank, const struct record *record, lshard_status status)
{
	const lshard_context *context = mesh->context;

	if (status == LSHARD_ERR_TIMEOUT && !mesh->peers[rank].gone)
		return lshard_fail(mesh->error, status, "rank %d waited %u ms for rank %d (process %d) to answer",
				   (int)context->rank, (unsigned)context->timeout_ms, (int)rank, (int)record->pid);
	return lshard_fail(mesh->error, LSHARD_ERR_PEER_FAILED, "rank %d (process %d) is gone", (int)rank,
			   (int)record->pid);
}

/* The answer of a lower rank to this one's hello is the first packet that comes from it. */
static lshard_status await_answer(struct mesh *mesh, int32_t rank, const struct record *records, uint64_t deadline)
{
	const struct mesh_peer *peer = &mesh->peers[rank];
	struct lshard__attached attached = {-1, 0};
	struct lshard__hello hello;
	lshard_status status =
		lshard__socket_wait(peer->fd, peer->process, POLLIN, peer->gone ? lshard__now_ns() : deadline);
	ssize_t got;

	if (status != LSHARD_OK)
		return no_answer(mesh, rank, &records[rank], status);
	got = lshard__socket_take(peer->fd, &hello, sizeof hello, &attached);
	if (attached.descriptor >= 0)
		close(attached.descriptor);
	if (got <= 0)
		return no_answer(mesh, rank, &records[rank], LSHARD_ERR_PEER_FAILED);
	if (got == (ssize_t)sizeof hello && hello.token == records[mesh->context->rank].token && hello.rank == rank)
		return LSHARD_OK;
	return lshard_fail(mesh->error, LSHARD_ERR_SYSTEM,
			   "what listens where rank %d (process %d) should does not know the group's secret: it is a "
			   "stranger",
			   (int)rank, (int)records[rank].pid);
}

static lshard_status await_answers(struct mesh *mesh, const struct record *records, uint64_t deadline)
{
	lshard_status status = LSHARD_OK;

	for (int32_t rank = 0; rank < mesh->context->rank && status == LSHARD_OK; rank++)
		status = await_answer(mesh, rank, records, deadline);
	return status;
}

static lshard_status late(struct mesh *mesh, const struct record *records)
{
	for (int32_t rank = mesh->context->rank + 1; rank < mesh->context->size; rank++)
		if (mesh->peers[rank].fd < 0)
			return lshard_fail(mesh->error, LSHARD_ERR_TIMEOUT,
					   "rank %d waited %u ms for rank %d (process %d) to connect",
					   (int)mesh->context->rank, (unsigned)mesh->context->timeout_ms, (int)rank,
					   (int)records[rank].pid);
	return LSHARD_OK;
}

/* Take in the pending connections that have said who they are, and answer them. Returns how many ranks came. */
static int32_t take_in(struct mesh *mesh, struct lshard__pending_connections *pending, const struct record *records)
{
	struct lshard__connecting_peer connecting;
	struct lshard__hello answer;
	int32_t came = 0;

	while (lshard__pending_next(pending, &connecting)) {
		int32_t rank = identify(mesh, pending, &connecting, records);

		if (rank < 0) {
			close(connecting.fd);
			continue;
		}
		answer = hello_to(mesh, &records[rank]);
		/* A new connection has room for it; a rank that has died meanwhile is seen to be gone later. */
		(void)lshard__socket_send(connecting.fd, &answer, sizeof answer, lshard__now_ns());
		mesh->peers[rank].fd = connecting.fd;
		came++;
	}
	return came;
}

static lshard_status accept_higher(struct mesh *mesh, int listener, struct lshard__pending_connections *pending,
				   const struct record *records, uint64_t deadline)
{
	int32_t wanted = mesh->context->size - 1 - mesh->context->rank;

	while (wanted > 0) {
		size_t count = lshard__pending_poll(pending, listener, mesh->polled);
		int ready = poll(mesh->polled, count, lshard__left_ms(deadline));

		if (ready == 0)
			return late(mesh, records);
		if (ready < 0 && errno == EINTR)
			continue;
		if (ready < 0 || lshard__pending_hear(pending, mesh->polled) < 0)
			return lshard_fail(mesh->error, LSHARD_ERR_SYSTEM, "waiting for ranks: %s",
					   lshard__reason(errno, 0).text);
		wanted -= take_in(mesh, pending, records);
	}
	return LSHARD_OK;
}

/* Of one build, and with names that end. */
static lshard_status check_records(struct mesh *mesh, struct record *records)
{
	const int32_t mine = mesh->context->rank;
	char texts[2][32];

	snprintf(texts[0], sizeof texts[0], "rank %d", (int)mine);
	for (int32_t rank = 0; rank < mesh->context->size; rank++) {
		lshard_status status;

		snprintf(texts[1], sizeof texts[1], "rank %d", (int)rank);
		status = lshard__greeting_compare(&records[mine].greeting, &records[rank].greeting, texts[0], texts[1],
						  mesh->error);
		if (status != LSHARD_OK)
			return status;
		records[rank].name[sizeof records[rank].name - 1] = 0;
	}
	return LSHARD_OK;
}

/* Also called where this rank cannot connect: the others learn it by the record instead of waiting for it. */
static lshard_status exchange_records(struct mesh *mesh, const struct record *mine, struct record *records)
{
	const lshard_bootstrap *bootstrap = mesh->context->bootstrap;
	int failed = bootstrap->allgather(bootstrap->user, mine, records, sizeof *mine);
	lshard_status status;

	if (failed)
		return lshard_fail(mesh->error, LSHARD_ERR_TRANSPORT,
				   "the bootstrap's all-gather of addresses returned %d", failed);
	status = check_records(mesh, records);
	if (status != LSHARD_OK)
		return status;
	for (int32_t rank = 0; rank < mesh->context->size; rank++) {
		if (records[rank].failed)
			return lshard_fail(mesh->error, (lshard_status)records[rank].failed,
					   "rank %d (process %d) cannot connect to the others: %.*s", (int)rank,
					   (int)records[rank].pid, (int)sizeof records[rank].why, records[rank].why);
	}
	for (int32_t rank = 0; rank < mesh->context->size; rank++)
		mesh->peers[rank].pid = records[rank].pid; /* all could connect, so this one has its tables */
	return LSHARD_OK;
}

/* A child that a rank forks has its sockets too: the rank's end is seen by its process, where the kernel shows it. */
static lshard_status watch_processes(struct mesh *mesh)
{
	for (int32_t rank = 0; rank < mesh->context->size; rank++) {
		struct mesh_peer *peer = &mesh->peers[rank];

		if (peer->fd < 0)
			continue;
		peer->process = lshard__socket_peer_process(peer->fd);
		if (peer->process < 0 && (errno == EMFILE || errno == ENFILE))
			return lshard_fail(mesh->error, LSHARD_ERR_SYSTEM, "watching rank %d (process %d): %s",
					   (int)rank, (int)peer->pid, lshard__reason(errno, 0).text);
		peer->gone |= peer->process < 0 && errno == ESRCH;
	}
	return LSHARD_OK;
}

static lshard_status connect_all(struct mesh *mesh, struct lshard__pending_connections *pending, struct record *mine,
				 struct record *records, uint64_t deadline)
{
	int listener = mine->failed ? -1 : listen_somewhere(mesh, mine);
	lshard_status status = exchange_records(mesh, mine, records);

	if (status == LSHARD_OK)
		status = connect_lower(mesh, records, deadline);
	if (status == LSHARD_OK)
		status = accept_higher(mesh, listener, pending, records, deadline);
	if (status == LSHARD_OK)
		status = watch_processes(mesh);
	if (status == LSHARD_OK)
		status = await_answers(mesh, records, deadline);
	if (listener >= 0)
		close(listener);
	return status;
}

/* False: there is not all of it; mesh_close frees what there is. */
static bool make_tables(struct mesh *mesh, const lshard_context *context, lshard_error *error)
{
	const size_t size = (size_t)context->size;

	memset(mesh, 0, sizeof *mesh);
	mesh->context = context;
	mesh->error = error;
	mesh->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	mesh->peers = context->allocate(context, size * sizeof *mesh->peers);
	/* More than pending_connections.h needs, and more than the [2 * size + 1] that are needed later. */
	mesh->polled = context->allocate(context, (lshard__pending_polls(context->size) + size) * sizeof *mesh->polled);
	for (size_t i = 0; mesh->peers && i < size; i++) {
		mesh->peers[i].fd = mesh->peers[i].inbox[0].fd = mesh->peers[i].inbox[1].fd = -1;
		mesh->peers[i].process = -1;
	}
	return mesh->peers && mesh->polled && (!context->rejoin || arrivals_open(&mesh->arrivals, context));
}

lshard_status mesh_open(struct mesh *mesh, const lshard_context *context, lshard_error *error, uint64_t deadline_ns)
{
	struct record *records = context->allocate(context, (size_t)context->size * sizeof *records);
	struct record mine = {.greeting = lshard__greeting_make(RECORD_MAGIC, sizeof mine, sizeof(struct packet)),
			      .pid = (int32_t)getpid()};
	struct lshard__pending_connections pending = {.peers = NULL};
	const bool made = make_tables(mesh, context, error);
	lshard_status status;

	if (mesh->wake < 0)
		refuse(&mine, LSHARD_ERR_SYSTEM, "eventfd: ", lshard__reason(errno, 0).text);
	if (!lshard__pending_open(&pending, context, greeting()) || !made)
		refuse(&mine, LSHARD_ERR_NO_MEMORY, "", "no memory to connect the ranks");
	if (records)
		status = connect_all(mesh, &pending, &mine, records, deadline_ns);
	else /* it cannot even hear the others, who are told by its opening's end */
		status = lshard_fail(error, LSHARD_ERR_NO_MEMORY, "no memory to connect %d ranks", (int)context->size);
	lshard__pending_close(&pending);
	if (records)
		context->release(context, records);
	if (status != LSHARD_OK)
		mesh_close(mesh);
	return status;
}

lshard_status mesh_open_alone(struct mesh *mesh, const lshard_context *context, lshard_error *error)
{
	const bool made = make_tables(mesh, context, error);

	if (made && mesh->wake >= 0) {
		for (int32_t rank = 0; rank < context->size; rank++)
			mesh->peers[rank].gone = rank != context->rank;
		return LSHARD_OK;
	}
	if (made)
		(void)lshard_fail(error, LSHARD_ERR_SYSTEM, "eventfd: %s", lshard__reason(errno, 0).text);
	else
		(void)lshard_fail(error, LSHARD_ERR_NO_MEMORY, "no memory to connect %d ranks", (int)context->size);
	mesh_close(mesh);
	return made ? LSHARD_ERR_SYSTEM : LSHARD_ERR_NO_MEMORY;
}

static void drop_packet(struct mesh_packet *packet)
{
	if (packet->fd >= 0)
		close(packet->fd);
	*packet = (struct mesh_packet){.fd = -1};
}

static void close_peer(struct mesh_peer *peer)
{
	drop_packet(&peer->inbox[0]);
	drop_packet(&peer->inbox[1]);
	if (peer->fd >= 0)
		close(peer->fd);
	if (peer->process >= 0)
		close(peer->process);
	peer->fd = peer->process = -1;
}

/* Shut down first: a child that the program forked may hold a copy of the descriptor. But not by that child. */
void mesh_close(struct mesh *mesh)
{
	const lshard_context *context = mesh->context;

	for (int32_t rank = 0; mesh->peers && rank < context->size; rank++) {
		if (mesh->peers[rank].fd >= 0 && !context->forked(context))
			shutdown(mesh->peers[rank].fd, SHUT_RDWR);
		close_peer(&mesh->peers[rank]);
	}
	arrivals_close(&mesh->arrivals, context);
	if (mesh->polled)
		context->release(context, mesh->polled);
	if (mesh->peers)
		context->release(context, mesh->peers);
	if (mesh->wake >= 0)
		close(mesh->wake);
	mesh->polled = NULL;
	mesh->peers = NULL;
	mesh->wake = -1;
}

static void wake(struct mesh *mesh)
{
	const uint64_t one = 1;
	const ssize_t written = write(mesh->wake, &one, sizeof one);

	(void)written; /* it fails only where it is set already */
}

void mesh_abort(struct mesh *mesh)
{
	atomic_store(&mesh->aborted, 1);
	wake(mesh);
	arrivals_lock(&mesh->arrivals);
	for (int32_t rank = 0; rank < mesh->context->size; rank++)
		if (mesh->peers[rank].fd >= 0)
			shutdown(mesh->peers[rank].fd, SHUT_RDWR);
	arrivals_unlock(&mesh->arrivals);
}

/* ---- ranks that come back ---- */

void mesh_admit(struct mesh *mesh, int32_t rank, struct arrival arrival)
{
	arrivals_put(&mesh->arrivals, rank, arrival);
	wake(mesh);
}

void mesh_take_in(struct mesh *mesh)
{
	struct arrival arrival;

	arrivals_lock(&mesh->arrivals);
	for (int32_t rank = 0; rank < mesh->context->size; rank++) {
		struct mesh_peer *peer = &mesh->peers[rank];

		if (!arrivals_take(&mesh->arrivals, rank, &arrival))
			continue;
		close_peer(peer);
		*peer = (struct mesh_peer){.fd = arrival.fd,
					   .process = arrival.process,
					   .pid = arrival.pid,
					   .incarnation = arrival.incarnation,
					   .inbox = {{.fd = -1}, {.fd = -1}}};
	}
	arrivals_unlock(&mesh->arrivals);
}

/* ---- talking ---- */

void mesh_nudge(struct mesh *mesh)
{
	char nudge = 0;

	mesh_take_in(mesh); /* who has come in the meantime may wait as well */
	for (int32_t rank = 0; rank < mesh->context->size; rank++) {
		struct mesh_peer *peer = &mesh->peers[rank];

		if (peer->fd >= 0 && !peer->gone)
			(void)send(peer->fd, &nudge, sizeof nudge, MSG_DONTWAIT | MSG_NOSIGNAL);
	}
}

/*
 * Put a packet into the peer's inbox. A peer that has all packets of a round may be in the next one before this rank
 * has looked; what lies in the packet's own place belongs to a round its sender has given up. One of a round that is
 * over here is closed at once, as whatever its descriptor holds would live as long.
 */
static void deliver(const struct mesh *mesh, struct mesh_peer *peer, const struct packet *packet,
		    const struct lshard__attached *attached)
{
	struct mesh_packet *place = &peer->inbox[packet->tag & 1];
	struct mesh_packet came = {1, attached->descriptor, attached->lost, packet->tag};

	if (packet->tag < mesh->awaited) {
		drop_packet(&came);
		return;
	}
	drop_packet(place);
	*place = came;
}

static void drop_rounds_over(struct mesh *mesh)
{
	for (int32_t rank = 0; rank < mesh->context->size; rank++)
		for (int parity = 0; parity < 2; parity++)
			if (mesh->peers[rank].inbox[parity].tag < mesh->awaited)
				drop_packet(&mesh->peers[rank].inbox[parity]);
}

/* Take one packet. Returns 0 when there is none for now. A descriptor that its packet does not speak of is closed. */
static int take_packet(const struct mesh *mesh, struct mesh_peer *peer)
{
	struct packet packet = {0, 0};
	struct lshard__attached attached;
	ssize_t got = lshard__socket_take(peer->fd, &packet, sizeof packet, &attached);

	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	if (got <= 0) {
		peer->gone = 1;
		return 0;
	}
	if (attached.descriptor >= 0 && (got != (ssize_t)sizeof packet || !packet.has_fd)) {
		close(attached.descriptor);
		attached.descriptor = -1;
	}
	if (got == (ssize_t)sizeof packet)
		deliver(mesh, peer, &packet, &attached);
	return 1;
}

static int is_heard(const struct mesh_peer *peer)
{
	return peer->fd >= 0 && !peer->gone;
}

/* Only what is open: the kernel polls no more descriptors than a process may have. */
static nfds_t fill_polled(const struct mesh *mesh)
{
	nfds_t count = 0;

	mesh->polled[count++] = (struct pollfd){.fd = mesh->wake, .events = POLLIN};
	for (int32_t rank = 0; rank < mesh->context->size; rank++) {
		const struct mesh_peer *peer = &mesh->peers[rank];

		if (!is_heard(peer))
			continue;
		mesh->polled[count++] =
			(struct pollfd){.fd = peer->fd, .events = peer->owed ? POLLIN | POLLOUT : POLLIN};
		if (peer->process >= 0)
			mesh->polled[count++] = (struct pollfd){.fd = peer->process, .events = POLLIN};
	}
	return count;
}

/* Why it was woken stands elsewhere: aborted, arrivals. */
static void clear_wake(struct mesh *mesh)
{
	uint64_t times;
	const ssize_t taken = read(mesh->wake, &times, sizeof times);

	(void)taken;
}

static lshard_status poll_peers(struct mesh *mesh, uint64_t deadline)
{
	int ready = 0;

	if (!atomic_load(&mesh->aborted))
		ready = poll(mesh->polled, fill_polled(mesh), lshard__left_ms(deadline));
	if (ready > 0 && mesh->polled[0].revents)
		clear_wake(mesh);
	if (atomic_load(&mesh->aborted))
		return lshard_fail(mesh->error, LSHARD_ERR_ABORTED, "rank %d was aborted", (int)mesh->context->rank);
	if (ready < 0 && errno != EINTR)
		return lshard_fail(mesh->error, LSHARD_ERR_SYSTEM, "poll: %s", strerror(errno));
	return ready ? LSHARD_OK : LSHARD_ERR_TIMEOUT;
}

/* What a process sent before it ended is there: only then is it gone. */
static void hear_peer(const struct mesh *mesh, struct mesh_peer *peer, int spoke, int ended)
{
	while ((spoke || ended) && take_packet(mesh, peer))
		;
	peer->gone |= ended;
}

int mesh_process_ended(const struct mesh *mesh, int32_t rank)
{
	struct pollfd polled = {.fd = mesh->peers[rank].process, .events = POLLIN};

	return poll(&polled, 1, 0) == 1;
}

lshard_status mesh_wait(struct mesh *mesh, uint64_t deadline_ns)
{
	const struct pollfd *next = mesh->polled + 1; /* as they are filled in */
	lshard_status status;

	mesh_take_in(mesh);
	status = poll_peers(mesh, deadline_ns);
	for (int32_t rank = 0; rank < mesh->context->size && status == LSHARD_OK; rank++) {
		struct mesh_peer *peer = &mesh->peers[rank];
		int spoke;

		if (!is_heard(peer))
			continue;
		spoke = next++->revents != 0;
		hear_peer(mesh, peer, spoke, peer->process >= 0 && next++->revents != 0);
	}
	return status;
}

/* ---- descriptors ---- */

/* Try to send; a full queue is no failure: mesh_wait says when there is room. */
static void pay(struct mesh_peer *peer, uint64_t tag, int fd)
{
	const struct packet packet = {tag, fd >= 0};

	if (lshard__socket_give(peer->fd, &packet, sizeof packet, fd))
		peer->owed = 0;
	else if (errno == EPIPE || errno == ECONNRESET)
		peer->gone = 1;
}

static int has_answered(const struct mesh_peer *peer, uint64_t tag)
{
	return peer->inbox[tag & 1].here && peer->inbox[tag & 1].tag == tag;
}

/* 1: every peer has answered and has been paid. -1: one is gone that has not answered. */
static int settled(struct mesh *mesh, uint64_t tag, int32_t *who)
{
	int all = 1;

	for (int32_t rank = 0; rank < mesh->context->size; rank++) {
		const struct mesh_peer *peer = &mesh->peers[rank];

		if (peer->fd < 0 || peer->left_out || (has_answered(peer, tag) && (peer->gone || !peer->owed)))
			continue;
		*who = rank;
		if (peer->gone)
			return -1;
		all = 0;
	}
	return all;
}

static lshard_status settle(struct mesh *mesh, uint64_t tag, int fd, uint64_t deadline)
{
	for (;;) {
		lshard_status status;
		int32_t who = 0;
		int done;

		for (int32_t rank = 0; rank < mesh->context->size; rank++)
			if (mesh->peers[rank].owed && !mesh->peers[rank].gone)
				pay(&mesh->peers[rank], tag, fd);
		done = settled(mesh, tag, &who);
		if (done > 0)
			return LSHARD_OK;
		if (done < 0)
			return lshard_fail(mesh->error, LSHARD_ERR_PEER_FAILED, "rank %d (process %d) is gone",
					   (int)who, (int)mesh->peers[who].pid);
		status = mesh_wait(mesh, deadline);
		if (status == LSHARD_ERR_TIMEOUT)
			return lshard_fail(mesh->error, status, "rank %d waited %u ms for rank %d (process %d)",
					   (int)mesh->context->rank, (unsigned)mesh->context->timeout_ms, (int)who,
					   (int)mesh->peers[who].pid);
		if (status != LSHARD_OK)
			return status;
	}
}

/* Where this process may open no more, or may not have what is shared, the kernel delivers the packet without it. */
static lshard_status no_descriptor(struct mesh *mesh, int32_t from, int cause)
{
	if (cause == EACCES)
		return lshard_fail(mesh->error, LSHARD_ERR_SYSTEM,
				   "the system withheld the descriptor that rank %d shares, and no limit is reached: a "
				   "security module (SELinux, AppArmor) may not allow it; its log tells",
				   (int)from);
	return lshard_fail(mesh->error, LSHARD_ERR_SYSTEM, "no room for the descriptor that rank %d shares: %s",
			   (int)from, lshard__reason(cause, 0).text);
}

/* Empty the inboxes, to which every peer has sent its packet of this round; those of the next round stay. */
static lshard_status collect(struct mesh *mesh, uint64_t tag, int *fds)
{
	int32_t size = mesh->context->size;
	lshard_status status = LSHARD_OK;

	for (int32_t rank = 0; rank < size; rank++) {
		struct mesh_packet *inbox = mesh->peers[rank].inbox;

		if (inbox[tag & 1].lost && status == LSHARD_OK)
			status = no_descriptor(mesh, rank, inbox[tag & 1].lost);
		fds[rank] = inbox[tag & 1].fd;
		inbox[tag & 1] = (struct mesh_packet){.fd = -1};
	}
	for (int32_t rank = 0; rank < size && status != LSHARD_OK; rank++) {
		if (fds[rank] >= 0)
			close(fds[rank]);
		fds[rank] = -1;
	}
	return status;
}

lshard_status mesh_swap_among(struct mesh *mesh, const uint8_t *alive, uint64_t tag, int fd, int *fds,
			      uint64_t deadline_ns)
{
	lshard_status status;

	mesh_take_in(mesh);
	for (int32_t rank = 0; rank < mesh->context->size; rank++) {
		mesh->peers[rank].left_out = alive && !alive[rank];
		mesh->peers[rank].owed = mesh->peers[rank].fd >= 0 && !mesh->peers[rank].left_out;
	}
	status = settle(mesh, tag, fd, deadline_ns);
	for (int32_t rank = 0; rank < mesh->context->size; rank++)
		mesh->peers[rank].owed = 0;
	if (status == LSHARD_OK)
		status = collect(mesh, tag, fds);
	mesh->awaited = tag + 1;
	drop_rounds_over(mesh);
	return status;
}

lshard_status mesh_swap(struct mesh *mesh, uint64_t tag, int fd, int *fds, uint64_t deadline_ns)
{
	return mesh_swap_among(mesh, NULL, tag, fd, fds, deadline_ns);
}
