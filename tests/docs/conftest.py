# SPDX-License-Identifier: Apache-2.0
"""Where the tests of the pages find what tests of programs share."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import programs  # noqa: E402, F401
