# SPDX-License-Identifier: Apache-2.0
"""bench/torch/python_overhead.py measures every kind of hook, and sees nothing allocated."""

import sys

import whole_programs


def test_overhead_is_measured():
    text = whole_programs.run(sys.executable, "bench/torch/python_overhead.py", "--blocks", "3")
    assert text.count("0 allocations in 5 passes") == 6 and text.count("grad mode, scope") == 3
    assert "us each" in text
