# SPDX-License-Identifier: Apache-2.0
"""examples/python/prefill_70b.py, at a size for processors."""

import whole_programs


def test_passes_of_two_ranks():
    sizes = "--layers 5 --width 64 --heads 4 --kv-heads 2 --hidden 96 --tokens 16 --passes 2 --dtype float32".split()
    lines = whole_programs.torchrun(2, "examples/python/prefill_70b.py", *sizes, "--transport", "shm:copy").splitlines()
    assert "rank 0 of 2, transport shm:copy (as asked)" in lines  # rank 1 may be done before it is printed
    assert sorted(line.split(":")[0] for line in lines if "tokens/s" in line) == ["rank 0 of 2", "rank 1 of 2"]
    assert all("finite" in line and "NOT" not in line for line in lines if "tokens/s" in line)
