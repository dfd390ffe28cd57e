#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# reserved_pages.sh TEST_LARGE_PAGES TEST_PROCESS_MEMORY - large pages that an administrator has reserved: how they are
# counted, enough of them, too few, as many as a cgroup allows, and ranks that are killed while they hold some. Changes
# the machine's settings and puts them back: for root alone, and with no other program of the kind beside it.
set -eu

program=$1
counted=$2
pool=/proc/sys/vm/nr_hugepages
before=$(cat $pool 2>/dev/null) || { echo "skipped: this kernel has no pages to reserve"; exit 77; }
[ "$before" = 0 ] || { echo "skipped: $before pages are reserved already: they are somebody's"; exit 77; }
[ -w $pool ] || { echo "skipped: root alone reserves pages"; exit 77; }
group= # where cgroups are mounted for the time of this test
added=

restore() {
	if [ -n "$group" ]; then
		rmdir "$group/layershard-test" 2>/dev/null || :
		[ -z "$added" ] || echo -hugetlb >"$group/cgroup.subtree_control" || :
		umount "$group" 2>/dev/null || :
		rmdir "$group" || :
	fi
	echo "$before" >$pool
}
trap restore EXIT
trap 'exit 1' INT TERM HUP

fail() {
	echo "reserved_pages.sh: $*" >&2
	exit 1
}
free() {
	awk '/^HugePages_Free/ { print $2 }' /proc/meminfo
}
reserve() {
	echo "$1" >$pool
	[ "$(free)" -ge "$1" ] || { echo "skipped: the machine has no $1 pages to reserve, but $(free)"; exit 77; }
}

reserve 500
"$counted" reserved
"$program" reserved
[ "$(free)" = 500 ] || fail "$(free) of 500 pages are free when all ranks have ended"

"$program" killed
[ "$(free)" = 500 ] || fail "$(free) of 500 pages are free when ranks were killed"

# One shard may have them, the other finds too few: it is made of other large pages, and the bytes are right.
reserve 12
"$program"
"$program" refused
[ "$(free)" = 12 ] || fail "$(free) of 12 pages are free: they ran out, and what was taken before that stays"

# A limit is met where the memory is made, not by a signal where it is written.
reserve 500
group=$(mktemp -d)
if mount -t cgroup2 none "$group" 2>/dev/null &&
	{ grep -q hugetlb "$group/cgroup.subtree_control" ||
		{ echo +hugetlb >"$group/cgroup.subtree_control" && added=1; }; } 2>/dev/null &&
	mkdir "$group/layershard-test" && echo $((8 << 20)) >"$group/layershard-test/hugetlb.2MB.max" 2>/dev/null; then
	sh -c 'echo $$ >"$0/cgroup.procs" && exec "$1" refused' "$group/layershard-test" "$program"
	sh -c 'echo $$ >"$0/cgroup.procs" && exec "$1"' "$group/layershard-test" "$program"
	[ "$(free)" = 500 ] || fail "$(free) of 500 pages are free after a cgroup's limit"
else
	echo "skipped: no cgroup here limits reserved pages"
fi
