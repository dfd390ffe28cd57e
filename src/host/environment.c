/* SPDX-License-Identifier: Apache-2.0
 *
 * environment.c - the one table of the environment variables this library reads.
 * A variable that is not in the table cannot be read: what `layershard info` lists is all there is.
 */
#include "outside.h"
#include "sized.h"

#include <layershard/plan.h>

#include <stdlib.h>
#include <string.h>

static const struct {
	const char *name;
	const char *default_value;
	const char *help;
} variables[] = {
	{"LAYERSHARD_RANK", "", "number of this rank, 0..LAYERSHARD_SIZE-1"},
	{"LAYERSHARD_SIZE", "", "number of ranks"},
	{"LAYERSHARD_LOCAL_RANK", "", "number of this rank among those of its host"},
	{"LAYERSHARD_JOB", "",
	 "name under which separately started ranks of one host and user find each other; else the launcher's"},
	{"LAYERSHARD_RENDEZVOUS_DIR", "",
	 "directory of mode 0700 in which those ranks find each other, the same on all, instead of by an abstract "
	 "name"},
	{"LAYERSHARD_TRANSPORT", "auto", "transport, with wrappers in front: trace=FILE,throttle=BYTES_PER_S,shm:copy"},
	{"LAYERSHARD_CUDA_SO_PATH", "libcuda.so.1", "NVIDIA's driver library"},
	{"LAYERSHARD_NVML_SO_PATH", "libnvidia-ml.so.1", "NVIDIA's management library, which knows NVLink domains"},
	{"LAYERSHARD_LARGE_PAGES", "auto",
	 "pages of 2 MiB for shards and windows in host memory: auto (where they are to be had), never, require"},
	{"LAYERSHARD_NUMA", "none",
	 "NUMA nodes of shards in host memory: none (where they are first written), interleave, source, copy (on each "
	 "node "
	 "that ranks are on)"},
	{"LAYERSHARD_REJOIN", "never",
	 "allow: a rank that has ended may come back under its number while the others go on; never"},
	{"LAYERSHARD_POISON", "0",
	 "1: windows hold poison outside of views; ready: they can, when the program says so"},
	{"LAYERSHARD_TIMEOUT_MS", "30000", "longest wait of any blocking call, in milliseconds"},
	{"RANK", "", "rank as set by torchrun"},
	{"WORLD_SIZE", "", "number of ranks as set by torchrun"},
	{"LOCAL_RANK", "", "rank on its host as set by torchrun"},
	{"TORCHELASTIC_RUN_ID", "", "name of a job as set by torchrun"},
	{"TORCHELASTIC_RESTART_COUNT", "", "restarts of a job so far as set by torchrun; each has a name of its own"},
	{"MASTER_ADDR", "", "a part of the job's name, beside TORCHELASTIC_RUN_ID"},
	{"MASTER_PORT", "", "a part of the job's name, beside TORCHELASTIC_RUN_ID"},
	{"OMPI_COMM_WORLD_RANK", "", "rank as set by Open MPI"},
	{"OMPI_COMM_WORLD_SIZE", "", "number of ranks as set by Open MPI"},
	{"OMPI_COMM_WORLD_LOCAL_RANK", "", "rank on its host as set by Open MPI"},
	{"PMIX_NAMESPACE", "", "name of a job as set by Open MPI and PMIx launchers"},
	{"PMIX_RANK", "", "rank as set by a PMIx launcher"},
	{"PMIX_SIZE", "", "number of ranks, from PMIx launchers that set it"},
	{"PMIX_LOCAL_RANK", "", "rank on its host, from PMIx launchers that set it"},
	{"PMI_RANK", "", "rank as set by a PMI launcher (MPICH, Intel MPI)"},
	{"PMI_SIZE", "", "number of ranks as set by a PMI launcher"},
	{"MPI_LOCALRANKID", "", "rank on its host as set by MPICH and Intel MPI"},
	{"SLURM_PROCID", "", "rank as set by Slurm for each task of srun"},
	{"SLURM_NTASKS", "", "number of ranks as set by Slurm; no source without SLURM_PROCID"},
	{"SLURM_LOCALID", "", "rank on its host as set by Slurm"},
	{"SLURM_JOB_ID", "", "name of a job as set by Slurm"},
	{"SLURM_STEP_ID", "", "number of srun within the job, a part of the name"},
	{"SLURM_RESTART_COUNT", "", "how often Slurm has queued the job again, a part of the name"},
};

#define N_VARIABLES (sizeof variables / sizeof variables[0])

static const char *set_value(const char *name)
{
	const char *value = getenv(name);

	return value && value[0] ? value : NULL;
}

const char *lshard__variable(const char *name)
{
	for (size_t i = 0; i < N_VARIABLES; i++)
		if (!strcmp(variables[i].name, name))
			return set_value(name);
	return NULL;
}

lshard_status lshard_variable_info(uint32_t index, lshard_variable *variable)
{
	lshard_variable found = LSHARD_VARIABLE_INIT;
	const char *value;

	if (index >= N_VARIABLES)
		return LSHARD_ERR_RANGE;
	if (!variable)
		return LSHARD_ERR_INVALID;
	value = set_value(variables[index].name);
	found.name = variables[index].name;
	found.value = value ? value : variables[index].default_value;
	found.default_value = variables[index].default_value;
	found.help = variables[index].help;
	return lshard__sized_give(variable, &found, sizeof found, "lshard_variable", NULL);
}
