/* SPDX-License-Identifier: Apache-2.0
 *
 * two_nodes.c - LD_PRELOAD: a machine of two NUMA nodes, and a third that is memory only. A process runs on the second,
 * or where TWO_NODES_TURNS names a file each on another than the last that has asked. What is no question about nodes
 * goes to libc; so memory is not really placed.
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static const struct {
	const char *path;
	const char *text;
} files[] = {
	{"/proc/self/status", "Mems_allowed_list:\t0-2\n"},
	{"/sys/devices/system/node/online", "0-2\n"},
	{"/sys/devices/system/node/has_cpu", "0-1\n"},
	{"/sys/devices/system/node/has_memory", "0-2\n"},
	{"/sys/devices/system/node/node0/cpulist", "0-15,32-47\n"},
	{"/sys/devices/system/node/node1/cpulist", "16-31,48-63\n"},
	{"/sys/devices/system/node/node2/cpulist", "\n"},
	{"/sys/devices/system/node/node0/meminfo", "Node 0 MemTotal: 1048576 kB\nNode 0 MemFree:  524288 kB\n"},
	{"/sys/devices/system/node/node1/meminfo", "Node 1 MemTotal: 2097152 kB\nNode 1 MemFree: 1048576 kB\n"},
	{"/sys/devices/system/node/node2/meminfo", "Node 2 MemTotal: 1048576 kB\nNode 2 MemFree: 1048576 kB\n"},
};

FILE *fopen(const char *path, const char *mode)
{
	FILE *(*next)(const char *, const char *);

	for (size_t i = 0; i < sizeof files / sizeof *files; i++)
		if (strcmp(path, files[i].path) == 0)
			return fmemopen((void *)files[i].text, strlen(files[i].text), "r");
	*(void **)&next = dlsym(RTLD_NEXT, "fopen");
	return next(path, mode);
}

static unsigned node_here(void)
{
	static int turn;
	const char *turns = getenv("TWO_NODES_TURNS");
	const int file = turns && turn == 0 ? open(turns, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;

	if (file >= 0) {
		if (write(file, "+", 1) == 1)
			turn = (int)lseek(file, 0, SEEK_CUR);
		close(file);
	}
	return turn ? (unsigned)turn & 1 : 1;
}

/* More must not be read than were given. */
static int count_arguments(long number)
{
	return number == SYS_mbind || number == SYS_move_pages       ? 6
	       : number == SYS_get_mempolicy                         ? 5
	       : number == SYS_getcpu || number == SYS_set_mempolicy ? 3
								     : 2; /* pidfd_open has no more */
}

long syscall(long number, ...)
{
	long (*next)(long, ...);
	long a[6] = {0};
	va_list arguments;

	va_start(arguments, number);
	for (int i = 0; i < count_arguments(number); i++)
		a[i] = va_arg(arguments, long);
	va_end(arguments);
	if (number == SYS_getcpu) {
		*(unsigned *)a[1] = node_here();
		return 0;
	}
	*(void **)&next = dlsym(RTLD_NEXT, "syscall");
	return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
