#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds tests/transport/cuda/gpu_calls.c with the compiler alone, for GPU machines without this project's build tools,
# and runs it: scripts/gpu_calls.sh [REPEATS [BYTES OF A WEIGHT [MS OF A LINE [WORD]]]]. BUILD: where to; CC: the
# compiler; RUN: what to run it under.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/gpu_sources.sh
build_gpu_test gpu_calls tests/transport/cuda/gpu_calls_*.c tests/transport/cuda/gpu_samples.c
${RUN:-} "$BUILD/gpu_calls" "$@"
