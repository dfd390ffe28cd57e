/* SPDX-License-Identifier: Apache-2.0
 *
 * limit_reason.c - see limit_reason.h. Which limit it was the kernel does not say: where one is set and would have been
 * passed by what was asked for, it is named.
 */
#include "limit_reason.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

/* ---- What there is --------------------------------------------------------------------------------------------- */

/* True where it is set; its value is then in @p most. */
static int has_limit(int which, uint64_t *most)
{
	struct rlimit limit = {RLIM_INFINITY, RLIM_INFINITY};

	(void)getrlimit((unsigned)which, &limit); /* an enum to some C libraries, an int to others */
	*most = (uint64_t)limit.rlim_cur;
	return limit.rlim_cur != RLIM_INFINITY;
}

/* Number @p field of the numbers in a file of /proc; 0 where it cannot be read. */
static uint64_t number_in(const char *path, int field)
{
	char text[256] = "";
	char *next = text;
	const int fd = open(path, O_RDONLY | O_CLOEXEC);
	const ssize_t got = fd >= 0 ? read(fd, text, sizeof text - 1) : -1;
	uint64_t number = 0;

	if (fd >= 0)
		close(fd);
	for (int i = 0; got > 0 && i <= field; i++)
		number = strtoull(next, &next, 10);
	return number;
}

static uint64_t count_mappings(void)
{
	char text[4096];
	uint64_t lines = 0;
	ssize_t got;
	const int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);

	while (fd >= 0 && (got = read(fd, text, sizeof text)) > 0)
		for (ssize_t i = 0; i < got; i++)
			lines += text[i] == '\n';
	if (fd >= 0)
		close(fd);
	return lines;
}

/* ---- In words -------------------------------------------------------------------------------------------------- */

#define ADDRESSES    0 /* fields of /proc/self/statm, in pages */
#define DATA         5
#define NEARLY       16 /* mappings: one call may need a few */
#define THREAD_STACK (UINT64_C(8) << 20)

/* Of memory: the limit that @p bytes more would pass. */
static int memory_limit(uint64_t bytes, char *text, size_t room)
{
	static const struct {
		int which;
		int field;
		const char *what, *name;
	} limits[] = {{RLIMIT_AS, ADDRESSES, "addresses", "RLIMIT_AS, ulimit -v"},
		      {RLIMIT_DATA, DATA, "data", "RLIMIT_DATA, ulimit -d"}};
	uint64_t most;

	for (size_t i = 0; i < sizeof limits / sizeof limits[0]; i++) {
		const uint64_t has = number_in("/proc/self/statm", limits[i].field) * (uint64_t)sysconf(_SC_PAGESIZE);

		if (has_limit(limits[i].which, &most) && has + bytes > most)
			return snprintf(text, room,
					": the process may have %" PRIu64 " bytes of %s, has %" PRIu64
					" and needs %" PRIu64 " more (%s)",
					most, limits[i].what, has, bytes, limits[i].name);
	}
	return 0;
}

static void memory_reason(uint64_t bytes, char *text, size_t room)
{
	const uint64_t most = number_in("/proc/sys/vm/max_map_count", 0);

	if (!memory_limit(bytes, text, room) && most && count_mappings() + NEARLY > most)
		snprintf(text, room,
			 ": the process has about as many mappings as the system allows, %" PRIu64
			 " (vm.max_map_count, sysctl)",
			 most);
}

struct lshard__reason lshard__reason(int error, uint64_t bytes)
{
	struct lshard__reason reason;
	const size_t used = (size_t)snprintf(reason.text, sizeof reason.text, "%s", strerror(error));
	char *text = reason.text + used;
	const size_t room = sizeof reason.text - used;
	uint64_t most;

	if (error == EMFILE && has_limit(RLIMIT_NOFILE, &most))
		snprintf(text, room, ": the process may have %" PRIu64 " (RLIMIT_NOFILE, ulimit -n)", most);
	else if (error == ENFILE)
		snprintf(text, room, " (fs.file-max, sysctl)");
	else if (error == EFBIG && has_limit(RLIMIT_FSIZE, &most))
		snprintf(text, room,
			 ": files of the process, memory that is shared among them, may have %" PRIu64
			 " bytes, and %" PRIu64 " are needed (RLIMIT_FSIZE, ulimit -f)",
			 most, bytes);
	else if (error == EAGAIN && bytes && has_limit(RLIMIT_MEMLOCK, &most))
		snprintf(text, room, ": the process may lock %" PRIu64 " bytes (RLIMIT_MEMLOCK, ulimit -l)", most);
	else if (error == ENOMEM)
		memory_reason(bytes, text, room);
	return reason;
}

/* A thread that has no room for its stack is EAGAIN as well. */
struct lshard__reason lshard__reason_thread(int error)
{
	struct lshard__reason reason;
	const size_t used = (size_t)snprintf(reason.text, sizeof reason.text, "%s", strerror(error));
	char *text = reason.text + used;
	const size_t room = sizeof reason.text - used;
	uint64_t most;

	if (error != EAGAIN || memory_limit(THREAD_STACK, text, room))
		return reason;
	if (has_limit(RLIMIT_NPROC, &most))
		snprintf(text, room,
			 ": this user may have %" PRIu64
			 " threads (RLIMIT_NPROC, ulimit -u), or its container fewer (pids.max)",
			 most);
	else
		snprintf(text, room, ": its container may have no more threads (pids.max)");
	return reason;
}

/* ---- Files that grow ------------------------------------------------------------------------------------------- */

/* The signal comes to the thread that makes the call. */
struct quiet {
	sigset_t before;
	sigset_t pending; /* already: they are not ours */
};

static void signal_set(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, SIGXFSZ);
	sigaddset(set, SIGPIPE);
}

static void be_quiet(struct quiet *quiet)
{
	sigset_t held;

	signal_set(&held);
	pthread_sigmask(SIG_BLOCK, &held, &quiet->before);
	sigpending(&quiet->pending);
}

static void be_as_before(const struct quiet *quiet, int failed)
{
	const struct timespec now = {0, 0};
	const int saved = errno;
	const int raised = saved == EFBIG ? SIGXFSZ : SIGPIPE;
	sigset_t only;

	sigemptyset(&only);
	sigaddset(&only, raised);
	if (failed && (saved == EFBIG || saved == EPIPE) && !sigismember(&quiet->pending, raised))
		while (sigtimedwait(&only, NULL, &now) < 0 && errno == EINTR)
			;
	pthread_sigmask(SIG_SETMASK, &quiet->before, NULL);
	errno = saved;
}

int lshard__resize(int fd, uint64_t bytes)
{
	struct quiet quiet;
	int failed;

	be_quiet(&quiet);
	failed = ftruncate(fd, (off_t)bytes);
	be_as_before(&quiet, failed);
	return failed;
}

ssize_t lshard__write(int fd, const void *bytes, size_t count)
{
	struct quiet quiet;
	ssize_t written;

	be_quiet(&quiet);
	written = write(fd, bytes, count);
	be_as_before(&quiet, written < 0);
	return written;
}
