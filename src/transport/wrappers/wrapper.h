/* SPDX-License-Identifier: Apache-2.0
 *
 * wrapper.h - what wrappers share. A wrapper is a transport that stands in front of another one and has that one's
 * capabilities; its table names only the functions it changes, all others go straight through. Errors of the inner
 * objects are copied up.
 */
#ifndef LAYERSHARD_WRAPPER_H
#define LAYERSHARD_WRAPPER_H

#include <layershard/transport.h>

/* First member of a wrapper's own struct. */
struct lshard__wrapper {
	lshard_transport base;
	lshard_transport_ops ops; /* of this instance: the wrapper's functions, the inner one's capabilities */
	lshard_transport *inner;
};

/* First member of a wrapper's own store. */
struct lshard__wrapper_store {
	lshard_store base;
	lshard_store *inner;
};

/*
 * Make a wrapper, a zeroed struct of @p bytes that begins with lshard__wrapper, in front of @p inner. @p inner stays
 * open if this fails. NULL: no memory, with the text in @p error.
 */
void *lshard__wrapper_new(const lshard_context *context, lshard_transport *inner, const lshard_transport_ops *table,
			  size_t bytes, lshard_error *error);
/* Free a wrapper only, as when its open() fails later. */
void lshard__wrapper_free(void *wrapper);

/* Open the inner store and make one of @p bytes in front of it. */
lshard_status lshard__wrapper_store_new(lshard_transport *transport, const lshard_store_plan *plan, size_t bytes,
					void *store);

/* The functions that go straight through, for wrappers that do something before or after. */
void lshard__wrapper_close(lshard_transport *transport);
lshard_status lshard__wrapper_exchange(lshard_transport *transport, const void *send, void *receive, size_t bytes,
				       uint8_t *alive);
lshard_status lshard__wrapper_flush(lshard_transport *transport);
void lshard__wrapper_abort(lshard_transport *transport);
void lshard__wrapper_store_close(lshard_store *store);
void *lshard__wrapper_buffer(lshard_store *store, uint32_t buffer, uint32_t position);
lshard_status lshard__wrapper_fetch(lshard_store *store, uint32_t position, uint32_t buffer, void *stream,
				    uint64_t sequence);
lshard_status lshard__wrapper_wait(lshard_store *store, uint32_t buffer, void *stream, lshard_arrival *arrival);
lshard_status lshard__wrapper_join(lshard_store *store, void *stream);
lshard_status lshard__wrapper_drain(lshard_store *store);
lshard_status lshard__wrapper_read(lshard_store *store, uint32_t position, void *destination);

/* Bytes that come from other ranks when the layer at @p position is fetched. */
uint64_t lshard__wrapper_bytes_in(const lshard_store *store, uint32_t position);

#endif
