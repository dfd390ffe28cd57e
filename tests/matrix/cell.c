/* SPDX-License-Identifier: Apache-2.0
 *
 * cell.c - one cell of the matrix: three ranks are brought to the phase, one meets the fault while all make its call,
 * and what they say, how long it takes, what they can do afterwards and what they leave behind is compared with the
 * rule.
 */
#include "matrix.h"
#include "patience.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* A call has a few agreements, each with its own deadline. */
#define MOST_AGREEMENTS 6u

struct world {
	const struct cell *cell;
	struct told_rank of[RANKS];
	struct told_circle circle;
	struct told_options options;
	struct told_reply before[RANKS]; /* what each has before it has anything */
	struct told_reply replies[RANKS];
	int replied[RANKS];
	char job[64];
	struct outcome outcome;
};

static void fail(struct world *world, const char *format, ...)
{
	va_list arguments;

	if (world->outcome.failed)
		return; /* the first counts */
	world->outcome.failed = 1;
	va_start(arguments, format);
	vsnprintf(world->outcome.why, sizeof world->outcome.why, format, arguments);
	va_end(arguments);
}

static int lives(const struct world *world, int rank)
{
	return world->of[rank].pid > 0;
}

static uint64_t now_ms(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000 + (uint64_t)time.tv_nsec / 1000000;
}

static uint64_t draw(struct world *world, uint64_t below)
{
	static uint64_t state;

	state = (state ^ world->cell->random) * 6364136223846793005u + 1442695040888963407u;
	return (state >> 33) % below;
}

/* ---- orders ---- */

static void start(struct world *world, int rank)
{
	told_start_in(&world->of[rank], rank, RANKS, world->job, &world->options,
		      world->cell->transport->collective ? &world->circle : NULL);
}

/* By all that live, or only those with `only` >= 0 that rank. Replies are in world->replies. */
static void tell(struct world *world, int only, enum order order, uint64_t value)
{
	for (int rank = 0; rank < RANKS; rank++) {
		world->replied[rank] = 0;
		if (lives(world, rank) && (only < 0 || only == rank))
			world->replied[rank] = told_tell(&world->of[rank], order, 0, value);
	}
}

static void hear(struct world *world, int rank)
{
	if (world->replied[rank] && !told_hear(&world->of[rank], &world->replies[rank])) {
		world->replied[rank] = 0;
		if (lives(world, rank))
			fail(world, "rank %d has died, or hangs", rank);
	}
}

static void all_must(struct world *world, const char *what, enum order order, uint64_t value)
{
	tell(world, -1, order, value);
	for (int rank = 0; rank < RANKS; rank++) {
		hear(world, rank);
		if (world->replied[rank] && world->replies[rank].status != LSHARD_OK)
			fail(world, "%s: rank %d: %s: %s", what, rank, lshard_status_name(world->replies[rank].status),
			     world->replies[rank].text);
	}
}

/* ---- faults ---- */

/* Whoever listens under a name of the library's is sent what no rank would say. */
static void pester(const struct world *world)
{
	FILE *names = fopen("/proc/net/unix", "r");
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	char bytes[400], line[400];

	for (size_t at = 0; at < sizeof bytes; at++)
		bytes[at] = (char)(world->cell->random >> at % 56);
	while (names && fgets(line, sizeof line, names)) {
		const char *name = strstr(line, " @layershard");
		size_t length;
		int fd;

		if (!name)
			continue;
		length = strcspn(name + 2, "\n");
		if (length > sizeof address.sun_path - 1)
			continue;
		memcpy(address.sun_path + 1, name + 2, length);
		fd = socket(AF_UNIX, (strstr(line, " 0005 ") ? SOCK_SEQPACKET : SOCK_STREAM) | SOCK_NONBLOCK, 0);
		if (fd < 0)
			continue;
		if (!connect(fd, (struct sockaddr *)&address,
			     (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length)))
			(void)!write(fd, bytes, 1 + world->cell->random % sizeof bytes);
		close(fd);
	}
	if (names)
		fclose(names);
}

static pid_t start_strangers(const struct world *world)
{
	const pid_t stranger = fork();

	while (stranger == 0) {
		pester(world);
		usleep(300);
	}
	return stranger;
}

static void set_fault(struct world *world, enum told_fault fault, uint64_t value)
{
	const struct told_rank *victim = &world->of[world->cell->victim];
	struct told_reply reply;

	if (!told_tell(victim, TOLD_FAULT, (uint32_t)fault, value) || !told_hear(victim, &reply))
		fail(world, "the victim takes no fault");
}

static void before_call(struct world *world)
{
	const int victim = world->cell->victim;

	switch (world->cell->fault) {
	case FAULT_KILLED_BEFORE:
		told_kill(&world->of[victim]);
		break;
	case FAULT_STOPPED_SHORTLY:
	case FAULT_STOPPED_LONG:
		kill(world->of[victim].pid, SIGSTOP);
		break;
	case FAULT_CALLBACK_FAILS:
		set_fault(world, TOLD_CALLBACK_FAILS, 0);
		break;
	case FAULT_CALLBACK_BLOCKS:
		set_fault(world, TOLD_CALLBACK_BLOCKS, 2 * MATRIX_TIMEOUT_MS);
		break;
	case FAULT_NO_MEMORY:
		set_fault(world, TOLD_NO_MEMORY, draw(world, 24));
		break;
	case FAULT_DESCRIPTORS:
		set_fault(world, TOLD_FEW_DESCRIPTORS, draw(world, 9));
		break;
	case FAULT_FILES:
		set_fault(world, TOLD_SMALL_FILES, draw(world, 2) * 4096);
		break;
	case FAULT_SPACE:
		set_fault(world, TOLD_SMALL_SPACE, draw(world, 200) * 4096);
		break;
	case FAULT_FORK:
		set_fault(world, TOLD_FORKS, 0);
		break;
	case FAULT_CLOCK:
		set_fault(world, TOLD_CLOCK_JUMPS, 86400);
		break;
	case FAULT_KILLED_WITHIN:
	case FAULT_GARBAGE:
	case FAULTS:
		break;
	}
}

/* While the call is under way. */
static void within_call(struct world *world)
{
	const int victim = world->cell->victim;

	if (world->cell->fault == FAULT_KILLED_WITHIN) {
		usleep((useconds_t)draw(world, 3000));
		told_kill(&world->of[victim]);
		world->replied[victim] = 0;
	} else if (world->cell->fault == FAULT_STOPPED_SHORTLY) {
		usleep(MATRIX_TIMEOUT_MS * 1000 / 5);
		kill(world->of[victim].pid, SIGCONT);
	}
}

/* ---- the call ---- */

static void make_call(struct world *world)
{
	const struct matrix_step *step = &matrix_phases[world->cell->phase];
	const int victim = world->cell->victim;
	const int alone = world->cell->phase == PHASE_RETURN;
	const uint64_t begin = now_ms();
	uint64_t took;
	pid_t strangers = 0;

	before_call(world);
	if (world->cell->fault == FAULT_GARBAGE)
		strangers = start_strangers(world);
	tell(world, alone ? victim : -1, step->order, world->cell->phase == PHASE_END);
	within_call(world);
	for (int rank = 0; rank < RANKS; rank++)
		if (rank != victim)
			hear(world, rank);
	took = now_ms() - begin;
	if (world->cell->fault == FAULT_STOPPED_LONG) {
		usleep(MATRIX_TIMEOUT_MS * 1200);
		kill(world->of[victim].pid, SIGCONT);
	}
	hear(world, victim);
	if (strangers > 0) {
		kill(strangers, SIGKILL);
		waitpid(strangers, NULL, 0);
	}
	if (took > MOST_AGREEMENTS * MATRIX_TIMEOUT_MS + patience(5000))
		fail(world, "the others waited for %llu ms", (unsigned long long)took);
	if (lives(world, victim))
		set_fault(world, TOLD_NO_FAULT, 0);
}

static int names_victim(const struct world *world, const struct rule *rule, const char *text)
{
	char name[16];

	snprintf(name, sizeof name, "rank %d", world->cell->victim);
	return strstr(text, name) != NULL || (rule->or_rank_0 && strstr(text, "for rank 0") != NULL);
}

/* Returns how many failed. */
static int judge(struct world *world, const struct rule *rule)
{
	int failures = 0;

	world->outcome.named = 1;
	for (int rank = 0; rank < RANKS; rank++) {
		const struct told_reply *reply = &world->replies[rank];
		const int is_victim = rank == world->cell->victim;

		if (!world->replied[rank])
			continue;
		failures += reply->status != LSHARD_OK;
		if (!rule_has(is_victim ? rule->victims : rule->others, is_victim ? rule->n_victims : rule->n_others,
			      reply->status))
			fail(world, "%s: %s: %s", is_victim ? "the victim" : "another rank",
			     lshard_status_name(reply->status), reply->text);
		if (is_victim || reply->status == LSHARD_OK)
			continue;
		world->outcome.others = reply->status;
		world->outcome.named &= names_victim(world, rule, reply->text);
		if (rule->named && !names_victim(world, rule, reply->text))
			fail(world, "another rank is not told that it was rank %d: %s", world->cell->victim,
			     reply->text);
	}
	if (world->cell->fault == FAULT_FORK && world->replied[world->cell->victim] &&
	    !world->replies[world->cell->victim].child)
		fail(world, "a child by fork was not refused");
	return failures;
}

/* ---- afterwards ---- */

/* What is committed, by the phase in which it is; after END the new bytes. */
static uint64_t generation_after(const struct world *world, int failures)
{
	return world->cell->phase == PHASE_END && !failures;
}

static void go_on(struct world *world, int failures)
{
	const enum matrix_phase phase = world->cell->phase;

	if (phase == PHASE_GROUP)
		all_must(world, "afterwards, a series", TOLD_SERIES, 0);
	if (phase <= PHASE_SERIES)
		all_must(world, "afterwards, its commit", TOLD_COMMIT, 0);
	if (phase == PHASE_BEGIN && !failures)
		all_must(world, "afterwards, the end of the update", TOLD_END, 0);
	if (phase == PHASE_RETURN && lives(world, world->cell->victim)) {
		const struct told_rank *victim = &world->of[world->cell->victim];
		struct told_reply reply = told_do(victim, TOLD_SERIES, 0, 0);

		if (reply.status == LSHARD_OK)
			reply = told_do(victim, TOLD_COMMIT, 0, 0);
		if (reply.status != LSHARD_OK || reply.called)
			fail(world, "afterwards it does not come back: %s", reply.text);
	}
	if (phase < PHASE_DESTROY || phase == PHASE_RETURN)
		all_must(world, "afterwards, a pass", TOLD_PASS, generation_after(world, failures));
}

/* Once nothing is wrong any more, all make the call again. Some may have been through; a group begins anew. */
static int try_again(struct world *world)
{
	const struct matrix_step *step = &matrix_phases[world->cell->phase];
	const int alone = world->cell->phase == PHASE_RETURN ? world->cell->victim : -1;
	int failures = RANKS;

	for (int times = 0; times < 3 && failures; times++) {
		failures = 0;
		tell(world, alone, step->order, world->cell->phase == PHASE_END);
		for (int rank = 0; rank < RANKS; rank++) {
			hear(world, rank);
			failures += world->replied[rank] && world->replies[rank].status != LSHARD_OK;
		}
	}
	for (int rank = 0; rank < RANKS && failures; rank++)
		if (world->replied[rank] && world->replies[rank].status != LSHARD_OK)
			fail(world, "tried again: rank %d: %s", rank, world->replies[rank].text);
	return failures;
}

/* Who is left lets go of everything, and has no more than before it came. */
static void leave(struct world *world)
{
	if (world->cell->transport->collective)
		all_must(world, "aborting", TOLD_ABORT, 0);
	all_must(world, "destroying", TOLD_DESTROY, 0);
	all_must(world, "leaving", TOLD_LEAVE, 0);
	all_must(world, "counting", TOLD_COUNT, 0);
	for (int rank = 0; rank < RANKS; rank++) {
		const struct told_reply *after = &world->replies[rank], *before = &world->before[rank];

		if (lives(world, rank) && world->replied[rank] &&
		    (after->descriptors != before->descriptors || after->threads != before->threads || after->mappings))
			fail(world,
			     "rank %d is left with %d descriptors, %d threads, %d mappings; before it had %d, %d, 0",
			     rank, after->descriptors, after->threads, after->mappings, before->descriptors,
			     before->threads);
	}
}

/* ---- the cell ---- */

static void set_up(struct world *world)
{
	static const enum order orders[] = {TOLD_GROUP, TOLD_SERIES, TOLD_COMMIT, TOLD_BEGIN};
	static int jobs;

	world->options = (struct told_options){.transport = world->cell->transport->spec,
					       .layers = 5,
					       .tensor_bytes = 5000,
					       .timeout_ms = LONG_MS,
					       .prefetch = 1,
					       .rejoin = world->cell->transport->rejoin,
					       .on_device = world->cell->transport->on_device};
	snprintf(world->job, sizeof world->job, "matrix %d %d", (int)getpid(), jobs++);
	world->options.timeout_ms = MATRIX_TIMEOUT_MS;
	if (world->cell->transport->collective && !told_circle_open(&world->circle))
		fail(world, "no circle");
	for (int rank = 0; rank < RANKS; rank++)
		start(world, rank);
	all_must(world, "counting", TOLD_COUNT, 0);
	memcpy(world->before, world->replies, sizeof world->before);
	for (int step = 0; step < matrix_phases[world->cell->phase].steps; step++)
		all_must(world, "setting up", orders[step], 0);
	if (world->cell->phase == PHASE_RETURN) {
		told_kill(&world->of[world->cell->victim]);
		start(world, world->cell->victim);
	}
}

struct outcome cell_run(const struct cell *cell)
{
	const struct rule rule = matrix_rule(cell);
	struct world world = {.cell = cell, .outcome = {.after = GO_ON}};
	int failures = 0;

	set_up(&world);
	if (!world.outcome.failed)
		make_call(&world);
	if (!world.outcome.failed)
		failures = judge(&world, &rule);
	if (failures)
		world.outcome.after = rule.after_failure;
	if (!world.outcome.failed && world.outcome.after == RETRY)
		failures = try_again(&world);
	if (!world.outcome.failed && world.outcome.after != GIVE_UP && cell->fault != FAULT_KILLED_WITHIN)
		go_on(&world, failures);
	if (!world.outcome.failed && cell->phase != PHASE_LEAVE)
		leave(&world);
	for (int rank = 0; rank < RANKS; rank++)
		told_kill(&world.of[rank]);
	if (cell->transport->collective)
		told_circle_close(&world.circle);
	return world.outcome;
}
