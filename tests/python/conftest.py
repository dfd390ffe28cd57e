# SPDX-License-Identifier: Apache-2.0
"""Tests of the Python package find it, and are started by no launcher."""

import package_settings  # noqa: F401
