/* SPDX-License-Identifier: Apache-2.0
 *
 * memfd.h - memory that processes share by descriptor: closed on exec, open to seals, never to be executed.
 */
#ifndef LAYERSHARD_MEMFD_H
#define LAYERSHARD_MEMFD_H

#include <stdint.h>

/* Returns a descriptor, or -1 and errno. @p name is for /proc only. */
int lshard__memfd_create(const char *name);
/* The same, made of the large pages of @p page_bytes that an administrator has reserved. */
int lshard__memfd_create_reserved(const char *name, uint64_t page_bytes);

#endif
