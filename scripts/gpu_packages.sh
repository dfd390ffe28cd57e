#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# gpu_packages.sh [DIRECTORY] - put the libraries that this tree is built and tested with into DIRECTORY (default
# build-gpu-packages, some 40 MB), to be carried to a GPU machine that has compilers, CMake and Python but no network:
# jansson, PCRE2, OpenBLAS, cmocka, pkg-config to find them, and make. On that machine, of any distribution whose glibc
# is not older than the one here:
#   . build-gpu-packages/use.sh && LAYERSHARD_TEST_STRICT=1 make check-gpu
# Runs on Debian or Ubuntu of the same processor after `apt-get update`; installs nothing and needs no root.
set -eu
cd "$(dirname "$0")/.."
case ${1-} in
-*)
	echo "usage: gpu_packages.sh [DIRECTORY]" >&2
	exit 2
	;;
esac
directory=${1:-build-gpu-packages}

fail() {
	echo "gpu_packages.sh: $*" >&2
	exit 1
}

if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
	fail "apt-get and dpkg-deb are needed: run it on Debian or Ubuntu"
fi
if [ -e "$directory" ] && [ ! -f "$directory/use.sh" ]; then
	fail "$directory is there, and not by this script: it would be replaced"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"

# With what each of them needs; the names of those differ from release to release.
development="libjansson-dev libpcre2-dev libopenblas-serial-dev libcmocka-dev"
# shellcheck disable=SC2086 # a list of words
packages=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
	--no-enhances make pkgconf $development |
	grep -Ex 'make|pkgconf(-bin)?|lib(pkgconf|jansson|pcre2|openblas|cmocka|gfortran|quadmath)[a-z0-9-]*' | sort -u)
for package in $packages; do
	(cd "$work" && apt-get download -q "$package" >apt.log 2>&1) || fail "$package: $(grep '^E:' "$work/apt.log")"
done
for file in "$work"/*.deb; do
	dpkg-deb -x "$file" "$work/all"
done

# One flat folder, without what only static linking needs.
rm -rf "$directory"
mkdir -p "$directory/bin" "$directory/include" "$directory/lib/pkgconfig"
cp "$work/all/usr/bin/pkgconf" "$directory/bin/pkg-config"
cp "$work/all/usr/bin/make" "$directory/bin"
find "$work/all/usr/include" -name '*.h' -exec cp {} "$directory/include" \;
find "$work/all/usr/lib" -name '*.so*' ! -name 'libblas*' ! -name 'liblapack*' -exec cp -P {} "$directory/lib" \;
for module in jansson libpcre2-8 openblas cmocka; do
	found=$(find "$work/all/usr/lib" -name "$module.pc")
	[ -f "$found" ] || fail "no $module.pc in the packages"
	cat >"$directory/lib/pkgconfig/$module.pc" <<END
prefix=\${pcfiledir}/../..
Name: $module
Description: as scripts/gpu_packages.sh found it
$(grep '^Version:' "$found")
Cflags: -I\${prefix}/include
Libs: -L\${prefix}/lib -l${module#lib}
END
done

# To be sourced from the top of the tree, as the head of this file says.
name=$(basename "$directory")
cat >"$directory/use.sh" <<END
# Sourced in the folder that holds $name: the libraries of scripts/gpu_packages.sh are found.
layershard_packages=\$PWD/$name
PATH=\$PATH:\$layershard_packages/bin # the machine's own programs come first
PKG_CONFIG_PATH=\$layershard_packages/lib/pkgconfig
LD_LIBRARY_PATH=\$layershard_packages/lib\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
export PATH PKG_CONFIG_PATH LD_LIBRARY_PATH
END
du -sh "$directory"
