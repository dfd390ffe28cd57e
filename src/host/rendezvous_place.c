/* SPDX-License-Identifier: Apache-2.0
 *
 * rendezvous_place.c - see rendezvous_place.h.
 *
 * In a directory, every change of who listens happens under a lock on the directory itself: a socket to which nobody
 * can connect while the lock is held, or that a rank which has ended left to a child, may be removed. The directory is
 * opened once, looked at, and reached by that descriptor from then on; so its path may have any length, and nobody can
 * exchange it. That it has no rights for others is what keeps them out: the system itself compares users then, and
 * knows them also where this user namespace does not.
 */
#include "rendezvous_place.h"
#include "limit_reason.h"
#include "name_holder.h"
#include "outside.h"
#include "text_hash.h"
#include "user.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define VARIABLE   "LAYERSHARD_RENDEZVOUS_DIR"
#define FILE_BYTES 40

/* ---- names ---- */

/* A job's name may be longer than an abstract name: its hash keeps long ones apart, its beginning is for the eye. */
static void name_abstract(struct lshard__place *place, const char *job)
{
	snprintf(place->name, sizeof place->name, "layershard/%lu/%016llx/%.40s", (unsigned long)geteuid(),
		 (unsigned long long)lshard__text_hash(job), job);
}

static void name_file(const char *job, char file[FILE_BYTES])
{
	snprintf(file, FILE_BYTES, "layershard-%016llx", (unsigned long long)lshard__text_hash(job));
}

/* The file's name, which the socket's path ends with. */
static const char *file_of(const struct lshard__place *place)
{
	return strrchr(place->name, '/') + 1;
}

/* ---- the directory ---- */

static lshard_status unfit(const struct lshard__place *place, lshard_error *error, const char *why)
{
	return lshard_fail(error, LSHARD_ERR_INVALID,
			   VARIABLE "='%s': %s. It must be a directory of mode 0700 that belongs to the ranks' user, "
				    "given by the same absolute path to all of them",
			   place->path, why);
}

static lshard_status check_directory(const struct lshard__place *place, lshard_error *error)
{
	char why[160];
	struct stat found;

	if (fstat(place->directory, &found))
		return unfit(place, error, strerror(errno));
	if (found.st_uid != geteuid()) {
		snprintf(why, sizeof why, "it belongs to user %lu, not to user %lu", (unsigned long)found.st_uid,
			 (unsigned long)geteuid());
		return unfit(place, error, why);
	}
	if (found.st_mode & 077) {
		snprintf(why, sizeof why, "its mode is %04o, which lets other users in",
			 (unsigned)(found.st_mode & 07777));
		return unfit(place, error, why);
	}
	return LSHARD_OK;
}

/* Without the slashes at its end, behind which a symbolic link would be followed. */
static lshard_status copy_path(struct lshard__place *place, const char *path, char *whole, size_t bytes,
			       lshard_error *error)
{
	size_t length = strlen(path);

	while (length > 1 && path[length - 1] == '/')
		length--;
	snprintf(place->path, sizeof place->path, "%s", path);
	if (path[0] != '/')
		return unfit(place, error, "it does not begin with '/'");
	if (length >= bytes)
		return unfit(place, error, "the path is too long");
	memcpy(whole, path, length);
	whole[length] = 0;
	return LSHARD_OK;
}

static lshard_status open_directory(struct lshard__place *place, const char *path, const char *job, lshard_error *error)
{
	char file[FILE_BYTES];
	char whole[4096];
	struct stat found;
	lshard_status status = copy_path(place, path, whole, sizeof whole, error);

	if (status != LSHARD_OK)
		return status;
	if (lstat(whole, &found) == 0 && S_ISLNK(found.st_mode))
		return unfit(place, error, "it is a symbolic link");
	place->directory = open(whole, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (place->directory < 0 && (errno == EMFILE || errno == ENFILE))
		return lshard_fail(error, LSHARD_ERR_SYSTEM, "process %d cannot open " VARIABLE "='%s': %s",
				   (int)getpid(), place->path, lshard__reason(errno, 0).text);
	if (place->directory < 0)
		return unfit(place, error, strerror(errno));
	status = check_directory(place, error);
	if (status != LSHARD_OK) {
		lshard__place_close(place);
		return status;
	}
	name_file(job, file);
	snprintf(place->name, sizeof place->name, "/proc/self/fd/%d/%s", place->directory, file);
	return LSHARD_OK;
}

/* ---- opening ---- */

static lshard_status check_user(const struct lshard__place *place, lshard_error *error)
{
	if (lshard__user_is_told())
		return LSHARD_OK;
	return lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED,
			   "job '%s': this process's user is %lu here, as which its user namespace shows every user "
			   "that it does not map: ranks cannot tell each other from strangers. Set " VARIABLE
			   " to a directory of mode 0700 that belongs to the ranks' user, on all ranks alike, or give "
			   "a bootstrap of your own",
			   place->job, (unsigned long)geteuid());
}

lshard_status lshard__place_open(struct lshard__place *place, const char *job, lshard_error *error)
{
	const char *path = lshard__variable(VARIABLE);

	*place = (struct lshard__place){.directory = -1, .type = SOCK_STREAM};
	snprintf(place->job, sizeof place->job, "%.*s", (int)sizeof place->job - 1, job);
	if (path)
		return open_directory(place, path, job, error);
	name_abstract(place, job);
	return check_user(place, error);
}

void lshard__place_close(struct lshard__place *place)
{
	if (place->directory >= 0)
		close(place->directory);
	place->directory = -1;
}

/* ---- listening ---- */

/* False: another process has the lock until the deadline. It is held for a few calls at most. */
static int lock(const struct lshard__place *place, uint64_t deadline_ns)
{
	while (flock(place->directory, LOCK_EX | LOCK_NB)) {
		if ((errno != EWOULDBLOCK && errno != EINTR) || !lshard__left_ms(deadline_ns))
			return 0;
		poll(NULL, 0, 1);
	}
	return 1;
}

static void unlock(const struct lshard__place *place)
{
	const int saved = errno;

	(void)flock(place->directory, LOCK_UN);
	errno = saved;
}

/* With the lock. 1: it was a dead rank's, and is gone. */
static int remove_stale(const struct lshard__place *place)
{
	struct stat found;

	if (fstatat(place->directory, file_of(place), &found, AT_SYMLINK_NOFOLLOW))
		return errno == ENOENT;
	if (!S_ISSOCK(found.st_mode)) {
		errno = EEXIST;
		return 0;
	}
	if (lshard__socket_look(place->name, place->type) == LSHARD__SOMEBODY) {
		errno = EADDRINUSE;
		return 0;
	}
	return unlinkat(place->directory, file_of(place), 0) == 0 || errno == ENOENT;
}

static int listen_in_directory(struct lshard__place *place)
{
	int fd = lshard__socket_listen(place->name, place->type);
	struct stat made;

	if (fd < 0 && errno == EADDRINUSE && remove_stale(place))
		fd = lshard__socket_listen(place->name, place->type);
	if (fd >= 0 && fstatat(place->directory, file_of(place), &made, AT_SYMLINK_NOFOLLOW) == 0) {
		place->device = made.st_dev;
		place->inode = made.st_ino;
	}
	return fd;
}

int lshard__place_listen(struct lshard__place *place, uint64_t deadline_ns)
{
	int fd;

	if (place->directory < 0)
		return lshard__socket_listen(place->name, place->type);
	if (!lock(place, deadline_ns))
		return -1;
	fd = listen_in_directory(place);
	unlock(place);
	return fd;
}

enum lshard__listening lshard__place_look(const struct lshard__place *place, uint64_t deadline_ns)
{
	enum lshard__listening now;

	if (place->directory < 0)
		return lshard__socket_look(place->name, place->type);
	if (!lock(place, deadline_ns))
		return LSHARD__SOMEBODY;
	now = lshard__socket_look(place->name, place->type);
	unlock(place);
	return now;
}

/* While the listener is open nobody else removes its socket; somebody may have done so by hand, though. */
void lshard__place_leave(struct lshard__place *place)
{
	struct stat found;

	if (place->directory < 0 || !place->inode)
		return;
	if (fstatat(place->directory, file_of(place), &found, AT_SYMLINK_NOFOLLOW) == 0 &&
	    found.st_dev == place->device && found.st_ino == place->inode)
		(void)unlinkat(place->directory, file_of(place), 0);
	place->inode = 0;
}

/* ---- texts ---- */

const char *lshard__place_hint(const struct lshard__place *place, char *text, size_t bytes)
{
	if (place->directory >= 0)
		snprintf(text, bytes, "in " VARIABLE "='%.100s': do all ranks have this one, and one job name?",
			 place->path);
	else
		snprintf(text, bytes,
			 "by an abstract name: do all ranks have one job name, user and network namespace, and none of "
			 "them " VARIABLE "?");
	return text;
}

void lshard__place_reason(const struct lshard__place *place, int error, char *text, size_t bytes)
{
	if (place->directory >= 0 && error == EWOULDBLOCK)
		snprintf(text, bytes,
			 "another process holds the lock (flock) of " VARIABLE "='%s'; ranks hold it for a moment only",
			 place->path);
	else if (place->directory >= 0 && error == EEXIST)
		snprintf(text, bytes, "'%s/%s' is no socket: remove it, or set another " VARIABLE, place->path,
			 file_of(place));
	else
		snprintf(text, bytes, "%s", lshard__reason(error, 0).text);
}

#define OTHER_PLACE "choose another job name, or a directory of your own by " VARIABLE

lshard_status lshard__place_foreign(const struct lshard__place *place, int32_t rank, pid_t other, uid_t user,
				    lshard_error *error)
{
	return lshard_fail(
		error, LSHARD_ERR_SYSTEM,
		"rank %d: process %d, which listens under the name of job '%s', belongs to user %lu, not "
		"%lu%s: " OTHER_PLACE,
		(int)rank, (int)other, place->job, (unsigned long)user, (unsigned long)geteuid(),
		lshard__user_is_overflow(user) ? " (as which this user namespace shows all that it does not map)" : "");
}

/* A socket in the directory can only be its user's own. */
static bool find_holder(const struct lshard__place *place, struct lshard__name_holder *holder)
{
	return place->directory < 0 && lshard__name_find_holder(place->name, holder);
}

/* Who refuses connections does not listen, or began to just now. */
static bool is_in_the_way(const struct lshard__place *place, int tried, struct lshard__name_holder *holder)
{
	if (tried != EAGAIN && tried != EADDRINUSE && tried != ECONNREFUSED)
		return false;
	return find_holder(place, holder) && !(holder->listens && tried == ECONNREFUSED);
}

lshard_status lshard__place_blocked(const struct lshard__place *place, int tried, int32_t rank, uint32_t waited_ms,
				    lshard_error *error)
{
	struct lshard__name_holder holder;

	if (!is_in_the_way(place, tried, &holder))
		return LSHARD_OK;
	if (!holder.listens)
		return lshard_fail(
			error, LSHARD_ERR_SYSTEM,
			"rank %d: %s has taken the name of job '%s' and does not listen, so that no rank can "
			"connect there: " OTHER_PLACE,
			(int)rank, holder.text, place->job);
	return lshard_fail(error, holder.is_stranger ? LSHARD_ERR_SYSTEM : LSHARD_ERR_TIMEOUT,
			   "rank %d waited %u ms: %s listens under the name of job '%s' and lets nobody in: it hangs, "
			   "or is no rank of this group. End it, or " OTHER_PLACE,
			   (int)rank, (unsigned)waited_ms, holder.text, place->job);
}

lshard_status lshard__place_left_behind(const struct lshard__place *place, int32_t rank, pid_t root,
					lshard_error *error)
{
	struct lshard__name_holder holder;
	const bool found = find_holder(place, &holder) && holder.process;

	return lshard_fail(error, LSHARD_ERR_SYSTEM,
			   "rank %d: rank 0 (process %d) of job '%s' has ended, but %s, which it left behind, has the "
			   "job's name still and lets nobody in: end it%s, or " OTHER_PLACE,
			   (int)rank, (int)root, place->job, found ? holder.text : "a process",
			   found ? "" : " ('ss -xlp' lists it under layershard/)");
}
