/* SPDX-License-Identifier: Apache-2.0
 *
 * process.c - whether this is still the process that created a group, or a child of it by fork.
 * Known without a system call: the group has a page that the kernel wipes in a child (Linux 4.14). Where the kernel
 * gives none, the process number is asked for at each call.
 */
#include "outside.h"

#include <sys/mman.h>
#include <unistd.h>

static const unsigned char unknown;

static size_t page_bytes(void)
{
	return (size_t)sysconf(_SC_PAGESIZE);
}

void lshard__process_open(struct lshard__process *process)
{
	unsigned char *page = mmap(NULL, page_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	*process = (struct lshard__process){.mark = &unknown, .number = (int32_t)getpid()};
	if (page == MAP_FAILED)
		return;
	if (madvise(page, page_bytes(), MADV_WIPEONFORK)) {
		munmap(page, page_bytes());
		return;
	}
	*page = 1;
	process->page = page;
	process->mark = page;
}

void lshard__process_close(struct lshard__process *process)
{
	if (process->page)
		munmap(process->page, page_bytes());
	*process = (struct lshard__process){.mark = &unknown};
}

/* A child in a process namespace of its own may have its parent's number: a wiped page says enough. */
bool lshard__process_asked(const struct lshard__process *process)
{
	return !process->page && process->number == (int32_t)getpid();
}
