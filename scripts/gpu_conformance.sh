#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the conformance suite with the compiler alone, for GPU machines without this project's build tools, and runs it
# on the real driver: scripts/gpu_conformance.sh ["SPEC threads|forks [NAME=NUMBER]..."]..., by default every way of the
# cuda transport. Needs cmocka: the system's, or cmocka.h and libcmocka.so.0 in the folder that CMOCKA names.
# BUILD: where to; CC: the compiler; RUN: what to run it under; LAYERSHARD_TEST_STRICT=1: a skip is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build-gpu}
CMOCKA=${CMOCKA:-build-gpu-cmocka}
mkdir -p "$BUILD"
library=(-lcmocka)
if [ -d "$CMOCKA" ]; then
	CMOCKA=$(cd "$CMOCKA" && pwd)
	library=("-I$CMOCKA" "-L$CMOCKA" -l:libcmocka.so.0 "-Wl,-rpath,$CMOCKA")
fi
. scripts/gpu_sources.sh
# shellcheck disable=SC2086 # several words each
"${CC:-cc}" -std=c11 -O2 -g -D_GNU_SOURCE $library_includes -Itests/conformance -Itests -Itests/support \
	-o "$BUILD/conformance" tests/conformance/*.c tests/support/conformance_*.c tests/support/threads.c \
	tests/support/callback_circle.c tests/support/fake_device.c $library_sources "${library[@]}" -lpthread -ldl -lm

[ $# -gt 0 ] || set -- "cuda forks" "cuda:copy forks" "cuda:ipc forks" "cuda threads" "cuda:copy threads"
failed=0
for what in "$@"; do
	status=0
	began=$SECONDS
	# shellcheck disable=SC2086 # the words of one run
	${RUN:-} timeout 600 "$BUILD/conformance" $what configurations="${CONFIGURATIONS:-6}" \
		>"$BUILD/conformance.log" 2>&1 ||
		status=$?
	[ "$status" != 77 ] || [ "${LAYERSHARD_TEST_STRICT:-0}" = 1 ] || status=0
	echo "conformance $what: exit status $status, $((SECONDS - began)) s"
	grep -E '^skipped|does not apply' "$BUILD/conformance.log" || true
	if [ "$status" != 0 ]; then
		cat "$BUILD/conformance.log"
		failed=1
	fi
done
exit "$failed"
