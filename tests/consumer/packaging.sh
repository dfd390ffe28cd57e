#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# packaging.sh SOURCE PYTHON - the library as packagers and other projects build it: with link-time optimisation by gcc
# and clang, in the ways of distributions and of CMake, each showing the public names and no other; as one unity build;
# and inside another project, which decides on build type, kind of library and installation.
set -eu

source=$(cd "$1" && pwd)
python=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset CFLAGS LDFLAGS LAYERSHARD_RANK LAYERSHARD_SIZE LAYERSHARD_JOB

fail() {
	echo "packaging: $*" >&2
	exit 1
}

build() { # build NAME SOURCE OPTION...
	built=$1 from=$2
	shift 2
	{ cmake -B "$work/$built" -S "$from" "$@" && cmake --build "$work/$built" -j 2; } >"$work/log" 2>&1 ||
		fail "$built is not built: $(tail -n 30 "$work/log")"
	! grep -i "warning:" "$work/log" || fail "$built is not built without warnings"
}

lacks_faults() { # lacks_faults PROGRAM LIBRARY: they are for tests, and asking for them is told so
	! LAYERSHARD_TRANSPORT=faults=fetch@1=fail,local "$1" >"$work/log" || fail "$2 makes faults"
	grep -q "cannot do that.*faults is for tests, and this library was built without them" "$work/log" ||
		fail "$2 does not say why it has no faults: $(cat "$work/log")"
	! grep -q "fault injected" "$2" || fail "$2 holds the code of faults"
	! LAYERSHARD_TRANSPORT=nonsense "$1" >"$work/log" || fail "$2 has a transport 'nonsense'"
	! grep -q faults "$work/log" || fail "$2 offers faults: $(cat "$work/log")"
}

uses() { # uses NAME COMPILER FLAG...: a program with either library of the build
	folder=$work/$1 compiler=$2
	shift 2
	for kind in so a; do
		"$compiler" "$@" -I"$source/include" -o "$folder/by_$kind" "$source/tests/consumer/consumer.c" \
			"$folder/liblayershard.$kind" -pthread -ldl ||
			fail "$folder: nothing links with liblayershard.$kind"
		LD_LIBRARY_PATH=$folder "$folder/by_$kind" || fail "$folder: a program with liblayershard.$kind fails"
		LD_LIBRARY_PATH=$folder lacks_faults "$folder/by_$kind" "$folder/liblayershard.$kind"
	done
	"$python" "$source/tests/purity.py" exports "$source" "$folder/liblayershard.so" "$folder/liblayershard.a" ||
		fail "$folder shows other names"
}

optimised() { # optimised COMPILER FLAG...: by the flags of a distribution, and by CMake's own
	compiler=$1
	shift
	for way in "-DCMAKE_C_FLAGS=-g -O2 $*" -DCMAKE_INTERPROCEDURAL_OPTIMIZATION=ON; do
		rm -rf "$work/optimised"
		build optimised "$source" "-DCMAKE_C_COMPILER=$compiler" "-DCMAKE_SHARED_LINKER_FLAGS=$*" "$way" \
			-DLAYERSHARD_BUILD_PROGRAM=OFF
		uses optimised "$compiler" "$@"
	done
}

optimised gcc -flto=auto -ffat-lto-objects
optimised gcc -flto=auto
if command -v clang ld.lld >/dev/null; then
	optimised clang -flto=thin -fuse-ld=lld -Wno-unused-command-line-argument
else
	echo "skipped: no clang with lld"
fi
build unity "$source" -DCMAKE_UNITY_BUILD=ON -DLAYERSHARD_BUILD_PROGRAM=OFF

# What writers of transports ask for comes with the rest then, and only then.
DESTDIR=$work/unity.stage cmake --install "$work/unity" >/dev/null
[ -z "$(find "$work/unity.stage" -name '*conformance*')" ] || fail "the conformance suite was installed unasked"
build suite "$source" -DLAYERSHARD_BUILD_CONFORMANCE=ON -DLAYERSHARD_BUILD_PROGRAM=OFF
DESTDIR=$work/suite.stage cmake --install "$work/suite" >/dev/null
[ "$(find "$work/suite.stage" -name '*conformance*' -type f | wc -l)" = 3 ] || fail "no conformance suite was installed"

# The program that is installed needs jansson alone, and no other program is installed.
mkdir "$work/modules"
cp "$(pkg-config --variable=pcfiledir jansson)/jansson.pc" "$work/modules"
export PKG_CONFIG_LIBDIR="$work/modules"
! cmake -B "$work/whole" -S "$source" >"$work/log" 2>&1 || fail "layershard-llama is configured without its libraries"
grep -q "LAYERSHARD_BUILD_EXAMPLES=OFF" "$work/log" || fail "nobody says how to leave out what cannot be built"
build program "$source" -DLAYERSHARD_BUILD_EXAMPLES=OFF -DLAYERSHARD_BUILD_BENCH=OFF
unset PKG_CONFIG_LIBDIR
DESTDIR=$work/program.stage cmake --install "$work/program" >/dev/null
[ "$(ls "$work/program.stage/usr/local/bin")" = layershard ] || fail "there is no program installed, or more than one"
"$work/program.stage/usr/local/bin/layershard" info >/dev/null || fail "the installed program fails"

parent() { # parent NAME OPTION...
	name=$1
	shift
	build "$name" "$source/tests/consumer/parent" -DLAYERSHARD="$source" "$@"
	DESTDIR=$work/$name.stage cmake --install "$work/$name" >/dev/null
	"$work/$name/parent" || fail "$name: the program fails"
}

version=$(sed -n 's/^Version: //p' "$work/unity/layershard.pc")
parent plain
[ "$(find "$work/plain.stage" -type f | wc -l)" = 1 ] || fail "a part of another project installs itself"
parent static -DBUILD_SHARED_LIBS=OFF -DLAYERSHARD_INSTALL=ON
[ -z "$(find "$work/static" "$work/static.stage" -name 'liblayershard.so*')" ] ||
	fail "a shared library nobody asked for"
! ldd "$work/static/parent" | grep -q layershard || fail "the program wants a shared library"
parent shared -DBUILD_SHARED_LIBS=ON -DLAYERSHARD_INSTALL=ON
[ -z "$(find "$work/shared" "$work/shared.stage" -name 'liblayershard.a')" ] || fail "an archive that nobody asked for"
ldd "$work/shared/parent" | grep -q layershard || fail "the program does not use the shared library"

# What is installed without a shared library serves a stranger, too.
build stranger "$source/tests/consumer" -DCMAKE_PREFIX_PATH="$work/static.stage/usr/local" -DWANTED_VERSION="$version"
"$work/stranger/plan_by_layershard" || fail "a stranger's program fails with what is installed"
