#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# run.sh SOURCE BUILD CC CXX - install what BUILD holds under a DESTDIR and use it as a stranger would: a C program by
# pkg-config, with the shared and the static library; a C++ program by the CMake package; the example on four ranks,
# and the program in docs/c.md.
set -eu

source=$(cd "$1" && pwd)
build=$(cd "$2" && pwd)
cc=$3
cxx=$4
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
	echo "consumer: $*" >&2
	exit 1
}

DESTDIR=$work/stage cmake --install "$build" >"$work/install.log" || fail "install failed: $(cat "$work/install.log")"
pc=$(find "$work/stage" -name layershard.pc)
[ -n "$pc" ] || fail "no layershard.pc was installed"
libdir=$(dirname "$(dirname "$pc")")
! grep -rqF "$source" "$libdir/pkgconfig" "$libdir/cmake" || fail "an installed file names the source tree"

# pkg-config, as from a cross-compiler's sysroot.
export PKG_CONFIG_LIBDIR="$libdir/pkgconfig" PKG_CONFIG_SYSROOT_DIR="$work/stage"
strict="-std=c99 -Wall -Wextra -Wpedantic -Werror"
version=$(pkg-config --modversion layershard)
soname=liblayershard.so.${version%.*} # while the major version is 0, a minor one may change the interface
[ "$(readlink "$libdir/liblayershard.so")" = "$soname" ] || fail "liblayershard.so leads elsewhere than to $soname"

compile() { # compile OUTPUT SOURCE FLAG... (words are split on purpose)
	output=$1 file=$2
	shift 2
	# shellcheck disable=SC2048,SC2086
	"$cc" $strict -o "$work/$output" "$file" $* || fail "$file does not compile with: $*"
}

compile by_shared "$source/tests/consumer/consumer.c" "$(pkg-config --cflags --libs layershard)"
compile by_static "$source/tests/consumer/consumer.c" "$(pkg-config --cflags layershard)" \
	"-Wl,-Bstatic $(pkg-config --libs layershard) -Wl,-Bdynamic" \
	"$(pkg-config --libs --static layershard | sed 's/-llayershard//')"
compile minimal "$source/examples/minimal.c" "$(pkg-config --cflags --libs layershard)"

# The program in docs/c.md.
# shellcheck disable=SC2016 # no command to run
sed -n '/^```c$/,/^```$/p' "$source/docs/c.md" | sed '/^```/d' >"$work/docs.c"
compile docs "$work/docs.c" "$(pkg-config --cflags --libs layershard)"

run() { # run WHAT COMMAND...: it succeeds and names the version that pkg-config names
	what=$1
	shift
	output=$("$@") || fail "$what failed: $output"
	echo "$what: $output"
	case $output in *" $version "*) ;; *) fail "$what does not name version $version" ;; esac
}

unset LAYERSHARD_RANK LAYERSHARD_SIZE LAYERSHARD_JOB
run "C, shared" env LD_LIBRARY_PATH="$libdir" "$work/by_shared"
run "C, static" "$work/by_static"
LD_LIBRARY_PATH=$libdir "$work/docs" || fail "the program in docs/c.md fails"
! ldd "$work/by_static" | grep -q layershard || fail "the static consumer wants the shared library"

cmake -S "$source/tests/consumer" -B "$work/cmake" -DCMAKE_PREFIX_PATH="$(dirname "$libdir");$libdir" \
	-DCMAKE_CXX_COMPILER="$cxx" -DWANTED_VERSION="$version" >"$work/cmake.log" 2>&1 ||
	fail "find_package failed: $(cat "$work/cmake.log")"
cmake --build "$work/cmake" >"$work/cmake.log" 2>&1 || fail "the C++ consumer does not build: $(cat "$work/cmake.log")"
run "C++, shared" "$work/cmake/plan_by_layershard"
run "C++, static" "$work/cmake/plan_by_layershard_static"

# The example: four processes that find each other by a job name; every rank sees every layer.
patience=${LAYERSHARD_TEST_PATIENCE:-1}
export LAYERSHARD_SIZE=4 LAYERSHARD_JOB="consumer-$$" LAYERSHARD_TIMEOUT_MS=$((60000 * patience))
for rank in 0 1 2 3; do
	LAYERSHARD_RANK=$rank LD_LIBRARY_PATH=$libdir timeout $((300 * patience)) "$work/minimal" \
		>"$work/rank.$rank" 2>&1 &
done
wait
for rank in 0 1 2 3; do
	echo "minimal: $(cat "$work/rank.$rank")"
	grep -q "^rank $rank of 4: sum 1835008 by " "$work/rank.$rank" || fail "rank $rank did not see all layers"
done
