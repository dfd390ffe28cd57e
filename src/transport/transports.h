/* SPDX-License-Identifier: Apache-2.0
 *
 * transports.h - the tables of the transports and wrappers built into the library, one per folder and one per
 * file of wrappers/. registry.c is the only file that uses them by name.
 */
#ifndef LAYERSHARD_TRANSPORTS_H
#define LAYERSHARD_TRANSPORTS_H

#include <layershard/transport.h>

/* Transports: they move the bytes. */
extern const lshard_transport_ops lshard__shm;      /* processes of a host: shared pages, or a copying thread */
extern const lshard_transport_ops lshard__local;    /* threads of a process */
extern const lshard_transport_ops lshard__cuda;     /* GPUs of a host, and processes on one GPU */
extern const lshard_transport_ops lshard__callback; /* the caller's collectives */

/* Wrappers: open() gets the transport they stand in front of. */
extern const lshard_transport_ops lshard__throttle;
extern const lshard_transport_ops lshard__trace;
extern const lshard_transport_ops lshard__faults;

#endif
