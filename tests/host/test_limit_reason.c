/* SPDX-License-Identifier: Apache-2.0
 *
 * test_limit_reason.c - limits of the system that stop one rank of several: every rank is told at once which limit it
 * is, on whose side, and no program is ended by a signal. The limits are real ones, set in a forked rank.
 */
#include "limit_reason.h"
#include "patience.h"
#include "threads.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cmocka.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifndef SANITIZED
#define SANITIZED 0 /* a sanitizer's own memory lies beyond any limit of addresses */
#endif

#define LIMITED 1 /* the rank that has the limit, unless a case says otherwise */

/* A limit, when it is set, and what all ranks must hear of it. */
struct limit_case {
	const char *transport;
	void (*set)(void);
	int32_t rank;
	bool before_group; /* else before the series */
	uint64_t layer_bytes;
	lshard_placement placement;
	lshard_status status;
	const char *words;
};

static void lower(unsigned which, rlim_t most)
{
	struct rlimit limit;

	getrlimit(which, &limit);
	limit.rlim_cur = most;
	setrlimit(which, &limit);
}

static void small_files(void)
{
	lower(RLIMIT_FSIZE, 1000);
}

static void tiny_files(void)
{
	lower(RLIMIT_FSIZE, 100);
}

/* So many and no more, whichever numbers are in use already. */
static void more_descriptors(int count)
{
	int opened[8];

	for (int i = 0; i < count; i++)
		opened[i] = dup(STDERR_FILENO);
	lower(RLIMIT_NOFILE, (rlim_t)opened[count - 1] + 1);
	for (int i = 0; i < count; i++)
		close(opened[i]);
}

/* What a rank needs to be found by the others, and no more. */
static void few_descriptors(void)
{
	more_descriptors(5);
}

/* To listen and to say why it goes no further: nobody is let in. */
static void no_descriptors_for_others(void)
{
	more_descriptors(2);
}

/* And for two of the others, and their processes where the kernel shows those. The third waits to be let in. */
static void descriptors_for_two_others(void)
{
	const int process = (int)syscall(SYS_pidfd_open, getpid(), 0);

	if (process >= 0)
		close(process);
	more_descriptors(process >= 0 ? 6 : 4);
}

static void few_addresses(void)
{
	char text[64] = "";
	FILE *file = fopen("/proc/self/statm", "r");

	if (file && fgets(text, sizeof text, file))
		lower(RLIMIT_AS, strtoull(text, NULL, 10) * (rlim_t)sysconf(_SC_PAGESIZE) + (2 << 20));
	if (file)
		fclose(file);
}

static uint64_t most_mappings(void)
{
	char text[64] = "";
	FILE *file = fopen("/proc/sys/vm/max_map_count", "r");

	if (file && !fgets(text, sizeof text, file))
		text[0] = 0;
	if (file)
		fclose(file);
	return strtoull(text, NULL, 10);
}

/* Every second page of a range has another protection, until there are no more mappings; a few are given back. */
static void few_mappings(void)
{
	const size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (size_t)most_mappings() + 2;
	char *range = mmap(NULL, pages * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	size_t i = 0;

	while (range != MAP_FAILED && i < pages && !mprotect(range + i * page, page, PROT_READ))
		i += 2;
	for (int back = 0; back < 2 && i >= 2; back++)
		mprotect(range + (i -= 2) * page, page, PROT_NONE);
}

/* The superuser is free of it. */
static void few_threads(void)
{
	lower(RLIMIT_NPROC, 1);
}

static int write_layer(void *user, uint32_t layer, void *const *tensors)
{
	(void)user;
	(void)layer;
	(void)tensors;
	return 0;
}

static lshard_status live(const struct member *member, const struct limit_case *limit, char *text, size_t bytes)
{
	const lshard_tensor tensor = {"w", limit->layer_bytes, 0, LSHARD_STRIPE_BYTES, 0, 0};
	lshard_group_options options = member_options(member, limit->transport, LONG_MS);
	lshard_series_options described = LSHARD_SERIES_OPTIONS_INIT;
	lshard_series *series = NULL;
	lshard_group *group = NULL;
	lshard_status status;

	options.error = text;
	options.error_bytes = bytes;
	described.name = "s";
	described.layer_count = 12;
	described.tensors = &tensor;
	described.tensor_count = 1;
	described.placement = limit->placement;
	if (member->rank == limit->rank && limit->before_group)
		limit->set();
	status = lshard_group_create(&options, &group);
	if (status < 0)
		return status;
	if (member->rank == limit->rank && !limit->before_group)
		limit->set();
	status = lshard_series_create(group, &described, &series);
	snprintf(text, bytes, "%s", lshard_group_error(group));
	if (status >= 0 && (status = lshard_series_commit(series, write_layer, NULL)) < 0)
		snprintf(text, bytes, "%s", lshard_series_error(series));
	lshard_series_destroy(series);
	lshard_group_destroy(group);
	return status;
}

static int is_told(const struct member *member)
{
	const struct limit_case *limit = member->user;
	char text[600] = "";
	const lshard_status status = live(member, limit, text, sizeof text);

	EXPECT(member, status == limit->status, "%s: %s", lshard_status_name(status), text);
	EXPECT(member, strstr(text, limit->words) != NULL, "the text lacks '%s': %s", limit->words, text);
	return 0;
failed:
	return 1;
}

static void tell_all(struct limit_case limit)
{
	assert_int_equal(team_of_processes(3, is_told, &limit), 0);
}

static void files_of_a_size(void **state)
{
	(void)state;
	tell_all((struct limit_case){"shm", small_files, 0, true, 9000, LSHARD_WHOLE, LSHARD_ERR_SYSTEM,
				     "may have 1000 bytes"}); /* its control page */
	tell_all((struct limit_case){"shm", small_files, LIMITED, false, 9000, LSHARD_WHOLE, LSHARD_ERR_SYSTEM,
				     "RLIMIT_FSIZE"});
	tell_all((struct limit_case){"shm:copy", small_files, LIMITED, false, 9000, LSHARD_STRIPED, LSHARD_ERR_SYSTEM,
				     "RLIMIT_FSIZE"});
}

static void descriptors(void **state)
{
	(void)state;
	for (int32_t rank = 0; rank < 3; rank++)
		tell_all((struct limit_case){"shm", few_descriptors, rank, true, 9000, LSHARD_WHOLE, LSHARD_ERR_SYSTEM,
					     "RLIMIT_NOFILE"});
}

/* Rank 0 has met not all when it can open no more: those it has let in are told, and those that still wait for it. */
static int is_told_by_rank_0(const struct member *member)
{
	const struct limit_case *limit = member->user;
	char text[600] = "";
	const lshard_status status = live(member, limit, text, sizeof text);

	EXPECT(member, status == LSHARD_ERR_SYSTEM, "%s: %s", lshard_status_name(status), text);
	EXPECT(member, strstr(text, "rank 0 (process ") == text && strstr(text, "the other ranks: Too many open files"),
	       "%s", text);
	EXPECT(member, strstr(text, "RLIMIT_NOFILE") != NULL, "%s", text);
	return 0;
failed:
	return 1;
}

static void descriptors_while_ranks_find_each_other(void **state)
{
	struct limit_case limit = {"shm", NULL, 0, true, 9000, LSHARD_WHOLE, LSHARD_ERR_SYSTEM, ""};

	(void)state;
	limit.set = no_descriptors_for_others;
	assert_int_equal(team_of_processes(2, is_told_by_rank_0, &limit), 0);
	limit.set = descriptors_for_two_others;
	assert_int_equal(team_of_processes(4, is_told_by_rank_0, &limit), 0);
}

static void addresses(void **state)
{
	(void)state;
	if (SANITIZED)
		skip();
	tell_all((struct limit_case){"shm", few_addresses, LIMITED, false, 4 << 20, LSHARD_WHOLE, LSHARD_ERR_NO_MEMORY,
				     "RLIMIT_AS"});
	tell_all((struct limit_case){"shm:copy", few_addresses, LIMITED, false, 4 << 20, LSHARD_WHOLE,
				     LSHARD_ERR_NO_MEMORY, "RLIMIT_AS"});
}

static void mappings(void **state)
{
	(void)state;
	if (SANITIZED || most_mappings() == 0 || most_mappings() > 200000) {
		printf("skipped: %llu mappings are too many to use up\n", (unsigned long long)most_mappings());
		skip();
	}
	tell_all((struct limit_case){"shm", few_mappings, LIMITED, false, 3 * 65536, LSHARD_STRIPED,
				     LSHARD_ERR_NO_MEMORY, "vm.max_map_count"});
}

static int has_no_threads(const struct member *member)
{
	if (geteuid() == 0 && (setgroups(0, NULL) || setresgid(65534, 65534, 65534) || setresuid(65534, 65534, 65534)))
		return 0; /* no other user here */
	return is_told(member);
}

static void threads(void **state)
{
	struct limit_case limit = {"shm:copy", few_threads,  LIMITED,           false,
				   9000,       LSHARD_WHOLE, LSHARD_ERR_SYSTEM, "RLIMIT_NPROC"};

	(void)state;
	if (SANITIZED) /* it makes threads of its own */
		skip();
	assert_int_equal(team_of_processes(3, has_no_threads, &limit), 0);
}

/* A trace ends there; the program does not. */
static int traces_a_little(const struct member *member)
{
	const struct limit_case *limit = member->user;
	char text[600] = "";

	(void)live(member, limit, text, sizeof text);
	return 0;
}

static void traces_of_a_size(void **state)
{
	char folder[] = "/tmp/layershard-limits-XXXXXX";
	char spec[96], path[64];
	struct limit_case limit = {spec, tiny_files, 0, true, 9000, LSHARD_WHOLE, LSHARD_OK, ""};

	(void)state;
	assert_non_null(mkdtemp(folder));
	snprintf(path, sizeof path, "%s/run.json", folder);
	snprintf(spec, sizeof spec, "trace=%s,local:at=wait", path);
	assert_int_equal(team_of_processes(1, traces_a_little, &limit), 0);
	assert_int_equal(unlink(path), 0);
	assert_int_equal(rmdir(folder), 0);
}

/* ---- The program's own signals --------------------------------------------------------------------------------- */

static bool is_pending(int which)
{
	sigset_t pending;

	sigpending(&pending);
	return sigismember(&pending, which) == 1;
}

static void write_where_nobody_reads(void)
{
	int ends[2];

	assert_int_equal(pipe(ends), 0);
	close(ends[0]);
	assert_int_equal(lshard__write(ends[1], "", 1), -1);
	assert_int_equal(errno, EPIPE);
	close(ends[1]);
}

/* A signal that waits for the program to unblock it is the program's; one of our own write never reaches it. */
static void signals_of_the_program_stay(void **state)
{
	const struct timespec now = {0, 0};
	sigset_t pipes, before;

	(void)state;
	sigemptyset(&pipes);
	sigaddset(&pipes, SIGPIPE);
	assert_int_equal(sigprocmask(SIG_BLOCK, &pipes, &before), 0);
	write_where_nobody_reads();
	assert_false(is_pending(SIGPIPE));
	assert_int_equal(raise(SIGPIPE), 0);
	write_where_nobody_reads();
	assert_true(is_pending(SIGPIPE));
	assert_int_equal(sigtimedwait(&pipes, NULL, &now), SIGPIPE);
	assert_int_equal(sigprocmask(SIG_SETMASK, &before, NULL), 0);
}

/* As SIGPIPE that is blocked for good would keep a program from ending when nobody reads what it writes. */
static void signals_are_blocked_during_a_call_only(void **state)
{
	const int own[] = {SIGPIPE, SIGXFSZ};
	const int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
	sigset_t before, after;

	(void)state;
	assert_true(null >= 0);
	assert_int_equal(sigprocmask(SIG_SETMASK, NULL, &before), 0);
	assert_int_equal(lshard__write(null, "", 1), 1);
	write_where_nobody_reads();
	assert_int_equal(lshard__resize(null, 1), -1);
	assert_int_equal(sigprocmask(SIG_SETMASK, NULL, &after), 0);
	for (size_t i = 0; i < sizeof own / sizeof own[0]; i++)
		assert_int_equal(sigismember(&after, own[i]), sigismember(&before, own[i]));
	close(null);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(files_of_a_size),
		cmocka_unit_test(descriptors),
		cmocka_unit_test(descriptors_while_ranks_find_each_other),
		cmocka_unit_test(addresses),
		cmocka_unit_test(mappings),
		cmocka_unit_test(threads),
		cmocka_unit_test(traces_of_a_size),
		cmocka_unit_test(signals_of_the_program_stay),
		cmocka_unit_test(signals_are_blocked_during_a_call_only),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
