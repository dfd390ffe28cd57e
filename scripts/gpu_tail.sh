#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds tests/transport/cuda/gpu_tail.c with the compiler alone, for GPU machines without this project's build tools,
# and runs it: scripts/gpu_tail.sh [BYTES OF A WEIGHT]. BUILD: where to; CC: the compiler; RUN: what to run it under.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/gpu_sources.sh
build_gpu_test gpu_tail
${RUN:-} "$BUILD/gpu_tail" "$@"
