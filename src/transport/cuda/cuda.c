/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda.c - the transport between GPUs of a host or of an NVLink domain, and between processes on one GPU. Its tables,
 * and a group's life.
 *
 * Ranks fetch layers from each other's device memory by their own copy engines; ranks on one physical device compute
 * from each other's memory in place.
 */
#include "cuda_transport.h"
#include "outside.h"
#include "sockets.h"
#include "transports.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define FLOOR_GBS 40.0 /* below the slowest direct link that is worth it, above what is staged through the host */

static int cuda_available(lshard_error *error)
{
	struct cuda_driver driver;

	if (cuda_driver_open(&driver, lshard__variable(CUDA_LIBRARY_VARIABLE), error) != LSHARD_OK)
		return 0;
	cuda_driver_close(&driver);
	return 1;
}

/* ---- options ---- */

static int take_speed(const char *word, size_t length, const char *name, double *gigabytes)
{
	const size_t skip = strlen(name);
	char *end;

	if (length <= skip || memcmp(word, name, skip) != 0)
		return 0;
	*gigabytes = strtod(word + skip, &end);
	return end == word + length && isfinite(*gigabytes);
}

/* @p ipc: the transport has that option. */
static int take_word(struct cuda_options *options, int ipc, const char *word, size_t length)
{
	if (length == 4 && !memcmp(word, "copy", length))
		return options->copy = 1;
	if (ipc && length == 3 && !memcmp(word, "ipc", length))
		return options->ipc = 1;
	if (take_speed(word, length, "floor=", &options->floor))
		return options->floor >= 0;
	return take_speed(word, length, "pace=", &options->pace) && options->pace > 0;
}

/* Words joined by '+'. */
static lshard_status take_options(struct cuda *cuda, const char *text, lshard_error *error)
{
	cuda->options = (struct cuda_options){.floor = FLOOR_GBS};
	while (*text) {
		const size_t length = strcspn(text, "+");

		if (!take_word(&cuda->options, !cuda->inner, text, length))
			return lshard_fail(error, LSHARD_ERR_INVALID,
					   "%s has no option '%.*s': it has copy, %sfloor=GB/S, pace=GB/S",
					   cuda->ops.name, (int)length, text, cuda->inner ? "" : "ipc, ");
		text += length + (text[length] == '+');
	}
	return LSHARD_OK;
}

/* ---- a group ---- */

/* What must be the same everywhere: how memory is shared, its granule, whether any two ranks are on one device. */
static void settle_on(struct cuda *cuda)
{
	const lshard_context *context = cuda->base.context;
	int descriptors = 1;

	for (int32_t rank = 0; rank < context->size; rank++)
		descriptors &= cuda->records[rank].virtual_memory;
	cuda_shard_by(cuda, descriptors);
	if (!descriptors && cuda->records[context->rank].virtual_memory)
		context->log(
			context, LSHARD_LOG_WARN,
			"rank %d: another rank's device cannot share memory by descriptors: all use legacy handles",
			(int)context->rank);
}

/* Every rank comes here, also one whose device failed: the others hear why instead of waiting. */
static lshard_status introduce(struct cuda *cuda, const struct cuda_record *record, lshard_status status)
{
	const lshard_context *context = cuda->base.context;
	struct agreement_report report = {.step = 1};

	_Static_assert(sizeof *record <= sizeof report.body, "a rank tells of its device in one report");
	memcpy(report.body, record, sizeof *record);
	status = agreement_exchange(&cuda->agreement, cuda->ops.name, &report, status, NULL,
				    lshard__deadline_ns(context->timeout_ms));
	for (int32_t rank = 0; rank < context->size && status == LSHARD_OK; rank++)
		memcpy(&cuda->records[rank], cuda->agreement.reports[rank].body, sizeof *record);
	if (status == LSHARD_OK && cuda->inner)
		status = cuda_fabric_compare(cuda);
	if (status == LSHARD_OK)
		settle_on(cuda);
	return status;
}

/* What the inner transport exchanges waits for every rank: none of them may have failed before. */
static lshard_status meet(struct cuda *cuda)
{
	const lshard_context *context = cuda->base.context;
	const char here = 1;
	char *all = context->allocate(context, (size_t)context->size);
	int failed;

	if (!all)
		return lshard_fail(&cuda->base.error, LSHARD_ERR_NO_MEMORY, "no memory to connect %d ranks",
				   (int)context->size);
	failed = context->bootstrap->allgather(context->bootstrap->user, &here, all, sizeof here);
	context->release(context, all);
	return failed ? lshard_fail(&cuda->base.error, LSHARD_ERR_TRANSPORT, "the bootstrap's all-gather returned %d",
				    failed)
		      : LSHARD_OK;
}

static void disconnect(struct cuda *cuda)
{
	if (cuda->inner)
		return;
	control_close(&cuda->control);
	mesh_close(&cuda->mesh);
}

static lshard_status connect_ranks(struct cuda *cuda)
{
	const lshard_context *context = cuda->base.context;
	const uint64_t deadline = lshard__deadline_ns(context->timeout_ms);
	lshard_status status;

	if (cuda->inner)
		return meet(cuda);
	status = mesh_open(&cuda->mesh, context, &cuda->base.error, deadline);
	if (status != LSHARD_OK)
		return status;
	status = control_open(&cuda->control, &cuda->mesh, &cuda->base.error, deadline);
	if (status != LSHARD_OK)
		mesh_close(&cuda->mesh);
	return status;
}

static lshard_status connect_group(struct cuda *cuda, const struct cuda_record *record, lshard_status opened)
{
	const lshard_error cause = cuda->base.error;
	lshard_status status = connect_ranks(cuda);

	if (status != LSHARD_OK)
		return status;
	if (opened != LSHARD_OK)
		cuda->base.error = cause;
	status = introduce(cuda, record, opened);
	if (status == LSHARD_OK && cuda->base.context->size > 1)
		status = cuda_check_links(cuda);
	if (status != LSHARD_OK)
		disconnect(cuda);
	return status;
}

static void release_tables(struct cuda *cuda)
{
	const lshard_context *context = cuda->base.context;

	if (!context->forked(context))
		pthread_mutex_destroy(&cuda->borrowed_lock);
	agreement_free(&cuda->agreement, context);
	if (cuda->pace && !cuda->unsettled)
		context->release(context, cuda->pace);
	if (cuda->records)
		context->release(context, cuda->records);
	context->release(context, cuda);
}

static lshard_status make_pace(struct cuda *cuda)
{
	const lshard_context *context = cuda->base.context;

	if (cuda->options.pace <= 0)
		return LSHARD_OK;
	cuda->pace = context->allocate(context, sizeof *cuda->pace);
	if (!cuda->pace)
		return lshard_fail(&cuda->base.error, LSHARD_ERR_NO_MEMORY, "no memory for the rate limiter");
	cuda->pace->ns_per_byte = 1 / cuda->options.pace;
	context->log(
		context, LSHARD_LOG_INFO,
		"rank %d: fetches are paced to %g GB/s by host functions: reach waits while the program is more than "
		"about one transfer ahead, and the program's own host functions wait for the pace's",
		(int)context->rank, cuda->options.pace);
	return LSHARD_OK;
}

static struct cuda *allocate_tables(const lshard_context *context, lshard_transport *inner)
{
	const size_t size = (size_t)context->size;
	struct cuda *cuda = context->allocate(context, sizeof *cuda);

	if (!cuda)
		return NULL;
	pthread_mutex_init(&cuda->borrowed_lock, NULL);
	cuda->ops = inner ? lshard__fabric : lshard__cuda;
	cuda->inner = inner;
	cuda->handle_type = inner ? CUDA_HANDLE_FABRIC : CUDA_HANDLE_FD;
	cuda->base.ops = &cuda->ops;
	cuda->base.context = context;
	cuda->records = context->allocate(context, size * sizeof *cuda->records);
	if (cuda->records &&
	    agreement_make(&cuda->agreement, context, &cuda->control, &cuda->base.error) == LSHARD_OK) {
		cuda->agreement.over = inner;
		return cuda;
	}
	release_tables(cuda);
	return NULL;
}

/* The inner transport is the opener's until this is OK. */
static lshard_status cuda_open(const lshard_context *context, lshard_transport *inner, lshard_transport **transport,
			       lshard_error *error)
{
	struct cuda *cuda = allocate_tables(context, inner);
	struct cuda_record record = {.ordinal = context->device};
	lshard_status status;

	if (!cuda)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "no memory for the cuda transport");
	status = take_options(cuda, context->options, &cuda->base.error);
	if (status == LSHARD_OK)
		status = make_pace(cuda);
	if (status == LSHARD_OK)
		status = cuda_device_open(cuda, &record, &cuda->base.error);
	if (status == LSHARD_OK && inner)
		status = cuda_fabric_ask(cuda, &record, &cuda->base.error);
	status = connect_group(cuda, &record, status);
	if (status == LSHARD_OK) {
		*transport = &cuda->base;
		return LSHARD_OK;
	}
	if (error)
		*error = cuda->base.error;
	cuda_device_close(cuda);
	release_tables(cuda);
	return status;
}

static void cuda_close(lshard_transport *transport)
{
	struct cuda *cuda = (struct cuda *)transport;
	lshard_transport *inner = cuda->inner;

	cuda_borrowed_close(cuda);
	disconnect(cuda);
	if (!transport->context->forked(transport->context)) /* the driver takes no calls in a child */
		cuda_device_close(cuda);
	release_tables(cuda);
	if (inner)
		inner->ops->close(inner);
}

static lshard_status cuda_exchange(lshard_transport *transport, const void *send, void *receive, size_t bytes,
				   uint8_t *alive)
{
	struct cuda *cuda = (struct cuda *)transport;

	return agreement_gather(&cuda->agreement, send, receive, bytes, alive, NULL,
				lshard__deadline_ns(transport->context->timeout_ms));
}

static void cuda_abort(lshard_transport *transport)
{
	struct cuda *cuda = (struct cuda *)transport;

	cuda_pace_bypass(cuda->pace, 1);
	atomic_store(&cuda->aborted, 1);
	if (cuda->inner)
		cuda->inner->ops->abort(cuda->inner);
	else
		mesh_abort(&cuda->mesh);
}

/* Needs no group, and touches no device: whether a handle is granted only opening can tell. */
static int fabric_available(lshard_error *error)
{
	struct cuda_driver driver;
	int version;

	if (cuda_driver_open(&driver, lshard__variable(CUDA_LIBRARY_VARIABLE), error) != LSHARD_OK)
		return 0;
	version = driver.version;
	cuda_driver_close(&driver);
	if (version >= CUDA_OLDEST_WITH_FABRIC)
		return 1;
	(void)lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED, "the driver is for CUDA %d.%d; 12.3 or later is needed",
			  version / 1000, version % 1000 / 10);
	return 0;
}

static int cuda_direct(lshard_transport *transport, int32_t rank)
{
	const struct cuda *cuda = (struct cuda *)transport;

	return cuda_same_device(cuda, transport->context->rank, rank);
}

/* Of both tables. */
#define CUDA_CALLS                                                                                                     \
	.open = cuda_open, .close = cuda_close, .exchange = cuda_exchange, .abort = cuda_abort,                        \
	.store_open = cuda_store_open, .store_close = cuda_store_close, .shard = cuda_shard, .buffer = cuda_buffer,    \
	.peer = cuda_peer, .direct = cuda_direct, .fetch = cuda_fetch, .wait = cuda_wait,                              \
	.record_use = cuda_record_use, .join = cuda_join, .capture = cuda_capture, .drain = cuda_drain,                \
	.read = cuda_read, .copy = cuda_copy, .copy_buffer = cuda_copy_buffer

const lshard_transport_ops lshard__cuda = {
	.struct_size = sizeof(lshard_transport_ops),
	.abi = LSHARD_TRANSPORT_ABI,
	.name = "cuda",
	.summary = "GPUs of a host fetch layers by their copy engines, ranks on one GPU share them; options copy, ipc, "
		   "floor=GB/S, pace=GB/S",
	.capabilities = CUDA_CAPABILITIES,
	.granule_bytes = 2 << 20, /* of today's devices; a group's own table has the device's */
	.available = cuda_available,
	CUDA_CALLS,
};

const lshard_transport_ops lshard__fabric = {
	.struct_size = sizeof(lshard_transport_ops),
	.abi = LSHARD_TRANSPORT_ABI,
	.name = "fabric",
	.summary =
		"the same between GPUs of an NVLink domain of several hosts, which meet by the caller's collectives; "
		"options copy, floor=GB/S, pace=GB/S",
	.capabilities = CUDA_CAPABILITIES & FABRIC_CAPABILITIES,
	.granule_bytes = 2 << 20,
	.available = fabric_available,
	CUDA_CALLS,
};
