/* SPDX-License-Identifier: Apache-2.0
 *
 * rejoin_soak.c - ranks that are killed at random moments, in passes, in updates and while they come back, for as long
 * as it is given: whoever is left passes on with the right bytes, whoever comes back has them too or is told why not,
 * and no rank keeps anything of those that went. rejoin_soak [SECONDS [SEED]]; the seed is printed.
 */
#include "patience.h"
#include "told_ranks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define RANKS 3

struct soak {
	struct told_rank of[RANKS];
	struct told_options options;
	char job[64];
	uint64_t generation;
	uint64_t random;
	struct told_reply least; /* what a rank of a whole group has; before it is known no descriptors */
	unsigned times, killed, returned, refused, updates, anew;
};

static unsigned draw(struct soak *soak, unsigned below)
{
	soak->random ^= soak->random << 13;
	soak->random ^= soak->random >> 7;
	soak->random ^= soak->random << 17;
	return (unsigned)(soak->random % below);
}

static void fault(const struct soak *soak, const char *what, const struct told_reply *reply)
{
	fprintf(stderr, "step %u: %s: %s: %s\n", soak->times, what, lshard_status_name(reply->status), reply->text);
	exit(1);
}

static void need(const struct soak *soak, const char *what, struct told_reply reply)
{
	if (reply.status != LSHARD_OK)
		fault(soak, what, &reply);
}

static int living(struct soak *soak, const struct told_rank *told[RANKS])
{
	int n = 0;

	for (int rank = 0; rank < RANKS; rank++)
		if (soak->of[rank].pid > 0)
			told[n++] = &soak->of[rank];
	return n;
}

static struct told_reply all_do(struct soak *soak, enum order order, uint64_t value)
{
	const struct told_rank *told[RANKS];

	return told_all(told, living(soak, told), order, 0, value);
}

/* A new group, which reads the weights. */
static void begin_anew(struct soak *soak)
{
	for (int rank = 0; rank < RANKS; rank++)
		told_kill(&soak->of[rank]);
	for (int rank = 0; rank < RANKS; rank++)
		told_start(&soak->of[rank], rank, RANKS, soak->job, &soak->options);
	soak->generation = 0;
	soak->anew++;
	need(soak, "a new group", all_do(soak, TOLD_GROUP, 0));
	need(soak, "its series", all_do(soak, TOLD_SERIES, 0));
	need(soak, "its commit", all_do(soak, TOLD_COMMIT, 0));
}

static void kill_later(struct soak *soak, int rank)
{
	usleep(draw(soak, 4) ? draw(soak, 3000) : 0);
	told_kill(&soak->of[rank]);
	soak->killed++;
}

/* Passes go on in the others; the one that comes may be killed on its way. */
static void come_back(struct soak *soak, int rank)
{
	static const enum order orders[] = {TOLD_GROUP, TOLD_SERIES, TOLD_COMMIT};
	const unsigned dies_at = draw(soak, 3) ? 99 : draw(soak, 3);
	struct told_reply reply = {.status = LSHARD_OK};

	told_start(&soak->of[rank], rank, RANKS, soak->job, &soak->options);
	for (unsigned i = 0; i < 3; i++) {
		if (i == dies_at) {
			(void)told_tell(&soak->of[rank], orders[i], 0, 0);
			kill_later(soak, rank);
			return;
		}
		reply = told_do(&soak->of[rank], orders[i], 0, 0);
		need(soak, "coming back", reply);
		if (!reply.returned)
			fault(soak, "it began anew beside others", &reply);
	}
	if (reply.called)
		fault(soak, "it has read weights", &reply);
	need(soak, "its pass", told_do(&soak->of[rank], TOLD_PASS, 0, soak->generation));
	soak->returned++;
}

/* Of those that live all fare alike; who failed is named. */
static bool fare_alike(struct soak *soak, const char *what, const struct told_rank *const *told, int n, int victim)
{
	struct told_reply first = {.status = LSHARD_OK}, reply = first;
	char name[16];

	snprintf(name, sizeof name, "rank %d", victim);
	for (int i = 0; i < n; i++) {
		if (told[i]->rank == victim)
			continue;
		if (!told_hear(told[i], &reply))
			fault(soak, "a rank has died", &reply);
		if (reply.status != LSHARD_OK && (reply.status != LSHARD_ERR_PEER_FAILED || !strstr(reply.text, name)))
			fault(soak, what, &reply);
		if (told[i] != told[0] && told[0]->rank != victim && reply.status != first.status)
			fault(soak, "ranks fare differently", &reply);
		first = reply;
	}
	return reply.status == LSHARD_OK;
}

/* One may be killed in either half. After the first the old bytes are there, after the second all begin anew. */
static void update(struct soak *soak)
{
	const int dies_in = draw(soak, 3) ? 2 : (int)draw(soak, 2);
	const int victim = dies_in < 2 ? (int)draw(soak, RANKS) : -1;
	const struct told_rank *told[RANKS];
	bool fared = true;
	int half;

	(void)living(soak, told);
	for (half = 0; half < 2 && fared; half++) {
		for (int rank = 0; rank < RANKS; rank++)
			if (soak->of[rank].pid > 0)
				(void)told_tell(told[rank], half ? TOLD_END : TOLD_BEGIN, 0, soak->generation + 1);
		if (half == dies_in)
			kill_later(soak, victim);
		fared = fare_alike(soak, half ? "the end of an update" : "an update", told, RANKS,
				   half >= dies_in ? victim : -1);
	}
	if (fared) {
		soak->generation++;
		soak->updates++;
	} else {
		soak->refused++;
	}
	if (!fared && half == 2)
		begin_anew(soak);
}

static bool has_more(const struct told_reply *reply, const struct told_reply *than)
{
	return reply->descriptors > than->descriptors || reply->threads > than->threads ||
	       reply->mappings > than->mappings;
}

/* All live: nothing is left of those that went. A door may still be about to close what a killed visitor has left. */
static void count(struct soak *soak)
{
	struct told_reply reply;

	need(soak, "verify", all_do(soak, TOLD_VERIFY, 0));
	for (int rank = 0; rank < RANKS; rank++) {
		for (int tries = 0; tries < 200; tries++) {
			reply = told_do(&soak->of[rank], TOLD_COUNT, 0, 0);
			need(soak, "counting", reply);
			if (soak->least.descriptors == 0)
				soak->least = reply;
			if (!has_more(&reply, &soak->least))
				break;
			usleep(10000);
		}
		if (!has_more(&reply, &soak->least))
			continue;
		fprintf(stderr, "step %u, rank %d: %d descriptors, %d threads, %d mappings instead of %d, %d, %d\n",
			soak->times, rank, reply.descriptors, reply.threads, reply.mappings, soak->least.descriptors,
			soak->least.threads, soak->least.mappings);
		exit(1);
	}
}

static void step(struct soak *soak)
{
	const struct told_rank *told[RANKS];
	const int n = living(soak, told);
	int rank = (int)draw(soak, RANKS);

	if (n == RANKS && draw(soak, 2)) {
		update(soak);
	} else if (n > 1 && draw(soak, 3) == 0) {
		(void)told_tell(told[n - 1], TOLD_ON_PASS, 0, soak->generation);
		kill_later(soak, told[n - 1]->rank);
	} else {
		while (soak->of[rank].pid > 0 && n < RANKS)
			rank = (rank + 1) % RANKS;
		if (n == RANKS)
			kill_later(soak, rank);
		for (int i = 0; i < n; i++)
			if (told[i]->rank != rank)
				(void)told_tell(told[i], TOLD_ON_PASS, 0, soak->generation);
		come_back(soak, rank);
		for (int i = 0; i < n; i++) {
			struct told_reply reply;

			if (told[i]->rank == rank)
				continue;
			(void)told_tell(told[i], TOLD_PASS, 0, soak->generation);
			if (!told_hear(told[i], &reply) || reply.status != LSHARD_OK || !told_hear(told[i], &reply))
				fault(soak, "passes while another came back", &reply);
			need(soak, "a pass after another came back", reply);
		}
	}
	need(soak, "a pass", all_do(soak, TOLD_PASS, soak->generation));
	if (living(soak, told) == RANKS)
		count(soak);
	soak->times++;
}

static double seconds(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

int main(int argc, char **argv)
{
	const double until = seconds() + (argc > 1 ? strtod(argv[1], NULL) : 10);
	const uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : (uint64_t)getpid() * 7919 + 1;
	struct soak soak = {.options = {.transport = "shm",
					.layers = 5,
					.tensor_bytes = 5000,
					.timeout_ms = LONG_MS,
					.prefetch = 1,
					.rejoin = LSHARD_REJOIN_ALLOW},
			    .random = seed};

	if (seed % 2)
		soak.options.transport = "shm:copy";
	printf("seed %llu, %s\n", (unsigned long long)seed, soak.options.transport);
	fflush(stdout);
	snprintf(soak.job, sizeof soak.job, "soak %d", (int)getpid());
	begin_anew(&soak);
	while (seconds() < until)
		step(&soak);
	for (int rank = 0; rank < RANKS; rank++)
		told_kill(&soak.of[rank]);
	printf("%u steps: %u ranks killed, %u came back, %u updates, %u refused, %u groups\n", soak.times, soak.killed,
	       soak.returned, soak.updates, soak.refused, soak.anew);
	return soak.returned == 0;
}
