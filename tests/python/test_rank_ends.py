# SPDX-License-Identifier: Apache-2.0
"""A rank that crashes fails its test, whatever is awaited of it: its pipe closes as that of a rank which was killed."""

import os
import signal

import pytest

import python_ranks


def crash_in_last(group):
    if group.rank == group.size - 1:
        os.kill(os.getpid(), signal.SIGSEGV)


def test_a_crash_is_noticed():
    with pytest.raises(AssertionError, match="rank 1 died: exit code -11"):
        python_ranks.run(2, crash_in_last)


def test_a_crash_is_noticed_between_ranks_of_torch():
    ranks = pytest.importorskip("torch_ranks")
    with pytest.raises(AssertionError, match="rank 1 died: exit code -11"):
        ranks.run(2, lambda rank, size: os.kill(os.getpid(), signal.SIGSEGV) if rank == 1 else None)
