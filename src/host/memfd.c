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

#define FLAGS (MFD_CLOEXEC | MFD_ALLOW_SEALING)

int lshard__memfd_create(const char *name)
{
	const int fd = memfd_create(name, FLAGS | MFD_NOEXEC_SEAL);

	return fd < 0 && errno == EINVAL ? memfd_create(name, FLAGS) : fd;
}
