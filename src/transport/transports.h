/* SPDX-License-Identifier: Apache-2.0
 *
 * transports.h - which transports and wrappers there are: one line each, in folders of these names and in wrappers/.
 * What is sized by their number is sized from here. registry.c is the only file that goes through the lists.
 */
#ifndef LAYERSHARD_TRANSPORTS_H
#define LAYERSHARD_TRANSPORTS_H

#include <layershard/transport.h>

/* Which ranks a transport connects. */
enum lshard__scope {
	LSHARD__SAME_PROCESS,
	LSHARD__SAME_HOST,
	/* Those that the caller's collectives do, by which they exchange records and no layer; it needs them. */
	LSHARD__MET_BY_CALLER,
	LSHARD__OF_CALLER, /* those that the caller's collectives do, in the memory that these carry; it needs them */
};

/*
 * X(name, scope, memory), in the order in which "auto" prefers them. Each has its table, lshard__NAME, in the folder of
 * its name; fabric's is in cuda.
 */
#define LSHARD__TRANSPORTS(X)                                                                                          \
	X(local, LSHARD__SAME_PROCESS, LSHARD_MEMORY_HOST)                                                             \
	X(shm, LSHARD__SAME_HOST, LSHARD_MEMORY_HOST)                                                                  \
	X(cuda, LSHARD__SAME_HOST, LSHARD_MEMORY_CUDA)                                                                 \
	X(fabric, LSHARD__MET_BY_CALLER, LSHARD_MEMORY_CUDA)                                                           \
	X(callback, LSHARD__OF_CALLER, LSHARD_MEMORY_HOST)

/*
 * X(name). They move nothing: their open() gets the transport that they stand in front of. One that is not available is
 * refused by name: faults, where the library is built without tests (wrappers/no_faults.c).
 */
#define LSHARD__WRAPPERS(X)                                                                                            \
	X(trace)                                                                                                       \
	X(throttle)                                                                                                    \
	X(faults)

#define LSHARD__TRANSPORT_TABLE(name, scope, memory) extern const lshard_transport_ops lshard__##name;
#define LSHARD__WRAPPER_TABLE(name)                  extern const lshard_transport_ops lshard__##name;
LSHARD__TRANSPORTS(LSHARD__TRANSPORT_TABLE)
LSHARD__WRAPPERS(LSHARD__WRAPPER_TABLE)

#define LSHARD__ONE_TRANSPORT(name, scope, memory) +1
#define LSHARD__ONE_WRAPPER(name)                  +1
enum {
	LSHARD__N_TRANSPORTS = LSHARD__TRANSPORTS(LSHARD__ONE_TRANSPORT),
	LSHARD__N_WRAPPERS = LSHARD__WRAPPERS(LSHARD__ONE_WRAPPER)
};

#endif
