/* SPDX-License-Identifier: Apache-2.0
 *
 * control.h - an all-gather among the living ranks of a host that happens for all of them or for none.
 * Knows the mesh and a page all ranks share; knows nothing of what is exchanged.
 */
#ifndef LAYERSHARD_CONTROL_H
#define LAYERSHARD_CONTROL_H

#include "mesh.h"

struct control_block;

struct control {
	struct mesh *mesh;
	lshard_error *error;
	struct control_block *block; /* shared by all ranks */
	size_t bytes;
};

/* Rank 0 makes the page, the others get it through the mesh. Collective. */
lshard_status control_open(struct control *control, struct mesh *mesh, lshard_error *error, uint64_t deadline_ns);
void control_close(struct control *control);

/* See lshard_transport_ops.exchange. @p round: the number this exchange has for all ranks; may be NULL. */
lshard_status control_exchange(struct control *control, const void *send, void *receive, size_t bytes, uint8_t *alive,
			       uint64_t *round, uint64_t deadline_ns);

#endif
