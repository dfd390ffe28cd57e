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

# Where the machine's settings are not this test's to change.
leave() {
	echo "skipped: $*"
	exit 77
}
before=$(cat $pool 2>/dev/null) || leave "this kernel has no pages to reserve"
[ "$before" = 0 ] || leave "$before pages are reserved already: they are somebody's"
{ [ -w $pool ] && echo 0 >$pool; } 2>/dev/null || leave "this user does not reserve pages"
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
# all_free COUNT WHEN: a process that has ended may still give back its memory.
all_free() {
	for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
		[ "$(free)" != "$1" ] || return 0
		sleep 0.5
	done
	fail "$(free) of $1 pages are free $2"
}
reserve() {
	echo "$1" >$pool
	[ "$(free)" -ge "$1" ] || leave "the machine has no $1 pages to reserve, but $(free)"
}

reserve 260
"$counted" reserved
"$program" reserved
all_free 260 "when all ranks have ended"

"$program" killed
all_free 260 "when ranks were killed"

# One shard may have them, the other finds too few: it is made of other large pages, and the bytes are right.
reserve 12
"$program"
"$program" refused
all_free 12 "when they had run out"

# A limit is met where the memory is made, not by a signal where it is written.
reserve 260
group=$(mktemp -d)
if mount -t cgroup2 none "$group" 2>/dev/null &&
	{ grep -q hugetlb "$group/cgroup.subtree_control" ||
		{ echo +hugetlb >"$group/cgroup.subtree_control" && added=1; }; } 2>/dev/null &&
	mkdir "$group/layershard-test" && echo $((8 << 20)) >"$group/layershard-test/hugetlb.2MB.max" 2>/dev/null; then
	sh -c 'echo $$ >"$0/cgroup.procs" && exec "$1" refused' "$group/layershard-test" "$program"
	sh -c 'echo $$ >"$0/cgroup.procs" && exec "$1"' "$group/layershard-test" "$program"
	all_free 260 "after a cgroup's limit"
else
	leave "no cgroup here limits reserved pages"
fi
