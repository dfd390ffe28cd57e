/* SPDX-License-Identifier: Apache-2.0
 *
 * stack_spec.h - the text that says which transport, and what stands in front of it.
 */
#ifndef LAYERSHARD_STACK_SPEC_H
#define LAYERSHARD_STACK_SPEC_H

#include <layershard/transport.h>

#define SPEC_WRAPPERS 8
#define SPEC_BYTES    1024

/* Names and options point into text. */
struct stack_spec {
	char text[SPEC_BYTES];
	struct {
		const char *name;
		const char *options;
	} wrappers[SPEC_WRAPPERS]; /* outermost first */
	int n_wrappers;
	const char *name; /* of the transport; NULL: it is the caller's own */
	const char *options;
};

/* "trace=run.json,throttle=1e9,shm:copy". @p is_wrapper tells names apart. @p custom: wrappers only. */
lshard_status lshard__stack_spec_parse(struct stack_spec *spec, const char *text, int custom,
				       int (*is_wrapper)(const char *name), lshard_error *error);

#endif
