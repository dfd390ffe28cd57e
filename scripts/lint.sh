#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# lint.sh [--fix] PYTHON - look through all sources that git knows: the format of C and Python, what ruff and shellcheck
# find; and lines of C, CMake and shell over 120 columns. PYTHON is that of an environment with these tools
# (scripts/python_env.sh FOLDER --lint). With --fix files are formatted, and what can be fixed safely is; else nothing
# is written. Status 1 where something is left.
set -eu

usage="usage: lint.sh [--fix] PYTHON"
fix=
if [ "${1:-}" = --fix ]; then
	fix=1
	shift
fi
[ $# -eq 1 ] && [ -x "$1" ] || { echo "$usage" >&2; exit 2; }
bin=$(cd "$(dirname "$1")" && pwd)
cd "$(dirname "$0")/.."

status=0
look() { # look WHAT PATTERN... - COMMAND...: on all files of the patterns
	what=$1
	shift
	patterns=
	while [ "$1" != - ]; do
		patterns="$patterns $1"
		shift
	done
	shift
	set -f
	# shellcheck disable=SC2086 # a list of patterns
	git ls-files -z -- $patterns | xargs -0 -n 60 -P "$(nproc)" "$@" || {
		echo "lint.sh: $what" >&2
		status=1
	}
	set +f
}

if [ -n "$fix" ]; then
	look "clang-format failed" '*.c' '*.h' '*.cc' - "$bin/clang-format" -i
	look "ruff could not format these" '*.py' - "$bin/ruff" format --quiet --no-cache
	look "ruff could not fix these" '*.py' - "$bin/ruff" check --quiet --no-cache --fix
else
	look "not as clang-format has it: make format" '*.c' '*.h' '*.cc' - "$bin/clang-format" --dry-run -Werror
	look "not as ruff has it: make format" '*.py' - "$bin/ruff" format --quiet --no-cache --diff
	look "ruff found these" '*.py' - "$bin/ruff" check --quiet --no-cache
fi
look "shellcheck found these" '*.sh' .ci/run - "$bin/shellcheck" --external-sources

# clang-format leaves comments alone, and nothing looks at CMake and shell. expand: a tab is eight columns.
long=$(git ls-files -- '*.c' '*.h' '*.cc' '*.cmake' '*CMakeLists.txt' '*.sh' .ci/run | while read -r file; do
	expand "$file" | awk -v file="$file" 'length > 120 { print file ":" FNR ": " length " columns" }'
done)
[ -z "$long" ] || {
	printf '%s\n' "$long" "lint.sh: more than 120 columns" >&2
	status=1
}
exit $status
