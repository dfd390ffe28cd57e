#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# measure.sh [PROGRAM] - every measurement of docs/performance.md that needs no GPU, with what the targets say of it. About ten
# minutes. Ends with 0 when all targets are met, 1 when one is missed, 3 when the machine was too restless to tell.
# As root, `chrt -f 40 bench/measure.sh` keeps other work of the machine away from it.
set -eu

program=${1:-build/layershard}
worst=0

measure() {
	status=0
	echo
	echo "\$ layershard bench $*"
	"$program" bench "$@" || status=$?
	if [ "$status" -ne 0 ] && [ "$worst" -ne 1 ]; then
		worst=$status
	fi
}

echo "machine: $(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -n 1), $(nproc) cores, Linux $(uname -r)"
echo "load:    $(cut -d ' ' -f 1-3 /proc/loadavg)"
echo "program: $("$program" --version)"

measure calls --max-ns 200
for placement in owner striped; do
	measure step --placement "$placement" --prefetch 0,1,2,3 --resident 0,33.4% --max-off 5
done
measure step --ratio 2.6 --prefetch 2 --slow-rank-percent 50
measure step --transport local:lockstep --all-compute --prefetch 0,1,2,3 --max-off 5
exit "$worst"
