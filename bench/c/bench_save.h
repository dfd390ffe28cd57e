/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_save.h - `--save FILE` of the benches: the JSON result under a head that says where it is from, one object:
 *
 *   {"schema", "command", "date" (UTC), "version", "machine": {"cpu", "cores", "kernel", "load"}, "gpus": [...],
 *    "result": {"schema", ...}}
 *
 * bench/results/readme_tables.py makes tables from such files. Knows: jansson, the host's names. Does not know: what is
 * measured.
 */
#ifndef BENCH_SAVE_H
#define BENCH_SAVE_H

#include <stdbool.h>

#include <jansson.h>

/** False, after a message of @p command ("link"), where @p path cannot be written: told before measuring. */
bool bench_save_possible(const char *command, const char *path);
/**
 * Writes @p result, which stays the caller's. @p argv: of the bench, argv[0] its name ("link"). @p gpus: a list of
 * objects, whose reference is taken; NULL: no GPU took part. False after a message.
 */
bool bench_save(const char *path, int argc, char **argv, json_t *gpus, json_t *result);

#endif
