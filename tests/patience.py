# SPDX-License-Identifier: Apache-2.0
"""How long tests wait for what comes at once unless something hangs; patience.h says more."""

import os


def patience(amount: int) -> int:
    """@amount of any unit, LAYERSHARD_TEST_PATIENCE times as much."""
    return amount * int(os.environ.get("LAYERSHARD_TEST_PATIENCE", "1"))


LONG_MS = patience(60000)  # of a group whose ranks all come
LONG_S = patience(300)  # of a process that ends by itself
