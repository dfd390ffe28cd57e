#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# gpu.sh [-p PROGRAM] [-o DIRECTORY] [-n GPUS] [PART]... - every measurement of docs/performance.md that needs a GPU,
# each saved as DIRECTORY/DATE-PART.json (default bench/results). Without parts all are run, the most telling first; on
# two GPUs that takes about 40 minutes, on one about 25, where two processes share it and copies are forced.
#
#   copies     512 and 16 tokens, where transfers dominate: beside rivals, graphs, a delayed rank
#   hidden     8192 to 1024 tokens, where they hide: the same
#   residents  512 tokens with 0, 25, 50 and 75 % of what sharding saved spent on residents
#   windows    k = 0 to 3, at 1024 and 512 tokens
#   striped    the placement striped, 4096 to 16 tokens
#   link       pulls by size, beside bare copies
#   readers    four ranks, two of them reading one source at once: owner and striped (two GPUs)
#   together   four ranks on one GPU that compute from each other's memory in place, rank 0 alone and all at once
#   nccl       the rivals' code on a communicator of one rank (one GPU): that it runs, not how fast
#
# Ends with 0, or 3 when some measurement was inconclusive, or 1 when one failed. Libraries that are not found are named
# by LAYERSHARD_CUBLAS_SO_PATH and LAYERSHARD_NCCL_SO_PATH. Killed ranks and long replays: make check-gpu.
set -eu

program=build/layershard
directory=bench/results
gpus=
while getopts p:o:n: option; do
	case $option in
	p) program=$OPTARG ;;
	o) directory=$OPTARG ;;
	n) gpus=$OPTARG ;;
	*) exit 2 ;;
	esac
done
shift $((OPTIND - 1))

if [ -z "$gpus" ]; then
	gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
fi
case $gpus in
0 | '')
	echo "gpu.sh: nvidia-smi shows no GPU; -n says how many there are" >&2
	exit 1
	;;
1)
	pair='--devices 0,0 --transport cuda:copy'
	rivals='--rivals peer-copy'
	parts='copies hidden residents windows striped link together nccl'
	;;
*)
	pair='--devices 0,1'
	rivals='--rivals all --slow-rank-percent 50'
	parts='copies hidden residents windows striped link readers together'
	;;
esac
if [ $# -eq 0 ]; then
	# shellcheck disable=SC2086 # a list of words
	set -- $parts
fi

worst=0
date=$(date -u +%Y-%m-%d)
mkdir -p "$directory"

# measure NAME BENCH OPTION...
measure() {
	file=$directory/$date-$1.json
	shift
	status=0
	echo
	echo "\$ layershard bench $*"
	"$program" bench "$@" --save "$file" || status=$?
	if [ "$status" -eq 3 ] && [ "$worst" -eq 0 ]; then
		worst=3
	elif [ "$status" -ne 0 ] && [ "$status" -ne 3 ]; then
		worst=1
	fi
}

# shellcheck disable=SC2086 # $pair and $rivals are several words
run_part() {
	case $1 in
	copies) measure "$1" step $pair $rivals --graph --tokens 512,16 --passes 16 ;;
	hidden) measure "$1" step $pair $rivals --graph --tokens 8192,4096,2048,1024 ;;
	residents) measure "$1" step $pair --tokens 512 --resident 0,25%,50%,75% --graph --passes 16 ;;
	windows) measure "$1" step $pair --tokens 1024,512 --prefetch 0,1,2,3 ;;
	striped) measure "$1" step $pair --placement striped --tokens 4096,2048,1024,512,16 --graph ;;
	link) measure "$1" link $pair ;;
	readers) measure "$1" link --devices 0,0,1,1 --placement owner,striped --readers 2 ;;
	together)
		measure together-one step --devices 0,0,0,0 --tokens 2048,512,16,1 --graph --passes 16
		measure together-all step --devices 0,0,0,0 --tokens 512,16,1 --all-compute --passes 16
		;;
	nccl) measure "$1" step --devices 0 --rivals all --layers 4 --tokens 512 --rounds 3 ;;
	*)
		echo "gpu.sh: there is no part '$1'; there are: $parts" >&2
		exit 2
		;;
	esac
}

"$program" --version
nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv,noheader 2>/dev/null || true
for part in "$@"; do
	run_part "$part"
done
exit "$worst"
