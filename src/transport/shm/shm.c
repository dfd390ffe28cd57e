/* SPDX-License-Identifier: Apache-2.0
 *
 * shm.c - the transport between processes of a host. Its table, and a group's life.
 *
 * By default nothing moves: every rank computes from the pages of the rank that loaded them. As "shm:copy" it fetches
 * layers into windows by a thread of its own, for machines where memory is nearer to some processors than to others.
 */
#include "shm.h"
#include "limit_reason.h"
#include "memfd.h"
#include "sockets.h"
#include "transports.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int can_seal(lshard_error *error)
{
	int fd = lshard__memfd_create("layershard:probe");
	int sealed;

	if (fd < 0) {
		(void)lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED, "memfd_create: %s", lshard__reason(errno, 0).text);
		return 0;
	}
	sealed = !fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE);
	if (!sealed)
		(void)lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED, "F_SEAL_FUTURE_WRITE (Linux 5.1): %s",
				  strerror(errno));
	close(fd);
	return sealed;
}

static int shm_available(lshard_error *error)
{
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	if (fd < 0) {
		(void)lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED, "local sockets: %s", lshard__reason(errno, 0).text);
		return 0;
	}
	close(fd);
	return can_seal(error);
}

static void shm_close(lshard_transport *transport)
{
	struct shm *shm = (struct shm *)transport;
	const lshard_context *context = transport->context;

	shm_rejoin_close(shm, context);
	if (!context->forked(context)) /* a child has no copy of the thread, and maybe a lock that it held */
		shm_copier_close(&shm->copier);
	control_close(&shm->control);
	mesh_close(&shm->mesh);
	agreement_free(&shm->agreement, context);
	if (shm->nodes)
		context->release(context, shm->nodes);
	context->release(context, shm);
}

static lshard_status take_options(struct shm *shm, const lshard_context *context, lshard_error *error)
{
	shm->ops = lshard__shm;
	shm->ops.granule_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
	if (!strcmp(context->options, "copy"))
		shm->ops.capabilities &= ~(uint32_t)LSHARD_CAP_DIRECT;
	else if (context->options[0])
		return lshard_fail(error, LSHARD_ERR_INVALID, "shm has no option '%s': it has 'copy'",
				   context->options);
	return LSHARD_OK;
}

/* ---- nodes ---- */

static bool are_alike(const uint32_t *nodes, int32_t size)
{
	for (int32_t rank = 1; rank < size; rank++)
		if (nodes[rank] != nodes[0])
			return false;
	return true;
}

/* Which ranks share copies with this one. */
static void tell_neighbours(const struct shm *shm, const lshard_context *context)
{
	const uint32_t node = shm->nodes[context->rank];
	char text[128] = "";
	size_t used = 0;

	for (int32_t rank = 0; rank < context->size && used + 16 < sizeof text; rank++)
		if (shm->nodes[rank] == node)
			used += (size_t)snprintf(text + used, sizeof text - used, " %d", (int)rank);
	context->log(context, LSHARD_LOG_INFO,
		     "numa copy: what ranks of other nodes store is copied to node %u, for%s%s", node, text,
		     used + 16 < sizeof text ? "" : " ...");
}

/* All ranks learn where the others run; copies are made where that is on several nodes. */
static lshard_status find_nodes(struct shm *shm, const lshard_context *context, uint64_t deadline)
{
	const uint32_t here = numa_home();
	uint8_t *alive = shm->agreement.alive;
	lshard_status status;

	shm->wish = numa_wish_for(context->numa, here);
	if (context->numa != LSHARD_NUMA_COPY)
		return LSHARD_OK;
	status = control_exchange(&shm->control, &here, shm->nodes, sizeof here, alive, NULL, deadline);
	if (status == LSHARD_OK && memchr(alive, 0, (size_t)context->size)) {
		struct lshard__ranks gone = lshard__ranks_absent(alive, context->size);

		return lshard_fail(&shm->base.error, LSHARD_ERR_PEER_FAILED,
				   "%s %s gone, before it was known on which "
				   "NUMA node",
				   lshard__ranks_text(&gone), lshard__ranks_are(&gone));
	}
	if (status == LSHARD_OK && are_alike(shm->nodes, context->size)) {
		context->release(context, shm->nodes);
		shm->nodes = NULL;
	} else if (status == LSHARD_OK) {
		shm->ops.refresh = shm_refresh;
		tell_neighbours(shm, context);
	}
	return status;
}

/* ---- a group ---- */

static lshard_status connect_page(struct shm *shm, const lshard_context *context, uint64_t deadline)
{
	lshard_error *error = &shm->base.error;
	int page;

	if (!context->living)
		return control_open(&shm->control, &shm->mesh, error, deadline);
	page = fcntl(context->living->page, F_DUPFD_CLOEXEC, 0);
	if (page < 0)
		return lshard_fail(error, LSHARD_ERR_SYSTEM, "control page: %s", lshard__reason(errno, 0).text);
	return control_attach(&shm->control, &shm->mesh, error, page, deadline);
}

/* The copier comes after the page: what fails on one rank alone is seen by the others as a rank that is gone. */
static lshard_status connect_group(struct shm *shm, const lshard_context *context)
{
	uint64_t deadline = lshard__deadline_ns(context->timeout_ms);
	lshard_error *error = &shm->base.error;
	lshard_status status = shm_rejoin_open(shm, context, deadline);

	if (status != LSHARD_OK)
		return status;
	if (context->living)
		status = mesh_open_alone(&shm->mesh, context, error);
	else
		status = mesh_open(&shm->mesh, context, error, deadline);
	if (status != LSHARD_OK)
		goto close_door;
	status = connect_page(shm, context, deadline);
	if (status != LSHARD_OK)
		goto close_mesh;
	status = find_nodes(shm, context, deadline);
	if (status == LSHARD_OK)
		status = shm_copier_make(&shm->copier, error);
	if (status == LSHARD_OK)
		status = shm_rejoin_start(shm);
	if (status == LSHARD_OK && context->living)
		status = shm_rejoin_return(shm, context, deadline);
	if (status == LSHARD_OK)
		return status;
	shm_rejoin_close(shm, context); /* its thread first */
	shm_copier_close(&shm->copier);
	control_close(&shm->control);
close_mesh:
	mesh_close(&shm->mesh);
close_door:
	shm_rejoin_close(shm, context);
	return status;
}

static lshard_status shm_open_group(const lshard_context *context, lshard_transport *inner,
				    lshard_transport **transport, lshard_error *error)
{
	struct shm *shm = context->allocate(context, sizeof *shm);
	lshard_status status;

	(void)inner;
	if (!shm)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "no memory for the shm transport");
	status = take_options(shm, context, &shm->base.error);
	shm->base.ops = &shm->ops;
	shm->base.context = context;
	if (status == LSHARD_OK)
		status = agreement_make(&shm->agreement, context, &shm->control, &shm->base.error);
	if (status == LSHARD_OK && context->numa == LSHARD_NUMA_COPY) {
		shm->nodes = context->allocate(context, (size_t)context->size * sizeof *shm->nodes);
		if (!shm->nodes)
			status = lshard_fail(&shm->base.error, LSHARD_ERR_NO_MEMORY, "no memory for the ranks' nodes");
	}
	if (status == LSHARD_OK)
		status = connect_group(shm, context);
	if (status == LSHARD_OK) {
		*transport = &shm->base;
		return LSHARD_OK;
	}
	if (error)
		*error = shm->base.error;
	agreement_free(&shm->agreement, context);
	if (shm->nodes)
		context->release(context, shm->nodes);
	context->release(context, shm);
	return status;
}

static lshard_status shm_exchange(lshard_transport *transport, const void *send, void *receive, size_t bytes,
				  uint8_t *alive)
{
	struct shm *shm = (struct shm *)transport;

	return control_exchange(&shm->control, send, receive, bytes, alive, NULL,
				lshard__deadline_ns(transport->context->timeout_ms));
}

static void shm_abort(lshard_transport *transport)
{
	struct shm *shm = (struct shm *)transport;

	if (transport->context->rejoin)
		door_stop(&shm->rejoin.door); /* it has left: nobody is to find it */
	mesh_abort(&shm->mesh);
	shm_copier_abort(&shm->copier);
}

static const lshard_rejoin_ops rejoin = {
	.struct_size = sizeof(lshard_rejoin_ops),
	.busy = shm_busy,
	.note = shm_note,
	.filled = shm_filled,
	.recall = shm_recall,
	.renew = shm_renew,
};

const lshard_transport_ops lshard__shm = {
	.struct_size = sizeof(lshard_transport_ops),
	.abi = LSHARD_TRANSPORT_ABI,
	.name = "shm",
	.summary = "processes of a host share pages and copy nothing, unless stripes are not whole pages; shm:copy "
		   "fetches layers into windows",
	.capabilities = LSHARD_CAP_DIRECT | LSHARD_CAP_OUTLIVES | LSHARD_CAP_PLACES,
	.granule_bytes = 4096, /* of most machines; a group's own table has the machine's */
	.available = shm_available,
	.open = shm_open_group,
	.close = shm_close,
	.exchange = shm_exchange,
	.abort = shm_abort,
	.store_open = shm_store_open,
	.store_close = shm_store_close,
	.shard = shm_shard,
	.buffer = shm_buffer,
	.peer = shm_peer,
	.fetch = shm_fetch,
	.wait = shm_wait,
	.join = shm_join,
	.drain = shm_drain,
	.read = shm_read,
	.rejoin = &rejoin,
};
