# SPDX-License-Identifier: Apache-2.0
"""run_tests.sh on tests that pass, are skipped and fail: what it counts, and its exit status."""

import os
import pathlib
import subprocess

RUN_TESTS = pathlib.Path(__file__).with_name("run_tests.sh")


def run(folder, strict, **tests):
    lines = []
    for name, command in tests.items():
        lines.append(f"add_test({name} sh -c [=[{command}]=])")
        lines.append(f"set_tests_properties({name} PROPERTIES SKIP_RETURN_CODE 77)")
    (folder / "CTestTestfile.cmake").write_text("\n".join(lines) + "\n")
    environment = os.environ | {"LAYERSHARD_TEST_STRICT": str(int(strict))}
    command = [str(RUN_TESTS), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_skip_is_counted_with_its_reason_and_fails_in_strict_mode(tmp_path):
    tests = {"fine": "true", "told": "echo 'skipped: no tool'; exit 77", "silent": "echo no tool; exit 77"}
    tests["partly"] = "echo 'SKIPPED [1] test_it.py:3: no room'"
    done = run(tmp_path, False, **tests)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.partition("Skipped (3):\n")[2].splitlines()
    assert sorted(said) == ["  partly: [1] test_it.py:3: no room", "  silent: it does not say why", "  told: no tool"]
    for name in ("told", "silent", "partly"):
        done = run(tmp_path, True, fine="true", **{name: tests[name]})
        assert done.returncode == 1 and "a skipped test counts as failed" in done.stderr, name


def test_no_skip_is_said_and_a_failure_fails(tmp_path):
    done = run(tmp_path, True, fine="true")
    assert done.returncode == 0 and done.stdout.endswith("Skipped: none\n")
    done = run(tmp_path, False, fine="true", broken="echo it is so; false")
    assert done.returncode != 0 and "it is so" in done.stdout
