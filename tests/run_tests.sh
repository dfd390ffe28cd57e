#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# run_tests.sh BUILD [CTEST-OPTION]... - run the tests of a build directory, show the output of those that fail, and
# name and count what was skipped, which ctest alone passes over. With LAYERSHARD_TEST_STRICT=1 a skip is a failure.
# Counted apart, and no failure: cases that are about what a transport is not meant to do.
set -eu

build=$1
shift
log=$build/Testing/Temporary/LastTest.log
seen=$build/Testing/run_tests.log
mkdir -p "$build/Testing"
rm -f "$log"

status=0
ctest --test-dir "$build" --output-log "$seen" --output-on-failure --no-tests=error -j "$(nproc)" "$@" || status=$?
[ -f "$log" ] || exit "$status" # nothing was run

# A program prints "skipped: reason" (and exits 77 where that is all it did), pytest "SKIPPED [count] place: reason".
# Whoever exits 77 without is named, too.
skips=$(awk '/^[0-9]+\/[0-9]+ Test: / { test = $3 }
	/^skipped: / { sub(/^skipped: /, ""); print test ": " $0; told[test] = 1 }
	/^SKIPPED \[/ { sub(/^SKIPPED /, ""); print test ": " $0; told[test] = 1 }
	/^ *[0-9]+\/[0-9]+ Test +#[0-9]+: .*\*\*\*Skipped / && !told[$4] { print $4 ": it does not say why" }' \
	"$log" "$seen")
# The suites that run over every transport print "does not apply: case: reason".
apart=$(sed -n 's/^does not apply: \([^:]*\): .*/\1/p' "$log" | sort | uniq -c)
if [ -n "$apart" ]; then
	echo
	echo "Do not apply to the transport ($(echo "$apart" | awk '{ sum += $1 } END { print sum }')):"
	echo "$apart"
fi
if [ -n "$skips" ]; then
	echo
	echo "Skipped ($(echo "$skips" | wc -l)):"
	echo "$skips" | sed 's/^/  /'
	if [ "${LAYERSHARD_TEST_STRICT:-0}" = 1 ]; then
		echo "LAYERSHARD_TEST_STRICT=1: a skipped test counts as failed" >&2
		[ "$status" != 0 ] || status=1
	fi
else
	echo "Skipped: none"
fi
exit "$status"
