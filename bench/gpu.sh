#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# gpu.sh [-p PROGRAM] [-o DIRECTORY] [-n GPUS] [-m MINUTES] [PART]... - every measurement of docs/performance.md that
# needs a GPU, each saved as DIRECTORY/DATE-PART.json (default bench/results), and what bench/results/targets.py says
# of them. Without parts all are run. On one GPU two processes share it and copies are forced.
#
#   link       1 min  fetches by size, beside bare copies
#   readers    1 min  four ranks, two of them reading one source at once: whole and striped (two GPUs)
#   columns    1 min  by which copies stripes of columns come fastest (two GPUs)
#   in-place          two ranks on one GPU that compute from each other's memory: 1024 and 16 tokens
#   rounding   2 min  a compiled sharded model's distance from float32, beside a compiled replicated one's: ten seeds
#   compiled   4 min  models whose attention a compiler finds a kernel for only where nothing cuts the graph
#   pipeline   6 min  backlogs of requests and one at a time: pipeline parallel beside replicas, layershard, TP
#                     (two GPUs)
#   prompt-*          one prompt of 32768, 65536, 131072 tokens, context parallel, TP with sequence parallel, pipeline
#                     parallel in chunks: 2, 4 and 7 min (two GPUs)
#   models            whole models in PyTorch, at e2e.py's and wan.py's own sizes, beside TP and FSDP2, from graphs,
#                     with a late rank (two GPUs); by python3, or LAYERSHARD_PYTHON, with layershard, torch and
#                     diffusers: e2e-16 e2e-512 e2e-1024 e2e-2048 e2e-4096 e2e-8192 e2e-16384 whole wan; also several
#                     sizes in one run (e2e-16,512); compiled models apart: e2e-compiled-1024 e2e-compiled-4096
#
# in-place, prompt-*, e2e-* and wan end their rounds early, after three at least, so that each is done about MINUTES
# (default 8) after it began: where a machine is lent for a while, what is not saved by then is lost.
#
# Ends with 0, or 3 when some measurement was inconclusive, or 1 when one failed. Killed ranks and long replays: make
# check-gpu, whose output, saved as DIRECTORY/*.log, targets.py reads too.
set -eu

program=build/layershard-bench
directory=bench/results
gpus=
minutes=8
case ${1-} in
-h | --help)
	sed -n '4,/^set /s/^# \{0,1\}//p' "$0"
	exit 0
	;;
esac
while getopts p:o:n:m: option; do
	case $option in
	p) program=$OPTARG ;;
	o) directory=$OPTARG ;;
	n) gpus=$OPTARG ;;
	m) minutes=$OPTARG ;;
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
	parts='link in-place rounding compiled'
	;;
*)
	pair='--devices 0,1'
	parts='link readers columns in-place rounding compiled whole wan pipeline e2e-16 e2e-512 e2e-1024 e2e-2048'
	parts="$parts e2e-4096 e2e-8192 e2e-16384 e2e-compiled-1024 e2e-compiled-4096"
	parts="$parts prompt-32768 prompt-65536 prompt-131072"
	;;
esac
if [ $# -eq 0 ]; then
	# shellcheck disable=SC2086 # a list of words
	set -- $parts
fi

for part in "$@"; do
	tokens=${part#e2e-}
	case $part in
	e2e-*)
		case ${tokens#compiled-} in
		*[!0-9,]* | '') listed= ;;
		*) listed=e2e-16 ;; # any numbers of tokens
		esac
		;;
	*) listed=$part ;;
	esac
	case " $parts " in
	*" $listed "*) ;;
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

# link NAME OPTION...
link() {
	name=$1
	shift
	save "$name" "$program" link "$@"
}

# model NAME SCRIPT OPTION...
model() {
	name=$1
	script=$(dirname "$0")/torch/$2
	shift 2
	save "$name" "${LAYERSHARD_PYTHON:-python3}" "$script" "$@"
}

# shellcheck disable=SC2086 # $pair is several words
run_part() {
	case $1 in
	link) link "$1" $pair --placement whole,striped --rounds 31 ;;
	readers) link "$1" --devices 0,0,1,1 --placement whole,striped --readers 2 ;;
	in-place) model "$1" e2e.py --devices 0,0 --transport cuda --layers 6 --tokens 1024,16 --minutes "$minutes" \
		--variants 'replicated*;layershard k=1*' ;;
	rounding) model "$1" rounding.py ;;
	compiled) model "$1" compiled_speed.py ;;
	columns) model "$1" columns.py --devices 0,1 ;;
	e2e-compiled-*) model "$1" e2e.py --devices 0,1 --tokens "${1#e2e-compiled-}" --passes 2 --minutes "$minutes" \
		--variants 'replicated*;layershard k=?, compiled*' ;;
	e2e-*) model "$1" e2e.py --devices 0,1 --tokens "${1#e2e-}" --passes 2 --minutes "$minutes" \
		--without '*, compiled*' ;;
	pipeline) model "$1" pipeline.py --devices 0,1 ;;
	prompt-*) model "$1" long_prompt.py --devices 0,1 --tokens "${1#prompt-}" --minutes "$minutes" ;;
	whole) model "$1" e2e.py --devices 0,1 --whole --layers 80 --tokens 4096 ;;
	wan) model "$1" wan.py --devices 0,1 --layers 16 --passes 1 --pace 20,100 --minutes "$minutes" ;;
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
