#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# gpu_bench.sh TREE PROGRAM - every kind of `layershard bench` with --devices runs on a real GPU and finds all bits
# right: on two GPUs where there are two, else between two processes on one. Small and few rounds: no figure of it is
# meant to be read, and a machine too restless to measure on (status 3) is as good.
set -eu

tree=$1
program=$2
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
if [ "$gpus" -eq 0 ]; then
	echo "skipped: nvidia-smi shows no GPU"
	exit 77
fi
# shellcheck source=scripts/gpu_libraries.sh
. "$tree/scripts/gpu_libraries.sh"
if [ "$gpus" -eq 1 ]; then
	pair='--devices 0,0 --transport cuda:copy'
	rivals=peer-copy
else
	pair='--devices 0,1'
	rivals=all
fi

bench() {
	echo "\$ layershard bench $*"
	status=0
	"$program" bench "$@" || status=$?
	[ "$status" -eq 0 ] || [ "$status" -eq 3 ] || exit "$status"
}

# shellcheck disable=SC2086 # $pair is several words
{
	bench link $pair --placement owner,striped --readers 1 --min-bytes 64K --max-bytes 64M --factor 32
	bench step $pair --layers 8 --tokens 512,16 --rounds 5 --warm-ms 20 --graph --rivals $rivals
	bench step $pair --layers 8 --tokens 16 --rounds 5 --warm-ms 20 --graph --placement striped --resident 0,50%
}
bench step --devices 0,0,0,0 --layers 8 --tokens 16 --rounds 5 --warm-ms 20 --graph --all-compute
