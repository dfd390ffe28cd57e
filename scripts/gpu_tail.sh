#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds tests/transport/cuda/gpu_tail.c with the compiler alone, for GPU machines without this project's build tools,
# and runs it: scripts/gpu_tail.sh [BYTES OF A WEIGHT]. BUILD: where to; CC: the compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build-gpu}
mkdir -p "$BUILD"
. scripts/gpu_sources.sh
# shellcheck disable=SC2086 # several words each
"${CC:-cc}" -std=c11 -O2 -g -D_GNU_SOURCE $library_includes -Itests -Itests/support \
	-o "$BUILD/gpu_tail" tests/transport/cuda/gpu_tail.c tests/transport/cuda/gpu_rank.c \
	tests/transport/cuda/gpu_times.c tests/support/threads.c \
	$library_sources -lpthread -ldl
"$BUILD/gpu_tail" "$@"
