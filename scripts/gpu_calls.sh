#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds tests/gpu_calls.c with the compiler alone, for GPU machines without this project's build tools, and runs it:
# scripts/gpu_calls.sh [REPEATS [BYTES OF A WEIGHT [MS OF A LINE [WORD]]]]. BUILD: where to; CC: the compiler; RUN: what
# to run it under.
set -euo pipefail
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build-gpu}
mkdir -p "$BUILD"
"${CC:-cc}" -std=c11 -O2 -g -D_GNU_SOURCE -Iinclude -Isrc/base -Isrc/core -Isrc/host -Isrc/transport -Itests \
	-Itests/stub_cuda -o "$BUILD/gpu_calls" tests/gpu_calls*.c tests/gpu_samples.c tests/gpu_rank.c tests/gpu_times.c \
	tests/threads.c src/base/*.c src/core/*.c src/host/*.c src/transport/*.c -lpthread -ldl
${RUN:-} "$BUILD/gpu_calls" "$@"
