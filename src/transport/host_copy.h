/* SPDX-License-Identifier: Apache-2.0
 *
 * host_copy.h - putting a layer together from its pieces in host memory; for transports whose shards the CPU can read.
 */
#ifndef LAYERSHARD_HOST_COPY_H
#define LAYERSHARD_HOST_COPY_H

#include <layershard/transport.h>

/* Copy one piece: from the shard that begins at @p shard to the packed layer that begins at @p layer. */
void lshard__host_copy_piece(const lshard_piece *piece, const void *shard, void *layer);

/* Copy the whole layer at @p position to @p layer; @p shards has the first byte of every rank's shard, in rank order.
 */
void lshard__host_copy_layer(const lshard_store_plan *plan, uint32_t position, const void *const *shards, void *layer);

#endif
