#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# gpu_program.sh [DIRECTORY] - build DIRECTORY/layershard (default build-gpu) so that it can be carried to a GPU machine
# without this project's libraries: jansson is inside it, and it needs glibc 2.34 or later and nothing else. CUDA's libraries it loads there, when a command asks for them. Runs where the tree is built (make deps),
# needs no CUDA; less than a minute. CC: the compiler.
set -eu
cd "$(dirname "$0")/.."
directory=${1:-build-gpu}
mkdir -p "$directory"

flags=$(pkg-config --cflags jansson)
. scripts/gpu_sources.sh
# shellcheck disable=SC2086 # several words each
"${CC:-cc}" -std=c11 -O2 -DNDEBUG -D_GNU_SOURCE $library_includes -Isrc/cli -Itools/support $flags -s \
	-o "$directory/layershard" $library_sources src/cli/*.c tools/support/*.c -Wl,-Bstatic -ljansson -Wl,-Bdynamic \
	-lpthread -ldl -lm
"$directory/layershard" --version
