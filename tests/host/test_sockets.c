/* SPDX-License-Identifier: Apache-2.0
 *
 * test_sockets.c - which process is at the other end of a socket, also where the kernel does not say.
 */
#include "sockets.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <errno.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>
#include <cmocka.h>

/* Why the kernel tells no process of a socket; 0: it tells. The linker leads the library's calls here. */
static int untold;
static int asked;

int __real_getsockopt(int fd, int level, int name, void *value, socklen_t *length);
int __wrap_getsockopt(int fd, int level, int name, void *value, socklen_t *length);

int __wrap_getsockopt(int fd, int level, int name, void *value, socklen_t *length)
{
	if (!untold || name == SO_PEERCRED)
		return __real_getsockopt(fd, level, name, value, length);
	asked++;
	errno = untold;
	return -1;
}

/* Another process may have the number of one that has ended: it is asked for by number only where the kernel is old. */
static void who_has_ended_is_not_asked_for_by_number(void **state)
{
	static const int reasons[] = {ESRCH, EMFILE, ENFILE};
	int ends[2];

	(void)state;
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
	for (size_t i = 0; i < sizeof reasons / sizeof reasons[0]; i++) {
		int process, why;

		untold = reasons[i];
		process = lshard__socket_peer_process(ends[0]);
		why = errno;
		untold = 0;
		if (!asked) {
			printf("skipped: not known to these headers\n");
			break;
		}
		assert_int_equal(process, -1);
		assert_int_equal(why, reasons[i]);
	}
	close(ends[0]);
	close(ends[1]);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(who_has_ended_is_not_asked_for_by_number),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
