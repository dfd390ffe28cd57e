#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# run.sh SOURCE BUILD CC - a transport from outside the tree: install what BUILD holds under a DESTDIR, build box.c and
# the program of docs/writing-a-transport.md by pkg-config with the installed headers, the shared library and the
# conformance suite, and run it.
set -eu

source=$(cd "$1" && pwd)
build=$(cd "$2" && pwd)
cc=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
	echo "outside: $*" >&2
	exit 1
}

for part in Unspecified conformance; do
	DESTDIR=$work/stage cmake --install "$build" --component $part >"$work/log" ||
		fail "install failed: $(cat "$work/log")"
done
pc=$(find "$work/stage" -name layershard-conformance.pc)
[ -n "$pc" ] || fail "no layershard-conformance.pc was installed"
libdir=$(dirname "$(dirname "$pc")")
mkdir "$work/own" # nothing of the tree can be found from there
cp "$source/tests/outside/box.c" "$work/own"
# shellcheck disable=SC2016 # the quotes are Markdown's
sed -n '/^```c$/,/^```$/p' "$source/docs/writing-a-transport.md" | sed '/^```/d' >"$work/own/main.c"

# The library's own from the stage, cmocka's from wherever the system has it.
stage() { sed "s|^prefix=|prefix=$work/stage|" "$1" >"$work/own/$(basename "$1")"; }
stage "$libdir/pkgconfig/layershard.pc"
stage "$pc"
flags=$(PKG_CONFIG_PATH=$work/own pkg-config --cflags --libs layershard-conformance)

compile() { # compile OUTPUT SOURCE
	# shellcheck disable=SC2086 # several words
	"$cc" -std=c11 -Wall -Wextra -Wpedantic -Werror -o "$work/$1" "$work/own/$2" "$work/own/main.c" $flags ||
		fail "$2 does not compile"
}
compile box box.c

# try WAY ARGUMENT...: all of the suite, which says itself what does not apply.
try() {
	LD_LIBRARY_PATH=$libdir "$work/box" "$@" >"$work/log" 2>&1 || fail "box $* fails: $(cat "$work/log")"
	apart=$(sed -n 's/ to box by [a-z]*$//p' "$work/log")
	[ "${apart#*do not apply}" != "$apart" ] || fail "box $* does not say what does not apply: $(cat "$work/log")"
	echo "box $*: $(grep -c '^\[       OK \]' "$work/log") tests, of which $apart"
}
unset LAYERSHARD_RANK LAYERSHARD_SIZE LAYERSHARD_JOB
try forks configurations=40
try threads configurations=40
try forks poison=1 configurations=12

# And it notices: the same transport, which copies a layer's neighbour.
sed 's/lshard_copy_layer(base->plan, position,/lshard_copy_layer(base->plan, position ? position - 1 : 0,/' \
	"$source/tests/outside/box.c" >"$work/own/wrong.c"
! cmp -s "$source/tests/outside/box.c" "$work/own/wrong.c" || fail "box.c has changed: nothing is spoilt in it"
compile wrong wrong.c
! LD_LIBRARY_PATH=$libdir "$work/wrong" forks configurations=4 only='walks*' >"$work/log" 2>&1 ||
	fail "a transport that brings other layers passes"
