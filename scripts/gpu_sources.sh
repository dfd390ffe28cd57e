# shellcheck shell=sh
# SPDX-License-Identifier: Apache-2.0
#
# To be sourced in the tree's root: what a compiler alone needs to know of the library. library_sources: its files;
# library_includes: where their headers are. Both are several words.
# shellcheck disable=SC2034 # used by who sources this
library_sources=$(find src/base src/core src/host src/transport -name '*.c' ! -name no_faults.c)
library_includes="-Iinclude $(find src/base src/core src/host src/transport -type d -printf '-I%p ')"
