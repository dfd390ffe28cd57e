#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# python_env.sh FOLDER [--torch | --lint] - a virtual environment with what the tests of the Python package need, found
# under FOLDER; its interpreter is printed. Made once for all trees that need the same: it is kept outside the tree,
#   $LAYERSHARD_CACHE, else $XDG_CACHE_HOME/layershard, else $HOME/.cache/layershard
# under a name that follows from the versions it holds, and FOLDER is a link to it; FOLDER itself where there is no such
# place. One that was interrupted is made again; who comes meanwhile waits. Old ones may be deleted: python-*.
#   (neither)  tests/python/requirements.txt: pytest, what checks the ctypes table and the types, what builds the wheel
#   --torch    also requirements-torch.txt: PyTorch and the model libraries, some 5.7 GB, two minutes
#   --lint     requirements-lint.txt instead: what formats and looks through the sources
# Packages come from PyPI, or from where pip is configured to look. LAYERSHARD_PYTHON names another python3 to use.
set -eu

fail() {
	echo "python_env.sh: $*" >&2
	exit 1
}

lists=$(cd "$(dirname "$0")/../tests/python" && pwd)
case $#:${2:-} in
1:) list=$lists/requirements.txt ;;
2:--torch) list=$lists/requirements-torch.txt ;;
2:--lint) list=$lists/requirements-lint.txt ;;
*) echo "usage: python_env.sh FOLDER [--torch | --lint]" >&2; exit 2 ;;
esac
folder=$1
python=${LAYERSHARD_PYTHON:-/usr/bin/python3}
[ -x "$python" ] || python=$(command -v python3) || fail "there is no python3"

cache=${LAYERSHARD_CACHE:-${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}}
[ -n "${LAYERSHARD_CACHE:-}" ] || cache=${cache:+$cache/layershard}
key=$({ cat "$lists/requirements.txt" "$list" && "$python" -c 'import sys; print(sys.executable, sys.version)'; } |
	sha256sum | cut -c 1-16)
if [ -n "$cache" ] && mkdir -p "$cache" 2>/dev/null && [ -w "$cache" ]; then
	home=$(cd "$cache" && pwd)/python-$key
else
	home=$folder
fi
stamp=$home/layershard-complete # holds the key; written last

is_complete() {
	[ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && "$home/bin/python" -c ''
}

make_environment() {
	echo "python_env.sh: installing $list into $home" >&2
	"$python" -m venv --clear "$home" >&2 ||
		fail "$python makes no virtual environment: on Debian and Ubuntu install python3-venv"
	"$home/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
		--requirement "$list" >&2 ||
		fail "pip could not install $list"
	echo "$key" >"$stamp"
}

mkdir -p "$(dirname "$folder")"
if [ "$home" = "$folder" ]; then
	[ ! -L "$folder" ] || rm "$folder"
elif [ -d "$folder" ] && [ ! -L "$folder" ]; then
	[ -f "$folder/pyvenv.cfg" ] || fail "$folder is there and is no virtual environment"
	rm -rf "$folder" # of a time without the other place
fi
exec 9>"$home.lock" # a pip that outlives this script holds it too
flock 9
is_complete || make_environment
[ "$home" = "$folder" ] || ln -sfn "$home" "$folder"
echo "$folder/bin/python"
