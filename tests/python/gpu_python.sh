#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# gpu_python.sh FILE PYTHON... - run pytest on FILE by LAYERSHARD_PYTHON, or by the first PYTHON that has torch and
# pytest; their own CUDA must be there. Exit 77 with the reason where none has, or where FILE skips everything.
set -eu

file=$1
shift
[ -z "${LAYERSHARD_PYTHON:-}" ] || set -- "$LAYERSHARD_PYTHON"
chosen=
for python in "$@"; do
	if "$python" -c 'import importlib.util as u; exit(not (u.find_spec("torch") and u.find_spec("pytest")))' \
		2>/dev/null; then
		chosen=$python
		break
	fi
done
if [ -z "$chosen" ]; then
	echo "skipped: none of these has torch and pytest: $* (LAYERSHARD_PYTHON can name one that has)"
	exit 77
fi
status=0
"$chosen" -m pytest -q -rs -p no:cacheprovider "$file" || status=$?
[ "$status" -ne 5 ] || status=77 # no test in FILE was run
exit "$status"
