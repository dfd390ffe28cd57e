#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# install_packages.sh [--check] [--ci] | --gpu - install the Debian or Ubuntu packages that are missing, and no more.
#   (always)  what building, the model's download and the demo need
#   --check   also what the tests need
#   --ci      also what the longer checks need: clang with its sanitizers, spin, valgrind
#   --gpu     what building and the tests on a GPU need, alone
# What is there without a package counts as well: a program in PATH, a library that pkg-config finds. Without network,
# scripts/gpu_packages.sh makes a folder of the libraries. Needs root only if something is missing; without root and
# without sudo it prints the command to run and exits 1. On other systems it names what is needed, and goes on if the
# tools are there.
set -eu

build="gcc libc6-dev binutils make cmake pkg-config libjansson-dev libpcre2-dev libopenblas-dev python3"
packages="$build python3-pip ca-certificates"
tools="gcc make cmake pkg-config python3"
for group in "$@"; do
	case $group in
	--gpu) packages="$build g++ libcmocka-dev" tools="$tools g++" ;;
	--check) packages="$packages g++ libcmocka-dev openmpi-bin python3-pytest python3-venv" tools="$tools g++" ;;
	--ci) packages="$packages clang libclang-rt-dev spin valgrind" tools="$tools clang spin valgrind" ;;
	*) echo "usage: install_packages.sh [--check] [--ci] | --gpu" >&2; exit 2 ;;
	esac
done

is_installed() {
	dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed && return
	case $1 in
	gcc | g++ | make | cmake | pkg-config | python3 | clang | spin | valgrind) command -v "$1" >/dev/null ;;
	openmpi-bin) command -v mpirun >/dev/null ;;
	binutils) command -v ld >/dev/null ;;
	libc6-dev) echo '#include <stdio.h>' | gcc -E - >/dev/null 2>&1 ;;
	libjansson-dev) pkg-config --exists jansson 2>/dev/null ;;
	libpcre2-dev) pkg-config --exists libpcre2-8 2>/dev/null ;;
	libopenblas-dev) pkg-config --exists openblas 2>/dev/null || pkg-config --exists cblas 2>/dev/null ;;
	libcmocka-dev) pkg-config --exists cmocka 2>/dev/null ;;
	*) false ;;
	esac
}

# Older releases ship clang's sanitizers with clang itself.
is_offered() {
	[ "$1" != libclang-rt-dev ] || apt-cache show "$1" >/dev/null 2>&1
}

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
	absent=
	for tool in $tools; do
		command -v "$tool" >/dev/null || absent="$absent $tool"
	done
	[ -z "$absent" ] && exit 0
	echo "install_packages.sh: this system has no apt-get, and these programs are missing:$absent" >&2
	echo "Install what corresponds to these Debian packages: $packages" >&2
	exit 1
fi

missing=
for package in $packages; do
	is_installed "$package" || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ]; then
	as_root="env"
elif command -v sudo >/dev/null; then
	as_root="sudo env"
else
	echo "install_packages.sh: packages are missing, and this is neither root nor is there sudo. Run as root:" >&2
	echo "  apt-get update && apt-get install --no-install-recommends -y$missing" >&2
	exit 1
fi

echo "install_packages.sh: installing$missing" >&2
$as_root apt-get update -q
wanted=
for package in $missing; do
	! is_offered "$package" || wanted="$wanted $package"
done
[ -n "$wanted" ] || exit 0
# shellcheck disable=SC2086 # a list of words
$as_root DEBIAN_FRONTEND=noninteractive apt-get install --no-install-recommends -y -q $wanted
