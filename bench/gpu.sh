#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# gpu.sh [-p PROGRAM] [-o DIRECTORY] [-n GPUS] [PART]... - every measurement of docs/performance.md that needs a GPU,
# each saved as DIRECTORY/DATE-PART.json (default bench/results), and what bench/results/targets.py says of them.
# Without parts all are run, the most telling first. Each is meant to take less than ten minutes, also on two GPUs, about as long as
# it says here; on one, two processes share it and copies are forced.
#
#   copies     5 min  512 and 16 tokens, where transfers dominate: beside rivals, graphs, a delayed rank
#   hidden     8 min  8192 and 4096 tokens, where they hide: the same
#   middle     5 min  2048 and 1024 tokens: the same
#   link       1 min  pulls by size, beside bare copies
#   residents  3 min  512 tokens with 37.5, 50 and 75 % of the others' layers resident: of what sharding saved, 37.5 %
#                     is half when windows are subtracted, 50 % when they are not
#   readers    1 min  four ranks, two of them reading one source at once: owner and striped (two GPUs)
#   together   5 min  four ranks on one GPU that compute from each other's memory in place, rank 0 alone and all at once
#   striped    5 min  the placement striped, 4096 to 16 tokens
#   windows    4 min  k = 0 to 3, at 1024 and 512 tokens
#   nccl       1 min  the rivals' code on a communicator of one rank (one GPU): that it runs, not how fast
#   models            whole models in PyTorch, at e2e.py's and wan.py's own sizes, beside TP and FSDP2 (two GPUs); by
#                     python3, or LAYERSHARD_PYTHON, with layershard, torch and diffusers; how long nobody has measured:
#                     e2e-16 e2e-1024 e2e-2048 e2e-4096 e2e-16384 whole wan
#
# Ends with 0, or 3 when some measurement was inconclusive, or 1 when one failed. Libraries that are not found are named
# by LAYERSHARD_CUBLAS_SO_PATH and LAYERSHARD_NCCL_SO_PATH. Killed ranks and long replays: make check-gpu, whose output,
# saved as DIRECTORY/*.log, targets.py reads too.
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
models='e2e-16 e2e-1024 e2e-2048 e2e-4096 e2e-16384 whole wan'
case $gpus in
0 | '')
	echo "gpu.sh: nvidia-smi shows no GPU; -n says how many there are" >&2
	exit 1
	;;
1)
	pair='--devices 0,0 --transport cuda:copy'
	rivals='--rivals peer-copy'
	parts='copies hidden middle link residents together striped windows nccl'
	;;
*)
	pair='--devices 0,1'
	rivals='--rivals all --slow-rank-percent 50'
	parts="copies hidden middle link residents readers together striped windows $models"
	;;
esac
if [ $# -eq 0 ]; then
	# shellcheck disable=SC2086 # a list of words
	set -- $parts
fi

for part in "$@"; do
	case " $parts " in
	*" $part "*) ;;
	*)
		echo "gpu.sh: there is no part '$part'; there are: $parts" >&2
		exit 2
		;;
	esac
done

worst=0
date=$(date -u +%Y-%m-%d)
mkdir -p "$directory"

# save NAME COMMAND...
save() {
	file=$directory/$date-$1.json
	shift
	status=0
	began=$(date +%s)
	echo
	echo "\$ $*"
	"$@" --save "$file" || status=$?
	echo "($(($(date +%s) - began)) s)"
	if [ "$status" -eq 3 ] && [ "$worst" -eq 0 ]; then
		worst=3
	elif [ "$status" -ne 0 ] && [ "$status" -ne 3 ]; then
		worst=1
	fi
}

# measure NAME BENCH OPTION...
measure() {
	name=$1
	shift
	save "$name" "$program" bench "$@"
}

# model NAME SCRIPT OPTION...
model() {
	name=$1
	script=$(dirname "$0")/torch/$2
	shift 2
	save "$name" "${LAYERSHARD_PYTHON:-python3}" "$script" --devices 0,1 "$@"
}

# shellcheck disable=SC2086 # $pair and $rivals are several words
run_part() {
	case $1 in
	copies) measure "$1" step $pair $rivals --graph --tokens 512,16 --passes 16 ;;
	hidden) measure "$1" step $pair $rivals --graph --tokens 8192,4096 ;;
	middle) measure "$1" step $pair $rivals --graph --tokens 2048,1024 --passes 8 ;;
	residents) measure "$1" step $pair --tokens 512 --resident 0,37.5%,50%,75% --graph --passes 16 \
		--only copies,overlapped ;;
	windows) measure "$1" step $pair --tokens 1024,512 --prefetch 0,1,2,3 --passes 8 --only copies,overlapped ;;
	striped) measure "$1" step $pair --placement striped --tokens 4096,2048,1024,512,16 --graph --only copies,overlapped ;;
	link) measure "$1" link $pair --placement owner,striped --rounds 31 ;;
	readers) measure "$1" link --devices 0,0,1,1 --placement owner,striped --readers 2 ;;
	together)
		measure together-one step --devices 0,0,0,0 --tokens 2048,512,16,1 --graph --passes 16 \
			--only control,overlapped
		measure together-all step --devices 0,0,0,0 --tokens 512,16,1 --all-compute --passes 16 \
			--only control,overlapped
		;;
	e2e-*) model "$1" e2e.py --tokens "${1#e2e-}" --passes 2 ;;
	whole) model "$1" e2e.py --whole --layers 80 --tokens 4096 ;;
	wan) model "$1" wan.py --layers 16 --passes 1 --pace 20,100 ;;
	nccl) measure "$1" step --devices 0 --rivals all --layers 4 --tokens 512 --rounds 3 ;;
	esac
}

"$program" --version
nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv,noheader 2>/dev/null || true
for part in "$@"; do
	run_part "$part"
done
echo
python3 "$(dirname "$0")/results/targets.py" "$directory" || true
exit "$worst"
