# shellcheck shell=sh
# SPDX-License-Identifier: Apache-2.0
#
# To be sourced in the tree's root: what a compiler alone needs to know of the library. library_sources: its files;
# library_includes: where their headers are. Both are several words.
# shellcheck disable=SC2034 # used by who sources this
library_sources=$(find src/base src/core src/host src/transport -name '*.c' ! -name no_faults.c)
library_includes="-Iinclude $(find src/base src/core src/host src/transport -type d -printf '-I%p ')"

# build_gpu_test NAME [SOURCE]... - $BUILD/NAME (default folder build-gpu) from tests/transport/cuda/NAME.c, these files
# and what tests on a device share. CC: the compiler.
build_gpu_test() {
	BUILD=${BUILD:-build-gpu}
	mkdir -p "$BUILD"
	name=$1
	shift
	# shellcheck disable=SC2086 # several words each
	"${CC:-cc}" -std=c11 -O2 -g -D_GNU_SOURCE $library_includes -Itests -Itests/support \
		-o "$BUILD/$name" "tests/transport/cuda/$name.c" "$@" tests/transport/cuda/gpu_rank.c \
		tests/transport/cuda/gpu_times.c tests/support/threads.c $library_sources -lpthread -ldl
}
