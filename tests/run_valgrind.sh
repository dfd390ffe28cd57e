#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# run_valgrind.sh BUILD - memory errors and leaks by valgrind: the unit tests that are quick under it and set no limits
# of their own, and the program with two ranks on the tiny model.
set -eu

build=$1
export LAYERSHARD_TEST_MODEL_TINY="$build/tests/tiny.gguf" OPENBLAS_NUM_THREADS=1
log=$(mktemp -d)
trap 'rm -rf "$log"' EXIT

check() { # check NAME COMMAND...
	name=$1
	shift
	echo "valgrind: $name"
	valgrind --quiet --error-exitcode=99 --leak-check=full --errors-for-leak-kinds=definite,indirect \
		--show-leak-kinds=definite,indirect --trace-children=yes --log-file="$log/%p" \
		"$@" >"$log/output" 2>&1 || {
		status=$?
		cat "$log/output"
		find "$log" -type f ! -name output -size +0 -exec cat {} +
		echo "valgrind: $name failed with exit status $status" >&2
		exit 1
	}
}

for test in test_status test_verdict test_slotmap test_layout test_ring test_poison test_readers test_no_memory \
	test_discovery test_name_holder test_rendezvous test_rendezvous_place test_rendezvous_root test_sockets \
	test_user test_registry test_local test_agree test_group test_load test_pass test_series test_verify test_late \
	test_callback test_callback_calls test_callback_device test_callback_device_failures test_callback_rounds \
	test_callback_worker test_defects test_shm test_shm_copy test_control test_control_deaths test_control_page \
	test_rejoin test_faults test_throttle test_trace test_wrapper test_gguf test_engine; do
	check "$test" "$build/tests/$test"
done
for placement in whole striped; do
	check "layershard-llama, 2 ranks, $placement" "$build/layershard-llama" --model "$LAYERSHARD_TEST_MODEL_TINY" \
		--ranks 2 --placement "$placement" --prompt a --prompt b --max-tokens 3 --json
done
