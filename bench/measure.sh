#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# measure.sh [PROGRAM [DIRECTORY]] - every measurement of docs/performance.md that needs no GPU, with what the targets
# say of it; saved into DIRECTORY as well, one file each, for bench/results/readme_tables.py. About ten minutes. Ends
# with 0 when all targets are met, 1 when one is missed, 3 when the machine was too restless to tell.
# As root, `chrt -f 40 bench/measure.sh` keeps other work of the machine away from it.
set -eu

program=${1:-build/layershard-bench}
directory=${2:-}
worst=0

measure() { # measure NAME BENCH OPTION...
	name=$1 status=0
	shift
	[ -z "$directory" ] || set -- "$@" --save "$directory/$name.json"
	echo
	echo "\$ layershard-bench $*"
	"$program" "$@" || status=$?
	if [ "$status" -ne 0 ] && [ "$worst" -ne 1 ]; then
		worst=$status
	fi
}

[ -z "$directory" ] || mkdir -p "$directory"
echo "machine: $(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -n 1), $(nproc) cores, Linux $(uname -r)"
echo "load:    $(cut -d ' ' -f 1-3 /proc/loadavg)"
echo "program: $("$program" --version)"

measure calls calls --max-ns 200
for placement in whole striped; do
	measure "step-$placement" step --placement "$placement" --prefetch 0,1,2,3 --resident 0,33.4% --max-off 5
done
measure read read --min-to-large 0.97
measure read-scattered read --scatter --min-to-large 0.97 --min-to-small 1.3
measure step-slow step --ratio 2.6 --prefetch 2 --slow-rank-percent 50
measure step-lockstep step --transport local:lockstep --all-compute --prefetch 0,1,2,3 --max-off 5
exit "$worst"
