/* SPDX-License-Identifier: Apache-2.0
 *
 * host_copy.h - putting a layer together from its pieces in host memory; for transports whose shares the CPU can read.
 */
#ifndef LAYERSHARD_HOST_COPY_H
#define LAYERSHARD_HOST_COPY_H

#include <layershard/transport.h>

/* Copy one piece: from the share that begins at @p share to the packed layer that begins at @p layer. */
void lshard__host_copy_piece(const lshard_piece *piece, const void *share, void *layer);

/* Copy the whole layer at @p position to @p layer; @p shares has the first byte of every rank's share, in rank order.
 */
void lshard__host_copy_layer(const lshard_store_plan *plan, uint32_t position, const void *const *shares, void *layer);

#endif
