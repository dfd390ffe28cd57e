/* SPDX-License-Identifier: Apache-2.0
 *
 * discovery.c - rank, size and the job's name from what a launcher left in the environment. Knows the launchers'
 * variables; talks to nobody.
 *
 * The first complete source wins. A source with one half missing is passed over where a later one is complete, as its
 * names may stem from an outer launcher, and refused otherwise; our own variables are meant for us and are refused at
 * once. A source with both halves that make no sense is refused at once.
 *
 * A job's name is made of the winning source's variables alone: another launcher's name may be of something larger, in
 * which the same rank and size are there more than once.
 */
#include "outside.h"
#include "sized.h"

#include <layershard/plan.h>

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_RANKS 65536

/* What a job's name is made of, in order; those that must be there stand first. */
struct naming {
	const char *variables[4];
	unsigned needed;
	unsigned
		needed_beside_none; /* where the first one is "none": torchrun's name of each job that was given none */
};

static const struct naming torchrun_naming = {
	{"TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"}, 1, 3};
static const struct naming pmix_naming = {{"PMIX_NAMESPACE"}, 1, 1};
static const struct naming slurm_naming = {{"SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"}, 2, 2};

struct source {
	const char *name;
	const char *rank;
	const char *size;
	const char *local_rank;
	int size_alone_counts; /* 1: a size without a rank is a source with one half missing; 0: it is no source */
	int ours;
	const struct naming *naming; /* NULL: it gives its jobs no name */
};

static const struct source sources[] = {
	{"LAYERSHARD_*", "LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_LOCAL_RANK", 1, 1, NULL},
	{"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", 1, 0, &torchrun_naming},
	{"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", 1, 0, &pmix_naming},
	/* PMIx tells a process its rank; the size comes through its own protocol, seldom through the environment. */
	{"PMIx", "PMIX_RANK", "PMIX_SIZE", "PMIX_LOCAL_RANK", 1, 0, &pmix_naming},
	{"PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", 1, 0, NULL},
	/* salloc sets SLURM_NTASKS in a shell that is no task. */
	{"Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", 0, 0, &slurm_naming},
};

#define N_SOURCES (sizeof sources / sizeof sources[0])

/* A decimal number without sign, space or tail, below 2^31. */
static int number(const char *text, int32_t *value)
{
	char *end;
	long parsed;

	if (text[0] < '0' || text[0] > '9')
		return 0;
	errno = 0;
	parsed = strtol(text, &end, 10);
	if (errno || *end || parsed > INT32_MAX)
		return 0;
	*value = (int32_t)parsed;
	return 1;
}

static lshard_status half(const struct source *source, const char *rank, const char *size, lshard_error *error)
{
	const char *present = rank ? source->rank : source->size;

	return lshard_fail(error, LSHARD_ERR_MISMATCH, "%s is incomplete: %s=%s is set but %s is not", source->name,
			   present, rank ? rank : size, rank ? source->size : source->rank);
}

static lshard_status local_rank(const struct source *source, lshard_discovered *found, lshard_error *error)
{
	const char *text = lshard__variable(source->local_rank);

	found->local_rank = -1;
	if (!text)
		return LSHARD_OK;
	if (!number(text, &found->local_rank))
		return lshard_fail(error, LSHARD_ERR_MISMATCH, "%s: %s=%s is not a number", source->name,
				   source->local_rank, text);
	if (found->local_rank >= found->size)
		return lshard_fail(error, LSHARD_ERR_MISMATCH, "%s: %s=%s is not below %s=%d", source->name,
				   source->local_rank, text, source->size, (int)found->size);
	return LSHARD_OK;
}

/* "torchrun:ID/localhost/29500/0". False where a part is missing or does not fit: cut, it may be another's. */
static bool write_name(const struct source *source, char *name, size_t bytes)
{
	const struct naming *naming = source->naming;
	const char *first = lshard__variable(naming->variables[0]);
	const unsigned needed = first && !strcmp(first, "none") ? naming->needed_beside_none : naming->needed;
	size_t used = (size_t)snprintf(name, bytes, "%s:", source->name);

	for (unsigned i = 0; i < 4 && naming->variables[i]; i++) {
		const char *part = lshard__variable(naming->variables[i]);

		if (!part && i < needed)
			return false;
		used += (size_t)snprintf(name + used, bytes - used, "%s%s", i ? "/" : "", part ? part : "");
		if (used >= bytes)
			return false;
	}
	return true;
}

/* Both halves are there: do they make sense? */
static lshard_status whole(const struct source *source, const char *rank, const char *size, lshard_discovered *found,
			   lshard_error *error)
{
	if (!number(rank, &found->rank))
		return lshard_fail(error, LSHARD_ERR_MISMATCH, "%s: %s=%s is not a number (%s=%s)", source->name,
				   source->rank, rank, source->size, size);
	if (!number(size, &found->size))
		return lshard_fail(error, LSHARD_ERR_MISMATCH, "%s: %s=%s is not a number (%s=%s)", source->name,
				   source->size, size, source->rank, rank);
	if (found->size < 1 || found->size > MOST_RANKS)
		return lshard_fail(error, LSHARD_ERR_MISMATCH, "%s: %s=%s is not in 1..%d", source->name, source->size,
				   size, MOST_RANKS);
	if (found->rank >= found->size)
		return lshard_fail(error, LSHARD_ERR_MISMATCH, "%s: %s=%s is not below %s=%s", source->name,
				   source->rank, rank, source->size, size);
	found->source = source->name;
	if (!source->naming || !write_name(source, found->job, sizeof found->job))
		found->job[0] = '\0';
	return local_rank(source, found, error);
}

/*
 * A PMIx launcher inside a Slurm allocation hands on the Slurm variables of its own daemon: they are this task's only
 * if both say the same rank.
 */
static lshard_status agrees_with_pmix(const struct source *source, const lshard_discovered *found, lshard_error *error)
{
	const char *text = lshard__variable("PMIX_RANK");
	int32_t rank;

	if (!text || (number(text, &rank) && rank == found->rank))
		return LSHARD_OK;
	return lshard_fail(
		error, LSHARD_ERR_MISMATCH,
		"PMIx is incomplete (PMIX_RANK=%s without a size) and %s does not speak of this rank (%s=%d, %s=%d): "
		"set LAYERSHARD_RANK and LAYERSHARD_SIZE",
		text, source->name, source->rank, (int)found->rank, source->size, (int)found->size);
}

static lshard_status discover(lshard_discovered *found, lshard_error *error)
{
	lshard_status status = LSHARD_ERR_STATE; /* until a half is seen */
	int pmix_passed = 0;

	(void)lshard_fail(error, status,
			  "no launcher says this process's rank: set LAYERSHARD_RANK and LAYERSHARD_SIZE");
	for (size_t i = 0; i < N_SOURCES; i++) {
		const struct source *source = &sources[i];
		const char *rank = lshard__variable(source->rank);
		const char *size = lshard__variable(source->size);

		if (!rank && !(size && source->size_alone_counts))
			continue;
		if (rank && size) {
			status = whole(source, rank, size, found, error);
			return status == LSHARD_OK && pmix_passed ? agrees_with_pmix(source, found, error) : status;
		}
		if (status == LSHARD_ERR_STATE)
			status = half(source, rank, size, error);
		if (source->ours)
			return status;
		pmix_passed |= !strcmp(source->name, "PMIx");
	}
	return status;
}

lshard_status lshard_discover(lshard_discovered *found, char *error, size_t error_bytes)
{
	lshard_discovered result = LSHARD_DISCOVERED_INIT;
	lshard_error cause = {{0}};
	lshard_status status;

	if (!found)
		status = lshard_fail(&cause, LSHARD_ERR_INVALID, "lshard_discover: found is NULL");
	else
		status = discover(&result, &cause);
	if (status == LSHARD_OK)
		status = lshard__sized_give(found, &result, sizeof result, "lshard_discovered", &cause);
	if (status < 0 && error && error_bytes)
		snprintf(error, error_bytes, "%s", cause.text);
	return status;
}
