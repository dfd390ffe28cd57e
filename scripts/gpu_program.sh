#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# gpu_program.sh [DIRECTORY] - build DIRECTORY/layershard-bench (default build-gpu) so that it can be carried to a GPU
# machine without this project's libraries: jansson and OpenBLAS are inside it, and it needs glibc 2.34 or later and
# nothing else. NVIDIA's driver it loads there, when a command asks for it. Runs where the tree is built (make deps),
# needs no CUDA; less than a minute. CC: the compiler.
set -eu
cd "$(dirname "$0")/.."
directory=${1:-build-gpu}
mkdir -p "$directory"

flags=$(pkg-config --cflags jansson openblas)
libraries=$(pkg-config --libs jansson openblas)
. scripts/gpu_sources.sh
# shellcheck disable=SC2086 # several words each
"${CC:-cc}" -std=c11 -O2 -DNDEBUG -D_GNU_SOURCE $library_includes -Ibench/c -Itools/support $flags -s \
	-o "$directory/layershard-bench" $library_sources bench/c/*.c tools/support/*.c \
	-Wl,-Bstatic $libraries -Wl,-Bdynamic -lpthread -ldl -lm
"$directory/layershard-bench" --version
