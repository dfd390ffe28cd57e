#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# gpu_bench.sh PROGRAM - `layershard-bench link` runs on a real GPU and finds all bits right: on two GPUs where there
# are two, else between two processes on one, by copies and in place. Small and few rounds: no figure of it is meant to
# be read. What PyTorch measures there, tests/bench/torch/test_e2e_cuda.py runs.
set -eu

program=$1
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
if [ "$gpus" -eq 0 ]; then
	echo "skipped: nvidia-smi shows no GPU"
	exit 77
fi
pair='--devices 0,1'
[ "$gpus" -gt 1 ] || pair='--devices 0,0 --transport cuda:copy'

for ranks in "$pair" '--devices 0,0,0'; do
	# shellcheck disable=SC2086 # several words
	set -- link $ranks --placement whole,striped --readers 1 --min-bytes 64K --max-bytes 64M --factor 32
	echo "\$ layershard-bench $*"
	"$program" "$@"
done
