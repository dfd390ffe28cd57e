#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# check_pages.sh [--save FILE] BUILD [SUPPLY]... [-- CTEST-OPTION...] - the tests of make check once more under each of
# these supplies of large pages, or those named:
#   require   there are some, and LAYERSHARD_LARGE_PAGES=require: what would be in small pages is refused
#   none      there are none: transparent_hugepage/enabled is never, shmem_enabled deny, nothing is reserved
#   short     there are 16, which are reserved; else as none. Some stores have them, others find too few
# The last two need root: they set these files for the whole machine, where no program gets large pages meanwhile, and
# put them back when they end, whatever ends them but SIGKILL. CTEST-OPTION: -R core, or in parts -I 1,,3 and 2,,3 and
# 3,,3. FILE: what came out is added to it in a few lines.
set -eu

transparent=/sys/kernel/mm/transparent_hugepage
reserved=/sys/kernel/mm/hugepages/hugepages-2048kB
pages=16
tree=$(dirname "$0")/..

fail() {
	echo "check_pages.sh: $*" >&2
	exit 2
}
save=
if [ "${1:-}" = --save ] && [ $# -ge 2 ]; then
	save=$2
	shift 2
fi
[ -f "${1:-}/CTestTestfile.cmake" ] || fail "'${1:-}' is no build directory with tests"
build=$1
shift
supplies=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
	case $1 in
	require | none | short) supplies="$supplies $1" ;;
	*) fail "'$1' is none of require, none, short" ;;
	esac
	shift
done
[ $# -eq 0 ] || shift

# ---- The machine's settings ----

chosen() { # chosen FILE: of "always [madvise] never" the word in brackets
	sed 's/.*\[\(.*\)\].*/\1/' "$1"
}
work=$(mktemp -d)
before= # enabled and shmem_enabled, while they are changed
watcher=
restore() {
	[ -z "$watcher" ] || kill "$watcher" 2>/dev/null || :
	watcher=
	[ -z "$before" ] || {
		echo "${before% *}" >$transparent/enabled
		echo "${before#* }" >$transparent/shmem_enabled
		echo 0 >$reserved/nr_hugepages
	}
	before=
}
trap 'restore; rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP

# Two at a time would each put back what the other has set.
exec 9<$transparent/enabled
take() { # take PAGES: that many reserved ones, and no others
	flock -n 9 || fail "another one is at work on this machine"
	for file in $transparent/enabled $transparent/shmem_enabled $reserved/nr_hugepages; do
		[ -w "$file" ] || fail "$file is not this user's to change"
	done
	[ "$(cat $reserved/nr_hugepages)" = 0 ] || fail "$(cat $reserved/nr_hugepages) pages are reserved: somebody's"
	before="$(chosen $transparent/enabled) $(chosen $transparent/shmem_enabled)"
	echo never >$transparent/enabled
	echo deny >$transparent/shmem_enabled
	echo "$1" >$reserved/nr_hugepages
	[ "$(cat $reserved/free_hugepages)" = "$1" ] || fail "the machine has no $1 pages to reserve"
}

# How few were free is how one sees that they ran out.
watch_free() {
	least=$1
	echo "$least" >"$work/least"
	while read -r free <$reserved/free_hugepages && sleep 0.02; do
		[ "$free" -ge "$least" ] || echo "$free" >"$work/least"
		[ "$free" -ge "$least" ] || least=$free
	done
}

# ---- A run ----

# What was run, and of the tests' output how many passed, which failed and which were skipped why.
sum_up() { # sum_up SUPPLY
	echo "== $1: $what"
	echo "$(date -u '+%F %H:%M'), $(git -C "$tree" describe --always --dirty), Linux $(uname -r | cut -d. -f1,2)"
	[ "$1" != short ] || echo "reserved pages: $pages, at least $(cat "$work/least") of them free at any time"
	sed -n '/tests passed/p; /^Total Test/p; /^The following tests FAILED/,/^Errors/p; /^Skipped/,$p' "$work/log"
}

run() { # run SUPPLY CTEST-OPTION...
	supply=$1
	shift
	wanted=auto
	what="${*:-all tests}"
	case $supply in
	require)
		[ "$(chosen $transparent/shmem_enabled)" != deny ] || fail "$transparent/shmem_enabled is deny"
		wanted=require
		echo 1 2>/dev/null >/proc/sys/vm/compact_memory || : # what has been in use for long lies scattered
		;;
	none) take 0 ;;
	short)
		take $pages
		watch_free $pages &
		watcher=$!
		;;
	esac
	: >"$work/status"
	{
		LAYERSHARD_LARGE_PAGES=$wanted "$tree/tests/run_tests.sh" "$build" -LE 'gpu|long' "$@" 9<&- ||
			echo failed >"$work/status"
	} 2>&1 | tee "$work/log"
	restore
	sum_up "$supply" >"$work/sum"
	cat "$work/sum"
	[ -z "$save" ] || cat "$work/sum" >>"$save"
	[ ! -s "$work/status" ] || failed="$failed $supply"
}

failed=
for supply in ${supplies:-require none short}; do
	run "$supply" "$@"
done
[ -z "$failed" ] || {
	echo "check_pages.sh: tests failed under:$failed" >&2
	exit 1
}
