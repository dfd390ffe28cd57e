# SPDX-License-Identifier: Apache-2.0
"""Where the tests of examples/python find what those of the Python package share."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "python"))
import package_settings  # noqa: E402, F401
