/* SPDX-License-Identifier: Apache-2.0
 *
 * name_holder.h - who sits on an abstract name without listening. Any user can, and nobody can meet there then; seen
 * from outside it looks as if nobody had come yet.
 */
#ifndef LAYERSHARD_NAME_HOLDER_H
#define LAYERSHARD_NAME_HOLDER_H

#include <stddef.h>

/* 1: somebody has bound @p name and does not listen; @p text: "a process of user 1000", as far as the system tells. */
int lshard__name_is_blocked(const char *name, char *text, size_t bytes);

#endif
