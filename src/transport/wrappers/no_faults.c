/* SPDX-License-Identifier: Apache-2.0
 *
 * no_faults.c - stands for faults.c in a library that is built without tests: who asks for faults is told why there are
 * none, rather than that there is no such name.
 */
#include "transports.h"

static int not_here(lshard_error *error)
{
	lshard_fail(error, LSHARD_ERR_NOT_SUPPORTED,
		    "faults is for tests, and this library was built without them (LAYERSHARD_BUILD_TESTS)");
	return 0;
}

const lshard_transport_ops lshard__faults = {
	.struct_size = sizeof(lshard_transport_ops),
	.abi = LSHARD_TRANSPORT_ABI,
	.name = "faults",
	.available = not_here,
};
