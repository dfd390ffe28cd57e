/* SPDX-License-Identifier: Apache-2.0
 *
 * launcher.c - see launcher.h.
 * Knows: processes, threads, signals, the messages of the ranks. Does not know: the library, what is printed of it all.
 */
#include "launcher.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define END_TIMEOUT_MS 10000 /* from the order to end until a rank is gone; releasing memory takes no longer */

/* ---- Signals ----------------------------------------------------------------------------------------------------- */

static const int ending_signals[LAUNCHER_SIGNALS] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE};

/* A signal has no argument to carry it. Set while there are ranks to end. */
static struct launcher *volatile signalled;

static void block_signals(sigset_t *before)
{
	sigset_t signals;

	(void)sigemptyset(&signals);
	for (size_t i = 0; i < LAUNCHER_SIGNALS; i++)
		(void)sigaddset(&signals, ending_signals[i]);
	(void)pthread_sigmask(SIG_BLOCK, &signals, before);
}

/*
 * Ends this process as the signal would have, once its processes are ended and reaped; threads end with it. A
 * handler, not a part of the loop: the loop may be held up by a reader of stdout who does not read.
 */
static void obey_signal(int number)
{
	const struct launcher *launcher = signalled;

	for (uint32_t i = 0; launcher && !launcher->options->threads && i < launcher->rank_count; i++) {
		const struct own_rank *own = &launcher->ranks[i];

		if (own->started && !own->gone && kill(own->pid, SIGKILL) == 0)
			(void)waitpid(own->pid, NULL, 0);
	}
	(void)signal(number, SIG_DFL);
	(void)raise(number); /* comes when this handler returns */
}

/* What is ignored (nohup) stays ignored. */
static void watch_signals(struct launcher *launcher)
{
	struct sigaction action;

	memset(&action, 0, sizeof action);
	action.sa_handler = obey_signal;
	signalled = launcher;
	for (size_t i = 0; i < LAUNCHER_SIGNALS; i++) {
		(void)sigaction(ending_signals[i], NULL, &launcher->old_actions[i]);
		if (launcher->old_actions[i].sa_handler != SIG_IGN)
			(void)sigaction(ending_signals[i], &action, NULL);
	}
}

static void unwatch_signals(const struct launcher *launcher)
{
	for (size_t i = 0; i < LAUNCHER_SIGNALS; i++)
		(void)sigaction(ending_signals[i], &launcher->old_actions[i], NULL);
	signalled = NULL;
}

/* ---- Starting ---------------------------------------------------------------------------------------------------- */

/* The ends of the ranks before it are open in a forked rank too; left open, they would hide the end of those ranks. */
static void close_inherited(const struct launcher *launcher)
{
	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		if (launcher->ranks[i].socket >= 0)
			(void)close(launcher->ranks[i].socket);
	}
}

static _Noreturn void rank_process(const struct launcher *launcher, const struct rank_task *task, pid_t parent)
{
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != parent)
		_exit(CLI_FAILED); /* the parent has ended before it could be asked for */
	unwatch_signals(launcher);
	(void)pthread_sigmask(SIG_SETMASK, &launcher->old_signals, NULL);
	close_inherited(launcher);
	rank_work(task);
	(void)close(task->socket);
	exit(CLI_DONE); /* not _exit: leak checkers and profilers report at exit */
}

static void *rank_thread(void *argument)
{
	const struct rank_task *task = argument;

	rank_work(task);
	(void)close(task->socket);
	return NULL;
}

static int start_process(struct launcher *launcher, struct own_rank *own)
{
	const pid_t parent = getpid();

	own->pid = fork();
	if (own->pid < 0)
		return errno;
	if (own->pid == 0)
		rank_process(launcher, &own->task, parent);
	(void)close(own->task.socket);
	return 0;
}

static int start_thread(struct own_rank *own)
{
	own->pid = getpid();
	return pthread_create(&own->thread, NULL, rank_thread, &own->task);
}

static bool start_rank(struct launcher *launcher, struct own_rank *own)
{
	int sockets[2];
	int error;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) != 0) {
		(void)snprintf(own->error, sizeof own->error, "rank %d could not be started: no socket: %s",
			       own->task.rank, strerror(errno));
		return false;
	}
	own->socket = sockets[0];
	own->task.socket = sockets[1];
	error = launcher->options->threads ? start_thread(own) : start_process(launcher, own);
	own->started = error == 0;
	if (own->started)
		return true;
	(void)snprintf(own->error, sizeof own->error, "rank %d could not be started: %s", own->task.rank,
		       strerror(error));
	(void)close(sockets[1]);
	return false;
}

static bool prepare(struct launcher *launcher)
{
	const struct rank_options *options = launcher->options;

	launcher->rank_count = 0;
	launcher->ranks = calloc(options->own_ranks, sizeof *launcher->ranks);
	launcher->polled = calloc(options->own_ranks, sizeof *launcher->polled);
	if (!launcher->ranks || !launcher->polled) {
		cli_message("out of memory");
		return false;
	}
	launcher->rank_count = options->own_ranks;
	for (uint32_t i = 0; i < options->own_ranks; i++) {
		struct own_rank *own = &launcher->ranks[i];

		own->socket = -1;
		own->task = (struct rank_task){options,
					       launcher->prompts,
					       launcher->max_tokens,
					       options->first_rank + (int32_t)i,
					       !options->threads || i == 0,
					       -1};
	}
	return true;
}

/* Signals wait until every rank that is started is noted down. */
static bool start_all(struct launcher *launcher)
{
	bool started = true;

	(void)fflush(NULL); /* or each forked rank would print it again */
	block_signals(&launcher->old_signals);
	watch_signals(launcher);
	for (uint32_t i = 0; started && i < launcher->rank_count; i++)
		started = start_rank(launcher, &launcher->ranks[i]);
	(void)pthread_sigmask(SIG_SETMASK, &launcher->old_signals, NULL);
	return started;
}

/* ---- Ending ------------------------------------------------------------------------------------------------------ */

static void describe_end(struct own_rank *own, int status)
{
	if (*own->error)
		return; /* it has said why itself */
	if (WIFSIGNALED(status))
		(void)snprintf(own->error, sizeof own->error, "rank %d (process %ld) was ended by signal %d (%s)",
			       own->task.rank, (long)own->pid, WTERMSIG(status), strsignal(WTERMSIG(status)));
	else if (own->phase != RANK_REPORTED || WEXITSTATUS(status) != 0)
		(void)snprintf(own->error, sizeof own->error,
			       "rank %d (process %ld) ended too early, with exit status %d", own->task.rank,
			       (long)own->pid, WEXITSTATUS(status));
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
	int status = 0;
	sigset_t before;

	block_signals(&before); /* a process id that is reaped may soon be somebody else's */
	if (launcher->options->threads)
		(void)pthread_join(own->thread, NULL);
	else
		(void)waitpid(own->pid, &status, 0);
	own->gone = true;
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	(void)close(own->socket);
	own->socket = -1;
	describe_end(own, status);
	if (*own->error)
		fail_prompts(launcher, own);
}

/* Threads are not killed: they see the end of their stream. */
static void kill_all(struct launcher *launcher)
{
	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		struct own_rank *own = &launcher->ranks[i];

		if (!own->started || own->gone)
			continue;
		if (launcher->options->threads)
			(void)shutdown(own->socket, SHUT_RDWR);
		else
			(void)kill(own->pid, SIGKILL);
	}
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
	enum rank_inbox_result result = rank_inbox_receive(&own->inbox, own->socket);

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
	(void)(launcher->options->threads ? shutdown(own->socket, SHUT_RDWR) : kill(own->pid, SIGKILL));
}

/* ---- The loop ---------------------------------------------------------------------------------------------------- */

/* True when every rank is gone or has got as far as @p phase. */
static bool all_at_least(const struct launcher *launcher, enum rank_phase phase)
{
	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		if (!launcher->ranks[i].gone && launcher->ranks[i].phase < phase)
			return false;
	}
	return true;
}

static void order_all(struct launcher *launcher, enum rank_order order)
{
	const char byte = (char)order;

	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		if (!launcher->ranks[i].gone)
			(void)send(launcher->ranks[i].socket, &byte, 1,
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
		if (launcher->ranks[i].started && !launcher->ranks[i].gone)
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
		polled[i] = (struct pollfd){launcher->ranks[i].socket, POLLIN, 0};
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
	kill_all(launcher);
	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		struct own_rank *own = &launcher->ranks[i];

		if (own->gone)
			continue;
		if (!*own->error)
			(void)snprintf(own->error, sizeof own->error, "rank %d %s", own->task.rank, reason);
		if (own->started)
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
	unwatch_signals(launcher);
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
	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		if (launcher->ranks[i].socket >= 0)
			(void)close(launcher->ranks[i].socket);
		rank_inbox_free(&launcher->ranks[i].inbox);
	}
	free(launcher->polled);
	free(launcher->ranks);
}
