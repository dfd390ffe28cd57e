/* SPDX-License-Identifier: Apache-2.0
 *
 * faults.c - `faults=[rR.]CALL@K=ACTION[+...]`: makes calls of the transport go wrong, for tests of what stands on it.
 * CALL is open, exchange, store_open, fetch, wait, read, join or drain; K counts its calls on this rank from 1, `*` is
 * every one; `r1.` means rank 1 only. ACTION is fail, timeout, peer (the call fails with that status), delay:MS, or
 * flip (after a wait or a read, one bit of what arrived is turned). Collective opens are carried out and then undone,
 * so that a fault on one rank is seen as that by the others.
 */
#include "transports.h"
#include "wrapper.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum call { OPEN, EXCHANGE, STORE_OPEN, FETCH, WAIT, READ, JOIN, DRAIN, CALLS };

static const char *const call_names[CALLS] = {"open", "exchange", "store_open", "fetch",
					      "wait", "read",     "join",       "drain"};

enum action { FAIL, TIMEOUT, PEER, DELAY, FLIP, ACTIONS };

static const char *const action_names[ACTIONS] = {"fail", "timeout", "peer", "delay", "flip"};

#define ANY UINT64_MAX

struct rule {
	uint64_t rank; /* ANY: all */
	enum call call;
	uint64_t number; /* ANY: every call */
	enum action action;
	uint64_t delay_ms;
};

struct faults {
	struct lshard__wrapper wrapper;
	struct rule *rules;
	size_t n_rules;
	atomic_uint_least64_t calls[CALLS]; /* made so far */
};

struct faults_store {
	struct lshard__wrapper_store wrapper;
	uint32_t *positions; /* [buffers] of the last fetch into each */
};

static struct faults *faults_of(lshard_transport *transport)
{
	return (struct faults *)transport;
}

static struct faults_store *store_of(lshard_store *store)
{
	return (struct faults_store *)store;
}

/* ---- Rules ----------------------------------------------------------------------------------------------------- */

/* The number at *text, which ends before @p end; *text moves behind it. */
static bool read_number(const char **text, const char *end, uint64_t *number)
{
	const char *begin = *text;

	*number = 0;
	while (*text < end && **text >= '0' && **text <= '9' && *text - begin < 18)
		*number = *number * 10 + (uint64_t)(*(*text)++ - '0');
	return *text > begin;
}

/* The first name of the list that *text begins with; *text moves behind it. Returns @p count if there is none. */
static int read_name(const char **text, const char *end, const char *const *names, int count)
{
	for (int i = 0; i < count; i++) {
		size_t length = strlen(names[i]);

		if ((size_t)(end - *text) >= length && memcmp(*text, names[i], length) == 0) {
			*text += length;
			return i;
		}
	}
	return count;
}

static bool read_sign(const char **text, const char *end, char sign)
{
	return *text < end && *(*text)++ == sign;
}

static bool read_rule(struct rule *rule, const char *text, const char *end)
{
	*rule = (struct rule){.rank = ANY, .number = ANY};
	if (text < end && *text == 'r' && end - text > 1 && text[1] >= '0' && text[1] <= '9') {
		text++;
		if (!read_number(&text, end, &rule->rank) || !read_sign(&text, end, '.'))
			return false;
	}
	rule->call = (enum call)read_name(&text, end, call_names, CALLS);
	if (rule->call == CALLS || !read_sign(&text, end, '@'))
		return false;
	if (text < end && *text == '*')
		text++;
	else if (!read_number(&text, end, &rule->number) || rule->number == 0)
		return false;
	if (!read_sign(&text, end, '='))
		return false;
	rule->action = (enum action)read_name(&text, end, action_names, ACTIONS);
	if (rule->action == ACTIONS || (rule->action == FLIP && rule->call != WAIT && rule->call != READ))
		return false;
	if (rule->action == DELAY && !(read_sign(&text, end, ':') && read_number(&text, end, &rule->delay_ms)))
		return false;
	return text == end;
}

static lshard_status read_rules(struct faults *faults, const char *options, lshard_error *error)
{
	for (const char *text = options; text;) {
		const char *end = text + strcspn(text, "+");

		if (!read_rule(&faults->rules[faults->n_rules++], text, end))
			return lshard_fail(
				error, LSHARD_ERR_INVALID,
				"faults: '%.*s' is no [rR.]CALL@K=ACTION; calls: open, exchange, store_open, fetch, "
				"wait, read, join, drain; actions: fail, timeout, peer, delay:MS, and flip for wait "
				"and read",
				(int)(end - text), text);
		text = *end == '+' ? end + 1 : NULL;
	}
	return LSHARD_OK;
}

/* ---- Doing it -------------------------------------------------------------------------------------------------- */

static void sleep_ms(uint64_t milliseconds)
{
	struct timespec left = {(time_t)(milliseconds / 1000u), (long)(milliseconds % 1000u * 1000000u)};

	while (nanosleep(&left, &left) != 0)
		continue;
}

static lshard_status fail_as(const struct faults *faults, const struct rule *rule, uint64_t number, lshard_error *error)
{
	static const lshard_status statuses[] = {LSHARD_ERR_TRANSPORT, LSHARD_ERR_TIMEOUT, LSHARD_ERR_PEER_FAILED};

	return lshard_fail(error, statuses[rule->action], "fault injected: %s number %llu on rank %d",
			   call_names[rule->call], (unsigned long long)number, (int)faults->wrapper.base.context->rank);
}

/* Count this call and do what the rules say of it; the status it must fail with, or OK. */
static lshard_status apply_faults(struct faults *faults, enum call call, bool *flip, lshard_error *error)
{
	uint64_t number = atomic_fetch_add(&faults->calls[call], 1) + 1;
	uint64_t rank = (uint64_t)faults->wrapper.base.context->rank;
	lshard_status status = LSHARD_OK;

	*flip = false;
	for (size_t i = 0; i < faults->n_rules; i++) {
		const struct rule *rule = &faults->rules[i];

		if (rule->call != call || (rule->rank != ANY && rule->rank != rank) ||
		    (rule->number != ANY && rule->number != number))
			continue;
		if (rule->action == DELAY)
			sleep_ms(rule->delay_ms);
		else if (rule->action == FLIP)
			*flip = true;
		else if (status == LSHARD_OK)
			status = fail_as(faults, rule, number, error);
	}
	return status;
}

/* The processor turns the bit, when the bytes are there: not in device memory, nor on a stream. */
static lshard_status check_flips(const struct faults *faults, lshard_error *error)
{
	const bool streams = faults->wrapper.inner->ops->capabilities & LSHARD_CAP_STREAMS;

	for (size_t i = 0; i < faults->n_rules; i++)
		if (streams && faults->rules[i].action == FLIP)
			return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED,
					   "faults: flip is for transports in host memory, not for %s",
					   faults->wrapper.inner->ops->name);
	return LSHARD_OK;
}

static void flip_bit(void *bytes)
{
	*(unsigned char *)bytes ^= 1u;
}

/* ---- The transport --------------------------------------------------------------------------------------------- */

static void faults_free(struct faults *faults)
{
	const lshard_context *context = faults->wrapper.base.context;

	context->release(context, faults->rules);
	lshard__wrapper_free(faults);
}

static lshard_status faults_open(const lshard_context *context, lshard_transport *inner, lshard_transport **transport,
				 lshard_error *error)
{
	struct faults *faults = lshard__wrapper_new(context, inner, &lshard__faults, sizeof *faults, error);
	lshard_status status;
	bool flip;

	if (!faults)
		return LSHARD_ERR_NO_MEMORY;
	/* every rule has a '@' of its own, or is an error */
	faults->rules = context->allocate(context, (strlen(context->options) / 2 + 1) * sizeof faults->rules[0]);
	if (!faults->rules)
		status = lshard_fail(error, LSHARD_ERR_NO_MEMORY, "faults: no memory for the rules");
	else
		status = read_rules(faults, context->options, error);
	if (status == LSHARD_OK)
		status = check_flips(faults, error);
	if (status == LSHARD_OK)
		status = apply_faults(faults, OPEN, &flip, error);
	if (status < 0) {
		faults_free(faults);
		return status;
	}
	*transport = &faults->wrapper.base;
	return LSHARD_OK;
}

static void faults_close(lshard_transport *transport)
{
	transport->context->release(transport->context, faults_of(transport)->rules);
	lshard__wrapper_close(transport);
}

static lshard_status faults_exchange(lshard_transport *transport, const void *send, void *receive, size_t bytes,
				     uint8_t *alive)
{
	bool flip;
	lshard_status status = apply_faults(faults_of(transport), EXCHANGE, &flip, &transport->error);

	return status < 0 ? status : lshard__wrapper_exchange(transport, send, receive, bytes, alive);
}

static lshard_status faults_store_open(lshard_transport *transport, const lshard_store_plan *plan,
				       lshard_store **opened)
{
	const lshard_context *context = transport->context;
	struct faults_store *store;
	bool flip;
	lshard_status status = lshard__wrapper_store_new(transport, plan, sizeof *store, &store);

	if (status < 0)
		return status;
	store->positions = context->allocate(context, (plan->buffers + (size_t)1) * sizeof store->positions[0]);
	if (!store->positions)
		status = lshard_fail(&transport->error, LSHARD_ERR_NO_MEMORY, "faults: no memory for series '%s'",
				     plan->name);
	else
		status = apply_faults(faults_of(transport), STORE_OPEN, &flip, &transport->error);
	if (status < 0) {
		context->release(context, store->positions);
		lshard__wrapper_store_close(&store->wrapper.base);
		return status;
	}
	*opened = &store->wrapper.base;
	return LSHARD_OK;
}

static void faults_store_close(lshard_store *base)
{
	base->transport->context->release(base->transport->context, store_of(base)->positions);
	lshard__wrapper_store_close(base);
}

/* ---- Transfers ------------------------------------------------------------------------------------------------- */

static lshard_status faults_fetch(lshard_store *base, uint32_t position, uint32_t buffer, void *stream,
				  uint64_t sequence)
{
	bool flip;
	lshard_status status = apply_faults(faults_of(base->transport), FETCH, &flip, &base->error);

	if (status < 0)
		return status;
	if (buffer != LSHARD_NO_BUFFER)
		store_of(base)->positions[buffer] = position;
	return lshard__wrapper_fetch(base, position, buffer, stream, sequence);
}

static lshard_status faults_wait(lshard_store *base, uint32_t buffer, void *stream, lshard_arrival *arrival)
{
	bool flip;
	lshard_status status = apply_faults(faults_of(base->transport), WAIT, &flip, &base->error);

	if (status == LSHARD_OK)
		status = lshard__wrapper_wait(base, buffer, stream, arrival);
	if (status == LSHARD_OK && flip)
		flip_bit(lshard__wrapper_buffer(base, buffer, store_of(base)->positions[buffer]));
	return status;
}

static lshard_status faults_join(lshard_store *base, void *stream)
{
	bool flip;
	lshard_status status = apply_faults(faults_of(base->transport), JOIN, &flip, &base->error);

	return status < 0 ? status : lshard__wrapper_join(base, stream);
}

static lshard_status faults_drain(lshard_store *base)
{
	bool flip;
	lshard_status status = apply_faults(faults_of(base->transport), DRAIN, &flip, &base->error);

	return status < 0 ? status : lshard__wrapper_drain(base);
}

static lshard_status faults_read(lshard_store *base, uint32_t position, void *destination)
{
	bool flip;
	lshard_status status = apply_faults(faults_of(base->transport), READ, &flip, &base->error);

	if (status == LSHARD_OK)
		status = lshard__wrapper_read(base, position, destination);
	if (status == LSHARD_OK && flip && destination)
		flip_bit(destination);
	return status;
}

const lshard_transport_ops lshard__faults = {
	.struct_size = sizeof(lshard_transport_ops),
	.abi = LSHARD_TRANSPORT_ABI,
	.name = "faults",
	.summary = "faults=[rR.]CALL@K=fail|timeout|peer|delay:MS|flip, joined by '+': make calls go wrong; for tests",
	.open = faults_open,
	.close = faults_close,
	.exchange = faults_exchange,
	.store_open = faults_store_open,
	.store_close = faults_store_close,
	.fetch = faults_fetch,
	.wait = faults_wait,
	.join = faults_join,
	.drain = faults_drain,
	.read = faults_read,
};
