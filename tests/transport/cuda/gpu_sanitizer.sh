#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# gpu_sanitizer.sh GPU_CHECK - run it under NVIDIA's compute-sanitizer: no kernel and no copy of the cuda transport's
# touches memory that is not its own. Few replays of small weights, and no rank is killed: it takes a minute or two.
# Refused calls are not reported: captures that are thrown away end with one, on purpose, and gpu_check evaluates them.
set -eu

if ! nvidia-smi -L >/dev/null 2>&1 && [ ! -e /dev/nvidiactl ]; then
	echo "skipped: this machine, or this container, shows no NVIDIA device"
	exit 77
fi
sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer || true)
if [ -z "$sanitizer" ]; then
	echo "skipped: compute-sanitizer is neither in PATH nor in /usr/local/cuda/bin"
	exit 77
fi
exec "$sanitizer" --tool memcheck --target-processes all --report-api-errors no --error-exitcode 9 \
	"$1" 5 200000 0 gently
