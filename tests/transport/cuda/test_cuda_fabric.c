/* SPDX-License-Identifier: Apache-2.0
 *
 * test_cuda_fabric.c - ranks of two hosts in one NVLink domain, over a stand-in for the driver: right bytes on all of
 * them, each refusal by its name and on all ranks alike, and what the others hear when a rank or its host is gone. The
 * hosts are made up here: ranks are processes, and the last one is told to be elsewhere.
 */
#include "cuda_ranks.h"
#include "host_identity.h"
#include "socket_circle.h"
#include "transports.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

/* ---- two hosts ---- */

static char elsewhere;

void __real_lshard__host_identify(struct host_identity *identity); /* as the linker calls it */
void __wrap_lshard__host_identify(struct host_identity *identity);

void __wrap_lshard__host_identify(struct host_identity *identity)
{
	__real_lshard__host_identify(identity);
	identity->boot[0] = (char)(identity->boot[0] + elsewhere);
	identity->network += (uint64_t)elsewhere;
}

/* ---- ranks that meet by collectives of their own ---- */

struct scene {
	struct setting setting;
	int one_host;
	enum stub_setting changed; /* with a number: of the stub of rank @at to @to */
	int64_t to;
	int32_t at;
	const char *symbol; /* or: the next call of this one fails there, with @result */
	cuda_result result;
	lshard_status status;
	const char *says;
};

struct party {
	struct rank rank;
	struct member member;
	struct setting setting;
	struct socket_circle meeting; /* while the group is made */
	struct socket_circle circle;  /* from then on */
	lshard_bootstrap bootstrap;
	pid_t pids[CIRCLE_RANKS];
};

static int meet(struct party *party, const struct member *member, const struct scene *scene)
{
	const pid_t mine = getpid();

	memset(party, 0, sizeof *party);
	elsewhere = !scene->one_host && member->rank == CIRCLE_RANKS - 1;
	party->member = *member;
	party->setting = scene->setting;
	cuda_set_stub(member, &party->setting);
	EXPECT(member, socket_circle_join(&party->meeting, &party->member), "joining");
	EXPECT(member, socket_circle_join(&party->circle, &party->member), "joining");
	party->bootstrap = socket_circle_bootstrap(&party->meeting);
	EXPECT(member, !party->bootstrap.allgather(&party->meeting, &mine, party->pids, sizeof mine), "numbers");
	party->member.bootstrap = &party->bootstrap;
	party->member.job = NULL;
	party->setting.callbacks = &party->circle.callbacks;
	return 1;
failed:
	return 0;
}

static void part(struct party *party)
{
	cuda_close_rank(&party->rank);
	socket_circle_leave(&party->circle);
	socket_circle_leave(&party->meeting);
}

static int open_all(struct party *party, const struct member *member, const struct scene *scene)
{
	struct rank *rank = &party->rank;

	if (!meet(party, member, scene))
		return 0;
	EXPECT(member, cuda_open_group(rank, &party->member, &party->setting) == LSHARD_OK, "%s", rank->error);
	EXPECT(member, cuda_create_series(rank) == LSHARD_OK, "%s", lshard_group_error(rank->group));
	cuda_foretell(rank, 0);
	OK(rank, lshard_series_commit(rank->series, cuda_fill_layer, rank));
	EXPECT(member, cuda_open_streams(rank), "streams");
	return 1;
failed:
	return 0;
}

/* ---- right bytes ---- */

static int passes(struct rank *rank)
{
	const int32_t shift = rank->member->rank;

	for (uint32_t i = 0; i < 6; i++) /* each at its own pace: nobody waits for anybody */
		if (!cuda_one_pass(rank, 1 + (i + (uint32_t)shift) % LAYERS, rank->streams[i & 1]))
			return 0;
	return cuda_one_pass(rank, LAYERS, rank->streams[0]) && cuda_all_right(rank, "passes");
}

static int replays(struct rank *rank)
{
	cuda_graph graph = NULL;
	cuda_graph_exec exec = NULL;

	OK(rank, lshard_series_prepare(rank->series, rank->streams[0]));
	EXPECT(rank->member, !cuStreamBeginCapture_v2(rank->streams[0], 0), "begin");
	if (!cuda_one_pass(rank, LAYERS, rank->streams[0]))
		goto failed;
	OK(rank, lshard_series_join(rank->series, rank->streams[0]));
	EXPECT(rank->member, !cuStreamEndCapture(rank->streams[0], &graph), "end");
	EXPECT(rank->member, !cuGraphInstantiateWithFlags(&exec, graph, 0) && !cuGraphDestroy(graph), "instantiate");
	for (int i = 0; i < 3; i++) {
		OK(rank, lshard_series_prepare(rank->series, rank->streams[0]));
		EXPECT(rank->member, !cuGraphLaunch(exec, rank->streams[0]), "launch");
	}
	EXPECT(rank->member, !cuGraphExecDestroy(exec), "destroy");
	return cuda_all_right(rank, "replays");
failed:
	return 0;
}

static int shares_layers(const struct member *member)
{
	const struct scene *scene = member->user;
	struct party party;
	struct rank *rank = &party.rank;

	if (!open_all(&party, member, scene))
		goto failed;
	EXPECT(member, strstr(lshard_group_transport(rank->group), scene->says), "%s",
	       lshard_group_transport(rank->group));
	if (!passes(rank) || !replays(rank))
		goto failed;
	OK(rank, lshard_series_verify(rank->series, NULL));
	OK(rank, lshard_series_update_begin(rank->series));
	cuda_foretell(rank, 1);
	OK(rank, lshard_series_update_end(rank->series, cuda_fill_layer, rank));
	if (!passes(rank))
		goto failed;
	part(&party);
	EXPECT(member, stub_cuda_outstanding() == 0, "%d objects are left", stub_cuda_outstanding());
	return 0;
failed:
	part(&party);
	return 1;
}

static void layers_come_from_another_host(void **state)
{
	const struct scene scenes[] = {
		{{.spec = "auto", .prefetch = 1, .late = 11}, .says = "fabric (auto: an NVLink domain"},
		{{.spec = "fabric", .prefetch = 2, .late = 12, .neighbours = 2}, .says = "fabric ("},
		{{.spec = "fabric", .placement = LSHARD_STRIPED, .prefetch = 1, .late = 13}, .says = "fabric ("},
		{{.spec = "fabric:copy", .placement = LSHARD_STRIPED, .late = 14, .neighbours = 2},
		 .says = "fabric:copy ("},
		{{.spec = "trace=fabric.json,fabric:floor=0+pace=1000", .prefetch = 1},
		 .says = "trace=fabric.json,fabric:floor=0+pace=1000 ("},
		{{.spec = "fabric", .prefetch = 1, .late = 16}, .one_host = 1, .says = "fabric (as asked"},
	};

	(void)state;
	for (size_t i = 0; i < sizeof scenes / sizeof scenes[0]; i++) {
		struct scene scene = scenes[i];

		assert_int_equal(team_of_processes(CIRCLE_RANKS, shares_layers, &scene), 0);
	}
}

/* On one host "auto" needs no domain. */
static void one_host_is_no_matter_of_domains(void **state)
{
	struct scene scene = {{.spec = "auto", .prefetch = 1}, .one_host = 1, .says = "cuda (auto: all ranks on one"};

	(void)state;
	assert_int_equal(team_of_processes(CIRCLE_RANKS, shares_layers, &scene), 0);
}

/* ---- refusals ---- */

static int is_refused(const struct member *member)
{
	const struct scene *scene = member->user;
	struct party party;
	lshard_status status;

	if (!meet(&party, member, scene))
		goto failed;
	if (scene->symbol && member->rank == scene->at)
		stub_cuda_fail(scene->symbol, 1, scene->result);
	else if (!scene->symbol && (scene->at < 0 || member->rank == scene->at))
		stub_cuda_set(scene->changed, scene->to);
	status = cuda_open_group(&party.rank, &party.member, &party.setting);
	EXPECT(member, status == scene->status, "status %d: %s", (int)status, party.rank.error);
	SAYS(member, party.rank.error, scene->says);
	part(&party);
	EXPECT(member, stub_cuda_outstanding() == 0, "%d objects are left", stub_cuda_outstanding());
	return 0;
failed:
	part(&party);
	return 1;
}

#define ASKED {.spec = "fabric", .prefetch = 1}

static void what_cannot_hold_is_refused_by_name(void **state)
{
	const struct scene scenes[] = {
		{ASKED, .changed = STUB_CLIQUE, .to = 7, .at = 2, .status = LSHARD_ERR_NOT_SUPPORTED,
		 .says = "ranks 0 and 2 are in two NVLink domains: clique 0 of cluster "
			 "00000000000000000000000000000001, "
			 "and clique 7 of cluster 00000000000000000000000000000001"},
		{ASKED, .changed = STUB_CLUSTER, .to = 2, .at = 1, .status = LSHARD_ERR_NOT_SUPPORTED,
		 .says = "ranks 0 and 1 are in two NVLink domains: clique 0 of cluster 0"},
		{ASKED, .changed = STUB_CLUSTER, .to = 0, .at = -1, .status = LSHARD_ERR_NOT_SUPPORTED,
		 .says = "ranks 0 and 2 are on two hosts, and the device of rank 0 (Stub 0, 0000:00:00.0) is in no "
			 "NVLink "
			 "domain of several hosts"},
		{ASKED, .changed = STUB_CLUSTER, .to = 0, .at = 2, .status = LSHARD_ERR_NOT_SUPPORTED,
		 .says = "the device of rank 2 (Stub 2, 0000:02:00.0) is in no NVLink domain"},
		{ASKED, .changed = STUB_FABRIC, .to = 0, .at = 2, .status = LSHARD_ERR_NOT_SUPPORTED,
		 .says = "rank 2: Stub 2 (0000:02:00.0) has no fabric handles"},
		{ASKED, .changed = STUB_CHANNEL, .to = 0, .at = 0, .status = LSHARD_ERR_NOT_SUPPORTED,
		 .says = "rank 0: no fabric handle is granted on Stub 0 (0000:00:00.0): is nvidia-imex running, and "
			 "may "
			 "this process open a channel in /dev/nvidia-caps-imex-channels?: cuMemCreate: "
			 "CUDA_ERROR_NOT_PERMITTED"},
		{ASKED, .changed = STUB_VERSION, .to = 12020, .at = 1, .status = LSHARD_ERR_NOT_SUPPORTED,
		 .says = "fabric is not available on rank 1: the driver is for CUDA 12.2; 12.3 or later is needed"},
		{ASKED, .symbol = "cuMemImportFromShareableHandle", .result = CUDA_NOT_PERMITTED, .at = 0,
		 .status = LSHARD_ERR_NOT_SUPPORTED,
		 .says = "rank 0: series 'link check': opening the shard of rank 1, on Stub 1 (0000:01:00.0), by its "
			 "fabric "
			 "handle: does one nvidia-imex serve both hosts, and have both ranks the same channel of it? "
			 "cuMemImportFromShareableHandle: CUDA_ERROR_NOT_PERMITTED"},
		{ASKED, .symbol = "cuMemExportToShareableHandle", .result = CUDA_UNSUPPORTED, .at = 2,
		 .status = LSHARD_ERR_NOT_SUPPORTED, .says = "cuMemExportToShareableHandle: CUDA_ERROR_NOT_SUPPORTED"},
		{{.spec = "fabric:ipc"},
		 .changed = STUB_FABRIC,
		 .to = 1,
		 .status = LSHARD_ERR_INVALID,
		 .says = "fabric has no option 'ipc': it has copy, floor=GB/S, pace=GB/S"},
		{{.spec = "cuda"},
		 .changed = STUB_FABRIC,
		 .to = 1,
		 .status = LSHARD_ERR_NOT_SUPPORTED,
		 .says = "cuda connects ranks of one host, and ranks 0 and 2 are on two"},
		{{.spec = "auto"},
		 .changed = STUB_CLIQUE,
		 .to = 7,
		 .at = 1,
		 .status = LSHARD_ERR_NOT_SUPPORTED,
		 .says = "ranks 0 and 1 are in two NVLink domains"},
	};

	(void)state;
	for (size_t i = 0; i < sizeof scenes / sizeof scenes[0]; i++) {
		struct scene scene = scenes[i];

		assert_int_equal(team_of_processes(CIRCLE_RANKS, is_refused, &scene), 0);
	}
}

/* Where nobody can say which domain it is, opening a peer's memory shows it. */
static void without_the_management_library_memory_itself_is_tried(void **state)
{
	struct scene right = {ASKED, .says = "fabric ("};
	struct scene wrong = {ASKED,
			      .symbol = "cuMemImportFromShareableHandle",
			      .result = CUDA_NOT_PERMITTED,
			      .at = 2,
			      .status = LSHARD_ERR_NOT_SUPPORTED,
			      .says = "rank 2: series 'link check': opening the shard"};

	(void)state;
	setenv("LAYERSHARD_NVML_SO_PATH", "/nowhere/libnvidia-ml.so.1", 1);
	assert_int_equal(team_of_processes(CIRCLE_RANKS, shares_layers, &right), 0);
	assert_int_equal(team_of_processes(CIRCLE_RANKS, is_refused, &wrong), 0);
	setenv("LAYERSHARD_NVML_SO_PATH", getenv("LAYERSHARD_CUDA_SO_PATH"), 1);
}

static void *lend(void *user, lshard_purpose purpose, size_t bytes, size_t alignment)
{
	(void)user;
	(void)purpose;
	(void)bytes;
	(void)alignment;
	return NULL;
}

static void take_back(void *user, lshard_purpose purpose, void *pointer)
{
	(void)user;
	(void)purpose;
	(void)pointer;
}

static int refuses_lent_memory(const struct member *member)
{
	const struct scene *scene = member->user;
	const lshard_memory_source source = {sizeof source, lend, take_back, NULL};
	struct party party;

	if (!meet(&party, member, scene))
		goto failed;
	EXPECT(member, cuda_open_group(&party.rank, &party.member, &party.setting) == LSHARD_OK, "%s",
	       party.rank.error);
	EXPECT(member, cuda_create_series_in(&party.rank, &source) == LSHARD_ERR_NOT_SUPPORTED, "%s",
	       lshard_group_error(party.rank.group));
	part(&party);
	return 0;
failed:
	part(&party);
	return 1;
}

static void memory_of_the_caller_is_refused(void **state)
{
	struct scene scene = {ASKED, .at = -1};

	(void)state;
	assert_int_equal(team_of_processes(CIRCLE_RANKS, refuses_lent_memory, &scene), 0);
}

/* ---- "auto" where there is no such domain ---- */

/* A device of which nothing is asked but that it is there. */
static void *no_memory(void *user, size_t bytes, size_t alignment)
{
	(void)user;
	(void)bytes;
	(void)alignment;
	return NULL;
}

static void no_release(void *user, void *pointer)
{
	(void)user;
	(void)pointer;
}

static lshard_status no_record(void *user, void **event, void *stream, char *error, size_t error_bytes)
{
	(void)user;
	(void)event;
	(void)stream;
	(void)error;
	(void)error_bytes;
	return LSHARD_OK;
}

static lshard_status no_wait(void *user, void *stream, void *event, char *error, size_t error_bytes)
{
	return no_record(user, NULL, event ? stream : NULL, error, error_bytes);
}

static lshard_status no_query(void *user, void *event, char *error, size_t error_bytes)
{
	return no_record(user, NULL, event, error, error_bytes);
}

static void no_drop(void *user, void *event)
{
	(void)user;
	(void)event;
}

static lshard_status no_copy(void *user, void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
			     size_t rows, char *error, size_t error_bytes)
{
	(void)to;
	(void)to_pitch;
	(void)from;
	(void)from_pitch;
	(void)width;
	(void)rows;
	return no_record(user, NULL, NULL, error, error_bytes);
}

static int no_capture(void *user, void *stream)
{
	(void)user;
	(void)stream;
	return 0;
}

static int falls_back(const struct member *member)
{
	const struct scene *scene = member->user;
	const lshard_device_callbacks device = {sizeof device, NULL,     no_memory, no_release, no_record,
						no_wait,       no_query, no_drop,   no_copy,    no_capture};
	struct party party;

	if (!meet(&party, member, scene))
		goto failed;
	party.circle.callbacks.device = &device;
	if (member->rank == scene->at)
		stub_cuda_set(scene->changed, scene->to);
	EXPECT(member, cuda_open_group(&party.rank, &party.member, &party.setting) == LSHARD_OK, "%s",
	       party.rank.error);
	SAYS(member, lshard_group_transport(party.rank.group), scene->says);
	part(&party);
	EXPECT(member, stub_cuda_outstanding() == 0, "%d objects are left", stub_cuda_outstanding());
	return 0;
failed:
	part(&party);
	return 1;
}

static void without_a_domain_the_collectives_carry_layers(void **state)
{
	const struct scene scenes[] = {
		{{.spec = "auto"},
		 .changed = STUB_CHANNEL,
		 .to = 0,
		 .at = 1,
		 .says = "callback (auto: the caller's collectives"},
		{{.spec = "auto"},
		 .changed = STUB_CLIQUE,
		 .to = 9,
		 .at = 2,
		 .says = "callback (auto: the caller's collectives"},
		{{.spec = "auto"}, .at = -1, .says = "fabric (auto: an NVLink domain"},
	};

	(void)state;
	for (size_t i = 0; i < sizeof scenes / sizeof scenes[0]; i++) {
		struct scene scene = scenes[i];

		assert_int_equal(team_of_processes(CIRCLE_RANKS, falls_back, &scene), 0);
	}
}

/* ---- ranks that are gone ---- */

/* Rank 2 is killed in the next call of the symbol that opening a series makes. */
static int hears_of_a_death(const struct member *member)
{
	const struct scene *scene = member->user;
	struct party party;
	struct rank *rank = &party.rank;
	double began_s;
	lshard_status status;

	if (!meet(&party, member, scene))
		goto failed;
	EXPECT(member, cuda_open_group(rank, &party.member, &party.setting) == LSHARD_OK, "%s", rank->error);
	if (!team_barrier(member))
		goto failed;
	if (member->rank == 2) {
		team_dies(member);
		stub_cuda_fail(scene->symbol, 1, STUB_KILLED);
	}
	began_s = cuda_now_s();
	status = cuda_create_series(rank);
	EXPECT(member, status == LSHARD_ERR_PEER_FAILED, "%s: status %d: %s", scene->symbol, (int)status,
	       lshard_group_error(rank->group));
	SAYS(member, lshard_group_error(rank->group), "rank 2 is gone");
	EXPECT(member, cuda_now_s() - began_s < LONG_MS / 2e3, "told after %.1f s", cuda_now_s() - began_s);
	part(&party);
	EXPECT(member, stub_cuda_outstanding() == 0, "%s: %d objects are left", scene->symbol, stub_cuda_outstanding());
	return 0;
failed:
	part(&party);
	return 1;
}

static void deaths_while_a_series_opens_are_told(void **state)
{
	static const char *const symbols[] = {"cuMemCreate", "cuMemExportToShareableHandle",
					      "cuMemImportFromShareableHandle", "cuGraphUpload"};

	(void)state;
	for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
		struct scene scene = {ASKED, .symbol = symbols[i]};

		assert_int_equal(team_of_processes(CIRCLE_RANKS, hears_of_a_death, &scene), 0);
	}
}

/*
 * Killed, or stopped as a host that does not answer: passes ask nobody; what all must agree on fails, by the deadline.
 */
static int outlives(const struct member *member)
{
	const struct scene *scene = member->user;
	struct party party;
	struct rank *rank = &party.rank;
	double began_s;
	lshard_status status;

	if (!open_all(&party, member, scene) || !cuda_one_pass(rank, 3, rank->streams[0]) || !team_barrier(member))
		goto failed;
	if (member->rank == 2) {
		team_dies(member);
		raise((int)scene->to);
	}
	began_s = cuda_now_s();
	status = lshard_series_update_begin(rank->series);
	EXPECT(member, status == scene->status, "status %d: %s", (int)status, lshard_series_error(rank->series));
	SAYS(member, lshard_series_error(rank->series), scene->says);
	EXPECT(member, cuda_now_s() - began_s < 10 * scene->setting.timeout_ms / 1e3, "told after %.1f s",
	       cuda_now_s() - began_s);
	if (member->rank == 0)
		kill(party.pids[2], SIGKILL);
	/* The stub's memory outlives its process; of a domain this is not promised. */
	if (!cuda_one_pass(rank, LAYERS, rank->streams[1]) || !cuda_all_right(rank, "passes of survivors"))
		goto failed;
	part(&party);
	EXPECT(member, stub_cuda_outstanding() == 0, "%d objects are left", stub_cuda_outstanding());
	return 0;
failed:
	kill(party.pids[2], SIGKILL);
	part(&party);
	return 1;
}

static void ranks_and_hosts_that_are_gone_are_told(void **state)
{
	struct scene killed = {{.spec = "fabric", .prefetch = 1, .timeout_ms = LONG_MS},
			       .to = SIGKILL,
			       .status = LSHARD_ERR_PEER_FAILED,
			       .says = "rank 2 is gone"};
	struct scene stopped = {{.spec = "fabric", .prefetch = 1, .timeout_ms = patience(1000)},
				.to = SIGSTOP,
				.status = LSHARD_ERR_TIMEOUT,
				.says = "so a rank is stopped, killed or disconnected"};

	(void)state;
	assert_int_equal(team_of_processes(CIRCLE_RANKS, outlives, &killed), 0);
	assert_int_equal(team_of_processes(CIRCLE_RANKS, outlives, &stopped), 0);
}

static int hears_of_an_abort(const struct member *member)
{
	struct party party;
	struct rank *rank = &party.rank;
	lshard_status status;

	if (!open_all(&party, member, member->user) || !team_barrier(member))
		goto failed;
	if (member->rank == 1)
		lshard_group_abort(rank->group);
	status = lshard_series_update_begin(rank->series);
	EXPECT(member, status == (member->rank == 1 ? LSHARD_ERR_ABORTED : LSHARD_ERR_PEER_FAILED), "status %d: %s",
	       (int)status, lshard_series_error(rank->series));
	SAYS(member, lshard_series_error(rank->series), "rank 1");
	part(&party);
	EXPECT(member, stub_cuda_outstanding() == 0, "%d objects are left", stub_cuda_outstanding());
	return 0;
failed:
	part(&party);
	return 1;
}

static void an_abort_is_told(void **state)
{
	struct scene scene = {ASKED, .at = -1};

	(void)state;
	assert_int_equal(team_of_processes(CIRCLE_RANKS, hears_of_an_abort, &scene), 0);
}

int main(int count, char **arguments)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(layers_come_from_another_host),
		cmocka_unit_test(one_host_is_no_matter_of_domains),
		cmocka_unit_test(what_cannot_hold_is_refused_by_name),
		cmocka_unit_test(without_the_management_library_memory_itself_is_tried),
		cmocka_unit_test(memory_of_the_caller_is_refused),
		cmocka_unit_test(without_a_domain_the_collectives_carry_layers),
		cmocka_unit_test(deaths_while_a_series_opens_are_told),
		cmocka_unit_test(ranks_and_hosts_that_are_gone_are_told),
		cmocka_unit_test(an_abort_is_told),
	};

	if (count != 2) {
		fprintf(stderr, "usage: test_cuda_fabric PATH-OF-THE-STUB\n");
		return 2;
	}
	setenv("LAYERSHARD_CUDA_SO_PATH", arguments[1], 1);
	setenv("LAYERSHARD_NVML_SO_PATH", arguments[1], 1);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
