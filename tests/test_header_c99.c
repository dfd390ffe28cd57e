/* SPDX-License-Identifier: Apache-2.0
 *
 * The same header alone, as C99.
 */
#include TEST_HEADER

extern const lshard_status test_header_status;
const lshard_status test_header_status = LSHARD_OK;
