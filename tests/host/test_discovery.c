/* SPDX-License-Identifier: Apache-2.0
 *
 * test_discovery.c - what every launcher leaves in the environment, whole, halved and broken, and what is made of it.
 */
#include "outside.h"

#include <layershard/plan.h>

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

struct scene {
	const char *title;
	const char *set[8]; /* NAME=VALUE */
	lshard_status status;
	int32_t rank;
	int32_t size;
	int32_t local_rank;
	const char *says[4]; /* the source, or parts of the error's text */
};

static const struct scene scenes[] = {
	{"nothing is set", {NULL}, LSHARD_ERR_STATE, 0, 0, 0, {"LAYERSHARD_RANK"}},
	{"ours", {"LAYERSHARD_RANK=2", "LAYERSHARD_SIZE=4"}, LSHARD_OK, 2, 4, -1, {"LAYERSHARD_*"}},
	{"ours with a local rank",
	 {"LAYERSHARD_RANK=2", "LAYERSHARD_SIZE=4", "LAYERSHARD_LOCAL_RANK=0"},
	 LSHARD_OK,
	 2,
	 4,
	 0,
	 {"LAYERSHARD_*"}},
	{"torchrun", {"RANK=1", "WORLD_SIZE=2", "LOCAL_RANK=1"}, LSHARD_OK, 1, 2, 1, {"torchrun"}},
	{"Open MPI",
	 {"OMPI_COMM_WORLD_RANK=3", "OMPI_COMM_WORLD_SIZE=8", "OMPI_COMM_WORLD_LOCAL_RANK=1", "PMIX_RANK=3"},
	 LSHARD_OK,
	 3,
	 8,
	 1,
	 {"Open MPI"}},
	{"PMIx with a size", {"PMIX_RANK=1", "PMIX_SIZE=3"}, LSHARD_OK, 1, 3, -1, {"PMIx"}},
	{"PMIx alone has no size", {"PMIX_RANK=1"}, LSHARD_ERR_MISMATCH, 0, 0, 0, {"PMIX_RANK=1", "PMIX_SIZE"}},
	{"PMIx under srun: Slurm knows the size",
	 {"PMIX_RANK=3", "SLURM_PROCID=3", "SLURM_NTASKS=4"},
	 LSHARD_OK,
	 3,
	 4,
	 -1,
	 {"Slurm"}},
	{"PMIx under a daemon that srun started: Slurm speaks of the daemon",
	 {"PMIX_RANK=3", "SLURM_PROCID=0", "SLURM_NTASKS=1"},
	 LSHARD_ERR_MISMATCH,
	 0,
	 0,
	 0,
	 {"PMIX_RANK=3", "SLURM_PROCID=0"}},
	{"PMI", {"PMI_RANK=0", "PMI_SIZE=2", "MPI_LOCALRANKID=0"}, LSHARD_OK, 0, 2, 0, {"PMI"}},
	{"Slurm", {"SLURM_PROCID=5", "SLURM_NTASKS=6", "SLURM_LOCALID=1"}, LSHARD_OK, 5, 6, 1, {"Slurm"}},
	{"inside salloc, no task", {"SLURM_NTASKS=6"}, LSHARD_ERR_STATE, 0, 0, 0, {"LAYERSHARD_RANK"}},
	{"salloc round torchrun", {"SLURM_NTASKS=6", "RANK=0", "WORLD_SIZE=2"}, LSHARD_OK, 0, 2, -1, {"torchrun"}},
	{"the first complete source wins",
	 {"LAYERSHARD_RANK=0", "LAYERSHARD_SIZE=3", "RANK=1", "WORLD_SIZE=2", "PMI_RANK=4", "PMI_SIZE=5"},
	 LSHARD_OK,
	 0,
	 3,
	 -1,
	 {"LAYERSHARD_*"}},
	{"a half source before a whole one is passed over",
	 {"RANK=7", "PMI_RANK=1", "PMI_SIZE=2"},
	 LSHARD_OK,
	 1,
	 2,
	 -1,
	 {"PMI"}},
	{"but not if it is ours",
	 {"LAYERSHARD_RANK=1", "RANK=0", "WORLD_SIZE=2"},
	 LSHARD_ERR_MISMATCH,
	 0,
	 0,
	 0,
	 {"LAYERSHARD_RANK=1", "LAYERSHARD_SIZE"}},
	{"a rank without a size",
	 {"RANK=1"},
	 LSHARD_ERR_MISMATCH,
	 0,
	 0,
	 0,
	 {"torchrun", "RANK=1", "WORLD_SIZE is not"}},
	{"a size without a rank", {"PMI_SIZE=2"}, LSHARD_ERR_MISMATCH, 0, 0, 0, {"PMI_SIZE=2", "PMI_RANK is not"}},
	{"a Slurm task without a size", {"SLURM_PROCID=0"}, LSHARD_ERR_MISMATCH, 0, 0, 0, {"SLURM_PROCID=0"}},
	{"the rank is the size", {"RANK=2", "WORLD_SIZE=2"}, LSHARD_ERR_MISMATCH, 0, 0, 0, {"RANK=2", "WORLD_SIZE=2"}},
	{"a negative rank",
	 {"LAYERSHARD_RANK=-1", "LAYERSHARD_SIZE=2"},
	 LSHARD_ERR_MISMATCH,
	 0,
	 0,
	 0,
	 {"LAYERSHARD_RANK=-1", "not a number"}},
	{"a rank with a tail", {"RANK=1x", "WORLD_SIZE=2"}, LSHARD_ERR_MISMATCH, 0, 0, 0, {"RANK=1x", "WORLD_SIZE=2"}},
	{"a rank with a space", {"RANK= 1", "WORLD_SIZE=2"}, LSHARD_ERR_MISMATCH, 0, 0, 0, {"RANK= 1"}},
	{"no ranks", {"RANK=0", "WORLD_SIZE=0"}, LSHARD_ERR_MISMATCH, 0, 0, 0, {"WORLD_SIZE=0", "1..65536"}},
	{"too many ranks", {"RANK=0", "WORLD_SIZE=65537"}, LSHARD_ERR_MISMATCH, 0, 0, 0, {"WORLD_SIZE=65537"}},
	{"a size beyond numbers",
	 {"RANK=0", "WORLD_SIZE=99999999999999999999"},
	 LSHARD_ERR_MISMATCH,
	 0,
	 0,
	 0,
	 {"WORLD_SIZE=99999999999999999999", "not a number"}},
	{"a local rank beyond the size",
	 {"RANK=0", "WORLD_SIZE=2", "LOCAL_RANK=2"},
	 LSHARD_ERR_MISMATCH,
	 0,
	 0,
	 0,
	 {"LOCAL_RANK=2"}},
	{"an empty variable is not set", {"RANK=", "WORLD_SIZE="}, LSHARD_ERR_STATE, 0, 0, 0, {NULL}},
};

static void unset_all(void)
{
	lshard_variable variable = LSHARD_VARIABLE_INIT;

	for (uint32_t i = 0; lshard_variable_info(i, &variable) == LSHARD_OK; i++)
		unsetenv(variable.name);
}

static void set_scene(const struct scene *scene)
{
	unset_all();
	for (int i = 0; scene->set[i]; i++) {
		char text[128];
		char *mark;

		snprintf(text, sizeof text, "%s", scene->set[i]);
		mark = strchr(text, '=');
		*mark = 0;
		setenv(text, mark + 1, 1);
	}
}

static int is_as_told(const struct scene *scene)
{
	lshard_discovered found = {sizeof found, -7, -7, -7, "untouched", "untouched"};
	char error[512] = "";
	lshard_status status = lshard_discover(&found, error, sizeof error);
	const char *said = status == LSHARD_OK ? found.source : error;
	int right = status == scene->status;

	if (status == LSHARD_OK)
		right &=
			found.rank == scene->rank && found.size == scene->size && found.local_rank == scene->local_rank;
	else
		right &= found.rank == -7 && !strcmp(found.source, "untouched") && !strcmp(found.job, "untouched");
	for (int i = 0; i < 4 && scene->says[i]; i++)
		right &= strstr(said, scene->says[i]) != NULL;
	if (!right)
		print_error("%s: status %d, rank %d of %d (local %d), '%s'\n", scene->title, (int)status,
			    (int)found.rank, (int)found.size, (int)found.local_rank, said);
	return right;
}

static void every_scene_is_as_told(void **state)
{
	int wrong = 0;

	(void)state;
	for (size_t i = 0; i < sizeof scenes / sizeof scenes[0]; i++) {
		set_scene(&scenes[i]);
		wrong += !is_as_told(&scenes[i]);
	}
	unset_all();
	assert_int_equal(wrong, 0);
}

struct naming_scene {
	const char *title;
	const char *set[8]; /* NAME=VALUE */
	const char *job;
};

static const struct naming_scene names[] = {
	{"our variables name no job", {"LAYERSHARD_RANK=0", "LAYERSHARD_SIZE=2", "PMIX_NAMESPACE=7"}, ""},
	{"torchrun",
	 {"RANK=0", "WORLD_SIZE=2", "TORCHELASTIC_RUN_ID=a1", "MASTER_ADDR=localhost", "MASTER_PORT=29500",
	  "TORCHELASTIC_RESTART_COUNT=0"},
	 "torchrun:a1/localhost/29500/0"},
	{"torchrun, restarted",
	 {"RANK=0", "WORLD_SIZE=2", "TORCHELASTIC_RUN_ID=a1", "MASTER_ADDR=localhost", "MASTER_PORT=29500",
	  "TORCHELASTIC_RESTART_COUNT=2"},
	 "torchrun:a1/localhost/29500/2"},
	{"torchrun whose job was given no name: the address tells",
	 {"RANK=0", "WORLD_SIZE=2", "TORCHELASTIC_RUN_ID=none", "MASTER_ADDR=127.0.0.1", "MASTER_PORT=29501"},
	 "torchrun:none/127.0.0.1/29501/"},
	{"no name and no port: every such job has that",
	 {"RANK=0", "WORLD_SIZE=2", "TORCHELASTIC_RUN_ID=none", "MASTER_ADDR=127.0.0.1"},
	 ""},
	{"a name of its own needs no address", {"RANK=0", "WORLD_SIZE=2", "TORCHELASTIC_RUN_ID=a1"}, "torchrun:a1///"},
	{"whoever set these is not known",
	 {"RANK=0", "WORLD_SIZE=2", "MASTER_ADDR=localhost", "MASTER_PORT=29500"},
	 ""},
	{"Open MPI", {"OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE=2", "PMIX_NAMESPACE=148950"}, "Open MPI:148950"},
	{"Open MPI before PMIx", {"OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE=2"}, ""},
	{"PMIx", {"PMIX_RANK=0", "PMIX_SIZE=2", "PMIX_NAMESPACE=slurm.pmix.7.0"}, "PMIx:slurm.pmix.7.0"},
	{"PMI names nothing", {"PMI_RANK=0", "PMI_SIZE=2", "SLURM_JOB_ID=7", "SLURM_STEP_ID=0"}, ""},
	{"Slurm", {"SLURM_PROCID=0", "SLURM_NTASKS=2", "SLURM_JOB_ID=7", "SLURM_STEP_ID=3"}, "Slurm:7/3/"},
	{"Slurm, queued again",
	 {"SLURM_PROCID=0", "SLURM_NTASKS=2", "SLURM_JOB_ID=7", "SLURM_STEP_ID=3", "SLURM_RESTART_COUNT=1"},
	 "Slurm:7/3/1"},
	{"Slurm without a step", {"SLURM_PROCID=0", "SLURM_NTASKS=2", "SLURM_JOB_ID=7"}, ""},
	{"torchrun in a Slurm task: its own name, not the larger one",
	 {"RANK=0", "WORLD_SIZE=2", "SLURM_PROCID=0", "SLURM_NTASKS=2", "SLURM_JOB_ID=7", "SLURM_STEP_ID=3"},
	 ""},
};

static void the_launchers_name_of_a_job_is_found(void **state)
{
	(void)state;
	for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
		struct scene scene = {.title = names[i].title};
		lshard_discovered found = LSHARD_DISCOVERED_INIT;

		memcpy(scene.set, names[i].set, sizeof scene.set);
		set_scene(&scene);
		assert_int_equal(lshard_discover(&found, NULL, 0), LSHARD_OK);
		if (strcmp(found.job, names[i].job) != 0)
			fail_msg("%s: '%s' instead of '%s'", names[i].title, found.job, names[i].job);
	}
	unset_all();
}

static void a_name_that_does_not_fit_is_none(void **state)
{
	char long_name[300];
	lshard_discovered found = LSHARD_DISCOVERED_INIT;

	(void)state;
	unset_all();
	memset(long_name, 'x', sizeof long_name);
	setenv("RANK", "0", 1);
	setenv("WORLD_SIZE", "2", 1);
	for (size_t length = 230; length < sizeof long_name; length++) {
		long_name[length] = '\0';
		setenv("TORCHELASTIC_RUN_ID", long_name, 1);
		long_name[length] = 'x';
		assert_int_equal(lshard_discover(&found, NULL, 0), LSHARD_OK);
		assert_int_equal(strlen(found.job), length + strlen("torchrun:///") < sizeof found.job
							    ? length + strlen("torchrun:///")
							    : 0);
	}
	unset_all();
}

static void a_short_buffer_gets_the_beginning(void **state)
{
	lshard_discovered found = LSHARD_DISCOVERED_INIT;
	char error[8] = "";

	(void)state;
	unset_all();
	assert_int_equal(lshard_discover(&found, error, sizeof error), LSHARD_ERR_STATE);
	assert_int_equal(strlen(error), sizeof error - 1);
	assert_int_equal(lshard_discover(&found, NULL, 0), LSHARD_ERR_STATE);
	assert_int_equal(lshard_discover(NULL, error, sizeof error), LSHARD_ERR_INVALID);
}

static void variables_show_value_and_default(void **state)
{
	lshard_variable variable = LSHARD_VARIABLE_INIT;
	int seen = 0;

	(void)state;
	unset_all();
	setenv("LAYERSHARD_TIMEOUT_MS", "1234", 1);
	for (uint32_t i = 0; lshard_variable_info(i, &variable) == LSHARD_OK; i++) {
		assert_true(variable.help[0] != 0);
		if (!strcmp(variable.name, "LAYERSHARD_TIMEOUT_MS")) {
			assert_string_equal(variable.value, "1234");
			assert_string_equal(variable.default_value, "30000");
			seen++;
		} else {
			assert_string_equal(variable.value, variable.default_value);
		}
	}
	assert_int_equal(seen, 1);
	unset_all();
}

/* What is read is listed: a variable outside the table cannot be read. */
static void a_variable_that_is_not_listed_is_not_read(void **state)
{
	(void)state;
	setenv("LAYERSHARD_UNLISTED", "1", 1);
	assert_null(lshard__variable("LAYERSHARD_UNLISTED"));
	setenv("LAYERSHARD_JOB", "", 1);
	assert_null(lshard__variable("LAYERSHARD_JOB"));
	setenv("LAYERSHARD_JOB", "x", 1);
	assert_string_equal(lshard__variable("LAYERSHARD_JOB"), "x");
	unset_all();
	unsetenv("LAYERSHARD_UNLISTED");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_scene_is_as_told),
		cmocka_unit_test(the_launchers_name_of_a_job_is_found),
		cmocka_unit_test(a_name_that_does_not_fit_is_none),
		cmocka_unit_test(a_short_buffer_gets_the_beginning),
		cmocka_unit_test(variables_show_value_and_default),
		cmocka_unit_test(a_variable_that_is_not_listed_is_not_read),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
