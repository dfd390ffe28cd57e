/* SPDX-License-Identifier: Apache-2.0
 *
 * memfd.c - see memfd.h. Kernels before 6.3 do not know MFD_NOEXEC_SEAL; on later ones an administrator may demand it.
 */
#include "memfd.h"

#include <errno.h>
#include <sys/mman.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008u
#endif
#ifndef MFD_HUGE_SHIFT
#define MFD_HUGE_SHIFT 26
#endif

#define FLAGS (MFD_CLOEXEC | MFD_ALLOW_SEALING)

static int create(const char *name, unsigned flags)
{
	const int fd = memfd_create(name, flags | MFD_NOEXEC_SEAL);

	return fd < 0 && errno == EINVAL ? memfd_create(name, flags) : fd;
}

int lshard__memfd_create(const char *name)
{
	return create(name, FLAGS);
}

int lshard__memfd_create_reserved(const char *name, uint64_t page_bytes)
{
	unsigned log2 = 0;

	while (page_bytes >> log2 > 1)
		log2++;
	return create(name, FLAGS | MFD_HUGETLB | log2 << MFD_HUGE_SHIFT);
}
