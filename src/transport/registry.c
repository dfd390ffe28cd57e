/* SPDX-License-Identifier: Apache-2.0
 *
 * registry.c - which transports there are, which one a group takes, and how it is opened with what stands in front.
 * Their names stand in transports.h. Knows hosts and processes; knows nothing of layers.
 *
 * Every rank gives one record through the bootstrap and reads all others', so all come to the same choice or the same
 * refusal. While it is opened, and once it is, they tell each other whether all have got that far (gathering.h).
 */
#include "outside.h"
#include "greeting.h"
#include "gathering.h"
#include "host_identity.h"
#include "living.h"
#include "numa.h"
#include "sized.h"
#include "stack_spec.h"
#include "text_hash.h"
#include "transports.h"
#include "verdict.h"

#include <layershard/callbacks.h>
#include <layershard/plan.h>

#include <stdio.h>
#include <string.h>

/* ---- what there is ---- */

#define TRANSPORT(name, scope, memory) {&lshard__##name, scope, memory},
static const struct {
	const lshard_transport_ops *ops;
	enum lshard__scope scope;
	lshard_memory memory;
} transports[] = {LSHARD__TRANSPORTS(TRANSPORT)};

#define WRAPPER(name) &lshard__##name,
static const lshard_transport_ops *const wrappers[] = {LSHARD__WRAPPERS(WRAPPER)};

#define N_TRANSPORTS LSHARD__N_TRANSPORTS
#define N_WRAPPERS   LSHARD__N_WRAPPERS

static const lshard_transport_ops *find_wrapper(const char *name)
{
	for (int i = 0; i < N_WRAPPERS; i++)
		if (!strcmp(wrappers[i]->name, name))
			return wrappers[i];
	return NULL;
}

static int is_wrapper(const char *name)
{
	return find_wrapper(name) != NULL;
}

static int find_transport(const char *name)
{
	int found = N_TRANSPORTS - 1;

	while (found >= 0 && strcmp(transports[found].ops->name, name) != 0)
		found--;
	return found;
}

static int can_be_used(const lshard_transport_ops *ops, lshard_error *reason)
{
	return !ops->available || ops->available(reason);
}

lshard_status lshard_transport_info(uint32_t index, lshard_transport_information *information)
{
	lshard_transport_information found = LSHARD_TRANSPORT_INFORMATION_INIT;
	const lshard_transport_ops *ops;
	lshard_error reason = {{0}};

	if (index >= (uint32_t)N_TRANSPORTS)
		return LSHARD_ERR_RANGE;
	if (!information)
		return LSHARD_ERR_INVALID;
	ops = transports[index].ops;
	found.name = ops->name;
	found.summary = ops->summary;
	found.available = can_be_used(ops, &reason);
	if (!found.available)
		snprintf(found.reason, sizeof found.reason, "%.*s", (int)sizeof found.reason - 1, reason.text);
	found.collective = !!(ops->capabilities & LSHARD_CAP_COLLECTIVE);
	found.caller_memory = !!(ops->capabilities & LSHARD_CAP_CALLER_MEMORY);
	found.memory = transports[index].memory;
	return lshard__sized_give(information, &found, sizeof found, "lshard_transport_information", NULL);
}

/* ---- the record ---- */

#define RECORD_MAGIC 0x6c736361u /* of the greetings in front of the records */
#define WHY_BYTES    96

struct record {
	struct lshard__outcome outcome; /* failed: this rank cannot take part, and `text` says why */
	/* the same on all ranks, as far as the spec */
	int32_t size;
	int32_t memory;
	int32_t large_pages;
	int32_t numa;
	int32_t rejoin;
	int32_t unused;
	uint64_t spec_hash;
	char custom[32];
	char spec[96];
	uint64_t callbacks;              /* 1: the caller gave some, 2: that carry this memory */
	uint8_t available[N_TRANSPORTS]; /* 1: transports[i] is */
	uint64_t large_page_bytes;
	char text[256];
	char why[N_TRANSPORTS][WHY_BYTES]; /* why transports[i] is not available */
	struct host_identity host;
};

struct lshard__stack {
	const lshard_context *base;
	struct gathering gathering; /* of the ranks while all is opened */
	struct stack_spec spec;
	const lshard_transport_ops *custom;
	/* The transport's first, then the wrappers', inside out; the last is that of what the transport stands on. */
	lshard_context contexts[SPEC_WRAPPERS + 2];
	lshard_transport *bottom;
	lshard_transport *top;
	const lshard_transport_ops *chosen;
	enum lshard__scope scope; /* of it */
	int or_callback; /* it may be refused when it is opened: the caller's collectives carry layers as well */
	char because[64];
	char description[256];
	uint64_t large_page_bytes; /* what all ranks have, or 0 */
	char living_options[sizeof((struct living_words *)NULL)
				    ->options]; /* the transport's, of a rank that comes back */
};

/* The caller's collectives carry what the caller says they do. */
static int carries(int i, int32_t memory)
{
	return transports[i].scope == LSHARD__OF_CALLER || (int32_t)transports[i].memory == memory;
}

static void fill_available(struct record *record)
{
	for (int i = 0; i < N_TRANSPORTS; i++) {
		lshard_error reason = {{0}};

		if (!carries(i, record->memory))
			continue; /* no driver is loaded for nothing */
		if (can_be_used(transports[i].ops, &reason))
			record->available[i] = 1;
		else
			snprintf(record->why[i], WHY_BYTES, "%.*s", WHY_BYTES - 1, reason.text);
	}
}

/* @p failed: why this rank cannot take part; the others must hear it rather than wait. */
static void fill_record(struct record *record, const lshard__stack *stack, const char *spec, lshard_status failed,
			const lshard_error *error)
{
	memset(record, 0, sizeof *record);
	record->size = stack->base->size;
	record->memory = (int32_t)stack->base->memory;
	record->large_pages = (int32_t)stack->base->large_pages;
	record->numa = (int32_t)stack->base->numa;
	record->rejoin = stack->base->rejoin;
	record->large_page_bytes = stack->base->large_page_bytes;
	if (stack->base->callbacks)
		record->callbacks =
			record->memory == LSHARD_MEMORY_HOST || stack->base->callbacks->device != NULL ? 2 : 1;
	record->outcome.status = failed;
	record->spec_hash = lshard__text_hash(spec);
	snprintf(record->spec, sizeof record->spec, "%.*s", (int)sizeof record->spec - 1, spec);
	if (stack->custom && !failed)
		snprintf(record->custom, sizeof record->custom, "%.*s", (int)sizeof record->custom - 1,
			 stack->custom->name);
	if (failed)
		snprintf(record->text, sizeof record->text, "%.*s", (int)sizeof record->text - 1, error->text);
	fill_available(record);
	lshard__host_identify(&record->host);
}

static const char *large_pages_word(const struct record *record)
{
	return record->large_pages == LSHARD_LARGE_PAGES_NEVER     ? "never"
	       : record->large_pages == LSHARD_LARGE_PAGES_REQUIRE ? "require"
								   : "auto";
}

/* What tells rank @p rank from rank 0. */
static lshard_status compare(const struct record *first, const struct record *other, int rank, lshard_error *error)
{
	if (other->size != first->size)
		return lshard_fail(error, LSHARD_ERR_MISMATCH, "rank 0 was started for %d ranks, rank %d for %d",
				   (int)first->size, rank, (int)other->size);
	if (other->memory != first->memory)
		return lshard_fail(error, LSHARD_ERR_MISMATCH,
				   "rank 0 keeps layers in memory of kind %d, rank %d of kind %d", (int)first->memory,
				   rank, (int)other->memory);
	if (other->large_pages != first->large_pages)
		return lshard_fail(error, LSHARD_ERR_MISMATCH,
				   "rank 0 has %s for large_pages, rank %d %s (LAYERSHARD_LARGE_PAGES)",
				   large_pages_word(first), rank, large_pages_word(other));
	if (other->numa != first->numa)
		return lshard_fail(error, LSHARD_ERR_MISMATCH, "rank 0 has %s for numa, rank %d %s (LAYERSHARD_NUMA)",
				   numa_word((lshard_numa)first->numa), rank, numa_word((lshard_numa)other->numa));
	if (other->rejoin != first->rejoin)
		return lshard_fail(error, LSHARD_ERR_MISMATCH,
				   "rank 0 has %s for rejoin, rank %d %s (LAYERSHARD_REJOIN)",
				   first->rejoin ? "allow" : "never", rank, other->rejoin ? "allow" : "never");
	if (other->spec_hash != first->spec_hash)
		return lshard_fail(error, LSHARD_ERR_MISMATCH, "rank 0 asks for transport '%s', rank %d for '%s'",
				   first->spec, rank, other->spec);
	return lshard_fail(error, LSHARD_ERR_MISMATCH,
			   "rank 0 gives a transport '%s' of its own, rank %d '%s' ('': none)", first->custom, rank,
			   other->custom);
}

/* All ranks find the same first difference. */
static lshard_status compare_all(const struct record *records, int32_t size, lshard_error *error)
{
	const struct lshard__record_set set = {.first = records, .bytes = sizeof *records, .size = size};
	const struct lshard__verdict verdict = lshard__evaluate(&set);
	const int32_t other = lshard__first_differing(&set, offsetof(struct record, size),
						      offsetof(struct record, spec) - offsetof(struct record, size));

	if (verdict.finding == LSHARD__FAILED)
		return lshard_fail(error, (lshard_status)verdict.status, "rank %d: %s", (int)verdict.rank,
				   records[verdict.rank].text);
	return other < 0 ? LSHARD_OK : compare(&records[0], &records[other], (int)other, error);
}

/* ---- the choice ---- */

/* Why transports[i] cannot connect these ranks; 1 if it can. */
static int connects(int i, const struct record *records, int32_t size, char *why, size_t bytes)
{
	const char *name = transports[i].ops->name;
	const struct host_identity *first = &records[0].host;

	if (!carries(i, records[0].memory)) {
		snprintf(why, bytes, "%s carries %s memory only", name,
			 transports[i].memory == LSHARD_MEMORY_HOST ? "host" : "device");
		return 0;
	}
	for (int32_t rank = 0; rank < size; rank++) {
		const struct host_identity *other = &records[rank].host;

		why[0] = 0;
		if (!records[rank].available[i])
			snprintf(why, bytes, "%s is not available on rank %d: %s", name, (int)rank,
				 records[rank].why[i]);
		else if (transports[i].scope == LSHARD__OF_CALLER) {
			if (records[rank].callbacks < 2)
				snprintf(why, bytes, "%s needs callbacks%s in the group options, and rank %d has none",
					 name, records[0].memory == LSHARD_MEMORY_HOST ? "" : " for a device",
					 (int)rank);
		} else if (transports[i].scope == LSHARD__MET_BY_CALLER) {
			if (!records[rank].callbacks)
				snprintf(why, bytes, "%s needs callbacks in the group options, and rank %d has none",
					 name, (int)rank);
		} else if (transports[i].scope == LSHARD__SAME_PROCESS && !lshard__same_process(first, other))
			snprintf(why, bytes, "%s connects threads of one process, and ranks 0 and %d are two processes",
				 name, (int)rank);
		else if (!lshard__same_host(first, other))
			snprintf(why, bytes, "%s connects ranks of one host, and ranks 0 and %d are on two", name,
				 (int)rank);
		else if (first->network != other->network)
			snprintf(why, bytes, "%s needs one network namespace, and ranks 0 and %d are in two", name,
				 (int)rank);
		/* Between user namespaces numbers mean nothing: the system compares the users when ranks connect. */
		else if (first->users == other->users && first->user != other->user)
			snprintf(why, bytes, "%s connects ranks of one user, and ranks 0 and %d have two", name,
				 (int)rank);
		if (why[0])
			return 0;
	}
	return 1;
}

static const char *auto_reason(int i, int32_t size)
{
	if (size == 1)
		return "auto: one rank";
	if (transports[i].scope == LSHARD__OF_CALLER)
		return "auto: the caller's collectives";
	if (transports[i].scope == LSHARD__MET_BY_CALLER)
		return "auto: an NVLink domain";
	return transports[i].scope == LSHARD__SAME_PROCESS ? "auto: threads of one process"
							   : "auto: all ranks on one host";
}

/* The first of this scope. */
static int find_scope(enum lshard__scope scope)
{
	int found = 0;

	while (transports[found].scope != scope)
		found++;
	return found;
}

static void take(lshard__stack *stack, int i)
{
	stack->chosen = transports[i].ops;
	stack->scope = transports[i].scope;
}

static lshard_status choose_auto(lshard__stack *stack, const struct record *records, lshard_error *error)
{
	int32_t size = stack->base->size;
	char reasons[100 * N_TRANSPORTS] = "";
	char why[200];

	for (int i = 0; i < N_TRANSPORTS; i++) {
		size_t used = strlen(reasons);

		if (connects(i, records, size, why, sizeof why)) {
			take(stack, i);
			snprintf(stack->because, sizeof stack->because, "%s", auto_reason(i, size));
			stack->or_callback = transports[i].scope == LSHARD__MET_BY_CALLER &&
					     connects(find_scope(LSHARD__OF_CALLER), records, size, why, sizeof why);
			return LSHARD_OK;
		}
		snprintf(reasons + used, sizeof reasons - used, "%s%s", used ? "; " : "", why);
	}
	return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED, "no transport connects these %d ranks: %s", (int)size,
			   reasons);
}

static lshard_status choose(lshard__stack *stack, const struct record *records, lshard_error *error)
{
	char why[200];
	int i;

	snprintf(stack->because, sizeof stack->because, "as asked");
	if (stack->custom) {
		stack->chosen = stack->custom;
		snprintf(stack->because, sizeof stack->because, "the caller's own");
		return LSHARD_OK;
	}
	if (!strcmp(stack->spec.name, "auto"))
		return choose_auto(stack, records, error);
	i = find_transport(stack->spec.name);
	if (!connects(i, records, stack->base->size, why, sizeof why))
		return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED, "%s", why);
	take(stack, i);
	return LSHARD_OK;
}

/* A rank may not see what the system has (/sys is hidden in some sandboxes); layers are cut alike on all. */
static lshard_status agree_on_pages(lshard__stack *stack, const struct record *records, lshard_error *error)
{
	stack->large_page_bytes = records[0].large_page_bytes;
	for (int32_t rank = 0; rank < stack->base->size; rank++) {
		if (records[rank].large_page_bytes == 0 && stack->base->large_pages == LSHARD_LARGE_PAGES_REQUIRE &&
		    stack->base->memory == LSHARD_MEMORY_HOST)
			return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED,
					   "rank %d: large pages are required, and its system has none that it can see "
					   "(/sys/kernel/mm/transparent_hugepage, Hugepagesize in /proc/meminfo)",
					   (int)rank);
		if (records[rank].large_page_bytes != stack->large_page_bytes)
			stack->large_page_bytes = 0;
	}
	return LSHARD_OK;
}

/* One rank's shard needs no more than that its own thread writes to it first. */
static lshard_status check_placing(const lshard__stack *stack, lshard_error *error)
{
	const lshard_numa numa = stack->base->numa;

	if (numa <= LSHARD_NUMA_NONE || stack->base->memory != LSHARD_MEMORY_HOST ||
	    stack->chosen->capabilities & LSHARD_CAP_PLACES ||
	    (stack->base->size == 1 && numa != LSHARD_NUMA_INTERLEAVE))
		return LSHARD_OK;
	return lshard_fail(
		error, LSHARD_ERR_NOT_SUPPORTED,
		"numa is '%s', and the transport %s places nothing on nodes: take shm, or leave numa at 'none' "
		"(LAYERSHARD_NUMA)",
		numa_word(numa), stack->chosen->name);
}

/* Copies of shards for a node are shards of nobody: who makes them may not come back. */
static lshard_status check_rejoin(const lshard__stack *stack, lshard_error *error)
{
	if (!stack->base->rejoin)
		return LSHARD_OK;
	if (!stack->chosen->rejoin)
		return lshard_fail(
			error, LSHARD_ERR_NOT_SUPPORTED,
			"rejoin is asked for (LAYERSHARD_REJOIN), and ranks cannot come back over the transport "
			"%s: take shm, or leave it",
			stack->chosen->name);
	if (stack->base->numa == LSHARD_NUMA_COPY)
		return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED,
				   "rejoin is asked for (LAYERSHARD_REJOIN), and ranks cannot come back where numa is "
				   "'copy' (LAYERSHARD_NUMA): choose one of them");
	return LSHARD_OK;
}

/* ---- coming back ---- */

static lshard_status differs(const lshard__stack *stack, const char *what, lshard_error *error)
{
	return lshard_fail(error, LSHARD_ERR_MISMATCH,
			   "rank %d comes back to job '%s' with another %s than its ranks that live",
			   (int)stack->base->rank, stack->base->job, what);
}

/* What the ranks that live have chosen is this rank's choice. */
static lshard_status take_living(lshard__stack *stack, const char *text, lshard_error *error)
{
	const lshard_context *base = stack->base;
	const struct living_words *words = &base->living->words;
	struct stack_spec *spec = &stack->spec;
	const int i = find_transport(words->transport);
	const int automatic = spec->name && !strcmp(spec->name, "auto");

	if (words->memory != (int32_t)base->memory)
		return differs(stack, "kind of memory", error);
	if (words->large_pages != (int32_t)base->large_pages)
		return differs(stack, "choice of large pages", error);
	if (words->numa != (int32_t)base->numa)
		return differs(stack, "choice of NUMA nodes", error);
	if (i < 0 || !spec->name ||
	    (!automatic && (strcmp(spec->name, words->transport) != 0 || strcmp(spec->options, words->options) != 0)))
		return lshard_fail(
			error, LSHARD_ERR_MISMATCH,
			"rank %d comes back to job '%s' by transport '%s', and its ranks that live have '%s%s%s'",
			(int)base->rank, base->job, text ? text : "the caller's own", words->transport,
			words->options[0] ? ":" : "", words->options);
	memcpy(stack->living_options, words->options, sizeof words->options);
	spec->name = transports[i].ops->name;
	spec->options = stack->living_options;
	stack->large_page_bytes = words->large_page_bytes;
	take(stack, i);
	snprintf(stack->because, sizeof stack->because, "as the ranks that live");
	return LSHARD_OK;
}

/* ---- checks before anybody is told anything ---- */

static lshard_status check_name(const struct stack_spec *spec, lshard_error *error)
{
	char known[32 * (1 + N_TRANSPORTS + N_WRAPPERS)] = "auto";

	if (!spec->name || find_transport(spec->name) >= 0)
		return LSHARD_OK;
	if (!strcmp(spec->name, "auto"))
		return spec->options[0]
			       ? lshard_fail(error, LSHARD_ERR_INVALID, "auto takes no options ('%s')", spec->options)
			       : LSHARD_OK;
	for (int i = 0; i < N_TRANSPORTS; i++)
		snprintf(known + strlen(known), sizeof known - strlen(known), ", %s", transports[i].ops->name);
	for (int i = 0; i < N_WRAPPERS; i++)
		if (can_be_used(wrappers[i], NULL))
			snprintf(known + strlen(known), sizeof known - strlen(known),
				 "%s%s=", i ? ", " : "; in front of it ", wrappers[i]->name);
	return lshard_fail(error, LSHARD_ERR_INVALID, "there is no transport '%s'; known are %s", spec->name, known);
}

static lshard_status check_wrappers(const struct stack_spec *spec, lshard_error *error)
{
	for (int i = 0; i < spec->n_wrappers; i++)
		if (!can_be_used(find_wrapper(spec->wrappers[i].name), error))
			return LSHARD_ERR_NOT_SUPPORTED;
	return LSHARD_OK;
}

static const char *missing_function(const lshard_transport_ops *ops)
{
	const struct {
		const char *name;
		int there;
	} needed[] = {
		{"open", ops->open != NULL},
		{"close", ops->close != NULL},
		{"exchange", ops->exchange != NULL},
		{"abort", ops->abort != NULL},
		{"store_open", ops->store_open != NULL},
		{"store_close", ops->store_close != NULL},
		{"shard", ops->shard != NULL},
		{"buffer", ops->buffer != NULL},
		{"peer", ops->peer || !(ops->capabilities & LSHARD_CAP_DIRECT)},
		{"fetch", ops->fetch != NULL},
		{"wait", ops->wait != NULL},
		{"record_use", ops->record_use || !(ops->capabilities & LSHARD_CAP_STREAMS)},
		{"join", ops->join != NULL},
		{"capture", ops->capture || !(ops->capabilities & LSHARD_CAP_CAPTURE)},
		{"drain", ops->drain != NULL},
		{"read", ops->read != NULL},
	};

	for (size_t i = 0; i < sizeof needed / sizeof needed[0]; i++)
		if (!needed[i].there)
			return needed[i].name;
	return NULL;
}

/* A table that somebody else wrote: look before calling through it. */
static lshard_status check_custom(const lshard_transport_ops *ops, lshard_error *error)
{
	const char *missing;

	if (ops->struct_size < sizeof *ops || ops->abi != LSHARD_TRANSPORT_ABI)
		return lshard_fail(
			error, LSHARD_ERR_INVALID,
			"the transport of the caller has ABI %u and %zu bytes; this library needs %u and %zu",
			(unsigned)ops->abi, ops->struct_size, LSHARD_TRANSPORT_ABI, sizeof *ops);
	if (!ops->name || !ops->name[0])
		return lshard_fail(error, LSHARD_ERR_INVALID, "the transport of the caller has no name");
	missing = missing_function(ops);
	if (missing)
		return lshard_fail(error, LSHARD_ERR_INVALID, "transport '%s' of the caller has no function %s",
				   ops->name, missing);
	if (ops->granule_bytes == 0 || (ops->granule_bytes & (ops->granule_bytes - 1)))
		return lshard_fail(error, LSHARD_ERR_INVALID,
				   "transport '%s' of the caller: granule_bytes %llu is no power of two", ops->name,
				   (unsigned long long)ops->granule_bytes);
	if (!can_be_used(ops, error))
		return LSHARD_ERR_NOT_SUPPORTED;
	return LSHARD_OK;
}

static lshard_status check_spec(lshard__stack *stack, const char *text, lshard_error *error)
{
	lshard_status status = lshard__stack_spec_parse(&stack->spec, text, stack->custom != NULL, is_wrapper, error);

	if (status == LSHARD_OK)
		status = check_name(&stack->spec, error);
	if (status == LSHARD_OK)
		status = check_wrappers(&stack->spec, error);
	if (status == LSHARD_OK && stack->custom)
		status = check_custom(stack->custom, error);
	return status;
}

static lshard_status compare_greetings(const struct lshard__greeting *greetings, int32_t size, lshard_error *error)
{
	lshard_status status = LSHARD_OK;
	char other[32];

	for (int32_t rank = 1; rank < size && status == LSHARD_OK; rank++) {
		snprintf(other, sizeof other, "rank %d", (int)rank);
		status = lshard__greeting_compare(&greetings[0], &greetings[rank], "rank 0", other, error);
	}
	return status;
}

/* The records of another build may have another length, which the caller's all-gather need not survive: greet first. */
static lshard_status greet(const lshard_context *base, lshard_error *error)
{
	const struct lshard__greeting mine =
		lshard__greeting_make(RECORD_MAGIC, sizeof(struct record), LSHARD_EXCHANGE_BYTES);
	struct lshard__greeting *greetings = base->allocate(base, (size_t)base->size * sizeof *greetings);
	lshard_status status;
	int failed;

	if (!greetings)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "no memory for the greetings of %d ranks",
				   (int)base->size);
	failed = base->bootstrap->allgather(base->bootstrap->user, &mine, greetings, sizeof mine);
	status = failed ? lshard_fail(error, LSHARD_ERR_TRANSPORT, "the bootstrap's all-gather returned %d", failed)
			: compare_greetings(greetings, base->size, error);
	base->release(base, greetings);
	return status;
}

/* What others write ends where it ends here, and a failure is one. */
static void tame_records(struct record *records, int32_t size)
{
	for (int32_t rank = 0; rank < size; rank++) {
		if (records[rank].outcome.status > 0)
			records[rank].outcome.status = LSHARD_ERR_TRANSPORT;
		records[rank].spec[sizeof records->spec - 1] = 0;
		records[rank].custom[sizeof records->custom - 1] = 0;
		records[rank].text[sizeof records->text - 1] = 0;
		for (int i = 0; i < N_TRANSPORTS; i++)
			records[rank].why[i][WHY_BYTES - 1] = 0;
	}
}

static lshard_status agree(lshard__stack *stack, const char *text, lshard_status checked, lshard_error *error)
{
	const lshard_context *base = stack->base;
	size_t size = (size_t)base->size;
	struct record *records = base->allocate(base, (size + 1) * sizeof *records);
	lshard_status status;
	int failed;

	if (!records)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "no memory for the records of %d ranks",
				   (int)base->size);
	status = greet(base, checked == LSHARD_OK ? error : NULL);
	if (status != LSHARD_OK) {
		base->release(base, records);
		return checked == LSHARD_OK ? status : checked;
	}
	fill_record(&records[size], stack, text ? text : "", checked, error);
	failed = base->bootstrap->allgather(base->bootstrap->user, &records[size], records, sizeof *records);
	tame_records(records, base->size);
	if (checked != LSHARD_OK)
		status = checked; /* with its own text, whatever the others have */
	else if (failed)
		status = lshard_fail(error, LSHARD_ERR_TRANSPORT, "the bootstrap's all-gather returned %d", failed);
	else
		status = compare_all(records, base->size, error);
	if (status == LSHARD_OK)
		status = agree_on_pages(stack, records, error);
	if (status == LSHARD_OK)
		status = choose(stack, records, error);
	if (status == LSHARD_OK)
		status = check_placing(stack, error);
	if (status == LSHARD_OK)
		status = check_rejoin(stack, error);
	base->release(base, records);
	return status;
}

/* ---- opening ---- */

static lshard_context *context_for(lshard__stack *stack, int i, const char *options)
{
	stack->contexts[i] = *stack->base;
	stack->contexts[i].options = options;
	stack->contexts[i].large_page_bytes = stack->large_page_bytes;
	stack->contexts[i].bootstrap = stack->base->living ? NULL : &stack->gathering.bootstrap;
	return &stack->contexts[i];
}

static lshard_status open_wrappers(lshard__stack *stack, lshard_error *error)
{
	int n = stack->spec.n_wrappers;

	for (int i = n - 1; i >= 0; i--) {
		const lshard_transport_ops *ops = find_wrapper(stack->spec.wrappers[i].name);
		const lshard_context *context = context_for(stack, n - i, stack->spec.wrappers[i].options);
		lshard_status status = ops->open(context, stack->top, &stack->top, error);

		if (status != LSHARD_OK)
			return status;
	}
	return LSHARD_OK;
}

static void describe(lshard__stack *stack)
{
	const struct stack_spec *spec = &stack->spec;
	const int own = stack->bottom->ops->summary != stack->chosen->summary;
	char *text = stack->description;
	size_t room = sizeof stack->description;

	for (int i = 0; i < spec->n_wrappers; i++)
		snprintf(text + strlen(text), room - strlen(text), "%s%s%s,", spec->wrappers[i].name,
			 spec->wrappers[i].options[0] ? "=" : "", spec->wrappers[i].options);
	/* A group's own table may have a summary of its own: what was found out when it was connected. */
	snprintf(text + strlen(text), room - strlen(text), "%s%s%s (%s%s%s)", stack->chosen->name,
		 spec->options[0] ? ":" : "", spec->options, stack->because, own ? "; " : "",
		 own ? stack->bottom->ops->summary : "");
	stack->base->log(stack->base, LSHARD_LOG_INFO, "transport: %s", text);
	if (stack->base->memory == LSHARD_MEMORY_HOST)
		numa_tell(stack->base);
}

/* By the caller's collectives: for records alone, unless they can carry layers too. */
static lshard_status open_inner(lshard__stack *stack, lshard_transport **inner, lshard_error *error)
{
	lshard_context *context = &stack->contexts[SPEC_WRAPPERS + 1];

	context_for(stack, SPEC_WRAPPERS + 1, "");
	if (!stack->or_callback)
		context->memory = LSHARD_MEMORY_HOST;
	return transports[find_scope(LSHARD__OF_CALLER)].ops->open(context, NULL, inner, error);
}

/* What "auto" took cannot be had here, as all ranks know: what it stands on carries the layers itself. */
static lshard_status fall_back(lshard__stack *stack, lshard_transport *inner, const lshard_error *error)
{
	const int callback = find_scope(LSHARD__OF_CALLER);

	stack->base->log(stack->base, LSHARD_LOG_INFO, "rank %d: %s is not used: %s", (int)stack->base->rank,
			 stack->chosen->name, error->text);
	take(stack, callback);
	snprintf(stack->because, sizeof stack->because, "%s", auto_reason(callback, stack->base->size));
	stack->bottom = inner;
	return LSHARD_OK;
}

static lshard_status open_bottom(lshard__stack *stack, lshard_error *error)
{
	const lshard_context *context = context_for(stack, 0, stack->spec.options);
	lshard_transport *inner = NULL;
	lshard_status status = LSHARD_OK;

	if (!stack->custom && stack->scope == LSHARD__MET_BY_CALLER)
		status = open_inner(stack, &inner, error);
	if (status == LSHARD_OK)
		status = stack->chosen->open(context, inner, &stack->bottom, error);
	if (status == LSHARD_OK || !inner)
		return status;
	if (status == LSHARD_ERR_NOT_SUPPORTED && stack->or_callback)
		return fall_back(stack, inner, error);
	inner->ops->close(inner);
	return status;
}

static lshard_status open_all(lshard__stack *stack, lshard_error *error)
{
	lshard_status status = open_bottom(stack, error);

	if (status == LSHARD_OK) {
		stack->top = stack->bottom;
		status = open_wrappers(stack, error);
	}
	if (!stack->base->living)
		status = gathering_conclude(&stack->gathering, status, error); /* all ranks have a group, or none */
	if (status == LSHARD_OK)
		describe(stack);
	return status;
}

lshard_status lshard__stack_open(const lshard_context *base, const char *spec, const lshard_transport_ops *custom,
				 lshard__stack **stack, lshard_error *error)
{
	lshard__stack *made = base->allocate(base, sizeof *made);
	lshard_error discarded = {{0}};
	lshard_status status;

	error = error ? error : &discarded;
	if (!made)
		return lshard_fail(error, LSHARD_ERR_NO_MEMORY, "no memory for a transport");
	made->base = base;
	made->custom = custom;
	status = gathering_open(&made->gathering, base, error);
	if (status == LSHARD_OK)
		status = check_spec(made, spec, error);
	if (!base->living)
		status = agree(made, spec, status, error);
	else if (status == LSHARD_OK)
		status = take_living(made, spec, error);
	if (status == LSHARD_OK && base->living)
		status = check_rejoin(made, error);
	if (status == LSHARD_OK)
		status = open_all(made, error);
	gathering_close(&made->gathering);
	for (int i = 0; i < SPEC_WRAPPERS + 2; i++)
		made->contexts[i].living = NULL;
	if (status != LSHARD_OK) {
		lshard__stack_close(made);
		return status;
	}
	*stack = made;
	return LSHARD_OK;
}

lshard_transport *lshard__stack_top(lshard__stack *stack)
{
	return stack->top;
}

lshard_transport *lshard__stack_bottom(lshard__stack *stack)
{
	return stack->bottom;
}

const char *lshard__stack_description(const lshard__stack *stack)
{
	return stack->description;
}

/* Closing the outermost wrapper closes all it stands in front of. */
void lshard__stack_close(lshard__stack *stack)
{
	if (!stack)
		return;
	if (stack->top)
		stack->top->ops->close(stack->top);
	stack->base->release(stack->base, stack);
}
