/* SPDX-License-Identifier: Apache-2.0
 *
 * rank_work.c - see rank_work.h.
 * Knows: the library, the engine, the socket to whoever started it. Does not know: processes, threads, what is
 * printed of its work.
 */
#include "rank_work.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "process_memory.h"
#include "rank_messages.h"

#define MOST_DIFFERING 16 /* times in a row: the second time is well already, unless something is broken */

struct rank {
	const struct rank_task *task;
	struct cli_log log;
	lshard_group *group; /* NULL: replicated */
	engine *engine;
	uint64_t total_ns;
};

/* What the library cannot know to say: which of this program's options are meant. */
static const char *next_step(lshard_status status)
{
	switch (status) {
	case LSHARD_ERR_MISMATCH:
		return "; give all ranks the same options and the same model";
	case LSHARD_ERR_TIMEOUT:
		return "; see whether that rank was started and still runs; LAYERSHARD_TIMEOUT_MS sets how long to "
		       "wait";
	default:
		return "";
	}
}

/* Texts of the library mostly begin with the rank they are about, this one or another. */
static bool names_a_rank(const char *text)
{
	return strncmp(text, "rank ", 5) == 0 && text[5] >= '0' && text[5] <= '9';
}

static void send_failure(const struct rank *rank, lshard_status status, bool is_usage, const char *text)
{
	const struct rank_failed fixed = {is_usage};
	const char *why = *text ? text : lshard_status_text(status);
	char prefix[32] = "";
	char message[768];
	int bytes;

	if (!names_a_rank(why))
		(void)snprintf(prefix, sizeof prefix, "rank %d: ", rank->task->rank);
	bytes = snprintf(message, sizeof message, "%s%s%s", prefix, why, next_step(status));
	(void)rank_send(rank->task->socket, RANK_FAILED, &fixed, message,
			bytes < (int)sizeof message ? (size_t)bytes : sizeof message - 1);
}

/* ---- Loading ----------------------------------------------------------------------------------------------------- */

static bool join_group(struct rank *rank)
{
	const struct rank_options *given = rank->task->options;
	lshard_group_options options = LSHARD_GROUP_OPTIONS_INIT;
	char error[512] = "";
	lshard_status status;

	if (!given->one_of_job) { /* else both stay -1: the library finds the same, and logs where */
		options.rank = rank->task->rank;
		options.size = (int32_t)given->ranks;
	}
	options.transport = given->spec;
	options.job = *given->job ? given->job : NULL;
	options.timeout_ms = given->timeout_ms;
	options.error = error;
	options.error_bytes = sizeof error;
	cli_log_attach(&rank->log, &options);
	status = lshard_group_create(&options, &rank->group);
	if (status < 0)
		send_failure(rank, status, status == LSHARD_ERR_INVALID, error);
	return status >= 0;
}

static bool load_model(struct rank *rank)
{
	const struct rank_options *given = rank->task->options;
	engine_options options = ENGINE_OPTIONS_INIT;
	engine_error error = {""};
	lshard_status status;

	options.model = given->model;
	options.group = rank->group;
	options.prefetch = given->prefetch;
	options.placement = given->placement;
	options.resident_bytes = given->resident_bytes;
	status = engine_open(&options, &rank->engine, &error);
	if (status < 0)
		send_failure(rank, status, false, error.text);
	return status >= 0;
}

static bool say_ready(const struct rank *rank)
{
	const char *transport = rank->group ? lshard_group_transport(rank->group) : "none (replicated)";
	struct rank_ready ready;
	engine_stats stats;

	memset(&ready, 0, sizeof ready); /* padding travels too */
	engine_get_stats(rank->engine, &stats);
	ready.layers = stats.layers;
	ready.layer_bytes = stats.layer_bytes;
	return rank_send(rank->task->socket, RANK_READY, &ready, transport, strlen(transport));
}

/* ---- Generating -------------------------------------------------------------------------------------------------- */

struct answer {
	const struct rank *rank;
	uint32_t index;
};

/* Stops the generation when nobody listens any more. */
static int send_token(void *user, int32_t token, const char *text, size_t bytes)
{
	const struct answer *answer = user;
	const struct rank_token head = {answer->index, token};

	return !rank_send(answer->rank->task->socket, RANK_TOKEN, &head, text, bytes);
}

static lshard_status generate(const struct rank *rank, uint32_t index, engine_error *error)
{
	const struct rank_prompt head = {index};
	struct answer answer = {rank, index};
	int32_t *tokens;
	size_t count;
	lshard_status status =
		engine_encode(rank->engine, rank->task->prompts->items[index].text, &tokens, &count, error);

	if (status < 0)
		return status;
	/* What cannot fit the model may be too long for a message too; the engine says what is wrong with it. */
	if (count <= rank->task->options->shape.context &&
	    !rank_send(rank->task->socket, RANK_PROMPT, &head, tokens, count * sizeof *tokens))
		status = engine_fail(error, LSHARD_ERR_SYSTEM, "its %zu tokens could not be handed over", count);
	else
		status = engine_generate(rank->engine, tokens, count, rank->task->max_tokens, send_token, &answer,
					 error);
	free(tokens);
	return status;
}

static bool answer_prompts(struct rank *rank)
{
	const struct rank_task *task = rank->task;
	const uint64_t start = engine_now_ns();
	bool heard = true;

	for (size_t i = (size_t)task->rank; heard && i < task->prompts->count; i += task->options->ranks) {
		const struct rank_prompt head = {(uint32_t)i};
		engine_error error = {""};
		const lshard_status status = generate(rank, (uint32_t)i, &error);
		const char *text = status >= 0 ? "" : *error.text ? error.text : lshard_status_text(status);

		heard = rank_send(task->socket, RANK_PROMPT_END, &head, text, strlen(text));
	}
	rank->total_ns = engine_now_ns() - start;
	return heard;
}

/* ---- Verifying --------------------------------------------------------------------------------------------------- */

static bool verify(struct rank *rank)
{
	lshard_series *series = engine_series(rank->engine);
	struct rank_verified verified;
	uint64_t hash = 0;
	const lshard_status status = lshard_series_verify(series, &hash);
	const char *text = status < 0 ? lshard_series_error(series) : "";

	memset(&verified, 0, sizeof verified);
	verified.hash = hash;
	verified.corrupt = status < 0;
	return rank_send(rank->task->socket, RANK_VERIFIED, &verified, text, strlen(text));
}

/* ---- Reporting --------------------------------------------------------------------------------------------------- */

/* Waits for as long as the other ranks generate; the end of whoever started this rank is the end of the stream. */
static bool await_order(const struct rank *rank, enum rank_order order)
{
	char byte;
	ssize_t received;

	do
		received = recv(rank->task->socket, &byte, 1, 0);
	while (received < 0 && errno == EINTR);
	return received == 1 && byte == (char)order;
}

/* No barrier is public but that of a call that needs all ranks: they agree on a series that holds nothing. */
static lshard_status agree_once(lshard_group *group)
{
	const lshard_tensor nothing = {"nothing", 1, 0, LSHARD_STRIPE_BYTES, 0, 0};
	lshard_series_options options = LSHARD_SERIES_OPTIONS_INIT;
	lshard_series *series = NULL;
	lshard_status status;

	options.name = "(memory is measured)";
	options.layer_count = 1;
	options.tensors = &nothing;
	options.tensor_count = 1;
	status = lshard_series_create(group, &options, &series);
	if (status >= 0)
		(void)lshard_series_destroy(series);
	return status;
}

/*
 * Wait for all ranks of a job that somebody else started: no process hears of all their ends. A rank that generates for
 * longer than a deadline is there all the same, so the wait goes on until all have come or one is gone. Where one was
 * late for the second half of an agreement both are told that they differ, and begin anew together.
 */
static lshard_status wait_for_ranks(const struct rank *rank)
{
	lshard_status status;
	int differed = 0;
	bool told = false;

	do {
		status = agree_once(rank->group);
		differed = status == LSHARD_ERR_MISMATCH ? differed + 1 : 0;
		if (status == LSHARD_ERR_TIMEOUT && !told)
			cli_message("rank %d is done and waits for the other ranks: memory is measured while all are "
				    "there",
				    rank->task->rank);
		told |= status == LSHARD_ERR_TIMEOUT;
	} while (status == LSHARD_ERR_TIMEOUT || (differed > 0 && differed < MOST_DIFFERING));
	return status;
}

/* The library speaks of the series and the call by which the ranks agree; what is left is "rank 0 is gone". */
static void say_why(const struct rank *rank, lshard_status status, char *why, size_t why_bytes)
{
	const char *text = lshard_group_error(rank->group);
	const char *series = strstr(text, ", series '");
	const char *cause = series ? strstr(series, ": ") : NULL;
	const char *call;

	cause = cause ? cause + 2 : text;
	call = strstr(cause, ", needed in ");
	(void)snprintf(why, why_bytes, "%s: %.*s",
		       status == LSHARD_ERR_PEER_FAILED ? "that takes all ranks at once"
							: "the ranks could not wait for each other",
		       call ? (int)(call - cause) : (int)strlen(cause), cause);
}

static void read_memory(struct rank_report *report)
{
	struct process_memory memory;

	if (!process_memory_read(&memory))
		return;
	report->has_memory = 1;
	report->private_bytes = memory.private_bytes;
	report->pss_bytes = memory.pss_bytes;
	report->shared_hugetlb_bytes = memory.shared_hugetlb_bytes;
	report->large_bytes = memory.large_bytes;
}

/*
 * While all ranks hold and have used their layers, or a page that a rank shares with one that has left, or has not come
 * yet, looks like its own. Ranks of this program's own are told when; see enum rank_order.
 */
static void report_memory(const struct rank *rank, struct rank_report *report, char *why, size_t why_bytes)
{
	const struct rank_options *options = rank->task->options;
	lshard_status status;

	if (!rank->task->measures_memory)
		return;
	if (!options->one_of_job || options->ranks == 1 || !rank->group || !rank->task->prompts) {
		read_memory(report);
		return;
	}
	status = wait_for_ranks(rank);
	if (status >= 0) {
		read_memory(report);
		status = wait_for_ranks(rank); /* for all to have read it */
	}
	if (status >= 0)
		return;
	report->has_memory = 0; /* somebody may have left before it was read here */
	say_why(rank, status, why, why_bytes);
}

static void report_series(const struct rank *rank, const engine_stats *loaded, struct rank_report *report)
{
	lshard_series *series = engine_series(rank->engine);
	lshard_stats stats = LSHARD_STATS_INIT;

	report->shard_bytes = loaded->layers * loaded->layer_bytes; /* replicated */
	if (!series || lshard_series_stats(series, &stats) < 0)
		return;
	report->shard_bytes = stats.shard_bytes;
	report->window_bytes = stats.window_bytes;
	report->resident_bytes = stats.resident_bytes;
	report->numa_copy_bytes = stats.numa_copy_bytes;
	report->residents = stats.residents;
	report->wait_ns = stats.blocked_ns;
}

static bool send_report(const struct rank *rank)
{
	struct rank_report report;
	engine_stats stats;
	char why[256] = "";

	memset(&report, 0, sizeof report);
	engine_get_stats(rank->engine, &stats);
	report_memory(rank, &report, why, sizeof why);
	report_series(rank, &stats, &report);
	report.read_bytes = stats.read_bytes;
	report.metadata_read_bytes = stats.metadata_read_bytes;
	report.total_ns = rank->total_ns;
	report.generated_tokens = stats.generated_tokens;
	return rank_send(rank->task->socket, RANK_REPORT, &report, why, strlen(why));
}

/* A trace that cannot be written whole is a failure, also where all else is done. */
static void leave_group(struct rank *rank)
{
	char error[512];
	const lshard_status status = cli_group_leave(rank->group, error, sizeof error);

	if (status < 0)
		send_failure(rank, status, false, error);
}

void rank_work(const struct rank_task *task)
{
	struct rank rank = {.task = task, .log = task->options->log};

	rank.log.rank = task->rank;
	if (!task->options->replicated && !join_group(&rank))
		return;
	if (!load_model(&rank))
		goto leave_group;
	if (say_ready(&rank) && (task->prompts ? answer_prompts(&rank) : verify(&rank)) &&
	    rank_send(task->socket, RANK_DONE, NULL, NULL, 0) && await_order(&rank, RANK_MEASURE) && send_report(&rank))
		(void)await_order(&rank, RANK_END);
	engine_close(rank.engine);
leave_group:
	leave_group(&rank);
}
