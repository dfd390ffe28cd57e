#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# mutants.sh [--jobs N] [ID...] - see the small faults of tests/mutants found, each by the one test that it names: all
# of them, or those of these names. Works on copies of the sources in build-mutants/; scripts/mutants.py says how.
set -eu

exec python3 "$(dirname "$0")/mutants.py" "$@"
