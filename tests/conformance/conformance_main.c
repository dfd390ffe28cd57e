/* SPDX-License-Identifier: Apache-2.0
 *
 * conformance_main.c - `conformance SPEC threads|forks [NAME=NUMBER]...`: the suite over the library's own transports.
 */
#include <layershard/transport_conformance.h>

int main(int count, char **arguments)
{
	return lshard_conformance(NULL, count, arguments);
}
