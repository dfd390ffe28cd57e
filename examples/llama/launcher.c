/* SPDX-License-Identifier: Apache-2.0
 *
 * launcher.c - see launcher.h.
 * Knows: the messages of the ranks. Does not know: the library, how ranks are started, what is printed of it all.
 */
#include "launcher.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define END_TIMEOUT_MS 10000 /* from the order to end until a rank is gone; releasing memory takes no longer */

/* ---- Starting ---------------------------------------------------------------------------------------------------- */

static void work(void *user, uint32_t index, int socket)
{
	const struct launcher *launcher = user;
	struct rank_task *task = &launcher->ranks[index].task;

	task->socket = socket;
	rank_work(task);
}

static bool prepare(struct launcher *launcher)
{
	const struct rank_options *options = launcher->options;

	launcher->rank_count = 0;
	launcher->ranks = calloc(options->own_ranks, sizeof *launcher->ranks);
	launcher->polled = calloc(options->own_ranks, sizeof *launcher->polled);
	if (!launcher->ranks || !launcher->polled ||
	    !workers_create(&launcher->workers, options->own_ranks, options->threads)) {
		cli_message("out of memory");
		return false;
	}
	launcher->rank_count = options->own_ranks;
	for (uint32_t i = 0; i < options->own_ranks; i++) {
		struct own_rank *own = &launcher->ranks[i];

		own->worker = &launcher->workers.items[i];
		own->task = (struct rank_task){options,
					       launcher->prompts,
					       launcher->max_tokens,
					       options->first_rank + (int32_t)i,
					       !options->threads || i == 0,
					       -1};
	}
	return true;
}

static bool start_all(struct launcher *launcher)
{
	char why[256] = "";
	const uint32_t started = workers_start(&launcher->workers, work, launcher, why, sizeof why);
	struct own_rank *own = &launcher->ranks[started];

	if (started == launcher->rank_count)
		return true;
	(void)snprintf(own->error, sizeof own->error, "rank %d could not be started: %s", own->task.rank, why);
	return false;
}

/* ---- Ending ------------------------------------------------------------------------------------------------------ */

static void describe_end(struct own_rank *own, int status)
{
	if (*own->error)
		return; /* it has said why itself */
	if (WIFSIGNALED(status))
		(void)snprintf(own->error, sizeof own->error, "rank %d (process %ld) was ended by signal %d (%s)",
			       own->task.rank, (long)own->worker->pid, WTERMSIG(status), strsignal(WTERMSIG(status)));
	else if (own->phase != RANK_REPORTED || WEXITSTATUS(status) != 0)
		(void)snprintf(own->error, sizeof own->error,
			       "rank %d (process %ld) ended too early, with exit status %d", own->task.rank,
			       (long)own->worker->pid, WEXITSTATUS(status));
}

static void fail_prompts(struct launcher *launcher, const struct own_rank *own)
{
	const size_t step = launcher->options->ranks;

	if (!launcher->prompts)
		return;
	for (size_t i = (size_t)own->task.rank; i < launcher->prompts->count; i += step) {
		if (!launcher->prompts->items[i].finished)
			prompt_fail(&launcher->prompts->items[i], own->error, strlen(own->error));
	}
	if (launcher->prompt_changed)
		launcher->prompt_changed(launcher->user);
}

/* The rank has closed its end, or is to be no more. */
static void end_rank(struct launcher *launcher, struct own_rank *own)
{
	describe_end(own, worker_end(own->worker));
	if (*own->error)
		fail_prompts(launcher, own);
}

/* ---- Listening --------------------------------------------------------------------------------------------------- */

static void show_progress(const struct launcher *launcher)
{
	uint32_t ready = 0;

	if (launcher->options->one_of_job)
		return; /* the terminal is other ranks' too */
	for (uint32_t i = 0; i < launcher->rank_count; i++)
		ready += launcher->ranks[i].phase != RANK_LOADING;
	if (ready == launcher->rank_count)
		cli_progress_erase();
	else
		cli_progress("loading: %u of %u ranks are ready ...", ready, launcher->rank_count);
}

static struct prompt *own_prompt(const struct launcher *launcher, const struct own_rank *own, uint32_t index)
{
	if (!launcher->prompts || index >= launcher->prompts->count ||
	    index % launcher->options->ranks != (uint32_t)own->task.rank)
		return NULL;
	return &launcher->prompts->items[index];
}

/* False for what makes no sense. */
static bool take_prompt_message(struct launcher *launcher, const struct own_rank *own,
				const struct rank_message *message)
{
	const uint32_t index = message->kind == RANK_TOKEN ? message->fixed.token.index : message->fixed.prompt.index;
	struct prompt *prompt = own_prompt(launcher, own, index);
	bool stored = true;

	if (!prompt || own->phase != RANK_WORKING)
		return false;
	if (prompt->finished)
		return true; /* it has failed here, for want of memory */
	if (message->kind == RANK_PROMPT)
		stored = prompt_set_tokens(prompt, message->tail, message->tail_bytes / sizeof(int32_t));
	else if (message->kind == RANK_TOKEN)
		stored = prompt_append(prompt, message->fixed.token.token, message->tail, message->tail_bytes);
	else if (message->tail_bytes == 0)
		prompt->finished = true;
	else
		prompt_fail(prompt, message->tail, message->tail_bytes);
	if (!stored)
		prompt_fail(prompt, "out of memory", strlen("out of memory"));
	if (launcher->prompt_changed)
		launcher->prompt_changed(launcher->user);
	return true;
}

static void copy_text(char *to, size_t room, const struct rank_message *message)
{
	(void)snprintf(to, room, "%.*s", (int)message->tail_bytes, message->tail);
}

static bool take_message(struct launcher *launcher, struct own_rank *own, const struct rank_message *message)
{
	switch (message->kind) {
	case RANK_READY:
		own->ready = message->fixed.ready;
		own->phase = RANK_WORKING;
		copy_text(launcher->transport, sizeof launcher->transport, message);
		show_progress(launcher);
		return true;
	case RANK_VERIFIED:
		own->verified = message->fixed.verified;
		own->is_verified = true;
		copy_text(own->error, sizeof own->error, message);
		return true;
	case RANK_DONE:
		own->phase = RANK_WAITING;
		return true;
	case RANK_REPORT:
		own->report = message->fixed.report;
		copy_text(own->no_memory, sizeof own->no_memory, message);
		own->phase = RANK_REPORTED;
		return true;
	case RANK_FAILED:
		own->is_usage = message->fixed.failed.is_usage != 0;
		copy_text(own->error, sizeof own->error, message);
		return true;
	default:
		return take_prompt_message(launcher, own, message);
	}
}

static void listen_to(struct launcher *launcher, struct own_rank *own)
{
	struct rank_message message;
	enum rank_inbox_result result = rank_inbox_receive(&own->inbox, own->worker->socket);

	if (result == RANK_INBOX_CLOSED)
		end_rank(launcher, own);
	if (result == RANK_INBOX_CLOSED || result == RANK_INBOX_EMPTY)
		return;
	while (result != RANK_INBOX_BAD && (result = rank_inbox_next(&own->inbox, &message)) == RANK_INBOX_MESSAGE) {
		if (!take_message(launcher, own, &message))
			result = RANK_INBOX_BAD;
	}
	if (result != RANK_INBOX_BAD)
		return;
	(void)snprintf(own->error, sizeof own->error,
		       "rank %d sent what is no message of this program, or memory ran out", own->task.rank);
	worker_stop(own->worker);
}

/* ---- The loop ---------------------------------------------------------------------------------------------------- */

/* True when every rank is gone or has got as far as @p phase. */
static bool all_at_least(const struct launcher *launcher, enum rank_phase phase)
{
	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		if (!launcher->ranks[i].worker->gone && launcher->ranks[i].phase < phase)
			return false;
	}
	return true;
}

static void order_all(struct launcher *launcher, enum rank_order order)
{
	const char byte = (char)order;

	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		if (!launcher->ranks[i].worker->gone)
			(void)send(launcher->ranks[i].worker->socket, &byte, 1,
				   MSG_NOSIGNAL | MSG_DONTWAIT); /* gone: seen later */
	}
}

/* Ranks measure while all of them hold their layers, and let go of them only when all have measured. */
static void order_next(struct launcher *launcher)
{
	if (!launcher->measure_ordered && all_at_least(launcher, RANK_WAITING)) {
		launcher->measure_ordered = true;
		order_all(launcher, RANK_MEASURE);
	}
	if (launcher->measure_ordered && !launcher->end_ordered && all_at_least(launcher, RANK_REPORTED)) {
		launcher->end_ordered = true;
		order_all(launcher, RANK_END);
	}
}

static bool all_gone(const struct launcher *launcher)
{
	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		if (launcher->ranks[i].worker->started && !launcher->ranks[i].worker->gone)
			return false;
	}
	return true;
}

/* poll passes over negative descriptors, so a rank that is gone keeps its place. */
static bool listen_once(struct launcher *launcher)
{
	struct pollfd *polled = launcher->polled;
	int ready;

	for (uint32_t i = 0; i < launcher->rank_count; i++)
		polled[i] = (struct pollfd){launcher->ranks[i].worker->socket, POLLIN, 0};
	ready = poll(polled, launcher->rank_count, launcher->end_ordered ? END_TIMEOUT_MS : -1);
	if (ready < 0)
		return errno == EINTR;
	if (ready == 0)
		return false;
	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		if (polled[i].revents)
			listen_to(launcher, &launcher->ranks[i]);
	}
	return true;
}

/* After a failed start, or of ranks that do not end; nothing to do in a run that went well. */
static void end_all(struct launcher *launcher, const char *reason)
{
	for (uint32_t i = 0; i < launcher->rank_count; i++)
		worker_stop(launcher->ranks[i].worker);
	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		struct own_rank *own = &launcher->ranks[i];

		if (own->worker->gone)
			continue;
		if (!*own->error)
			(void)snprintf(own->error, sizeof own->error, "rank %d %s", own->task.rank, reason);
		if (own->worker->started)
			end_rank(launcher, own);
		else
			fail_prompts(launcher, own);
	}
}

static void listen_to_all(struct launcher *launcher)
{
	show_progress(launcher);
	while (!all_gone(launcher)) {
		order_next(launcher);
		if (!listen_once(launcher))
			break;
	}
	cli_progress_erase();
	end_all(launcher, "did its work and then did not end; it was killed");
}

static bool all_went_well(const struct launcher *launcher)
{
	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		if (*launcher->ranks[i].error || launcher->ranks[i].phase != RANK_REPORTED)
			return false;
	}
	return true;
}

bool launcher_run(struct launcher *launcher)
{
	if (!prepare(launcher))
		return false;
	if (start_all(launcher))
		listen_to_all(launcher);
	else
		end_all(launcher, "was stopped, as not all ranks could be started");
	workers_unwatch(&launcher->workers);
	return all_went_well(launcher);
}

/* Without the "rank N: " that only says which of the ranks is speaking. */
static const char *cause_of(const char *error)
{
	int bytes = 0;

	return sscanf(error, "rank %*[0-9]: %n", &bytes) == 0 && bytes > 0 ? error + bytes : error;
}

bool launcher_repeats_error(const struct launcher *launcher, uint32_t index)
{
	return index > 0 &&
	       strcmp(cause_of(launcher->ranks[index].error), cause_of(launcher->ranks[index - 1].error)) == 0;
}

int launcher_code(const struct launcher *launcher)
{
	int code = launcher->rank_count > 0 && all_went_well(launcher) ? CLI_DONE : CLI_FAILED;

	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		if (launcher->ranks[i].is_usage)
			code = CLI_USAGE;
	}
	return code;
}

void launcher_free(struct launcher *launcher)
{
	for (uint32_t i = 0; i < launcher->rank_count; i++)
		rank_inbox_free(&launcher->ranks[i].inbox);
	workers_free(&launcher->workers);
	free(launcher->polled);
	free(launcher->ranks);
}
