#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# demo.sh BUILD - what layershard does, in two minutes on two cores: a real model on four ranks that hold
# its layers once, and transfers hidden behind compute over a link of limited speed. `make demo` builds the programs and
# fetches the model first. With an NVIDIA GPU it shows fetches too, between two GPUs, or between two processes on one.
# Ends with a status other than 0 when something failed; a machine too busy to measure on is only told.
set -eu

build=${1:-build}
for program in "$build/layershard-llama" "$build/layershard-bench"; do
	if [ ! -x "$program" ]; then
		echo "demo.sh: there is no program '$program'; run 'make' first, or give the build's folder" >&2
		exit 1
	fi
done

bold='' plain=''
if [ -t 1 ] && [ "${TERM:-dumb}" != dumb ]; then
	bold=$(printf '\033[1m') plain=$(printf '\033[0m')
fi

part() { # part TITLE SENTENCE...
	printf '\n%s== %s%s\n' "$bold" "$1" "$plain"
	shift
	printf '%s\n' "$@"
	printf '\n'
}

# An inconclusive measurement (status 3) has said so itself.
measure() {
	status=0
	"$build/layershard-bench" step "$@" || status=$?
	[ "$status" -eq 0 ] || [ "$status" -eq 3 ] || exit "$status"
}

run_model() {
	"$build/layershard-llama" --ranks 4 --max-tokens 24 --prompt "The capital of France is" \
		--prompt "Water boils when" --prompt "Once upon a time there was" --prompt "A prime number is" "$@"
}

part "1a. A language model on four processes that hold its blocks once between them" \
	"Each process continues one prompt; look at 'stored' in the table: a quarter of the blocks each," \
	"all of them together."
run_model

part "1b. The same with all blocks in every process" \
	"The texts are the same; 'stored' is four times as much in all. What that means for the memory, embeddings" \
	"and buffers included, is in 'pss': compare the rows 'all'."
run_model --replicated

part "2. Layers that are fetched over a slow link while the layers before them compute" \
	"Compare 'exposed', what a pass takes longer than replicated, with 'predicted', what the planner says." \
	"ratio is compute : transfer, that of a 70B Llama on two H200 GPUs at 2048, 1024 and 512 tokens: 2.6, 1.2" \
	"and 0.6."
measure --layers 12 --compute-us 2000 --ratio 2.6,1.2,0.6 --prefetch 0,1,2 --resident 0,33.4%

part "3. One slow rank" \
	"Compare the first 'delayed' with 'rank 0 even': one-sided transports let nobody else pay, in lockstep" \
	"all wait."
measure --layers 12 --compute-us 2000 --ratio 2.6 --prefetch 2 --slow-rank-percent 50

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ] && [ "$gpus" -gt 0 ]; then
	gpus=$(printf '%s' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c . || true)
fi
if [ "$gpus" -eq 0 ]; then
	exit 0
fi
devices=0,1 transport=cuda
if [ "$gpus" -eq 1 ]; then
	devices=0,0 transport=cuda:copy
fi

part "4. On the GPU: layers that the other rank stores" \
	"Compare 'GB/s', a fetch by lshard_reach and lshard_wait, with 'bare GB/s', the driver's copy of as many bytes."
"$build/layershard-bench" link --devices "$devices" --transport "$transport" --min-bytes 1M --factor 16
