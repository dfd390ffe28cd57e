/* SPDX-License-Identifier: Apache-2.0
 *
 * The conformance suite, for writers of transports: what every transport must do, tried through the public interface.
 * In a library of its own, liblayershard_conformance.a, which needs cmocka; docs/writing-a-transport.md says how to get
 * it.
 */
#ifndef LAYERSHARD_TRANSPORT_CONFORMANCE_H
#define LAYERSHARD_TRANSPORT_CONFORMANCE_H

#include <layershard/transport.h>

#ifdef __cplusplus
extern "C" {
#endif

/**
 * The whole of a program that tries a transport: `return lshard_conformance(&ops, count, arguments);` with the
 * arguments of main. The first is how ranks are made, "threads" or "forks" (processes); the program says what else
 * there is where it is called without any. With @p ops NULL the first argument is a transport of the library's instead,
 * with wrappers and options, and what was the first is the second.
 * @return what main returns: 0, all is right; 77, it cannot be tried on this machine, with the reason on standard
 *         output; 2, arguments that make no sense; anything else: as many tests failed.
 */
#if defined(__GNUC__)
__attribute__((visibility("default")))
#endif
int lshard_conformance(const lshard_transport_ops *ops, int count, char **arguments);

#ifdef __cplusplus
}
#endif
#endif
