/* SPDX-License-Identifier: Apache-2.0
 *
 * trace.c - `trace=FILE`: writes what the link and the program did as Chrome trace events, to be looked at in Perfetto
 * or chrome://tracing. With more than one rank, FILE gets ".<rank>" before its extension. One track shows the
 * transfers, one the waits that blocked and the reads; a rank is a process. Nothing is allocated per event. A full
 * disk stops no pass: it is logged once, ends the trace, and is what every flush from then on returns.
 *
 * Lines are gathered here and not by stdio, whose buffers a child of the program's writes once more when it ends.
 */
#include "clock.h"
#include "limit_reason.h"
#include "transports.h"
#include "wrapper.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define BUFFER_BYTES 65536u
#define LINE_BYTES   1024u
#define PATH_BYTES   4096u

/* Tracks ("threads" of the format). */
enum track { PROGRAM = 1, LINK = 2 };

/* The last fetch into one buffer, until it is waited for. */
struct journey {
	uint64_t asked_ns; /* 0: none */
	uint32_t position;
};

struct trace {
	struct lshard__wrapper wrapper;
	int file;
	bool regular;         /* a file whose end can be written before the program's */
	pthread_mutex_t lock; /* of what follows: series are used from different threads */
	char *lines;          /* [BUFFER_BYTES] what is not written yet */
	size_t used;
	int broken; /* errno: lines are lost */
	char path[PATH_BYTES];
};

struct trace_store {
	struct lshard__wrapper_store wrapper;
	char name[64 * 6 + 1];    /* of the series, as a JSON string's inside */
	struct journey *journeys; /* [buffers] */
};

static struct trace *trace_of(lshard_transport *transport)
{
	return (struct trace *)transport;
}

static struct trace_store *store_of(lshard_store *store)
{
	return (struct trace_store *)store;
}

/* ---- Writing --------------------------------------------------------------------------------------------------- */

/* Time of the trace: microseconds with three decimals, whole numbers only so that no locale can spoil them. */
#define US_FORMAT     "%" PRIu64 ".%03" PRIu64
#define US_VALUES(ns) (uint64_t)(ns) / 1000u, (uint64_t)(ns) % 1000u

/* With the lock. */
static void break_off(struct trace *trace, int cause)
{
	const lshard_context *context = trace->wrapper.base.context;

	if (trace->broken)
		return;
	trace->broken = cause;
	context->log(context, LSHARD_LOG_WARN, "rank %d: the trace cannot be written and ends here: %s",
		     (int)context->rank, lshard__reason(cause, 0).text);
}

/* With the lock. */
static void write_out(struct trace *trace)
{
	size_t done = 0;

	while (done < trace->used && !trace->broken) {
		ssize_t written = lshard__write(trace->file, trace->lines + done, trace->used - done);

		if (written >= 0)
			done += (size_t)written;
		else if (errno != EINTR)
			break_off(trace, errno);
	}
	trace->used = 0;
}

/*
 * With the lock. What makes a whole trace of what there is, so that a flush tells whether it could be written. In a
 * file the next line is written over it; elsewhere it can come once, when the trace is closed.
 */
static void write_end(struct trace *trace)
{
	static const char end[] = "\n]}\n";

	write_out(trace);
	if (trace->broken)
		return;
	trace->used = sizeof end - 1;
	memcpy(trace->lines, end, trace->used);
	write_out(trace);
	if (!trace->broken && trace->regular && lseek(trace->file, -(off_t)(sizeof end - 1), SEEK_CUR) < 0)
		break_off(trace, errno);
}

__attribute__((format(printf, 2, 3))) static void add_line(struct trace *trace, const char *format, ...)
{
	char line[LINE_BYTES];
	va_list arguments;
	size_t length;

	va_start(arguments, format);
	length = (size_t)vsnprintf(line, sizeof line, format, arguments);
	va_end(arguments);
	pthread_mutex_lock(&trace->lock);
	if (trace->used + length > BUFFER_BYTES)
		write_out(trace);
	memcpy(trace->lines + trace->used, line, length);
	trace->used += length;
	pthread_mutex_unlock(&trace->lock);
}

static void write_transfer(lshard_store *base, uint32_t buffer, const struct journey *journey, uint64_t from_ns,
			   uint64_t to_ns)
{
	add_line(trace_of(base->transport),
		 ",\n{\"ph\":\"X\",\"cat\":\"transfer\",\"pid\":%d,\"tid\":%d,\"ts\":" US_FORMAT ",\"dur\":" US_FORMAT
		 ",\"name\":\"position %u -> window %u\",\"args\":{"
		 "\"series\":\"%s\",\"position\":%u,\"window\":%u,\"bytes\":%" PRIu64 "}}",
		 (int)base->transport->context->rank, LINK, US_VALUES(from_ns), US_VALUES(to_ns - from_ns),
		 journey->position, buffer, store_of(base)->name, journey->position, buffer,
		 lshard__wrapper_bytes_in(base, journey->position));
}

static void write_call(lshard_store *base, const char *call, uint32_t position, uint64_t from_ns, uint64_t takes_ns)
{
	add_line(trace_of(base->transport),
		 ",\n{\"ph\":\"X\",\"cat\":\"%s\",\"pid\":%d,\"tid\":%d,\"ts\":" US_FORMAT ",\"dur\":" US_FORMAT
		 ",\"name\":\"%s for position %u\",\"args\":{\"series\":\"%s\",\"position\":%u}}",
		 call, (int)base->transport->context->rank, PROGRAM, US_VALUES(from_ns), US_VALUES(takes_ns), call,
		 position, store_of(base)->name, position);
}

static void add_name(struct trace *trace, int track, const char *kind, const char *name)
{
	add_line(trace, "%s{\"ph\":\"M\",\"pid\":%d,\"tid\":%d,\"name\":\"%s\",\"args\":{\"name\":\"%s\"}}",
		 track == 0 ? "" : ",\n", (int)trace->wrapper.base.context->rank, track, kind, name);
}

static void write_head(struct trace *trace)
{
	char name[32];

	snprintf(name, sizeof name, "rank %d", (int)trace->wrapper.base.context->rank);
	add_line(trace, "{\"schema\":\"layershard-trace/1\",\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n");
	add_name(trace, 0, "process_name", name);
	add_name(trace, PROGRAM, "thread_name", "program");
	add_name(trace, LINK, "thread_name", "link");
}

/* ---- Opening --------------------------------------------------------------------------------------------------- */

/* "runs/a.json" of rank 2 is "runs/a.2.json"; without an extension, "runs/a" is "runs/a.2". */
static lshard_status path_of_rank(const lshard_context *context, char *path, lshard_error *error)
{
	const char *file = context->options;
	const char *slash = strrchr(file, '/');
	const char *dot = strrchr(slash ? slash + 1 : file, '.');
	const char *begin = slash ? slash + 1 : file;
	int stem = (int)(dot && dot != begin ? dot - file : (ptrdiff_t)strlen(file));

	if (begin[0] == '\0')
		return lshard_fail(error, LSHARD_ERR_INVALID, "trace: no file is named; write trace=run.json");
	if (strlen(file) + 16 > PATH_BYTES)
		return lshard_fail(error, LSHARD_ERR_INVALID, "trace: the file's name is longer than %u characters",
				   PATH_BYTES - 16);
	if (context->size == 1)
		snprintf(path, PATH_BYTES, "%s", file);
	else
		snprintf(path, PATH_BYTES, "%.*s.%d%s", stem, file, (int)context->rank, file + stem);
	return LSHARD_OK;
}

/* Empty, and its user's alone, also where it was there before. Pipes and devices stay as they are. Else: why not. */
static const char *make_own(struct trace *trace)
{
	struct stat found;

	if (fstat(trace->file, &found))
		return strerror(errno);
	trace->regular = S_ISREG(found.st_mode);
	if (!trace->regular)
		return NULL;
	if (found.st_uid != geteuid())
		return "it belongs to another user";
	if (found.st_nlink > 1)
		return "it has other names too (hard links), whose content would be lost";
	if (fchmod(trace->file, 0600) || ftruncate(trace->file, 0))
		return strerror(errno);
	return NULL;
}

static lshard_status file_open(struct trace *trace, lshard_error *error)
{
	const lshard_context *context = trace->wrapper.base.context;
	lshard_status status = path_of_rank(context, trace->path, error);
	const char *why;

	if (status < 0)
		return status;
	/* A pipe without a reader is refused and one whose reader is slow breaks the trace: no pass waits for it. */
	trace->file = open(trace->path, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, 0600);
	if (trace->file < 0)
		why = errno == ELOOP ? "it is a symbolic link, which is not followed" : strerror(errno);
	else
		why = make_own(trace);
	if (why) {
		if (trace->file >= 0)
			close(trace->file);
		return lshard_fail(error, LSHARD_ERR_SYSTEM, "trace: rank %d cannot write '%.300s': %s",
				   (int)context->rank, trace->path, why);
	}
	trace->lines = context->allocate(context, BUFFER_BYTES);
	if (trace->lines && pthread_mutex_init(&trace->lock, NULL) == 0)
		return LSHARD_OK;
	close(trace->file);
	context->release(context, trace->lines);
	return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "trace: rank %d has no memory for its buffer",
			   (int)context->rank);
}

static lshard_status trace_open(const lshard_context *context, lshard_transport *inner, lshard_transport **transport,
				lshard_error *error)
{
	struct trace *trace = lshard__wrapper_new(context, inner, &lshard__trace, sizeof *trace, error);
	lshard_status status;

	if (!trace)
		return LSHARD_ERR_NO_MEMORY;
	status = file_open(trace, error);
	if (status < 0) {
		lshard__wrapper_free(trace);
		return status;
	}
	write_head(trace);
	*transport = &trace->wrapper.base;
	return LSHARD_OK;
}

/* Some file systems tell of a full disk when a descriptor is closed, which that of the trace itself is too late for. */
static void find_late_failure(struct trace *trace)
{
	const int copy = fcntl(trace->file, F_DUPFD_CLOEXEC, 0);

	if (copy >= 0 && close(copy) && errno != EINTR)
		break_off(trace, errno);
}

static lshard_status trace_flush(lshard_transport *transport)
{
	struct trace *trace = trace_of(transport);
	const lshard_status inner = lshard__wrapper_flush(transport);
	int broken;

	pthread_mutex_lock(&trace->lock);
	if (trace->regular)
		write_end(trace);
	else
		write_out(trace);
	find_late_failure(trace);
	broken = trace->broken;
	pthread_mutex_unlock(&trace->lock);
	if (!broken)
		return inner;
	return lshard_fail(&transport->error, LSHARD_ERR_SYSTEM,
			   "trace: rank %d could not write all of '%.300s', which ends before the program does: %s",
			   (int)transport->context->rank, trace->path, lshard__reason(broken, 0).text);
}

static void trace_close(lshard_transport *transport)
{
	struct trace *trace = trace_of(transport);
	const bool forked = transport->context->forked(transport->context);

	if (!forked) { /* a child has a copy of lines that are its parent's */
		write_end(trace);
		pthread_mutex_destroy(&trace->lock);
	}
	if (close(trace->file) && errno != EINTR && !forked)
		break_off(trace, errno);
	transport->context->release(transport->context, trace->lines);
	lshard__wrapper_close(transport);
}

/* A series' name may hold anything. */
static void escape(char *to, size_t bytes, const char *from)
{
	size_t used = 0;

	for (; *from && used + 7 <= bytes; from++) {
		unsigned char character = (unsigned char)*from;

		if (character < 0x20 || character == '"' || character == '\\' || character == 0x7f)
			used += (size_t)snprintf(to + used, bytes - used, "\\u%04x", (unsigned)character);
		else
			to[used++] = *from;
	}
	to[used] = '\0';
}

static lshard_status trace_store_open(lshard_transport *transport, const lshard_store_plan *plan, lshard_store **opened)
{
	const lshard_context *context = transport->context;
	struct trace_store *store;
	lshard_status status = lshard__wrapper_store_new(transport, plan, sizeof *store, &store);

	if (status < 0)
		return status;
	store->journeys = context->allocate(context, (plan->buffers + (size_t)1) * sizeof store->journeys[0]);
	if (!store->journeys) {
		lshard__wrapper_store_close(&store->wrapper.base);
		return lshard_fail(&transport->error, LSHARD_ERR_NO_MEMORY, "trace: no memory for series '%s'",
				   plan->name);
	}
	escape(store->name, sizeof store->name, plan->name);
	*opened = &store->wrapper.base;
	return LSHARD_OK;
}

static void trace_store_close(lshard_store *base)
{
	base->transport->context->release(base->transport->context, store_of(base)->journeys);
	lshard__wrapper_store_close(base);
}

/* ---- What is traced -------------------------------------------------------------------------------------------- */

static lshard_status trace_fetch(lshard_store *base, uint32_t position, uint32_t buffer, void *stream,
				 uint64_t sequence)
{
	uint64_t asked_ns = lshard__now_ns();
	lshard_status status = lshard__wrapper_fetch(base, position, buffer, stream, sequence);

	if (status >= 0 && buffer != LSHARD_NO_BUFFER)
		store_of(base)->journeys[buffer] = (struct journey){asked_ns, position};
	return status;
}

/* A transport that knows no times: from the call of fetch to the end of the wait. */
static lshard_status trace_wait(lshard_store *base, uint32_t buffer, void *stream, lshard_arrival *arrival)
{
	struct journey *journey = &store_of(base)->journeys[buffer];
	uint64_t began_ns = lshard__now_ns();
	lshard_status status = lshard__wrapper_wait(base, buffer, stream, arrival);
	uint64_t from_ns = journey->asked_ns;
	uint64_t to_ns = lshard__now_ns();

	if (journey->asked_ns == 0)
		return status;
	if (status < 0 || arrival->blocked_ns > 0)
		write_call(base, "wait", journey->position, began_ns, to_ns - began_ns);
	if (status < 0)
		return status;
	if (arrival->finished_ns > 0 && arrival->finished_ns >= arrival->started_ns) {
		from_ns = arrival->started_ns;
		to_ns = arrival->finished_ns;
	}
	write_transfer(base, buffer, journey, from_ns, to_ns);
	journey->asked_ns = 0;
	return status;
}

static lshard_status trace_drain(lshard_store *base)
{
	lshard_status status = lshard__wrapper_drain(base);

	memset(store_of(base)->journeys, 0, base->plan->buffers * sizeof store_of(base)->journeys[0]);
	return status;
}

static lshard_status trace_read(lshard_store *base, uint32_t position, void *destination)
{
	uint64_t began_ns = lshard__now_ns();
	lshard_status status = lshard__wrapper_read(base, position, destination);

	write_call(base, "read", position, began_ns, lshard__now_ns() - began_ns);
	return status;
}

const lshard_transport_ops lshard__trace = {
	.struct_size = sizeof(lshard_transport_ops),
	.abi = LSHARD_TRANSPORT_ABI,
	.name = "trace",
	.summary = "trace=FILE: write transfers and waits as Chrome trace events; FILE.json of rank 2 of many is "
		   "FILE.2.json",
	.open = trace_open,
	.close = trace_close,
	.flush = trace_flush,
	.store_open = trace_store_open,
	.store_close = trace_store_close,
	.fetch = trace_fetch,
	.wait = trace_wait,
	.drain = trace_drain,
	.read = trace_read,
};
