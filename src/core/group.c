/* SPDX-License-Identifier: Apache-2.0
 *
 * group.c - life of a group, its memory and log hooks, and how ranks agree in collective calls.
 * Knows: options, the transport's control channel. Does not know: layers, windows.
 */
#include "internal.h"

#include <layershard/plan.h>

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_TIMEOUT_MS 30000u
#define MAX_RANKS          65536

/* ---- The caller's hooks ---- */

static void *default_allocate(void *user, size_t bytes)
{
	(void)user;
	return calloc(1, bytes); /* large parts take memory only where they are touched */
}

static void default_release(void *user, void *pointer)
{
	(void)user;
	free(pointer);
}

void *group_allocate(lshard_group *group, size_t bytes)
{
	void *pointer = group->allocator.allocate(group->allocator.user, bytes ? bytes : 1);

	if (pointer && group->allocator.allocate != default_allocate)
		memset(pointer, 0, bytes);
	return pointer;
}

void group_release(lshard_group *group, void *pointer)
{
	if (pointer)
		group->allocator.release(group->allocator.user, pointer);
}

static void *memory_allocate(void *user, size_t bytes)
{
	return group_allocate(user, bytes);
}

static void memory_release(void *user, void *pointer)
{
	group_release(user, pointer);
}

struct layout_memory group_memory(lshard_group *group)
{
	return (struct layout_memory){memory_allocate, memory_release, group};
}

static void *context_allocate(const lshard_context *context, size_t bytes)
{
	return group_allocate(context->group, bytes);
}

static void context_release(const lshard_context *context, void *pointer)
{
	group_release(context->group, pointer);
}

static int context_forked(const lshard_context *context)
{
	return !group_is_ours(context->group);
}

static void context_log(const lshard_context *context, lshard_log_level level, const char *format, ...)
{
	const lshard_group *group = context->group;
	char text[512];
	va_list arguments;

	if (!group->log || level > group->log_level)
		return;
	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	group->log(group->log_user, level, text);
}

/* ---- Creation ---- */

static int alone_allgather(void *user, const void *send, void *receive, size_t bytes)
{
	(void)user;
	memcpy(receive, send, bytes);
	return 0;
}

static lshard_status find_rank(lshard_context *context, const lshard_group_options *options, lshard_error *error)
{
	lshard_discovered found = LSHARD_DISCOVERED_INIT;
	lshard_status status;

	context->rank = options->rank;
	context->size = options->size;
	if (options->rank == -1 && options->size == -1) {
		status = lshard_discover(&found, error->text, sizeof error->text);
		if (status == LSHARD_ERR_STATE)
			found = (lshard_discovered){.rank = 0, .size = 1, .source = "nothing is set: alone"};
		else if (status < 0)
			return status;
		context->rank = found.rank;
		context->size = found.size;
		context->log(context, LSHARD_LOG_INFO, "rank %d of %d (%s)", found.rank, found.size, found.source);
	}
	if ((options->rank == -1) != (options->size == -1))
		return lshard_fail(error, LSHARD_ERR_INVALID,
				   "rank %d of size %d: give both, or -1 for both to have them found", options->rank,
				   options->size);
	if (context->size < 1 || context->size > MAX_RANKS || context->rank < 0 || context->rank >= context->size)
		return lshard_fail(error, LSHARD_ERR_INVALID,
				   "rank %d of %d: the size must be in 1..%d and the rank below it", context->rank,
				   context->size, MAX_RANKS);
	return LSHARD_OK;
}

static lshard_status find_timeout(lshard_context *context, const lshard_group_options *options, lshard_error *error)
{
	const char *text = lshard__variable("LAYERSHARD_TIMEOUT_MS");
	unsigned long long value;
	char *end;

	context->timeout_ms = options->timeout_ms ? options->timeout_ms : DEFAULT_TIMEOUT_MS;
	if (options->timeout_ms || !text)
		return LSHARD_OK;
	value = strtoull(text, &end, 10);
	if (*end || end == text || *text == '-' || value == 0 || value > UINT32_MAX)
		return lshard_fail(error, LSHARD_ERR_INVALID,
				   "LAYERSHARD_TIMEOUT_MS='%s' is no number of milliseconds in 1..%u", text,
				   UINT32_MAX);
	context->timeout_ms = (uint32_t)value;
	return LSHARD_OK;
}

/* A choice that a variable makes where the options leave it alone, which is the first of the enum's values. */
struct choice {
	const char *option;
	const char *variable;
	const char *known; /* "auto, never": the words, for a text */
	const char *words[5];
	unsigned n_words;
};

static lshard_status choose(const struct choice *choice, unsigned given, unsigned *value, lshard_error *error)
{
	const char *text = lshard__variable(choice->variable);

	*value = given;
	if (given >= choice->n_words)
		return lshard_fail(error, LSHARD_ERR_INVALID, "%s is %u: 0..%u are known", choice->option, given,
				   choice->n_words - 1);
	if (given > 0 || !text)
		return LSHARD_OK;
	while (*value < choice->n_words && strcmp(text, choice->words[*value]) != 0)
		++*value;
	if (*value == choice->n_words)
		return lshard_fail(error, LSHARD_ERR_INVALID, "%s='%s' is none of %s", choice->variable, text,
				   choice->known);
	return LSHARD_OK;
}

static const struct choice large_pages_choice = {
	"large_pages", "LAYERSHARD_LARGE_PAGES", "auto, never, require", {"auto", "never", "require"}, 3};
static const struct choice numa_choice = {"numa",
					  "LAYERSHARD_NUMA",
					  "none, interleave, source, copy",
					  {"auto", "none", "interleave", "source", "copy"},
					  5};

static const struct choice rejoin_choice = {
	"rejoin", "LAYERSHARD_REJOIN", "never, allow", {"auto", "never", "allow"}, 3};

static lshard_status find_pages(lshard_context *context, const lshard_group_options *options, lshard_error *error)
{
	unsigned value;
	lshard_status status = choose(&large_pages_choice, (unsigned)options->large_pages, &value, error);

	if (status < 0)
		return status;
	context->large_pages = (lshard_large_pages)value;
	context->large_page_bytes = value == LSHARD_LARGE_PAGES_NEVER ? 0 : lshard__large_page_bytes();
	status = choose(&numa_choice, (unsigned)options->numa, &value, error);
	context->numa = value == LSHARD_NUMA_AUTO ? LSHARD_NUMA_NONE : (lshard_numa)value;
	return status;
}

/* Of a rank alone nobody could keep anything. */
static lshard_status find_rejoin(lshard_context *context, const lshard_group_options *options, lshard_error *error)
{
	unsigned value;
	const lshard_status status = choose(&rejoin_choice, (unsigned)options->rejoin, &value, error);

	if (status < 0)
		return status;
	context->rejoin = value == LSHARD_REJOIN_ALLOW && context->size > 1;
	if (context->rejoin && options->bootstrap)
		return lshard_fail(
			error, LSHARD_ERR_INVALID,
			"rank %d: rejoin is asked for, and ranks that come back find the others by the job's "
			"name, not by a bootstrap: leave out one of them",
			context->rank);
	return LSHARD_OK;
}

/* Fills the context but for the bootstrap. */
static lshard_status fill_context(lshard_group *group, const lshard_group_options *options, lshard_error *error)
{
	lshard_context *context = &group->context;
	lshard_status status;

	*context = (lshard_context){.struct_size = sizeof *context,
				    .memory = options->memory,
				    .device = options->device,
				    .options = "",
				    .allocate = context_allocate,
				    .release = context_release,
				    .log = context_log,
				    .forked = context_forked,
				    .group = group};
	if (options->callbacks) {
		group->callbacks = *options->callbacks;
		if (group->callbacks.device) {
			group->device = *group->callbacks.device;
			group->callbacks.device = &group->device;
		}
		context->callbacks = &group->callbacks;
	}
	status = find_rank(context, options, error);
	if (status >= 0)
		status = find_timeout(context, options, error);
	if (status >= 0)
		status = find_pages(context, options, error);
	if (status >= 0)
		status = find_rejoin(context, options, error);
	if (status < 0)
		return status;
	group->records = group_allocate(group, (size_t)context->size * sizeof *group->records);
	group->alive = group_allocate(group, (size_t)context->size);
	if (!group->records || !group->alive)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "rank %d: no memory for a group of %d", context->rank,
				   context->size);
	return LSHARD_OK;
}

/*
 * The launcher's name is of all that it has started: only ranks of just that may find each other by it. NULL: there is
 * none; @p found keeps it.
 */
static const char *find_job(const lshard_context *context, const lshard_group_options *options,
			    lshard_discovered *found)
{
	const char *job = options->job ? options->job : lshard__variable("LAYERSHARD_JOB");

	if (job)
		return job;
	if (lshard_discover(found, NULL, 0) < 0 || found->rank != context->rank || found->size != context->size ||
	    !found->job[0])
		return NULL;
	return found->job;
}

/* The transport's words: the caller's, else those of the environment, which *variable then names. */
static const char *find_spec(const lshard_group_options *options, const char **variable)
{
	const char *spec = options->transport;

	*variable = NULL;
	if (spec || options->custom_transport)
		return spec;
	spec = lshard__variable("LAYERSHARD_TRANSPORT");
	if (!spec)
		return "auto";
	*variable = "LAYERSHARD_TRANSPORT";
	return spec;
}

/* How the ranks come together, while they do. */
struct meeting {
	lshard__rendezvous *rendezvous;
	lshard_bootstrap by_job;
	struct lshard__living *living;
};

static lshard_status keep_job(lshard_group *group, const char *job, lshard_error *error)
{
	if (!job)
		return LSHARD_OK;
	group->job = group_allocate(group, strlen(job) + 1);
	if (!group->job)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "no memory for a group");
	strcpy(group->job, job);
	group->context.job = group->job;
	return LSHARD_OK;
}

/* By the caller's bootstrap, or the ranks that live and to whom this one comes back, or by the job's name. */
static lshard_status meet(lshard_group *group, const lshard_group_options *options, struct meeting *meeting,
			  lshard_error *error)
{
	static const lshard_bootstrap alone = {sizeof alone, alone_allgather, NULL};
	lshard_context *context = &group->context;
	lshard_discovered found = LSHARD_DISCOVERED_INIT;
	lshard_status status = keep_job(group, find_job(context, options, &found), error);

	if (status < 0)
		return status;
	context->bootstrap = options->bootstrap ? options->bootstrap : context->size == 1 ? &alone : NULL;
	if (context->bootstrap && !context->bootstrap->allgather)
		return lshard_fail(error, LSHARD_ERR_INVALID, "rank %d: a bootstrap needs an allgather", context->rank);
	if (!context->bootstrap && !context->job)
		return lshard_fail(error, LSHARD_ERR_INVALID,
				   "rank %d of %d has no way to find the others: give a bootstrap, a job name, or set "
				   "LAYERSHARD_JOB",
				   context->rank, context->size);
	if (context->bootstrap)
		return LSHARD_OK;
	if (context->rejoin)
		status = lshard__living_find(context, &meeting->living, error);
	context->living = meeting->living;
	if (status < 0 || meeting->living)
		return status;
	status = lshard__rendezvous_open(context, context->job, &meeting->rendezvous, &meeting->by_job, error);
	context->bootstrap = &meeting->by_job;
	return status;
}

static void part(lshard_group *group, struct meeting *meeting)
{
	lshard__rendezvous_close(meeting->rendezvous);
	lshard__living_close(meeting->living);
	group->context.bootstrap = NULL;
	group->context.living = NULL;
}

static void take_transport(lshard_group *group, bool returned)
{
	group->transport = lshard__stack_top(group->stack);
	group->bottom = lshard__stack_bottom(group->stack);
	group->returned = returned;
	if (group->context.rejoin)
		group->rejoin = group->bottom->ops->rejoin;
	if (returned)
		group->n_created = group->rejoin->note(group->bottom);
}

/* Opens the transport over whichever bootstrap there is; a rendezvous of ours is closed again. */
static lshard_status connect_ranks(lshard_group *group, const lshard_group_options *options, lshard_error *error)
{
	const char *variable;
	const char *spec = find_spec(options, &variable);
	struct meeting meeting = {.rendezvous = NULL};
	lshard_status status = meet(group, options, &meeting, error);

	if (status < 0)
		goto part;
	status = lshard__stack_open(&group->context, spec, options->custom_transport, &group->stack, error);
	if (status == LSHARD_ERR_TRANSPORT && meeting.rendezvous &&
	    lshard__rendezvous_failure(meeting.rendezvous) < 0) {
		/* The transport knows only that an all-gather failed. */
		status = lshard__rendezvous_failure(meeting.rendezvous);
		*error = *lshard__rendezvous_error(meeting.rendezvous);
	}
	if (variable && (status == LSHARD_ERR_INVALID || status == LSHARD_ERR_NOT_SUPPORTED))
		lshard_fail(error, status, "%s='%s': %s", variable, spec, error->text);
	if (status >= 0)
		take_transport(group, meeting.living != NULL);
part:
	part(group, &meeting);
	return status;
}

static void group_free(lshard_group *group)
{
	const lshard_allocator allocator = group->allocator;

	lshard__stack_close(group->stack);
	group_release(group, group->job);
	group_release(group, group->alive);
	group_release(group, group->records);
	lshard__process_close(&group->process);
	allocator.release(allocator.user, group);
}

static lshard_status allocate_group(const lshard_group_options *options, lshard_group **out)
{
	static const lshard_allocator libc = {sizeof libc, default_allocate, default_release, NULL};
	const lshard_allocator *allocator = options->allocator ? options->allocator : &libc;
	lshard_group *group;

	if (!allocator->allocate || !allocator->release)
		return LSHARD_ERR_INVALID;
	group = allocator->allocate(allocator->user, sizeof *group);
	if (!group)
		return LSHARD_ERR_NO_MEMORY;
	memset(group, 0, sizeof *group);
	lshard__process_open(&group->process);
	group->allocator = *allocator;
	group->log = options->log;
	group->log_user = options->log_user;
	group->log_level = options->log_level;
	atomic_init(&group->aborted, false);
	atomic_init(&group->n_series, 0);
	*out = group;
	return LSHARD_OK;
}

static lshard_status create(const lshard_group_options *options, lshard_group **out, lshard_error *error)
{
	lshard_group *group;
	lshard_status status = allocate_group(options, &group);

	if (status < 0)
		return lshard_fail(error, status,
				   status == LSHARD_ERR_INVALID ? "an allocator needs both allocate and release"
								: "no memory for a group");
	status = fill_context(group, options, error);
	if (status >= 0)
		status = connect_ranks(group, options, error);
	if (status < 0) {
		group->context.log(&group->context, LSHARD_LOG_ERROR, "%s: %s", lshard_status_name(status),
				   error->text);
		group_free(group);
		return status;
	}
	*out = group;
	return LSHARD_OK;
}

lshard_status lshard_group_create(const lshard_group_options *options, lshard_group **group)
{
	lshard_error error = {""};
	struct group_options taken;
	lshard_status status;

	if (!options || !group)
		return LSHARD_ERR_INVALID;
	status = options_take_group(&taken, options, &error);
	if (status >= 0)
		status = create(&taken.given, group, &error);
	if (status < 0 && taken.given.error && taken.given.error_bytes)
		snprintf(taken.given.error, taken.given.error_bytes, "%s", error.text);
	return status;
}

static lshard_status flush(lshard_group *group)
{
	lshard_transport *transport = group->transport;

	return transport->ops->flush ? transport->ops->flush(transport) : LSHARD_OK;
}

lshard_status lshard_group_flush(lshard_group *group)
{
	lshard_status status;

	if (!group)
		return LSHARD_ERR_INVALID;
	status = group_require_ours(group, "lshard_group_flush", &group->error);
	if (status < 0)
		return status;
	status = flush(group);
	return status < 0 ? lshard_fail(&group->error, status, "%s", group->transport->error.text) : LSHARD_OK;
}

lshard_status lshard_group_destroy(lshard_group *group)
{
	lshard_status status;

	if (!group)
		return LSHARD_OK;
	if (atomic_load(&group->n_series))
		return lshard_fail(&group->error, LSHARD_ERR_BUSY,
				   "rank %d: the group still has %u series: destroy them first", group->context.rank,
				   atomic_load(&group->n_series));
	status = group_is_ours(group) ? flush(group) : LSHARD_OK; /* a child's files are its parent's */
	if (status < 0)
		group->context.log(&group->context, LSHARD_LOG_ERROR, "%s: %s", lshard_status_name(status),
				   group->transport->error.text);
	group_free(group);
	return status;
}

void lshard_group_abort(lshard_group *group)
{
	if (!group || !group_is_ours(group)) /* a child's abort is not its parent's */
		return;
	atomic_store(&group->aborted, true);
	group->transport->ops->abort(group->transport);
}

int32_t lshard_group_rank(const lshard_group *group)
{
	return group->context.rank;
}

int32_t lshard_group_size(const lshard_group *group)
{
	return group->context.size;
}

const char *lshard_group_transport(const lshard_group *group)
{
	return lshard__stack_description(group->stack);
}

int lshard_group_returned(const lshard_group *group)
{
	return group->returned;
}

const char *lshard_group_error(const lshard_group *group)
{
	return group->error.text;
}

lshard_status group_require_ours(const lshard_group *group, const char *who, lshard_error *error)
{
	if (group_is_ours(group))
		return LSHARD_OK;
	return lshard_fail(error, LSHARD_ERR_STATE,
			   "%s: this process is a child by fork of process %d, which created the group: here it can "
			   "only be destroyed, which frees this process's copy and ends nothing for the rank",
			   who, (int)group->process.number);
}

/* ---- Agreement ---- */

static const char *step_name(uint64_t step)
{
	switch (step) {
	case STEP_CREATE:
		return "lshard_series_create";
	case STEP_OPENED:
		return "the second half of lshard_series_create";
	case STEP_COMMIT:
		return "lshard_series_commit";
	case STEP_ROUND:
	case STEP_READY:
		return "the loading of lshard_series_commit or _update_end";
	case STEP_UPDATE_BEGIN:
		return "lshard_series_update_begin";
	case STEP_UPDATE_READY:
		return "the second half of lshard_series_update_begin";
	case STEP_UPDATE_END:
		return "lshard_series_update_end";
	case STEP_REWIND:
		return "lshard_series_rewind";
	case STEP_VERIFY_BEGIN:
		return "lshard_series_verify";
	case STEP_VERIFY:
		return "the second half of lshard_series_verify";
	default:
		return "an unknown call";
	}
}

struct lshard__record_set group_records(const lshard_group *group, const void *first, size_t bytes, size_t call_bytes)
{
	return (struct lshard__record_set){.first = first,
					   .bytes = bytes,
					   .call_bytes = call_bytes,
					   .size = group->context.size,
					   .rank = group->context.rank,
					   .alive = group->alive};
}

lshard_status group_fail_missing(const lshard_group *group, const char *series, const char *what, lshard_error *error)
{
	struct lshard__ranks missing = lshard__ranks_absent(group->alive, group->context.size);

	return lshard_fail(error, LSHARD_ERR_PEER_FAILED, "rank %d, series '%s': %s %s gone, needed in %s",
			   group->context.rank, series, lshard__ranks_text(&missing), lshard__ranks_are(&missing),
			   what);
}

static lshard_status fail_elsewhere(const lshard_group *group, const struct call_record *mine,
				    struct lshard__verdict *verdict, lshard_error *error)
{
	const struct call_record *other = &group->records[verdict->rank];

	return lshard_fail(error, LSHARD_ERR_MISMATCH,
			   "rank %d is in %s of series '%s' while %s %s in %s of series '%s': all ranks make the same "
			   "collective calls in the same order",
			   group->context.rank, step_name(mine->step), mine->series,
			   lshard__ranks_text(&verdict->ranks), lshard__ranks_are(&verdict->ranks),
			   step_name(other->step), other->series);
}

/* Who only lost another rank lives: it is no news of it that a rank is gone, and the one that is may be known here. */
static lshard_status fail_failed(const lshard_group *group, const struct call_record *mine,
				 struct lshard__verdict *verdict, lshard_error *error)
{
	const lshard_status status = (lshard_status)verdict->status;
	const char *ranks = lshard__ranks_text(&verdict->ranks), *call = step_name(mine->step);
	struct lshard__ranks gone = lshard__ranks_absent(group->alive, group->context.size);

	if (!verdict->echo)
		return lshard_fail(error, status, "rank %d, series '%s': %s failed in %s: %s", group->context.rank,
				   mine->series, ranks, call, lshard_status_text(status));
	if (gone.count == 0)
		return lshard_fail(error, status,
				   "rank %d, series '%s': %s lost another rank in %s: the error there names it",
				   group->context.rank, mine->series, ranks, call);
	return lshard_fail(error, status, "rank %d, series '%s': %s %s gone, and %s needed %s in %s",
			   group->context.rank, mine->series, lshard__ranks_text(&gone), lshard__ranks_are(&gone),
			   ranks, gone.count > 1 ? "them" : "it", call);
}

/* What the records say of the other ranks: in another call than this one, fared badly; gone, unless they may miss. */
static lshard_status evaluate_records(lshard_group *group, const struct call_record *mine, bool may_miss,
				      lshard_error *error)
{
	const size_t call_bytes = offsetof(struct call_record, values) - sizeof mine->outcome;
	struct lshard__record_set set = group_records(group, group->records, sizeof *mine, call_bytes);
	struct lshard__verdict verdict;

	set.may_miss = may_miss;
	verdict = lshard__evaluate(&set);
	switch (verdict.finding) {
	case LSHARD__ELSEWHERE:
		return fail_elsewhere(group, mine, &verdict, error);
	case LSHARD__FAILED:
		return fail_failed(group, mine, &verdict, error);
	case LSHARD__MISSING:
		return group_fail_missing(group, mine->series, step_name(mine->step), error);
	case LSHARD__AGREED:
		break;
	}
	return LSHARD_OK;
}

static lshard_status agree(lshard_group *group, struct call_record *record, bool may_miss, lshard_error *error)
{
	lshard_transport *transport = group->transport;
	lshard_status status;

	record->outcome = lshard__outcome_of(record->outcome.status);
	status = transport->ops->exchange(transport, record, group->records, sizeof *record, group->alive);
	if (record->outcome.status < 0)
		return (lshard_status)record->outcome.status; /* the text is there already */
	if (status < 0)
		return lshard_fail(error, status, "rank %d, series '%s', %s: %s", group->context.rank, record->series,
				   step_name(record->step), transport->error.text);
	return evaluate_records(group, record, may_miss, error);
}

lshard_status group_agree(lshard_group *group, struct call_record record, lshard_error *error)
{
	return agree(group, &record, true, error);
}

lshard_status group_agree_all(lshard_group *group, struct call_record record, lshard_error *error)
{
	return agree(group, &record, false, error);
}
