#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# install_packages.sh [--check] [--ci] - install the Debian or Ubuntu packages that are missing, and nothing else.
#   (always)  what building, the model's download and the demo need
#   --check   also what the tests need
#   --ci      also what the longer checks need: clang with its sanitizers, valgrind
# Needs root only if something is missing; without root and without sudo it prints the command to run and exits 1. On
# other systems it names what is needed, and goes on if the tools are there.
set -eu

packages="gcc libc6-dev binutils make cmake pkg-config libjansson-dev libpcre2-dev libopenblas-dev"
packages="$packages python3 python3-pip ca-certificates"
tools="gcc make cmake pkg-config python3"
for group in "$@"; do
	case $group in
	--check) packages="$packages g++ libcmocka-dev python3-pytest python3-venv" tools="$tools g++" ;;
	--ci) packages="$packages clang libclang-rt-dev valgrind" tools="$tools clang valgrind" ;;
	*) echo "usage: install_packages.sh [--check] [--ci]" >&2; exit 2 ;;
	esac
done

is_installed() {
	case $1 in
	pkg-config) command -v pkg-config >/dev/null && return ;; # pkgconf serves as well
	esac
	dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed
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
